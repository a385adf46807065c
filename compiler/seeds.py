"""The seed rule of the random draws: the same run draws the same, and no two layers, steps or ranks share a stream."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from . import shards
from .weights import SparseWeight

_MASK = (1 << 64) - 1


def _mix(h: int) -> int:
    """The finaliser of splitmix64: a bijection of 64-bit integers."""
    h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & _MASK
    return h ^ (h >> 31)


def _take(h: int, part: int) -> int:
    return _mix((h + (part & _MASK) * 0x9E3779B97F4A7C15 + 1) & _MASK)


@lru_cache(maxsize=16)  # all weights of a forward ask for the same
def _of_micro_step(seed: int, step: int, calls: int) -> int:
    return _take(_take(_take(0x9E3779B97F4A7C15, seed), step), calls)


def draw_seed(weight: SparseWeight) -> int:
    """A signed 64-bit seed: a function of (run seed, optimizer step, micro-step, layer, data-parallel rank) alone.

    Ranks that hold one weight together (tensor parallelism) count as one: a gradient that all have is pruned alike.
    It is apart from torch's generators, so dropout draws the same numbers with and without this backend.
    """
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    rank = shards.first_rank(weight.param) if weight.split else rank
    h = _take(_take(_of_micro_step(weight.recipe.seed, weight.step, weight.calls), weight.layer), rank)
    return h - (1 << 64) if h >> 63 else h


def seeds_on(seeds: Sequence[int], device: torch.device) -> Tensor:
    """int64 [n] on `device`, without waiting for it."""
    host = torch.tensor(seeds, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a tensor made in inference mode could not be used in training
def no_seeds(n: int, device: torch.device) -> Tensor:
    """int64 [n] on `device` where nothing is drawn: zeros, made once."""
    return torch.zeros(n, dtype=torch.int64, device=device)
