"""Packing a weight and its transpose from one read, and the decay on what is pruned: Triton.

A program takes a 64x64 tile; a thread holds whole 4x4 tiles, so the search needs no exchange between threads. A weight
that is a transposed view is read along its own rows.

Predicted from the machine code for an H200 at 1.75 GHz, not measured: integer and compare slots and memory bound a
frozen repack of a bf16 weight alike (0.06 ms each for 14336x4096), memory one of an fp32 weight, and the decay; the
search is bound by the slots (0.13 ms).
"""

import triton
import triton.language as tl
from torch import Tensor

from . import layout
from .triton_common import (
    check_dtypes,
    check_matrix,
    check_packed,
    launch,
    load_kept,
    metadata_of,
    store_nibbles,
    store_values,
)

_PAIR_BITS = tl.constexpr(0xCA6953)  # the two kept lanes of pair p, as four bits, at bit 4 * p
_SATURATE = tl.constexpr(2.0**123)  # reference.SATURATE


@triton.jit
def _load_lanes(at):
    """The four lanes of each group, [R, C] each, from pointers [R, C, 4]."""
    x = tl.load(at)
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _across(x0, x1, x2, x3, LANE: tl.constexpr):
    """Lane LANE of four transposed lines: a line of the matrix itself."""
    return tl.trans(x0[LANE]), tl.trans(x1[LANE]), tl.trans(x2[LANE]), tl.trans(x3[LANE])


@triton.jit
def _magnitude(x):
    a = tl.abs(x.to(tl.float32))
    return tl.where(a > _SATURATE, _SATURATE, a)  # not a minimum: NaN must stay NaN, as in the twin


@triton.jit
def _pair_sums(x):
    """Kept magnitude of a row for each of the six pairs, in the order of `layout.PAIRS`."""
    a0, a1, a2, a3 = _magnitude(x[0]), _magnitude(x[1]), _magnitude(x[2]), _magnitude(x[3])
    return a0 + a1, a0 + a2, a0 + a3, a1 + a2, a1 + a3, a2 + a3


@triton.jit
def _best_mask(x0, x1, x2, x3):
    """Twin of `reference.best_mask` for rows of four lanes: int32, bit 4 * r + c set where (r, c) is kept."""
    s0, s1, s2, s3 = _pair_sums(x0), _pair_sums(x1), _pair_sums(x2), _pair_sums(x3)
    best, mask = s0[0] + s1[5], tl.full(s0[0].shape, 0xC3, tl.int32)
    bottom, mask_b = s2[0] + s3[5], tl.full(s0[0].shape, 0xC300, tl.int32)
    for p in tl.static_range(1, 6):  # rows 0, 1 complementary, and rows 2, 3
        bits = ((_PAIR_BITS >> (4 * p)) & 15) | ((_PAIR_BITS >> (4 * (5 - p))) & 15) << 4
        v = s0[p] + s1[5 - p]
        mask, best = tl.where(v > best, bits, mask), tl.where(v > best, v, best)
        v = s2[p] + s3[5 - p]
        mask_b, bottom = tl.where(v > bottom, bits << 8, mask_b), tl.where(v > bottom, v, bottom)
    best, mask = best + bottom, mask | mask_b
    for p in tl.static_range(6):  # rows 0, 1 equal, rows 2, 3 their complement
        b = (_PAIR_BITS >> (4 * p)) & 15
        v = (s0[p] + s1[p]) + (s2[5 - p] + s3[5 - p])
        mask, best = tl.where(v > best, b * 0x11 | (15 - b) * 0x1100, mask), tl.where(v > best, v, best)
    for p in tl.static_range(6):  # one column shared by rows 0, 1; rows 2, 3 are the complements, in either order
        for q in tl.static_range(p + 1, 6):
            if p + q != 5:
                b, d = (_PAIR_BITS >> (4 * p)) & 15, (_PAIR_BITS >> (4 * q)) & 15
                u, swapped = s0[p] + s1[q], s0[q] + s1[p]
                mask_u = tl.where(u >= swapped, b | d << 4, d | b << 4)
                u = tl.where(u >= swapped, u, swapped)
                v, swapped = s2[5 - p] + s3[5 - q], s2[5 - q] + s3[5 - p]
                mask_v = tl.where(v >= swapped, (15 - b) << 8 | (15 - d) << 12, (15 - d) << 8 | (15 - b) << 12)
                v = u + tl.where(v >= swapped, v, swapped)
                mask, best = tl.where(v > best, mask_u | mask_v, mask), tl.where(v > best, v, best)
    return mask


