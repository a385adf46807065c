"""Small modules, Dynamo's graphs of them, and the rewritten graphs run against the modules with masked weights."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sparse24.kernels import layout, reference
from sparse24.kernels.linear import sparse_linear, sparse_linear_glu
from sparse24.passes.find import Linear, find_linears
from sparse24.passes.graph import copy_of, linear_args, regions
from sparse24.passes.rewrite import Group, rewrite
from sparse24.passes.tidy import tidy

D, FF = 64, 128


class Net(nn.Module):
    """A module in one expression: children (or parameters) by name, and a forward that takes the module first."""

    def __init__(self, forward: Callable[..., Any], **children: Any) -> None:
        super().__init__()
        self.run = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def ffn(act: Callable[[Tensor], Tensor], d: int = D, ff: int = FF, bias: bool = True, **children: Any) -> Net:
    up, down = nn.Linear(d, ff, bias=bias), nn.Linear(ff, d, bias=bias)
    return Net(lambda m, x: m.down(act(m.up(x))), up=up, down=down, **children)


def gated(combine: Callable[[Tensor, Tensor], Tensor], bias: bool = False, up_first: bool = False) -> Net:
    """down(combine(gate(x), up(x)))."""

    def forward(m: Any, x: Tensor) -> Tensor:
        if up_first:
            up, gate = m.up(x), m.gate(x)
        else:
            gate, up = m.gate(x), m.up(x)
        return m.down(combine(gate, up))

    gate, up, down = nn.Linear(D, FF, bias=bias), nn.Linear(D, FF, bias=bias), nn.Linear(FF, D, bias=bias)
    return Net(forward, gate=gate, up=up, down=down)


class Conv1D(nn.Module):
    """GPT-2's linear: the weight stored [in, out], a product by addmm on a flattened input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.shape[:-1], self.weight.shape[1])


def tokens(*shape: int, features: int = D) -> Tensor:
    return torch.randn(*(shape or (3, 7)), features)


# -------------------------------------------------------------------------------------------------------------- capture


@dataclass(frozen=True)
class Captured:
    """A graph as Dynamo made it, tidied, its linears, and the rewritten copy with its groups and masks.

    args: what the rewritten graph was called with last, operands included.
    """

    original: GraphModule
    linears: list[Linear]
    rewritten: GraphModule
    groups: list[Group]
    masks: dict[str, Tensor]
    args: list[Any] = field(default_factory=list)

    @property
    def kinds(self) -> list[str | None]:
        return [group.kind for group in self.groups]

    @property
    def merged(self) -> list[list[str]]:
        """The names of the weights of each group."""
        return [[linear.name for linear in group.linears] for group in self.groups]

    def calls(self) -> dict[str, int]:
        """How many sparse_linear, sparse_linear_glu and dense linears the rewritten graph has, bodies included."""
        found = list(nodes(self.rewritten))
        return {
            "linear": sum(n.target is sparse_linear for n in found),
            "glu": sum(n.target is sparse_linear_glu for n in found),
            "dense": sum(linear_args(n) is not None for n in found),
        }


def nodes(gm: GraphModule) -> Iterable[Node]:
    """All nodes, those of checkpoint bodies included."""
    for region in regions(gm):
        yield from region.module.graph.nodes


class Backend:
    """A torch.compile backend that rewrites each graph with random masks and runs it as it is, nothing compiled."""

    def __init__(
        self, wgrad: str = "dense", choose: Callable[[Linear], bool] = lambda linear: True, **find: Any
    ) -> None:
        self.wgrad, self.choose, self.find = wgrad, choose, find
        self.captured: list[Captured] = []

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        gm = tidy(copy_of(gm))
        linears = find_linears(gm, **self.find)
        rewritten = copy.deepcopy(gm)
        sites = [replace(s, wgrad=self.wgrad) for s in linears if s.reason is None and self.choose(s)]
        groups = rewrite(rewritten, sites)
        names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
        masks = {s.name: random_mask(example_inputs[names.index(s.weight)].shape) for s in sites}
        captured = Captured(gm, linears, rewritten, groups, masks)
        self.captured.append(captured)

        def run(*args: Any) -> Any:
            operands = [t for g in groups for t in pack(g, [args[names.index(s.weight)] for s in g.linears], masks)]
            captured.args[:] = [*args, *([torch.arange(len(groups)), *operands] if groups else [])]
            return rewritten(*captured.args)

        return run


