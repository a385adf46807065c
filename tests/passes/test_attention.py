"""Attention projections: sparse under layers="all" in every spelling of attention, dense under "ffn"."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .capture import D, Net, assert_equals_masked, capture, ffn, reasons, roles, tokens

HEADS = 4
QKVO = {"q": "q", "k": "k", "v": "v", "o": "o"}


def linears(names: str, **others: Any) -> dict[str, Any]:
    return {**{name: nn.Linear(D, D, bias=False) for name in names}, **others}


def split(x: Tensor) -> Tensor:
    """[batch, tokens, D] -> [batch, HEADS, tokens, D / HEADS]."""
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = F.softmax(scores.masked_fill(future, float("-inf")), dim=-1, dtype=torch.float32).type_as(q)
    return F.dropout(weights, 0.1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhts,bhsd->bhtd", torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1), v)


def bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    bias = q.new_zeros(1, q.shape[1], k.shape[1])
    weights = torch.baddbmm(bias, q, k.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, v).unflatten(0, (-1, HEADS))


def rotary(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.arange(x.shape[-1] // 2, dtype=x.dtype)
    a, b = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@pytest.mark.parametrize("core", [sdpa, eager, einsum, bmm])
def test_separate_projections(core: Callable[..., Tensor]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(join(core(split(m.q(x)), split(m.k(x)), split(m.v(x)))))

    captured = assert_equals_masked(Net(forward, **linears("qkvo")), tokens(), layers="all")
    assert roles(captured) == QKVO
    assert captured.merged == [["q.weight", "k.weight", "v.weight"], ["o.weight"]], "q, k and v are one matmul"


def with_rotary(m: Any, x: Tensor) -> Tensor:
    return m.o(join(sdpa(rotary(split(m.q(x))), rotary(split(m.k(x))), split(m.v(x)))))


def with_norm_of_q_and_k(m: Any, x: Tensor) -> Tensor:
    return m.o(join(sdpa(m.q_norm(split(m.q(x))), m.k_norm(split(m.k(x))), split(m.v(x)))))


def with_norm_before_o(m: Any, x: Tensor) -> Tensor:
    return m.o(m.norm(join(sdpa(split(m.q(x)), split(m.k(x)), split(m.v(x))))))


def with_v_first(m: Any, x: Tensor) -> Tensor:
    v, k, q = m.v(x), m.k(x), m.q(x)
    return m.o(join(sdpa(split(q), split(k), split(v))))


def with_shift_before_o(m: Any, x: Tensor) -> Tensor:
    return m.o(join(sdpa(split(m.q(x)), split(m.k(x)), split(m.v(x)))) + m.norm.bias)


def differential(m: Any, x: Tensor) -> Tensor:
    q, k, v = split(m.q(x)), split(m.k(x)), split(m.v(x))
    return m.o(join(sdpa(q, k, v) - 0.3 * sdpa(k, q, v)))


VARIANTS = {
    "rotary": with_rotary,
    "norm_of_q_and_k": with_norm_of_q_and_k,
    "norm_before_o": with_norm_before_o,
    "shift_before_o": with_shift_before_o,
    "differential": differential,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_between_projections_and_core(name: str) -> None:
    norms = {"q_norm": nn.RMSNorm(D // HEADS), "k_norm": nn.RMSNorm(D // HEADS), "norm": nn.LayerNorm(D)}
    captured = assert_equals_masked(Net(VARIANTS[name], **linears("qkvo", **norms)), tokens(), layers="all")
    assert roles(captured) == QKVO


def test_order_of_computation_does_not_matter() -> None:
    captured = assert_equals_masked(Net(with_v_first, **linears("qkvo")), tokens(), layers="all")
    assert roles(captured).keys() == {"q", "k", "v", "o"}
    assert [len(group.linears) for group in captured.groups] == [3, 1]


def packed_by_chunk(m: Any, x: Tensor) -> Tensor:
    return m.o(join(sdpa(*(split(t) for t in m.qkv(x).chunk(3, -1)))))


def packed_by_split(m: Any, x: Tensor) -> Tensor:
    return m.o(join(sdpa(*(split(t) for t in m.qkv(x).split(D, dim=-1)))))


def packed_by_unbind(m: Any, x: Tensor) -> Tensor:
    qkv = m.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    return m.o(join(sdpa(*qkv.unbind(0))))


@pytest.mark.parametrize("forward", [packed_by_chunk, packed_by_split, packed_by_unbind])
def test_packed_qkv(forward: Callable[..., Tensor]) -> None:
    model = Net(forward, qkv=nn.Linear(D, 3 * D), o=nn.Linear(D, D))
    captured = assert_equals_masked(model, tokens(), layers="all")
    assert roles(captured) == {"qkv": "qkv", "o": "o"}


def test_cross_attention_with_packed_kv() -> None:
    def forward(m: Any, x: Tensor, memory: Tensor) -> Tensor:
        q, (k, v) = m.q(x), m.kv(memory).chunk(2, -1)
        return m.o(join((split(q) @ split(k).mT).softmax(-1) @ split(v)))

    model = Net(forward, **linears("qo", kv=nn.Linear(D, 2 * D)))
    captured = assert_equals_masked(model, tokens(2, 5), tokens(2, 9), layers="all")
    assert roles(captured) == {"q": "q", "kv": "kv", "o": "o"}


def test_cross_attention_of_two_layers_to_one_memory_is_merged_layer_by_layer() -> None:
    def forward(m: Any, x: Tensor, memory: Tensor) -> Tensor:
        x = x + m.o(join(sdpa(split(m.q(x)), split(m.k(memory)), split(m.v(memory)))))
        return x + m.p(join(sdpa(split(m.r(x)), split(m.s(memory)), split(m.t(memory)))))

    captured = assert_equals_masked(Net(forward, **linears("qkvorstp")), tokens(), tokens(), layers="all")
    together = sorted("".join(linear.name[0] for linear in group.linears) for group in captured.groups)
    assert together == ["kv", "o", "p", "q", "r", "st"]


def test_grouped_queries() -> None:
    """k and v are narrower than q: merged all the same, and split again by their own widths."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, 32)).transpose(1, 2) for t in (m.q(x), m.k(x), m.v(x)))
        return m.o(join(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))

    widths = {"q": nn.Linear(D, 128), "k": nn.Linear(D, 64), "v": nn.Linear(D, 64), "o": nn.Linear(128, D)}
    captured = assert_equals_masked(Net(forward, **widths), tokens(), layers="all")
    assert roles(captured) == QKVO and len(captured.groups) == 2


