"""The backend: what torch.compile(model, backend="sparse24") calls for every graph that Dynamo captures.

Found through the entry point group `torch_dynamo_backends`. The callable it returns looks up the state of each weight
it is given, picks the compiled graph for the weights that are sparse at that moment, and appends their packed forms as
inputs: state follows the weight and not the graph, so one graph serves every block of a model that is compiled block by
block.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import RestartAnalysis
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

from ..passes.find import Linear
from ..passes.graph import copy_of
from ..passes.rewrite import rewrite
from . import inference, weights
from . import (
    step as step,  # registers the optimizer hooks
)
from .decide import read
from .errors import BackendError, SkippedError
from .ranks import check_recipe
from .recipe import Recipe
from .trace import Trace
from .variant import Compiled, Variant, compile_inner, name_sources
from .weights import SparseWeight

log = logging.getLogger("sparse24")

_said: set[str] = set()


def sparse24(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Compiled:
    """Compile one Dynamo graph with 2:4 sparse linears.

    options: the fields of `Recipe`. mode: one of Inductor's ("reduce-overhead", "max-autotune", ...). name is not used.
    Raises OptionError (a ValueError) on a bad option, RankError where another rank has other options, SkippedError
    under strict=True; anything that cannot be made sparse stays dense and is reported.
    """
    recipe = Recipe.from_options(options)
    check_recipe(recipe)
    if any(isinstance(x, FakeTensor) for x in example_inputs):
        _warn_of_split()
        return compile_inner(gm, example_inputs, recipe, mode)  # traced without data: there are no weights to pack
    graph = SparseGraph(gm, example_inputs, recipe, mode)
    return graph if graph.sites or graph.inference else graph.dense


def _warn_of_split() -> None:
    """Say once that Dynamo's DDPOptimizer hands over parts of the graph, without the data of their weights."""
    if not torch.distributed.is_available() or torch._dynamo.config.optimize_ddp not in (True, "ddp_optimizer"):
        return
    if torch.nn.parallel.DistributedDataParallel._get_active_ddp_module() is None or "split" in _said:
        return
    _said.add("split")
    log.warning(
        "sparse24: found a model under DDP whose graph Dynamo splits at DDP's buckets: its parts stay dense. Set "
        "torch._dynamo.config.optimize_ddp = False; where each block is compiled by itself (block.compile(...)), "
        "gradients still travel while the backward runs"
    )


