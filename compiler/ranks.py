"""Data-parallel ranks train one model: a check that they still do."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import RankError
from .weights import SparseWeight

_CHUNK = 1 << 22  # entries hashed at a time: as int64 they take eight bytes each


def _bits(x: Tensor) -> Tensor:
    """int64 scalar: a hash of a tensor's bits and of where they stand."""
    flat = x.detach().contiguous().view(-1)
    flat = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start, start + len(part), device=x.device)
        total += ((part + 1) * (place * 0x5851F42D4C957F2D + 0x14057B7EF767814F)).sum()  # modulo 2^64
    return total


def _about(weight: SparseWeight) -> dict[str, Any]:
    return {
        "reason it stays dense": weight.reason_skipped,
        "optimizer step": weight.step,
        "phase": weight.phase,
        "wgrad": weight.wgrad,
        **weight.recipe.method(),
    }


def check_ranks(weights: Mapping[str, SparseWeight], group: "dist.ProcessGroup | None" = None) -> None:
    """Raise RankError, on every rank of the group, where a sparse weight, its mask or an option differs between ranks.

    The error names the first parameter that differs. A collective: all ranks of the group call it at the same place,
    between steps. It moves 16 bytes a sparse weight and a small object a rank, and reads each once.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, {name: _about(weight) for name, weight in weights.items()}, group=group)
    for rank, other in enumerate(gathered):
        _compare(gathered[0], other, rank)
    trained = {name: weight for name, weight in weights.items() if weight.reason_skipped is None}
    if not trained:
        return
    rows = []
    for weight in trained.values():
        nibbles = weight._nibbles()
        nothing = torch.zeros((), dtype=torch.int64, device=weight.param.device)
        own = _bits(weight.param) if weight.shard is None else nothing  # of FSDP each rank has its own rows
        rows.append(torch.stack([own, nothing if nibbles is None else _bits(nibbles)]))
    device = rows[0].device
    found = torch.stack([row.to(device) for row in rows])
    everyone = [torch.empty_like(found) for _ in gathered]
    dist.all_gather(everyone, found, group=group)
    for rank, other in enumerate(everyone):
        different = (other != everyone[0]).nonzero().tolist()
        if different:
            at, what = different[0]
            name, kind = list(trained)[at], ("weight", "mask")[what]
            raise RankError(
                f"sparse24: found another {kind} of {name} on rank {rank} than on rank 0, need the same on all; go on "
                "from the last checkpoint, and look for what only some ranks do (loading, initialization, a skipped "
                "step)"
            )


def _compare(first: dict[str, Any], other: dict[str, Any], rank: int) -> None:
    if list(first) != list(other):
        only = next(iter(set(first) ^ set(other)), None)
        what = f"{only} on some ranks only" if only else f"another order of weights on rank {rank} than on rank 0"
        raise RankError(f"sparse24: found {what}, need the same model and options on all ranks")
    for name, about in first.items():
        for key, value in about.items():
            if other[name][key] != value:
                raise RankError(
                    f"sparse24: found {key} of {name} as {other[name][key]!r} on rank {rank} and {value!r} on rank 0, "
                    "need the same on all ranks: compile with the same options, and load the same state"
                )