@triton.jit
def _load_mask(metadata, m, g, rows, cols, ORDER: tl.constexpr):
    """int32, bit 4 * r + c set where (m + r, 4 * g + c) is kept; m and g broadcast."""
    mask = load_kept(metadata, m, g, rows, cols, ORDER) | load_kept(metadata, m + 1, g, rows, cols, ORDER) << 4
    mask |= load_kept(metadata, m + 2, g, rows, cols, ORDER) << 8
    return mask | load_kept(metadata, m + 3, g, rows, cols, ORDER) << 12


@triton.jit
def _keep(x0, x1, x2, x3, mask, FIRST: tl.constexpr, STEP: tl.constexpr, dtype: tl.constexpr):
    """Kept values [R, C, 2] and nibble of a line of a 4x4 tile, whose bits in `mask` are FIRST, FIRST + STEP, ..."""
    k0, k1 = (mask & (1 << FIRST)) != 0, (mask & (1 << (FIRST + STEP))) != 0
    k2, k3 = (mask & (1 << (FIRST + 2 * STEP))) != 0, (mask & (1 << (FIRST + 3 * STEP))) != 0
    first = tl.where(k0, x0, tl.where(k1, x1, x2)).to(dtype)
    last = tl.where(k3, x3, tl.where(k2, x2, x1)).to(dtype)
    return tl.join(first, last), tl.where(k0, 0, tl.where(k1, 1, 2)) | tl.where(k3, 12, tl.where(k2, 8, 4))


@triton.jit
def _interleave(x0, x1, x2, x3):
    """[..., 2, 2] whose last two dimensions count the lines 0, 1, 2, 3."""
    return tl.join(tl.join(x0, x2), tl.join(x1, x3))


@triton.jit
def _nan(x):
    x = x.to(tl.float32)  # the interpreter compares bf16 as integers
    return (x != x).to(tl.int32)


@triton.jit
def _nans(x):
    return (_nan(x[0]) + _nan(x[1])) + (_nan(x[2]) + _nan(x[3]))


@triton.jit
def _sum_abs(x):
    x0, x1, x2, x3 = x[0].to(tl.float32), x[1].to(tl.float32), x[2].to(tl.float32), x[3].to(tl.float32)
    return (tl.abs(x0) + tl.abs(x1)) + (tl.abs(x2) + tl.abs(x3))


