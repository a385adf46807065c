"""What is not taken, and the reason given; and how weights are named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .capture import FF, Backend, D, Net, assert_equals_masked, capture, ffn, gated, reasons, roles, tokens

NOT_FFN = "not part of a feed-forward layer"
IN, OUT = (f"it has {which}_features=100, need a multiple of 64" for which in ("in", "out"))


def is_dense(reason: str, model: nn.Module, *inputs: Tensor, **options: Any) -> bool:
    """Whether all linears of a model stay dense, each for this reason."""
    return set(reasons(capture(model, *inputs, **options)).values()) == {reason}


# --------------------------------------------------------------------------------------------- not a feed-forward layer


def test_classifier_head() -> None:
    """As wide as a layer, so that nothing but the classes behind it keep it dense."""
    model = Net(lambda m, x: m.head(m.mlp(x).mean(-2)), mlp=ffn(F.gelu), head=nn.Linear(D, FF))
    assert reasons(capture(model, tokens())) == {"mlp.up": None, "mlp.down": None, "head": NOT_FFN}


def test_pooler_and_classifier_behind_a_tanh() -> None:
    """BERT's: linear, activation, linear, but it does not lead back to the width it came from."""
    linears = {"pooler": nn.Linear(D, D), "classifier": nn.Linear(D, FF)}
    assert is_dense(NOT_FFN, Net(lambda m, x: m.classifier(m.pooler(x[:, 0]).tanh()), **linears), tokens())


def test_two_linears_without_an_activation_between() -> None:
    """A factorised layer: dropout, casts, scales and shifts leave it linear."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(F.dropout((m.a(x) * m.scale + 1.0) / 2.0).float().view(-1, FF))

    model = Net(forward, a=nn.Linear(D, FF), b=nn.Linear(FF, D), scale=nn.Parameter(torch.ones(FF)))
    assert is_dense(NOT_FFN, model, tokens())


def test_low_rank_adapter_beside_up() -> None:
    """Up's output is a sum with something that has another input: the adapter, and up with it, stay dense."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.down(F.gelu(m.up(x) + m.b(m.a(x))))

    linears = {"up": nn.Linear(D, FF), "down": nn.Linear(FF, D), "a": nn.Linear(D, D), "b": nn.Linear(D, FF)}
    assert is_dense(NOT_FFN, Net(forward, **linears), tokens())


def norm(h: Tensor, other: Tensor) -> Tensor:
    return F.layer_norm(F.gelu(h), (FF,))


def softmax(h: Tensor, other: Tensor) -> Tensor:
    return F.gelu(h).softmax(-1)


def mixes_tokens(h: Tensor, other: Tensor) -> Tensor:
    return F.gelu(h).cumsum(-2)


def scale_from_an_input(h: Tensor, other: Tensor) -> Tensor:
    return F.gelu(h) * other


def transpose(h: Tensor, other: Tensor) -> Tensor:
    return F.gelu(h).transpose(0, 1)


@pytest.mark.parametrize("between", [norm, softmax, mixes_tokens, scale_from_an_input, transpose])
def test_more_than_an_activation_between(between: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Net(lambda m, x, other: m.down(between(m.up(x), other)), up=nn.Linear(D, FF), down=nn.Linear(FF, D))
    assert is_dense(NOT_FFN, model, tokens(), torch.randn(3, 7, FF))


def test_addmm_with_factors_is_no_linear() -> None:
    """beta scales the bias, alpha the product: neither is what a sparse linear computes."""
    model = Net(lambda m, x: torch.addmm(m.bias, F.gelu(m.up(x)), m.weight, beta=0.5, alpha=2.0), up=nn.Linear(D, FF))
    model.bias, model.weight = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(FF, D))
    assert reasons(capture(model, tokens(8))) == {"up": NOT_FFN, "weight": NOT_FFN}


def test_residual_without_a_norm_between_layers() -> None:
    """The second up reads a sum of linears, in which an activation took part: still no activation of one linear."""
    model = Net(lambda m, x: (lambda e: m.out(e + m.mlp(e)))(m.embed(x)), mlp=ffn(F.gelu))
    model.embed, model.out = nn.Linear(D, D), nn.Linear(D, D)
    dense = {"embed": NOT_FFN, "out": NOT_FFN}
    assert reasons(capture(model, tokens())) == {"mlp.up": None, "mlp.down": None, **dense}


# ---------------------------------------------------------------------------------------------- weights that are shared


