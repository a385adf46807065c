"""Packing weights and their transposes from one read each, and the decay on what is pruned: Triton.

One launch serves all weights of an optimizer step: at small widths a launch each would cost more than sparse matmuls
gain. A program takes a strip of 64x64 tiles along a row of a weight, so that programs that run together touch memory
side by side; a thread holds whole 4x4 tiles, so the search needs no exchange between threads.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout
from .layout import Block
from .triton_common import (
    check_dtypes,
    check_matrix,
    check_packed,
    load_kept,
    load_tile_words,
    masks_of_words,
    metadata_of,
    store_tile_nibbles,
    store_values,
)
from .triton_launch import launch
from .triton_tiles import (
    beside,
    best_mask,
    columns_of,
    count_bits,
    fp32_of_words,
    kept_of,
    kept_words_of,
    largest_in_words,
    largest_of,
    nibbles_of,
    not_finite,
    sum_of,
    to_fp32,
    transposed,
    two_words,
    words_of,
)


@triton.jit
def _load_lanes(at):
    """The four lanes of each group, [R, C] each, from pointers [R, 4 * C].

    The pointers are two-dimensional, or Triton would give neighbouring threads different rows.
    """
    even, odd = tl.split(tl.reshape(tl.load(at), [at.shape[0], at.shape[1] // 4, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _load_lines(words, stride):
    """Four lines of groups of 16-bit values, from pointers to uint64; stride: from line to line, in groups."""
    return tl.load(words), tl.load(words + stride), tl.load(words + 2 * stride), tl.load(words + 3 * stride)


@triton.jit
def _interleave(x0, x1, x2, x3):
    """[..., 2, 2] whose last two dimensions count the lines 0, 1, 2, 3."""
    return tl.join(tl.join(x0, x2), tl.join(x1, x3))


@triton.jit
def _store_lines(packed, values, m0, v0, cols, T: tl.constexpr, ACROSS: tl.constexpr):
    """Store interleaved `_line` values of a tile as rows m0.., value columns v0.. of a packed form of `cols` columns.

    ACROSS: the lines are columns of the tile.
    """
    if values.dtype == tl.uint32:  # two values each
        values = tl.permute(values, (1, 2, 3, 0) if ACROSS else (0, 2, 3, 1))
        words = packed.to(tl.pointer_type(tl.uint32))
        store_values(words, tl.reshape(values, [T, T // 4]), m0, v0 // 2, cols // 2, T, T // 4)
    else:
        values = tl.permute(values, (1, 3, 4, 0, 2) if ACROSS else (0, 3, 4, 1, 2))
        store_values(packed, tl.reshape(values, [T, T // 2]), m0, v0, cols, T, T // 2)


@triton.jit
def _store_words(at, x):
    """Store the word that each tile [G, G] keeps of a line at pointers to uint64 [G, G / 2].

    Two words at once, that a thread holds side by side: in the layout of the words a wider store would go through
    shared memory.
    """
    low, high = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    tl.store(at, low.to(tl.uint64) | high.to(tl.uint64) << 32)


@triton.jit
def _field(table, i: tl.constexpr, divisor: tl.constexpr):
    """Field i of a table row, a known multiple of `divisor`."""
    return tl.multiple_of(tl.load(table + i), divisor)


@triton.jit
def _pointer(table, i: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Field i of a table row as an address, on 16 bytes where ALIGNED."""
    at = tl.load(table + i).to(tl.pointer_type(dtype))
    return tl.multiple_of(at, 16) if ALIGNED else at


@triton.jit
def _strip(table, strips, FIELDS: tl.constexpr):
    """This program's part: its table row, the tile row, and the tile columns from first to last."""
    strips += 4 * tl.program_id(0)
    return table + tl.load(strips) * FIELDS, tl.load(strips + 1), tl.load(strips + 2), tl.load(strips + 3)


@triton.jit
def _place(table):
    """row, col, rows, cols: where the weight stands in its packed matrix."""
    row, col = _field(table, 0, 64).to(tl.int32), _field(table, 1, 64).to(tl.int32)
    return row, col, _field(table, 2, 64), _field(table, 3, 64)


