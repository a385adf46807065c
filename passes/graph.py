"""What the passes ask of a Dynamo graph: its regions, what a node is, where a placeholder comes from."""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch._library.fake_class_registry import FakeScriptObject
from torch.fx import GraphModule, Node

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


@dataclass(frozen=True, slots=True)
class Region:
    """A graph in which linears may stand: the whole one, or the body of an activation checkpoint inside it.

    path: the names of the checkpoint calls that lead to it; empty for the whole graph.
    """

    module: GraphModule
    path: tuple[str, ...] = ()
    call: Node | None = None
    parent: "Region | None" = None

    def node(self, name: str) -> Node:
        return next(n for n in self.module.graph.nodes if n.name == name)

    def outer(self, placeholder: Node) -> Node:
        """The node of the parent graph that comes in through a placeholder of this body."""
        assert self.call is not None
        placeholders = [n for n in self.module.graph.nodes if n.op == "placeholder"]
        outer = self.call.args[1 + placeholders.index(placeholder)]
        assert isinstance(outer, Node)
        return outer

    def source(self, node: Node) -> Node | None:
        """The placeholder of the whole graph that `node` is, or None where it is something computed."""
        if node.op != "placeholder":
            return None
        return node if self.parent is None else self.parent.source(self.outer(node))

    def add_input(self, top: dict[str, Node], name: str) -> Node:
        """The node in this graph of the whole graph's placeholder `top[name]`, threaded through the calls on the
        way.
        """
        if self.parent is None:
            return top[name]
        for n in self.module.graph.nodes:
            if n.op == "placeholder" and n.target == name:
                return n
        assert self.call is not None
        outer = self.parent.add_input(top, name)
        inner = add_placeholder(self.module, name)
        inner.meta.update(outer.meta)
        self.call.args = (*self.call.args, outer)
        return inner


def copy_of(gm: GraphModule) -> GraphModule:
    """A copy on the same tensors (an optimizer's graph holds its parameters), whose placeholders know their sources.

    fx's own copy has tensors of its own, and forgets sources.
    """
    tensors = {
        id(t): t
        for module in gm.modules()
        for t in (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        if isinstance(t, torch.Tensor)
    }
    copied = copy.deepcopy(gm, tensors)
    for old, new in zip(gm.graph.find_nodes(op="placeholder"), copied.graph.find_nodes(op="placeholder"), strict=True):
        source = getattr(old, "_dynamo_source", None)
        if source is not None:
            new._dynamo_source = source
    return copied


def regions(gm: GraphModule) -> list[Region]:
    """The whole graph first, then the bodies of its activation checkpoints; a body that is called twice is left out."""
    found = [Region(gm)]
    for region in found:  # grows while it is walked: checkpoints nest
        calls: dict[str, list[Node]] = {}
        for node in region.module.graph.nodes:
            if node.op == "call_function" and node.target is _CHECKPOINT and isinstance(node.args[0], Node):
                calls.setdefault(str(node.args[0].target), []).append(node)
        for target, nodes in calls.items():
            if len(nodes) == 1:
                body = region.module.get_submodule(target)
                assert isinstance(body, GraphModule)
                found.append(Region(body, (*region.path, nodes[0].name), nodes[0], region))
    return found


def add_placeholder(gm: GraphModule, name: str) -> Node:
    """A new last placeholder."""
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1:]
    anchor = last[0].next if last else next(iter(gm.graph.nodes))
    with gm.graph.inserting_before(anchor):
        return gm.graph.placeholder(name)


def source_name(placeholder: Node) -> str:
    """The parameter's name as `named_parameters` spells it, read off Dynamo's source; the placeholder's name without
    one.

    With regional compilation Dynamo sees one block, and the name begins there.
    """
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", "")
    name = name() if callable(name) else name  # a method before torch 2.13
    parts = re.findall(r"_(?:modules|parameters|buffers)\['(.*?)'\]", name)
    return ".".join(parts) or str(placeholder.target)


