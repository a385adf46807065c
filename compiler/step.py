"""What happens around an optimizer step, through torch's global optimizer hooks: no change to a training loop.

Before it: masked decay on the gradients of its sparse weights, and their learning rate (`rates`). After it: new values
for the packed forms, and at the refresh interval new masks, or a count of flips alone where no mask is held fixed (in
the dense phase, and S-STE's). A step that a GradScaler skips, or a weight that got no gradient, changes nothing.
"""

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..kernels import layout, ops
from . import flips, rates, shards, weights
from .operands import check_stats, pack
from .weights import SparseWeight

log = logging.getLogger("sparse24")

_stepping: Any = weakref.WeakKeyDictionary()  # optimizer -> its weights that got a gradient
_judged: Any = weakref.WeakSet()  # optimizers whose kind was looked at
_inside: Any = weakref.WeakSet()  # optimizers held by one whose step is under way


class _Deferred:
    """Counts of NaN on their way from a GPU: looked at before the next step, so that no step waits for them."""

    def __init__(self, stepped: list[SparseWeight], stats: torch.Tensor) -> None:
        self.weights, self.steps = stepped, [w.step for w in stepped]
        self.host = torch.empty(stats.shape, dtype=stats.dtype, device="cpu", pin_memory=True)
        self.host.copy_(stats, non_blocking=True)
        self.done = torch.cuda.Event()
        self.done.record()

    def check(self) -> None:
        self.done.synchronize()
        for weight, step, row in zip(self.weights, self.steps, self.host.tolist(), strict=True):
            check_stats([weight], [row], step)


_deferred: list[_Deferred] = []


def _weights_of(optimizer: Optimizer) -> list[tuple[SparseWeight, dict[str, Any]]]:
    """Registered weights of an optimizer that have a gradient, with their parameter group."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                weight = weights.get(param)
                if weight is not None and weight.reason_skipped is None and not weight.pruned:
                    found.append((weight, group))
    return found


def _several(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else (value,)


def _held(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that one steps by, as ZeroRedundancyOptimizer does: attributes of it, alone or in a list, tuple or
    dict, with parameters of its own groups. Its step is the one that counts.
    """
    attributes = [value for name, value in vars(optimizer).items() if name != "state"]  # which has one a parameter
    found = [held for value in attributes for held in _several(value) if isinstance(held, Optimizer)]
    if not found:
        return found
    own = {id(param) for group in optimizer.param_groups for param in group["params"]}
    return [held for held in found if any(id(p) in own for group in held.param_groups for p in group["params"])]


def _skipped(optimizer: Optimizer) -> bool:
    """A fused optimizer under a GradScaler is called even where it will skip the step; it then carries `found_inf`."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())


def _decay(optimizer: Optimizer) -> None:
    stepping = _weights_of(optimizer)
    if stepping and _skipped(optimizer):
        stepping = []
    _stepping[optimizer] = [weight for weight, _ in stepping]
    flips.begin(_stepping[optimizer])
    scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer unscales inside its kernel
    alike: dict[tuple[torch.device, float], list[tuple[torch.Tensor, layout.Block]]] = {}
    for weight, group in stepping:
        decay = weight.recipe.decay
        if not decay or not weight.sparse or not weight.operands:
            continue
        block = next(iter(weight.operands.values())).trained_block(weight)
        grad = weight.master.grad
        assert grad is not None
        grad = shards.local(grad)
        on, factor = grad, decay
        if weight.recipe.decay_on == "weight":
            on, factor = block.w, -float(group["lr"]) * rates.scale_of(weight) * decay
        if on is grad and scale is not None:
            factor *= float(scale)
        alike.setdefault((weight.param.device, factor), []).append((on.detach(), block))
    for (_, factor), pairs in alike.items():
        ops.masked_decay_([on for on, _ in pairs], [block for _, block in pairs], factor)
    if not _held(optimizer):
        rates.split(optimizer, _stepping[optimizer])


@torch.compiler.disable  # type: ignore[untyped-decorator]  # where the step is compiled, Dynamo would trace into it
def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    rates.restore(optimizer)  # where the step before raised
    if optimizer in _inside:
        rates.split(optimizer, [weight for weight, _ in _weights_of(optimizer)])
        return None
    _inside.update(_held(optimizer))
    waiting, _deferred[:] = list(_deferred), []  # taken first: a caught error must not come again at the next step
    for counts in waiting:
        counts.check()
    closure = kwargs.get("closure") if "closure" in kwargs else (args[1] if len(args) > 1 else None)
    if not callable(closure):
        _decay(optimizer)
        return None

    def closure_then_decay() -> Any:
        loss = closure()
        _decay(optimizer)
        return loss

    wrapped: Callable[[], Any] = closure_then_decay
    if "closure" in kwargs:
        return args, {**kwargs, "closure": wrapped}
    return (args[0], wrapped, *args[2:]), kwargs


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    rates.restore(optimizer)
    if optimizer in _inside:
        return
    _inside.difference_update(_held(optimizer))
    stepped: list[SparseWeight] = _stepping.pop(optimizer, [])
    if not stepped:
        return
    if optimizer not in _judged:
        _judge(optimizer, stepped)
    due: dict[tuple[torch.device, bool, bool], list[SparseWeight]] = {}
    for weight in stepped:
        weight.advance()
        if weight.shard is not None:
            weight.search_due |= weight.refresh_due
        elif weight.sparse and weight.operands:
            search = weight.refresh_due and not weight.soft
            due.setdefault((weight.param.device, search, weight.soft), []).append(weight)
    packed = [(device, search, members, pack(members, search)) for (device, search, _), members in due.items()]
    for device, search, members, stats in packed:
        if device.type == "cuda" and not search:
            with torch.cuda.device(device):
                _deferred.append(_Deferred(members, stats))
            continue
        rows = stats.tolist()
        check_stats(members, rows)
        if search:
            for weight, (changed, _) in zip(members, rows, strict=True):
                weight.flips = changed
    refreshed = [weight for weight in stepped if weight.refresh_due and weight.shard is None]
    if refreshed:
        flips.count(refreshed)
        flips.watch(optimizer, refreshed)


def _judge(optimizer: Optimizer, stepped: list[SparseWeight]) -> None:
    """Warn once of optimizers without second moments: the decay's meaning rests on Adam's 1 / sqrt(v)."""
    _judged.add(optimizer)
    if _held(optimizer) or not any(w.sparse and w.recipe.decay and w.recipe.decay_on == "gradient" for w in stepped):
        return
    state = optimizer.state.get(stepped[0].master, {})
    second = ("sq", "var", "sum", "inf", "second")
    if not any(any(mark in str(key) for mark in second) or key == "v" for key in state):
        log.warning(
            "sparse24: found the optimizer %s without second moments; the masked decay is meant for Adam-like ones, "
            "which divide it by sqrt(v). Search decay for this optimizer anew, or use decay_on='weight'",
            type(optimizer).__name__,
        )


register_optimizer_step_pre_hook(_before)
register_optimizer_step_post_hook(_after)
