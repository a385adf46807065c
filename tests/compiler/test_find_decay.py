"""The search for lambda: on curves mu(lambda) that are known, and on a small model in training."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import sparse24
from sparse24.compiler import find_decay as module
from sparse24.compiler.find_decay import search

from .models import MLP, Stack

R0 = 0.05
SEARCH = {
    "settings": {"steps": 100, "refresh_every": 10},
    "low": 1e-6,
    "high": 1e-2,
    "feasible": (0.6, 0.95),
    "average": 3,
    "max_trials": 10,
}


def curve(mu: Callable[[float], float], calls: list[float | None]) -> module.Measure:
    """Flip rates of refreshes whose last three have the mean mu(lambda) * R0."""

    def measure(decay: float | None) -> list[list[float]]:
        calls.append(decay)
        rate = R0 * (1.0 if decay is None else mu(decay))
        return [[10, 9.0], [20, 0.9 * rate], [30, rate], [40, 1.1 * rate]]

    return measure


def falling(middle: float) -> Callable[[float], float]:
    """From 1.3 to 0, 0.65 at `middle`."""
    return lambda decay: 1.3 / (1 + decay / middle)


@pytest.mark.parametrize("middle", [3e-6, 2e-5, 1e-4, 7e-4, 6e-3])
def test_bisection_finds_a_feasible_decay(middle: float) -> None:
    calls: list[float | None] = []
    found = search(curve(falling(middle), calls), **SEARCH)
    assert 0.6 <= falling(middle)(found.decay) <= 0.95
    assert calls[0] is None and calls[1] == pytest.approx(1e-4) and len(calls) <= 7
    dense, trials = found.evidence["dense"], found.evidence["trials"]
    assert dense["rate"] == pytest.approx(R0)  # the mean of the last three alone
    assert trials[-1]["decay"] == found.decay == found.evidence["decay"]
    assert trials[-1]["mu"] == pytest.approx(falling(middle)(found.decay))
    for before, after in zip(trials, trials[1:], strict=False):  # too many flips: larger; too few: smaller
        assert (after["decay"] > before["decay"]) == (before["mu"] > 0.95)
    assert f"decay = {found.decay:.3g}" in str(found) and str(found).count("\n") == len(calls)


def test_the_feasible_range_is_a_parameter() -> None:
    found = search(curve(falling(1e-4), []), **{**SEARCH, "feasible": (0.2, 0.25)})
    assert 0.2 <= falling(1e-4)(found.decay) <= 0.25


def test_a_killed_search_goes_on_from_its_evidence(tmp_path: Path) -> None:
    path, calls = tmp_path / "evidence.json", []
    whole = search(curve(falling(3e-6), []), **SEARCH)
    measure = curve(falling(3e-6), calls)

    def killed(decay: float | None) -> list[list[float]]:
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(decay)

    with pytest.raises(KeyboardInterrupt):
        search(killed, **SEARCH, evidence=path)
    assert len(json.loads(path.read_text())["trials"]) == 2
    found = search(measure, **SEARCH, evidence=path)
    assert found.decay == whole.decay and calls == [None, *(t["decay"] for t in whole.evidence["trials"])]
    assert json.loads(path.read_text()) == found.evidence
    assert (
        search(measure, **SEARCH, evidence=path).decay == found.decay
        and len(calls) == len(whole.evidence["trials"]) + 1
    )
    assert [p.name for p in tmp_path.iterdir()] == ["evidence.json"]


def test_trials_count_under_another_range(tmp_path: Path) -> None:
    path, calls = tmp_path / "evidence.json", []
    measure = curve(falling(1e-1), calls)
    with pytest.raises(sparse24.NoFeasibleDecay, match=r"raise high \(now 0.01\)"):
        search(measure, **SEARCH, evidence=path)
    before = len(calls)
    found = search(measure, **{**SEARCH, "high": 1.0}, evidence=path)
    assert 0.6 <= falling(1e-1)(found.decay) <= 0.95 and calls[before] > 1e-2
    assert len(set(calls)) == len(calls)


@pytest.mark.parametrize(
    ("mu", "told"),
    [
        (lambda decay: 1.2, r"raise high \(now 0.01\)"),
        (lambda decay: 0.3, r"lower low \(now 1e-06\)"),
        (lambda decay: 1.0 if decay < 3e-5 else 0.2, "mu jumps over the range between .* noise"),
        (lambda decay: math.sin(decay * 1e6), "found no decay with mu"),
    ],
)
def test_no_feasible_decay_says_what_was_seen_and_which_way(mu, told: str, tmp_path: Path) -> None:
    calls: list[float | None] = []
    feasible = (0.6, 0.95) if "jumps" in told or "(now" in told else (2.0, 3.0)
    options = {**SEARCH, "feasible": feasible, "max_trials": 30, "evidence": tmp_path / "e.json"}
    with pytest.raises(sparse24.NoFeasibleDecay, match=told) as error:
        search(curve(mu, calls), **options)
    seen = json.loads((tmp_path / "e.json").read_text())
    assert seen["decay"] is None and len(seen["trials"]) == len(calls) - 1 < 20
    assert str(error.value).count("mu ") >= len(seen["trials"])  # each trial is named
    ends = {t["decay"] for t in seen["trials"]}
    if "(now" in told:
        assert (1e-2 if "high" in told else 1e-6) in ends  # the end itself was tried


def test_too_few_trials_say_so() -> None:
    with pytest.raises(sparse24.NoFeasibleDecay, match="raise max_trials"):
        search(curve(falling(3e-6), []), **{**SEARCH, "max_trials": 1})


def test_a_decay_that_ends_in_nan_is_too_large(tmp_path: Path) -> None:
    def measure(decay: float | None) -> list[list[float]]:
        if decay is not None and decay > 2e-5:
            raise sparse24.NotFiniteError("sparse24: w has 1 NaN")
        return curve(falling(1e-5), [])(decay)

    found = search(measure, **SEARCH, evidence=tmp_path / "e.json")
    assert found.decay <= 2e-5 and "w has 1 NaN" in str(found)
    assert json.loads((tmp_path / "e.json").read_text()) == found.evidence


def test_flip_rates_of_zero() -> None:
    with pytest.raises(sparse24.NoFeasibleDecay, match=r"found 0, one each 10 steps.*make the trial longer"):
        search(lambda decay: [], **SEARCH)
    with pytest.raises(sparse24.NoFeasibleDecay, match="learning rate"):
        search(lambda decay: [[10, 0.0], [20, 0.0]], **SEARCH)


def test_evidence_of_another_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    search(curve(falling(1e-4), []), **SEARCH, evidence=path)
    with pytest.raises(sparse24.StateError, match="steps was 100, is 200"):
        search(curve(falling(1e-4), []), **{**SEARCH, "settings": {"steps": 200}}, evidence=path)
    newer = {**SEARCH, "settings": {**SEARCH["settings"], "lr_scale": 1.0}}  # an option that the file does not know
    search(curve(falling(1e-4), []), **newer, evidence=path)
    newer["settings"]["lr_scale"] = 2.0
    with pytest.raises(sparse24.StateError, match="lr_scale was 1.0, is 2.0"):
        search(curve(falling(1e-4), []), **newer, evidence=path)
    before = path.read_text()
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(sparse24.StateError, match="is no evidence"):
            search(curve(falling(1e-4), []), **SEARCH, evidence=path)
        assert path.read_text() == text
    assert json.loads(before)["trials"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"low": 0.0}, "low < high"), ({"feasible": (0.9, 0.6)}, "lowest mu"), ({"average": 0}, "average=0")],
)
def test_arguments_out_of_range(changed: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        search(curve(falling(1e-4), []), **{**SEARCH, **changed})


def test_plot_shows_found_and_not_found(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = search(curve(falling(1e-5), []), **SEARCH)
    found.plot(tmp_path / "a.svg")
    found.plot(tmp_path / "b.svg")
    module.plot({**found.evidence, "decay": None}, tmp_path / "c.svg")
    assert (tmp_path / "a.svg").read_text() == (tmp_path / "b.svg").read_text() != (tmp_path / "c.svg").read_text()
    assert "<svg" in (tmp_path / "a.svg").read_text()


# ------------------------------------------------------------------------------------------ models in training


def make_model() -> nn.Module:
    return Stack(MLP(), MLP())


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def step_fn(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
    target = torch.roll(x, 1, 1)[:, :10]
    (model(x) - target).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


TRIAL = {
    "steps": 30,
    "options": {"refresh_every": 5, "inner": "eager", "decay": 9.0, "dense_after": 3},
    "progress": None,
}


def test_mu_of_a_model_falls_with_the_decay_and_the_search_ends_in_the_range(tmp_path: Path) -> None:
    state, said = torch.get_rng_state(), []
    options = {**TRIAL, "high": 1.0, "progress": said.append}
    found = sparse24.find_decay(make_model, make_optimizer, step_fn, evidence=tmp_path / "e.json", **options)
    assert torch.equal(state, torch.get_rng_state())
    trials = found.evidence["trials"]
    assert 0.6 <= trials[-1]["mu"] <= 0.95 and found.decay == trials[-1]["decay"]
    assert [step for step, _ in found.evidence["dense"]["rates"]] == [5, 10, 15, 20, 25, 30]
    assert all([step for step, _ in t["rates"]] == [5, 10, 15, 20, 25, 30] for t in trials)
    assert len(said) == 2 * (1 + len(trials)) and "dense: virtual flip rate" in said[1]
    again = sparse24.find_decay(make_model, make_optimizer, step_fn, evidence=tmp_path / "e.json", **TRIAL, high=1.0)
    assert again.evidence == found.evidence
    with pytest.raises(sparse24.StateError, match="start was"):
        sparse24.find_decay(lambda: Stack(MLP()), make_optimizer, step_fn, evidence=tmp_path / "e.json", **TRIAL)
    with pytest.raises(sparse24.NoFeasibleDecay):  # a decay that is too large leaves too few flips
        sparse24.find_decay(make_model, make_optimizer, step_fn, **{**TRIAL, "low": 1e3, "high": 1e4, "max_trials": 2})


def test_dense_trial_is_the_dense_run() -> None:
    losses: list[float] = []

    def recorded(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    torch.manual_seed(0)
    plain = make_model()
    optimizer = make_optimizer(plain)
    for step in range(10):
        recorded(plain, optimizer, step)
    expected, losses[:] = list(losses), []
    options = {**TRIAL, "steps": 10, "max_trials": 1, "feasible": (1e-9, 1e9)}
    sparse24.find_decay(make_model, make_optimizer, recorded, **options)
    assert losses[:10] == pytest.approx(expected, rel=1e-5)
    assert losses[10:] != pytest.approx(expected, rel=1e-3) and len(losses) == 20


def test_errors_before_and_in_a_trial() -> None:
    with pytest.raises(ValueError, match="steps=4 and refresh_every=5"):
        sparse24.find_decay(make_model, make_optimizer, step_fn, **{**TRIAL, "steps": 4})
    with pytest.raises(ValueError, match="no sparse layer .*skip names it"):
        options = {**TRIAL["options"], "skip": ["*"]}
        sparse24.find_decay(make_model, make_optimizer, step_fn, **{**TRIAL, "options": options})
    with pytest.raises(sparse24.OptionError, match="'s-ste', which has no decay"):
        sparse24.find_decay(make_model, make_optimizer, step_fn, steps=50, options={"recipe": "s-ste"})
    models = iter([make_model(), Stack(MLP(), MLP()), Stack(MLP(), MLP())])
    with pytest.raises(ValueError, match="another start"):
        sparse24.find_decay(lambda: next(models), make_optimizer, step_fn, **TRIAL)
    with pytest.raises(sparse24.NoFeasibleDecay, match="flipped nothing"):
        sparse24.find_decay(make_model, lambda m: torch.optim.AdamW(m.parameters(), lr=0.0), step_fn, **TRIAL)
