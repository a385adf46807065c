"""Every family of the table, unmodified: what is found, its numbers against masked eager, some training steps."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse24

from .families import FAMILIES, Family, loss_of

OPTIONS = {"inner": "eager", "wgrad": "dense", "refresh_every": 2}


def build(family: Family) -> tuple[nn.Module, dict[str, Any]]:
    if family.library in ("transformers", "timm"):
        pytest.importorskip(family.library, reason=f"{family.library} is not installed: {family.name} is NOT tested")
    return family.build()


def compiled(model: nn.Module, family: Family, **options: Any) -> Any:
    return torch.compile(model, backend="sparse24", options={**OPTIONS, **options}, fullgraph=family.fullgraph)


def masked_twin(model: nn.Module) -> nn.Module:
    """A copy whose sparse weights hold W.M: its gradients are the straight-through ones."""
    twin, params = copy.deepcopy(model), dict(model.named_parameters())
    for name, weight in sparse24.session(model).weights.items():
        if weight.reason_skipped is None:
            twin.get_parameter(name).data.mul_(weight.mask())
    assert params.keys() == dict(twin.named_parameters()).keys()
    return twin


def gradients(run: Any, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = loss_of(run(**inputs))
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equals_masked_eager(run: Any, model: nn.Module, inputs: dict[str, Any]) -> None:
    """No further from float64 than masked eager in float32 is, times a small factor."""
    loss, grads = gradients(run, model, inputs)
    twin = masked_twin(model)
    _, eager = gradients(twin, twin, inputs)
    wide: Any = copy.deepcopy(twin).double()
    if hasattr(wide, "set_experts_implementation"):
        wide.set_experts_implementation("eager")  # grouped_mm knows no float64
    widened = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    exact_loss, exact = gradients(wide, wide, widened)
    assert abs(loss - exact_loss) <= 1e-5 * abs(exact_loss)
    assert grads.keys() == eager.keys() == exact.keys()
    largest = max(g.norm() for g in exact.values())  # of a gradient that is zero but for rounding (a bias of keys)
    for name, expected in exact.items():
        error, allowed = ((g[name].double() - expected).norm() for g in (grads, eager))
        assert error <= 4 * allowed + 1e-6 * expected.norm() + 1e-7 * largest, (
            f"{name}: {error:.1e}, eager {allowed:.1e}"
        )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_feed_forward_layers(family: Family) -> None:
    model, inputs = build(family)
    run = compiled(model, family)
    loss_of(run(**inputs))
    session = sparse24.session(model)
    reasons = {name: weight.reason_skipped for name, weight in session.weights.items()}
    there = family.feed_forward(model)
    assert there, "the table names no feed-forward layer"
    assert [n for n, reason in reasons.items() if reason is None] == family.expected(model, there)

    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)} & {
        n
        for n, _ in model.named_parameters()  # a tied head has another name
    }
    assert linears | set(there) | set(family.projections(model)) <= reasons.keys(), "a linear is not listed"
    for name in there:
        assert reasons[name] is None or family.why_dense(name) in reasons[name]

    assert_equals_masked_eager(run, model, inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(run(**inputs))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    if family.expected(model, there):
        assert session.step == 4 and session.phase == "sparse"
        assert_equals_masked_eager(run, model, inputs)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_attention_projections_too(family: Family) -> None:
    model, inputs = build(family)
    run = compiled(model, family, layers="all")
    loss_of(run(**inputs))
    reasons = {name: weight.reason_skipped for name, weight in sparse24.session(model).weights.items()}
    there = {*family.feed_forward(model), *family.projections(model)}
    assert family.projections(model), "the table names no attention projection"
    assert {n for n, reason in reasons.items() if reason is None} == set(family.expected(model, sorted(there)))
    for name in there:
        assert reasons[name] is None or family.why_dense(name) in reasons[name]
    assert_equals_masked_eager(run, model, inputs)


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.fullgraph], ids=lambda family: family.name)
def test_what_is_not_one_graph_here_is_not_one_for_torch_either(family: Family) -> None:
    model, inputs = build(family)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager", fullgraph=True)(**inputs)
