"""What the saved results say in sentences: whether the claims hold, who is ahead, what a mask search costs."""

from itertools import product
from statistics import mean
from typing import Any

from arms import ABLATIONS
from curves import Results
from saved import (
    CLAIM,
    JUDGED,
    Of,
    alone,
    by_loss_of,
    finished,
    holds,
    of_one_seed,
    pairs,
    ratios,
    timed_pairs,
    with_spread,
)

#: (better, worse): what arXiv 2404.01847 says of the parts of the method.
ORDER = (
    ("fst", "fst-sparse-end"),  # the dense end helps
    ("fst", "decay-too-large"),  # lambda has to be feasible
    ("fst", "sr-ste"),  # the decay belongs on the gradients
    ("fst-sparse-end", "ste"),  # the decay helps, MVUE costs less than that
    ("fst", "ste"),
    ("fst", "half"),
)


def claims(results: Results) -> list[str]:
    """Sentences: is FST as good as dense at equal steps, is it ahead at equal time, are the ablations in order."""
    said = []
    by_loss = by_loss_of(results)
    for arm, name in JUDGED.items():
        found = ratios(results, arm)
        if found:
            what = "loss" if by_loss else "accuracy"
            said.append(
                f"At equal steps the {what} of {name} is {with_spread(found, 2)}% from that of "
                f"dense: the claim of {100 * CLAIM:g}% {'holds' if holds(results, found) else 'DOES NOT HOLD'}."
            )
            alike = pairs(results, arm, "dense-lr", 2 if by_loss else 3) if arm != "fst" else []
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


def at_equal_time(results: Results) -> list[str]:
    """Sentences: who is ahead where both have come to the end of their schedules in about the same time."""
    said = []
    for arm, name in JUDGED.items():
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
