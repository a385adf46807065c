"""Find every linear layer of a graph, what it is for, and why it stays dense where it does."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from . import graph as g
from .graph import LinearArgs, Region
from .parallel import from_local, is_dtensor, whole

TILE = 64
_FFN = ("up", "gate", "down", "experts")
_ATTENTION = ("q", "k", "v", "kv", "qkv", "o")
_PROJECTIONS = {1: ("qkv",), 2: ("q", "kv"), 3: ("q", "k", "v")}


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer of a graph.

    name: the weight's name. weight: the whole graph's placeholder it comes in by. path, node: where it stands
    (`Region`). role: up, gate, down; experts (a stack of them); q, k, v (kv, qkv where they are one), o; linear for any
    other. x: its input's
    node, so that linears of one path, x and family may become one matmul. tokens: rows of its input, as far as known
    when compiled. dtype: what it computes in (autocast included). reason: None, or why it stays dense. wanted: the
    recipe asks for it, so that a reason is worth a warning. wgrad: how `rewrite` takes its weight gradient. bias:
    whether it has one.
    """

    name: str
    weight: str
    path: tuple[str, ...]
    node: str
    x: str
    role: str
    in_features: int
    out_features: int
    tokens: int
    dtype: torch.dtype
    transposed: bool
    reason: str | None = None
    wanted: bool = False
    wgrad: str = "mvue"
    bias: bool = False


def find_linears(
    gm: GraphModule,
    *,
    layers: str | Sequence[str] = "ffn",
    skip: Sequence[str] = (),
    ineligible: Callable[[str], str | None] = lambda placeholder: None,
) -> list[Linear]:
    """Every linear of a Dynamo graph, in order, the ones to make sparse with reason None.

    layers: "ffn", "all" (feed-forward and attention projections) or patterns of parameter names; skip: patterns.
    ineligible: says of a placeholder of the whole graph why its weight cannot be sparse, None where it can.
    """
    everything = g.regions(gm)
    uses = _uses(everything)
    found: list[Linear] = []
    for region in everything:
        linears = {n: args for n in region.module.graph.nodes if (args := g.linear_args(n)) is not None}
        roles = _roles(linears, region)
        for node, args in linears.items():
            linear, weight = _describe(node, args, region, roles.get(node, "linear"))
            reason = _unwanted(linear, layers, skip)
            wanted = reason is None
            if weight is None:
                if g.origin(args.weight) is not None:
                    continue  # a piece of a parameter: `_hidden` lists the parameter, once
                reason = reason or "its weight is computed, not a parameter"
            else:
                unfit = _unplaced(args) or _unfit(linear, uses[weight])
                if unfit and whole(args.weight) is not args.weight:
                    unfit += " on each rank"
                reason = reason or unfit or ineligible(weight.name)
            found.append(replace(linear, reason=reason, wanted=wanted))
        found += _hidden(region, roles, {linear.weight for linear in found}, layers, skip)
    return found


def _hidden(
    region: Region, roles: dict[Node, str], known: set[str], layers: str | Sequence[str], skip: Sequence[str]
) -> list[Linear]:
    """Parameters that are not the weight of one linear: stacks of experts, weights cut in pieces, opaque attention.

    None can be sparse; each is listed, so that its reason can be read.
    """
    found: list[Linear] = []
    for node in region.module.graph.nodes:
        source, example = region.source(node), g.value(node)
        if source is None or example is None or example.dim() < 2 or source.name in known:
            continue
        product = g.product_of(node) if g.is_parameter(source) else None
        if product is None:
            continue
        role, reason = roles.get(product, "linear"), f"{g.op_name(product)} multiplies it, need a linear layer"
        if example.dim() > 2:  # experts: part of a feed-forward layer, as far as one can tell
            stack = " x ".join(str(size) for size in example.shape[:-2])
            role, reason = (
                "experts",
                f"it is a stack of {stack} matrices (experts), need one matrix for each linear layer",
            )
        elif g.linear_args(product) is not None:
            reason = "it is cut or moved before it is multiplied, need it whole"
        linear = Linear(
            name=g.source_name(source),
            weight=source.name,
            path=region.path,
            node=product.name,
            x="",
            role=role,
            in_features=int(example.shape[-1]),
            out_features=int(example.shape[-2]),
            tokens=0,
            dtype=example.dtype,
            transposed=False,
        )
        unwanted = _unwanted(linear, layers, skip)
        found.append(replace(linear, reason=unwanted or reason, wanted=unwanted is None))
    return found


