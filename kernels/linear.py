"""Differentiable sparse linear layers: three sparse GEMMs, put together from the ops.

    forward   y  = x (W.M)^T              spmm(packed, x)            packed    = W.M       [out, in]
    dgrad     dx = dy (W.M)               spmm(packed_t, dy)         packed_t  = (W.M)^T   [in, out]
    wgrad     dW = S(dy)^T x              wgrad(pack_gradient(dy), x)            S: exact MVUE; or dy^T x with
              wgrad="dense"

They are autograd.Functions and not ops with a registered formula, so that AOTAutograd traces through them: the forward
and the backward graph then show `spmm`, `glu`, `pack_gradient` and `wgrad` as nodes, and Inductor fuses what stands
between. The weights come in only to receive their gradient (straight-through: dense, unmasked); what is multiplied is
the packed form. Several weights that share x are one layer: their outputs stand side by side, in the order of
`weights`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import gluon_matmul, ops


def sparse_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    packed: Tensor,
    packed_t: Tensor,
    seeds: Tensor,
    index: int,
    wgrad: str,
    transposed: bool,
) -> Tensor:
    """x [..., K] -> [..., F], F the out_features of all weights together. No bias.

    weights: dense masters [F_i, K], or [K, F_i] where `transposed`. packed [F, K] and packed_t [K, F] in x's dtype.
    seeds int64 [n]: the draw of this layer is seeds[index]. wgrad "mvue" or "dense".
    """
    tokens = x.reshape(-1, x.shape[-1])
    y: Tensor = _SparseLinear.apply(tokens, packed, packed_t, seeds, index, wgrad, transposed, *weights)
    return y.view(*x.shape[:-1], y.shape[-1])  # out here: what a Function returns as a view cannot be modified in place


def sparse_linear_glu(
    x: Tensor,
    weights: Sequence[Tensor],
    packed: Tensor,
    packed_t: Tensor,
    seeds: Tensor,
    index: int,
    wgrad: str,
    transposed: bool,
    bias: Tensor | None,
    kind: str,
) -> Tensor:
    """`sparse_linear`, its bias [F] and the activation `kind` of `ops.glu`: x [..., K] -> [..., F] or, gated, [..., F /
    2].

    The backward of the activation writes the dense and the packed gradient of the up projection from one read.
    """
    tokens = x.reshape(-1, x.shape[-1])
    h: Tensor = _SparseLinearGLU.apply(tokens, packed, packed_t, seeds, bias, index, wgrad, transposed, kind, *weights)
    return h.view(*x.shape[:-1], h.shape[-1])


def _out_features(weights: Sequence[Tensor], transposed: bool) -> list[int]:
    return [w.shape[1] if transposed else w.shape[0] for w in weights]


def _split_wgrad(dw: Tensor, sizes: list[int], dtypes: list[torch.dtype], transposed: bool) -> list[Tensor]:
    """dW [F, K] -> one gradient a weight, in its own shape and dtype."""
    parts = dw.split(sizes) if len(sizes) > 1 else (dw,)
    return [(p.t() if transposed else p).to(dtype) for p, dtype in zip(parts, dtypes, strict=True)]


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, packed, packed_t, seeds, index, wgrad, transposed, *weights):  # type: ignore[no-untyped-def]
        ctx.sizes, ctx.dtypes = _out_features(weights, transposed), [w.dtype for w in weights]
        ctx.index, ctx.wgrad, ctx.transposed = index, wgrad, transposed
        ctx.save_for_backward(tokens, packed_t, seeds)
        return ops.spmm(packed, tokens, sum(ctx.sizes))

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
        tokens, packed_t, seeds = ctx.saved_tensors
        dx: Tensor | None = None
        dws: Sequence[Tensor | None] = [None] * len(ctx.sizes)
        if ctx.needs_input_grad[0]:
            dx = ops.spmm(packed_t, dy, tokens.shape[1])
        if any(ctx.needs_input_grad[7:]):
            if ctx.wgrad == "mvue":
                dw = ops.wgrad(ops.pack_gradient(dy, seeds, ctx.index), tokens, dy.shape[1])
            else:
                dw = dy.t() @ tokens
            dws = _split_wgrad(dw, ctx.sizes, ctx.dtypes, ctx.transposed)
        return dx, None, None, None, None, None, None, *dws


class _SparseLinearGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, packed, packed_t, seeds, bias, index, wgrad, transposed, kind, *weights):  # type: ignore[no-untyped-def]
        ctx.sizes, ctx.dtypes = _out_features(weights, transposed), [w.dtype for w in weights]
        ctx.index, ctx.wgrad, ctx.transposed, ctx.kind = index, wgrad, transposed, kind
        if gluon_matmul.asked_for():
            gate_up, h = ops.spmm_glu(packed, tokens, bias, sum(ctx.sizes), kind)
        else:
            gate_up = ops.spmm(packed, tokens, sum(ctx.sizes))
            h = ops.glu(gate_up, bias, kind)
        ctx.save_for_backward(tokens, packed_t, seeds, bias, gate_up)
        return h

    @staticmethod
    def backward(ctx, dh):  # type: ignore[no-untyped-def, override]
        tokens, packed_t, seeds, bias, gate_up = ctx.saved_tensors
        need_x, need_bias, need_w = ctx.needs_input_grad[0], ctx.needs_input_grad[4], any(ctx.needs_input_grad[9:])
        dx: Tensor | None = None
        dbias: Tensor | None = None
        dws: Sequence[Tensor | None] = [None] * len(ctx.sizes)
        if need_w and ctx.wgrad == "mvue":
            d, packed_d, sums = ops.glu_backward_pack(dh, gate_up, bias, ctx.kind, seeds, ctx.index)
            dw = ops.wgrad(packed_d, tokens, d.shape[1])
        else:
            d, sums = ops.glu_backward(dh, gate_up, bias, ctx.kind)
            dw = d.t() @ tokens if need_w else d
        if need_w:
            dws = _split_wgrad(dw, ctx.sizes, ctx.dtypes, ctx.transposed)
        if need_x:
            dx = ops.spmm(packed_t, d, tokens.shape[1])
        if need_bias:
            dbias = sums.to(bias.dtype)
        return dx, None, None, None, dbias, None, None, None, None, *dws
