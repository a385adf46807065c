"""The curves of report.py: loss over steps and time, flip rates, the search of lambda."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Results = Mapping[str, list[dict[str, Any]]]  # arm -> its results, one a seed


def draw(results: Results, path: Path, x: int, label: str) -> None:
    """Held-out loss of the first seed of each arm; x: 0 for steps, 1 for seconds."""

    def curves(axes: Any) -> None:
        for i, (arm, runs) in enumerate(results.items()):
            rows = runs[0]["held_out"]
            axes.plot([r[x] for r in rows], [r[2] for r in rows], label=arm, color=f"C{i}", linewidth=1.2)
        drawn = [[r[2] for r in runs[0]["held_out"]] for runs in results.values() if not runs[0]["error"]]
        if drawn:  # the first quarter is the same fall for all, and would press the rest together
            least, first = min(map(min, drawn)), max(losses[len(losses) // 4] for losses in drawn)
            if first > least:
                axes.set_ylim(least - 0.05 * (first - least), first)
        axes.set_xlabel(label)
        axes.set_ylabel("held-out loss (nats)")

    figure(path, curves)


def draw_flips(results: Results, path: Path) -> None:
    def curves(axes: Any) -> None:
        for i, (arm, runs) in enumerate(results.items()):
            rows = runs[0]["flips"]
            style = "--" if arm in ("dense", "half") else "-"
            axes.plot([r[0] for r in rows], [r[1] for r in rows], style, label=arm, color=f"C{i}", linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_ylabel("flip rate between refreshes")

    figure(path, curves)


def figure(path: Path, curves: Callable[[Any], None]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "sparse24"}):
        made = Figure(figsize=(7, 4), layout="constrained")
        axes = made.subplots()
        curves(axes)
        axes.legend(fontsize="small")
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".svg", delete=False) as file:
            made.savefig(file, format="svg", metadata={"Date": None})
    os.replace(file.name, path)
    path.chmod(0o644)


def searched(folder: Path, kind: str, pictures: Path, document: Path) -> list[str]:
    """The evidence of the search of lambda for runs of a kind, drawn."""
    from sparse24.compiler.find_decay import plot

    lines = []
    for path in folder.glob(f"{kind}_decay.json"):
        evidence = json.loads(path.read_text())
        if evidence["dense"] is None:
            continue
        picture = pictures / f"{path.stem}.svg"
        plot(evidence, picture)
        seen = ", ".join(f"{t['decay']:.2g}: {t['mu']:.2f}" for t in evidence["trials"] if t["mu"] is not None)
        found = f"decay {evidence['decay']:.2g} was taken" if evidence["decay"] is not None else "none is feasible"
        low, high = evidence["feasible"]
        lines += [
            f"Search of lambda over {evidence['settings']['steps']} steps, feasible are mu from {low:g} to {high:g}: "
            f"{found} (mu of each: {seen}).",
            "",
            image("mu against lambda", picture, document),
            "",
        ]
    return lines


def image(text: str, picture: Path, document: Path) -> str:
    return f"![{text}]({Path(os.path.relpath(picture, document.parent)).as_posix()})"
