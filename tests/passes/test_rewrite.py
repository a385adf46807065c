"""What the rewritten graph looks like: how many calls, what is merged, what is gone and what stays."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils.checkpoint import checkpoint

from sparse24.kernels.linear import sparse_linear, sparse_linear_glu
from sparse24.passes.find import find_linears
from sparse24.passes.graph import copy_of, op_name, regions
from sparse24.passes.rewrite import SEEDS, operand_names, rewrite

from .capture import (
    FF,
    Backend,
    Captured,
    Conv1D,
    D,
    Net,
    assert_equals_masked,
    capture,
    ffn,
    gated,
    nodes,
    outputs_and_gradients,
    tokens,
)

SWIGLU: Callable[[Tensor, Tensor], Tensor] = lambda gate, up: F.silu(gate) * up  # noqa: E731


class Everything(nn.Module):
    """Fused, merged and single linears, with and without biases, in the graph and in a checkpoint's body."""

    def __init__(self) -> None:
        super().__init__()
        self.qkvo = nn.ModuleList([nn.Linear(D, D, bias=i % 2 == 0) for i in range(4)])
        self.swiglu, self.tanh = gated(SWIGLU, bias=True), gated(lambda gate, up: torch.tanh(gate) * up)
        self.mlp = ffn(lambda h: F.relu(h.view(-1, FF)).view(h.shape))
        self.conv = nn.Sequential(Conv1D(D, FF), nn.GELU(), Conv1D(FF, D))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, o = self.qkvo
        x = o(F.scaled_dot_product_attention(q(x), k(x), v(x)))
        x = x + checkpoint(self.swiglu, x, use_reentrant=False)
        return self.conv(self.tanh(self.mlp(x)))


#: q k v, o; gate up, down; up, down; gate up, down; up, down: of these calls swiglu, relu and gelu are fused.
EXPECTED = {"linear": 7, "glu": 3, "dense": 0}


def everything() -> Captured:
    return capture(Everything(), tokens(), layers="all")


def names(gm: GraphModule, op: str) -> list[str]:
    return [n.name for n in gm.graph.nodes if n.op == op]


def sparse_calls(captured: Captured) -> list[Node]:
    return [n for n in nodes(captured.rewritten) if n.target in (sparse_linear, sparse_linear_glu)]


# --------------------------------------------------------------------------------------------------------------- counts


def test_no_linear_is_left() -> None:
    captured = everything()
    assert sum(op_name(n) in ("linear", "addmm") for n in nodes(captured.original)) == len(captured.linears) == 14
    assert captured.calls() == EXPECTED
    assert [len(group.linears) for group in captured.groups] == [3, 1, 1, 1, 2, 1, 1, 1, 2, 1]


def test_numbers_of_everything() -> None:
    assert_equals_masked(Everything(), tokens(), layers="all")


def test_the_original_is_left_untouched() -> None:
    gm = everything().original
    before = [(n.name, str(n.target), str(n.args), sorted(n.meta)) for n in nodes(gm)]
    assert rewrite(copy.deepcopy(gm), [s for s in find_linears(gm, layers="all") if s.reason is None])
    assert before == [(n.name, str(n.target), str(n.args), sorted(n.meta)) for n in nodes(gm)]


def test_nothing_to_rewrite_changes_nothing() -> None:
    gm = everything().original
    code = gm.code
    assert rewrite(gm, []) == [] and gm.code == code


def test_placeholders_come_last_in_the_documented_order() -> None:
    captured = everything()
    added = [SEEDS, *(name for i in range(len(captured.groups)) for name in operand_names(i))]
    before = names(captured.original, "placeholder")
    assert names(captured.rewritten, "placeholder") == before + added
    first_other = next(i for i, n in enumerate(captured.rewritten.graph.nodes) if n.op != "placeholder")
    assert first_other == len(before + added), "all placeholders stand before everything else"


def test_each_call_takes_the_operands_and_the_seed_of_its_group() -> None:
    captured = everything()
    for n in sparse_calls(captured):
        packed, packed_t, seeds, index = n.args[2:6]
        assert (packed.target, packed_t.target, seeds.target) == (*operand_names(index), SEEDS)
        assert len(n.args[1]) == len(captured.groups[index].linears)
    assert sorted(n.args[5] for n in sparse_calls(captured)) == list(range(len(captured.groups)))


def test_nothing_dead_is_left_and_the_graphs_are_sound() -> None:
    for region in regions(everything().rewritten):
        region.module.graph.lint()
        unused = [n.name for n in region.module.graph.nodes if not n.users and n.op in ("call_function", "call_method")]
        assert unused == []