def test_gated_output() -> None:
    """The gate of attention's output is no projection that attention reads: dense. o is found behind the product."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(join(sdpa(split(m.q(x)), split(m.k(x)), split(m.v(x)))) * m.gate(x).sigmoid())

    captured = assert_equals_masked(Net(forward, **linears("qkvo", gate=nn.Linear(D, D))), tokens(), layers="all")
    assert roles(captured) == QKVO


def test_gate_that_comes_out_of_the_query_projection() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, gate = m.q(x).chunk(2, -1)
        return m.o(join(sdpa(split(q), split(m.k(x)), split(m.v(x)))) * gate.sigmoid())

    captured = assert_equals_masked(Net(forward, **linears("kvo", q=nn.Linear(D, 2 * D))), tokens(), layers="all")
    assert roles(captured) == QKVO


def test_latent_projections_are_left_alone() -> None:
    """MLA: what attention reads comes from a second projection; the first ones stay dense."""

    def forward(m: Any, x: Tensor) -> Tensor:
        latent = m.norm(m.a(x))
        return m.o(join(sdpa(split(m.q(x)), split(m.k(latent)), split(m.v(latent)))))

    captured = assert_equals_masked(Net(forward, **linears("aqkvo", norm=nn.RMSNorm(D))), tokens(), layers="all")
    assert roles(captured) == QKVO
    assert captured.merged == [["q.weight"], ["k.weight", "v.weight"], ["o.weight"]]


def test_flex_attention() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(join(flex_attention(split(m.q(x)), split(m.k(x)), split(m.v(x)))))

    with torch.no_grad():  # it has no backward on a CPU
        captured = capture(Net(forward, **linears("qkvo")), tokens(), layers="all")
    assert roles(captured) == QKVO


# --------------------------------------------------------------------------------------------------------- whole models


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(D), nn.LayerNorm(D), ffn(F.gelu)
        self.attn = Net(lambda m, x: m.o(join(sdpa(split(m.q(x)), split(m.k(x)), split(m.v(x))))), **linears("qkvo"))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(128, D), nn.LayerNorm(D), nn.Linear(D, 128, bias=False)
        self.layers = nn.ModuleList([Block(), Block()])
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


IDS = torch.arange(12).view(2, 6) * 7 % 128
MLPS = {f"layers.{i}.mlp.{role}": role for i in (0, 1) for role in ("up", "down")}
ATTENTIONS = {f"layers.{i}.attn.{role}": role for i in (0, 1) for role in "qkvo"}


def test_transformer_under_all() -> None:
    captured = assert_equals_masked(Model(), IDS, layers="all")
    assert roles(captured) == MLPS | ATTENTIONS
    assert reasons(captured)["head"] == "neither feed-forward nor an attention projection"


def test_transformer_under_ffn_keeps_attention_and_head_dense() -> None:
    captured = assert_equals_masked(Model(), IDS)
    assert roles(captured) == MLPS
    dense = {name: reason for name, reason in reasons(captured).items() if reason is not None}
    assert dense == dict.fromkeys([*ATTENTIONS, "head"], "not part of a feed-forward layer")


def test_every_linear_is_in_the_result_exactly_once() -> None:
    model = Model()
    captured = capture(model, IDS, layers="all")
    block = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
    in_order = [f"layers.{i}.{name}" for i in (0, 1) for name in block]
    assert [s.name for s in captured.linears] == [f"{name}.weight" for name in (*in_order, "head")]
    assert len(captured.linears) == sum(isinstance(module, nn.Linear) for module in model.modules())


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_encoder_layer(norm_first: bool) -> None:
    """Its attention is one node in Dynamo's graph, opened for its projections."""
    layer = nn.TransformerEncoderLayer(D, HEADS, 128, 0.0, activation="gelu", batch_first=True, norm_first=norm_first)
    captured = assert_equals_masked(layer, tokens(), layers="all")
    attention = {"self_attn.in_proj_weight": "qkv", "self_attn.out_proj": "o"}
    assert roles(captured) == {**attention, "linear1": "up", "linear2": "down"}
    assert captured.kinds == [None, None, "gelu", None]
    left = reasons(capture(layer, tokens()))
    assert {n for n, reason in left.items() if reason == "not part of a feed-forward layer"} == set(attention)