def test_head_tied_with_the_embedding() -> None:
    """Even where the user names it: its gradient comes from two places."""
    embed, head = nn.Embedding(FF, D), nn.Linear(D, FF, bias=False)
    head.weight = embed.weight
    model = Net(lambda m, ids: m.head(m.mlp(m.embed(ids))), embed=embed, mlp=ffn(F.gelu), head=head)
    captured = capture(model, torch.arange(6), layers=["*"])
    assert [s.reason for s in captured.linears] == [None, None, "its weight is used 2 times (tied or shared)"]


def test_weight_used_by_two_layers() -> None:
    model = Net(lambda m, x: m.b(m.a(x)), a=ffn(F.gelu), b=ffn(F.gelu))
    model.b.up.weight = model.a.up.weight
    captured = capture(model, tokens())
    assert [s.role for s in captured.linears] == ["up", "down", "up", "down"]
    shared = "its weight is used 2 times (tied or shared)"
    assert [s.reason for s in captured.linears] == [shared, None, shared, None]


def test_weight_used_twice_by_one_operation() -> None:
    model = Net(lambda m, x: m.down(F.gelu(m.up(x))) + (m.up.weight * m.up.weight).sum(), up=nn.Linear(D, FF))
    model.down = nn.Linear(FF, D)
    assert reasons(capture(model, tokens())) == {"up": "its weight is used 3 times (tied or shared)", "down": None}


def test_a_stack_of_experts_is_listed_with_its_reason() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.bmm(F.silu(torch.bmm(x, m.up.transpose(1, 2))), m.down[:4]) * m.scale + m.query @ x.transpose(1, 2)

    up, down, scale, query = torch.randn(4, FF, D), torch.randn(4, FF, D), torch.randn(4, 1, D), torch.randn(4, D, D)
    model = Net(
        forward, **{k: nn.Parameter(t) for k, t in {"up": up, "down": down, "scale": scale, "query": query}.items()}
    )
    captured = capture(model, tokens(4, D))
    stack = "it is a stack of 4 matrices (experts), need one matrix for each linear layer"
    assert reasons(captured) == {"up": stack, "down": stack}, "scales and queries are no layers"
    assert all(s.wanted for s in captured.linears)
    assert reasons(capture(model, tokens(4, D), skip=["down"])) == {"up": stack, "down": "skip names it"}


def test_weight_that_is_computed() -> None:
    """Weight normalisation, a cast, a transposed parameter: what is multiplied is no parameter."""
    model = Net(lambda m, x: m.down(F.gelu(F.linear(x, F.normalize(m.up)))), up=nn.Parameter(torch.randn(FF, D)))
    model.down = nn.Linear(FF, D)
    captured = capture(model, tokens())
    assert [s.reason for s in captured.linears] == ["its weight is computed, not a parameter", None]
    assert [s.role for s in captured.linears] == ["up", "down"]


def test_the_caller_says_which_inputs_cannot_be_sparse() -> None:
    """`ineligible` is asked about the placeholders of weights that are wanted and fit, and about no others."""
    asked = []

    def ineligible(placeholder: str) -> str | None:
        asked.append(placeholder)
        return "frozen" if "up" in placeholder else None

    model = Net(lambda m, x: m.odd(m.head(m.mlp(x))), mlp=ffn(F.gelu), head=nn.Linear(D, D), odd=ffn(F.gelu, ff=100))
    captured = capture(model, tokens(), ineligible=ineligible)
    assert reasons(captured) == {"mlp.up": "frozen", "mlp.down": None, "head": NOT_FFN, "odd.up": OUT, "odd.down": IN}
    assert asked == [s.weight for s in captured.linears[:2]]


# ----------------------------------------------------------------------------------------------------- sizes and dtypes


@pytest.mark.parametrize(
    ("d", "ff", "expected"),
    [
        (100, 128, {"up": IN, "down": OUT}),
        (64, 100, {"up": OUT, "down": IN}),
        (64, 192, {"up": None, "down": None}),
    ],
)
def test_sizes(d: int, ff: int, expected: dict[str, str | None]) -> None:
    captured = capture(ffn(F.gelu, d, ff), tokens(features=d))
    assert reasons(captured) == expected
    assert [(s.in_features, s.out_features) for s in captured.linears] == [(d, ff), (ff, d)]
    assert all(s.wanted for s in captured.linears), "a layer that is wanted and does not fit is worth a warning"


