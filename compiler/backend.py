"""The backend: what torch.compile(model, backend="sparse24") calls for every graph that Dynamo captures.

Found through the entry point group `torch_dynamo_backends`. The callable it returns looks up the state of each weight
it is given, picks the compiled graph for the weights that are sparse at that moment, and appends their packed forms as
inputs: state follows the weight and not the graph, so one graph serves every block of a model that is compiled block by
block.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import RestartAnalysis
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..kernels import ahead, layout, providers
from ..kernels.gain import Layer, gain, matmuls
from ..passes.find import Linear, find_linears
from ..passes.graph import copy_of
from ..passes.parallel import is_dtensor
from ..passes.rewrite import Group, groups_of, rewrite
from ..passes.tidy import tidy
from . import (
    fsdp,
    inference,
    weights,
)
from . import (
    step as step,  # registers the optimizer hooks
)
from .errors import BackendError, SkippedError
from .operands import operand_of
from .ranks import check_recipe, first_of
from .recipe import Recipe
from .seeds import draw_seed, no_seeds, seeds_on
from .trace import Trace
from .weights import SparseWeight

log = logging.getLogger("sparse24")

Compiled = Callable[..., Any]
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
        return _compile_inner(gm, example_inputs, recipe, mode)  # traced without data: there are no weights to pack
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


def read(
    gm: GraphModule,
    weight_of: Callable[[str], Any],
    recipe: Recipe,
    autocast: torch.dtype | None = None,
    forward_only: bool = False,
) -> tuple[GraphModule, list[Linear], set[str]]:
    """(a tidied copy of a Dynamo graph, its linears, which weights are multiplied as they came).

    The linears to make sparse have reason None and their wgrad. weight_of: the tensor that comes in by the placeholder
    of a name. autocast: what float32 linears compute in, where the graph does not show it. forward_only: the graph
    computes no gradient. Nothing is registered.
    """
    tidied, ready = gm, set[str]()
    try:
        tidied = tidy(copy_of(gm))  # a copy: Dynamo reads its own placeholders afterwards
        linears = find_linears(
            tidied, layers=recipe.layers, skip=recipe.skip, ineligible=lambda name: ineligible(weight_of(name))
        )
        if forward_only:
            linears, ready = _ready(tidied, linears, weight_of, recipe)
    except Exception:
        if recipe.strict:
            raise
        log.exception("sparse24: could not read a graph; it stays dense")
        return tidied, [], set()
    linears = [replace(x, dtype=autocast) if autocast and x.dtype == torch.float32 else x for x in linears]
    together = _together(tidied, linears, recipe)
    trained = [linear for linear in linears if linear.reason is None and linear.weight not in ready]
    by_speed = _by_speed(trained, together, weight_of, recipe)
    decided = []
    for linear in linears:
        if linear.weight in ready:
            reason = inference.why_dense(linear, together[linear][0], recipe, weight_of(linear.weight).device)
            linear = replace(linear, reason=reason)
        elif linear.reason is None:
            linear = by_speed[linear]
        decided.append(linear)
    return tidied, decided, ready


def _ready(
    tidied: GraphModule, linears: list[Linear], weight_of: Callable[[str], Any], recipe: Recipe
) -> tuple[list[Linear], set[str]]:
    """The linears of a graph that computes no gradient, and which of their weights are 2:4 as they came.

    linears: as found under the recipe's `layers`. Those that are 2:4 are taken whatever `layers` says, frozen or not;
    beside them nothing is made sparse that is not in training.
    """
    every = find_linears(tidied, layers=("*",), skip=recipe.skip, ineligible=lambda name: _unfit(weight_of(name)))
    ready = {m.weight for m in every if m.reason is None and inference.is_ready(weight_of(m.weight), m)}
    if not ready:
        return linears, ready
    decided = []
    for linear, unrestricted in zip(linears, every, strict=True):
        if unrestricted.weight in ready and unrestricted.reason is None:
            linear = unrestricted
        elif linear.reason is None and not inference.in_training(weight_of(linear.weight)):
            linear = replace(linear, reason=inference.NOT_TWO_FOUR)
        decided.append(linear)
    return decided, ready


def _together(tidied: GraphModule, linears: Sequence[Linear], recipe: Recipe) -> dict[Linear, tuple[int, str | None]]:
    """For each linear that may be sparse the out_features of the matmul it would be part of, and the activation fused
    behind it.
    """
    wanted = [linear for linear in linears if linear.reason is None]
    try:
        groups = groups_of(tidied, wanted, recipe.recipe)
    except Exception:
        if recipe.strict:
            raise
        log.exception("sparse24: could not group the linears of a graph; each is measured by itself")
        return {linear: (linear.out_features, None) for linear in wanted}
    return {
        linear: (sum(m.out_features for m in group.linears), group.kind) for group in groups for linear in group.linears
    }


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
    ) -> "Variant":
        found = self.variants.get(active)
        if found is None:
            found = self.variants[active] = self._compile(active, args, known, at_compile_time)
        return found

    def _compile(self, active: int, args: Sequence[Any], known: list[SparseWeight], at_compile_time: bool) -> "Variant":
        inner = self.recipe
        if self.dynamic and not at_compile_time:
            log.warning(
                "sparse24: a graph with dynamic shapes runs uncompiled for a set of sparse layers met after compilation"
            )
            inner = replace(inner, inner="eager")
        if not active:
            return Variant(_compile_inner(copy_of(self.original), args, inner, self.mode))
        gm = copy_of(self.tidied)
        sites = [i for i in range(len(self.sites)) if active >> i & 1]
        try:
            linears = [self.sites[i][1] for i in sites]
            at = dict(zip(linears, sites, strict=True))
            groups = [(g, [at[linear] for linear in g.linears]) for g in rewrite(gm, linears, self.recipe.recipe)]
            variant = Variant(groups=groups, forward_only=self.forward_only)
            self.trace.graph("rewritten", gm)
            _name_sources(gm)
            examples = variant.examples(known, static=inner.inner != "eager")
            variant.compiled = _compile_inner(gm, [*args, *examples], inner, self.mode)
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


def _active(known: list[SparseWeight]) -> int:
    """Bit i: site i is sparse."""
    return sum(weight.sparse << i for i, weight in enumerate(known))


def _unfit(param: Any) -> str | None:
    """Why a graph input cannot be a sparse weight, be it for a forward alone; None where it can."""
    if not isinstance(param, torch.nn.Parameter):
        if is_dtensor(param):  # as DistributedDataParallel(model, device_mesh=...) leaves a model with DTensors
            return "its weight is a DTensor that is not an nn.Parameter, need one (fully_shard or replicate keep it)"
        return "its weight is not an nn.Parameter"
    if is_traceable_wrapper_subclass(param) and not is_dtensor(param):
        return f"its weight is a {type(param).__name__}"
    if param.device.type not in ("cpu", "cuda"):
        return f"its weight is on device {param.device}, need cpu or cuda"
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {str(param.dtype).removeprefix('torch.')}, need float32, bfloat16 or float16"
    shard = fsdp.shard_of(param)
    return None if shard is None else shard.unfit()


def ineligible(param: Any) -> str | None:
    """Why a graph input cannot be trained sparse, None where it can. A weight that is sparse already may be frozen."""
    reason = _unfit(param)
    known = weights.get(param) if reason is None else None
    if reason is None and not param.requires_grad and (known is None or known.reason_skipped or known.pruned):
        return "its weight is frozen (requires_grad=False)"
    return reason


def _by_speed(
    linears: Sequence[Linear],
    together: Mapping[Linear, tuple[int, str | None]],
    weight_of: Callable[[str], Any],
    recipe: Recipe,
) -> dict[Linear, Linear]:
    """Each linear with why it stays dense, if it does, and its way of taking the weight gradient.

    Other processes compile the kernels of those that may be sparse, and matmuls are measured meanwhile. together:
    out_features of the matmul that a linear and its neighbours become, and its activation; what is measured is that
    matmul, so the neighbours find the same.
    """
    found = {linear: _settled(weight_of(linear.weight), linear, recipe) for linear in linears}
    layers = {}
    for linear in linears:
        (rows, kind), param = together[linear], weight_of(linear.weight)
        of = (rows, linear.in_features, linear.tokens, linear.dtype, param.dtype, param.device)
        layers[linear] = Layer(*of, recipe.wgrad_of(linear.role), kind, linear.bias)
    for device in {layer.device for layer in layers.values()} if recipe.recipe == "fst" else ():
        may = [m for linear, m in layers.items() if m.device == device and (found[linear] or linear).reason is None]
        calls = [call for m in may for call in ahead.calls_of(m.dtype, m.master, m.wgrad, m.kind, m.bias)]
        ahead.start(calls, device, recipe.inner == "inductor")
    open_ = {linear: layer for linear, layer in layers.items() if found[linear] is None}
    for layer in open_.values():
        with contextlib.suppress(torch.OutOfMemoryError):  # `gain` will meet it again
            matmuls(layer)
    return {linear: found[linear] or _measured(linear, open_[linear]) for linear in linears}


def _measured(linear: Linear, layer: Layer) -> Linear:
    """Of ranks that measure the same problem the first one's decision holds for all."""
    reason, wgrad = None, layer.wgrad
    try:
        spent = gain(layer)
        wgrad = spent.wgrad
        if not spent.faster:
            reason = f"{weights.SLOWER}, {spent.dense_ms:.2f} ms a step against {spent.sparse_ms:.2f} ms"
    except torch.OutOfMemoryError:
        log.warning("sparse24: %s: no memory is left to measure whether it gains; it is sparse", linear.name)
    alike = layer._replace(device=torch.device(layer.device.type))
    reason, wgrad = json.loads(first_of(f"gain {alike}", json.dumps([reason, wgrad])))
    return replace(linear, reason=reason) if reason else replace(linear, wgrad=wgrad)