def around_attention(*args: Any, **kwargs: Any) -> Net:
    """A block whose attention is an nn.MultiheadAttention, called with these arguments after the input."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.norm(x)
        others = (h if isinstance(arg, str) else arg.to(h.dtype) for arg in args)  # "same"
        masks = {k: v.to(h.dtype) if isinstance(v, Tensor) and v.dtype != torch.bool else v for k, v in kwargs.items()}
        y, scores = m.attn(h, *others, **masks)
        x = x + y
        return m.mlp(m.norm(x)) + (0 if scores is None else scores.mean())

    return Net(forward, norm=nn.LayerNorm(D), attn=nn.MultiheadAttention(D, HEADS, batch_first=True), mlp=ffn(F.relu))


BOOL = torch.ones(7, 7, dtype=torch.bool).triu(1)
PADDING = torch.arange(7) >= torch.tensor([[7], [5], [6]])
MASKS = {
    "none": {},
    "bool": {"attn_mask": BOOL},
    "float": {"attn_mask": torch.zeros(7, 7).masked_fill(BOOL, float("-inf"))},
    "per head": {"attn_mask": BOOL.repeat(3 * HEADS, 1, 1)},
    "causal": {"attn_mask": BOOL, "is_causal": True},
    "padding": {"key_padding_mask": PADDING},
    "both": {"key_padding_mask": PADDING, "attn_mask": BOOL},
    "causal and padding": {"key_padding_mask": PADDING, "attn_mask": BOOL, "is_causal": True},
}


@pytest.mark.parametrize("need_weights", [True, False, "each"])
@pytest.mark.parametrize("masks", MASKS)
def test_torchs_attention_under_masks(masks: str, need_weights: bool | str) -> None:
    each = need_weights == "each"
    options = {**MASKS[masks], "need_weights": bool(need_weights), "average_attn_weights": not each}
    captured = assert_equals_masked(around_attention("same", "same", **options), tokens(3, 7), layers="all")
    assert roles(captured) == {
        "attn.in_proj_weight": "qkv",
        "attn.out_proj": "o",
        "mlp.up": "up",
        "mlp.down": "down",
    }


def test_torchs_cross_attention_has_one_input_projection_for_two_inputs() -> None:
    memory = tokens(3, 5)
    captured = assert_equals_masked(around_attention(memory, memory), tokens(3, 7), layers="all")
    assert roles(captured) == {"attn.out_proj": "o", "mlp.up": "up", "mlp.down": "down"}
    assert reasons(captured)["attn.in_proj_weight"] == "it is cut or moved before it is multiplied, need it whole"
    assert [s.name for s in captured.linears].count("attn.in_proj_weight") == 1


def test_torchs_attention_of_other_forms_stays_closed() -> None:
    """Three different inputs: no projection can be taken out; each weight has its reason."""
    captured = assert_equals_masked(around_attention(tokens(3, 5), tokens(3, 5)), tokens(3, 7), layers="all")
    assert roles(captured) == {"mlp.up": "up", "mlp.down": "down"}
    assert {"attn.in_proj_weight", "attn.out_proj"} < reasons(captured).keys()


def test_torchs_attention_draws_the_dropout_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(D, HEADS, 128, dropout=0.25, batch_first=True)
    assert_equals_masked(layer, tokens(), layers="all")


def test_torchs_attention_without_a_batch_stays_closed() -> None:
    captured = assert_equals_masked(around_attention("same", "same"), tokens(7), layers="all")
    assert roles(captured) == {"mlp.up": "up", "mlp.down": "down"}


# --------------------------------------------------------------------------------------- what only looks like attention


def test_head_right_behind_attention_is_no_output_projection() -> None:
    """A block whose attention has no o: what follows the residual is the head."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x + join(sdpa(split(m.q(x)), split(m.k(x)), split(m.v(x))))
        return m.head(m.norm(x))

    model = Net(forward, **linears("qkv", norm=nn.LayerNorm(D), head=nn.Linear(D, 128)))
    assert roles(capture(model, tokens(), layers="all")) == {"q": "q", "k": "k", "v": "v"}


