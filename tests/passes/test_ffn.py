"""Feed-forward layers in every spelling: found, and rewritten to the numbers of eager with masked weights."""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .capture import FF, Conv1D, D, Net, assert_equals_masked, capture, capture_all, ffn, gated, reasons, roles, tokens


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_new_with_tensors(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(torch.sqrt(torch.tensor(2.0 / math.pi)) * (x + 0.044715 * x**3)))


# name: (activation, the fused kind of its up projection)
PLAIN = {
    "relu": (F.relu, "relu"),
    "relu_in_place": (nn.ReLU(inplace=True), "relu"),
    "relu_method": (lambda h: h.relu(), "relu"),
    "gelu": (F.gelu, "gelu"),
    "gelu_none": (nn.GELU(approximate="none"), "gelu"),
    "gelu_tanh": (lambda h: F.gelu(h, approximate="tanh"), "gelu_tanh"),
    "silu": (F.silu, "silu"),
    "relu2_pow": (lambda h: torch.pow(F.relu(h), 2), "relu2"),
    "relu2_operator": (lambda h: F.relu(h) ** 2, "relu2"),
    "relu2_square": (lambda h: F.relu(h).square(), "relu2"),
    "relu2_keyword": (lambda h: torch.square(input=F.relu(h)), "relu"),  # the square stays outside
    "relu3": (lambda h: F.relu(h) ** 3, "relu"),
    "relu_twice": (lambda h: F.relu(h) * F.relu(h), None),
    "square": (lambda h: h * h, None),
    "tanh": (torch.tanh, None),
    "mish": (nn.Mish(), None),
    "logsigmoid": (F.logsigmoid, None),
    "softsign": (F.softsign, None),
    "tanhshrink": (F.tanhshrink, None),
    "hardswish": (nn.Hardswish(), None),
    "gelu_new": (gelu_new, None),
    "gelu_new_with_tensors": (gelu_new_with_tensors, None),
    "quick_gelu": (lambda h: h * torch.sigmoid(1.702 * h), None),
    "where": (lambda h: torch.where(h > 0, h, torch.zeros_like(h)), None),
    "a_users_own": (lambda h: torch.sin(h) ** 2 / (1 + h.abs()) + torch.exp(-h.clamp(min=0)), None),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_plain(name: str, bias: bool) -> None:
    act, kind = PLAIN[name]
    captured = assert_equals_masked(ffn(act, bias=bias), tokens())
    assert roles(captured) == {"up": "up", "down": "down"}
    assert captured.kinds == [kind, None]


# name: (what becomes of gate and up, the fused kind)
GATED = {
    "swiglu": (lambda gate, up: F.silu(gate) * up, "swiglu"),
    "geglu": (lambda gate, up: F.gelu(gate) * up, "geglu"),
    "geglu_tanh": (lambda gate, up: F.gelu(gate, approximate="tanh") * up, "geglu_tanh"),
    "reglu": (lambda gate, up: F.relu(gate) * up, "reglu"),
    "factors_exchanged": (lambda gate, up: up * F.silu(gate), "swiglu"),
    "in_place": (lambda gate, up: F.silu(gate, inplace=True).mul_(up), "swiglu"),
    "sigmoid": (lambda gate, up: torch.sigmoid(gate) * up, None),
    "written_out": (lambda gate, up: gate * torch.sigmoid(gate) * up, None),
    "bilinear": (lambda gate, up: gate * up, None),
    "clamped": (lambda gate, up: F.silu(gate.clamp(max=7)) * (up.clamp(-7, 7) + 1), None),
}


@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize("name", GATED)
def test_gated(name: str, up_first: bool) -> None:
    combine, kind = GATED[name]
    captured = assert_equals_masked(gated(combine, up_first=up_first), tokens())
    assert roles(captured).keys() == {"gate", "up", "down"}
    assert captured.kinds == [kind, None]
    assert sorted(captured.merged[0]) == ["gate.weight", "up.weight"], "gate and up are one matmul"


@pytest.mark.parametrize("up_first", [False, True])
def test_gate_is_the_one_with_the_activation(up_first: bool) -> None:
    heads = (-1, 4, FF // 4)  # a reshape before the product makes no difference
    combine = lambda gate, up: (torch.tanh(gate.view(heads)) * up.view(heads)).view(*gate.shape)  # noqa: E731
    captured = capture(gated(combine, up_first=up_first), tokens())
    assert roles(captured) == {"gate": "gate", "up": "up", "down": "down"}


def packed(hidden, bias: bool = False) -> Net:
    """down(hidden(gate_up(x)))."""
    gate_up, down = nn.Linear(D, 2 * FF, bias=bias), nn.Linear(FF, D)
    return Net(lambda m, x: m.down(hidden(m.gate_up(x))), gate_up=gate_up, down=down)


def chunked(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def chunked_by_position(h: Tensor) -> Tensor:
    gate, up = torch.chunk(h, 2, 2)
    return up * F.gelu(gate)


def second_half_active(h: Tensor) -> Tensor:
    up, gate = h.chunk(2, dim=-1)
    return up * F.silu(gate)


def split(h: Tensor) -> Tensor:
    gate, up = h.split(FF, -1)
    return F.silu(gate) * up


def interleaved(h: Tensor) -> Tensor:
    return F.silu(h[..., ::2]) * h[..., 1::2]


PACKED = {
    "chunk": (chunked, "swiglu"),
    "chunk_by_position": (chunked_by_position, "geglu"),
    "second_half_active": (second_half_active, None),
    "split": (split, None),
    "interleaved": (interleaved, None),
    "glu": (F.glu, None),
    "sliced": (lambda h: F.silu(h[..., :FF]) * h[..., FF:], None),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", PACKED)
def test_packed_gate_up(name: str, bias: bool) -> None:
    hidden, kind = PACKED[name]
    captured = assert_equals_masked(packed(hidden, bias), tokens(4, 5))
    assert roles(captured) == {"gate_up": "up", "down": "down"}
    assert captured.kinds == [kind, None]


@pytest.mark.parametrize(("pieces", "dim", "width"), [(2, 0, FF), (4, -1, 4 * FF)], ids=["tokens", "quarters"])
def test_chunks_that_are_not_gate_and_up(pieces: int, dim: int, width: int) -> None:
    """Halves of the tokens, or two quarters of the features: the fused op would take the wrong entries."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.up(x).chunk(pieces, dim)[:2]
        return m.down(F.silu(a) * b)

    model = Net(forward, up=nn.Linear(D, width), down=nn.Linear(FF, D))
    captured = assert_equals_masked(model, tokens(4, 5))
    assert roles(captured) == {"up": "up", "down": "down"}
    assert captured.kinds == [None, None]


# ----------------------------------------------------------------------------------- what may stand between the linears


@pytest.mark.parametrize(
    ("between", "kind"),
    [
        (lambda h: F.dropout(F.gelu(h), 0.5), "gelu"),
        (lambda h: F.gelu(F.dropout(h, 0.5)), None),
        (lambda h: F.gelu(h.float()).type_as(h), None),
        (lambda h: F.gelu(h).contiguous(), "gelu"),
        (lambda h: F.relu(h.view(-1, FF)).view(h.shape), "relu"),
        (lambda h: (F.relu(h.unflatten(-1, (4, 32))) ** 2).flatten(-2), "relu2"),
        (lambda h: F.silu(h.view(-1, FF).clone()).reshape(h.shape), None),
    ],
    ids=["dropout", "dropout_before", "cast", "contiguous", "view", "heads", "clone"],
)
def test_between_up_and_down(between, kind: str | None) -> None:
    captured = assert_equals_masked(ffn(between), tokens())
    assert roles(captured) == {"up": "up", "down": "down"}
    assert captured.kinds == [kind, None]


@pytest.mark.parametrize("made", [nn.Parameter, nn.Buffer])
def test_a_scale_and_a_shift_inside_the_activation(made) -> None:
    layer = ffn(F.gelu, scale=made(torch.randn(FF)), shift=made(torch.randn(1)))
    layer.run = lambda m, x: m.down(F.gelu(m.up(x) * m.scale + m.shift))
    captured = assert_equals_masked(layer, tokens())
    assert roles(captured) == {"up": "up", "down": "down"}


def test_learned_activation() -> None:
    model = nn.Sequential(OrderedDict(up=nn.Linear(D, FF), act=nn.PReLU(), down=nn.Linear(FF, D)))
    captured = assert_equals_masked(model, tokens())
    assert roles(captured) == {"up": "up", "down": "down"}


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool) -> None:
    """Computed in bf16 from fp32 masters, whether the region is in the graph or around it."""
    model, x = gated(lambda gate, up: F.silu(gate) * up, bias=True), tokens(2, 32)
    plain = model.run

    def forward(m: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(m, x)

    if inside:
        model.run = forward
        captured = assert_equals_masked(model, x)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            captured = assert_equals_masked(model, x)
    assert roles(captured) == {"gate": "gate", "up": "up", "down": "down"}
    assert [group.dtype for group in captured.groups] == [torch.bfloat16] * 2


def test_autocast_that_begins_behind_gate_and_up() -> None:
    """The fused op stands where the linears stood: outside the region, in fp32."""

    def combine(gate: Tensor, up: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.silu(gate) * up

    captured = assert_equals_masked(gated(combine), tokens())
    assert captured.kinds == ["swiglu", None]


def test_gate_and_up_of_different_dtypes_stay_apart() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            gate = m.gate(x)
        return m.down(F.silu(gate) * m.up(x))

    model = gated(torch.mul)
    model.run = forward
    captured = assert_equals_masked(model, tokens())
    assert captured.merged == [["gate.weight"], ["up.weight"], ["down.weight"]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_in_half_precision(dtype: torch.dtype) -> None:
    captured = assert_equals_masked(ffn(F.gelu).to(dtype), tokens(2, 32).to(dtype))
    assert captured.kinds == ["gelu", None]
    assert {group.dtype for group in captured.groups} == {dtype}


# --------------------------------------------------------------------------------------------- other ways to be a layer


def test_sequential_chain() -> None:
    """Each linear that is fed through an activation and leads back to the width is a down; it may be an up as well."""
    chain = nn.Sequential(nn.Linear(D, FF), nn.ReLU(), nn.Linear(FF, D), nn.GELU(), nn.Dropout(0.1), nn.Linear(D, FF))
    captured = assert_equals_masked(chain, tokens())
    assert roles(captured) == {"0": "up", "2": "up", "5": "down"}


@pytest.mark.parametrize(("act", "kind"), [(F.gelu, "gelu"), (gelu_new, None)])
def test_weights_stored_in_by_out(act, kind: str | None) -> None:
    """GPT-2: addmm between two views; up is fused although the activation stands behind the second view."""
    model = Net(lambda m, x: m.c_proj(act(m.c_fc(x))), c_fc=Conv1D(D, FF), c_proj=Conv1D(FF, D))
    captured = assert_equals_masked(model, tokens())
    assert roles(captured) == {"c_fc": "up", "c_proj": "down"}
    assert captured.kinds == [kind, None] and all(group.transposed for group in captured.groups)
    up = captured.linears[0]
    assert (up.in_features, up.out_features) == (D, FF)


def test_addmm_that_adds_a_matrix_is_not_fused() -> None:
    """A residual added by the down projection's addmm, a condition by up's: neither is a bias vector."""

    def forward(m: Net, x: Tensor, condition: Tensor) -> Tensor:
        h = F.gelu(torch.addmm(condition, x, m.up))
        return torch.addmm(x, h, m.down)

    model = Net(forward, up=nn.Parameter(torch.randn(D, FF) / 8), down=nn.Parameter(torch.randn(FF, D) / 8))
    captured = assert_equals_masked(model, tokens(8), tokens(8, features=FF))
    assert captured.kinds == [None, None]


def test_experts_that_read_one_input_keep_their_fused_activations() -> None:
    experts = nn.ModuleList([gated(lambda gate, up: F.silu(gate) * up), ffn(F.gelu), gated(lambda g, u: F.gelu(g) * u)])
    captured = assert_equals_masked(Net(lambda m, x: sum(e(x) for e in m.experts), experts=experts), tokens())
    assert sorted(k for k in captured.kinds if k) == ["geglu", "gelu", "swiglu"]


def test_residual_and_norm_around_layers() -> None:
    """Two blocks, the second without a norm: what its up reads is a sum, and not the first's activation."""
    model = Net(
        lambda m, x: (lambda y: y + m.b(y))(x + m.a(m.norm(x))), a=ffn(F.gelu), b=ffn(F.relu), norm=nn.LayerNorm(D)
    )
    captured = assert_equals_masked(model, tokens())
    assert roles(captured) == {"a.up": "up", "a.down": "down", "b.up": "up", "b.down": "down"}
    assert captured.kinds == ["gelu", None, "relu", None]


def test_layers_in_different_graphs() -> None:
    """A graph break between two layers: each graph is rewritten by itself."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        torch._dynamo.graph_break()
        return m.b(x)

    first, second = capture_all(Net(forward, a=ffn(F.gelu), b=ffn(F.gelu)), tokens())
    assert reasons(first) == {"a.up": None, "a.down": None} and reasons(second) == {"b.up": None, "b.down": None}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "shaped",
    [
        lambda x: x.view(-1, x.size(-1)),
        lambda x: x.reshape(-1, D),
        lambda x: x.type_as(x),
        lambda x: x.flatten(0, 1),
    ],
    ids=["view", "reshape", "cast", "flatten"],
)
def test_gate_and_up_that_each_reshape_their_input(shaped: Callable[[Tensor], Tensor], dynamic: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.norm(x)
        return m.down(F.silu(m.gate(shaped(h))) * m.up(shaped(h)))

    model = gated(lambda gate, up: gate)
    model.run, model.norm = forward, nn.LayerNorm(D)
    captured = assert_equals_masked(model, tokens(), dynamic=dynamic)
    assert roles(captured) == {"gate": "gate", "up": "up", "down": "down"} and captured.kinds == ["swiglu", None]


def test_copies_before_and_after_a_change_in_place_are_two() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.norm(x).transpose(0, 1)
        gate = m.gate(h.reshape(-1, D))
        h.mul_(2.0)
        return m.down(F.silu(gate) * m.up(h.reshape(-1, D)))

    model = gated(lambda gate, up: gate)
    model.run, model.norm = forward, nn.LayerNorm(D)
    assert roles(capture(model, tokens())) == {}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "in_place", [torch.relu_, lambda h: F.relu(h, inplace=True), lambda h: F.silu(h, inplace=True)]
)
def test_activation_in_place_whose_result_is_ignored(in_place: Callable[[Tensor], Tensor], dynamic: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.up(x)
        in_place(h)
        return m.down(h)

    model = ffn(F.relu)
    model.run = forward
    captured = assert_equals_masked(model, tokens(), dynamic=dynamic)
    assert roles(captured) == {"up": "up", "down": "down"}
