"""Replace linears by sparse ops, merging those that share an input and fusing the activations that have a kernel."""

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ..kernels.linear import sparse_linear, sparse_linear_glu
from ..kernels.soft import soft_linear
from . import graph as g
from .activation import GATED_KINDS, Fused, match
from .find import Linear

#: Names of the placeholders that `rewrite` adds, after all others and in this order: SEEDS, then two for each group.
SEEDS = "sparse24_seeds"
_FAMILY = {"up": "ffn", "gate": "ffn", "q": "attention", "k": "attention", "v": "attention"}


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that became one matmul: their packed forms stand in one buffer, in this order."""

    linears: tuple[Linear, ...]
    kind: str | None  # of the fused activation

    @property
    def dtype(self) -> torch.dtype:
        return self.linears[0].dtype

    @property
    def wgrad(self) -> str:
        return self.linears[0].wgrad

    @property
    def transposed(self) -> bool:
        return self.linears[0].transposed


def groups_of(gm: GraphModule, linears: Sequence[Linear], recipe: str = "fst") -> list[Group]:
    """What `rewrite` would make one matmul of, in operand order."""
    return _group(gm, linears, recipe)[0]


def _group(gm: GraphModule, linears: Sequence[Linear], recipe: str) -> tuple[list[Group], dict[Node, Fused]]:
    by_path = {region.path: region for region in g.regions(gm)}
    fused: dict[Node, Fused] = {}
    for region in by_path.values() if recipe == "fst" else ():
        for node in region.module.graph.nodes:
            found = match(node)
            if found is not None:
                fused.update({n: found for n in found.linears})
    # a form is taken whole or not at all: all its linears are chosen, and take their weight gradient in one way
    wgrad = {by_path[s.path].node(s.node): s.wgrad for s in linears}
    fused = {n: form for n, form in fused.items() if len({wgrad.get(m) for m in form.linears}) == 1}
    groups: list[Group] = []
    for members in _merge(linears, lambda s: fused.get(by_path[s.path].node(s.node))):
        region = by_path[members[0].path]
        nodes = [region.node(m.node) for m in members]
        form = fused.get(nodes[0])
        if form is not None and set(form.linears) == set(nodes):
            members = [members[nodes.index(n)] for n in form.linears]
            groups.append(Group(tuple(members), form.kind))
        else:
            groups.append(Group(tuple(members), None))
    return groups, fused


def rewrite(gm: GraphModule, linears: Sequence[Linear], recipe: str = "fst") -> list[Group]:
    """Make `linears` (of `find_linears` on the same graph) sparse, in place. Returns the groups, in operand order.

    The graph gets new last placeholders: SEEDS int64 [groups], and for each group its packed [F, K] and packed_t
    [K, F]; with recipe "s-ste" the dense S(W) [F, K] in place of the latter, and no activation is fused.
    """
    if not linears:
        return []
    by_path = {region.path: region for region in g.regions(gm)}
    groups, fused = _group(gm, linears, recipe)
    top = {SEEDS: g.add_placeholder(gm, SEEDS)}
    for i in range(len(groups)):
        for name in operand_names(i):
            top[name] = g.add_placeholder(gm, name)
    for i, group in enumerate(groups):
        region = by_path[group.linears[0].path]
        nodes = [region.node(m.node) for m in group.linears]
        inputs = [region.add_input(top, name) for name in (*operand_names(i), SEEDS)]
        if group.kind is not None:
            _replace_fused(fused[nodes[0]], nodes, inputs, i, group)
        else:
            _replace(nodes, inputs, i, group, sparse_linear if recipe == "fst" else soft_linear)
    for region in by_path.values():
        region.module.graph.lint()
        region.module.recompile()
    return groups


def operand_names(group: int) -> tuple[str, str]:
    """Placeholders of a group's packed and packed_t."""
    return f"sparse24_packed_{group}", f"sparse24_packed_t_{group}"


def _merge(linears: Sequence[Linear], form_of: Callable[[Linear], Fused | None]) -> list[list[Linear]]:
    """Linears of one layer that share an input come together: gate and up; q, k and v.

    Of several feed-forward layers on one input (experts that all see every token) each keeps its own fused activation;
    of several cross-attentions to one memory the n-th k goes with the n-th v.
    """
    merged: dict[object, list[Linear]] = {}
    seen: Counter[object] = Counter()
    for linear in linears:
        form = form_of(linear)
        if form is not None and (len(form.linears) > 1 or linear.role == "up"):
            merged.setdefault(form.output, []).append(linear)
            continue
        family = _FAMILY.get(linear.role, linear.node)
        key = (linear.path, linear.x, family, linear.dtype, linear.transposed, linear.wgrad)
        layer = seen[key, linear.role] if family == "attention" else 0
        seen[key, linear.role] += 1
        merged.setdefault((key, layer), []).append(linear)
    return list(merged.values())


