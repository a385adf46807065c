"""2:4 sparse matmul on Hopper: `wgmma.mma_async.sp` as inline PTX in a persistent, warp-specialised Gluon kernel.

    spmm    y [outer, rows] = x [outer, inner] (W.M)^T        wgrad   y [rows, outer] = (W.M) x [inner, outer]

and spmm with a gated activation behind it: h [outer, rows / 2] straight from the sums, beside y, which the backward
reads.

The packed operand is read in the form that `layout` defines for sm_90, values by TMA and metadata straight into
registers. One warp issues all TMA loads; each consumer warpgroup multiplies MB blocks of 64 rows with the BN columns of
the tile that all of them share. While the consumers write a tile, the loads of the next one are under way.

Shared memory is one arena of slots, each 64 x 64 entries with 128 byte swizzle: rings for the packed operand (64 rows
by 128 columns of it a slot) and for x (64 by 64), and slots to write the result from. A single buffer, because the PTX
takes its address from the symbol `global_smem`: Triton puts the largest buffer first, at offset 0. That is an
assumption, and `gluon_matmul` tests it. From Triton 3.9 on inline PTX gets the slots' addresses instead. That was
compiled only, to the instructions of before on the same registers, and not run.

Where the last round of tiles leaves multiprocessors idle, its tiles are cut into equal parts of their steps (split-K).
Programs that run together then still read the same rows and columns; shares of equal length (stream-K) were slower on
an H100, because each program was at another step and L2 served none of them. The program of a tile's last part adds
what the others left in memory, in their order, so that results stay the same from run to run.
"""

# mypy: disable-error-code="assignment, no-redef, var-annotated"
# (of tuples that grow and names that a constant condition defines, as kernels have them)

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import layout
from .gluon_common import BY_THREAD, advance, along, barrier, make_barriers, tile_of, tma_load, tma_store
from .gluon_ptx import SLOT_BYTES, arrive_asm, await_asm, mma_asm, mma_constraints, nibbles_asm, repeated
from .reference import GATED
from .triton_launch import launch

_LEAVING_STEPS = 5.5  # see `_cut`
_WGS = 2  # consumer warpgroups: of three, each would have too few registers for 256 columns
SLOT, WGS = gl.constexpr(SLOT_BYTES), gl.constexpr(_WGS)


class Variant(NamedTuple):
    """Tile rows 128 * MB by BN; ring depths NA (of 128 columns) and NB (of 64); NE slots a warpgroup to write
    from; GROUP row tiles are worked on together. split: the tiles of the last round are cut where that gains.
    """

    MB: int
    BN: int
    NA: int
    NB: int
    NE: int
    GROUP: int = 16
    REGISTER_A: bool = False
    persistent: bool = True
    split: bool = False

    @property
    def rows(self) -> int:
        return 128 * self.MB

    @property
    def slots(self) -> int:
        return self.NA * self.rows // 64 + self.NB * self.BN // 64 + _WGS * self.NE


#: What is measured for each problem; the first one also serves the check at first use.
VARIANTS = (
    Variant(MB=1, BN=256, NA=2, NB=4, NE=4),
    Variant(MB=1, BN=256, NA=2, NB=4, NE=4, split=True),
    Variant(MB=2, BN=192, NA=2, NB=4, NE=4),
    Variant(MB=2, BN=192, NA=2, NB=4, NE=4, split=True),
)