def test_float64_is_not_taken() -> None:
    reason = "it computes in float64, need float32, bfloat16 or float16"
    assert is_dense(reason, ffn(F.gelu).double(), tokens().double())


# -------------------------------------------------------------------------------------------------- what the user names


def model_with_head() -> Net:
    return Net(lambda m, x: m.head(m.b(m.a(x))), a=ffn(F.gelu), b=ffn(F.gelu), head=nn.Linear(D, D))


@pytest.mark.parametrize(
    ("options", "sparse"),
    [
        ({"layers": ["a.*", "head.weight"]}, {"a.up", "a.down", "head"}),
        ({"layers": ["*.up.weight"]}, {"a.up", "b.up"}),
        ({"layers": []}, set()),
        ({"layers": "ffn", "skip": ["b.*"]}, {"a.up", "a.down"}),
        ({"layers": ["*"], "skip": ["*.down.weight", "head.*"]}, {"a.up", "b.up"}),
    ],
)
def test_patterns_and_skip(options: dict[str, Any], sparse: set[str]) -> None:
    captured = capture(model_with_head(), tokens(), **options)
    assert roles(captured).keys() == sparse
    dense = [s for s in captured.linears if s.reason is not None]
    assert not any(s.wanted for s in dense), "what the user did not ask for is no reason to warn"


def test_a_layer_named_by_pattern_needs_no_role() -> None:
    captured = assert_equals_masked(model_with_head(), tokens(), layers=["head.weight"])
    assert roles(captured) == {"head": "linear"} and captured.kinds == [None]


# ---------------------------------------------------------------------------------------------------------------- names


class Deep(nn.Module):
    """Modules in lists, dicts and sequences, a parameter in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": ffn(F.gelu)}), nn.ModuleDict({"mlp": ffn(F.gelu)})])
        self.tail = nn.Sequential(nn.Linear(D, FF), nn.ReLU(), nn.Linear(FF, D))
        self.loose = nn.ParameterList([nn.Parameter(torch.randn(FF, D)), nn.Parameter(torch.randn(D, FF))])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["mlp"](x)
        return F.linear(F.relu(F.linear(self.tail(x), self.loose[0])), self.loose[1])


def test_names_are_those_of_named_parameters() -> None:
    model = Deep()
    expected = [name for name, p in model.named_parameters() if p.dim() == 2]
    for compiled in (model, model.forward, lambda x: model(x)):
        torch._dynamo.reset()
        assert sorted(s.name for s in capture(compiled, tokens()).linears) == sorted(expected)


def test_names_under_regional_compilation_begin_at_the_region() -> None:
    model = nn.ModuleList([gated(lambda gate, up: F.silu(gate) * up) for _ in range(2)])
    for block in model:
        torch._dynamo.reset()  # else the second block runs the first's graph, and nothing is captured
        assert [s.name for s in capture(block, tokens()).linears] == ["gate.weight", "up.weight", "down.weight"]


# ------------------------------------------------------------------------------------------------------- dynamic shapes


@pytest.mark.parametrize(
    "act",
    [
        F.gelu,
        lambda h: F.relu(h.view(-1, FF)).view(h.shape),
        lambda h: F.silu(h.reshape(h.shape[0] * h.shape[1], -1)).reshape(*h.shape[:-1], FF),
        lambda h: F.relu(h.reshape(h.size(0), h.size(1) * 2, -1)).reshape(h.size()),
    ],
    ids=["plain", "view", "products", "sizes"],
)
def test_dynamic_shapes(act: Callable[[Tensor], Tensor]) -> None:
    """One graph for every number of tokens, its sizes symbols."""
    model = Net(lambda m, x: m.mlp(x) * x.shape[1], mlp=ffn(act))
    captured = assert_equals_masked(model, tokens(), dynamic=True)
    assert any(isinstance(n.meta.get("example_value"), torch.SymInt) for n in captured.original.graph.nodes)
    assert roles(captured) == {"mlp.up": "up", "mlp.down": "down"}


def test_one_dynamic_graph_serves_two_sizes() -> None:
    model, backend = gated(lambda gate, up: F.silu(gate) * up), Backend()
    run = torch.compile(model, backend=backend, dynamic=True)
    assert run(tokens(3, 7)).shape == (3, 7, D) and run(tokens(2, 11)).shape == (2, 11, D)
    assert len(backend.captured) == 1 and backend.captured[0].kinds == ["swiglu", None]
