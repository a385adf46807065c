"""2:4 sparse matmul on Hopper: `wgmma.mma_async.sp` as inline PTX in a persistent, warp-specialised Gluon kernel.

    spmm    y [outer, rows] = x [outer, inner] (W.M)^T        wgrad   y [rows, outer] = (W.M) x [inner, outer]

and spmm with a gated activation behind it: h [outer, rows / 2] straight from the sums, beside y, which the backward
reads.

The packed operand is read in the form that `layout` defines for sm_90, values by TMA and metadata straight into
registers. A warp loads the packed operand and another one x; each consumer warpgroup multiplies MB blocks of 64 rows
with the BN columns of the tile that all of them share. A step is 128 columns of the packed operand, in two halves: the
second is issued before the first has been waited for, and the first one's slot of x given back while the second is
worked on. While the consumers write a tile, the loads of the next one are under way. The programs of a cluster have the
same columns, and each brings its part of them to all.

Shared memory is one arena of slots, each 64 x 64 entries with 128 byte swizzle: rings for the packed operand (64 rows
by 128 columns of it a slot) and for x (64 by 64), slots to write the result from, and one with the mbarriers. A single
buffer, because the PTX takes its address from the symbol `global_smem`: Triton puts the largest buffer first, at offset
0. That is an assumption, and `gluon_matmul` tests it. From Triton 3.9 on inline PTX gets the slots' addresses instead.
That was compiled only, and not run.

The mbarriers are of inline PTX too: Triton lets a warpgroup meet before it arrives at one of its own, three times a
step, and with that tiles of 128 x 256 were up to 7% slower (docs/kernels.md).

Where the last round of tiles leaves multiprocessors idle, its tiles are cut into equal parts of their steps (split-K).
Programs that run together then still read the same rows and columns; shares of equal length (stream-K) were slower on
an H100, because each program was at another step and L2 served none of them. The program of a tile's last part adds
what the others left in memory, in their order, so that results stay the same from run to run.
"""

# mypy: disable-error-code="assignment, no-redef, var-annotated"
# (of tuples that grow and names that a constant condition defines, as kernels have them)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from .gluon_common import advance, along, barrier, tile_of, tma_store
from .gluon_loads import (
    WGS,
    barriers,
    block_of,
    bring_packed,
    bring_x,
    bystander,
    load_metadata,
    ordered,
    parts_of,
    place_of_sums,
    work_of,
)
from .gluon_ptx import (
    SLOT,
    address_of,
    arrive_asm,
    await_asm,
    drained,
    give_back,
    init_asm,
    meet,
    mma,
    rank_of,
    threads,
    until,
    whereabouts,
)

#: Of |z|, the highest power first: the logarithm to base 2 of a normal number's chance to be below -|z|, to 1e-5 up to
#: 6, and falling without end behind. Fitted for the least largest error.
TAIL = gl.constexpr(
    (-1.79378068e-06, 6.07261672e-05, -0.000923185796, 0.00847684757, -0.053890939, -0.458541584, -1.15121437, -1.0)
)


@gluon.jit
def tail(z):
    """A normal number's chance to be below -|z|. libdevice's erf takes more instructions and more registers than the
    sums leave.
    """
    p = TAIL[0]
    for i in gl.static_range(1, 8):
        p = p * gl.abs(z) + TAIL[i]
    return gl.exp2(p)


