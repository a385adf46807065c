"""What the Hopper kernel works on, and how it gets there: the parts of tiles that a program takes, the warps that load
them by TMA, and the metadata, which go straight into registers.
"""

# mypy: disable-error-code="assignment, no-redef, var-annotated"
# (of tuples that grow and names that a constant condition defines, as kernels have them)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_common import advance, along, constexpr_function, tile_of
from .gluon_ptx import (
    SLOT,
    address_of,
    bring,
    meet,
    nibbles_asm,
    rank_of,
    threads,
    until,
)

WARPGROUPS = 2  # that multiply: of three, each would have too few registers for 256 columns
WGS = gl.constexpr(WARPGROUPS)


@gluon.jit
def parts_of(size, CLUSTER: gl.constexpr):
    """How many parts this program works on: whole tiles first, then parts of the last ones. A cluster works as one, on
    tiles of CLUSTER times the rows.
    """
    rows, inner, tiles_m, tiles_n, steps, whole, cuts = size
    at, of = gl.program_id(0) // CLUSTER, gl.num_programs(0) // CLUSTER
    return gl.cdiv(whole + (tiles_m * tiles_n - whole) * cuts - at, of)


@gluon.jit
def work_of(i, size, CLUSTER: gl.constexpr):
    """Part i of this program: its tile, its steps from first to last, which of the tile's `cuts` parts it is (-1: all
    of it), and its place among these parts. First come the first parts of all tiles that are cut, then the second ones.
    """
    rows, inner, tiles_m, tiles_n, steps, whole, cuts = size
    cut = gl.maximum(tiles_m * tiles_n - whole, 1)
    at = gl.program_id(0) // CLUSTER + i * (gl.num_programs(0) // CLUSTER)
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


@constexpr_function
def barriers(NA, NB, CLUSTER):
    """Arrivals of the mbarriers behind the slots: NA and NB that say that a slot of a ring is full, then those that say
    that it was read, in a cluster by all.
    """
    return (1,) * (NA + NB) + (WARPGROUPS,) * NA + (WARPGROUPS * CLUSTER,) * NB


@gluon.jit
def bring_packed(
    arena,
    size,
    PARAMETER: gl.constexpr,
    GATED: gl.constexpr,
    MB: gl.constexpr,
    NA: gl.constexpr,
    NB: gl.constexpr,
    BARS: gl.constexpr,
    GROUP: gl.constexpr,
    CLUSTER: gl.constexpr,
):
    """A warp that loads the packed operand."""
    rows, inner, tiles_m, tiles_n, steps, whole, cuts = size
    SA: gl.constexpr = MB * WGS
    rank, at = rank_of(CLUSTER), address_of(arena) + 0 * threads(32)
    meet(32, CLUSTER)
    a, pa = 0, 1
    for u in range(parts_of(size, CLUSTER)):
        tile, first, to, _, _ = work_of(u, size, CLUSTER)
        tm, tn = tile_of(tile, tiles_m, tiles_n, GROUP)
        for i in range(first, to):
            where = ()
            for r in gl.static_range(SA):
                where = where + (i * 64, block_of(tm * CLUSTER + rank, r, rows, MB, GATED) * 64)
            full = at + BARS + 8 * a
            until(full + 8 * (NA + NB), pa)
            bring(full, at + a * SA * SLOT, where, SA, SA, PARAMETER, 1)
            a, pa = advance(a, pa, NA)
    meet(32, CLUSTER)


@gluon.jit
def bring_x(
    arena,
    size,
    PARAMETER: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    FIRST: gl.constexpr,
    BN: gl.constexpr,
    NA: gl.constexpr,
    NB: gl.constexpr,
    BARS: gl.constexpr,
    GROUP: gl.constexpr,
    CLUSTER: gl.constexpr,
):
    """A warp that loads x, in a cluster its part of it for all."""
    rows, inner, tiles_m, tiles_n, steps, whole, cuts = size
    SB: gl.constexpr = BN // 64
    MINE: gl.constexpr = SB // CLUSTER
    rank, at = rank_of(CLUSTER), address_of(arena) + 0 * threads(32)
    meet(32, CLUSTER)
    b, pb = 0, 1
    for u in range(parts_of(size, CLUSTER)):
        tile, first, to, _, _ = work_of(u, size, CLUSTER)
        tm, tn = tile_of(tile, tiles_m, tiles_n, GROUP)
        for i in range(2 * first, 2 * to):
            where = ()
            for r in gl.static_range(MINE):
                n = tn * BN + (rank * MINE + r) * 64
                where = where + ((n, i * 64) if TRANSPOSED else (i * 64, n))
            full = at + BARS + 8 * (NA + b)
            until(full + 8 * (NA + NB), pb)
            slot = at + (FIRST + b * SB + rank * MINE) * SLOT
            bring(full, slot, where, MINE, SB, PARAMETER, CLUSTER)
            b, pb = advance(b, pb, NB)
    meet(32, CLUSTER)


@gluon.jit
def bystander(CLUSTER: gl.constexpr):
    """Threads without work: a warpgroup has them, and a cluster's barrier waits for them too."""
    meet(32, CLUSTER)
    meet(32, CLUSTER)


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
