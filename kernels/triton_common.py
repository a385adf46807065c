"""What the Triton kernels share: the nibble addresses, the pruning of a gradient and its uniforms.

Every kernel is launched without FMA contraction: where something is decided (which mask, which lane) the order and the
rounding of each operation are those of `reference`, bit by bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout

#: Whether the kernels run under Triton's interpreter, which knows neither libdevice nor map_elementwise.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def select_bytes(low, high, selector):
    """PTX's prmt: byte i of the result is the one of (low, high), 0 to 7, that nibble i of `selector` names. uint32."""
    selector = (low & 0) | selector  # of the shape of the others
    if INTERPRETED:
        result = low & 0
        for i in tl.static_range(4):
            at = (selector >> (4 * i)) & 7
            word = tl.where(at < 4, low, high)
            result |= ((word >> (8 * (at & 3))) & 0xFF) << (8 * i)
    else:
        result = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.uint32, is_pure=True, pack=1
        )
    return result


@triton.jit
def nibble_address(m, c, rows, cols, ORDER: tl.constexpr):
    """Twin of `layout.nibble_address`: byte offset (int64) and bit shift (int32) of the nibble of group c in row m."""
    m, c = tl.cast(m, tl.uint32), tl.cast(c, tl.uint32)  # unsigned: divisions by powers of two become shifts
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
def _tile_of(metadata, m0, c0, rows, cols, ORDER: tl.constexpr):
    """Pointer to where the nibbles of a tile begin, its first row and group multiples of 64 and 16.

    From there on the addresses are those of the first tile, which no loop has to compute again.
    """
    byte, _ = nibble_address(m0, c0, rows, cols, ORDER)
    return metadata + byte


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
def load_tile_words(metadata, m0, c0, rows, cols, ORDER: tl.constexpr, G: tl.constexpr):
    """The words that hold the nibbles of a tile of G * G groups, for `masks_of_words`; m0 in multiples of 64, c0 of 16.

    Four, of the four rows of each tile of the mask. Words are read once each: so few loads that Triton gives them the
    layout of the values, and not the values that of the loads.
    """
    second: tl.constexpr = 2 if ORDER == "sm_90" else 4  # groups from one word to the next, words from row to row
    metadata = _tile_of(metadata, m0, c0, rows, cols, ORDER)
    m, c8 = tl.reshape(4 * tl.arange(0, G), [G, 1, 1, 1, 1]), tl.reshape(tl.arange(0, G // 8), [1, G // 8, 1, 1, 1])
    word = tl.reshape(tl.arange(0, 2), [1, 1, 1, 2, 1] if ORDER == "sm_90" else [1, 1, 2, 1, 1])
    byte, _ = nibble_address(m, 8 * c8 + second * word, 64, 64, ORDER)
    words = (metadata + (byte & -4)).to(tl.pointer_type(tl.uint32))
    return tl.load(words), tl.load(words + second), tl.load(words + 2 * second), tl.load(words + 3 * second)


@triton.jit
def _of_groups(words, G: tl.constexpr):
    """The word of each of [G, G] groups, from those of eight groups each."""
    return tl.reshape(tl.broadcast_to(words, [G, G // 8, 2, 2, 2]), [G, G])


@triton.jit
def masks_of_words(words, ORDER: tl.constexpr, G: tl.constexpr):
    """int32 [G, G], bit 4 * i + l set where lane l of group c0 + g is kept in row m0 + 4 * r + i, i < 4.

    The nibbles of the four rows stand at the same place of four words, from which they are taken together.
    """
    byte, shift = nibble_address(4 * tl.arange(0, G)[:, None], tl.arange(0, G)[None, :], 64, 64, ORDER)
    of_two = 0x40 + (byte & 3).to(tl.uint32) * 0x11
    low = select_bytes(_of_groups(words[0], G), _of_groups(words[1], G), of_two)
    high = select_bytes(_of_groups(words[2], G), _of_groups(words[3], G), of_two)
    nibbles = (select_bytes(low, high, 0x5410) >> shift.to(tl.uint32)) & 0x0F0F0F0F
    # the lowest three bits of n + n / 4 tell the six nibbles apart, for a table of eight bytes: what each of them keeps
    pairs = (nibbles + (nibbles >> 2)) & 0x07070707
    zero = nibbles & 0
    kept = select_bytes(zero | 0x06050C0A, zero | 0x09000300, select_bytes(pairs | pairs >> 4, zero, 0x20))
    return select_bytes(kept | kept >> 4, zero, 0x4420).to(tl.int32)


@triton.jit
def store_tile_nibbles(metadata, nibbles, m0, c0, rows, cols, ORDER: tl.constexpr, G: tl.constexpr):
    """`store_nibbles` of uint32 [G, G] that hold in byte i the nibble of row 4 * r + i of the tile."""
    n = tl.reshape(nibbles, [G // 4, 2, 2, G // 8, 2, 2, 2])  # m/16, m/8%2, m/4%2, c/8, c/4%2, c/2%2, c%2
    second: tl.constexpr = 2 if ORDER == "sm_90" else 4
    n = tl.permute(n, (0, 2, 3, 5, 6, 4, 1) if ORDER == "sm_90" else (0, 2, 3, 4, 1, 5, 6))
    low, high = tl.split(n)
    low, high = tl.split(low | high << 4)
    u0, u1 = tl.split(select_bytes(low, high, 0x5140))  # of rows 0 and 1
    v0, v1 = tl.split(select_bytes(low, high, 0x7362))  # of rows 2 and 3
    m16 = tl.reshape(tl.arange(0, G // 4), [G // 4, 1, 1, 1])
    m4 = tl.reshape(tl.arange(0, 2), [1, 2, 1, 1])
    c8 = tl.reshape(tl.arange(0, G // 8), [1, 1, G // 8, 1])
    word = tl.reshape(tl.arange(0, 2), [1, 1, 1, 2])
    byte, _ = nibble_address(16 * m16 + 4 * m4, 8 * c8 + second * word, 64, 64, ORDER)
    words = (_tile_of(metadata, m0, c0, rows, cols, ORDER) + byte).to(tl.pointer_type(tl.uint32))
    tl.store(words, select_bytes(u0, u1, 0x5410))
    tl.store(words + second, select_bytes(u0, u1, 0x7632))
    tl.store(words + 2 * second, select_bytes(v0, v1, 0x5410))
    tl.store(words + 3 * second, select_bytes(v0, v1, 0x7632))


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
    byte, _ = nibble_address(16 * m16 + m1, 8 * c8 + second * word, 64, 64, ORDER)
    tl.store((_tile_of(metadata, m0, c0, rows, cols, ORDER) + byte).to(tl.pointer_type(tl.int32)), words)


@triton.jit
def store_values(packed, values, m0, v0, cols, R: tl.constexpr, V: tl.constexpr):
    """Write kept values [R, V] of rows m0.. at value columns v0.. of the packed form of a matrix of `cols` columns."""
    half = tl.cast(cols // 2, tl.int64)
    at = packed + (m0 * half + v0) + (tl.arange(0, R)[:, None] * half + tl.arange(0, V)[None, :])
    tl.store(at, values)


@triton.jit
def _mix32(h):
    h = tl.mul(h ^ (h >> 16), 0x7FEB352D, sanitize_overflow=False)
    h = tl.mul(h ^ (h >> 15), 0x846CA68B, sanitize_overflow=False)
    return h ^ (h >> 16)


@triton.jit
def keys_of(seed):
    """The two keys of an int64 seed, uint32 each; both depend on all of its bits."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    return _mix32(low ^ _mix32(high)), _mix32(tl.add(_mix32(low), high, sanitize_overflow=False))


@triton.jit
def uniform(keys, position):
    """Twin of `reference.uniform` at uint32 positions: fp32 in (0, 1)."""
    h = position ^ keys[0]
    h = tl.add(tl.mul(h ^ (h >> 16), 0x7FEB352D, sanitize_overflow=False), keys[1], sanitize_overflow=False)
    h = tl.mul(h ^ (h >> 15), 0x846CA68B, sanitize_overflow=False)
    return ((h >> 9) | 0x3F800001).to(tl.float32, bitcast=True) - 1.0  # a conversion would cost four times as much


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _kept_value(x, c):
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    return (larger(tl.abs(x), c).to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def mvue(x0, x1, x2, x3, u):
    """Twin of `reference.mvue`: the nibble (int32) of each group and its two kept values, fp32."""
    a0, a1, a2, a3 = tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3)
    h0, l0, h1, l1 = larger(a0, a1), _min(a0, a1), larger(a2, a3), _min(a2, a3)
    mx, rest = larger(h0, h1), (_min(h0, h1) + l0) + l1
    least = _min(rest, 0.5 * (mx + rest))
    c = larger(least, 1.1754943508222875e-38)  # 2^-126
    s1 = _min(a0, c)
    s2 = s1 + _min(a1, c)
    s3 = s2 + _min(a2, c)
    t = u * c
    tc = t + c
    i1, i2 = t >= s1, t >= s2  # i >= 1, i >= 2
    j2, j3 = i1 | (tc > s2), i2 | (tc > s3)  # j >= 2, j >= 3
    first = _kept_value(tl.where(i2, x2, tl.where(i1, x1, x0)), least)
    last = _kept_value(tl.where(j3, x3, tl.where(j2, x2, x1)), least)
    return tl.where(i2, 2, tl.where(i1, 1, 0)) | tl.where(j3, 12, tl.where(j2, 8, 4)), first, last


@triton.jit
def prune_and_store(
    packed, x0, x1, x2, x3, keys, t0, f0, tokens, features, ORDER: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr
):
    """Prune fp32 [BT / 4, BF], x_i row i of each group, and write it as rows f0.. and columns t0.. of the packed form.

    That is of [features, tokens], tokens a multiple of 64.
    """
    G: tl.constexpr = BT // 4
    group, f = (t0 // 4 + tl.arange(0, G)).to(tl.uint32), (f0 + tl.arange(0, BF)).to(tl.uint32)
    row = tl.mul(group, features.to(tl.uint32), sanitize_overflow=False)  # the twin's counter, too, is of 32 bits
    u = uniform(keys, tl.add(row[:, None], f[None, :], sanitize_overflow=False))
    if INTERPRETED:
        nibbles, first, last = mvue(x0, x1, x2, x3, u)
    else:  # group by group: of many groups at once, the conditions would not fit into the predicate registers
        nibbles, first, last = tl.map_elementwise(mvue, x0, x1, x2, x3, u)
    dtype: tl.constexpr = packed.dtype.element_ty
    values = tl.permute(tl.join(first.to(dtype), last.to(dtype)), (1, 0, 2))
    store_values(packed, tl.reshape(values, [BF, BT // 2]), f0, t0 // 2, tokens, BF, BT // 2)
    metadata = metadata_of(packed, features, tokens)
    store_nibbles(metadata, tl.trans(nibbles), f0, t0 // 4, features, tokens, ORDER, BF, G)


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
