"""Rewrite what hides a layer from `find`: DTensors, attention as one opaque node, in-place activations, repeated views.

The graph computes the same as before, operation for operation.
"""

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from . import graph as g
from .parallel import localize

_INTEGERS = (int, torch.SymInt, torch.Size)


def tidy(gm: GraphModule) -> GraphModule:
    """Tidy a graph and the bodies of its activation checkpoints, in place; returns it."""
    for region in g.regions(gm):
        graph = region.module.graph
        localize(region.module)
        for node in list(graph.nodes):
            _thread_in_place(node)
            _open_attention(node)
        _merge_views(region.module)
        graph.lint()
        region.module.recompile()
    return gm


# ---------------------------------------------------------------------------------------------------- in-place results


def _thread_in_place(node: Node) -> None:
    """Let what is computed after `F.relu_(h)` from h be computed from its result, which is the same tensor."""
    if node.op not in ("call_function", "call_method") or not node.args or not g.is_pointwise(node):
        return
    source, name = node.args[0], getattr(node.target, "__name__", str(node.target))
    in_place = bool(node.kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__"))
    if not in_place or not isinstance(source, Node) or g.linear_args(source) is None:
        return
    later, at = set(), node.next
    while at.op != "root":
        later.add(at)
        at = at.next
    source.replace_all_uses_with(node, delete_user_cb=lambda user: user in later)


# ------------------------------------------------------------------------------------------------------- repeated views


def _merge_views(gm: GraphModule) -> None:
    """Linears that each reshape (or cast) the same tensor in the same way read one node."""
    seen: dict[Any, Node] = {}
    for node in list(gm.graph.nodes):
        number = isinstance(node.meta.get("example_value"), _INTEGERS) and node.op in ("call_function", "call_method")
        view = (g.is_view(node) or g.is_cast(node)) and all(_reads(user, node) for user in node.users)
        if not (number or view):
            continue
        key = (node.op, node.target, _hashable(node.args), _hashable(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node and _untouched(node):
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)


def _reads(user: Node, x: Node) -> bool:
    """Whether a node is a linear that takes x as its input and as nothing else."""
    args = g.linear_args(user)
    return args is not None and args.x is x and args.weight is not x and args.bias is not x


def _untouched(node: Node) -> bool:
    """Whether nothing is done in place to the tensor that is viewed: a copy made before and one after would differ."""
    return not any(
        name.endswith("_") and not name.endswith("__") or bool(user.kwargs.get("inplace"))
        for source in g.tensor_inputs(node)
        for user in source.users
        for name in [getattr(user.target, "__name__", str(user.target))]
    )


def _hashable(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _hashable(v)) for k, v in value.items())
    return (type(value), str(value)) if not isinstance(value, Node) else value


# ------------------------------------------------------------------------------------------------------------ attention

_ATTENTION = (
    "query", "key", "value", "embed_dim", "heads", "in_weight", "in_bias", "bias_k", "bias_v", "add_zero_attn",
    "dropout_p", "out_weight", "out_bias", "training", "key_padding_mask", "need_weights", "attn_mask",
    "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "static_k", "static_v",
    "average_attn_weights", "is_causal",
)  # fmt: skip
_RENAMED = {"embed_dim_to_check": "embed_dim", "num_heads": "heads", "in_proj_weight": "in_weight",
            "in_proj_bias": "in_bias", "out_proj_weight": "out_weight", "out_proj_bias": "out_bias"}  # fmt: skip
_DEFAULTS = {"training": True, "need_weights": True, "average_attn_weights": True, "use_separate_proj_weight": False}


def _open_attention(node: Node) -> None:
    """What nn.MultiheadAttention calls becomes linear, attention, linear.

    query [tokens, batch, width], key and value one tensor of the same width; other forms stay one node, and their
    projections dense. Where query and key differ the input projection is cut in two, and so is no layer of its own.
    """
    if node.op != "call_function" or node.target is not F.multi_head_attention_forward:
        return
    a: dict[str, Any] = {**_DEFAULTS, **dict(zip(_ATTENTION, node.args, strict=False))}
    a.update({_RENAMED.get(k, k): v for k, v in node.kwargs.items()})
    odd = ("bias_k", "bias_v", "add_zero_attn", "use_separate_proj_weight", "static_k", "static_v")
    query, key, example = a["query"], a["key"], node.meta.get("example_value")
    if any(a.get(name) not in (None, False) for name in odd) or key is not a["value"]:
        return
    if not isinstance(query, Node) or not isinstance(key, Node) or not isinstance(example, tuple | list):
        return
    of_query, of_key, out = g.value(query), g.value(key), example[0]
    if of_query is None or of_key is None or of_query.dim() != 3 or not isinstance(out, Tensor):
        return
    graph, width = node.graph, of_query.shape[-1]

    def call(target: Any, args: tuple[Any, ...], value: Any, **kwargs: Any) -> Node:
        new = graph.call_function(target, args, kwargs)
        new.meta.update({**node.meta, "example_value": value})
        return new

    def project(x: Node, like: Tensor, first: int, parts: int) -> list[Node]:
        weight, bias = a["in_weight"], a["in_bias"]
        if parts < 3:
            weight, bias = (
                None if t is None else call(torch.narrow, (t, 0, first * width, parts * width), _cut(t, parts * width))
                for t in (weight, bias)
            )
        one = out.new_empty(like.shape)
        y = call(F.linear, (x, weight, bias), out.new_empty((*like.shape[:-1], parts * width)))
        if parts == 1:
            return [y]
        pieces = call(torch.chunk, (y, parts, -1), (one,) * parts)
        return [call(operator.getitem, (pieces, i), one) for i in range(parts)]

    with graph.inserting_before(node):
        if query is key:
            q, k, v = project(query, of_query, 0, 3)
        else:
            (q,), (k, v) = project(query, of_query, 0, 1), project(key, of_key, 1, 2)
        core = call(
            multi_head_scaled_dot_product,
            (q, k, v),
            (out.new_empty(of_query.shape), example[1]),
            heads=a["heads"],
            dropout_p=a["dropout_p"] if a["training"] else 0.0,
            dtype=of_query.dtype,
            **{name: a.get(name) for name in ("key_padding_mask", "attn_mask")},
            **{name: bool(a.get(name)) for name in ("need_weights", "average_attn_weights", "is_causal")},
        )
        inner = call(operator.getitem, (core, 0), out.new_empty(of_query.shape))
        result = call(F.linear, (inner, a["out_weight"], a["out_bias"]), out)
        weights = call(operator.getitem, (core, 1), example[1])
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] in (0, 1):
            user.replace_all_uses_with(result if user.args[1] == 0 else weights)
            graph.erase_node(user)
    if node.users:  # the pair is handed on as it is
        with graph.inserting_before(node):
            pair = call(_pair, (result, weights), example)
        node.replace_all_uses_with(pair)
    if not weights.users:
        graph.erase_node(weights)
    graph.erase_node(node)


