"""Ranks train one model: what they have to agree on, and checks that they do."""

import json
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import shards
from .errors import RankError
from .recipe import Recipe
from .weights import SparseWeight

log = logging.getLogger("sparse24")

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


def first_of(key: str, mine: str) -> str:
    """What the first rank that came by has given for a key; `mine` where this is it, or there are no others.

    It goes through the store that the ranks met at. Not a collective: no rank waits for another.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return mine
    try:
        return _store().compare_set(f"sparse24/{key}", "", mine).decode() or mine
    except RuntimeError as error:  # the fake backend's store cannot; a lost one ends the run elsewhere
        log.debug("sparse24: no store to agree at: %s", error)
        return mine


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def check_recipe(recipe: Recipe) -> None:
    """Raise RankError where the first recipe that this process compiles is another one than another rank's first."""
    global _compared
    if not (dist.is_available() and dist.is_initialized()) or _compared() is _store():
        return
    _compared = weakref.ref(_store())
    mine = {"rank": dist.get_rank(), **recipe.method()}
    first = json.loads(first_of("recipe", json.dumps(mine)))
    for name, value in json.loads(json.dumps(mine)).items():
        if name != "rank" and first.get(name) != value:
            raise RankError(
                f"sparse24: found option {name}={value!r} on rank {mine['rank']} and {first.get(name)!r} on rank "
                f"{first['rank']}, need the same on all ranks: compile with the same options"
            )


_compared: Callable[[], Any] = lambda: None  # noqa: E731  # the store at which recipes were compared


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

    The error names the first parameter that differs. Of a weight that ranks share out (tensor parallelism, FSDP) the
    ranks that hold the same part are compared. A collective: all ranks of the group call it at the same place, between
    steps. It moves 16 bytes a sparse weight and a small object a rank, and reads each once.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return
    trained = {name: weight for name, weight in weights.items() if weight.reason_skipped is None}
    places = {name: _places(weight) for name, weight in trained.items()}
    gathered: list[Any] = [None] * dist.get_world_size(group)
    mine = {name: _about(weight) for name, weight in weights.items()}, places
    dist.all_gather_object(gathered, mine, group=group)
    for rank, (other, _) in enumerate(gathered):
        _compare(gathered[0][0], other, rank)
    if not trained:
        return
    rows = []
    for weight in trained.values():
        nibbles = weight._nibbles()
        nothing = torch.zeros((), dtype=torch.int64, device=weight.param.device)
        own = weight.held if weight.shard is None else weight.shard.local
        rows.append(torch.stack([_bits(own).to(nothing.device), nothing if nibbles is None else _bits(nibbles)]))
    device = rows[0].device
    found = torch.stack([row.to(device) for row in rows])
    everyone = [torch.empty_like(found) for _ in gathered]
    dist.all_gather(everyone, found, group=group)
    numbers = [part.tolist() for part in everyone]
    for at, name in enumerate(trained):
        for what, kind in enumerate(("weight", "mask")):
            firsts: dict[Any, int] = {}  # of the ranks that hold one part, the first
            for rank, (_, held) in enumerate(gathered):
                first = firsts.setdefault(held[name][what], rank)
                if numbers[rank][at][what] != numbers[first][at][what]:
                    raise RankError(
                        f"sparse24: found another {kind} of {name} on rank {rank} than on rank {first}, need the same "
                        "on all; go on from the last checkpoint, and look for what only some ranks do (loading, "
                        "initialization, a skipped step)"
                    )


def _places(weight: SparseWeight) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which part this rank trains of a weight, and which part it multiplies by, whose mask it holds."""
    part = shards.position(weight.param)
    return (part if weight.shard is None else (*part, weight.shard.rank)), part


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
