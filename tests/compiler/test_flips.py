"""Flips of dense runs, and the rule that calls a flip rate an explosion."""

import copy
import logging

import pytest
import torch

import sparse24
from sparse24.compiler.flips import WINDOW, FlipWatch
from sparse24.compiler.session import contents
from sparse24.kernels.reference import best_mask

from .models import MLP, Stack, SwiGLU, compiled, train


def test_a_dense_run_counts_virtual_flips_and_is_not_changed() -> None:
    model = Stack(MLP(), SwiGLU())
    plain = copy.deepcopy(model)
    run, session = compiled(model, dense_after=0, virtual_flips=True, refresh_every=2), sparse24.session(model)
    optimizer, other = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain))
    run(torch.randn(1, 64))
    names = [n for n, w in session.weights.items() if w.reason_skipped is None]
    assert len(names) == 5
    params = dict(plain.named_parameters())
    before = {n: best_mask(params[n]) for n in names}
    for step in range(1, 6):
        assert train(run, optimizer, 1, seed=step) == pytest.approx(train(plain, other, 1, seed=step), rel=1e-5)
        if step % 2 == 0:
            now = {n: best_mask(params[n]) for n in names}
            flips = {n: int((now[n] ^ before[n]).sum()) for n in names}
            assert session.flip_rate() == pytest.approx(
                sum(flips.values()) / sum(m.numel() for m in now.values()), rel=0.02
            )
            rates = session.metrics()
            assert all(rates[f"flip_rate/{n}"] == pytest.approx(flips[n] / now[n].numel(), rel=0.1) for n in names)
            assert session.flip_rate() > 0 and session.phase == "dense"
            before = now
    assert session.memory()["masks"] == sum(params[n].numel() // 8 for n in names)
    assert session.memory()["packed"] == 0


def test_without_the_option_a_dense_run_counts_nothing() -> None:
    model = Stack(MLP())
    run, session = compiled(model, dense_after=0, refresh_every=1), sparse24.session(model)
    train(run, torch.optim.AdamW(model.parameters(), lr=1e-1), 3)
    assert session.flip_rate() == 0.0 and session.memory()["masks"] == 0


def test_a_run_that_turns_dense_counts_on_and_keeps_the_last_masks() -> None:
    model = Stack(MLP())
    run = compiled(model, dense_after=3, refresh_every=2, virtual_flips=True)
    session, optimizer = sparse24.session(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(run, optimizer, 2)
    last = session.weights["blocks.0.up.weight"].mask()
    train(run, optimizer, 2, seed=1)
    up = session.weights["blocks.0.up.weight"]
    assert session.phase == "dense" and torch.equal(up.mask(), last)
    assert up.flips == int((best_mask(up.param) ^ last).sum()) > 0


def test_a_resumed_dense_run_counts_the_same() -> None:
    def start() -> tuple[torch.nn.Module, object, torch.optim.Optimizer]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Stack(MLP())
        run = compiled(model, dense_after=0, refresh_every=4, virtual_flips=True)
        return model, run, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, run, optimizer = start()
    train(run, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparse24.session(model).state_dict()))
    train(run, optimizer, 2, seed=1)
    expected = sparse24.session(model).flip_rate()
    model, run, optimizer = start()
    model.load_state_dict(saved[0]), optimizer.load_state_dict(saved[1])
    sparse24.session(model).load_state_dict(saved[2])
    train(run, optimizer, 2, seed=1)
    assert sparse24.session(model).flip_rate() == expected > 0


def test_a_state_of_before_an_option_existed_loads() -> None:
    model = Stack(MLP())
    run = compiled(model)
    train(run, torch.optim.AdamW(model.parameters(), lr=1e-2), 1)
    state = {"format": 1, **contents(sparse24.session(model).state_dict())}
    for recipe in state["recipe"].values():
        del recipe["recipe"]
    sparse24.session(model).load_state_dict(state)
    assert sparse24.session(model).step == 1


def observe(rates: list[float], lrs: list[float]) -> list[str]:
    watch = FlipWatch()
    return [said for rate, lr in zip(rates, lrs, strict=True) if (said := watch.observe(rate, lr, 40)) is not None]


def test_a_rate_that_rises_in_the_warm_up_and_then_falls_is_healthy() -> None:
    rates = [0.02 * i for i in range(1, 6)] + [0.1 * 0.9**i for i in range(30)]
    lrs = [0.2 * i for i in range(1, 6)] + [0.95**i for i in range(30)]
    assert observe(rates, lrs) == []


@pytest.mark.parametrize("lr", [1.0, 0.98])
def test_growing_at_a_learning_rate_that_does_not_is_said_once(lr: float) -> None:
    rates = [0.05] * WINDOW + [0.05 * 1.2**i for i in range(12)]
    (said,) = observe(rates, [lr**i for i in range(len(rates))])
    assert "grew from" in said
    assert observe([r / 50 for r in rates], [1.0] * len(rates)) == []  # negligible


def test_staying_high_while_the_learning_rate_falls_is_said_once() -> None:
    rates, lrs = [0.1] * 30, [0.93**i for i in range(30)]
    (said,) = observe(rates, lrs)
    assert "near its highest" in said
    assert observe(rates, [1.0] * 30) == []


def test_a_rate_that_falls_in_few_refreshes_is_healthy() -> None:
    """A mean over refreshes lags behind the learning rate of the last one, most in a short schedule."""
    lrs = [1 - i / 24 for i in range(24)]
    assert observe([0.1 * lr**0.6 for lr in lrs], lrs) == []


def test_rates_over_different_numbers_of_steps_are_not_compared() -> None:
    watch = FlipWatch()
    said = [watch.observe(rate, 1.0, every) for rate, every in [(0.02, 10)] * 2 * WINDOW + [(0.08, 40)] * 2 * WINDOW]
    assert said == [None] * 4 * WINDOW


def test_an_explosion_in_training_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = Stack(MLP())
    run = compiled(model, refresh_every=1, decay=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    train(run, optimizer, 1)
    generator = torch.Generator().manual_seed(0)
    with caplog.at_level(logging.WARNING, logger="sparse24"):
        for step in range(2 * WINDOW):  # steps of growing size, at one learning rate
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator) * 0.2 * 1.5**step
            optimizer.step()
    (said,) = [r.getMessage() for r in caplog.records if "explodes" in r.getMessage()]
    assert "raise decay (now 0)" in said and "find_decay" in said
