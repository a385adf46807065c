"""docs/results.md and its curves, from the saved results of run.py. No number in it is written by hand.

    python benchmarks/quality/report.py

For each family and scale: the loss of every arm on held-out data at the end of training, against dense; curves of that
loss over steps and over time, and of the flip rates; the search of lambda.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from run import ARMS, TOO_LARGE

ROOT = Path(__file__).parents[2]
NAMES = {
    "gpt": "GPT decoder, next token",
    "bert": "BERT, masked tokens",
    "vit": "ViT classifier",
    "translation": "Encoder-decoder, translation",
}
SCALES = {"tiny": "tiny", "small": "about 20M parameters", "base": "the size of GPT-2 124M and BERT-base"}
MEANING = {
    "dense": "dense",
    "fst": "FST: 2:4 with masked decay and MVUE, the last sixth dense",
    "fst-sparse-end": "FST without the dense end: the final model is 2:4",
    "fst-dense-wgrad": "FST with dense weight gradients (no MVUE)",
    "decay-too-large": f"FST with {TOO_LARGE} times the decay",
    "sr-ste": "FST with the decay on the weights, as SR-STE has it",
    "ste": "STE alone: no decay, no MVUE, no dense end",
    "s-ste": "S-STE: soft thresholds, the final model is 2:4",
    "half": "dense, feed-forward layers of half the width",
}
Results = dict[str, list[dict[str, Any]]]  # arm -> its results, one a seed


def load(folder: Path) -> dict[tuple[str, str], Results]:
    """{(family, scale): {arm: results}}, all in the order of NAMES, SCALES and ARMS."""
    found: dict[tuple[str, str], Results] = {}
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if not path.stem.endswith("_decay")]
    for family in NAMES:
        for scale in SCALES:
            for arm in ARMS:
                for file in files:
                    s = file["settings"]
                    if (s["family"], s["scale"], s["arm"]) == (family, scale, arm):
                        found.setdefault((family, scale), {}).setdefault(arm, []).append(file)
    if not found:
        raise SystemExit(f"found no result in {folder}: run benchmarks/quality/run.py first")
    for (family, scale), results in found.items():
        runs = [run for arm in results.values() for run in arm]
        for what, values in (
            ("data", {json.dumps(run["data"], sort_keys=True) for run in runs}),
            ("steps", {run["settings"]["steps"] for run in runs}),
            ("device", {run["settings"]["device"] for run in runs}),
        ):
            if len(values) > 1:
                raise SystemExit(
                    f"{family} {scale}: found results of {len(values)} different {what} in {folder}, which do not "
                    "compare; keep those of one in the folder"
                )
    return found


def table(results: Results) -> str:
    """One row an arm; over dense: of the same seeds, where there are such."""
    runs = [run for arm in results.values() for run in arm]
    with_hits = any(at[3] is not None for run in runs for at in run["held_out"])
    head = ["arm", "decay", "held-out loss", "over dense", *["accuracy"] * with_hits, "flips: first, peak, last"]
    lines = ["| " + " | ".join([*head, "seconds", "seeds"]) + " |", "|---" * (len(head) + 2) + "|"]
    for arm in results:
        lines.append("| " + " | ".join(row(arm, results, with_hits)) + " |")
    return "\n".join(lines) + "\n"


def row(arm: str, results: Results, with_hits: bool) -> list[str]:
    runs = results[arm]
    options = runs[0]["settings"]["options"]
    decay = f"{options['decay']:.2g}" if options.get("decay") else ""
    failed = [run["error"] for run in runs if run["error"]]
    if failed:
        at = runs[0]["losses"][-1][0] if runs[0]["losses"] else 0
        return [MEANING[arm], decay, f"NaN after step {at}", *[""] * (3 + with_hits), "", str(len(runs))]
    dense = {run["settings"]["seed"]: run["held_out"][-1][2] for run in results.get("dense", []) if not run["error"]}
    final = {run["settings"]["seed"]: run["held_out"][-1] for run in runs}
    losses = [loss for _, _, loss, _ in final.values()]
    spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
    pairs = [(final[seed][2], dense[seed]) for seed in final if seed in dense]
    over = ""
    if pairs and arm != "dense":
        over = f"{mean(loss - base for loss, base in pairs):+.4f}"
        if "least_loss" not in runs[0]["data"]:  # where that is near 0 a ratio says nothing
            over += f" ({100 * mean(loss / base - 1 for loss, base in pairs):+.2f}%)"
    cells = [MEANING[arm], decay, f"{mean(losses):.4f}{spread}", over]
    if with_hits:
        cells.append(f"{mean(hits for _, _, _, hits in final.values()):.4f}")
    rates = [rate for _, rate in runs[0]["flips"]]
    cells.append(f"{rates[0]:.3f}, {max(rates):.3f}, {rates[-1]:.3f}" if rates else "")
    return [*cells, f"{mean(run['seconds'] for run in runs):.0f}", str(len(runs))]


def facts(results: Results) -> str:
    """What the runs share: size, data and where they were made."""
    run = next(iter(results.values()))[0]
    s, data, where = run["settings"], run["data"], run["environment"]
    text = f"{run['parameters'] / 1e6:.1f}M parameters, {s['steps']} steps of AdamW at {s['lr']:g}, "
    text += f"batches of {s['size']['batch']}, masks refreshed every {s['options']['refresh_every']} steps. "
    text += f"Data: {data['name']}"
    if "sha256" in data:
        text += f", {data['train_tokens'] / 1e6:.1f}M tokens, {data['held_out_tokens'] / 1e6:.2f}M held out, "
        text += f"{data['bytes_per_token']:.2f} bytes a token, SHA-256 {data['sha256'][:16]}"
    if "least_loss" in data:
        text += f"; the least loss possible is {data['least_loss']:.4f}, the best accuracy {data['best_accuracy']:.4f}"
    text += f". Losses are nats{' per token' if s['family'] != 'vit' else ''}. "
    return text + f"{s['device']}, torch {where['torch']}, {where['date']}."


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


def searched(folder: Path, family: str, scale: str, pictures: Path, document: Path) -> list[str]:
    """The evidence of each search of lambda, drawn."""
    from sparse24.compiler.find_decay import plot

    lines = []
    for path in sorted(folder.glob(f"{family}_{scale}_*_decay.json")):
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


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "quality", help="folder of run.py")
    p.add_argument("--document", type=Path, default=ROOT / "docs" / "results.md", help="file to write")
    args = p.parse_args(argv)
    found = load(args.results)
    pictures = args.results / "curves"
    pictures.mkdir(exist_ok=True)
    lines = [
        "# Loss against dense",
        "",
        "Made by `benchmarks/quality/report.py` from the files of `benchmarks/quality/run.py`; each holds its command,",
        "settings and versions. Every arm starts from the same weights and sees the same batches. Seconds are those",
        "of training, with compilation, all feed-forward layers sparse whether that is faster or not: the speed of the",
        "method is what `benchmarks/step.py` measures. Flip rates of dense runs are virtual, of masks that a search",
        "would find.",
        "",
    ]
    for (family, scale), results in found.items():
        lines += [f"## {NAMES[family]}, {SCALES[scale]}", "", facts(results), "", table(results)]
        for kind, text in (("steps", "held-out loss over steps"), ("time", "over time"), ("flips", "flip rates")):
            picture = pictures / f"{family}_{scale}_{kind}.svg"
            if kind == "flips":
                draw_flips(results, picture)
            else:
                draw(results, picture, int(kind == "time"), "step" if kind == "steps" else "seconds of training")
            lines.append(image(text, picture, args.document))
        lines += ["", *searched(args.results, family, scale, pictures, args.document)]
    text = "\n".join(lines).rstrip() + "\n"
    with tempfile.NamedTemporaryFile("w", dir=args.document.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, args.document)
    args.document.chmod(0o644)
    print(f"wrote {args.document}")


if __name__ == "__main__":
    main()
