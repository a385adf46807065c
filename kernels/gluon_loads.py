"""What the Hopper kernel works on, and how it gets there: the parts of tiles that a program takes, the warp that loads
them by TMA, and the metadata, which go straight into registers.
"""

# mypy: disable-error-code="assignment, no-redef, var-annotated"
# (of tuples that grow and names that a constant condition defines, as kernels have them)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .gluon_common import advance, along, tile_of, tma_load
from .gluon_ptx import SLOT, nibbles_asm

WARPGROUPS = 2  # that multiply: of three, each would have too few registers for 256 columns
WGS = gl.constexpr(WARPGROUPS)


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