def _cut(node: Node, rows: int) -> Tensor | None:
    example = g.value(node)
    return None if example is None else example[:rows]


def _pair(a: Any, b: Any) -> tuple[Any, Any]:
    return a, b


def multi_head_scaled_dot_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: int,
    dropout_p: float,
    dtype: torch.dtype,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    need_weights: bool,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """What F.multi_head_attention_forward does between its projections, with its ops and its shapes.

    q [tokens, batch, width], k and v [source, batch, width] -> ([tokens, batch, width], attention weights or None).
    dtype: of what was projected, which masks take. key_padding_mask [batch, source], attn_mask [tokens, source] or
    [batch * heads, tokens, source]: bool (True: not looked at) or added to the scores.
    """
    (tokens, batch, width), source = q.shape, k.shape[0]
    head = width // heads
    q, k, v = (
        t.contiguous().view(t.shape[0], batch * heads, head).transpose(0, 1) for t in (q, k, v)
    )  # [batch * heads, tokens or source, head]
    padding = _as_scores(key_padding_mask, dtype)
    if is_causal and padding is None and not need_weights:
        attn_mask = None
    else:
        attn_mask = _as_scores(attn_mask, dtype)
        is_causal = is_causal and padding is None
    if attn_mask is not None and attn_mask.dim() == 2:
        attn_mask = attn_mask.unsqueeze(0)
    if padding is not None:
        padding = padding.view(batch, 1, 1, source).expand(-1, heads, -1, -1).reshape(batch * heads, 1, source)
        attn_mask = padding if attn_mask is None else attn_mask + padding
    if need_weights:
        scores, keys = q * math.sqrt(1.0 / float(head)), k.transpose(-2, -1)
        weights = torch.bmm(scores, keys) if attn_mask is None else torch.baddbmm(attn_mask, scores, keys)
        weights = F.softmax(weights, dim=-1)
        if dropout_p > 0.0:
            weights = F.dropout(weights, p=dropout_p)
        out = torch.bmm(weights, v).transpose(0, 1).reshape(tokens, batch, width)
        weights = weights.view(batch, heads, tokens, source)
        return out, weights.mean(dim=1) if average_attn_weights else weights
    if attn_mask is not None:
        one = attn_mask.size(0) == 1
        attn_mask = attn_mask.unsqueeze(0) if one else attn_mask.view(batch, heads, -1, source)
    q, k, v = (t.view(batch, heads, -1, head) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal)
    return out.permute(2, 0, 1, 3).contiguous().view(tokens, batch, width), None


def _as_scores(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask that is added to the scores."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
