"""explain: what the backend would do to a model, and what that would gain, without training it.

The model's forward is traced by Dynamo on a copy that has no data (device "meta"), so that neither memory nor a GPU is
needed; the graphs are read as `backend` reads them, for the weights of the model itself.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..kernels import cost, layout
from ..kernels.cost import Cost
from ..kernels.gain import Layer
from ..kernels.providers import why_slow
from ..passes import graph as g
from ..passes.activation import GATED_KINDS, match
from ..passes.find import Linear
from ..passes.graph import copy_of
from ..passes.rewrite import SEEDS, Group, groups_of, operand_names, rewrite
from . import weights
from .capture import Capture, Graph, captured, same_draws
from .errors import OptionError
from .recipe import Recipe
from .report import Report, Row
from .session import session

NOT_CALLED = "not called with these arguments"
NOT_TRACED = "called outside of the graphs that torch.compile captures"


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

    Of a model in DistributedDataParallel it is the one inside; one that is sharded by FSDP has to come before sharding.

    Raises TypeError for what is not an nn.Module or is sharded, OptionError on a bad option, ValueError for an unknown
    gpu, and what the model's own forward raises.
    """
    held = session(model)
    if isinstance(held.model, nn.parallel.DistributedDataParallel):
        held = session(held.model.module)
    _check_whole(held.model)
    known = list(held.weights.values())
    recipe = known[0].recipe if options is None and known else Recipe.from_options(options)
    if recipe.recipe != "fst":
        raise OptionError(f"sparse24: found recipe={recipe.recipe!r}, which explain has no costs for, need 'fst'")
    rates = cost.gpu_named(gpu)
    with same_draws(held.model), captured(held.model, (args, kwargs), recipe) as capture:
        rows = _traced_rows(capture, rates)
        rows |= _missing_rows(held.model, capture, rows)
        order = {name: i for i, (name, _) in enumerate(held.model.named_parameters())}
        graphs = {"original": [x.original for x in capture.graphs], "sparse": [_rewritten(x) for x in capture.graphs]}
        return Report(
            rows=tuple(sorted(rows.values(), key=lambda row: order.get(row.name, len(order)))),
            recipe=recipe,
            device=capture.device,
            gpu=gpu,
            other_ms=_other_ms(capture, held.model, rates),
            graphs=graphs,
        )


def _check_whole(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(c.__name__ in ("FSDPModule", "FullyShardedDataParallel") for c in type(module).__mro__):
            raise TypeError(
                f"sparse24: found {name or 'the model'} sharded by FSDP, which cannot be copied; need the whole model: "
                'call explain before sharding it, or on one that is made under torch.device("meta")'
            )


# ------------------------------------------------------------------------------------------------------- what was found


def _traced_rows(capture: Capture, rates: cost.Gpu) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for i, graph in enumerate(capture.graphs):
        last = not any(later.linears for later in capture.graphs[i + 1 :])
        roles, groups = _roles(graph, last), _groups(graph)
        for linear in graph.linears:
            name, param = graph.inputs.get(linear.weight, (linear.name, None))
            if name in rows and rows[name].sparse:
                continue  # as in the registry: a weight that one graph makes sparse is sparse
            group = groups.get(linear, Group((linear,), None))
            size = 2 * layout.numel(*_shape(linear), linear.dtype) * linear.dtype.itemsize
            rows[name] = Row(
                name=name,
                shape=_shape(linear),
                role=roles.get(linear, linear.role),
                reason=linear.reason,
                tokens=linear.tokens,
                dtype=linear.dtype,
                together=tuple(graph.inputs[m.weight][0] for m in group.linears) if linear in groups else (name,),
                cost=_cost(linear, group, param, capture.recipe, rates),
                dense_bytes=param.nbytes if param is not None else 0,
                packed_bytes=0 if linear.reason else size,
            )
    return rows


def _shape(linear: Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def _roles(graph: Graph, last: bool) -> dict[Linear, str]:
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


def _groups(graph: Graph) -> dict[Linear, Group]:
    """For each linear that is sparse, or dense by measurement, the matmul that it is part of."""
    candidates = [x for x in graph.linears if x.reason is None or x.reason.startswith(weights.SLOWER)]
    return {linear: group for group in groups_of(graph.tidied, candidates) for linear in group.linears}


def _cost(linear: Linear, group: Group, param: Tensor | None, recipe: Recipe, rates: cost.Gpu) -> Cost | None:
    """The linear's part of what the matmul that it stands in costs; None where that cannot be told."""
    if not linear.tokens or not linear.in_features or param is None:
        return None
    rows, cols = sum(m.out_features for m in group.linears), linear.in_features
    candidate = linear.reason is None or linear.reason.startswith(weights.SLOWER)
    if candidate and param.device.type == "cuda" and why_slow(rows, cols, linear.dtype, param.device) is None:
        of = rows, cols, linear.tokens, linear.dtype, param.dtype, param.device
        found = cost.measured(Layer(*of, recipe.wgrad_of(linear.role), group.kind, linear.bias))
    else:
        found = cost.predicted(rows, cols, linear.tokens, param.dtype, rates, recipe.wgrad_of(linear.role))
    part = linear.out_features / rows
    return replace(found, dense=found.dense.share(part), sparse=found.sparse.share(part))


def _rewritten(graph: Graph) -> GraphModule:
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


def _missing_rows(model: nn.Module, capture: Capture, known: Mapping[str, Row]) -> dict[str, Row]:
    """Rows of the linears that no graph holds."""
    names = {id(p): name for name, p in model.named_parameters()}
    missing: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            name = names.get(id(weight), f"{path}.weight")
            if name not in known:
                missing[name] = tuple(weight.shape)[:: 1 if isinstance(module, nn.Linear) else -1], weight
    called = capture.called() if missing else set()
    rows = {}
    for name, (shape, weight) in missing.items():
        reason = NOT_TRACED if name in called else NOT_CALLED
        rows[name] = Row(name, shape, "linear", reason, 0, weight.dtype, (name,), None, weight.nbytes, 0)
    return rows


def _other_ms(capture: Capture, model: nn.Module, rates: cost.Gpu) -> float:
    """Predicted: the operations that are no linear's, backward as twice the forward, at the rate of dense matmuls; and
    a fused AdamW, which moves seven times the bytes of the parameters.
    """
    linears = [linear for graph in capture.graphs for linear in graph.linears]
    flops = capture.flops - sum(2 * x.tokens * x.in_features * x.out_features for x in linears)
    moved = 7 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return 3 * max(0, flops) / (rates.dense * 1e9) + moved / (rates.memory * 1e9)
