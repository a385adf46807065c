"""Gated activations and the exact MVUE pruning of gradients, alone and fused: Triton.

The fused backward reads dh and gate_up once and writes the dense gradient (dgrad reads it), its packed 2:4 form (wgrad
reads it) and, for the bias, its sums over 64 tokens each. A program takes 64 tokens by 64 features; a thread holds
whole groups of four tokens.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from . import layout, reference
from .triton_common import INTERPRETED, check_dtypes, check_matrix, keys_of, prune_and_store
from .triton_launch import launch

# ----------------------------------------------------------------------------------------------------- gradient pruning


@triton.jit
def _load_row(at, present):
    return tl.load(at, mask=present, other=0.0).to(tl.float32)


@triton.jit
def _strip(across, STRIP: tl.constexpr):
    """This program's row of tiles, and its columns of tiles from first to last."""
    strips = (across + STRIP - 1) // STRIP
    down = tl.program_id(0) // strips
    first = (tl.program_id(0) - down * strips) * STRIP
    return down, first, tl.minimum(first + STRIP, across)


@triton.jit(do_not_specialize=["tokens", "index"])
def pack_gradient_kernel(
    dy,  # [tokens, features], rows `stride` apart
    packed,  # of dy^T: [features, padded]
    seeds,  # int64
    stride,
    tokens,
    padded,
    features,
    index,
    ORDER: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    STRIP: tl.constexpr,
):
    down, first, last = _strip(features // BF, STRIP)
    t0, keys = down * BT, keys_of(tl.load(seeds + index))
    t = t0 + 4 * tl.arange(0, BT // 4)[:, None]
    for tile in range(first, last):
        at = dy + t.to(tl.int64) * stride + (tile * BF + tl.arange(0, BF))[None, :]
        x0, x1 = _load_row(at, t < tokens), _load_row(at + stride, t + 1 < tokens)
        x2 = _load_row(at + stride + stride, t + 2 < tokens)
        x3 = _load_row(at + stride + stride + stride, t + 3 < tokens)
        prune_and_store(packed, x0, x1, x2, x3, keys, t0, tile * BF, padded, features, ORDER, BT, BF)


_STRIP = 2  # tiles of a program
_GRADIENT_STRIP = 4  # of `pack_gradient`


def _cdiv(a: int, b: int) -> int:  # triton.cdiv, made for kernels, takes a quarter of a launch on the host
    return -(-a // b)


def pack_gradient(dy: Tensor, seeds: Tensor, index: int) -> Tensor:
    """Twin of `reference.pack_gradient`, which defines it."""
    order = layout.metadata_order(dy.device)
    tokens, features = dy.shape
    padded = reference.padded(tokens)
    check_dtypes(dy=dy)
    check_matrix(features, padded, order)
    _check_seeds(seeds, index)
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    packed = layout.empty(features, padded, dy.dtype, dy.device)
    launch(
        pack_gradient_kernel,
        (padded // layout.TILE * _cdiv(features // layout.TILE, _GRADIENT_STRIP),),
        dy.device,
        dy,
        packed,
        seeds,
        dy.stride(0),
        tokens,
        padded,
        features,
        index,
        ORDER=order,
        BT=layout.TILE,
        BF=layout.TILE,
        STRIP=_GRADIENT_STRIP,
        num_warps=4,
        maxnreg=72,  # seven programs then fit on a multiprocessor
    )
    return packed


def _check_seeds(seeds: Tensor, index: int) -> None:
    if seeds.dim() != 1 or seeds.dtype != torch.int64 or not 0 <= index < seeds.shape[0] or not seeds.is_contiguous():
        found = f"index {index} of seeds {tuple(seeds.shape)} ({seeds.dtype})"
        raise ValueError(f"sparse24: found {found}, need an index into a contiguous int64 vector")


# ---------------------------------------------------------------------------------------------------- gated activations


@triton.jit
def _sigmoid(z):
    """0 and 1 at the infinities."""
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-z))
    # The same to two units in the last place, in a third of the instructions: what is not normal becomes zero.
    return libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-z))