def _cast(graph: torch.fx.Graph, node: Node, dtype: torch.dtype) -> Node:
    example = g.value(node)
    return node if example is not None and example.dtype == dtype else graph.call_method("to", (node, dtype))


def _arguments(nodes: list[Node]) -> list[g.LinearArgs]:
    args = [g.linear_args(n) for n in nodes]
    return [a for a in args if a is not None]


def _replace_fused(form: Fused, nodes: list[Node], inputs: list[Node], index: int, group: Group) -> None:
    """linear(s) -> bias -> activation become one `sparse_linear_glu`."""
    args, graph = _arguments(nodes), nodes[0].graph
    packed, packed_t, seeds = inputs
    gated = form.kind in GATED_KINDS
    position = {n: i for i, n in enumerate(graph.nodes)}
    with graph.inserting_before(max(nodes, key=position.__getitem__)):
        biases = tuple(a.bias for a in args if a.bias is not None)
        bias = graph.call_function(torch.cat, (biases,)) if len(biases) > 1 else args[0].bias
        call = graph.call_function(
            sparse_linear_glu,
            (
                _cast(graph, args[0].x, group.dtype),
                tuple(a.weight for a in args),
                packed,
                packed_t,
                seeds,
                index,
                group.wgrad,
                group.transposed,
                bias,
                form.kind,
            ),
        )
    _carry(call, form.output if gated else nodes[0])
    if gated:
        _hand_over(form.output, call, group.dtype)
        _erase([form.output, *nodes])
        return
    # ungated: the activation commutes with the reshapes between it and the linear, so the op takes the linear's place
    source = form.output.args[0]
    if form.kind == "relu2":
        assert isinstance(source, Node)
        source = source.args[0]
    assert isinstance(source, Node)
    _hand_over(form.output, source, group.dtype)
    nodes[0].replace_all_uses_with(call)
    _erase([form.output, nodes[0]])


def _hand_over(old: Node, new: Node, dtype: torch.dtype) -> None:
    """Let `new`, of `dtype`, stand for `old`: autocast may have made the activation wider (a power on CUDA is fp32)."""
    example = g.value(old)
    if example is not None and example.dtype != dtype:
        with old.graph.inserting_before(old):
            new = old.graph.call_method("to", (new, example.dtype))
        _carry(new, old)
    old.replace_all_uses_with(new)


def _replace(nodes: list[Node], inputs: list[Node], index: int, group: Group, op: Callable[..., object]) -> None:
    """One or several linears of one input become one `op`, its output split, biases added."""
    args, graph = _arguments(nodes), nodes[0].graph
    packed, packed_t, seeds = inputs
    position = {n: i for i, n in enumerate(graph.nodes)}
    with graph.inserting_before(min(nodes, key=position.__getitem__)):
        x = _cast(graph, args[0].x, group.dtype)
        weights = tuple(a.weight for a in args)
        call = graph.call_function(op, (x, weights, packed, packed_t, seeds, index, group.wgrad, group.transposed))
    _carry(call, nodes[0])
    if len(nodes) > 1:
        call.meta.pop("example_value", None)  # it has the width of one
    offset = 0
    for node, arg, linear in zip(nodes, args, group.linears, strict=True):
        with graph.inserting_before(node):
            y = call
            if len(nodes) > 1:
                y = graph.call_method("narrow", (call, -1, offset, linear.out_features))
            if arg.bias is not None:
                y = graph.call_function(operator.add, (y, _cast(graph, arg.bias, group.dtype)))
        _carry(y, node)
        node.replace_all_uses_with(y)
        offset += linear.out_features
    _erase(nodes)


def _carry(new: Node, old: Node) -> None:
    """Keep where in the user's code it came from."""
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "example_value"):
        if key in old.meta:
            new.meta.setdefault(key, old.meta[key])


def _erase(nodes: list[Node]) -> None:
    """Erase nodes without users, and what they alone used."""
    queue = list(nodes)
    while queue:
        node = queue.pop(0)
        if node.users or node.op in ("placeholder", "get_attr", "output") or node.graph is None or node._erased:
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        queue.extend(n for n in inputs if n.op in ("call_function", "call_method"))