# ----------------------------------------------------------------------------------------------------- what nodes carry


def test_stack_traces_lead_to_the_users_line() -> None:
    traces = [n.stack_trace or "" for n in sparse_calls(everything())]
    assert all("capture.py" in trace or "test_rewrite.py" in trace for trace in traces)
    assert any("SWIGLU" in trace for trace in traces), "a fused op carries the trace of its activation"


class _ExampleValues(Interpreter):
    def run_node(self, n: Node) -> Any:
        result, example = super().run_node(n), n.meta.get("example_value")
        if isinstance(result, Tensor) and isinstance(example, Tensor):
            assert (result.shape, result.dtype) == (example.shape, example.dtype), f"{n.name} = {n.format_node()}"
        return result


def test_example_values_are_those_of_the_new_nodes() -> None:
    """Later passes read shapes and dtypes there."""
    captured = everything()
    with torch.no_grad():
        _ExampleValues(captured.rewritten).run(*captured.args)


# ----------------------------------------------------------------------------------------- fused, or merged and generic


def test_the_activation_is_gone_where_it_is_fused() -> None:
    captured = capture(gated(SWIGLU), tokens())
    assert [op_name(n) for n in captured.original.graph.nodes if n.op == "call_function"].count("silu") == 1
    assert {op_name(n) for n in captured.rewritten.graph.nodes} & {"silu", "mul"} == set()


@pytest.mark.parametrize(
    ("second_user_of", "kind"),
    [("nothing", "swiglu"), ("gate", None), ("up", None), ("silu", None), ("product", "swiglu")],
)
def test_second_user_in_a_gated_layer(second_user_of: str, kind: str | None) -> None:
    """What else is used must be computed by itself. gate and up are one matmul either way."""

    def forward(m: Any, x: Tensor) -> Any:
        gate, up = m.gate(x), m.up(x)
        silu = F.silu(gate)
        product = silu * up
        values = {"gate": gate, "up": up, "silu": silu, "product": product, "nothing": x}
        return m.down(product), values[second_user_of] * 2

    model = gated(SWIGLU)
    model.run = forward
    captured = assert_equals_masked(model, tokens())
    assert captured.kinds == [kind, None]
    assert captured.merged[0] == ["gate.weight", "up.weight"]
    assert any(op_name(n) == "silu" for n in captured.rewritten.graph.nodes) == (kind is None)


@pytest.mark.parametrize(
    ("second_user_of", "kind"),
    [("nothing", "relu2"), ("up", None), ("view", None), ("relu", "relu"), ("square", "relu2")],
)
def test_second_user_in_a_plain_layer(second_user_of: str, kind: str | None) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        up = m.up(x)
        view = up.view(-1, FF)
        relu = F.relu(view)
        square = relu**2
        values = {"up": up, "view": view, "relu": relu, "square": square, "nothing": x}
        return m.down(square), values[second_user_of] * 2

    model = ffn(F.relu)
    model.run = forward
    captured = assert_equals_masked(model, tokens())
    assert captured.kinds == [kind, None]


@pytest.mark.parametrize(
    ("gate_bias", "up_bias", "kind"),
    [(False, False, "swiglu"), (True, True, "swiglu"), (True, False, None), (False, True, None)],
)
def test_biases_of_gate_and_up(gate_bias: bool, up_bias: bool, kind: str | None) -> None:
    """The fused op takes a bias for both or for none; else they are one matmul, and the bias is added to its half."""
    model = gated(SWIGLU)
    model.gate, model.up = nn.Linear(D, FF, bias=gate_bias), nn.Linear(D, FF, bias=up_bias)
    captured = assert_equals_masked(model, tokens())
    assert captured.kinds == [kind, None] and len(captured.groups[0].linears) == 2