@gluon.jit
def activation(z, KIND: gl.constexpr):
    """fp32; as in `triton_glu`, with other roundings."""
    if KIND == "silu":
        return z / (1.0 + gl.exp2(-1.4426950408889634 * z))
    elif KIND == "gelu":
        return gl.maximum(z, 0.0) - gl.abs(z) * tail(z)
    else:  # (1 + tanh(y)) / 2 = sigmoid(2 y)
        gl.static_assert(KIND == "gelu_tanh")
        return z / (1.0 + gl.exp2(z * (-0.10294324 * (z * z) - 2.3022082)))


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
def store_gated(
    written, slots, z, up, bias, corner, s: gl.constexpr, NE: gl.constexpr, HAS_BIAS: gl.constexpr, KIND: gl.constexpr
):
    """Block s of the gate, that of the other half, `half` features behind it, and of h."""
    y, h = written
    row, half, m0, n0 = corner
    z, up = z.to(y.dtype), up.to(y.dtype)
    store(y, slots, z, m0, n0, 3 * s, NE, False)
    store(y, slots, up, half + m0, n0, 3 * s + 1, NE, False)
    z, up = z.to(gl.float32), up.to(gl.float32)
    if HAS_BIAS:
        z, up = z + gl.load(bias + row).to(gl.float32), up + gl.load(bias + half + row).to(gl.float32)
    store(h, slots, (activation(z, KIND) * up).to(y.dtype), m0, n0, 3 * s + 2, NE, False)


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
    BARS: gl.constexpr,
    GROUP: gl.constexpr,
    CLUSTER: gl.constexpr,
):
    meta, y, h, bias, partials, counts, arena, size, outer = data
    rows, inner, tiles_m, tiles_n, steps, whole, cuts = size
    SA: gl.constexpr = MB * WGS
    SB: gl.constexpr = BN // 64
    L4: gl.constexpr = gl.BlockedLayout([8, 1, 1, 4], [1, 1, 32, 1], [1, 4, 1, 1], [3, 2, 1, 0])
    warp, lane, reg = along(4, 1, L4, 4), along(32, 2, L4, 4), along(4, 3, L4, 4)
    selector = gl.where(lane % 2 == 0, 0x6420, 0x7531) + 0 * warp
    last = inner // 64 - 1
    bars = address_of(arena) + BARS + 0 * threads(128)
    bars_b = bars + 8 * NA
    rank = rank_of(CLUSTER)
    meet(128, CLUSTER)
    a, pa, b, pb = 0, 0, 0, 0
    for u in range(parts_of(size, CLUSTER)):
        tile, first, to, which, place = work_of(u, size, CLUSTER)
        tm, tn = tile_of(tile, tiles_m, tiles_n, GROUP)
        tm = tm * CLUSTER + rank
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
            until(bars + 8 * a, pa)
            packed = whereabouts(arena, a * SA + WG * MB, L4)
            until(bars_b + 8 * b, pb)
            b_at = whereabouts(arena, NA * SA + b * SB, L4)
            acc = mma(acc, packed, b_at, e0, 0, MB, BN, TRANSPOSED, DTYPE)
            done = bars_b + 8 * (NA + NB + b)
            b, pb = advance(b, pb, NB)
            until(bars_b + 8 * b, pb)
            b_at = whereabouts(arena, NA * SA + b * SB, L4)
            acc = mma(acc, packed, b_at, e1, 1, MB, BN, TRANSPOSED, DTYPE)
            give_back(done, CLUSTER)
            acc = drained(acc, e0 + e1, MB, BN)
            give_back(bars_b + 8 * (NA + NB + b), CLUSTER)
            b, pb = advance(b, pb, NB)
            give_back(bars + 8 * (NA + NB + a), 1)
            a, pa = advance(a, pa, NA)
        leaves = (which >= 0) & (which < cuts - 1)
        cut = tiles_m * tiles_n - whole
        for before in range(0, gl.where(which == cuts - 1, which, 0)):
            p = (place - (which - before) * cut) * CLUSTER + rank
            there = counts + WGS * p + WG + 0 * threads(128)
            gl.inline_asm_elementwise(await_asm(), "=r,l", [there], gl.int32, False, 1)
            left = place_of_sums(partials, p, WG, MB, BN, L4)
            added = ()
            for s in gl.static_range(MB * SB):
                added = added + (acc[s] + gl.load(left + s * 4096),)
            acc = added
        if leaves:
            p = place * CLUSTER + rank
            left = place_of_sums(partials, p, WG, MB, BN, L4)
            for s in gl.static_range(MB * SB):
                gl.store(left + s * 4096, acc[s])
            here = counts + WGS * p + WG + 0 * threads(128)
            gl.inline_asm_elementwise(arrive_asm(), "=r,l", [here], gl.int32, False, 1)
        else:
            slots = arena, NA * SA + NB * SB + WG * NE
            for m in gl.static_range(1 if GATED else MB):
                m0 = block_of(tm, WG * MB + m, rows, MB, GATED) * 64
                row = m0 + warp * 16 + lane // 4 + reg // 2 * 8
                if HAS_BIAS and not GATED:
                    add = gl.load(bias + row, mask=row < rows, other=0.0).to(gl.float32)
                for s in gl.static_range(SB):
                    part, n0 = acc[m * SB + s], tn * BN + s * 64
                    if GATED:
                        written, corner = (y, h), (row, rows // 2, m0, n0)
                        if n0 < outer:  # also keeps ptxas from taking all activations first, which spills registers
                            store_gated(written, slots, part, acc[SB + s], bias, corner, s, NE, HAS_BIAS, KIND)
                    else:
                        if HAS_BIAS:
                            part += add
                        store(y, slots, part.to(y.dtype), m0, n0, m * SB + s, NE, TRANSPOSED)
    tma.store_wait(0)
    meet(128, CLUSTER)


@gluon.jit(do_not_specialize=["rows", "inner", "outer", "whole", "cuts"])
def kernel(
    values,  # packed operand [rows, inner / 2]
    meta,  # int64, its metadata
    x,  # [outer, inner] or, TRANSPOSED, [inner, outer]
    y,  # [outer, rows] or, TRANSPOSED, [rows, outer]
    h,  # GATED: [outer, rows / 2]
    bias,  # [rows], added to y or, GATED, within the activation only
    partials,  # fp32 [parts but the last of each tile, tile]: their sums
    counts,  # int32 [these parts, programs of a cluster, WGS], zeroed: how many warps have left theirs
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
    CLUSTER: gl.constexpr,
):
    BM: gl.constexpr = 64 * MB * WGS * CLUSTER
    FIRST: gl.constexpr = NA * MB * WGS
    SLOTS: gl.constexpr = FIRST + NB * (BN // 64) + WGS * NE
    BARS: gl.constexpr = SLOTS * SLOT
    COUNTS: gl.constexpr = barriers(NA, NB, CLUSTER)
    arena = gl.allocate_shared_memory(x.dtype, [SLOTS + 1, 64, 64], x.layout)
    bars = address_of(arena) + BARS + 0 * threads(128)
    gl.inline_asm_elementwise(init_asm(COUNTS), "=r,r", [bars], gl.int32, False, 1)
    fence_async_shared()
    tiles_m, tiles_n, steps = gl.cdiv(rows, BM), gl.cdiv(outer, BN), gl.cdiv(inner, 128)
    size = (rows, inner, tiles_m, tiles_n, steps, whole, cuts)
    data = (meta, y, h, bias, partials, counts, arena, size, outer)
    # 0 and 6: the places of the descriptors of `values` and x among the parameters as compiled (test_gluon_aot.py)
    gl.warp_specialize(
        [
            (consumer, (0, data, HAS_BIAS, KIND, GATED, TRANSPOSED, DTYPE, MB, BN, NA, NB, NE, BARS, GROUP, CLUSTER)),
            (consumer, (1, data, HAS_BIAS, KIND, GATED, TRANSPOSED, DTYPE, MB, BN, NA, NB, NE, BARS, GROUP, CLUSTER)),
            (bring_packed, (arena, size, 0, GATED, MB, NA, NB, BARS, GROUP, CLUSTER)),
            (bring_x, (arena, size, 6, TRANSPOSED, FIRST, BN, NA, NB, BARS, GROUP, CLUSTER)),
            (bystander, (CLUSTER,)),
            (bystander, (CLUSTER,)),
        ],
        [4, 1, 1, 1, 1],
        [232, 24, 24, 24, 24],
    )
    arena._keep_alive()
