"""`Recipe.lr_scale`: during an optimizer's step its sparse weights stand in parameter groups of their own.

A copy of their group with another learning rate. Before and after the step the optimizer's groups are its own, so that
schedulers, loggers and checkpoints see nothing of it.
"""

import weakref
from collections.abc import Sequence
from typing import Any

from torch.optim.optimizer import Optimizer

from .weights import SparseWeight

_own: Any = weakref.WeakKeyDictionary()  # optimizer in a step -> its own groups, and [(group, a part of it)]
_guarded: Any = weakref.WeakSet()  # optimizers whose state_dict restores the groups first


def scale_of(weight: SparseWeight) -> float:
    """What the learning rate of a weight that takes part is multiplied by: 1.0 in a run that is never sparse."""
    return weight.recipe.lr_scale if weight.sparse or weight.recipe.dense_after != 0 else 1.0


def split(optimizer: Optimizer, stepping: Sequence[SparseWeight]) -> None:
    """Part the groups of an optimizer that is about to step these weights; `restore` ends it."""
    scales = {id(weight.master): scale for weight in stepping if (scale := scale_of(weight)) != 1.0}
    if not scales:
        return
    parts: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for group in optimizer.param_groups:
        alike: dict[float, list[Any]] = {}
        for param in group["params"]:
            alike.setdefault(scales.get(id(param), 1.0), []).append(param)
        if alike.keys() <= {1.0}:
            parts.append((group, group))
        else:
            parts += [(group, {**group, "params": p, "lr": group["lr"] * scale}) for scale, p in alike.items()]
    if optimizer not in _guarded:  # a step that raises ends without hooks; what is saved then is whole too
        _guarded.add(optimizer)
        optimizer.register_state_dict_pre_hook(restore)
    _own[optimizer] = optimizer.param_groups, parts
    optimizer.param_groups = [part for _, part in parts]


def restore(optimizer: Optimizer) -> None:
    """Give an optimizer its own groups back, with what the step wrote into their parts (a counter, for instance)."""
    if optimizer not in _own:
        return
    optimizer.param_groups, parts = _own.pop(optimizer)
    for group, part in parts:
        group.update({key: value for key, value in part.items() if key not in ("params", "lr")})
