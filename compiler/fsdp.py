"""FSDP2 (`fully_shard`, `replicate`): the parameter that a graph sees is gathered for a forward; what trains is its
shard.

Every rank holds the mask and the packed forms of all that a forward gathers: the same on all ranks of the group. The
masked decay runs on the shard that a rank trains.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..kernels import layout

try:
    from torch.distributed._composable_state import _module_state_mapping as _states
except ImportError:  # a build of torch without torch.distributed
    _states = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Shard:
    """param: the DTensor that the optimizer holds. dim: which dimension FSDP shards. rows: of what a forward gathers,
    of a tensor-parallel weight this rank's part. rank, ranks: of those that share it out.
    """

    param: Any
    dim: int
    rows: int
    rank: int
    ranks: int

    @property
    def first(self) -> int:
        """The row of what a forward gathers that this shard begins with."""
        return self.rank * (-(-self.rows // self.ranks))

    @property
    def local(self) -> Tensor:
        """This rank's rows."""
        found: Tensor = self.param._local_tensor.detach()
        return found

    def unfit(self) -> str | None:
        """Why this weight cannot be sparse, None where it can."""
        if self.ranks > 1 and self.dim != 0:
            return f"FSDP shards its dimension {self.dim}, need whole rows on each rank"
        if self.rows % (layout.TILE * self.ranks):
            return f"FSDP shards its {self.rows} rows over {self.ranks} ranks, need a multiple of {layout.TILE} on each"
        return None


def shard_of(param: Tensor) -> Shard | None:
    """The shard of a parameter that FSDP2 gathers for a forward, None for any other.

    PyTorch keeps no public record of it: looked up in the states of the modules that are sharded.
    """
    for reference in list(_states.values()) if _states is not None else ():
        state: Any = reference()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for known in group.fsdp_params if group is not None else ():
                if getattr(known, "_unsharded_param", None) is param:
                    info = known.mesh_info
                    rank, ranks = getattr(info, "shard_mesh_rank", 0), getattr(info, "shard_mesh_size", 1)
                    return Shard(known.sharded_param, known.fsdp_placement.dim, known._orig_size[0], rank, ranks)
    return None
