"""2:4 sparse matmul on Ampere and Ada: `mma.sp` as inline PTX in a Gluon kernel with a cp.async pipeline.

    spmm    y [outer, rows] = x [outer, inner] (W.M)^T        wgrad   y [rows, outer] = (W.M) x [inner, outer]

The packed operand is read in the form that `layout` defines for sm_80: values through shared memory, from where
ldmatrix brings them into the order of the instruction; metadata, which have that order already, straight into
registers. A Hopper GPU runs it too, at a lower rate than its own instruction.
"""

# mypy: disable-error-code="assignment, no-redef, var-annotated"
# (of tuples that grow and names that a constant condition defines, as kernels have them)

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from . import layout
from .gluon_common import along, barrier, constexpr_function, cp_async, tile_of

_BM, _BK = 128, 64  # rows of a tile, as many as a block of the metadata; columns of a stage
BM, BK = gl.constexpr(_BM), gl.constexpr(_BK)


class Variant(NamedTuple):
    """A tile of 128 rows by 8 * NI * WN columns in WM by WN warps; STAGES in flight, GROUP as in `tile_of`."""

    WM: int = 2
    NI: int = 8
    WN: int = 2
    STAGES: int = 4
    GROUP: int = 8

    @property
    def columns(self) -> int:
        return 8 * self.NI * self.WN


#: What is measured for each problem; the first one also serves the check at first use.
VARIANTS = (Variant(STAGES=4), Variant(STAGES=3, NI=4))


@constexpr_function
def mma_asm(selector, dtype):
    """PTX of 16 rows by 8 columns by 32 of the packed operand: values, x, sums, metadata."""
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{dtype}.{dtype}.f32 {{$0, $1, $2, $3}}, "
        f"{{$4, $5, $6, $7}}, {{$8, $9, $10, $11}}, {{$12, $13, $14, $15}}, $16, {selector};"
    )


CONSTRAINTS = gl.constexpr("=f,=f,=f,=f," + "r," * 8 + "0,1,2,3,r,r,r,r")


@constexpr_function
def bits(step, dim, count):
    """Bases of `count` bits of a linear layout: step, 2 * step, ... along dimension `dim` of two."""
    return [[step << i, 0] if dim == 0 else [0, step << i] for i in range(count)]


@constexpr_function
def log2(n):
    return n.bit_length() - 1


@constexpr_function
def values_layout(MI, WM, WN):
    """Registers of the values of 32 columns, two to an int32, from [128, 8]."""
    registers = [[8, 0], [0, 4]] + bits(16, 0, log2(MI))
    lanes = bits(1, 1, 2) + bits(1, 0, 3)
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0]] * log2(WN) + bits(16 * MI, 0, log2(WM)), [], [_BM, 8])


@constexpr_function
def x_layout(NI, WM, WN, single):
    """Registers of x of 32 columns of the packed operand: two to an int32 from [n, 16] or, single, from [n, 32]."""
    first = [[0, 1]] if single else []
    unit = 2 if single else 1
    registers = first + bits(4 * unit, 1, 2) + bits(8, 0, log2(NI))
    lanes = bits(unit, 1, 2) + bits(1, 0, 3)
    warps = bits(8 * NI, 0, log2(WN)) + [[0, 0]] * log2(WM)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [8 * NI * WN, 16 * unit])