@triton.jit
def _strides(table, i: tl.constexpr, UNIT: tl.constexpr):
    """Strides of a matrix; UNIT: rows of contiguous entries, aligned to 16 bytes."""
    return (_field(table, i, 8), 1) if UNIT else (tl.load(table + i), tl.load(table + i + 1))


@triton.jit
def pack_weights_kernel(
    table,  # int64 [n, FIELDS], see `_row_of`
    strips,  # int32 [programs, 4]: table row, tile row, first tile column, the one after the last
    stats,  # int64 [n, 2], zeroed
    SEARCH: tl.constexpr,
    MASTER: tl.constexpr,  # dtype of the weights
    DTYPE: tl.constexpr,  # and of the packed forms
    UNIT: tl.constexpr,
    ORDER: tl.constexpr,
    T: tl.constexpr,
    FIELDS: tl.constexpr,
):
    BY_WORD: tl.constexpr = UNIT and MASTER == DTYPE and DTYPE.primitive_bitwidth == 16
    G: tl.constexpr = T // 4
    table, tile_row, first, last = _strip(table, strips, FIELDS)
    row, col, rows, cols = _place(table)
    w = _pointer(table, 4, MASTER, UNIT)
    stride_r, stride_c = _strides(table, 5, UNIT)
    packed = _pointer(table, 7, DTYPE, True)
    packed_t = _pointer(table, 8, DTYPE, True)
    stats += 2 * tl.load(table + 9)
    metadata, metadata_t = metadata_of(packed, rows, cols), metadata_of(packed_t, cols, rows)
    r0 = tile_row * T
    r = r0 + 4 * tl.arange(0, G)
    flips, bad = tl.zeros([G, G], tl.int32), tl.zeros([G, G], tl.int32)
    if BY_WORD:  # the next tile is on its way while this one is worked on
        words = w.to(tl.pointer_type(tl.uint64)) + (
            tl.arange(0, G)[None, :] + r.to(tl.int64)[:, None] * (stride_r // 4)
        )
        z0, z1, z2, z3 = _load_lines(words + first.to(tl.int64) * G, stride_r // 4)
        kept_words = packed.to(tl.pointer_type(tl.uint64)) + (
            tl.arange(0, G // 2)[None, :] + (row + r).to(tl.int64)[:, None] * (cols // 8)
        )
    n0, n1, n2, n3 = load_tile_words(metadata, row + r0, (col + first * T) // 4, rows, cols, ORDER, G)
    for tile in range(first, last):
        c0, next_tile = tile * T, tl.minimum(tile + 1, last - 1)
        if BY_WORD:
            y0, y1, y2, y3 = two_words(z0), two_words(z1), two_words(z2), two_words(z3)
            z0, z1, z2, z3 = _load_lines(words + next_tile.to(tl.int64) * G, stride_r // 4)
        else:
            at = w + r.to(tl.int64)[:, None] * stride_r + (c0 + tl.arange(0, T)).to(tl.int64)[None, :] * stride_c
            x0, x1 = _load_lanes(at), _load_lanes(at + stride_r)
            x2, x3 = _load_lanes(at + stride_r + stride_r), _load_lanes(at + stride_r + stride_r + stride_r)
            if DTYPE.primitive_bitwidth == 16:
                y0, y1, y2, y3 = words_of(x0, DTYPE), words_of(x1, DTYPE), words_of(x2, DTYPE), words_of(x3, DTYPE)
        mask = masks_of_words((n0, n1, n2, n3), ORDER, G)
        n0, n1, n2, n3 = load_tile_words(metadata, row + r0, (col + next_tile * T) // 4, rows, cols, ORDER, G)
        if SEARCH:
            old = mask
            if BY_WORD:
                x0, x1, x2, x3 = (
                    fp32_of_words(y0, DTYPE),
                    fp32_of_words(y1, DTYPE),
                    fp32_of_words(y2, DTYPE),
                    fp32_of_words(y3, DTYPE),
                )
                largest = largest_in_words(y0, y1, y2, y3, DTYPE, ORDER)
            else:
                x0, x1, x2, x3 = to_fp32(x0), to_fp32(x1), to_fp32(x2), to_fp32(x3)
                largest = largest_of(x0, x1, x2, x3)
            exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
            bad = tl.maximum(bad, exponent)
            mask = best_mask(x0, x1, x2, x3, exponent)
            flips += count_bits(mask ^ old)
            tl.debug_barrier()  # every thread has read the old metadata before any thread writes the new
        if DTYPE.primitive_bitwidth == 16:
            mask = beside(mask, y0[0])
            if not SEARCH:
                bad |= not_finite(y0, y1, y2, y3, DTYPE).to(tl.int32)
            v0, v1, v2, v3 = kept_words_of(y0, y1, y2, y3, mask)
        else:
            mask = beside(mask, x0[0])
            if not SEARCH:
                probe = (sum_of(x0) + sum_of(x1)) + (sum_of(x2) + sum_of(x3))  # NaN where one is, or infinities meet
                bad |= (probe != probe).to(tl.int32)
            v0, v1, v2, v3 = kept_of(x0, mask, 0), kept_of(x1, mask, 1), kept_of(x2, mask, 2), kept_of(x3, mask, 3)
        if BY_WORD:
            at = kept_words + (col + c0) // 8
            line = cols // 8  # added line by line: four addresses would not fit into the registers
            _store_words(at, v0)
            _store_words(at + line, v1)
            _store_words(at + line + line, v2)
            _store_words(at + line + line + line, v3)
        else:
            _store_lines(packed, _interleave(v0, v1, v2, v3), row + r0, (col + c0) // 2, cols, T, False)
        if SEARCH:
            store_tile_nibbles(metadata, nibbles_of(mask), row + r0, (col + c0) // 4, rows, cols, ORDER, G)

        mask = transposed(mask)
        if DTYPE.primitive_bitwidth == 16:
            y0, y1, y2, y3 = columns_of(y0, y1, y2, y3)
            v0, v1, v2, v3 = kept_words_of(y0, y1, y2, y3, mask)
        else:
            v0, v1 = kept_of((x0[0], x1[0], x2[0], x3[0]), mask, 0), kept_of((x0[1], x1[1], x2[1], x3[1]), mask, 1)
            v2, v3 = kept_of((x0[2], x1[2], x2[2], x3[2]), mask, 2), kept_of((x0[3], x1[3], x2[3], x3[3]), mask, 3)
        _store_lines(packed_t, _interleave(v0, v1, v2, v3), col + c0, (row + r0) // 2, rows, T, True)
        if SEARCH:
            store_tile_nibbles(metadata_t, tl.trans(nibbles_of(mask)), col + c0, (row + r0) // 4, cols, rows, ORDER, G)
    if SEARCH:
        changed = tl.sum(flips)
        if changed > 0:
            tl.atomic_add(stats, changed.to(tl.int64), sem="relaxed")
        bad = (bad == 0x7F800000).to(tl.int32)
    if tl.max((bad != 0).to(tl.int32)) != 0:  # rarely: only then is it counted
        nans = tl.zeros([], tl.int32)
        for tile in range(first, last):
            cols_of_tile = (tile * T + tl.arange(0, T)).to(tl.int64)
            at = w + (r0 + tl.arange(0, T)).to(tl.int64)[:, None] * stride_r + cols_of_tile[None, :] * stride_c
            x = tl.load(at).to(tl.float32)  # the interpreter compares bf16 as integers
            nans += tl.sum((x != x).to(tl.int32))
        if nans > 0:
            tl.atomic_add(stats + 1, nans.to(tl.int64), sem="relaxed")


@triton.jit
def masked_decay_kernel(
    table,  # int64 [n, FIELDS], see `_row_of`
    strips,  # int32 [programs, 4]: table row, tile row, first tile column, the one after the last
    decay,
    MASTER: tl.constexpr,  # dtype of the weights
    DTYPE: tl.constexpr,  # of the packed forms
    GRAD: tl.constexpr,  # of the gradients
    UNIT: tl.constexpr,
    UNIT_GRAD: tl.constexpr,
    ORDER: tl.constexpr,
    T: tl.constexpr,
    FIELDS: tl.constexpr,
):
    table, tile_row, first, last = _strip(table, strips, FIELDS)
    row, col, rows, cols = _place(table)
    w = _pointer(table, 4, MASTER, UNIT)
    w_r, w_c = _strides(table, 5, UNIT)
    metadata = metadata_of(_pointer(table, 7, DTYPE, True), rows, cols)
    grad = _pointer(table, 8, GRAD, UNIT_GRAD)
    grad_r, grad_c = _strides(table, 9, UNIT_GRAD)
    r = tile_row * T + tl.arange(0, T)
    lane = tl.arange(0, 4)[None, None, :]
    for tile in range(first, last):
        g = tile * (T // 4) + tl.arange(0, T // 4)
        kept = load_kept(metadata, (row + r)[:, None], (col // 4 + g)[None, :], rows, cols, ORDER)
        m, c = r.to(tl.int64)[:, None], (tile * T + tl.arange(0, T)).to(tl.int64)[None, :]
        at = grad + m * grad_r + c * grad_c
        x = tl.reshape(tl.load(w + m * w_r + c * w_c), [T, T // 4, 4]).to(tl.float32)
        pruned = tl.reshape(tl.where((kept[:, :, None] >> lane) & 1 != 0, 0.0, x), [T, T])
        tl.store(at, (tl.load(at).to(tl.float32) + tl.cast(decay, tl.float32) * pruned).to(GRAD))


_STRIP = 4  # tiles of a program
_HALVED = 8  # of so many programs the last one takes half as many
_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _check_device(x: Tensor, device: torch.device) -> None:
    """The kernels take bare addresses: one of another device would end the process's use of the GPU."""
    if x.device != device:
        raise ValueError(
            f"sparse24: found a weight or gradient on {x.device} and its packed form on {device}, need one device; "
            "after moving a model, run a forward before the optimizer step"
        )


def _check_block(block: Block, order: str) -> None:
    for x in (block.w, block.packed_t):
        _check_device(x, block.packed.device)
    w, row, col, rows, cols = block.w, block.row, block.col, block.rows, block.cols
    check_matrix(rows, cols, order)
    check_dtypes(w=w, packed=block.packed)
    r, c = w.shape
    if any(n % layout.TILE or n < 0 for n in (r, c, row, col)) or row + r > rows or col + c > cols:
        raise ValueError(
            f"sparse24: found a {r}x{c} block at ({row}, {col}) of a {rows}x{cols} matrix, "
            f"need one inside it, in multiples of {layout.TILE}"
        )
    check_packed(block.packed, rows, cols)


def _unit(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0


def _strips(tiles: Sequence[tuple[int, int]]) -> Tensor:
    """int32 [programs, 4] of weights of so many tiles down and across; the last ones halved: programs end together."""
    parts = []
    for i, (down, across) in enumerate(tiles):
        first = torch.arange(0, across, _STRIP, dtype=torch.int32, device="cpu")
        part = torch.empty(down, len(first), 4, dtype=torch.int32, device="cpu")
        part[:, :, 0], part[:, :, 1] = i, torch.arange(down, dtype=torch.int32, device="cpu")[:, None]
        part[:, :, 2], part[:, :, 3] = first, (first + _STRIP).clamp(max=across)
        parts.append(part.flatten(0, 1))
    strips = torch.cat(parts)
    strips, last = strips.split([len(strips) - len(strips) // _HALVED, len(strips) // _HALVED])
    halves = last[:, None].repeat(1, 2, 1)
    halves[:, 0, 3] = halves[:, 1, 2] = (last[:, 2] + last[:, 3] + 1) // 2
    halves = halves.flatten(0, 1)
    return torch.cat([strips, halves[halves[:, 2] < halves[:, 3]]])


@lru_cache(maxsize=256)  # the addresses are part of the key: what is stale is never found
def _tables(device: torch.device, stream: int, rows: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor]:
    """The table and the strips on the device; made anew for each stream, which has to wait for their copy."""
    table = torch.tensor([fields for _, _, *fields in rows], dtype=torch.int64, device="cpu")
    host = table, _strips([(down, across) for down, across, *_ in rows])
    if device.type != "cuda":
        return host
    moved = [x.pin_memory().to(device, non_blocking=True) for x in host]
    return moved[0], moved[1]


def _launch_all(kernel: Any, rows: list[tuple[int, ...]], device: torch.device, *args: Any, **constants: Any) -> None:
    """One program for each strip of each weight.

    rows: of each weight the tiles down and across, then the fields of its table row.
    """
    rows = [row for row in rows if row[0] and row[1]]
    if not rows:
        return
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    table, strips = _tables(device, stream, tuple(rows))
    constants |= {"T": layout.TILE, "FIELDS": table.shape[1], "ORDER": layout.metadata_order(device)}
    launch(kernel, (strips.shape[0],), device, table, strips, *args, **constants)


def _row_of(block: Block) -> tuple[int, ...]:
    """Tiles down and across, then the first fields of a table row: place, weight, strides, packed form."""
    w = block.w
    place = (w.shape[0] // layout.TILE, w.shape[1] // layout.TILE, block.row, block.col, block.rows, block.cols)
    return (*place, w.data_ptr(), w.stride(0), w.stride(1), block.packed.data_ptr())


def pack_weights_(blocks: Sequence[Block], search: bool) -> Tensor:
    """Twin of `reference.pack_weights_`, which defines it. The mask in `packed` is the one that counts."""
    device = blocks[0].packed.device
    stats = torch.zeros(len(blocks), 2, dtype=torch.int64, device=device)
    launches: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
    order = layout.metadata_order(device)
    for i, block in enumerate(blocks):
        _check_block(block, order)
        check_matrix(block.cols, block.rows, order)
        check_packed(block.packed_t, block.cols, block.rows)
        key = (block.w.dtype, block.packed.dtype, _unit(block.w))
        launches.setdefault(key, []).append((*_row_of(block), block.packed_t.data_ptr(), i))
    for (master, dtype, unit), rows in launches.items():
        kinds = {"MASTER": _TRITON[master], "DTYPE": _TRITON[dtype], "UNIT": unit}
        if unit:  # so that six, five or four programs fit on a multiprocessor, for a few spilled registers at most
            by_word = master == dtype and dtype.itemsize == 2
            kinds["maxnreg"] = 80 if not search else 96 if by_word else 128
        _launch_all(pack_weights_kernel, rows, device, stats, SEARCH=search, **kinds, num_warps=4)
    return stats


def masked_decay_(grads: Sequence[Tensor], blocks: Sequence[Block], decay: float) -> None:
    """Twin of `reference.masked_decay_`, which defines it. Gradients and weights may have any strides."""
    launches: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
    device = blocks[0].packed.device
    order = layout.metadata_order(device)
    for grad, block in zip(grads, blocks, strict=True):
        _check_block(block, order)
        check_dtypes(grad=grad)
        _check_device(grad, block.packed.device)
        if grad.shape != block.w.shape:
            found = f"grad {tuple(grad.shape)} and w {tuple(block.w.shape)}"
            raise ValueError(f"sparse24: found {found}, need one shape")
        key = (block.w.dtype, block.packed.dtype, grad.dtype, _unit(block.w), _unit(grad))
        launches.setdefault(key, []).append((*_row_of(block), grad.data_ptr(), grad.stride(0), grad.stride(1)))
    for (master, dtype, of_grad, unit, unit_grad), rows in launches.items():
        kinds = {"MASTER": _TRITON[master], "DTYPE": _TRITON[dtype], "GRAD": _TRITON[of_grad]}
        kinds |= {"UNIT": unit, "UNIT_GRAD": unit_grad}
        _launch_all(masked_decay_kernel, rows, device, float(decay), **kinds, num_warps=8)