@triton.jit
def _activation(z, KIND: tl.constexpr):
    """act(z) and act'(z), fp32. Launches forbid contracted products, so each is written out."""
    if KIND == "silu":
        s = _sigmoid(z)
        value = z * s
        slope = tl.fma(value, 1.0 - s, s)
    elif KIND == "gelu":
        cdf = tl.fma(0.5, tl.erf(z * 0.7071067811865476), 0.5)
        value, slope = z * cdf, tl.fma(z, tl.exp(-0.5 * z * z) * 0.3989422804014327, cdf)
    elif KIND == "gelu_tanh":  # (1 + tanh(y)) / 2 = sigmoid(2 y): nothing cancels, and no tanh is needed
        zz = z * z
        s = _sigmoid(z * tl.fma(zz, 0.07135481627260025, 1.5957691216057308))
        value = z * s
        slope = tl.fma(value * (1.0 - s), tl.fma(zz, 0.21406444881780073, 1.5957691216057308), s)
    elif KIND == "relu":
        value, slope = tl.where(z < 0, 0.0, z), tl.where(z <= 0, 0.0, 1.0)
    else:
        tl.static_assert(KIND == "relu2")
        relu = tl.where(z < 0, 0.0, z)
        value, slope = relu * relu, 2.0 * relu
    return value, slope


