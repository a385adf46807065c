"""Recognise the activations that have a fused kernel. Any other elementwise region stays as it is, between sparse
linears.
"""

from dataclasses import dataclass

from torch.fx import Node

from .graph import is_view, linear_args, mul_operands, op_name, value

_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
GATED_KINDS = frozenset(_GATED.values())


@dataclass(frozen=True, slots=True)
class Fused:
    """linear(s) and activation in one op.

    linears: the up projection, or gate and up in this order. output: the node whose value the op computes, where the
    op's result has the shape of the linear's; an ungated activation behind a reshape commutes with it.
    """

    kind: str
    linears: tuple[Node, ...]
    output: Node


def _unary(node: Node) -> tuple[str, Node] | None:
    """(activation, its input) of silu, gelu, gelu_tanh, relu; None for anything else."""
    name = op_name(node)
    if name not in ("silu", "gelu", "relu") or not node.args or not isinstance(node.args[0], Node):
        return None
    extra = dict(node.kwargs)
    extra.pop("inplace", None)
    approximate = extra.pop("approximate", "none")
    positional = node.args[1:]
    if name == "gelu" and approximate == "tanh":
        name = "gelu_tanh"
    if extra or (name.startswith("gelu") and positional):
        return None
    return name, node.args[0]


def _alike(gate: Node, up: Node) -> bool:
    """Whether two linears may become one: one input and dtype, one way of storing the weight, both or no bias."""
    a, b = linear_args(gate), linear_args(up)
    gate_out, up_out = value(gate), value(up)
    return (
        a is not None
        and b is not None
        and a.x is b.x
        and a.transposed == b.transposed
        and (a.bias is None) == (b.bias is None)
        and (gate_out is None or up_out is None or gate_out.dtype == up_out.dtype)
    )


def _fusable(node: Node) -> bool:
    """Whether the fused op can take in a node: a linear used once, its bias a vector (addmm may add a matrix)."""
    args = linear_args(node)
    if args is None or not _single(node):
        return False
    bias = None if args.bias is None else value(args.bias)
    return args.bias is None or (bias is not None and bias.dim() == 1)


def _single(node: Node) -> bool:
    return len(node.users) == 1


def match(node: Node) -> Fused | None:
    """The fused form that ends at `node`, if its linears are used for nothing else.

    A larger form ends later than the one it takes in: through a graph in order, the last match of a linear counts.
    """
    operands = mul_operands(node)
    if operands is not None and operands[0] is not operands[1]:
        for gate, up in (operands, operands[::-1]):
            unary = _unary(gate)
            if unary is None or not _single(gate):
                continue
            gate_in = unary[1]
            if _fusable(gate_in) and _fusable(up):
                return Fused(_GATED[unary[0]], (gate_in, up), node) if _alike(gate_in, up) else None
            packed = _chunked_linear(gate_in, up)
            if packed is not None:
                return Fused(_GATED[unary[0]], (packed,), node)
        return None
    if op_name(node) in ("square", "pow") and node.args and isinstance(node.args[0], Node):
        exponent = node.args[1] if len(node.args) > 1 else node.kwargs.get("exponent", 2)
        inner = _unary(node.args[0])
        if exponent == 2 and inner is not None and inner[0] == "relu" and _single(node.args[0]):
            return _ungated("relu2", inner[1], node)
        return None
    unary = _unary(node)
    return _ungated(unary[0], unary[1], node) if unary is not None else None


def _ungated(kind: str, source: Node, output: Node) -> Fused | None:
    while is_view(source) and _single(source) and isinstance(source.args[0], Node):
        source = source.args[0]
    return Fused(kind, (source,), output) if _fusable(source) else None


def _chunked_linear(first: Node, second: Node) -> Node | None:
    """The linear whose result is split in two equal halves along its features, `first` being the first half."""
    if op_name(first) != "getitem" or op_name(second) != "getitem" or not (_single(first) and _single(second)):
        return None
    chunk = first.args[0]
    if chunk is not second.args[0] or (first.args[1], second.args[1]) != (0, 1) or not isinstance(chunk, Node):
        return None
    source = chunk.args[0]
    if op_name(chunk) != "chunk" or len(chunk.users) != 2 or not isinstance(source, Node):
        return None
    pieces = chunk.args[1] if len(chunk.args) > 1 else chunk.kwargs.get("chunks")
    dim = chunk.args[2] if len(chunk.args) > 2 else chunk.kwargs.get("dim", 0)
    example = source.meta.get("example_value")
    if pieces != 2 or example is None or dim not in (-1, example.dim() - 1):
        return None
    return source if _fusable(source) and example.shape[-1] % 2 == 0 else None
