"""What the Triton kernels share: the nibble addresses, the pruning of a gradient and its uniforms, the launch.

Every kernel is launched without FMA contraction: where something is decided (which mask, which lane) the order and the
rounding of each operation are those of `reference`, bit by bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def nibble_address(m, c, rows, cols, ORDER: tl.constexpr):
    """Twin of `layout.nibble_address`: byte offset (int64) and bit shift (int32) of the nibble of group c in row m."""
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
def load_tile_masks(metadata, m, c0, rows, cols, ORDER: tl.constexpr, G: tl.constexpr):
    """int32 [R, G], bit 4 * i + l set where lane l of group c0 + g is kept in row m + i, i < 4. c0 a multiple of 8.

    Read by whole words of eight nibbles: so few loads that Triton gives them the layout of the values, and not the
    values that of the loads.
    """
    c8, a = tl.arange(0, G // 8)[None, :, None, None, None], tl.arange(0, 2)[None, None, :, None, None]
    b, k = tl.arange(0, 2)[None, None, None, :, None], tl.arange(0, 2)[None, None, None, None, :]
    first = c0 + 8 * c8 + (2 * b if ORDER == "sm_90" else 4 * a)  # of the word's groups
    mask = tl.zeros([m.shape[0], G], tl.int32)
    for i in tl.static_range(4):
        row = (m + i)[:, None, None, None, None]
        byte, _ = nibble_address(row, first, rows, cols, ORDER)
        words = tl.load((metadata + (byte & -4)).to(tl.pointer_type(tl.int32)))
        byte, shift = nibble_address(row, c0 + 8 * c8 + 4 * a + 2 * b + k, rows, cols, ORDER)
        nibble = (words >> ((byte & 3).to(tl.int32) * 8 + shift)) & 15
        kept = (1 << (nibble & 3)) | (1 << (nibble >> 2))
        mask |= tl.reshape(kept, [m.shape[0], G]) << (4 * i)
    return mask


@triton.jit
def store_nibbles(metadata, nibbles, m0, c0, rows, cols, ORDER: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """Write int32 nibbles [R, G], the first one that of group c0 in row m0 (multiples of 64 and 16, as R and G are).

    In both orders the eight nibbles of an aligned 32-bit word come from rows m, m + 8 and four of eight groups, so a
    tile writes whole words and no other program's bits.
    """
    n = tl.reshape(nibbles, [R // 16, 2, 8, G // 8, 2, 2, 2])  # m/16, m/8%2, m%8, c/8, c/4%2, c/2%2, c%2
    second: tl.constexpr = 2 if ORDER == "sm_90" else 4  # groups from one word to the next
    n = tl.permute(n, (0, 2, 3, 5, 6, 4, 1) if ORDER == "sm_90" else (0, 2, 3, 4, 1, 5, 6))
    # joined by splits and not by a sum: Triton 3.6 on a GPU adds up wrongly where a sum crosses warps in this layout
    low, high = tl.split(n)
    low, high = tl.split(low | high << 4)
    low, high = tl.split(low | high << 8)
    words = low | high << 16
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
    """Twin of `reference.uniform` at uint32 positions: fp32 in (0, 1). seed int64 scalar."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    first, second = _mix32(low ^ _mix32(high)), _mix32(tl.add(_mix32(low), high, sanitize_overflow=False))
    h = position ^ first
    h = tl.add(tl.mul(h ^ (h >> 16), 0x7FEB352D, sanitize_overflow=False), second, sanitize_overflow=False)
    h = tl.mul(h ^ (h >> 15), 0x846CA68B, sanitize_overflow=False)
    h ^= h >> 16
    return ((h >> 9) | 0x3F800001).to(tl.float32, bitcast=True) - 1.0  # a conversion would cost four times as much


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _kept_value(x, c, nothing):
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    value = (_max(tl.abs(x), c).to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(x == 0, nothing, value)


@triton.jit
def mvue(x0, x1, x2, x3, u):
    """Twin of `reference.mvue`: the nibble (int32) of each group and its two kept values, fp32."""
    a0, a1, a2, a3 = tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3)
    h0, l0, h1, l1 = _max(a0, a1), _min(a0, a1), _max(a2, a3), _min(a2, a3)
    mx, rest = _max(h0, h1), (_min(h0, h1) + l0) + l1
    c = _max(tl.where(mx > rest, rest, 0.5 * (mx + rest)), 1.1754943508222875e-38)  # 2^-126
    s1 = _min(a0, c)
    s2 = s1 + _min(a1, c)
    s3 = s2 + _min(a2, c)
    t = u * c
    tc = t + c
    i1, i2 = t >= s1, t >= s2  # i >= 1, i >= 2
    j2, j3 = i1 | (tc > s2), i2 | (tc > s3)  # j >= 2, j >= 3
    nothing = c * 0.0
    first = _kept_value(tl.where(i2, x2, tl.where(i1, x1, x0)), c, nothing)
    last = _kept_value(tl.where(j3, x3, tl.where(j2, x2, x1)), c, nothing)
    return tl.where(i2, 2, tl.where(i1, 1, 0)) | tl.where(j3, 12, tl.where(j2, 8, 4)), first, last


@triton.jit
def prune_and_store(
    packed, x0, x1, x2, x3, seed, t0, f0, tokens, features, ORDER: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr
):
    """Prune fp32 [BT / 4, BF], x_i row i of each group, and write it as rows f0.. and columns t0.. of the packed form.

    That is of [features, tokens], tokens a multiple of 64.
    """
    G: tl.constexpr = BT // 4
    group, f = (t0 // 4 + tl.arange(0, G)).to(tl.uint32), (f0 + tl.arange(0, BF)).to(tl.uint32)
    row = tl.mul(group, features.to(tl.uint32), sanitize_overflow=False)  # the twin's counter, too, is of 32 bits
    u = uniform(seed, tl.add(row[:, None], f[None, :], sanitize_overflow=False))
    nibbles, first, last = mvue(x0, x1, x2, x3, u)
    dtype: tl.constexpr = packed.dtype.element_ty
    values = tl.permute(tl.join(first.to(dtype), last.to(dtype)), (1, 0, 2))
    store_values(packed, tl.reshape(values, [BF, BT // 2]), f0, t0 // 2, tokens, BF, BT // 2)
    metadata = metadata_of(packed, features, tokens)
    store_nibbles(metadata, tl.trans(nibbles), f0, t0 // 4, features, tokens, ORDER, BF, G)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any) -> None:
    """Run `kernel` on `device` (Triton itself launches on the current one); an empty grid is no launch."""
    if 0 in grid:
        return
    with layout.on(device):
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
    """Raise ValueError where `packed` is not the packed form of a [rows, cols] matrix, at an aligned address."""
    layout.check(packed, rows, cols)
    if packed.data_ptr() % 16:
        raise ValueError("sparse24: found a packed buffer at an odd address, need one aligned to 16 bytes")
