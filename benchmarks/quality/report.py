"""What docs/results.md and the README say of the loss, and its curves, from the saved results of run.py.

    python benchmarks/quality/report.py

For each family and scale: the loss of every arm on held-out data at the end of training, against dense of the same
seed; whether the claims and the order of the ablations hold; the trials; curves of that loss over steps and, of runs
that had their GPU to themselves, over time; flip rates; the search of lambda. The README has its first table.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from arms import ABLATIONS, TRIALS
from claims import at_equal_time, behind_searches, claims, learning_rates
from curves import Results, draw, draw_flips, image, searched
from families import kind
from saved import (
    CLAIM,
    FST,
    JUDGED,
    MEANING,
    NAMES,
    SCALES,
    Of,
    alone,
    another_lr,
    by_loss_of,
    finished,
    holds,
    load,
    pairs,
    ratios,
    with_spread,
)

ROOT = Path(__file__).parents[2]
DOCUMENT, README = ROOT / "docs" / "results.md", ROOT / "README.md"
BEGIN, END = "<!-- made by benchmarks/quality/report.py -->", "<!-- end -->"
BEGIN_SUMMARY = BEGIN.replace(" -->", ": summary -->")


def table(results: Results) -> str:
    """One row an ablation."""
    runs = [run for arm in results.values() for run in arm]
    with_hits = any(at[3] is not None for run in runs for at in run["held_out"])
    head = ["arm", "decay", "held-out loss", "over dense", *["accuracy"] * with_hits, "flips: first, peak, last"]
    lines = ["| " + " | ".join([*head, "seconds", "seeds"]) + " |", "|---" * (len(head) + 2) + "|"]
    for arm in ABLATIONS:
        if arm in results:
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
    losses = with_spread([run["held_out"][-1][2] for run in runs], 4, "")
    cells = [MEANING[arm], decay, losses, "" if arm == "dense" else over(results, arm, "dense")]
    if with_hits:
        cells.append(f"{mean(run['held_out'][-1][3] for run in runs):.4f}")
    rates = [rate for _, rate in runs[0]["flips"]]
    cells.append(f"{rates[0]:.3f}, {max(rates):.3f}, {rates[-1]:.3f}" if rates else "")
    alone = [run["seconds"] for run in runs if not run["settings"]["shared"]]
    return [*cells, f"{mean(alone):.0f}" if alone else "", str(len(runs))]


def over(results: Results, arm: str, base: str) -> str:
    """Mean and standard deviation over seeds of what an arm loses against another one of the same seed."""
    found = pairs(results, arm, base)
    if not found:
        return ""
    text = with_spread([loss - other for loss, other in found], 4)
    if by_loss_of(results):  # where the least loss is near 0 a ratio says nothing
        text += f" ({with_spread([100 * (loss / other - 1) for loss, other in found], 2)}%)"
    return text


def trials(results: Results) -> str:
    """One row a trial, beside the FST that it changes; "" where there is none."""
    if not any(arm in results for arm in TRIALS):
        return ""
    lines = ["| FST, changed | over dense | over FST, with `lr_scale` where it has one | better |", "|---|---|---|---|"]
    for arm in (*FST, *TRIALS):
        if arm in results:
            base = "fst-lr" if arm.startswith("lr-") else "fst"
            found = pairs(results, arm, base)
            better = f"in {sum(loss < other for loss, other in found)} of {len(found)} seeds"
            more = ["", ""] if arm in FST else [over(results, arm, base), better if found else ""]
            lines.append("| " + " | ".join([MEANING[arm], over(results, arm, "dense"), *more]) + " |")
    return "\n".join(lines) + "\n"


def summary(found: dict[Of, Results]) -> list[str]:
    """The table of the claim: every family and scale at its own learning rate."""
    columns = {
        "fst": "FST",
        "fst-lr": "with `lr_scale`",
        "lr-dense-start": "and a dense start",
        "lr-mixed-wgrad": "and MVUE in up alone",
        "lr-dense-wgrad": "and no MVUE",
        "lr-dense-ends": "and no MVUE, dense start and last third",
        "half": "dense, half the width",
    }
    lines = [
        "Held-out loss at equal steps, percent over dense's; of the ViT and the translation, whose least loss is",
        f"reached, the accuracy. Bold: FST within the claim of {100 * CLAIM:g}%. Without ±: one seed.",
        "",
        f"| | dense | {' | '.join(columns.values())} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for (family, scale, lr), results in found.items():
        runs = finished(results, "dense")
        if another_lr(family, scale, lr) or not runs:
            continue
        by_loss = by_loss_of(results)
        cells = [f"{NAMES[family]}, {SCALES[scale]}"]
        cells.append(f"{mean(run['held_out'][-1][2 if by_loss else 3] for run in runs):.4f}")
        for arm in columns:
            values = ratios(results, arm)
            text = with_spread(values, 2) if values else ""
            cells.append(f"**{text}**" if values and arm in JUDGED and holds(results, values) else text)
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


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
    devices = sorted({run["settings"]["device"] for runs in results.values() for run in runs})
    return text + f"{' and '.join(devices)}, torch {where['torch']}, {where['date']}."


def write(page: Path, begin: str, lines: Sequence[str]) -> None:
    """Put lines between `begin` and END of a page, or make the page of them. Raises SystemExit without `begin`."""
    text = f"{begin}\n{chr(10).join(lines).rstrip()}\n{END}\n"
    if page.exists():
        before, found, rest = page.read_text().partition(f"{begin}\n")
        if not found:
            raise SystemExit(f"found no line {begin} in {page}, need one, and {END}: what is between is replaced")
        text = before + text + rest.partition(f"{END}\n")[2]
    with tempfile.NamedTemporaryFile("w", dir=page.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, page)
    page.chmod(0o644)
    print(f"wrote {page}")


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "quality", help="folder of run.py")
    p.add_argument("--document", type=Path, default=DOCUMENT, help="page to write into")
    p.add_argument("--readme", type=Path, help="page for the first table (default: README.md, of --document's default)")
    args = p.parse_args(argv)
    found = load(args.results)
    pictures = args.results / "curves"
    pictures.mkdir(exist_ok=True)
    lines = [
        "## Loss against dense",
        "",
        "Made by `benchmarks/quality/report.py` from the files of `benchmarks/quality/run.py`; each holds its command,",
        "settings and versions. Every arm starts from the same weights and sees the same batches. Numbers with ± are",
        "means and standard deviations over seeds; what stands over dense, or over FST, is against the run of the same",
        "seed. Seconds are those of training without compilation and evaluation, of runs that had a GPU to themselves,",
        "all feed-forward layers sparse whether that is faster or not: the speed of the method is what",
        "`benchmarks/step.py` measures. Flip rates of dense runs are virtual, of masks that a search would find; each",
        "is over the interval between two refreshes.",
        "",
        *summary(found),
    ]
    for (family, scale, lr), results in found.items():
        other = f", learning rate {lr:g}" if another_lr(family, scale, lr) else ""
        if other and results.keys() == {"dense"}:  # said by `learning_rates`
            continue
        lines += [f"### {NAMES[family]}, {SCALES[scale]}{other}", "", facts(results), "", table(results)]
        rates = [] if other else learning_rates(found, family, scale)
        lines += [
            f"- {sentence}"
            for sentence in [*rates, *claims(results), *behind_searches(results), *at_equal_time(results)]
        ]
        tried = trials(results)
        lines += ["", *["#### Trials", "", tried] * bool(tried)]
        timed = {arm: alone(runs) for arm, runs in results.items() if alone(runs)}
        ablated = {arm: runs for arm, runs in results.items() if arm in ABLATIONS}
        changed = {arm: results[arm] for arm in ("dense", *FST, *TRIALS) if arm in results} if tried else {}
        for what, said, drawn in (
            ("steps", "held-out loss over steps", ablated),
            ("time", "held-out loss over time", timed),
            ("flips", "flip rates", ablated),
            ("trials", "held-out loss of the trials over steps", changed),
            ("trials_flips", "flip rates of the trials", changed),
        ):
            if drawn:
                picture = pictures / f"{kind(family, scale, lr)}_{what}.svg"
                if what.endswith("flips"):
                    draw_flips(drawn, picture)
                else:
                    x, label = (1, "seconds of training") if what == "time" else (0, "step")
                    draw(drawn, picture, x, label)
                lines.append(image(said, picture, args.document))
        lines += ["", *searched(args.results, kind(family, scale, lr), pictures, args.document)]
    write(args.document, BEGIN, lines)
    if args.readme or args.document == DOCUMENT:
        write(args.readme or README, BEGIN_SUMMARY, summary(found))


if __name__ == "__main__":
    main()