def _describe(node: Node, args: LinearArgs, region: Region, role: str) -> tuple[Linear, Node | None]:
    weight = region.source(whole(args.weight))
    example, out = g.value(args.weight), g.value(node)
    shape = tuple(example.shape) if example is not None and example.dim() == 2 else (0, 0)
    if args.transposed:
        shape = shape[::-1]
    linear = Linear(
        name=g.source_name(weight) if weight is not None else args.weight.name,
        weight=weight.name if weight is not None else "",
        path=region.path,
        node=node.name,
        x=args.x.name,
        role=role,
        in_features=shape[1],
        out_features=shape[0],
        tokens=_tokens(out),
        dtype=out.dtype if out is not None else torch.float32,
        transposed=args.transposed,
        bias=args.bias is not None,
    )
    return linear, weight


def _tokens(out: torch.Tensor | None) -> int:
    """Rows of a linear's output; where they are dynamic, those of the call that is compiled for."""
    if out is None or not out.dim():
        return 0
    return math.prod(
        getattr(s.node, "hint", None) or 1 if isinstance(s, torch.SymInt) else int(s) for s in out.shape[:-1]
    )


def _uses(everything: list[Region]) -> dict[Node, int]:
    """How often each placeholder of the whole graph is used, checkpoint bodies looked into."""
    uses: dict[Node, int] = {}
    walked = {region.call for region in everything}
    for region in everything:
        for node in region.module.graph.nodes:
            source = region.source(node)
            if source is not None:
                uses[source] = uses.get(source, 0) + sum(
                    sum(arg is node for arg in user.args) or 1
                    for user in node.users
                    if user not in walked and user.target is not from_local
                )
    return uses


# -------------------------------------------------------------------------------------------------------------- reasons


def _unwanted(linear: Linear, layers: str | Sequence[str], skip: Sequence[str]) -> str | None:
    if any(fnmatchcase(linear.name, pattern) for pattern in skip):
        return "skip names it"
    if layers == "ffn":
        return None if linear.role in _FFN else "not part of a feed-forward layer"
    if layers == "all":
        return None if linear.role in _FFN + _ATTENTION else "neither feed-forward nor an attention projection"
    return None if any(fnmatchcase(linear.name, pattern) for pattern in layers) else "layers does not name it"


def _unplaced(args: LinearArgs) -> str | None:
    """Why a linear is still one of DTensors: `parallel.localize` takes those that a rank can compute by itself."""
    x, weight = g.value(args.x), g.value(args.weight)
    if not is_dtensor(weight):
        return None
    return (
        f"it is a DTensor placed as {_placements(weight)} with an input placed as {_placements(x)}, need them as "
        "ColwiseParallel or RowwiseParallel place them, with as much on each rank"
    )


def _placements(x: Any) -> str:
    return " ".join(str(placement) for placement in getattr(x, "placements", ("a plain tensor",)))


def _unfit(linear: Linear, uses: int) -> str | None:
    if uses > 1:
        return f"its weight is used {uses} times (tied or shared)"
    for what, size in (("in_features", linear.in_features), ("out_features", linear.out_features)):
        if size % TILE or not size:
            return f"it has {what}={size}, need a multiple of {TILE}"
    if linear.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in {str(linear.dtype).removeprefix('torch.')}, need float32, bfloat16 or float16"
    return None


# ---------------------------------------------------------------------------------------------------------------- roles


def _roles(linears: dict[Node, LinearArgs], region: Region) -> dict[Node, str]:
    roles: dict[Node, str] = {}
    for down in linears:
        ups = _feeding(down, linears, region)
        if ups:
            roles.setdefault(down, "down")
            for up in ups:
                roles[up] = "gate" if len(ups) > 1 and not _is_factor(up) else "up"
    for node in region.module.graph.nodes:
        if g.is_attention_core(node):
            outs = {n for n in g.walk_forward(node, partial(_is_residual, region=region)) if n in linears}
            found = [n for n in g.walk_back(node) if n in linears and n not in roles and _leads_to(n, outs)]
            projections = _in_order(found, region)
            names = _PROJECTIONS.get(len(projections), ("q",) * len(projections))
            roles.update(zip(projections, names, strict=True))
            for n in outs:
                roles.setdefault(n, "o")
    return roles