@gluon.jit
def issue(sa, sx, values, x, a_at, x_at, x_step, k, steps, x_mask, k_left, TRANSPOSED: gl.constexpr):
    """Start the loads of stage k, if there is one."""
    there = k < steps
    cp_async(sa, values + a_at + k * (BK // 4), mask=(a_at >= 0) & there)
    mask = x_mask & there
    if TRANSPOSED:
        mask = mask & (k_left > k * BK)
    cp_async(sx, x + x_at + k * x_step, mask=mask)
    async_copy.commit_group()


@gluon.jit
def pairs(x):
    """16-bit [..., 2] as int32 [...], the first one in the low half."""
    low, high = x.to(gl.int16, bitcast=True).split()
    return (low.to(gl.int32) & 0xFFFF) | (high.to(gl.int32) << 16)


@gluon.jit
def kernel(
    values,  # int32, two values each: packed operand [rows, inner / 4]
    meta,  # int32, its metadata
    x,  # int32 [outer, inner / 2] or, TRANSPOSED, 16 bits [tokens, outer]
    y,  # [outer, rows] or, TRANSPOSED, [rows, outer]
    bias,  # [rows]
    rows,
    inner,
    outer,
    tokens,  # rows of x, if TRANSPOSED; the others count as zero
    HAS_BIAS: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    DTYPE: gl.constexpr,
    WM: gl.constexpr,
    NI: gl.constexpr,
    WN: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    WARPS: gl.constexpr = WM * WN
    MI: gl.constexpr = 8 // WM
    BN: gl.constexpr = 8 * NI * WN
    L6: gl.constexpr = gl.BlockedLayout(
        [MI, 1, NI, 1, 1, 4], [1, 1, 1, 1, 32, 1], [1, WM, 1, WN, 1, 1], [5, 4, 3, 2, 1, 0]
    )
    tm, tn = tile_of(gl.program_id(0), rows // BM, gl.cdiv(outer, BN), GROUP)
    steps = inner // BK

    LOAD_A: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    row = tm * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, LOAD_A)).expand_dims(1)
    column = gl.arange(0, BK // 4, layout=gl.SliceLayout(0, LOAD_A)).expand_dims(0)
    a_at = row.to(gl.int64) * (inner // 4) + column
    sa = gl.allocate_shared_memory(gl.int32, [STAGES, BM, BK // 4], gl.SwizzledSharedLayout(4, 2, 4, [1, 0]))
    if TRANSPOSED:
        LOAD_X: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16] if BN >= 128 else [4, 8], [WARPS, 1], [1, 0])
        k = gl.arange(0, BK, layout=gl.SliceLayout(1, LOAD_X)).expand_dims(1)
        n = tn * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, LOAD_X)).expand_dims(0)
        x_at = k.to(gl.int64) * outer + n
        x_mask, k_left, x_step = (n < outer) & (k >= 0), tokens - k + 0 * n, outer.to(gl.int64) * BK
        sx = gl.allocate_shared_memory(x.dtype.element_ty, [STAGES, BK, BN], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    else:
        LOAD_X: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
        n = tn * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, LOAD_X)).expand_dims(1)
        k = gl.arange(0, BK // 2, layout=gl.SliceLayout(0, LOAD_X)).expand_dims(0)
        x_at = n.to(gl.int64) * (inner // 2) + k
        x_mask, k_left, x_step = (n < outer) & (k >= 0), 0, BK // 2
        sx = gl.allocate_shared_memory(gl.int32, [STAGES, BN, BK // 2], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))

    mi, wm, lane, reg = along(MI, 0, L6, 6), along(WM, 1, L6, 6), along(32, 4, L6, 6), along(4, 5, L6, 6)
    m16 = wm * MI + mi
    e_at = tm * 256 + m16 // 2 * 32 + m16 % 2 * 2 + lane // 4 * 4 + lane // 2 % 2 * 128 + lane % 2
    e_step = rows // BM * 256

    for s in gl.static_range(STAGES - 1):
        issue(sa.index(s), sx.index(s), values, x, a_at, x_at, x_step, s, steps, x_mask, k_left, TRANSPOSED)
    acc = gl.full([MI, WM, NI, WN, 32, 4], 0.0, gl.float32, L6)
    following = gl.load(meta + e_at)
    for step in range(steps):
        e = following
        following = gl.load(meta + e_at + gl.minimum(step + 1, steps - 1).to(gl.int64) * e_step)
        async_copy.wait_group(STAGES - 2)
        barrier()
        ahead = step + STAGES - 1
        slot = ahead % STAGES
        issue(sa.index(slot), sx.index(slot), values, x, a_at, x_at, x_step, ahead, steps, x_mask, k_left, TRANSPOSED)
        now = step % STAGES
        for k32 in gl.static_range(2):
            a = sa.index(now).slice(k32 * 8, 8, dim=1).load(values_layout(MI, WM, WN))
            a = a.reshape([WM, MI, 2, 8, 2, 4]).permute([1, 0, 3, 5, 4, 2]).reshape([MI, WM, 1, 1, 32, 4])
            a = gl.convert_layout(a, L6, assert_trivial=True)
            if TRANSPOSED:
                b = sx.index(now).slice(k32 * 32, 32, dim=0).permute([1, 0]).load(x_layout(NI, WM, WN, True))
                b = pairs(b.reshape([WN, NI, 8, 4, 4, 2]))
            else:
                b = sx.index(now).slice(k32 * 16, 16, dim=1).load(x_layout(NI, WM, WN, False))
                b = b.reshape([WN, NI, 8, 4, 4])
            b = b.permute([1, 0, 2, 4, 3]).reshape([1, 1, NI, WN, 32, 4])
            b = gl.convert_layout(b, L6, assert_trivial=True)
            acc = gl.inline_asm_elementwise(mma_asm(k32, DTYPE), CONSTRAINTS, [a, b, acc, e], gl.float32, True, 4)

    if HAS_BIAS:
        acc += gl.load(bias + tm * BM + m16 * 16 + lane // 4 + reg // 2 * 8).to(gl.float32)
    acc = acc.to(y.dtype.element_ty).reshape([MI, WM, NI, WN, 8, 4, 2, 2])
    if TRANSPOSED:
        STORE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16] if BN >= 128 else [4, 8], [WARPS, 1], [1, 0])
        out = gl.convert_layout(acc.permute([1, 0, 6, 4, 3, 2, 5, 7]).reshape([BM, BN]), STORE)
        m = tm * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, STORE)).expand_dims(1)
        n = tn * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, STORE)).expand_dims(0)
        gl.store(y + m.to(gl.int64) * outer + n, out, mask=(n < outer) & (m >= 0))
    else:
        STORE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
        out = gl.convert_layout(acc.permute([3, 2, 5, 7, 1, 0, 6, 4]).reshape([BN, BM]), STORE)
        n = tn * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, STORE)).expand_dims(1)
        m = tm * BM + gl.arange(0, BM, layout=gl.SliceLayout(0, STORE)).expand_dims(0)
        gl.store(y + n.to(gl.int64) * rows + m, out, mask=(n < outer) & (m >= 0))


DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
ALIGNMENT = 16  # bytes, of what cp.async copies


def constants(variant: Variant, dtype: torch.dtype, transposed: bool, has_bias: bool) -> dict[str, object]:
    """The compile-time arguments of `kernel`."""
    return {"HAS_BIAS": has_bias, "TRANSPOSED": transposed, "DTYPE": DTYPES[dtype], **variant._asdict()}


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def multiply(
    variant: Variant, packed: Tensor, x: Tensor, rows: int, inner: int, transposed: bool, bias: Tensor | None = None
) -> Tensor:
    """The packed [rows, inner] matrix times x, bf16 or fp16, fp32 accumulation, plus bias [rows].

    packed has its metadata in the order of sm_80. x [outer, inner] -> [outer, rows], or transposed: x [<= inner, outer]
    -> [rows, outer], rows of x that are missing counting as zero. rows is a multiple of 128, inner of 64, and outer of
    16 if transposed; outer > 0. On the current stream of the current device.
    """
    outer = x.shape[1] if transposed else x.shape[0]
    y = x.new_empty((rows, outer) if transposed else (outer, rows))
    values, metadata = layout.split(_aligned(packed), rows, inner)
    x = _aligned(x)
    kernel[(rows // _BM * -(-outer // variant.columns),)](
        values.view(torch.int32),
        metadata.view(torch.int32),
        x if transposed else x.view(torch.int32),
        y,
        y if bias is None else bias.contiguous(),
        rows,
        inner,
        outer,
        x.shape[0],
        **constants(variant, x.dtype, transposed, bias is not None),
        num_warps=variant.WM * variant.WN,
    )
    return y
