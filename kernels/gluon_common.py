"""What the Gluon kernels share: the names that differ between versions of Triton, and small helpers.

Gluon is experimental: its names change from one Triton to the next. Triton 3.6 to 3.9 are served; elsewhere importing
this module may fail, and `gluon` then says why instead of a kernel.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of the warps of this partition
cp_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
constexpr_function = gluon.constexpr_function
#: From Triton 3.9 on, inline PTX runs once a thread, and takes the addresses of shared memory.
BY_THREAD = gl.constexpr(hasattr(gl, "inline_asm"))


@constexpr_function
def slice_to(layout, dim):
    """The layout of dimension `dim` of a tensor in `layout`."""
    for i in range(layout.rank - 1, -1, -1):
        if i != dim:
            layout = gl.SliceLayout(i, layout)
    return layout


@gluon.jit
def along(n: gl.constexpr, dim: gl.constexpr, layout: gl.constexpr, RANK: gl.constexpr):
    """0..n-1 along dimension `dim` of a tensor in `layout`; the other dimensions have size 1."""
    x = gl.arange(0, n, layout=slice_to(layout, dim))
    for i in gl.static_range(RANK):
        if i != dim:
            x = gl.expand_dims(x, i)
    return x


@gluon.jit
def advance(slot, phase, n: gl.constexpr):
    """The next slot of a ring of `n`, and the phase of its barriers, which flips with each round."""
    last = slot == n - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def tile_of(tile, tiles_m, tiles_n, GROUP: gl.constexpr):
    """Row and column of a tile: GROUP rows of tiles are walked through together, so that L2 serves them."""
    group = tile // (GROUP * tiles_n)
    first = group * GROUP
    height = gl.minimum(tiles_m - first, GROUP)
    rest = tile - group * (GROUP * tiles_n)
    return first + rest % height, rest // height
