"""Activation checkpoints inside the compiled model: layers stand in bodies of their own, and are rewritten there."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse24.kernels.linear import sparse_linear, sparse_linear_glu
from sparse24.passes.find import find_linears
from sparse24.passes.graph import regions

from .capture import D, Net, assert_equals_masked, capture, ffn, gated, reasons, roles, tokens


def swiglu() -> Net:
    return gated(lambda gate, up: F.silu(gate) * up)


def own_nodes(captured: Any) -> list[list[str]]:
    """The sparse calls of each region of the rewritten graph."""
    names = {sparse_linear: "linear", sparse_linear_glu: "glu"}
    graphs = [region.module.graph for region in regions(captured.rewritten)]
    return [[names[n.target] for n in graph.nodes if n.target in names] for graph in graphs]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_layers_inside_bodies(use_reentrant: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        for layer in m.layers:
            x = x + checkpoint(layer, x, use_reentrant=use_reentrant)
        return m.last(x)

    model = Net(forward, layers=nn.ModuleList([ffn(F.gelu), swiglu()]), last=ffn(F.relu))
    captured = assert_equals_masked(model, tokens())
    assert len(roles(captured)) == 7 and set(roles(captured).values()) == {"up", "gate", "down"}
    assert own_nodes(captured) == [["glu", "linear"]] * 3


def test_nested_bodies() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return x + checkpoint(m.a, x, use_reentrant=False)

        def outer(x: Tensor) -> Tensor:
            return m.b(checkpoint(inner, x, use_reentrant=False))

        return m.c(checkpoint(outer, x, use_reentrant=False))

    captured = assert_equals_masked(Net(forward, a=swiglu(), b=ffn(F.gelu), c=ffn(F.relu)), tokens())
    assert own_nodes(captured) == [["glu", "linear"], ["glu", "linear"], [], ["glu", "linear"]]
    depths = {s.name: len(s.path) for s in captured.linears if s.role == "down"}
    assert depths == {"a.down.weight": 3, "b.down.weight": 1, "c.down.weight": 0}


def test_attention_and_feed_forward_in_one_body() -> None:
    """A body with two layers takes the operands of both, the seeds once."""

    def block(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, -1)
        x = x + m.o(F.scaled_dot_product_attention(q, k, v))
        return x + m.mlp(x)

    linears = {"qkv": nn.Linear(D, 3 * D), "o": nn.Linear(D, D)}
    model = Net(lambda m, x: checkpoint(block, m, x, use_reentrant=False), mlp=swiglu(), **linears)
    captured = assert_equals_masked(model, tokens(), layers="all")
    body = regions(captured.rewritten)[1].module
    added = [n.target for n in body.graph.nodes if n.op == "placeholder" and n.target.startswith("sparse24")]
    assert len(added) == len(set(added)) == 1 + 2 * 4 == 1 + 2 * len(captured.groups)


def test_weight_shared_by_two_bodies_is_shared() -> None:
    """Dynamo makes a body for each call; the weight that both take is one placeholder of the whole graph."""

    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(m.mlp, x, use_reentrant=False)
        return m.last(x)

    captured = capture(Net(forward, mlp=ffn(F.gelu), last=ffn(F.gelu)), tokens())
    shared = "its weight is used 2 times (tied or shared)"
    assert [s.reason for s in captured.linears] == [None, None] + [shared] * 4
    assert own_nodes(captured) == [["glu", "linear"], [], []]


def test_weight_used_inside_and_outside_a_body_is_shared() -> None:
    model = Net(lambda m, x: m.a(checkpoint(m.b, x, use_reentrant=False)), a=ffn(F.gelu), b=ffn(F.gelu))
    model.b.up.weight = model.a.up.weight
    shared = "its weight is used 2 times (tied or shared)"
    assert [(s.role, s.reason) for s in capture(model, tokens()).linears] == [("up", shared), ("down", None)] * 2


def test_body_called_twice_is_left_alone() -> None:
    """Operands are added to a call and its body together, so a body of two calls cannot be rewritten for one."""
    model = Net(lambda m, x: checkpoint(m.b, checkpoint(m.a, x, use_reentrant=False), use_reentrant=False))
    model.a, model.b = ffn(F.gelu), ffn(F.gelu)
    gm = capture(model, tokens()).original
    first, second = (n for n in gm.graph.nodes if n.op == "call_function" and "checkpoint" in str(n.target))
    second.args = (first.args[0], *second.args[1:])  # Dynamo may do this where two bodies are alike
    gm.recompile()
    assert find_linears(gm) == [] and len(regions(gm)) == 1


def test_reasons_reach_into_bodies() -> None:
    model = Net(lambda m, x: checkpoint(m.mlp, x, use_reentrant=False), mlp=ffn(F.gelu, 100))
    captured = capture(model, tokens(features=100), layers="all", skip=["*.down.weight"])
    assert reasons(captured) == {"mlp.up": "it has in_features=100, need a multiple of 64", "mlp.down": "skip names it"}


def test_body_under_autocast() -> None:
    model, x = Net(lambda m, x: x + checkpoint(m.mlp, x, use_reentrant=False), mlp=swiglu()), tokens(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        captured = assert_equals_masked(model, x)
    assert {group.dtype for group in captured.groups} == {torch.bfloat16}
