"""Does the cuSPARSELt beside PyTorch read the bytes that `layout` writes? NVIDIA calls the packed form internal."""

import logging
from functools import lru_cache

import torch
from torch import Tensor

from . import layout

log = logging.getLogger("sparse24")


@lru_cache(maxsize=64)
def check(device: torch.device) -> str | None:
    """None where the library packs a small matrix into the known bytes, else what differs. Once a process, some ms.

    Also None where nothing can be compared: on the CPU, on GPUs without a known format, and where PyTorch has no
    compressor (then only the products tell, which `choice` checks).
    """
    order = layout.arch(device)
    if device.type != "cuda" or order is None:
        return None
    rows, cols = 2 * layout.ROW_BLOCK[order], 192
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(rows, cols // 4, 4, generator=generator).argsort(-1) < 2).view(rows, cols)
    dense = torch.randint(1, 100, (rows, cols), generator=generator) * mask
    for dtype in (torch.bfloat16, torch.float16):
        ours = layout.pack(dense.to(dtype), mask, order)
        try:
            theirs = compress(dense.to(device, dtype)).cpu()
        except RuntimeError as error:
            log.info("sparse24: the packed format on %s could not be compared: %s", device, error)
            return None
        if theirs.shape != ours.shape or not torch.equal(theirs.view(torch.int16), ours.view(torch.int16)):
            reason = f"it packs {str(dtype).removeprefix('torch.')} in another order than the known one ({order})"
            log.warning("sparse24: cuSPARSELt on %s: %s; its own compressor serves, which is slower", device, reason)
            return reason
    return None


def compress(dense: Tensor) -> Tensor:
    """A 2:4 matrix [rows, cols] in the form that the library itself reads."""
    return torch._cslt_compress(dense).flatten()


def readable(packed: Tensor, rows: int, cols: int) -> Tensor:
    """The packed form of a [rows, cols] matrix as the library reads it, with room behind it: the same bytes where it
    passed `check`, and the same memory where that has room.
    """
    if check(packed.device) is not None:
        packed = compress(layout.unpack(packed, rows, cols, layout.metadata_order(packed.device)))
    return layout.with_room(packed, rows, cols)