@triton.jit
def pack_weight_kernel(
    w,  # [r, c], strides (stride_r, stride_c)
    packed,  # of [rows, cols]
    packed_t,  # of [cols, rows]
    stats,  # int64 [2], zeroed
    stride_r,
    stride_c,
    row,
    col,
    rows,
    cols,
    SEARCH: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # stride_r is the small one
    ORDER: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    R: tl.constexpr = BR // 4
    C: tl.constexpr = BC // 4
    dtype: tl.constexpr = packed.dtype.element_ty
    r0, c0 = tl.program_id(0) * BR, tl.program_id(1) * BC
    r, c = r0 + 4 * tl.arange(0, R), c0 + 4 * tl.arange(0, C)
    lane = tl.arange(0, 4)[None, None, :]
    metadata, metadata_t = metadata_of(packed, rows, cols), metadata_of(packed_t, cols, rows)
    if TRANSPOSED:
        at = w + c.to(tl.int64)[:, None, None] * stride_c + (r.to(tl.int64)[None, :, None] + lane) * stride_r
        y0, y1 = _load_lanes(at), _load_lanes(at + stride_c)
        y2, y3 = _load_lanes(at + stride_c + stride_c), _load_lanes(at + stride_c + stride_c + stride_c)
        x0, x1 = _across(y0, y1, y2, y3, 0), _across(y0, y1, y2, y3, 1)
        x2, x3 = _across(y0, y1, y2, y3, 2), _across(y0, y1, y2, y3, 3)
        old = tl.trans(_load_mask(metadata, (row + r)[None, :], ((col + c) // 4)[:, None], rows, cols, ORDER))
    else:
        at = w + r.to(tl.int64)[:, None, None] * stride_r + (c.to(tl.int64)[None, :, None] + lane) * stride_c
        x0, x1 = _load_lanes(at), _load_lanes(at + stride_r)
        x2, x3 = _load_lanes(at + stride_r + stride_r), _load_lanes(at + stride_r + stride_r + stride_r)
        old = _load_mask(metadata, (row + r)[:, None], ((col + c) // 4)[None, :], rows, cols, ORDER)
    mask = old
    if SEARCH:
        mask = _best_mask(x0, x1, x2, x3)
        flips = mask ^ old
        flips = (flips & 0x5555) + ((flips >> 1) & 0x5555)
        flips = (flips & 0x3333) + ((flips >> 2) & 0x3333)
        flips = (flips & 0x0F0F) + ((flips >> 4) & 0x0F0F)
        tl.atomic_add(stats, tl.sum((flips & 0xFF) + (flips >> 8)).to(tl.int64), sem="relaxed")
        tl.debug_barrier()  # every thread has read the old metadata before any thread writes the new

    # A sum of magnitudes is NaN exactly where an entry is (infinities do not cancel): the count is rarely needed.
    probe = (_sum_abs(x0) + _sum_abs(x1)) + (_sum_abs(x2) + _sum_abs(x3))
    if tl.sum((probe != probe).to(tl.int32)) > 0:
        nans = tl.sum((_nans(x0) + _nans(x1)) + (_nans(x2) + _nans(x3)))
        tl.atomic_add(stats + 1, nans.to(tl.int64), sem="relaxed")

    v0, n0 = _keep(x0[0], x0[1], x0[2], x0[3], mask, 0, 1, dtype)
    v1, n1 = _keep(x1[0], x1[1], x1[2], x1[3], mask, 4, 1, dtype)
    v2, n2 = _keep(x2[0], x2[1], x2[2], x2[3], mask, 8, 1, dtype)
    v3, n3 = _keep(x3[0], x3[1], x3[2], x3[3], mask, 12, 1, dtype)
    values = tl.permute(_interleave(v0, v1, v2, v3), (0, 3, 4, 1, 2))
    store_values(packed, tl.reshape(values, [BR, BC // 2]), row + r0, (col + c0) // 2, cols, BR, BC // 2)
    if SEARCH:
        nibbles = tl.permute(_interleave(n0, n1, n2, n3), (0, 2, 3, 1))
        store_nibbles(metadata, tl.reshape(nibbles, [BR, C]), row + r0, (col + c0) // 4, rows, cols, ORDER, BR, C)

    v0, n0 = _keep(x0[0], x1[0], x2[0], x3[0], mask, 0, 4, dtype)
    v1, n1 = _keep(x0[1], x1[1], x2[1], x3[1], mask, 1, 4, dtype)
    v2, n2 = _keep(x0[2], x1[2], x2[2], x3[2], mask, 2, 4, dtype)
    v3, n3 = _keep(x0[3], x1[3], x2[3], x3[3], mask, 3, 4, dtype)
    values = tl.permute(_interleave(v0, v1, v2, v3), (1, 3, 4, 0, 2))
    store_values(packed_t, tl.reshape(values, [BC, BR // 2]), col + c0, (row + r0) // 2, rows, BC, BR // 2)
    if SEARCH:
        nibbles = tl.permute(_interleave(n0, n1, n2, n3), (1, 2, 3, 0))
        store_nibbles(metadata_t, tl.reshape(nibbles, [BC, R]), col + c0, (row + r0) // 4, cols, rows, ORDER, BC, R)


@triton.jit
def masked_decay_kernel(
    grad,  # [r, c], strides (grad_r, grad_c)
    w,  # [r, c], strides (w_r, w_c)
    packed,  # of [rows, cols]
    grad_r,
    grad_c,
    w_r,
    w_c,
    row,
    col,
    rows,
    cols,
    decay,
    ORDER: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    r0, g0 = tl.program_id(0) * BR, tl.program_id(1) * (BC // 4)
    r, g = r0 + tl.arange(0, BR), g0 + tl.arange(0, BC // 4)
    kept = load_kept(metadata_of(packed, rows, cols), (row + r)[:, None], (col // 4 + g)[None, :], rows, cols, ORDER)
    lane = tl.arange(0, 4)[None, None, :]
    r, c = r.to(tl.int64)[:, None, None], (4 * g).to(tl.int64)[None, :, None] + lane
    at = grad + r * grad_r + c * grad_c
    pruned = tl.where((kept[:, :, None] >> lane) & 1 != 0, 0.0, tl.load(w + r * w_r + c * w_c).to(tl.float32))
    tl.store(at, (tl.load(at).to(tl.float32) + tl.cast(decay, tl.float32) * pruned).to(grad.dtype.element_ty))


def _check_block(w: Tensor, row: int, col: int, rows: int, cols: int, order: str) -> None:
    check_matrix(rows, cols, order)
    r, c = w.shape
    if any(n % layout.TILE or n < 0 for n in (r, c, row, col)) or row + r > rows or col + c > cols:
        raise ValueError(
            f"sparse24: found a {r}x{c} block at ({row}, {col}) of a {rows}x{cols} matrix, "
            f"need one inside it, in multiples of {layout.TILE}"
        )


def pack_weight_(
    w: Tensor, packed: Tensor, packed_t: Tensor, stats: Tensor, row: int, col: int, rows: int, cols: int, search: bool
) -> None:
    """Twin of `reference.pack_weight_`, which defines it. The mask in `packed` is the one that counts."""
    order = layout.metadata_order(w.device)
    check_dtypes(w=w, packed=packed, packed_t=packed_t)
    _check_block(w, row, col, rows, cols, order)
    check_matrix(cols, rows, order)
    check_packed(packed, rows, cols)
    check_packed(packed_t, cols, rows)
    stats.zero_()
    launch(
        pack_weight_kernel,
        (w.shape[0] // layout.TILE, w.shape[1] // layout.TILE),
        w.device,
        w.detach(),
        packed,
        packed_t,
        stats,
        *w.stride(),
        row,
        col,
        rows,
        cols,
        SEARCH=search,
        TRANSPOSED=w.stride(0) < w.stride(1),
        ORDER=order,
        BR=layout.TILE,
        BC=layout.TILE,
        num_warps=4,
    )


def masked_decay_(
    grad: Tensor, w: Tensor, packed: Tensor, row: int, col: int, rows: int, cols: int, decay: float
) -> None:
    """Twin of `reference.masked_decay_`, which defines it. grad and w may have any strides."""
    order = layout.metadata_order(w.device)
    check_dtypes(grad=grad, w=w)
    _check_block(w, row, col, rows, cols, order)
    if grad.shape != w.shape:
        raise ValueError(f"sparse24: found grad {tuple(grad.shape)} and w {tuple(w.shape)}, need one shape")
    check_packed(packed, rows, cols)
    launch(
        masked_decay_kernel,
        (w.shape[0] // layout.TILE, w.shape[1] // layout.TILE),
        w.device,
        grad,
        w.detach(),
        packed,
        *grad.stride(),
        *w.stride(),
        row,
        col,
        rows,
        cols,
        float(decay),
        ORDER=order,
        BR=layout.TILE,
        BC=layout.TILE,
        num_warps=4,
    )
