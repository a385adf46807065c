"""find_decay: the search for lambda of the masked decay in the warm-up, as arXiv 2404.01847 proposes it.

A short dense run gives the virtual flip rate r0; short sparse runs from the same start give r(lambda). Feasible is a
lambda with mu = r(lambda) / r0 in a range, here 0.60 to 0.95 unless told otherwise. mu falls as lambda grows, so the
search bisects on log(lambda).
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .errors import NotFiniteError, OptionError, StateError
from .export import replace
from .recipe import Recipe
from .session import session

_FORMAT = 1
_SET_HERE = ("decay", "sparse_after", "dense_after")  # by a trial, whatever the options say
#: A bracket whose ends are closer than this factor is not searched further.
_CLOSE = 1.1

#: What one run of a trial is: None for the dense one, else lambda -> [[step, flip rate], ...] of its refreshes.
Measure = Callable[[float | None], list[list[float]]]


class NoFeasibleDecay(ValueError):
    """No lambda of the range searched is feasible, or the flip rates cannot tell."""


@dataclass(frozen=True, slots=True)
class DecaySearch:
    """What `find_decay` found. decay: a feasible lambda.

    evidence: what was measured, as its file holds it, JSON's types alone:
    {"format", "settings": what every trial shares, "feasible": [low, high] of mu, "range": [low, high] of lambda,
    "average": refreshes, "dense": {"rates": [[step, flip rate], ...], "rate", "seconds"},
    "trials": [{"decay", "rates", "rate", "mu", "seconds"}, ...] in the order run, "decay"}.
    A trial that ended in NaN has "rate" and "mu" null and says so in "error".
    """

    decay: float
    evidence: dict[str, Any]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw mu against lambda, the feasible range as a band, as an SVG file. Needs matplotlib."""
        plot(self.evidence, path)

    def __str__(self) -> str:
        return "\n".join([*_lines(self.evidence), f"decay = {self.decay:.3g}"])


def find_decay(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], Optimizer],
    step_fn: Callable[[nn.Module, Optimizer, int], object],
    *,
    steps: int,
    options: Mapping[str, Any] | None = None,
    low: float = 1e-6,
    high: float = 1e-2,
    feasible: tuple[float, float] = (0.60, 0.95),
    average: int = 3,
    max_trials: int = 10,
    evidence: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Callable[[str], object] | None = print,
) -> DecaySearch:
    """Search lambda of the masked decay: a dense trial, then sparse ones with bisection on log(lambda).

    make_model() returns the model to train, the same each time: torch's generators are seeded with `seed` before.
    make_optimizer(model) returns its optimizer. step_fn(model, optimizer, step) does one whole training step on the
    batch of `step` (0, 1, ...): forward, backward, clipping, optimizer.step and zero_grad, with the learning rate
    that the real run has there; `model` is the compiled one.

    steps: optimizer steps of a trial, inside the learning rate's warm-up, several times refresh_every. options: the
    backend's, as the real run has them; decay, sparse_after and dense_after are set here. low, high: the lambdas to
    search between. feasible: the range of mu. average: how many of the last refreshes a flip rate is the mean of.
    max_trials: of the sparse ones. progress: is given a line before and after each trial; None: nothing is said.

    evidence: a JSON file that is written after each trial. Where it exists the search goes on from it: no trial in it
    is run again, also under another low, high, feasible, average or max_trials.

    Each trial compiles anew (torch._dynamo.reset()), and torch's generators are left as they were. Raises
    NoFeasibleDecay (a ValueError) where no lambda is found or all flip rates are zero, StateError where the evidence
    is another search's (another model, other steps or options), OptionError on a bad option. What was measured until
    then is in the evidence file.
    """
    recipe = Recipe.from_options({**(options or {}), "decay": 0.0, "sparse_after": 0, "dense_after": None})
    if recipe.recipe != "fst":
        raise OptionError(f"sparse24: found recipe={recipe.recipe!r}, which has no decay to search, need 'fst'")
    if steps < recipe.refresh_every:
        raise ValueError(
            f"sparse24: found steps={steps} and refresh_every={recipe.refresh_every}, need a trial of at least one "
            "refresh, better several: raise steps"
        )
    with _seeded(seed):
        start = _magnitude(make_model())
    shared = {"steps": steps, "seed": seed, "start": start}
    shared |= {k: v for k, v in json.loads(json.dumps(recipe.method())).items() if k not in _SET_HERE}

    def measure(decay: float | None) -> list[list[float]]:
        return _trial(make_model, make_optimizer, step_fn, steps, options or {}, decay, seed, start)

    return search(
        measure,
        settings=shared,
        low=low,
        high=high,
        feasible=feasible,
        average=average,
        max_trials=max_trials,
        evidence=evidence,
        progress=progress,
    )


