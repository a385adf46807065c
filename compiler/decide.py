"""Which linears of a graph become sparse: those that can be, are wanted, and gain."""

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..kernels import ahead, providers
from ..kernels.gain import Layer, gain, matmuls
from ..passes.find import Linear, find_linears
from ..passes.graph import copy_of
from ..passes.parallel import is_dtensor
from ..passes.rewrite import groups_of
from ..passes.tidy import tidy
from . import fsdp, inference, weights
from .ranks import first_of
from .recipe import Recipe

log = logging.getLogger("sparse24")


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
