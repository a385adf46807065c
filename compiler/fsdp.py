"""FSDP2 (`fully_shard`): the parameter that a graph sees is gathered for a forward; what trains is its shard.

Every rank holds the mask and the packed forms of the whole weight, made from what a forward gathers: the same on all.
The masked decay runs on the shard that a rank trains.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..kernels import layout

try:
    from torch.distributed._composable_state import _module_state_mapping as _states
except ImportError:  # a build of torch without torch.distributed
    _states = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Shard:
    """param: the DTensor that the optimizer holds. first: the row of the whole weight that it begins with."""

    param: Any
    first: int

    @property
    def local(self) -> Tensor:
        """This rank's rows."""
        found: Tensor = self.param._local_tensor.detach()
        return found

    @property
    def grad(self) -> Tensor | None:
        """The gradient of this rank's rows."""
        grad = self.param.grad
        return None if grad is None else grad._local_tensor

    def unfit(self) -> str | None:
        """Why this weight cannot be sparse, None where it can."""
        placements = self.param.placements
        if len(placements) != 1 or not placements[0].is_shard(0):
            return f"FSDP places it as {placements}, need whole rows on each rank of one dimension of the mesh"
        rows, ranks = self.param.shape[0], self.param.device_mesh.size()
        if rows % (layout.TILE * ranks):
            return f"FSDP shards its {rows} rows over {ranks} ranks, need a multiple of {layout.TILE} on each"
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
                    return _shard(known.sharded_param)
    return None


def _shard(sharded: nn.Parameter) -> Shard:
    from torch.distributed.tensor import DTensor

    assert isinstance(sharded, DTensor)
    rank = sharded.device_mesh.get_local_rank() if sharded.device_mesh.ndim == 1 else 0
    return Shard(sharded, rank * (-(-sharded.shape[0] // sharded.device_mesh.size())))