@pytest.mark.parametrize(
    ("chosen", "calls"),
    [
        ({"gate"}, {"linear": 1, "glu": 0, "dense": 2}),
        ({"up"}, {"linear": 1, "glu": 0, "dense": 2}),
        ({"down"}, {"linear": 1, "glu": 0, "dense": 2}),
        ({"gate", "up"}, {"linear": 0, "glu": 1, "dense": 1}),
        ({"gate", "down"}, {"linear": 2, "glu": 0, "dense": 1}),
        ({"gate", "up", "down"}, {"linear": 1, "glu": 1, "dense": 0}),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else "",
)
def test_any_subset_of_a_layer(chosen: set[str], calls: dict[str, int]) -> None:
    captured = assert_equals_masked(gated(SWIGLU, bias=True), tokens(), choose=lambda s: s.role in chosen)
    assert captured.calls() == calls


def test_linears_with_different_ways_of_wgrad_stay_apart() -> None:
    gm = capture(gated(SWIGLU), tokens()).original
    linears = [replace(s, wgrad="mvue" if s.role == "up" else "dense") for s in find_linears(gm)]
    groups = rewrite(gm, linears)
    assert [(group.kind, group.wgrad, len(group.linears)) for group in groups] == [
        (None, "dense", 1),
        (None, "mvue", 1),
        (None, "dense", 1),
    ]


def test_mvue_prunes_for_the_weight_gradient_alone() -> None:
    """Forward, dgrad and bias gradients are those of wgrad="dense", to the bit; gradients of weights are other ones."""
    model, x, results = nn.Sequential(ffn(F.gelu), gated(SWIGLU, bias=True)), tokens(), []
    for wgrad in ("dense", "mvue"):
        torch._dynamo.reset()
        torch.manual_seed(0)  # the same masks
        results.append(outputs_and_gradients(torch.compile(model, backend=Backend(wgrad=wgrad)), model, [x]))
    dense, mvue = results
    differ = {name for name in dense if not torch.equal(dense[name], mvue[name])}
    assert differ == {name for name in dense if name.endswith("weight")}
    assert all(mvue[name].isfinite().all() for name in mvue)


# --------------------------------------------------------------------------------------------------------------- dtypes


def casts(captured: Captured) -> Counter[torch.dtype]:
    return Counter(n.args[1] for n in nodes(captured.rewritten) if n.target == "to")


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (F.gelu, {torch.bfloat16: 2}),  # x, and down's bias; up's bias is added in fp32 inside the op
        (torch.tanh, {torch.bfloat16: 3}),
    ],
)
def test_autocast_casts_what_is_not_bf16_yet(act: Callable[[Tensor], Tensor], expected: dict[torch.dtype, int]) -> None:
    model, x = ffn(act), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        assert casts(capture(model, x)) == expected
        torch._dynamo.reset()
        assert casts(capture(model, x.bfloat16())) == {torch.bfloat16: expected[torch.bfloat16] - 1}
    assert casts(everything()) == {}, "without autocast there is nothing to cast"


@pytest.mark.parametrize(
    ("model", "last"), [(lambda: ffn(lambda h: F.relu(h) ** 2), "pow"), (lambda: gated(SWIGLU), "mul")]
)
def test_an_activation_that_autocast_made_wider_hands_over_its_dtype(model: Callable[[], nn.Module], last: str) -> None:
    """On CUDA autocast computes powers in fp32. No CPU op does so: the graph is changed by hand to say it."""
    with torch.autocast("cpu", torch.bfloat16):
        captured = capture(model(), tokens())
    gm = captured.original
    activation = next(n for n in gm.graph.nodes if op_name(n) == last)
    activation.meta["example_value"] = activation.meta["example_value"].float()
    down = next(iter(activation.users))
    up = [s for s in find_linears(gm) if s.role != "down"]
    (group,) = rewrite(gm, up)
    assert group.kind is not None
    assert down.args[0].target == "to" and down.args[0].args[1] == torch.float32


# ------------------------------------------------------------------------------------------------------------- in place


def test_residual_added_in_place_to_what_down_returns() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.mlp(x)
        y += x
        return y

    assert_equals_masked(Net(forward, mlp=ffn(F.gelu, bias=False)), tokens())


def test_activation_in_place_without_a_fused_form() -> None:
    captured = assert_equals_masked(ffn(nn.Hardswish(inplace=True), bias=False), tokens())
    assert captured.kinds == [None, None]


def test_one_part_of_a_merged_matmul_modified_in_place() -> None:
    captured = assert_equals_masked(gated(lambda gate, up: up.mul_(torch.tanh(gate))), tokens())
    assert len(captured.groups) == 2


def test_a_copy_works_on_the_tensors_of_the_original() -> None:
    """A compiled optimizer step holds its parameters as attributes of the graph: a copy of them would be updated."""
    held = torch.zeros(3)

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.parameter = held, nn.Parameter(torch.zeros(3))
            self.register_buffer("buffer", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.plain.add_(x), self.parameter.add_(x), self.buffer.add_(x)
            return x

    gm = torch.fx.symbolic_trace(Holds())
    with torch.no_grad():
        copy_of(gm)(torch.ones(3))
    attributes = [node.target for node in gm.graph.find_nodes(op="get_attr")]
    assert len(attributes) == 3 and all(torch.equal(getattr(gm, name), torch.ones(3)) for name in attributes)