def is_parameter(placeholder: Node) -> bool:
    """Whether a placeholder of the whole graph is a parameter of a module, by Dynamo's source."""
    name = getattr(getattr(placeholder, "_dynamo_source", None), "name", "")
    return "_parameters[" in (name() if callable(name) else name)


def value(node: Node) -> torch.Tensor | None:
    """Dynamo's fake tensor of a node, None where it is not a tensor."""
    example = node.meta.get("example_value")
    return example if isinstance(example, torch.Tensor) else None


def tensor_inputs(node: Node) -> list[Node]:
    """Input nodes that are tensors or containers of tensors (a chunk's result), as far as known."""
    others = (int, float, torch.SymInt, torch.Size, FakeScriptObject)  # the last: a DeviceMesh
    return [n for n in node.all_input_nodes if not isinstance(n.meta.get("example_value"), others)]


# ------------------------------------------------------------------------------------------------------- what a node is

_OPERATORS = {"truediv": "div", "itruediv": "div", "iadd": "add", "isub": "sub", "imul": "mul", "ipow": "pow"}
#: Pointwise in truth, not tagged so in ATen.
_UNTAGGED_POINTWISE = {"hardswish", "log_sigmoid", "prelu", "glu", "softsign", "tanhshrink"}
_AFFINE = {"add", "sub", "rsub", "neg", "mul", "div", "clone", "positive"}
_SHAPE = {
    "view", "reshape", "flatten", "unflatten", "chunk", "split", "split_with_sizes", "tensor_split", "getitem",
    "contiguous", "squeeze", "unsqueeze", "view_as", "reshape_as", "narrow", "unbind", "detach_",
    "from_local", "to_local", "redistribute",
}  # fmt: skip
_CREATION = {
    "tensor", "as_tensor", "scalar_tensor", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like",
    "new_tensor", "new_zeros", "new_ones", "new_full",
}  # fmt: skip
_CAST = {"to", "type", "type_as", "float", "half", "bfloat16", "double", "_to_copy"}
_PRODUCT = {"matmul", "bmm", "einsum", "baddbmm"}
_MOVES = {"expand", "transpose", "permute", "t", "mT", "select", "index", "index_select"}
_DROPOUT = {"dropout", "alpha_dropout", "feature_alpha_dropout"}
_LINEAR = {torch._C._nn.linear, torch.ops.aten.linear.default, torch.ops.aten.linear}
_ADDMM = {torch.addmm, torch.ops.aten.addmm.default, torch.ops.aten.addmm}


def op_name(node: Node) -> str:
    """The bare name of what a node calls: "mul" for operator.imul, torch.mul, Tensor.mul_ and aten.mul.Tensor alike."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        packet = getattr(node.target, "overloadpacket", node.target)
        name = re.sub("^prim[ _]", "", getattr(packet, "__name__", str(packet)))  # of DTensors, before torch 2.13
    else:
        return ""
    name = name.strip("_") if name != "_to_copy" else name
    return _OPERATORS.get(name, name)


def is_shape(node: Node) -> bool:
    """Only moves or renames entries: views, splits, casts, dropout (which also zeroes some)."""
    return op_name(node) in _SHAPE or is_cast(node) or op_name(node) in _DROPOUT


def is_cast(node: Node) -> bool:
    return op_name(node) in _CAST


def is_creation(node: Node) -> bool:
    """A constant made in the graph; of its inputs it takes at most the shape."""
    return op_name(node) in _CREATION


def is_view(node: Node) -> bool:
    return op_name(node) in {"view", "reshape", "flatten", "unflatten", "contiguous"}


def is_pointwise(node: Node) -> bool:
    """Every entry of the result depends on the same entry of the inputs alone, by ATen's own tag."""
    name = op_name(node)
    if name in _UNTAGGED_POINTWISE:
        return True
    packet = getattr(torch.ops.aten, name, None) if name else None
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def is_affine(node: Node, data_inputs: int) -> bool:
    """A pointwise node that is linear in its data: a product or quotient of two data inputs is not."""
    name = op_name(node)
    return name in _AFFINE and (data_inputs <= 1 or name not in ("mul", "div"))