def test_pooling_by_attention_takes_no_layer_of_the_residual_stream() -> None:
    """The pooling reads the stream without projections: the embedding that wrote into it is none."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        x = x + m.mlp(m.norm(x))
        return (m.query @ x.mT).softmax(-1) @ x

    query = nn.Parameter(torch.randn(1, D))
    model = Net(forward, embed=nn.Linear(D, D), mlp=ffn(F.gelu), norm=nn.LayerNorm(D), query=query)
    assert roles(capture(model, tokens(), layers="all")) == {"mlp.up": "up", "mlp.down": "down"}


def route_to_two(logits: Tensor, outputs: Tensor) -> Tensor:
    weights, index = logits.softmax(-1).topk(2, -1)
    chosen = outputs.gather(-2, index[..., None].expand(*index.shape, D))
    return (weights[..., None] * chosen).sum(-2)


def route_to_two_by_matmul(logits: Tensor, outputs: Tensor) -> Tensor:
    weights, index = logits.topk(2, -1)
    chosen = outputs.gather(-2, index[..., None].expand(*index.shape, D))
    return (weights.softmax(-1).unsqueeze(-2) @ chosen).squeeze(-2)


def route_to_all(logits: Tensor, outputs: Tensor) -> Tensor:
    return torch.einsum("bte,bted->btd", F.softmax(logits, -1), outputs)


@pytest.mark.parametrize("route", [route_to_two, route_to_two_by_matmul, route_to_all])
def test_router_of_experts_is_no_attention(route: Callable[..., Tensor]) -> None:
    """64 experts, so that nothing but its role keeps the router dense. They share a layer here, to stay small."""

    def forward(m: Any, x: Tensor) -> Tensor:
        outputs = m.expert(x[..., None, :] + m.offsets)
        return route(m.router(x), outputs)

    model = Net(forward, router=nn.Linear(D, 64), expert=ffn(F.gelu), offsets=nn.Parameter(torch.randn(64, D)))
    captured = assert_equals_masked(model, tokens(2, 3), layers="all")
    assert roles(captured) == {"expert.up": "up", "expert.down": "down"}
    assert reasons(captured)["router"] == "neither feed-forward nor an attention projection"