def _settled(param: Tensor, linear: Linear, recipe: Recipe) -> Linear | None:
    """The linear where nothing has to be measured for it, else None.

    A weight is decided on once: another graph, another number of tokens or a resumed run too.
    """
    known = weights.get(param)
    if known is not None and known.recipe == recipe and known.decided and not known.pruned:
        return replace(linear, reason=known.reason_skipped, wgrad=known.wgrad)
    waiting = weights.waiting(param)
    if "wgrad" in waiting:
        wgrad = recipe.wgrad_of(linear.role)
        wgrad = waiting["wgrad"] if wgrad == "mvue" else wgrad  # measured then, or asked for now
        return replace(linear, reason=waiting.get("reason"), wgrad=wgrad)
    if recipe.when == "always" or recipe.recipe == "s-ste":
        return replace(linear, wgrad=recipe.wgrad_of(linear.role))
    slow = providers.why_slow(linear.out_features, linear.in_features, linear.dtype, param.device)
    return None if slow is None else replace(linear, reason=slow)


def _is_dynamic(placeholder: torch.fx.Node) -> bool:
    example = placeholder.meta.get("example_value")
    if isinstance(example, Tensor):
        return any(isinstance(s, torch.SymInt) for s in example.shape)
    return isinstance(example, torch.SymInt)


def _name_sources(gm: GraphModule) -> None:
    """AOTAutograd wants a source on every placeholder; CUDA graphs want to know that operands stay where they are."""
    for node in gm.graph.nodes:
        if node.op == "placeholder" and getattr(node, "_dynamo_source", None) is None:
            node._dynamo_source = ConstantSource(source_name=node.name)  # type: ignore[attr-defined]
            if "packed" in node.name:
                node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def _compile_inner(gm: GraphModule, inputs: Sequence[Any], recipe: Recipe, mode: str | None) -> Compiled:
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