@triton.jit
def _load_z(z, bias, t, f, present, features, GATED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """gate (or the only input) and up, fp32, bias added, at rows t [R, 1] and columns f [1, C] of the activation."""
    at = z + t.to(tl.int64) * (2 * features if GATED else features) + f
    gate = _load_row(at, present)
    up = _load_row(at + features, present) if GATED else gate
    if HAS_BIAS:
        c = f + 0 * t  # the shape of z: a bias of its own layout would drag z through shared memory
        gate += _load_row(bias + c, c < features)
        if GATED:
            up += _load_row(bias + features + c, c < features)
    return gate, up


@triton.jit(do_not_specialize=["tokens"])
def glu_kernel(
    z,  # [tokens, 2 * features] if GATED, else [tokens, features]
    bias,  # of the columns of z, or nothing
    h,  # [tokens, features]
    tokens,
    features,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    t = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    f = tl.program_id(1) * BF + tl.arange(0, BF)[None, :]
    present = (t < tokens) & (f < features)
    gate, up = _load_z(z, bias, t, f, present, features, GATED, HAS_BIAS)
    value, _ = _activation(gate, KIND)
    if GATED:
        value *= up
    tl.store(h + t.to(tl.int64) * features + f, value.to(h.dtype.element_ty), mask=present)


@triton.jit
def _backward(d, dh, gate, up, t, f, present, features, KIND: tl.constexpr, GATED: tl.constexpr):
    """Store a piece of the gradient of z; return what was stored for gate and up, in its dtype."""
    value, slope = _activation(gate, KIND)
    dtype: tl.constexpr = d.dtype.element_ty
    at = d + t.to(tl.int64) * (2 * features if GATED else features) + f
    d_gate = (dh * up * slope if GATED else dh * slope).to(dtype)
    d_up = (dh * value).to(dtype) if GATED else d_gate
    tl.store(at, d_gate, mask=present)
    if GATED:
        tl.store(at + features, d_up, mask=present)
    return d_gate, d_up


@triton.jit(do_not_specialize=["tokens"])
def glu_backward_kernel(
    dh,  # [tokens, features]
    z,  # as in glu_kernel
    bias,
    d,  # of the shape of z
    sums,  # fp32 [cdiv(tokens, BT * STRIP), columns of z]: of d over the tokens of a program, where HAS_BIAS
    tokens,
    features,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    STRIP: tl.constexpr,
):
    f = tl.program_id(1) * BF + tl.arange(0, BF)[None, :]
    gate_sum, up_sum = tl.zeros([BT, BF], tl.float32), tl.zeros([BT, BF], tl.float32)
    for i in range(STRIP):
        t = (tl.program_id(0) * STRIP + i) * BT + tl.arange(0, BT)[:, None]
        present = (t < tokens) & (f < features)
        gate, up = _load_z(z, bias, t, f, present, features, GATED, HAS_BIAS)
        dh_ = _load_row(dh + t.to(tl.int64) * features + f, present)
        gate, up = _backward(d, dh_, gate, up, t, f, present, features, KIND, GATED)
        if HAS_BIAS:
            gate_sum += gate.to(tl.float32)
            if GATED:
                up_sum += up.to(tl.float32)
    if HAS_BIAS:
        f = tl.program_id(1) * BF + tl.arange(0, BF)
        sums += tl.program_id(0).to(tl.int64) * (2 * features if GATED else features) + f
        tl.store(sums, tl.sum(gate_sum, 0), mask=f < features)
        if GATED:
            tl.store(sums + features, tl.sum(up_sum, 0), mask=f < features)


@triton.jit(do_not_specialize=["tokens", "index"])
def glu_backward_pack_kernel(
    dh,  # [tokens, features], features a multiple of 64
    z,  # as in glu_kernel
    bias,
    d,  # of the shape of z
    packed,  # of d^T: [columns of z, padded]
    sums,  # fp32 [padded / BT, columns of z]: of d over the tokens of a tile, where HAS_BIAS
    seeds,  # int64
    tokens,
    padded,
    features,
    index,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ORDER: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    STRIP: tl.constexpr,
):
    width = 2 * features if GATED else features
    down, first, last = _strip(features // BF, STRIP)
    t0, keys = down * BT, keys_of(tl.load(seeds + index))
    t = t0 + 4 * tl.arange(0, BT // 4)[:, None]
    p0, p1, p2, p3 = t < tokens, t + 1 < tokens, t + 2 < tokens, t + 3 < tokens
    for tile in range(first, last):
        f0 = tile * BF
        f = f0 + tl.arange(0, BF)[None, :]
        # All loads come before the first store: nothing tells the compiler that d does not alias its inputs.
        at = dh + t.to(tl.int64) * features + f
        dh0, dh1 = _load_row(at, p0), _load_row(at + features, p1)
        dh2, dh3 = _load_row(at + features + features, p2), _load_row(at + features + features + features, p3)
        gate0, up0 = _load_z(z, bias, t, f, p0, features, GATED, HAS_BIAS)
        gate1, up1 = _load_z(z, bias, t + 1, f, p1, features, GATED, HAS_BIAS)
        gate2, up2 = _load_z(z, bias, t + 2, f, p2, features, GATED, HAS_BIAS)
        gate3, up3 = _load_z(z, bias, t + 3, f, p3, features, GATED, HAS_BIAS)
        gate0, up0 = _backward(d, dh0, gate0, up0, t, f, p0, features, KIND, GATED)
        gate1, up1 = _backward(d, dh1, gate1, up1, t + 1, f, p1, features, KIND, GATED)
        gate2, up2 = _backward(d, dh2, gate2, up2, t + 2, f, p2, features, KIND, GATED)
        gate3, up3 = _backward(d, dh3, gate3, up3, t + 3, f, p3, features, KIND, GATED)
        # past the last token dh is 0, and d with it
        x0, x1, x2, x3 = gate0.to(tl.float32), gate1.to(tl.float32), gate2.to(tl.float32), gate3.to(tl.float32)
        at = sums + down.to(tl.int64) * width + f0 + tl.arange(0, BF)
        if HAS_BIAS:
            tl.store(at, tl.sum((x0 + x1) + (x2 + x3), 0))
        prune_and_store(packed, x0, x1, x2, x3, keys, t0, f0, padded, width, ORDER, BT, BF)
        if GATED:
            x0, x1, x2, x3 = up0.to(tl.float32), up1.to(tl.float32), up2.to(tl.float32), up3.to(tl.float32)
            if HAS_BIAS:
                tl.store(at + features, tl.sum((x0 + x1) + (x2 + x3), 0))
            prune_and_store(packed, x0, x1, x2, x3, keys, t0, features + f0, padded, width, ORDER, BT, BF)


_BT, _BF = 16, 128  # tile of the elementwise kernels


def _problem(gate_up: Tensor, bias: Tensor | None, kind: str) -> tuple[int, int, dict[str, Any]]:
    """Tokens, features of the activation, and the constants that the kernels share."""
    check_dtypes(gate_up=gate_up, bias=bias)
    if kind not in reference.KINDS:
        raise ValueError(f"sparse24: found activation {kind!r}, need one of {', '.join(reference.KINDS)}")
    gated = kind in reference.GATED
    tokens, width = gate_up.shape
    if (gated and width % 2) or (bias is not None and bias.shape != (width,)):
        found = f"gate_up of {width} columns and bias {None if bias is None else tuple(bias.shape)}"
        raise ValueError(f"sparse24: found {found}, need a bias entry a column, and for gated kinds an even number")
    constants = {"KIND": reference.GATED.get(kind, kind), "GATED": gated, "HAS_BIAS": bias is not None}
    return tokens, width // 2 if gated else width, constants


def _same_rows(dh: Tensor, tokens: int, features: int) -> Tensor:
    check_dtypes(dh=dh)
    if dh.shape != (tokens, features):
        raise ValueError(f"sparse24: found dh {tuple(dh.shape)}, need ({tokens}, {features})")
    return dh.contiguous()


def glu(gate_up: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """Twin of `reference.glu`, which defines it up to rounding."""
    tokens, features, constants = _problem(gate_up, bias, kind)
    h = gate_up.new_empty(tokens, features)
    z = gate_up.contiguous()
    b = z if bias is None else bias.contiguous()
    grid = (_cdiv(tokens, _BT), _cdiv(features, _BF))
    launch(glu_kernel, grid, z.device, z, b, h, tokens, features, **constants, BT=_BT, BF=_BF, num_warps=4)
    return h


def glu_backward(dh: Tensor, gate_up: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """Twin of `reference.glu_backward`, which defines it up to rounding."""
    tokens, features, constants = _problem(gate_up, bias, kind)
    dh = _same_rows(dh, tokens, features)
    z = gate_up.contiguous()
    b = z if bias is None else bias.contiguous()
    d, sums = torch.empty_like(z), _sums(z, bias)
    strip = 1 if bias is None else layout.TILE // _BT  # the sums are over so many tokens
    grid = (_cdiv(tokens, strip * _BT), _cdiv(features, _BF))
    constants |= {"BT": _BT, "BF": _BF, "STRIP": strip}
    launch(glu_backward_kernel, grid, z.device, dh, z, b, d, sums, tokens, features, **constants, num_warps=4)
    return d, _total(sums)


def _sums(z: Tensor, bias: Tensor | None) -> Tensor:
    """Where a kernel puts the sums over the tokens of a tile; [0] where there is no bias to want them."""
    shape = (0,) if bias is None else (reference.padded(z.shape[0]) // layout.TILE, z.shape[1])
    return z.new_empty(shape, dtype=torch.float32)


def _total(sums: Tensor) -> Tensor:
    # in the order of the tiles: the same numbers give the same sum
    return sums.sum(0) if sums.dim() == 2 else sums


def glu_backward_pack(
    dh: Tensor, gate_up: Tensor, bias: Tensor | None, kind: str, seeds: Tensor, index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `reference.glu_backward_pack`. The packed form is that of the rounded gradient, bit for bit."""
    order = layout.metadata_order(gate_up.device)
    tokens, features, constants = _problem(gate_up, bias, kind)
    width, padded = gate_up.shape[1], reference.padded(tokens)
    check_matrix(width, padded, order)
    _check_seeds(seeds, index)
    if features % layout.TILE:  # gate and up share a tile of rows
        d, sums = glu_backward(dh, gate_up, bias, kind)
        return d, pack_gradient(d, seeds, index), sums
    dh = _same_rows(dh, tokens, features)
    z = gate_up.contiguous()
    b = z if bias is None else bias.contiguous()
    d, packed = torch.empty_like(z), layout.empty(width, padded, z.dtype, z.device)
    sums = _sums(z, bias)
    launch(
        glu_backward_pack_kernel,
        (padded // layout.TILE * _cdiv(features // layout.TILE, _STRIP),),
        z.device,
        dh,
        z,
        b,
        d,
        packed,
        sums,
        seeds,
        tokens,
        padded,
        features,
        index,
        **constants,
        ORDER=order,
        BT=layout.TILE,
        BF=layout.TILE,
        STRIP=_STRIP,
        num_warps=4,
        maxnreg=128,  # four programs then fit on a multiprocessor: worth more than the few registers spilled
    )
    return d, packed, _total(sums)
