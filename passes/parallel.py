"""Tensor parallelism: a linear on DTensors becomes the linear that each rank computes on what it holds.

    y = linear(x, w)        x, w, y DTensors, as ColwiseParallel and RowwiseParallel make them

becomes

    y = from_local(linear(to_local(x), to_local(w)), ...)

and what is wrapped only to be unwrapped again falls away. The passes behind it then see plain tensors of the shapes
that this rank computes with. The graph computes the same as before; collectives stay where they were, save that
projections of one input share the all-reduce of its gradient.
"""

import math
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import graph as g

#: Placements as a graph's arguments: the dimension that is sharded, "R" for replicated, "P" for a partial sum.
Placed = tuple[int | str, ...]


def is_dtensor(x: object) -> bool:
    """Whether x is a DTensor; does not import torch.distributed.tensor for what is none."""
    if not is_traceable_wrapper_subclass(x):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def to_local(x: Any, placed: Placed, grads: Placed) -> Tensor:
    """What this rank holds of a DTensor that is placed so; its gradient is placed as `grads`.

    Where a replicated x is asked for as a partial sum ("P"), each rank gets its share, and takes the whole's gradient.
    """
    local: Tensor = x.to_local(grad_placements=_placements(grads))
    shares = [x.device_mesh.size(i) for i, p in enumerate(placed) if p == "P" and x.placements[i].is_replicate()]
    if shares:
        local = local.detach() / math.prod(shares) + (local - local.detach())
    return local


def from_local(y: Tensor, weight: Any, placed: Placed) -> Any:
    """The DTensor, on the mesh of `weight`, of which every rank holds a y."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(y, weight.device_mesh, _placements(placed), run_check=False)


def placed_as(x: Any) -> Placed | None:
    """The placements of a DTensor in the form above, None where they have none."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    found: list[int | str] = []
    for placement in x.placements:
        if type(placement) is Shard:
            found.append(placement.dim)
        elif isinstance(placement, Replicate):
            found.append("R")
        elif placement == Partial():
            found.append("P")
        else:
            return None
    return tuple(found)


def _placements(placed: Placed) -> tuple[Any, ...]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    return tuple(Shard(p) if isinstance(p, int) else {"R": Replicate(), "P": Partial()}[p] for p in placed)


def whole(weight: Node) -> Node:
    """The DTensor that a weight is this rank's part of; the node itself where it is no part."""
    source = weight.args[0] if weight.op == "call_function" and weight.target is to_local else weight
    assert isinstance(source, Node)
    return source


def localize(gm: GraphModule) -> None:
    """Rewrite the linears of one graph that all ranks can compute on what they hold, in place."""
    same: dict[Any, Node] = {}
    for node in list(gm.graph.nodes):
        args = g.linear_args(node)
        if args is not None and not args.transposed:
            _localize(node, args, same)
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and (_is_wrap(node) or _is_unwrap(node) or g.op_name(node) == "redistribute"):
            gm.graph.erase_node(node)


def _localize(node: Node, args: g.LinearArgs, same: dict[Any, Node]) -> None:
    values = [g.value(n) for n in (args.x, args.weight, node)]
    if not all(is_dtensor(v) for v in values):
        return
    x, w, y = (placed_as(v) for v in values)
    if x is None or w is None or y is None or not _evenly(values[1]):
        return
    rules = [_rule(*each, values[0].dim() - 1) for each in zip(x, w, y, strict=True)]  # type: ignore[union-attr]
    if None in rules:
        return
    grads, bias, bias_grads = (tuple(rule[i] for rule in rules if rule is not None) for i in range(3))
    if args.bias is not None and placed_as(g.value(args.bias)) not in (bias, bias_grads):
        return
    graph = node.graph
    local_x = _local_x(_first(args.x, same), x, grads, same)
    with graph.inserting_before(_after_inputs(graph) if args.weight.op == "placeholder" else node):
        local_w = graph.call_function(to_local, (args.weight, w, w))
    with graph.inserting_before(node):
        parts = [local_x, local_w]
        if args.bias is not None:
            parts.append(graph.call_function(to_local, (args.bias, bias, bias_grads)))
        local_y = graph.call_function(node.target, tuple(parts))  # type: ignore[arg-type]
        wrapped = graph.call_function(from_local, (local_y, args.weight, y))
    local_w.meta["example_value"] = values[1]._local_tensor  # type: ignore[union-attr]
    for new, value in ((local_y, values[2]._local_tensor), (wrapped, values[2])):  # type: ignore[union-attr]
        new.meta.update({**node.meta, "example_value": value})
    node.replace_all_uses_with(wrapped)
    graph.erase_node(node)
    _unwrap(wrapped, wrapped, local_y, y)


