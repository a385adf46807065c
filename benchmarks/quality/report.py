"""What docs/results.md says of the loss, and its curves, from the saved results of run.py.

    python benchmarks/quality/report.py

For each family and scale: the loss of every arm on held-out data at the end of training, against dense of the same
seed; whether the claims and the order of the ablations hold; the trials; curves of that loss over steps and, of runs
that had their GPU to themselves, over time; flip rates; the search of lambda.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from arms import ABLATIONS, ARMS, LR_SCALE, TOO_LARGE, TRIALS
from curves import Results, draw, draw_flips, image, searched
from families import SIZES, kind

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- made by benchmarks/quality/report.py -->", "<!-- end -->"
NAMES = {
    "gpt": "GPT decoder, next token",
    "bert": "BERT, masked tokens",
    "vit": "ViT classifier",
    "translation": "Encoder-decoder, translation",
}
SCALES = {
    "tiny": "tiny",
    "small": "about 20M parameters",
    "base": "the size of GPT-2 124M and BERT-base",
    "wide": "4096 wide",
}
MEANING = {
    "dense": "dense",
    "fst": "FST: 2:4 with masked decay and MVUE, the last sixth dense",
    "fst-lr": f"FST with {LR_SCALE:g} times the learning rate in sparse layers (`lr_scale`)",
    "lr-mixed-wgrad": "the same with MVUE in up projections alone",
    "lr-dense-wgrad": "the same with dense weight gradients (no MVUE)",
    "fst-sparse-end": "FST without the dense end: the final model is 2:4",
    "fst-dense-wgrad": "FST with dense weight gradients (no MVUE)",
    "decay-too-large": f"FST with {TOO_LARGE} times the decay",
    "sr-ste": "FST with the decay on the weights, as SR-STE has it",
    "ste": "STE alone: no decay, no MVUE, no dense end",
    "s-ste": "S-STE: soft thresholds, the final model is 2:4",
    "half": "dense, feed-forward layers of half the width",
    "dense-lr": f"dense with {LR_SCALE:g} times the learning rate in feed-forward layers",
    "dense-short": "dense, in eight ninths of the steps",
    "decay-by-lr": "decay proportional to the learning rate",
    "mvue-off-late": "MVUE off from two thirds of the steps on",
    "refresh-grows": "masks refreshed at a quarter of the interval at first, at four times of it late",
    "dense-third": "the last third dense",
    "saliency-v4": "masks by abs(w) v^(1/4), v being Adam's second moment",
    "saliency-v2": "masks by abs(w) v^(1/2)",
    "combined": "decay proportional to the learning rate, and MVUE off late",
    "lr-dense-start": f"`lr_scale` {LR_SCALE:g}, and the first tenth dense",
    "lr-dense-third": f"`lr_scale` {LR_SCALE:g}, and the last third dense",
    "lr-mvue-off-early": f"`lr_scale` {LR_SCALE:g}, and dense weight gradients in the first third",
    "lr-mvue-off-late": f"`lr_scale` {LR_SCALE:g}, and dense weight gradients from the middle on",
    "lr-sparse-end": f"`lr_scale` {LR_SCALE:g}, without the dense end",
    "lr-more": f"`lr_scale` {1.5 * LR_SCALE:g}",
    "lr-s-ste": f"S-STE with `lr_scale` {LR_SCALE:g}",
}
#: How far FST may be from dense, as a share of the loss or, where the least loss is known, of the accuracy.
CLAIM = 0.005
#: (better, worse): what arXiv 2404.01847 says of the parts of the method.
ORDER = (
    ("fst", "fst-sparse-end"),  # the dense end helps
    ("fst", "decay-too-large"),  # lambda has to be feasible
    ("fst", "sr-ste"),  # the decay belongs on the gradients
    ("fst-sparse-end", "ste"),  # the decay helps, MVUE costs less than that
    ("fst", "ste"),
    ("fst", "half"),
)
#: FST and its variants that every family meets.
FST = {
    "fst": "FST",
    "fst-lr": "FST with `lr_scale`",
    "lr-mixed-wgrad": "FST with `lr_scale` and MVUE in up projections alone",
    "lr-dense-wgrad": "FST with `lr_scale` and dense weight gradients",
}
#: Arms whose claim is judged.
JUDGED = {**FST, "lr-dense-start": "FST with `lr_scale` and the first tenth dense"}


Of = tuple[str, str, float]  # family, scale, learning rate: what runs that compare share


def load(folder: Path) -> dict[Of, dict[str, list[dict[str, Any]]]]:
    """{what runs share: {arm: results}}, in the order of NAMES, SCALES and ARMS; the scale's own
    learning rate comes first.
    """
    found: dict[Of, dict[str, list[dict[str, Any]]]] = {}
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if not path.stem.endswith("_decay")]
    files.sort(key=lambda file: (another_lr(*where(file)), file["settings"]["lr"]))
    for family in NAMES:
        for scale in SCALES:
            for arm in ARMS:
                for file in files:
                    if (*where(file)[:2], file["settings"]["arm"]) == (family, scale, arm):
                        found.setdefault(where(file), {}).setdefault(arm, []).append(file)
    if not found:
        raise SystemExit(f"found no result in {folder}: run benchmarks/quality/run.py first")
    for (family, scale, _), results in found.items():
        runs = [run for arm in results.values() for run in arm]
        for what, values in (
            ("data", {json.dumps(run["data"], sort_keys=True) for run in runs}),
            ("steps", {round(run["settings"]["steps"] / run["settings"].get("share", 1)) for run in runs}),
        ):
            if len(values) > 1:
                raise SystemExit(
                    f"{family} {scale}: found results of {len(values)} different {what} in {folder}, which do not "
                    "compare; keep those of one in the folder"
                )
    return found


def where(file: dict[str, Any]) -> Of:
    s = file["settings"]
    return s["family"], s["scale"], s["lr"]


def another_lr(family: str, scale: str, lr: float) -> bool:
    """Than the scale's own, which sorts first."""
    return lr != SIZES[family][scale].lr


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
    losses = [run["held_out"][-1][2] for run in runs]
    spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
    cells = [MEANING[arm], decay, f"{mean(losses):.4f}{spread}", "" if arm == "dense" else over(results, arm, "dense")]
    if with_hits:
        cells.append(f"{mean(run['held_out'][-1][3] for run in runs):.4f}")
    rates = [rate for _, rate in runs[0]["flips"]]
    cells.append(f"{rates[0]:.3f}, {max(rates):.3f}, {rates[-1]:.3f}" if rates else "")
    alone = [run["seconds"] for run in runs if not run["settings"]["shared"]]
    return [*cells, f"{mean(alone):.0f}" if alone else "", str(len(runs))]


