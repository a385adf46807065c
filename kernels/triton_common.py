"""What the Triton kernels share: the nibble addresses, the counter-based uniform, the launch.

Every kernel is launched without FMA contraction: where something is decided (which mask, which lane) the order and the
rounding of each operation are those of `reference`, bit by bit.
"""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def nibble_address(m, c, rows, cols, ORDER: tl.constexpr):
    """Twin of `layout.nibble_address`: byte offset (int64) and bit shift of the nibble of group c in row m (ints >= 0)."""
    m, c = m.to(tl.uint32), c.to(tl.uint32)  # unsigned: divisions by powers of two become shifts
    if ORDER == "sm_90":
        byte = (m // 64).to(tl.int64) * (8 * cols) + ((m % 64) // 16 * 64 + m % 8 * 8)
        byte += (c // 8).to(tl.int64) * 256 + (c % 4 * 2 + c % 8 // 4)
        shift = m % 16 // 8 * 4 + 0 * c
    else:
        byte = (m // 128).to(tl.int64) * 1024 + (m % 128 // 32 * 128 + m % 8 * 16 + m % 32 // 16 * 8 + m % 16 // 8 * 2)
        byte += (c // 16).to(tl.int64) * (1024 * (rows // 128)) + (c % 16 // 8 * 512 + c % 8 // 4 * 4 + c % 4 // 2)
        shift = c % 2 * 4 + 0 * m
    return byte, shift.to(tl.int32)


@triton.jit
def metadata_of(packed, rows, cols):
    """Pointer to the metadata (uint8) of the packed form of a [rows, cols] matrix."""
    return (packed + rows.to(tl.int64) * (cols // 2)).to(tl.pointer_type(tl.uint8))


@triton.jit
def load_kept(metadata, m, c, rows, cols, ORDER: tl.constexpr):
    """int32: the four bits of group c in row m, bit l set where lane l is kept; m and c broadcast."""
    byte, shift = nibble_address(m, c, rows, cols, ORDER)
    nibble = (tl.load(metadata + byte).to(tl.int32) >> shift) & 15
    return (1 << (nibble & 3)) | (1 << (nibble >> 2))


@triton.jit
def store_nibbles(metadata, nibbles, m0, c0, rows, cols, ORDER: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """Write int32 nibbles [R, G], the first one that of group c0 in row m0 (multiples of 64 and 16, as R and G are).

    In both orders the eight nibbles of an aligned 32-bit word come from rows m, m + 8 and four of eight groups, so a tile
    writes whole words and no other program's bits.
    """
    n = tl.reshape(nibbles, [R // 16, 2, 8, G // 8, 2, 2, 2])  # m/16, m/8%2, m%8, c/8, c/4%2, c/2%2, c%2
    m8 = tl.reshape(tl.arange(0, 2), [1, 2, 1, 1, 1, 1, 1])
    c4 = tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 2, 1, 1])
    c2 = tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 1, 2, 1])
    c1 = tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 1, 1, 2])
    if ORDER == "sm_90":
        n = tl.permute(n << (16 * c1 + 8 * c4 + 4 * m8), (0, 2, 3, 5, 1, 4, 6))
        second: tl.constexpr = 2  # groups from one word to the next
    else:
        n = tl.permute(n << (16 * m8 + 8 * c2 + 4 * c1), (0, 2, 3, 4, 1, 5, 6))
        second: tl.constexpr = 4
    words = tl.sum(tl.reshape(n, [R // 16, 8, G // 8, 2, 8]), 4)
    m16 = tl.reshape(tl.arange(0, R // 16), [R // 16, 1, 1, 1])
    m1 = tl.reshape(tl.arange(0, 8), [1, 8, 1, 1])
    c8 = tl.reshape(tl.arange(0, G // 8), [1, 1, G // 8, 1])
    word = tl.reshape(tl.arange(0, 2), [1, 1, 1, 2])
    byte, _ = nibble_address(m0 + 16 * m16 + m1, c0 + 8 * c8 + second * word, rows, cols, ORDER)
    tl.store((metadata + byte).to(tl.pointer_type(tl.int32)), words)


@triton.jit
def store_values(packed, values, m0, v0, cols, R: tl.constexpr, V: tl.constexpr):
    """Write kept values [R, V] of rows m0.. at value columns v0.. of the packed form of a matrix of `cols` columns."""
    m = (m0 + tl.arange(0, R)).to(tl.int64)
    at = packed + m[:, None] * (cols // 2) + (v0 + tl.arange(0, V))[None, :]
    tl.store(at, values)


@triton.jit
def _mix32(h):
    h = tl.mul(h ^ (h >> 16), 0x7FEB352D, sanitize_overflow=False)
    h = tl.mul(h ^ (h >> 15), 0x846CA68B, sanitize_overflow=False)
    return h ^ (h >> 16)


@triton.jit
def uniform(seed, position):
    """Twin of `reference.uniform` at uint32 positions: fp32 in [0, 1). seed int64 scalar."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    h = _mix32(tl.add(_mix32(position ^ low), high, sanitize_overflow=False))
    return (h >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


def launch(kernel: Any, grid: tuple[int, int], device: torch.device, *args: Any, **constants: Any) -> None:
    """Run `kernel` on `device` (Triton itself launches on the current one); an empty grid is no launch."""
    if 0 in grid:
        return
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[grid](*args, **constants, enable_fp_fusion=False)


def check_dtypes(**tensors: Tensor | None) -> None:
    """Raise ValueError where a tensor is of a dtype that no kernel reads."""
    for name, x in tensors.items():
        if x is not None and x.dtype not in DTYPES:
            raise ValueError(f"sparse24: found {name} of {x.dtype}, need float32, bfloat16 or float16")


def check_matrix(rows: int, cols: int, order: str) -> None:
    """Raise ValueError where a [rows, cols] matrix has no packed form that the kernels write."""
    if rows % layout.ROW_BLOCK[order] or cols % layout.TILE:
        need = f"rows in multiples of {layout.ROW_BLOCK[order]} and columns of {layout.TILE}"
        raise ValueError(f"sparse24: found a {rows}x{cols} matrix, need {need} ({order})")


def check_packed(packed: Tensor, rows: int, cols: int) -> None:
    """Raise ValueError where `packed` is not the packed form of a [rows, cols] matrix, at an address for wide stores."""
    layout.split(packed, rows, cols)
    if packed.data_ptr() % 16:
        raise ValueError("sparse24: found a packed buffer at an odd address, need one aligned to 16 bytes")