class SparseGraph:
    """One Dynamo graph and its compiled variants, one for each set of weights that is sparse at a call.

    In a run there are two: all found weights sparse, then none. Variants are compiled when first needed; where shapes
    are dynamic both are compiled at once, since a later compilation could not add guards.
    """

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any], recipe: Recipe, mode: str | None) -> None:
        self.original, self.recipe, self.mode = gm, recipe, mode
        self._decide(example_inputs, at_compile_time=True)

    def _decide(self, example_inputs: Sequence[Any], at_compile_time: bool) -> None:
        """Find the linears, decide which are sparse, and compile for the weights at hand."""
        gm, recipe = self.original, self.recipe
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        position = {n.name: i for i, n in enumerate(placeholders)}
        self.forward_only = inference.forward_only(gm, example_inputs)
        params = {n.name: x for n, x in zip(placeholders, example_inputs, strict=True)}
        self.tidied, linears, ready = read(gm, params.__getitem__, recipe, forward_only=self.forward_only)
        self.inference = bool(ready)
        self.trace = Trace()
        for stage, graph in (("original", gm), ("tidied", self.tidied)):
            self.trace.graph(stage, graph)
        self.trace.linears(linears)
        self.sites: list[tuple[int, Linear]] = []  # (which input is the weight, its linear)
        self.others: list[int] = []  # weights that are dense here as long as they are not in training
        for linear in linears:
            param: Any = params[linear.weight] if linear.weight else None
            if linear.reason is not None:
                self._leave_dense(param, linear, linear.reason)
                if linear.weight in ready or linear.reason == inference.NOT_TWO_FOUR:
                    self.others.append(position[linear.weight])
                continue
            if linear.weight in ready:
                inference.attach(param, linear, recipe)
            else:
                weights.attach(param, linear.name, recipe, linear.wgrad)
            self.sites.append((position[linear.weight], linear))
        self.dynamic = any(_is_dynamic(n) for n in placeholders)
        self.variants: dict[int, Variant] = {}
        known = self._weights(example_inputs)
        self._variant(_active(known), example_inputs, known, at_compile_time)
        if self.dynamic and self.sites:
            self._variant(0, example_inputs, known, at_compile_time)

    @property
    def dense(self) -> Compiled:
        """The graph as it came, compiled: what a graph without a sparse layer is replaced by."""
        compiled = self.variants[0].compiled
        assert compiled is not None
        return compiled

    def __call__(self, *args: Any) -> Any:
        if self.inference and any(inference.in_training(args[i]) for i in self.others):
            self._decide(args, at_compile_time=False)  # a layer left dense here trains sparse since
        known = self._weights(args)
        return self._variant(_active(known), args, known)(args, known)

    def _weights(self, args: Sequence[Any]) -> list[SparseWeight]:
        """The state of each site's weight; a block that comes by for the first time gets its own here."""
        if self.inference:
            return [inference.attach(args[index], linear, self.recipe) for index, linear in self.sites]
        return [
            weights.get(args[index]) or weights.attach(args[index], linear.name, self.recipe, linear.wgrad)
            for index, linear in self.sites
        ]

    def _variant(
        self, active: int, args: Sequence[Any], known: list[SparseWeight], at_compile_time: bool = False
    ) -> Variant:
        found = self.variants.get(active)
        if found is None:
            found = self.variants[active] = self._compile(active, args, known, at_compile_time)
        return found

    def _compile(self, active: int, args: Sequence[Any], known: list[SparseWeight], at_compile_time: bool) -> Variant:
        inner = self.recipe
        if self.dynamic and not at_compile_time:
            log.warning(
                "sparse24: a graph with dynamic shapes runs uncompiled for a set of sparse layers met after compilation"
            )
            inner = replace(inner, inner="eager")
        if not active:
            return Variant(compile_inner(copy_of(self.original), args, inner, self.mode))
        gm = copy_of(self.tidied)
        sites = [i for i in range(len(self.sites)) if active >> i & 1]
        try:
            linears = [self.sites[i][1] for i in sites]
            at = dict(zip(linears, sites, strict=True))
            groups = [(g, [at[linear] for linear in g.linears]) for g in rewrite(gm, linears, self.recipe.recipe)]
            variant = Variant(groups=groups, forward_only=self.forward_only)
            self.trace.graph("rewritten", gm)
            name_sources(gm)
            examples = variant.examples(known, static=inner.inner != "eager")
            variant.compiled = compile_inner(gm, [*args, *examples], inner, self.mode)
            variant.pack(known)
            return variant
        except (BackendError, RestartAnalysis):  # the latter is how a compiler asks Dynamo to trace again
            raise
        except Exception as error:
            if self.recipe.strict:
                raise
            log.exception("sparse24: could not compile a graph with sparse layers; they stay dense")
            for i in sites:
                known[i].to_dense()
                known[i].reason_skipped = f"compilation failed: {type(error).__name__}: {error}"
            return self._variant(0, args, known, at_compile_time)

    def _leave_dense(self, param: Any, linear: Linear, reason: str) -> None:
        if linear.wanted and not reason.startswith((weights.SLOWER, inference.SLOWER)):
            message = f"sparse24: {linear.name}: {reason}; it stays dense (skip it to silence this)"
            if self.recipe.strict:
                raise SkippedError(message)
            if message not in _said:
                _said.add(message)
                log.warning(message)
        if isinstance(param, torch.nn.Parameter):
            weights.skip(param, linear.name, self.recipe, reason)


def _active(known: list[SparseWeight]) -> int:
    """Bit i: site i is sparse."""
    return sum(weight.sparse << i for i, weight in enumerate(known))


def _is_dynamic(placeholder: torch.fx.Node) -> bool:
    example = placeholder.meta.get("example_value")
    if isinstance(example, Tensor):
        return any(isinstance(s, torch.SymInt) for s in example.shape)
    return isinstance(example, torch.SymInt)
