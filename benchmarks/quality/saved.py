"""The saved results of run.py: what there is, what the arms are called, and runs that compare."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from arms import ARMS, LR_SCALE, TOO_LARGE
from curves import Results
from families import SIZES

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
    "lr-dense-ends": f"`lr_scale` {LR_SCALE:g}, the first tenth and the last third dense, dense weight gradients",
    "lr-mvue-off-early": f"`lr_scale` {LR_SCALE:g}, and dense weight gradients in the first third",
    "lr-mvue-off-late": f"`lr_scale` {LR_SCALE:g}, and dense weight gradients from the middle on",
    "lr-sparse-end": f"`lr_scale` {LR_SCALE:g}, without the dense end",
    "lr-more": f"`lr_scale` {1.5 * LR_SCALE:g}",
    "lr-s-ste": f"S-STE with `lr_scale` {LR_SCALE:g}",
}
#: How far FST may be from dense, as a share of the loss or, where the least loss is known, of the accuracy.
CLAIM = 0.005
#: FST and its variants that every family meets.
FST = {
    "fst": "FST",
    "fst-lr": "FST with `lr_scale`",
    "lr-mixed-wgrad": "FST with `lr_scale` and MVUE in up projections alone",
    "lr-dense-wgrad": "FST with `lr_scale` and dense weight gradients",
}
#: Arms whose claim is judged.
JUDGED = {
    **FST,
    "lr-dense-start": "FST with `lr_scale` and the first tenth dense",
    "lr-dense-ends": "FST with `lr_scale`, the first tenth and the last third dense, and dense weight gradients",
}


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


def with_spread(values: Sequence[float], digits: int, sign: str = "+") -> str:
    """Their mean, and behind ± their standard deviation where there are several."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.{digits}f}{spread}"


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


def alone(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose times say something."""
    return [run for run in runs if not run["settings"]["shared"] and not run["error"]]


def timed_pairs(results: Results, arm: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(the arm, dense) of one seed, each alone on a GPU of one kind."""
    both = of_one_seed(alone(results.get(arm, [])), alone(results.get("dense", [])))
    return [(fst, dense) for fst, dense in both if fst["settings"]["device"] == dense["settings"]["device"]]