def random_mask(shape: torch.Size) -> Tensor:
    """A transposable 2:4 mask that has nothing to do with the weight."""
    return reference.best_mask(torch.randn(shape))


def pack(group: Group, weights: list[Tensor], masks: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """packed [F, K] and packed_t [K, F] of a group's weights."""
    members = [(w.detach(), masks[s.name]) for w, s in zip(weights, group.linears, strict=True)]
    if group.transposed:
        members = [(w.t(), mask.t()) for w, mask in members]
    w, mask = (torch.cat(parts) for parts in zip(*members, strict=True))
    w, order = w.to(group.dtype), layout.metadata_order(w.device)
    return layout.pack(w, mask, order), layout.pack(w.t().contiguous(), mask.t().contiguous(), order)


def capture_all(model: Any, *inputs: Any, dynamic: bool | None = None, **options: Any) -> list[Captured]:
    """Call `model` once, compiled; its graphs. options: those of `Backend`."""
    backend = Backend(**options)
    torch.compile(model, backend=backend, dynamic=dynamic)(*inputs)
    return backend.captured


def capture(model: Any, *inputs: Any, **options: Any) -> Captured:
    """`capture_all` of a model that is one graph."""
    (captured,) = capture_all(model, *inputs, **options)
    return captured


def roles(captured: Captured) -> dict[str, str]:
    """Name without ".weight" -> role, of the linears to make sparse."""
    return {s.name.removesuffix(".weight"): s.role for s in captured.linears if s.reason is None}


def reasons(captured: Captured) -> dict[str, str | None]:
    """Name without ".weight" -> why it stays dense."""
    return {s.name.removesuffix(".weight"): s.reason for s in captured.linears}


# -------------------------------------------------------------------------------------------------------------- numbers


def assert_equals_masked(
    model: nn.Module, *inputs: Tensor, factor: float = 4.0, dynamic: bool | None = None, **options: Any
) -> Captured:
    """The rewritten graph's outputs and all gradients are those of the module with masked weights, to rounding.

    They may be no further from float64 than eager is, times `factor`. A straight-through gradient is the plain gradient
    of a weight that holds W.M, so the twin's weights are multiplied once and then used as they are.
    """
    backend = Backend(**options)
    sparse = outputs_and_gradients(torch.compile(model, backend=backend, dynamic=dynamic), model, inputs)
    (captured,) = backend.captured
    assert captured.groups, "nothing was rewritten: there is nothing to compare"
    twin = copy.deepcopy(model)
    for name, mask in captured.masks.items():
        twin.get_parameter(name).data.mul_(mask)
    eager = outputs_and_gradients(twin, twin, inputs)
    wide = copy.deepcopy(twin).double()
    exact = outputs_and_gradients(wide, wide, [x.double() if x.is_floating_point() else x for x in inputs])
    assert sparse.keys() == eager.keys() == exact.keys()
    for name, expected in exact.items():
        assert sparse[name].dtype == eager[name].dtype and sparse[name].shape == eager[name].shape, name
        error, allowed = ((v[name].double() - expected).norm() for v in (sparse, eager))
        slack = torch.finfo(eager[name].dtype).eps * expected.norm()  # eager may be exact by luck
        assert error <= factor * allowed + slack, f"{name}: off by {error:.1e}, eager by {allowed:.1e}"
    return captured


def outputs_and_gradients(run: Any, model: nn.Module, inputs: Iterable[Tensor]) -> dict[str, Tensor]:
    """Every output, and the gradient of every parameter and floating input under a fixed random cotangent."""
    model.zero_grad()
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    torch.manual_seed(1)  # dropout draws alike everywhere
    out = run(*inputs)
    outs = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    draws = torch.Generator().manual_seed(2)
    sum((o * torch.randn(o.shape, generator=draws)).sum() for o in outs).backward()
    found = {f"output {i}": o.detach() for i, o in enumerate(outs)}
    found |= {f"gradient of input {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