def _trial(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], Optimizer],
    step_fn: Callable[[nn.Module, Optimizer, int], object],
    steps: int,
    options: Mapping[str, Any],
    decay: float | None,
    seed: int,
    start: str,
) -> list[list[float]]:
    torch._dynamo.reset()
    with _seeded(seed):
        model = make_model()
        if _magnitude(model) != start:
            raise ValueError(
                f"sparse24: make_model() returned another start than before (sum of magnitudes {_magnitude(model)}, "
                f"before {start}), need the same each time: a new model, initialized from torch's generators"
            )
        phase: dict[str, Any] = {"sparse_after": 0, "dense_after": None, "decay": decay}
        if decay is None:
            phase = {"dense_after": 0, "decay": 0.0, "virtual_flips": True}
        compiled: Any = torch.compile(model, backend="sparse24", options={**options, **phase})
        optimizer, held = make_optimizer(model), session(model)
        rates: list[list[float]] = []
        seen = held.step
        for step in range(steps):
            step_fn(compiled, optimizer, step)
            if step == 0 and not any(w.reason_skipped is None for w in held.weights.values()):
                why = "; ".join([f"{w.name}: {w.reason_skipped}" for w in held.weights.values()][:3])
                raise ValueError(
                    f"sparse24: found no sparse layer in the model ({why or 'step_fn did not run it'}), need at least "
                    "one to count flips in: look at layers, skip and when"
                )
            now = held.step
            if now != seen and now % next(iter(held.weights.values())).recipe.refresh_every == 0:
                rates.append([now, held.flip_rate()])
            seen = now
    return rates


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's generators seeded, and afterwards as they were."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _magnitude(model: nn.Module) -> str:
    """The sum of |w| of a model to seven digits: tells one start from another."""
    return f"{sum(p.detach().double().abs().sum().item() for p in model.parameters()):.6e}"


def search(
    measure: Measure,
    *,
    settings: dict[str, Any],
    low: float,
    high: float,
    feasible: tuple[float, float],
    average: int,
    max_trials: int,
    evidence: str | os.PathLike[str] | None = None,
    progress: Callable[[str], object] | None = None,
) -> DecaySearch:
    """`find_decay` on a measurement. settings: what an evidence file has to agree on."""
    if not 0 < low < high < math.inf:
        raise ValueError(f"sparse24: found low={low!r}, high={high!r}, need 0 < low < high")
    if not 0 < feasible[0] < feasible[1]:
        raise ValueError(f"sparse24: found feasible={feasible!r}, need 0 < lowest mu < highest mu")
    if average < 1 or max_trials < 1:
        raise ValueError(f"sparse24: found average={average}, max_trials={max_trials}, need both at least 1")
    known = _load(evidence, settings)
    known |= {"feasible": list(feasible), "range": [low, high], "average": average, "decay": None}
    for trial in [known["dense"], *known["trials"]]:
        if trial is not None and "error" not in trial:
            _judge(trial, known)

    def run(decay: float | None) -> dict[str, Any]:
        name = "dense" if decay is None else f"decay {decay:.3g}"
        if progress:
            progress(f"find_decay: {name}: running")
        began = time.perf_counter()
        trial: dict[str, Any] = {} if decay is None else {"decay": decay}
        try:
            trial["rates"] = measure(decay)
        except NotFiniteError as error:
            if decay is None:
                raise
            trial |= {"rates": [], "rate": None, "mu": None, "error": str(error)}
        trial["seconds"] = round(time.perf_counter() - began, 1)
        if "error" not in trial:
            _judge(trial, known)
        if decay is None:
            known["dense"] = trial
        else:
            known["trials"].append(trial)
        _save(evidence, known)
        if progress:
            progress(f"find_decay: {_line(trial)}, {trial['seconds']:.0f} s")
        return trial

    dense = known["dense"] or run(None)
    if not dense["rate"]:
        count = len(dense["rates"])
        raise NoFeasibleDecay(
            f"sparse24: the dense trial of {settings.get('steps')} steps flipped nothing in its last refreshes (found "
            f"{count}, one each {settings.get('refresh_every')} steps), need a flip rate above zero to compare with: "
            "make the trial longer, refresh_every smaller, or look whether the learning rate is above zero"
        )
    while True:
        found = [t for t in known["trials"] if t["mu"] is not None and feasible[0] <= t["mu"] <= feasible[1]]
        if found:
            known["decay"] = found[-1]["decay"]
            _save(evidence, known)
            return DecaySearch(known["decay"], known)
        decay = _next(known["trials"], low, high, feasible)
        if decay is None or len(known["trials"]) >= max_trials:
            _save(evidence, known)
            raise NoFeasibleDecay(_why(known, decay is not None))
        run(decay)


