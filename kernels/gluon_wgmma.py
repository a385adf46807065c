"""Launching the Hopper kernel of `gluon_wgmma_kernel`: its variants, and where its tiles are cut."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import layout
from .gluon_loads import WARPGROUPS
from .gluon_wgmma_kernel import kernel
from .reference import GATED
from .triton_launch import launch

_LEAVING_STEPS = 5.5  # see `_cut`


class Variant(NamedTuple):
    """Tile rows 128 * MB by BN; ring depths NA (of 128 columns) and NB (of 64); NE slots a warpgroup to write
    from; GROUP row tiles are worked on together. CLUSTER: so many programs, each with the next rows of the packed
    operand, bring x for each other.
    """

    MB: int
    BN: int
    NA: int
    NB: int
    NE: int
    GROUP: int = 16
    CLUSTER: int = 1

    @property
    def rows(self) -> int:
        """Of the packed operand, in a tile of all programs of a cluster."""
        return 128 * self.MB * self.CLUSTER

    @property
    def slots(self) -> int:
        """Of shared memory, one for barriers among them."""
        return self.NA * WARPGROUPS * self.MB + self.NB * self.BN // 64 + WARPGROUPS * self.NE + 1


#: What is measured for each problem; the first one also serves the check at first use.
VARIANTS = (
    Variant(MB=1, BN=256, NA=2, NB=4, NE=3),
    Variant(MB=1, BN=256, NA=2, NB=4, NE=3, GROUP=8, CLUSTER=2),
    Variant(MB=2, BN=192, NA=2, NB=4, NE=3),
)

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
    given = {"HAS_BIAS": has_bias, "KIND": GATED.get(kind, kind), "GATED": kind in GATED, "TRANSPOSED": transposed}
    return {**given, "DTYPE": DTYPES[dtype], **variant._asdict()}


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

    Kinds that are not gated were tried and gained nothing on an H100: tensor cores wait for an activation of all sums
    as long as a kernel of its own takes (docs/kernels.md). With "reglu", which few models have, ptxas spills registers.
    """
    return kind in GATED and kind != "reglu" and variant.MB == 2 and rows % 256 == 0


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
    clusters = _processors(x.device) // variant.CLUSTER
    cut, cuts = _cut(tiles, steps, clusters)
    partials, counts = _nothing(x.device)
    if cut:
        left = cut * (cuts - 1)
        partials = x.new_empty(left * variant.rows * variant.BN, dtype=torch.float32)
        counts = x.new_zeros(left * WARPGROUPS * variant.CLUSTER, dtype=torch.int32)
    to = _descriptor(y, *y.shape)
    added = y if bias is None else bias.contiguous()
    launch(
        kernel,
        (clusters if cut else min(tiles, clusters),),
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
        cluster=variant.CLUSTER,
    )


@lru_cache(maxsize=64)
def _nothing(device: torch.device) -> tuple[Tensor, Tensor]:
    """Stands for the sums and counts of a launch that cuts no tile."""
    return torch.empty(4, dtype=torch.float32, device=device), torch.zeros(4, dtype=torch.int32, device=device)


@lru_cache(maxsize=1024)
def _cut(tiles: int, steps: int, clusters: int) -> tuple[int, int]:
    """(tiles of the last round that are cut, parts of each), (0, 1) where that would not gain.

    To leave or to add the sums of a part takes about as long as `_LEAVING_STEPS` steps: what fits the times of an H100.
    """
    rest = tiles % clusters

    def length(cuts: int) -> float:
        left = _LEAVING_STEPS if cuts > 1 else 0.0
        return -(-rest * cuts // clusters) * (steps / cuts + left) + (cuts - 1) * _LEAVING_STEPS

    cuts = min(range(1, min(16, steps) + 1), key=length)
    return (rest, cuts) if rest and cuts > 1 else (0, 1)