def finished(results: Results, arm: str) -> list[dict[str, Any]]:
    return [run for run in results.get(arm, []) if not run["error"]]


def of_one_seed(
    runs: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(run, other) of the seeds that both have."""
    known = {other["settings"]["seed"]: other for other in others}
    return [(run, known[run["settings"]["seed"]]) for run in runs if run["settings"]["seed"] in known]


def pairs(results: Results, arm: str, base: str, column: int = 2) -> list[tuple[float, float]]:
    """(final number of the arm, of the base) of the seeds that both have; column 2: held-out loss, 3: accuracy."""
    both = of_one_seed(finished(results, arm), finished(results, base))
    return [(run["held_out"][-1][column], other["held_out"][-1][column]) for run, other in both]


def over(results: Results, arm: str, base: str) -> str:
    """Mean and standard deviation over seeds of what an arm loses against another one of the same seed."""

    def number(values: list[float], digits: int) -> str:
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{mean(values):+.{digits}f}{spread}"

    found = pairs(results, arm, base)
    if not found:
        return ""
    text = number([loss - other for loss, other in found], 4)
    if "least_loss" not in results[arm][0]["data"]:  # where that is near 0 a ratio says nothing
        text += f" ({number([100 * (loss / other - 1) for loss, other in found], 2)}%)"
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


def by_loss_of(results: Results) -> bool:
    """Whether arms are compared by loss; where the least loss is known, and near, by accuracy."""
    return "least_loss" not in (results.get("dense") or results.get("fst") or [{"data": {}}])[0]["data"]


def ratios(results: Results, arm: str) -> list[float]:
    """Percent over dense at the end, of the loss or the accuracy, of each seed that both have."""
    found = pairs(results, arm, "dense", 2 if by_loss_of(results) else 3)
    return [100 * (number / base - 1) for number, base in found]


def holds(results: Results, found: Sequence[float]) -> bool:
    """Whether the claim does, of `ratios`."""
    return mean(found) <= 100 * CLAIM if by_loss_of(results) else mean(found) >= -100 * CLAIM


def summary(found: dict[Of, Results]) -> list[str]:
    """The table of the claim: every family and scale at its own learning rate."""
    columns = {
        "fst": "FST",
        "fst-lr": "with `lr_scale`",
        "lr-dense-start": "and a dense start",
        "lr-mixed-wgrad": "and MVUE in up alone",
        "lr-dense-wgrad": "and no MVUE",
        "half": "dense, half the width",
    }
    lines = [
        "Held-out loss at equal steps, percent over dense's; of the ViT and the translation, whose least loss is",
        f"reached, the accuracy. Bold: FST within the claim of {100 * CLAIM:g}%.",
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
            text = f"{mean(values):+.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "") if values else ""
            cells.append(f"**{text}**" if values and arm in JUDGED and holds(results, values) else text)
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def claims(results: Results) -> list[str]:
    """Sentences: is FST as good as dense at equal steps, is it ahead at equal time, are the ablations in order."""
    said = []
    by_loss = by_loss_of(results)
    for arm, name in JUDGED.items():
        found = ratios(results, arm)
        if found:
            what = "loss" if by_loss else "accuracy"
            spread = f" ± {stdev(found):.2f}" if len(found) > 1 else ""
            said.append(
                f"At equal steps the {what} of {name} is {mean(found):+.2f}{spread}% from that of "
                f"dense: the claim of {100 * CLAIM:g}% {'holds' if holds(results, found) else 'DOES NOT HOLD'}."
            )
            alike = pairs(results, arm, "dense-lr", 2 if by_loss else 3) if arm in FST and arm != "fst" else []
            if alike:
                ratio = mean(number / base - 1 for number, base in alike)
                said.append(f"The {what} of {name} is {100 * ratio:+.2f}% from that of dense with the same rates.")
        for one, two in timed_pairs(results, arm):
            ends = [run["held_out"][-1][1] for run in (one, two)]
            fst, dense = (loss_at(run, min(ends)) for run in (one, two))
            said.append(
                f"Seed {one['settings']['seed']}: the steps of {name} take {ends[0] / ends[1]:.3f} times as long as "
                f"those of dense; at equal time ({min(ends):.0f} s) it is at {fst:.4f} and dense at {dense:.4f}, the "
                "slower one not yet at the end of its schedule."
            )
    known = [arm for arm in ABLATIONS if arm == "dense" or pairs(results, arm, "dense")]
    if len(known) > 2:
        gap = {arm: mean([a - b for a, b in pairs(results, arm, "dense")]) for arm in known if arm in results}
        best_first = sorted(gap, key=lambda arm: gap[arm])
        said.append(f"Order found, best first: {', '.join(f'{arm} ({gap[arm]:+.4f})' for arm in best_first)}.")
    checked = [(better, worse, pairs(results, better, worse)) for better, worse in ORDER]
    checked = [(better, worse, both) for better, worse, both in checked if both]
    wrong = [
        f"{better} is not better than {worse} ({mean(a - b for a, b in both):+.4f}, better in "
        f"{sum(a < b for a, b in both)} of {len(both)} seeds)"
        for better, worse, both in checked
        if mean(a - b for a, b in both) >= 0
    ]
    if checked:
        text = f"The paper's order DIFFERS in {len(wrong)} of {len(checked)} pairs: {'; '.join(wrong)}."
        said.append(text if wrong else f"The paper's order holds in all {len(checked)} pairs that were run.")
    return said


def learning_rates(found: dict[Of, Any], family: str, scale: str) -> list[str]:
    """What dense loses at each learning rate that was tried, where there are several."""
    ends = {}
    for (*of, lr), results in found.items():
        runs = [run for run in results.get("dense", []) if run["settings"]["seed"] == 0]
        if of == [family, scale] and runs:
            ends[lr] = runs[0]["held_out"][-1][2]
    said = ", ".join(f"{end:.4f} at {lr:g}" for lr, end in sorted(ends.items()))
    return [f"Dense ends at {said} of the learning rate (seed 0)."] if len(ends) > 1 else []


def alone(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose times say something."""
    return [run for run in runs if not run["settings"]["shared"] and not run["error"]]


def at_equal_time(results: Results) -> list[str]:
    """Sentences: who is ahead where both have come to the end of their schedules in about the same time."""
    said = []
    for arm, name in FST.items():
        for run, dense in product(alone(results.get(arm, [])), alone(results.get("dense-short", []))):
            if any(dense["settings"][what] != run["settings"][what] for what in ("device", "seed")):
                continue
            ends = [f"{r['settings']['steps']} steps and {r['held_out'][-1][1]:.1f} s" for r in (run, dense)]
            losses = [r["held_out"][-1][2] for r in (run, dense)]
            ahead = name if losses[0] < losses[1] else "dense"
            said.append(
                f"At equal time, both at the end of their schedules: {name} in {ends[0]} ends at {losses[0]:.4f}, "
                f"dense in {ends[1]} at {losses[1]:.4f}: {ahead} is ahead by "
                f"{100 * abs(losses[0] / losses[1] - 1):.2f}%."
            )
    return said


def timed_pairs(results: Results, arm: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(the arm, dense) of one seed, each alone on a GPU of one kind."""
    both = of_one_seed(alone(results.get(arm, [])), alone(results.get("dense", [])))
    return [(fst, dense) for fst, dense in both if fst["settings"]["device"] == dense["settings"]["device"]]


def loss_at(run: dict[str, Any], seconds: float) -> float:
    """Held-out loss at a time of training, between two evaluations in proportion."""
    before = run["held_out"][0]
    for at in run["held_out"]:
        if at[1] >= seconds:
            share = (seconds - before[1]) / (at[1] - before[1]) if at[1] > before[1] else 1.0
            return float(before[2] + share * (at[2] - before[2]))
        before = at
    return float(before[2])


def behind_searches(results: Results) -> list[str]:
    """Sentences: what a mask search costs at once, where some evaluations came right behind one and others did not."""
    rises: dict[str, float] = {}
    ends: dict[str, float] = {}
    for arm in results:
        both = of_one_seed(finished(results, arm), finished(results, "dense"))
        found = [rise for run, dense in both if searches(run) for rise in rises_of(run, dense)]
        if not found:
            continue
        rises[arm] = mean(found)
        if both[0][0]["settings"]["options"].get("dense_after") is None:
            ends[arm] = mean(between_searches(run, dense)[-1] for run, dense in both)

    def listed(of: dict[str, float]) -> str:
        return ", ".join(f"{arm} {of[arm]:+.2f}" for arm in sorted(of, key=lambda arm: of[arm]))

    said = []
    if rises:
        said.append(
            "Held-out loss right behind a mask search, over that of the evaluations before and after, which came "
            "between two searches, in percent of dense's and from a fifth of the steps to the dense end: "
            f"{listed(rises)}."
        )
    if ends:
        said.append(
            "Of runs that end sparse, the last evaluation between two searches, in percent over dense: "
            f"{listed(ends)}. The table has their ends, which may be right behind a search."
        )
    return said


def searches(run: dict[str, Any]) -> bool:
    """Whether masks were searched, always at one interval, and losses have a ratio that says something."""
    options = run["settings"]["options"]
    sparse = options.get("dense_after") != 0 and options.get("recipe") != "s-ste"
    return sparse and not run["settings"].get("later") and "least_loss" not in run["data"]


def percent_over(run: dict[str, Any], dense: dict[str, Any]) -> list[tuple[bool, int, float]]:
    """Of each evaluation whether a search came right before, its step, and the loss over dense's in percent."""
    every = run["settings"]["options"]["refresh_every"]
    both = zip(run["held_out"], dense["held_out"], strict=True)
    return [(at[0] % every == 0, at[0], 100 * (at[2] / other[2] - 1)) for at, other in both]


def between_searches(run: dict[str, Any], dense: dict[str, Any]) -> list[float]:
    return [percent for behind, _, percent in percent_over(run, dense) if not behind]


def rises_of(run: dict[str, Any], dense: dict[str, Any]) -> list[float]:
    """Of each evaluation right behind a search, between two that are not: percent over dense, less that of these."""
    first, end = run["settings"]["steps"] / 5, run["settings"]["options"].get("dense_after") or run["settings"]["steps"]
    over = percent_over(run, dense)
    return [
        at[2] - (before[2] + after[2]) / 2
        for before, at, after in zip(over, over[1:], over[2:], strict=False)
        if (before[0], at[0], after[0]) == (False, True, False) and first <= at[1] and after[1] < end
    ]


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


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "quality", help="folder of run.py")
    p.add_argument("--document", type=Path, default=ROOT / "docs" / "results.md", help="page to write into")
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
    text = f"{BEGIN}\n{chr(10).join(lines).rstrip()}\n{END}\n"
    if args.document.exists():
        page = args.document.read_text()
        if BEGIN not in page:
            raise SystemExit(
                f"found no line {BEGIN} in {args.document}, need one, and {END}: what is between is replaced"
            )
        before, _, rest = page.partition(f"{BEGIN}\n")
        text = before + text + rest.partition(f"{END}\n")[2]
    with tempfile.NamedTemporaryFile("w", dir=args.document.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, args.document)
    args.document.chmod(0o644)
    print(f"wrote {args.document}")


if __name__ == "__main__":
    main()