def _judge(trial: dict[str, Any], known: dict[str, Any]) -> None:
    """The mean of the last refreshes, and for a sparse trial what share it is of the dense one's."""
    last = [rate for _, rate in trial["rates"][-known["average"] :]]
    trial["rate"] = sum(last) / len(last) if last else 0.0
    if "decay" in trial:
        dense = known["dense"]["rate"]
        trial["mu"] = trial["rate"] / dense if dense else None


def _sides(trials: Sequence[Mapping[str, Any]], feasible: Sequence[float]) -> tuple[list[float], list[float]]:
    """The lambdas that were too small (mu above the range) and too large (below it, or NaN)."""
    small = [t["decay"] for t in trials if t["mu"] is not None and t["mu"] > feasible[1]]
    large = [t["decay"] for t in trials if t["mu"] is None or t["mu"] < feasible[0]]
    return small, large


def _next(trials: Sequence[Mapping[str, Any]], low: float, high: float, feasible: Sequence[float]) -> float | None:
    """The middle of the bracket, by logarithms, that the trials leave; an end of it at last; None: it is closed."""
    small, large = _sides(trials, feasible)
    left, right = max([low, *small]), min([high, *large])
    if right / left > _CLOSE:
        return math.sqrt(left * right)
    for end in (low, high):
        if end in (left, right) and end not in (*small, *large) and left <= right:
            return end
    return None


def _why(known: Mapping[str, Any], unfinished: bool) -> str:
    small, large = _sides(known["trials"], known["feasible"])
    (first, last), (low, high) = known["feasible"], known["range"]
    seen = "; ".join(_line(t) for t in sorted(known["trials"], key=lambda t: t["decay"]))
    if unfinished:
        do = "raise max_trials"
    elif not large:
        do = f"even the largest lambdas leave too many flips: raise high (now {high:g})"
    elif not small:
        do = f"even the smallest lambdas leave too few flips: lower low (now {low:g})"
    else:
        do = (
            f"mu jumps over the range between {max(small):.3g} and {min(large):.3g}, which looks like noise: make the "
            "trials longer or average over more refreshes"
        )
    return f"sparse24: found no decay with mu in [{first:g}, {last:g}]: {do}. Seen: {seen}"


def _line(trial: Mapping[str, Any]) -> str:
    if "decay" not in trial:
        return f"dense: virtual flip rate {trial['rate']:.4g}"
    if trial["mu"] is None:
        return f"decay {trial['decay']:.3g}: {trial.get('error', 'no flip rate')}"
    return f"decay {trial['decay']:.3g}: flip rate {trial['rate']:.4g}, mu {trial['mu']:.3f}"


def _lines(evidence: Mapping[str, Any]) -> list[str]:
    return [_line(trial) for trial in [evidence["dense"], *evidence["trials"]] if trial]


# ------------------------------------------------------------------------------------------------------------- evidence


def _load(path: str | os.PathLike[str] | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The evidence of a file, or none yet. Raises StateError where it cannot be read or is another search's."""
    if path is None or not os.path.exists(path):
        return {"format": _FORMAT, "settings": settings, "dense": None, "trials": []}
    try:
        with open(path) as file:
            known: dict[str, Any] = json.load(file)
        found = known["format"], known["settings"], known["dense"], known["trials"]
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"sparse24: {os.fspath(path)} is no evidence of find_decay ({type(error).__name__}: {error}); give another "
            "file name, or move it away to search anew"
        ) from error
    before = {"format": found[0]}
    if found[0] == _FORMAT:  # a file of before an option existed was made with its default
        before = {**Recipe().method(), **found[1]}
    changed = [f"{k} was {before.get(k)!r}, is {v!r}" for k, v in settings.items() if before.get(k) != v]
    if changed:
        raise StateError(
            f"sparse24: {os.fspath(path)} holds trials under other settings ({'; '.join(changed)}); search with the "
            "same ones, or give another file name"
        )
    return known


def _save(path: str | os.PathLike[str] | None, known: Mapping[str, Any]) -> None:
    if path is None:
        return

    def write(temporary: str) -> None:
        with open(temporary, "w") as file:
            json.dump(known, file, indent=1)
            file.write("\n")

    replace(path, write, ".json")


def plot(evidence: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw an evidence, found or not: mu against lambda, the feasible band, the decay taken."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "sparse24"}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        points = sorted((t["decay"], t["mu"]) for t in evidence["trials"] if t["mu"] is not None)
        axes.axhspan(*evidence["feasible"], color="#ddeedd", label="feasible")
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", color="#4477aa", label="trials")
        if evidence["decay"] is not None:
            axes.axvline(evidence["decay"], color="black", linewidth=0.8, label=f"decay = {evidence['decay']:.3g}")
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("lambda of the masked decay")
        axes.set_ylabel("mu = flip rate / virtual flip rate of the dense run")
        axes.legend()
        replace(path, lambda temporary: figure.savefig(temporary, format="svg", metadata={"Date": None}), ".svg")