def is_attention_core(node: Node) -> bool:
    """The product with attention weights: the fused op, flex attention, or a matmul fed by a softmax of another one."""
    name = op_name(node)
    if "scaled_dot_product" in name or "flex_attention" in name:
        return True
    if name not in _PRODUCT:
        return False
    for n in node.all_input_nodes:
        while n.all_input_nodes and (is_shape(n) or op_name(n) in ("expand", "transpose", "permute")):
            n = n.all_input_nodes[0]
        if op_name(n) == "softmax" and any(op_name(scores) in _PRODUCT for scores in walk_back(n)):
            return True  # a router's softmax, in contrast, is fed by a linear
    return False


@dataclass(frozen=True, slots=True)
class LinearArgs:
    """y = x W^T + bias. transposed: the weight is stored [in_features, out_features], as a Conv1D of GPT-2 does."""

    x: Node
    weight: Node
    bias: Node | None
    transposed: bool


def linear_args(node: Node) -> LinearArgs | None:
    """The arguments of a linear layer, None where `node` is not one."""
    if node.op != "call_function":
        return None
    args, kw = list(node.args), dict(node.kwargs)
    if node.target in _LINEAR:
        x, weight, bias = (args + [None] * 3)[:3]
        x, weight, bias = kw.get("input", x), kw.get("weight", weight), kw.get("bias", bias)
        transposed = False
    elif node.target in _ADDMM and not set(kw) & {"alpha", "beta", "out"}:
        bias, x, weight = (args + [None] * 3)[:3]
        bias, x, weight = kw.get("input", bias), kw.get("mat1", x), kw.get("mat2", weight)
        transposed = True
    else:
        return None
    if not isinstance(x, Node) or not isinstance(weight, Node) or not isinstance(bias, Node | None):
        return None
    return LinearArgs(x, weight, bias, transposed)


def product_of(weight: Node) -> Node | None:
    """The matrix product that takes `weight` as its second factor, moved or indexed at most; None where there is none.

    A product that takes it first, or an elementwise one, makes it data (a learned query, a scale) and not a layer.
    """
    queue = [weight]
    for node in queue:  # grows while it is walked
        for user in node.users:
            name = op_name(user)
            linear = linear_args(user)
            if linear is not None:
                if linear.weight is node:
                    return user
            elif name in _PRODUCT | {"mm", "addmm"} or "grouped_mm" in name or name == "multi_head_attention_forward":
                if name in ("einsum", "multi_head_attention_forward") or node in user.args[1:]:
                    return user
            elif user not in queue and (is_shape(user) or name in _MOVES) and user.args and user.args[0] is node:
                queue.append(user)
    return None


def origin(weight: Node) -> Node | None:
    """The placeholder that `weight` is a moved, cut or indexed form of; None where it is computed, or is one itself."""
    node = weight
    while node.op != "placeholder":
        if not (is_shape(node) and not is_cast(node) or op_name(node) in _MOVES) or not node.args:
            return None
        source = node.args[0]
        if not isinstance(source, Node):
            return None
        node = source
    return node if node is not weight else None


def walk_back(start: Node) -> Iterator[Node]:
    """All nodes that `start` depends on, nearest first, not going past linears."""
    seen, queue = {start}, [start]
    while queue:
        node = queue.pop()
        for n in tensor_inputs(node):
            if n not in seen:
                seen.add(n)
                yield n
                if not linear_args(n):
                    queue.append(n)


def walk_forward(start: Node, stop_at: Callable[[Node], bool]) -> Iterator[Node]:
    """All nodes that depend on `start`, not going past linears and what `stop_at` names."""
    seen, queue = {start}, [start]
    while queue:
        for n in queue.pop().users:
            if n not in seen:
                seen.add(n)
                yield n
                if not linear_args(n) and not stop_at(n):
                    queue.append(n)


def mul_operands(node: Node) -> tuple[Node, Node] | None:
    """The two tensor factors of a product of nodes, None where `node` is not one."""
    if op_name(node) != "mul" or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    return (a, b) if isinstance(a, Node) and isinstance(b, Node) else None