def _after_inputs(graph: Graph) -> Node:
    """Where a weight is unwrapped: linears that become one matmul stand where the first of them stood."""
    return next(n for n in graph.nodes if n.op != "placeholder")


def _rule(x: int | str, w: int | str, y: int | str, last: int) -> tuple[int | str, int | str, int | str] | None:
    """(placement of the gradient of x, of the bias, of its gradient) on one dimension of the mesh; None where a rank
    cannot compute its part of y by itself.
    """
    known: dict[tuple[int | str, ...], tuple[int | str, int | str, int | str]] = {
        ("R", 0, last): ("P", 0, 0),  # ColwiseParallel
        (last, 1, "P"): (last, "P", "R"),  # RowwiseParallel: each rank adds its share of the bias
        ("R", "R", "R"): ("R", "R", "R"),
    }
    return known.get((x, w, y))


def _evenly(w: Any) -> bool:
    """Whether each rank holds as much of a weight."""
    sizes = list(w.shape)
    for dim, placement in enumerate(w.placements):
        if placement.is_shard():
            ranks = w.device_mesh.size(dim)
            if sizes[placement.dim] % ranks:
                return False
            sizes[placement.dim] //= ranks
    return True


def _is_wrap(node: Node) -> bool:
    """A plain tensor becomes a DTensor."""
    return node.op == "call_function" and g.op_name(node) == "from_local"


def _is_unwrap(node: Node) -> bool:
    return g.op_name(node) == "to_local"


def _options(node: Node) -> dict[str, Any]:
    """Keyword arguments of a node on DTensors; before torch 2.13 Dynamo hides them in the closure of what it calls."""
    cells = [cell.cell_contents for cell in getattr(node.target, "__closure__", None) or ()]
    return {**node.kwargs, **{k: v for cell in cells if isinstance(cell, dict) for k, v in cell.items()}}


def _first(x: Node, same: dict[Any, Node]) -> Node:
    """The first node that wraps or redistributes the same tensor in the same way."""
    value, name = g.value(x), g.op_name(x)
    if not is_dtensor(value) or name not in ("from_local", "redistribute") or not isinstance(x.args[0], Node):
        return x
    others = {k: str(v) for k, v in _options(x).items() if not isinstance(v, Node)}
    key = (name, _first(x.args[0], same), value.placements, value.device_mesh, str(others))  # type: ignore[union-attr]
    return same.setdefault(key, x)


def _local_x(x: Node, placed: Placed, grads: Placed, same: dict[Any, Node]) -> Node:
    """This rank's part of x: what was wrapped, where the gradient needs no collective on its way back."""
    value, source = g.value(x), x.args[0] if x.args else None
    if _is_wrap(x) and isinstance(source, Node) and grads == placed and _options(x).get("grad_placements") is None:
        return source
    key = ("to_local", x, grads)
    if key not in same:
        with x.graph.inserting_before(_after_inputs(x.graph) if x.op == "placeholder" else x.next):
            same[key] = x.graph.call_function(to_local, (x, placed, grads))
        same[key].meta["example_value"] = value._local_tensor  # type: ignore[union-attr]
    return same[key]


def _unwrap(wrapped: Node, node: Node, local: Node, placed: Placed) -> None:
    """Let what takes this rank's part of `wrapped` take `local`; redistributing to where it is placed does nothing."""
    if "P" in placed:
        return
    for user in list(node.users):
        value = g.value(user)
        if g.op_name(user) == "redistribute" and is_dtensor(value) and placed_as(value) == placed:
            _unwrap(wrapped, user, local, placed)
        elif user.target is to_local:  # of another linear, which was localized before this one
            if user.args[1] == placed == user.args[2]:
                user.replace_all_uses_with(local)
        elif _is_unwrap(user) and _options(user).get("grad_placements") is None:
            user.replace_all_uses_with(local)
