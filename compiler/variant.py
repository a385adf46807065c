"""A compiled graph and what it is called with: the compiler behind, and the operands of the weights of a call."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..kernels import layout
from ..passes.rewrite import Group
from . import inference
from .operands import operand_of
from .recipe import Recipe
from .seeds import draw_seed, no_seeds, seeds_on
from .weights import SparseWeight

Compiled = Callable[..., Any]


class Variant:
    """A compiled graph. Its sparse layers get the operands and random seeds of the weights of a call.

    groups: what became one matmul, with the sites that its weights stand at; none in the dense graph. forward_only:
    it computes no gradient, and takes no transposes.
    """

    def __init__(
        self,
        compiled: Compiled | None = None,
        groups: Sequence[tuple[Group, Sequence[int]]] = (),
        forward_only: bool = False,
    ) -> None:
        self.compiled, self.groups, self.forward_only = compiled, groups, forward_only
        self.draws = any(group.wgrad == "mvue" for group, _ in groups)

    def _operands(self, members: list[tuple[SparseWeight, ...]]) -> list[Tensor]:
        tensors: list[Tensor] = []
        for (group, _), together in zip(self.groups, members, strict=True):
            for weight in together:
                weight.follow()
            if self.forward_only:
                tensors += inference.operand_of(together, group.dtype, group.transposed).forward_inputs
            else:
                tensors += operand_of(together, group.dtype, group.transposed).inputs
        return tensors

    def _members(self, known: list[SparseWeight]) -> list[tuple[SparseWeight, ...]]:
        return [tuple(known[site] for site in sites) for _, sites in self.groups]

    def __call__(self, args: Sequence[Any], known: list[SparseWeight]) -> Any:
        assert self.compiled is not None
        if not self.groups:
            return self.compiled(*args)
        members = self._members(known)
        operands = self._operands(members)
        device = operands[0].device
        if self.draws and torch.is_grad_enabled():
            seeds = seeds_on([draw_seed(together[0]) for together in members], device)
            for together in members:
                for weight in together:
                    weight.calls += 1
        else:
            seeds = no_seeds(len(members), device)
        return self.compiled(*args, seeds, *operands)

    def pack(self, known: list[SparseWeight]) -> list[Tensor]:
        """The operands of these weights, packed where they are not."""
        return self._operands(self._members(known))

    def examples(self, known: list[SparseWeight], static: bool) -> list[Any]:
        """Operands to compile with; fake ones of static shape where Dynamo traces and a compiler looks at shapes.

        Those of a training step are not packed for it: that takes kernels, which other processes may still be
        compiling (`ahead`) while this one runs the compiler behind.
        """
        context = TracingContext.try_get()
        fake = None if not static or context is None else context.fake_mode
        if fake is not None and not self.forward_only and not any(weight.soft or weight.pruned for weight in known):
            device, members = known[0].param.device, self._members(known)
            with fake:
                examples: list[Any] = [torch.empty(len(members), dtype=torch.int64, device=device)]
                for (group, _), together in zip(self.groups, members, strict=True):
                    size = sum(layout.numel(w.shape[0], w.shape[1], group.dtype) for w in together)
                    examples += [torch.empty(size, dtype=group.dtype, device=device) for _ in range(2)]
            return examples
        operands = self.pack(known)
        examples = [seeds_on([0] * len(self.groups), operands[0].device), *operands]
        return examples if fake is None else [fake.from_tensor(t, static_shapes=True) for t in examples]


def name_sources(gm: GraphModule) -> None:
    """AOTAutograd wants a source on every placeholder; CUDA graphs want to know that operands stay where they are."""
    for node in gm.graph.nodes:
        if node.op == "placeholder" and getattr(node, "_dynamo_source", None) is None:
            node._dynamo_source = ConstantSource(source_name=node.name)  # type: ignore[attr-defined]
            if "packed" in node.name:
                node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def compile_inner(gm: GraphModule, inputs: Sequence[Any], recipe: Recipe, mode: str | None) -> Compiled:
    """The graph by the recipe's `inner` compiler, for inputs like these. mode: one of Inductor's, or None."""
    if recipe.inner == "eager":
        return gm
    if recipe.inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        compiled: Compiled = aot_eager(gm, list(inputs))
        return compiled
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **recipe.inductor}
    fast: Any
    with _tracing(inputs) as seen:
        fast = compile_fx(gm, seen, config_patches=patches or None)
    return fast  # type: ignore[no-any-return]


@contextlib.contextmanager
def _tracing(inputs: Sequence[Any]) -> Iterator[list[Any]]:
    """The inputs to compile with. Where Dynamo is not tracing, they are made as static as it would have made them:
    without its context Inductor would not look into its cache.
    """
    if TracingContext.try_get() is not None:
        yield list(inputs)
        return
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with tracing(TracingContext(mode)):
        yield [mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x for x in inputs]
