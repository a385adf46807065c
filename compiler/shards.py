"""Tensor parallelism: a parameter that is a DTensor is masked, packed and decayed where it lies, by the part of it that
a rank holds.

The dimensions of a part are multiples of 64, so its 4x4 tiles are tiles of the whole, and the mask of the whole is the
masks of the parts put together.
"""

from functools import lru_cache
from typing import Any

from torch import Tensor

from ..passes.parallel import is_dtensor


def local(x: Tensor) -> Tensor:
    """What this rank holds of a parameter or of its gradient, detached: of an ordinary tensor everything."""
    held: Any = x
    found: Tensor = (held._local_tensor if is_dtensor(x) else held).detach()
    return found


def position(x: Any) -> tuple[int, ...]:
    """Which part of a parameter this rank holds: its place on each dimension of the mesh that shards it."""
    if not is_dtensor(x):
        return ()
    at = x.device_mesh.get_coordinate() or ()
    return tuple(i for i, placement in zip(at, x.placements, strict=True) if placement.is_shard())


def first_rank(x: Any) -> int:
    """The rank that stands for all that hold a DTensor together, the first of its mesh."""
    return _first_rank(x.device_mesh)


@lru_cache(maxsize=64)
def _first_rank(mesh: Any) -> int:
    return int(mesh.mesh.min())


def like(part: Tensor, x: Any) -> Tensor:
    """A part made of this rank's part of x, as the DTensor that x is."""
    if not is_dtensor(x):
        return part
    from torch.distributed.tensor import DTensor

    found: Tensor = DTensor.from_local(part, x.device_mesh, x.placements, run_check=False)
    return found


def gather(part: Tensor, x: Any) -> Tensor:
    """The whole of which each rank holds the part that it holds of x. A collective of the mesh where x is a DTensor."""
    return like(part, x).full_tensor() if is_dtensor(x) else part  # type: ignore[attr-defined]


def part_of(entire: Tensor, x: Any) -> Tensor:
    """The inverse of `gather`, without a collective."""
    if is_dtensor(x):
        at = x.device_mesh.get_coordinate() or ()
        for i, placement, ranks in zip(at, x.placements, x.device_mesh.shape, strict=True):
            if placement.is_shard():
                entire = entire.chunk(ranks, placement.dim)[i]
    return entire.contiguous()
