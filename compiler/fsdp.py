"""FSDP2 (`fully_shard`): the parameter that a graph sees is gathered for a forward; what trains is its shard."""

from typing import Any

from torch import nn

try:
    from torch.distributed._composable_state import _module_state_mapping as _states
except ImportError:  # a build of torch without torch.distributed
    _states = None  # type: ignore[assignment]


def gathered(param: nn.Parameter) -> bool:
    """Whether FSDP2 gathers this parameter for a forward. PyTorch keeps no public record of it."""
    for reference in list(_states.values()) if _states is not None else ():
        state: Any = reference()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for known in group.fsdp_params if group is not None else ():
                if getattr(known, "_unsharded_param", None) is param:
                    return True
    return False