@gluon.jit
def mma(
    acc,
    a,
    b,
    meta,
    HALF: gl.constexpr,
    MB: gl.constexpr,
    BN: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    REGISTER_A: gl.constexpr,
    DTYPE: gl.constexpr,
):
    ADDRESSES: gl.constexpr = BY_THREAD and not REGISTER_A
    ASM: gl.constexpr = mma_asm(MB, BN, HALF, TRANSPOSED, REGISTER_A, DTYPE, ADDRESSES)
    CONSTRAINTS: gl.constexpr = mma_constraints(MB, BN, REGISTER_A, ADDRESSES)
    if ADDRESSES:
        return gl.inline_asm(ASM, CONSTRAINTS, (b,) + a + meta + acc, repeated(acc[0].type, MB * BN // 64), False)
    else:
        return gl.inline_asm_elementwise(
            ASM, CONSTRAINTS, (b,) + a + meta + acc, repeated(gl.float32, MB * BN // 64), False, 32
        )


@gluon.jit
def whereabouts(arena, slot, REGISTER_A: gl.constexpr, LAYOUT: gl.constexpr):
    """Where a slot of shared memory is, for `mma`."""
    if BY_THREAD and not REGISTER_A:
        return arena.index(slot)
    else:
        return gl.full([1, 1, 1, 1], slot * SLOT, gl.int32, LAYOUT)


@gluon.jit
def fragments(slot, LAYOUT: gl.constexpr):
    """A slot of the packed operand as the registers that the instruction takes: 16 a thread, 4 for each 32 columns."""
    ROWS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [8, 0], [0, 8], [0, 16], [0, 32]],
        [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 64],
    )
    v = slot.load(ROWS).reshape([4, 2, 8, 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([8, 4, 32, 4])
    return gl.convert_layout(v, LAYOUT, assert_trivial=True)


@gluon.jit
def parts_of(size):
    """How many parts this program works on: whole tiles first, then parts of the last ones."""
    rows, inner, tiles_m, tiles_n, steps, whole, cuts = size
    return gl.cdiv(whole + (tiles_m * tiles_n - whole) * cuts - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def work_of(i, size):
    """Part i of this program: its tile, its steps from first to last, which of the tile's `cuts` parts it is (-1: all
    of it), and its place among these parts. First come the first parts of all tiles that are cut, then the second ones.
    """
    rows, inner, tiles_m, tiles_n, steps, whole, cuts = size
    cut = gl.maximum(tiles_m * tiles_n - whole, 1)
    at = gl.program_id(0) + i * gl.num_programs(0)
    place = gl.maximum(at - whole, 0)
    which = place // cut
    mine = at < whole
    tile = gl.where(mine, at, whole + place % cut)
    first, last = gl.where(mine, 0, which * steps // cuts), gl.where(mine, steps, (which + 1) * steps // cuts)
    return tile, first, last, gl.where(mine, -1, which), place


@gluon.jit
def place_of_sums(partials, i, WG: gl.constexpr, MB: gl.constexpr, BN: gl.constexpr, L4: gl.constexpr):
    """Where the sums of this warpgroup in part i are left: pointers to its first 64 x 64 entries."""
    offset = along(8, 0, L4, 4) * 512 + along(4, 1, L4, 4) * 128 + along(32, 2, L4, 4) * 4 + along(4, 3, L4, 4)
    return partials + (i.to(gl.int64) * WGS + WG) * (MB * BN * 64) + offset


@gluon.jit
def block_of(tm, r: gl.constexpr, rows, MB: gl.constexpr, GATED: gl.constexpr):
    """The 64 rows of the packed operand that are block r of tile row tm; GATED: a warpgroup has those of its features
    twice, of the gate and of up, which stand `rows` / 2 behind each other.
    """
    if GATED:
        return r % MB * (rows // 128) + tm * WGS + r // MB
    else:
        return tm * (MB * WGS) + r


@gluon.jit
def producer(
    values,
    x,
    ring,
    size,
    TRANSPOSED: gl.constexpr,
    GATED: gl.constexpr,
    MB: gl.constexpr,
    BN: gl.constexpr,
    NA: gl.constexpr,
    NB: gl.constexpr,
    GROUP: gl.constexpr,
):
    arena, full_a, empty_a, full_b, empty_b = ring
    rows, inner, tiles_m, tiles_n, steps, whole, cuts = size
    SA: gl.constexpr = MB * WGS
    SB: gl.constexpr = BN // 64
    a, pa, b, pb = 0, 1, 0, 1
    for u in range(parts_of(size)):
        tile, first, to, _, _ = work_of(u, size)
        tm, tn = tile_of(tile, tiles_m, tiles_n, GROUP)
        for i in range(first, to):
            mbarrier.wait(empty_a.index(a), pa)
            mbarrier.expect(full_a.index(a), SA * SLOT)
            for r in gl.static_range(SA):
                row = block_of(tm, r, rows, MB, GATED) * 64
                tma_load(values, [row, i * 64], full_a.index(a), arena.index(a * SA + r))
            a, pa = advance(a, pa, NA)
            for h in gl.static_range(2):
                mbarrier.wait(empty_b.index(b), pb)
                mbarrier.expect(full_b.index(b), SB * SLOT)
                for r in gl.static_range(SB):
                    n, k = tn * BN + r * 64, i * 128 + h * 64
                    if TRANSPOSED:
                        tma_load(x, [k, n], full_b.index(b), arena.index(NA * SA + b * SB + r))
                    else:
                        tma_load(x, [n, k], full_b.index(b), arena.index(NA * SA + b * SB + r))
                b, pb = advance(b, pb, NB)


@gluon.jit
def load_metadata(meta, at, k64, last, MB: gl.constexpr, inner):
    """Eight bytes a thread of each of MB row blocks, for columns 64 * k64.. (or the last ones)."""
    k = gl.minimum(k64, last) * 64
    words = ()
    for m in gl.static_range(MB):
        words = words + (gl.load(meta + at[m] + k),)
    return words


@gluon.jit
def ordered(words, selector, MB: gl.constexpr):
    result = ()
    for m in gl.static_range(MB):
        result = result + (gl.inline_asm_elementwise(nibbles_asm(), "=r,l,r", [words[m], selector], gl.int32, True, 1),)
    return result


@gluon.jit
def activation(z, KIND: gl.constexpr):
    """fp32; as in `triton_glu`, with other roundings."""
    if KIND == "silu":
        return z / (1.0 + gl.exp2(-1.4426950408889634 * z))
    elif KIND == "gelu":
        return z * (0.5 * gl.erf(0.7071067811865476 * z) + 0.5)
    elif KIND == "gelu_tanh":  # (1 + tanh(y)) / 2 = sigmoid(2 y)
        return z / (1.0 + gl.exp2(z * (-0.10294324 * (z * z) - 2.3022082)))
    else:
        gl.static_assert(KIND == "relu")
        return gl.where(z < 0, 0.0, z)


@gluon.jit
def store(to, slots, block, m0, n0, i: gl.constexpr, NE: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Block i of those that a warpgroup writes of a tile: 64 features from m0 by 64 columns from n0."""
    arena, first = slots
    slot = arena.index(first + i % NE)
    if i == 0 or i >= NE:  # what is still in the slot has been read when this returns
        tma.store_wait(0 if i == 0 else NE - 1)
        barrier()
    block = block.reshape([8, 4, 8, 4, 2, 2])
    if TRANSPOSED:
        slot.store(block.permute([1, 4, 2, 0, 3, 5]).reshape([64, 64]))
    else:
        slot.store(block.permute([0, 3, 5, 1, 4, 2]).reshape([64, 64]))
    fence_async_shared()
    barrier()
    if TRANSPOSED:
        tma_store(to, [m0, n0], slot)
    else:
        tma_store(to, [n0, m0], slot)


@gluon.jit
def consumer(
    WG: gl.constexpr,
    data,
    HAS_BIAS: gl.constexpr,
    KIND: gl.constexpr,
    GATED: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    DTYPE: gl.constexpr,
    MB: gl.constexpr,
    BN: gl.constexpr,
    NA: gl.constexpr,
    NB: gl.constexpr,
    NE: gl.constexpr,
    GROUP: gl.constexpr,
    REGISTER_A: gl.constexpr,
):
    meta, y, h, bias, partials, counts, ring, size = data
    arena, full_a, empty_a, full_b, empty_b = ring
    rows, inner, tiles_m, tiles_n, steps, whole, cuts = size
    SA: gl.constexpr = MB * WGS
    SB: gl.constexpr = BN // 64
    L4: gl.constexpr = gl.BlockedLayout([8, 1, 1, 4], [1, 1, 32, 1], [1, 4, 1, 1], [3, 2, 1, 0])
    warp, lane, reg = along(4, 1, L4, 4), along(32, 2, L4, 4), along(4, 3, L4, 4)
    once = gl.full([128], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0]))  # an element a thread, unlike L4's 32
    selector = gl.where(lane % 2 == 0, 0x6420, 0x7531) + 0 * warp
    last = inner // 64 - 1
    a, pa, b, pb = 0, 0, 0, 0
    for u in range(parts_of(size)):
        tile, first, to, which, place = work_of(u, size)
        tm, tn = tile_of(tile, tiles_m, tiles_n, GROUP)
        at = ()
        for m in gl.static_range(MB):
            block = block_of(tm, WG * MB + m, rows, MB, GATED)
            block = gl.minimum(block, rows // 64 - 1)  # behind the last row: any legal metadata
            at = at + (block.to(gl.int64) * inner + (lane // 2 % 2 * 32 + warp * 8 + lane // 4),)
        acc = ()
        for _ in gl.static_range(MB * SB):
            acc = acc + (gl.full([8, 4, 32, 4], 0.0, gl.float32, L4),)
        next0 = load_metadata(meta, at, 2 * first, last, MB, inner)
        next1 = load_metadata(meta, at, 2 * first + 1, last, MB, inner)
        for i in range(first, to):
            e0, e1 = ordered(next0, selector, MB), ordered(next1, selector, MB)
            next0 = load_metadata(meta, at, 2 * i + 2, last, MB, inner)
            next1 = load_metadata(meta, at, 2 * i + 3, last, MB, inner)
            mbarrier.wait(full_a.index(a), pa)
            if REGISTER_A:
                packed = ()
                for m in gl.static_range(MB):
                    packed = packed + (fragments(arena.index(a * SA + WG * MB + m), L4),)
            else:
                packed = (whereabouts(arena, a * SA + WG * MB, REGISTER_A, L4),)
            mbarrier.wait(full_b.index(b), pb)
            b_at = whereabouts(arena, NA * SA + b * SB, REGISTER_A, L4)
            acc = mma(acc, packed, b_at, e0, 0, MB, BN, TRANSPOSED, REGISTER_A, DTYPE)
            barrier()
            mbarrier.arrive(empty_b.index(b), count=1)
            b, pb = advance(b, pb, NB)
            mbarrier.wait(full_b.index(b), pb)
            b_at = whereabouts(arena, NA * SA + b * SB, REGISTER_A, L4)
            acc = mma(acc, packed, b_at, e1, 1, MB, BN, TRANSPOSED, REGISTER_A, DTYPE)
            barrier()
            mbarrier.arrive(empty_b.index(b), count=1)
            mbarrier.arrive(empty_a.index(a), count=1)
            b, pb = advance(b, pb, NB)
            a, pa = advance(a, pa, NA)
        leaves = (which >= 0) & (which < cuts - 1)
        cut = tiles_m * tiles_n - whole
        for before in range(0, gl.where(which == cuts - 1, which, 0)):
            p = place - (which - before) * cut
            gl.inline_asm_elementwise(await_asm(), "=r,l", [counts + WGS * p + WG + once], gl.int32, False, 1)
            left = place_of_sums(partials, p, WG, MB, BN, L4)
            added = ()
            for s in gl.static_range(MB * SB):
                added = added + (acc[s] + gl.load(left + s * 4096),)
            acc = added
        if leaves:
            left = place_of_sums(partials, place, WG, MB, BN, L4)
            for s in gl.static_range(MB * SB):
                gl.store(left + s * 4096, acc[s])
            here = counts + WGS * place + WG + once
            gl.inline_asm_elementwise(arrive_asm(), "=r,l", [here], gl.int32, False, 1)
        else:
            slots = arena, NA * SA + NB * SB + WG * NE
            for m in gl.static_range(1 if GATED else MB):
                m0 = block_of(tm, WG * MB + m, rows, MB, GATED) * 64
                if HAS_BIAS:
                    row = m0 + warp * 16 + lane // 4 + reg // 2 * 8
                    add = gl.load(bias + row, mask=row < rows, other=0.0).to(gl.float32)
                    if GATED:
                        add_up = gl.load(bias + rows // 2 + row).to(gl.float32)
                for s in gl.static_range(SB):
                    part, n0 = acc[m * SB + s], tn * BN + s * 64
                    if GATED:
                        z, up = part.to(y.dtype), acc[SB + s].to(y.dtype)
                        store(y, slots, z, m0, n0, 3 * s, NE, False)
                        store(y, slots, up, rows // 2 + m0, n0, 3 * s + 1, NE, False)
                        z, up = z.to(gl.float32), up.to(gl.float32)
                        if HAS_BIAS:
                            z, up = z + add, up + add_up
                        store(h, slots, (activation(z, KIND) * up).to(y.dtype), m0, n0, 3 * s + 2, NE, False)
                    else:
                        if HAS_BIAS:
                            part += add
                        store(y, slots, part.to(y.dtype), m0, n0, m * SB + s, NE, TRANSPOSED)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "inner", "outer", "whole", "cuts"])
def kernel(
    values,  # packed operand [rows, inner / 2]
    meta,  # int64, its metadata
    x,  # [outer, inner] or, TRANSPOSED, [inner, outer]
    y,  # [outer, rows] or, TRANSPOSED, [rows, outer]
    h,  # GATED: [outer, rows / 2]
    bias,  # [rows], added to y or, GATED, within the activation only
    partials,  # fp32 [parts but the last of each tile, tile]: their sums
    counts,  # int32 [these parts, WGS], zeroed: how many warps have left theirs
    rows,
    inner,
    outer,
    whole,  # tiles that are not cut
    cuts,  # parts of each of the others
    HAS_BIAS: gl.constexpr,
    KIND: gl.constexpr,  # GATED: of the activation
    GATED: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    DTYPE: gl.constexpr,
    MB: gl.constexpr,
    BN: gl.constexpr,
    NA: gl.constexpr,
    NB: gl.constexpr,
    NE: gl.constexpr,
    GROUP: gl.constexpr,
    REGISTER_A: gl.constexpr,
):
    BM: gl.constexpr = 64 * MB * WGS
    SLOTS: gl.constexpr = NA * (BM // 64) + NB * (BN // 64) + WGS * NE
    arena = gl.allocate_shared_memory(x.dtype, [SLOTS, 64, 64], x.layout)
    full_a, empty_a = make_barriers(NA, 1), make_barriers(NA, WGS)
    full_b, empty_b = make_barriers(NB, 1), make_barriers(NB, WGS)
    fence_async_shared()
    tiles_m, tiles_n, steps = gl.cdiv(rows, BM), gl.cdiv(outer, BN), gl.cdiv(inner, 128)
    ring, size = (arena, full_a, empty_a, full_b, empty_b), (rows, inner, tiles_m, tiles_n, steps, whole, cuts)
    data = (meta, y, h, bias, partials, counts, ring, size)
    gl.warp_specialize(
        [
            (consumer, (0, data, HAS_BIAS, KIND, GATED, TRANSPOSED, DTYPE, MB, BN, NA, NB, NE, GROUP, REGISTER_A)),
            (consumer, (1, data, HAS_BIAS, KIND, GATED, TRANSPOSED, DTYPE, MB, BN, NA, NB, NE, GROUP, REGISTER_A)),
            (producer, (values, x, ring, size, TRANSPOSED, GATED, MB, BN, NA, NB, GROUP)),
        ],
        [4, 1],
        [232, 24],
    )
    arena._keep_alive()


DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
ALIGNMENT = 16  # bytes, of what TMA reads and writes


@lru_cache
def tiling() -> gl.NVMMASharedLayout:
    """How a slot lies in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@lru_cache(maxsize=256)
def constants(
    variant: Variant, dtype: torch.dtype, transposed: bool, has_bias: bool, kind: str = ""
) -> dict[str, object]:
    """The compile-time arguments of `kernel`; not to be changed."""
    chosen = {k: v for k, v in variant._asdict().items() if k not in ("persistent", "split")}
    given = {"HAS_BIAS": has_bias, "KIND": GATED.get(kind, kind), "GATED": kind in GATED, "TRANSPOSED": transposed}
    return {**given, "DTYPE": DTYPES[dtype], **chosen}


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _aligned(x: Tensor) -> Tensor:
    """x, contiguous and at an address and row pitch that TMA takes."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def _descriptor(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """The matrix [rows, cols] that begins where x does, for TMA to move in blocks of 64 x 64.

    Made without the checks of its own, which take longer than all else and hold here: x is `_aligned`, or new.
    """
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = x, [rows, cols], [cols, 1], [64, 64]
    made.layout, made.padding = tiling(), "zero"
    return made


def multiply(
    variant: Variant, packed: Tensor, x: Tensor, rows: int, inner: int, transposed: bool, bias: Tensor | None = None
) -> Tensor:
    """The packed [rows, inner] matrix times x, bf16 or fp16, fp32 accumulation, plus bias [rows].

    x [outer, inner] -> [outer, rows], or transposed: x [<= inner, outer] -> [rows, outer], rows of x that are missing
    counting as zero. rows and inner are multiples of 64, and outer one of 8 if transposed; outer > 0. On the current
    stream of the current device.
    """
    outer = x.shape[1] if transposed else x.shape[0]
    y = x.new_empty((rows, outer) if transposed else (outer, rows))
    _launch(variant, packed, x, rows, inner, transposed, bias, "", y, y)
    return y


def multiply_glu(
    variant: Variant, packed: Tensor, x: Tensor, rows: int, inner: int, bias: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    """y [outer, rows] = x [outer, inner] times the packed [rows, inner] matrix, transposed, without the bias, and
    `ops.glu` of it, [outer, rows / 2]. See `can_fuse`.
    """
    y, h = x.new_empty(x.shape[0], rows), x.new_empty(x.shape[0], rows // 2)
    _launch(variant, packed, x, rows, inner, False, bias, kind, y, h)
    return y, h


def can_fuse(variant: Variant, rows: int, kind: str) -> bool:
    """Whether `multiply_glu` serves: a tile has the gate and the other half of 128 features.

    Other kinds were tried and gained nothing on an H100: tensor cores wait for an activation of all sums as long as a
    kernel of its own takes (docs/kernels.md).
    """
    return kind in GATED and variant.MB == 2 and rows % 256 == 0


def _launch(
    variant: Variant,
    packed: Tensor,
    x: Tensor,
    rows: int,
    inner: int,
    transposed: bool,
    bias: Tensor | None,
    kind: str,
    y: Tensor,
    h: Tensor,
) -> None:
    outer = y.shape[1] if transposed else y.shape[0]
    layout.check(packed, rows, inner)
    packed, x = _aligned(packed), _aligned(x)
    tiles, steps = -(-rows // variant.rows) * -(-outer // variant.BN), -(-inner // 128)
    programs = min(tiles, _processors(x.device)) if variant.persistent else tiles
    cut, cuts = _cut(tiles, steps, _processors(x.device)) if variant.split else (0, 1)
    partials, counts = _nothing(x.device)
    if cut:
        programs = _processors(x.device)
        partials = x.new_empty(cut * (cuts - 1) * variant.rows * variant.BN, dtype=torch.float32)
        counts = x.new_zeros(cut * (cuts - 1) * _WGS, dtype=torch.int32)
    to = _descriptor(y, *y.shape)
    added = y if bias is None else bias.contiguous()
    launch(
        kernel,
        (programs,),
        x.device,
        _descriptor(packed, rows, inner // 2),
        packed[rows * inner // 2 :].view(torch.int64),
        _descriptor(x, *x.shape),
        to,
        to if h is y else _descriptor(h, *h.shape),
        added,
        partials,
        counts,
        rows,
        inner,
        outer,
        tiles - cut,
        cuts,
        key=(variant, x.dtype, transposed, None if bias is None else bias.dtype, added.data_ptr() % 16 == 0, kind),
        **constants(variant, x.dtype, transposed, bias is not None, kind),
        num_warps=4,
    )


@lru_cache(maxsize=64)
def _nothing(device: torch.device) -> tuple[Tensor, Tensor]:
    """Stands for the sums and counts of a launch that cuts no tile."""
    return torch.empty(4, dtype=torch.float32, device=device), torch.zeros(4, dtype=torch.int32, device=device)


@lru_cache(maxsize=1024)
def _cut(tiles: int, steps: int, processors: int) -> tuple[int, int]:
    """(tiles of the last round that are cut, parts of each), (0, 1) where that would not gain.

    To leave or to add the sums of a part takes about as long as `_LEAVING_STEPS` steps: what fits the times of an H100.
    """
    rest = tiles % processors

    def length(cuts: int) -> float:
        left = _LEAVING_STEPS if cuts > 1 else 0.0
        return -(-rest * cuts // processors) * (steps / cuts + left) + (cuts - 1) * _LEAVING_STEPS

    cuts = min(range(1, min(16, steps) + 1), key=length)
    return (rest, cuts) if rest and cuts > 1 else (0, 1)
