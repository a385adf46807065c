"""lr_scale: sparse weights step with a learning rate of their own; the optimizer's groups stay as they are."""

import copy

import pytest
import torch

import sparse24

from .models import MLP, Stack, SwiGLU, compiled, sparse_names, train


def updates(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What one step adds to each parameter."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def adamw(model: torch.nn.Module, **more: object) -> torch.optim.AdamW:
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, **more)


@pytest.mark.parametrize("more", [{}, {"fused": True}, {"foreach": True}, {"lr": "tensor"}], ids=str)
def test_only_sparse_weights_step_further_and_the_groups_stay(more: dict[str, object]) -> None:
    found = {}
    for scale in (1.0, 2.0):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = Stack(SwiGLU(), MLP())
        run, optimizer = compiled(model, lr_scale=scale, dense_after=2), adamw(model)
        for group in optimizer.param_groups:
            group.update({**more, "lr": torch.tensor(1e-2)} if "lr" in more else more)
        groups = list(optimizer.param_groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        run(torch.ones(4, 64) + torch.arange(64) / 64).square().mean().backward()
        found[scale] = updates(model, optimizer)
        names = sparse_names(model)
        schedule.step()
        assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
        assert [float(group["lr"]) for group in groups] == [pytest.approx(5e-3)] * 2
        assert [len(group["params"]) for group in groups] == [
            sum((p.dim() > 1) == wide for p in model.parameters()) for wide in (True, False)
        ]
        assert len(optimizer.state) == len([*model.parameters()])
    assert len(names) == 5
    for name, update in found[2.0].items():
        factor = 2 if name in names else 1
        assert update.abs().max() > 0 and torch.allclose(update, factor * found[1.0][name], rtol=1e-4, atol=1e-8), name


def test_it_holds_on_in_the_dense_end_and_not_in_a_dense_run() -> None:
    steps = {}
    for after in (0, 1):
        torch._dynamo.reset()
        model = Stack(MLP())
        run, optimizer = compiled(model, lr_scale=3.0, dense_after=after), torch.optim.SGD(model.parameters(), lr=1e-2)
        train(run, optimizer, 2)
        assert sparse24.session(model).phase == "dense"
        run(torch.randn(4, 64)).square().mean().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        steps[after] = {n: u / (-1e-2 * grads[n]) for n, u in updates(model, optimizer).items()}
    for after, found in steps.items():
        for name, ratio in found.items():
            expected = 3.0 if after and name in ("blocks.0.up.weight", "blocks.0.down.weight") else 1.0
            assert ratio[ratio.isfinite()].median().item() == pytest.approx(expected, rel=1e-2), (after, name)


def test_a_step_that_raises_leaves_the_groups_whole() -> None:
    class Failing(torch.optim.SGD):
        fail = True

        def step(self, closure=None) -> None:
            if self.fail:
                assert len(self.param_groups) == 2
                raise RuntimeError("out of memory")
            super().step(closure)

    model = Stack(MLP())
    run, optimizer = compiled(model, lr_scale=2.0), Failing(model.parameters(), lr=1e-2)
    whole = copy.deepcopy(optimizer.state_dict())
    run(torch.randn(4, 64)).square().mean().backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert optimizer.state_dict() == whole and len(optimizer.param_groups) == 1
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.fail = False
    weight = model.blocks[0].up.weight
    expected = weight.detach() - 2e-2 * (
        weight.grad + 2e-4 * weight.detach() * ~sparse24.session(model).weights["blocks.0.up.weight"].mask()
    )
    optimizer.step()
    assert torch.allclose(weight, expected, atol=1e-6) and optimizer.param_groups[0]["lr"] == 1e-2


def test_what_an_optimizer_counts_in_its_groups_is_kept() -> None:
    class Counting(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None) -> None:
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
            super().step(closure)

    model = Stack(MLP())
    run, optimizer = compiled(model, lr_scale=2.0), Counting(model.parameters(), lr=1e-3)
    train(run, optimizer, 3)
    assert [group["k"] for group in optimizer.param_groups] == [3]


HELD = {"alone": lambda inner: inner[0], "list": list, "tuple": tuple, "dict": lambda inner: dict(enumerate(inner))}


@pytest.mark.parametrize(
    ("held", "own", "scale"),
    [("alone", True, 1.0), *((held, own, 2.0) for held in HELD for own in (True, False))],
)
def test_an_optimizer_that_steps_by_others_counts_once(held: str, own: bool, scale: float) -> None:
    """As ZeroRedundancyOptimizer and pairs of optimizers do: all steps have hooks, and only one of them counts for a
    weight. The inner groups are compared with the outer ones.
    """
    inner: list[torch.optim.SGD] = []  # no attribute: the outer one holds them as `held` says

    class Outer(torch.optim.Optimizer):
        def __init__(self, params, **more: float) -> None:
            params = [[p for p in params if (p.dim() > 1) == wide] for wide in (True, False)]
            params = [[p for part in params for p in part]] if held == "alone" else params
            super().__init__([{"params": p} for p in params] if own else [torch.zeros(1)], more)
            inner.extend(torch.optim.SGD(p, **more) for p in params)
            self.steps_by = HELD[held](inner)

        def step(self, closure=None) -> None:
            if own:
                groups = [group for optimizer in inner for group in optimizer.param_groups]
                assert [len(group["params"]) for group in self.param_groups] == [len(g["params"]) for g in groups]
            for optimizer in inner:
                optimizer.step(closure)

    model = Stack(MLP())
    params = [*model.parameters()]
    run, optimizer = compiled(model, lr_scale=scale, decay=0.5, refresh_every=2), Outer(params, lr=1e-2)
    weight, session = model.blocks[0].up.weight, sparse24.session(model)
    for step in (1, 2, 3):
        run(torch.randn(4, 64)).square().mean().backward()
        pruned = ~session.weights["blocks.0.up.weight"].mask() * weight.detach()
        expected = weight.detach() - scale * 1e-2 * (weight.grad + 0.5 * pruned)
        optimizer.step()
        assert torch.allclose(weight, expected, atol=1e-6) and session.step == step
        for one in inner:
            assert one.param_groups[0]["lr"] == 1e-2 and len(one.param_groups) == 1
        model.zero_grad()


def test_the_decay_on_weights_follows() -> None:
    model, decay, lr = Stack(MLP()), 0.5, 0.05
    run = compiled(model, decay=decay, decay_on="weight", lr_scale=2.0)
    run(torch.randn(4, 64)).square().mean().backward()
    weight, p = sparse24.session(model).weights["blocks.0.up.weight"], model.blocks[0].up.weight
    expected = p.detach() * torch.where(weight.mask(), 1.0, 1 - 2 * lr * decay) - 2 * lr * p.grad
    torch.optim.SGD(model.parameters(), lr=lr).step()
    assert torch.allclose(p, expected, atol=1e-6)


def test_a_compiled_step_is_not_compiled_anew_each_time() -> None:
    model = Stack(MLP())
    run, optimizer = compiled(model, lr_scale=2.0), torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2))
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)
    counts = []
    for _ in range(5):
        run(torch.randn(4, 64)).square().mean().backward()
        before = model.blocks[0].up.weight.detach().clone()
        step()
        optimizer.zero_grad()
        counts.append(counter.frame_count)
        assert (model.blocks[0].up.weight - before).abs().max() > 1e-3
    assert counts[0] > 0 and counts[-1] == counts[2]


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan"), True, "2"])
def test_bad_scales_are_refused(scale: object) -> None:
    with pytest.raises(sparse24.OptionError, match="lr_scale=.*need a finite number > 0"):
        sparse24.Recipe(lr_scale=scale)
