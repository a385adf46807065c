"""explain: what the backend would do to a model, and what that would gain, without training it.

The model's forward is traced by Dynamo on a copy that has no data (device "meta"), so that neither memory nor a GPU is
needed; the graphs are read as `backend` reads them, for the weights of the model itself.
"""

import copy
import logging
import os
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo import pgo
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ..kernels import cost, layout
from ..kernels.cost import Cost
from ..kernels.providers import why_slow
from ..passes import graph as g
from ..passes.activation import GATED_KINDS, match
from ..passes.find import Linear
from ..passes.graph import copy_of
from ..passes.rewrite import SEEDS, groups_of, operand_names, rewrite
from . import weights
from .backend import read
from .export import plain_copy
from .export import replace as replace_file
from .page import page
from .recipe import Recipe
from .session import Session, session

log = logging.getLogger("sparse24")

NOT_CALLED = "not called with these arguments"
NOT_TRACED = "called outside of the graphs that torch.compile captures"
Inputs = tuple[Sequence[Any], Mapping[str, Any]]  # args, kwargs
_DIRECTIONS = ("forward", "dgrad", "wgrad", "packing")


@dataclass(frozen=True, slots=True)
class Row:
    """One linear layer, or another parameter of a product (a stack of experts).

    name: of the parameter. shape: (out_features, in_features), the last two dimensions of a stack. role: up, gate,
    down, gate_up; q, k, v (kv, qkv), o; experts; head (the last of the model); linear for any other. reason: None for a
    sparse one, else why it stays dense. tokens: rows of its input, 0 where it has none. dtype: what it computes in,
    autocast included. together: the parameters that
    it is multiplied with as one, itself included. cost: its part of their ms a step; None where its tokens are not
    known. dense_bytes, packed_bytes: of the parameter, and of the packed W and W^T beside it.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    reason: str | None
    tokens: int
    dtype: torch.dtype
    together: tuple[str, ...]
    cost: Cost | None
    dense_bytes: int
    packed_bytes: int

    @property
    def sparse(self) -> bool:
        return self.reason is None


@dataclass(frozen=True, slots=True)
class Report:
    """What `explain` found. str() is a table; graphs: {"original": Dynamo's graphs, "sparse": the same, rewritten}.

    gpu: whose rates the predicted times rest on. other_ms: predicted ms a step of what is neither linear nor
    elementwise: attention's products and a fused AdamW.
    """

    rows: tuple[Row, ...]
    recipe: Recipe
    device: torch.device
    gpu: str
    other_ms: float
    graphs: dict[str, list[GraphModule]]

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def gains(self, row: Row) -> bool:
        """Whether a row's layer would be sparse on `gpu`: it can be, and is faster so or wanted so."""
        return row.sparse and row.cost is not None and (row.cost.faster or self.recipe.when == "always")

    @property
    def dense_ms(self) -> float:
        """ms a step of all linears, dense."""
        return sum(row.cost.dense.total for row in self.rows if row.cost)

    @property
    def sparse_ms(self) -> float:
        """The same with the layers that gain sparse."""
        return sum((row.cost.sparse if self.gains(row) else row.cost.dense).total for row in self.rows if row.cost)

    @property
    def step_gain(self) -> float:
        """How many times faster a training step becomes. Norms, activations, embeddings and the loss are left out, so
        that it is a little too high; 1.0 where nothing is known.
        """
        sparse = self.sparse_ms + self.other_ms
        return (self.dense_ms + self.other_ms) / sparse if sparse else 1.0

    def table(self) -> str:
        return str(self)

    def html(
        self,
        path: str | os.PathLike[str],
        session: Session | None = None,
        history: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Write one page that needs no network: the model with what changed, the table, and the graphs as captured,
        forward and backward, side by side, searchable, with what comes from the same line of code linked.

        session: of the model in training; adds pictures of its masks and its last flip rates. history: what
        `session.metrics()` gave at some steps; adds their curves. The file is written whole or not at all.
        """
        text = page(self, session, history)
        replace_file(path, lambda temporary: _write(temporary, text), ".html")

    def __str__(self) -> str:
        header = ("parameter", "out x in", "role", "by", *_DIRECTIONS, "sum", "dense MB", "packed MB", "")
        body = [self._cells(row) for row in self.rows]
        widths = [max(len(cells[i]) for cells in (header, *body)) for i in range(len(header))]

        def line(cells: Sequence[str]) -> str:
            right = range(4, 11)
            padded = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths)))  # noqa: B905
            return "  ".join(padded).rstrip()

        return "\n".join([line(header), *map(line, body), "", *self.summary()])

    def _cells(self, row: Row) -> tuple[str, ...]:
        by, times, note = "dense", [""] * 5, row.reason or ""
        if row.cost is not None:
            dense, sparse = row.cost.dense, row.cost.sparse
            pairs = [(getattr(dense, name), getattr(sparse, name)) for name in _DIRECTIONS]
            pairs.append((dense.total, sparse.total))
            times = [f"{d:.3f} > {s:.3f}" if row.sparse else f"{d:.3f}" if d else "" for d, s in pairs]
            times[3] = f"{sparse.packing:.3f}" if row.sparse else ""
        if row.sparse:
            by = " ".join(dict.fromkeys(row.cost.providers)) if row.cost else ""
            if row.cost is not None and not row.cost.faster:
                note = f"dense is faster on {self.gpu}" + (", so it would be" if self.recipe.when == "faster" else "")
        size = f"{row.dense_bytes / 1e6:.2f}", f"{row.packed_bytes / 1e6:.2f}" if row.packed_bytes else ""
        return (row.name, " x ".join(map(str, row.shape)), row.role, by, *times, *size, note)

    def summary(self) -> list[str]:
        """The lines below the table: what is sparse, totals, and what they rest on."""
        sparse = [row for row in self.rows if row.sparse]
        measured = [row for row in self.rows if row.cost and row.cost.measured]
        how = f"measured for {len(measured)} layers, else predicted" if measured else "predicted"
        lines = [
            f"{len(sparse)} of {len(self.rows)} are sparse; a > b: ms a training step dense > sparse, {how} for "
            f"{self.gpu} in 16-bit types",
            f"linear layers {self.dense_ms:.2f} > {self.sparse_ms:.2f} ms, attention and optimizer "
            f"{self.other_ms:.2f} ms: the step gains {self.step_gain:.2f}x, a little less with all that is elementwise",
            f"bytes: {sum(r.dense_bytes for r in self.rows) / 1e6:.1f} MB dense, "
            f"{sum(r.packed_bytes for r in sparse) / 1e6:.1f} MB packed beside them",
        ]
        if any(r.sparse and r.cost and not r.cost.measured and min(r.shape) < cost.LARGE for r in self.rows):
            lines.append(f"predictions are for widths from {cost.LARGE} on: narrower layers gain less than they say")
        if self.device.type == "cpu":
            lines.append("on this CPU every sparse layer runs by masked dense matmuls: right, and slower than dense")
        return lines


def _write(path: str, text: str) -> None:
    Path(path).write_text(text, encoding="utf-8")


def explain(
    model: nn.Module, *args: Any, options: Mapping[str, Any] | None = None, gpu: str = "H200", **kwargs: Any
) -> Report:
    """What `torch.compile(model, backend="sparse24", options=options)` does for `model(*args, **kwargs)`.

    model: an nn.Module or its compiled wrapper, on any device; on "meta" a model needs no memory. args, kwargs: the
    inputs of its forward, as in training. options: of the backend; by default those that the model was compiled with.
    gpu: whose rates predict times where nothing can be measured; one of `sparse24.kernels.cost.GPUS`.

    On a GPU with sparse tensor cores, the layers that could be sparse are measured, as compiling measures them. The
    model, its session, Dynamo's caches and the random generators are left as they are; its forward hooks run, on
    tensors without data. A forward that needs data (a branch on a tensor's value) runs on a copy of the model instead.
    strict=True does not raise here: the rows hold the reasons.

    Raises TypeError for what is not an nn.Module, OptionError on a bad option, ValueError for an unknown gpu, and what
    the model's own forward raises.
    """
    held = session(model)
    known = list(held.weights.values())
    recipe = known[0].recipe if options is None and known else Recipe.from_options(options)
    rates = cost.gpu_named(gpu)
    with _same_draws(held.model), _traced(held.model, (args, kwargs), recipe) as trace:
        rows = _traced_rows(trace, rates)
        rows |= _missing_rows(held.model, trace, rows)
        order = {name: i for i, (name, _) in enumerate(held.model.named_parameters())}
        return Report(
            rows=tuple(sorted(rows.values(), key=lambda row: order.get(row.name, len(order)))),
            recipe=recipe,
            device=trace.device,
            gpu=gpu,
            other_ms=_other_ms(trace, held.model, rates),
            graphs={"original": [x.original for x in trace.graphs], "sparse": [_rewritten(x) for x in trace.graphs]},
        )


# -------------------------------------------------------------------------------------------------------------- tracing


@dataclass(frozen=True, slots=True)
class _Graph:
    """One graph of Dynamo's, tidied, its linears, and names and tensors of the placeholders that are parameters."""

    original: GraphModule
    tidied: GraphModule
    linears: list[Linear]
    inputs: dict[str, tuple[str, Tensor]]


class _Trace:
    """A copy of a model, and what Dynamo makes of it."""

    def __init__(self, model: nn.Module, inputs: Inputs, recipe: Recipe, data: bool) -> None:
        self.recipe, self.flops = recipe, 0
        self.inputs = inputs if data else tree_map_only(Tensor, _meta, inputs)
        self.graphs: list[_Graph] = []
        devices = {p.device for p in model.parameters() if p.device.type != "meta"}
        here = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        self.device = next(iter(devices), here)
        kind = self.device.type  # autocast does not reach "meta"
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        memo: dict[int, Any] = {} if data else _without_data(model)
        self.copy = plain_copy(model, memo)
        self._originals = {
            id(memo[id(p)]): (name, _stand_in(p, self.device) if p.device.type == "meta" else p)
            for name, p in model.named_parameters()
            if id(p) in memo
        }

    def backend(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """What torch.compile is given: notes the graph and runs it as it is."""
        names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
        given = dict(zip(names, example_inputs, strict=True))
        inputs = {n: self._originals[id(x)] for n, x in given.items() if id(x) in self._originals}

        def weight_of(name: str) -> Any:
            return inputs[name][1] if name in inputs else given[name]

        tidied, linears = read(gm, weight_of, self.recipe, self.autocast)
        self.graphs.append(_Graph(gm, tidied, linears, inputs))

        def run(*args: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = gm(*args)
            self.flops += counter.get_total_flops()
            return result

        return run

    def run(self) -> None:
        args, kwargs = self.inputs
        with _no_traces_left(self.backend):
            torch.compile(self.copy, backend=self.backend, dynamic=False)(*args, **kwargs)

    def called(self) -> set[str]:
        """Names of the parameters that a forward computes with, seen in a run without torch.compile."""
        with _Seen() as seen:
            self.copy(*self.inputs[0], **self.inputs[1])
        return {name for i, (name, _) in self._originals.items() if i in seen.ids}

    def close(self) -> None:
        """Let go of everything: Dynamo keeps a backend for as long as the process runs."""
        vars(self).clear()


class _Seen(TorchFunctionMode):
    """Notes the parameters that functions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # reading .dtype or .shape computes nothing
            self.ids |= {id(x) for x in (*args, *(kwargs or {}).values()) if isinstance(x, nn.Parameter)}
        return func(*args, **(kwargs or {}))


@contextmanager
def _traced(model: nn.Module, inputs: Inputs, recipe: Recipe) -> Iterator[_Trace]:
    """A trace without data; where the forward needs data and the model has it, one with a copy of them."""
    trace = _Trace(model, inputs, recipe, data=False)
    try:
        try:
            trace.run()
        except Exception as error:
            if any(p.device.type == "meta" for p in model.parameters()):
                raise
            log.info("sparse24: the forward does not run without data, a copy is made: %s", error)
            trace.close()
            trace = _Trace(model, inputs, recipe, data=True)
            trace.run()
        yield trace
    finally:
        trace.close()


def _meta(t: Tensor) -> Tensor:
    new = torch.empty_like(t.detach(), device="meta")
    if isinstance(t, nn.Parameter):
        return nn.Parameter(new, requires_grad=t.requires_grad)
    return new.requires_grad_(t.requires_grad)


def _without_data(model: nn.Module) -> dict[int, Any]:
    """{id: its twin on "meta"} of a model's tensors, plain attributes included: what copy.deepcopy takes as memo."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for t in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(t, Tensor) and id(t) not in memo:
                memo[id(t)] = _meta(t)
    return memo


def _stand_in(param: Tensor, device: torch.device) -> Tensor:
    """A parameter of the same shape on `device`, in the memory of one entry."""
    return nn.Parameter(torch.zeros((), dtype=param.dtype, device=device).expand(param.shape), param.requires_grad)


@contextmanager
def _same_draws(model: nn.Module) -> Iterator[None]:
    """Put the random generators back: those of the devices that the model is on and those of the CPU."""
    state = random.getstate()
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)):
        yield
    random.setstate(state)


@contextmanager
def _no_traces_left(backend: Callable[..., Any]) -> Iterator[None]:
    """Strike what Dynamo compiles inside from its caches.

    A struck entry stays in the list of its code object; one that is of other objects than any frame's is not counted
    as a recompilation.
    """
    struck: Any = DeletedGuardManagerWrapper("sparse24.explain")
    struck.id_matched_objs = {"": weakref.ref(explain)}
    codes: set[CodeType] = set()
    limits = {"recompile_limit": 1 << 30, "accumulated_recompile_limit": 1 << 30}
    hook = register_bytecode_hook(lambda code, _: codes.add(code))
    sizes = copy.deepcopy(pgo.get_code_state())
    try:
        with torch._dynamo.config.patch(limits):
            yield
    finally:
        pgo._CODE_STATE = sizes  # the sizes seen: another one would make the user's graph dynamic
        hook.remove()
        for code in codes:
            for entry in _debug_get_cache_entry_list(code):
                if getattr(entry.backend, "compiler_fn", entry.backend) == backend:
                    extra: Any = entry.guard_manager.extra_state
                    extra.invalidate(entry, struck)


# ------------------------------------------------------------------------------------------------------- what was found


def _traced_rows(trace: _Trace, rates: cost.Gpu) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for i, graph in enumerate(trace.graphs):
        last = not any(later.linears for later in trace.graphs[i + 1 :])
        roles, groups = _roles(graph, last), _groups(graph)
        for linear in graph.linears:
            name, param = graph.inputs.get(linear.weight, (linear.name, None))
            if name in rows and rows[name].sparse:
                continue  # as in the registry: a weight that one graph makes sparse is sparse
            together = groups.get(linear, (linear,))
            size = 2 * layout.numel(*_shape(linear), linear.dtype) * linear.dtype.itemsize
            rows[name] = Row(
                name=name,
                shape=_shape(linear),
                role=roles.get(linear, linear.role),
                reason=linear.reason,
                tokens=linear.tokens,
                dtype=linear.dtype,
                together=tuple(graph.inputs[m.weight][0] for m in together) if linear in groups else (name,),
                cost=_cost(linear, together, param, trace.recipe, rates),
                dense_bytes=param.nbytes if param is not None else 0,
                packed_bytes=0 if linear.reason else size,
            )
    return rows


def _shape(linear: Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def _roles(graph: _Graph, last: bool) -> dict[Linear, str]:
    """The roles that the passes do not tell apart: gate_up, both in one weight; head, with no linear behind it."""
    by_path = {region.path: region for region in g.regions(graph.tidied)}
    forms = [form for region in by_path.values() for node in region.module.graph.nodes if (form := match(node))]
    both = {form.linears[0] for form in forms if form.kind in GATED_KINDS and len(form.linears) == 1}
    roles = {}
    for linear in graph.linears:
        node = by_path[linear.path].node(linear.node)
        if node in both:
            roles[linear] = "gate_up"
        elif last and linear.role == "linear" and not linear.path and g.linear_args(node):
            behind = g.walk_forward(node, lambda _: False)
            if not any(g.linear_args(n) or g.product_of(n) for n in behind):
                roles[linear] = "head"
    return roles


def _groups(graph: _Graph) -> dict[Linear, tuple[Linear, ...]]:
    """For each linear that is sparse, or dense by measurement, those that it is one matmul with."""
    candidates = [x for x in graph.linears if x.reason is None or x.reason.startswith(weights.SLOWER)]
    return {linear: group.linears for group in groups_of(graph.tidied, candidates) for linear in group.linears}


def _cost(
    linear: Linear, together: Sequence[Linear], param: Tensor | None, recipe: Recipe, rates: cost.Gpu
) -> Cost | None:
    """The linear's part of what the matmul that it stands in costs; None where that cannot be told."""
    if not linear.tokens or not linear.in_features or param is None:
        return None
    rows, cols = sum(m.out_features for m in together), linear.in_features
    candidate = linear.reason is None or linear.reason.startswith(weights.SLOWER)
    if candidate and param.device.type == "cuda" and why_slow(rows, cols, linear.dtype, param.device) is None:
        found = cost.measured(rows, cols, linear.tokens, linear.dtype, param.dtype, param.device, recipe.wgrad)
    else:
        found = cost.predicted(rows, cols, linear.tokens, param.dtype, rates, recipe.wgrad)
    part = linear.out_features / rows
    return replace(found, dense=found.dense.share(part), sparse=found.sparse.share(part))


def _rewritten(graph: _Graph) -> GraphModule:
    """The graph with its sparse ops; the operands that come in beside its inputs are examples without data."""
    gm = copy_of(graph.tidied)
    groups = rewrite(gm, [linear for linear in graph.linears if linear.reason is None])
    examples = {SEEDS: torch.zeros(len(groups), dtype=torch.int64, device="meta")}
    for i, group in enumerate(groups):
        rows, cols = sum(x.out_features for x in group.linears), group.linears[0].in_features
        size = layout.numel(rows, cols, group.dtype)
        examples |= {name: torch.empty(size, dtype=group.dtype, device="meta") for name in operand_names(i)}
    for node in gm.graph.find_nodes(op="placeholder"):
        if node.name in examples:
            node.meta["example_value"] = examples[node.name]
    return gm


def _missing_rows(model: nn.Module, trace: _Trace, known: Mapping[str, Row]) -> dict[str, Row]:
    """Rows of the linears that no graph holds."""
    names = {id(p): name for name, p in model.named_parameters()}
    missing: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            name = names.get(id(weight), f"{path}.weight")
            if name not in known:
                missing[name] = tuple(weight.shape)[:: 1 if isinstance(module, nn.Linear) else -1], weight
    called = trace.called() if missing else set()
    rows = {}
    for name, (shape, weight) in missing.items():
        reason = NOT_TRACED if name in called else NOT_CALLED
        rows[name] = Row(name, shape, "linear", reason, 0, weight.dtype, (name,), None, weight.nbytes, 0)
    return rows


def _other_ms(trace: _Trace, model: nn.Module, rates: cost.Gpu) -> float:
    """Predicted: the operations that are no linear's, backward as twice the forward, at the rate of dense matmuls; and
    a fused AdamW, which moves seven times the bytes of the parameters.
    """
    linears = [linear for graph in trace.graphs for linear in graph.linears]
    flops = trace.flops - sum(2 * x.tokens * x.in_features * x.out_features for x in linears)
    moved = 7 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return 3 * max(0, flops) / (rates.dense * 1e9) + moved / (rates.memory * 1e9)