def _is_residual(node: Node, region: Region) -> bool:
    """A sum of two things that are both computed: behind it stands the next layer or a head, no output projection."""
    inputs = g.tensor_inputs(node)
    return g.op_name(node) == "add" and len(inputs) > 1 and not any(_is_constant(n, region) for n in inputs)


def _leads_to(projection: Node, outs: set[Node]) -> bool:
    """Whether a linear feeds attention alone: beside it at most the output projections, as a gate of their input.

    One that feeds other layers as well wrote the residual stream, which attention reads without a projection.
    """
    return all(n in outs for n in g.walk_forward(projection, g.is_attention_core) if g.linear_args(n))


def _in_order(nodes: list[Node], region: Region) -> list[Node]:
    position = {n: i for i, n in enumerate(region.module.graph.nodes)}
    return sorted(nodes, key=position.__getitem__)


def _feeding(down: Node, linears: dict[Node, LinearArgs], region: Region) -> list[Node]:
    """The linears whose outputs reach `down` through an activation alone: its up projection, or gate and up.

    The activation is any elementwise region, with casts, reshapes and dropout in between; constants, parameters and
    buffers may enter. It must not be affine, all its linears share one input, and `down` must lead back to that input's
    width (a classifier behind a tanh does not).
    """
    sources: list[Node] = []
    data, nonlinear = _trace(linears[down].x, linears, region, sources, {})
    if data is not True or not nonlinear or not sources:
        return []
    inputs = {linears[up].x for up in sources}
    if len(inputs) != 1 or down in sources:
        return []
    width = _features(linears[sources[0]].weight, linears[sources[0]].transposed)
    out = _features(linears[down].weight, linears[down].transposed)
    return sources if width and out and width[1] == out[0] else []


def _features(weight: Node, transposed: bool) -> tuple[int, int] | None:
    example = g.value(weight)
    if example is None or example.dim() != 2:
        return None
    out, in_ = example.shape[::-1] if transposed else example.shape
    return out, in_


def _trace(
    node: Node,
    linears: dict[Node, LinearArgs],
    region: Region,
    sources: list[Node],
    seen: dict[Node, tuple[bool | None, bool]],
) -> tuple[bool | None, bool]:
    """(True: depends on linears alone, False: a constant, None: on something else;  whether not affine on the way)."""
    if node in seen:
        return seen[node]
    seen[node] = (None, False)
    if node in linears:
        sources.append(node)
        result: tuple[bool | None, bool] = (True, False)
    elif node.op == "get_attr" or _is_constant(node, region) or g.is_creation(node):
        result = (False, False)
    elif g.is_shape(node) or g.is_pointwise(node):
        inputs = [_trace(n, linears, region, sources, seen) for n in g.tensor_inputs(node)]
        kinds = [kind for kind, _ in inputs]
        if not inputs or None in kinds:
            result = (None, False)
        else:
            data = [n for n, kind in zip(g.tensor_inputs(node), kinds, strict=True) if kind]
            times = sum(arg in data for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, Node))  # h * h: 2
            affine = g.is_shape(node) or g.is_affine(node, times)
            result = (any(kinds), any(nonlinear for _, nonlinear in inputs) or (any(kinds) and not affine))
    else:
        result = (None, False)
    seen[node] = result
    return result


def _is_constant(node: Node, region: Region) -> bool:
    """A parameter or buffer: Dynamo marks their placeholders as static inputs."""
    source = region.source(node)
    return source is not None and "_dynamo_static_input_type" in source.meta.get("tensor_dict", {})


def _is_factor(up: Node) -> bool:
    """Whether the first thing done with a projection's output is to multiply it by another: the "up" of gate and up."""
    node = up
    while len(node.users) == 1:
        node = next(iter(node.users))
        if g.mul_operands(node) is not None:
            return True
        if not g.is_shape(node):
            return False
    return False
