"""S-STE (arXiv 2409.09099): a weight is multiplied as S(W) = beta * soft24(W), which is continuous in W.

    forward   y  = x S(W)^T             spmm(packed, x)        packed  = S(W), 2:4 along in_features
    dgrad     dx = dy S(W)              a dense GEMM           dense   = S(W) with its zeros, [out, in]: its transpose
              is not 2:4, so no sparse tensor core can read it
    wgrad     dW = MVUE(dy)^T x         as in `linear`; it goes straight through S to W

So two of the three GEMMs are sparse. S(W) has new numbers and may have a new pattern at every optimizer step. It is
made by plain PyTorch operations, some thirty passes over W a step on any device, where the masks of `pack_weights_`
take one kernel; what that costs on a GPU was not measured. Activations are not fused into these linears.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import layout, ops


def soft24(w: Tensor) -> tuple[Tensor, Tensor]:
    """soft24(w) and which lanes it keeps. w [rows, cols], cols % 4 == 0, any float dtype.

    -> (the same shape, float32, or float64 where w is; int64 [rows, cols / 4, 2], lanes i < j of each group of four).
    Of a group a the second smallest magnitude t is taken off: sign(a) * max(|a| - t, 0), which leaves at most two
    nonzero entries. Kept are the two largest, of equals the first. 2-Lipschitz in the largest norm of a group.
    """
    w = w.detach()
    x = w.to(torch.promote_types(w.dtype, torch.float32)).reshape(w.shape[0], -1, 4)
    a = x.abs()
    low = torch.minimum(a[..., 0], a[..., 1]), torch.minimum(a[..., 2], a[..., 3])
    high = torch.maximum(a[..., 0], a[..., 1]), torch.maximum(a[..., 2], a[..., 3])
    second = torch.minimum(torch.maximum(*low), torch.minimum(*high))
    soft = torch.copysign((a - second[..., None]).clamp(min=0), x)
    lane = torch.arange(4, device=w.device)
    theirs, ours = a[..., None, :], a[..., :, None]
    before = (theirs > ours) | ((theirs == ours) & (lane < lane[:, None]))
    kept = (before.sum(-1, dtype=torch.uint8) < 2).to(torch.uint8)  # two; more where some are NaN, which `pack_` counts
    return soft.view(w.shape), torch.stack((kept.argmax(-1), 3 - kept.flip(-1).argmax(-1)), -1)


def best_scale(w: Tensor) -> float:
    """beta = <w, s> / <s, s> with s = soft24(w): beta * s is as close to w as it gets. 1.0 where s is zero."""
    soft = soft24(w)[0].to(torch.float64)
    square = soft.square().sum().item()
    return (soft * w.detach()).sum().item() / square if square else 1.0


def mask_of(w: Tensor) -> Tensor:
    """bool [rows, cols]: what soft24 keeps."""
    return layout.mask_from_nibbles(_nibbles(soft24(w)[1]))


def _nibbles(lanes: Tensor) -> Tensor:
    return (lanes[..., 0] | lanes[..., 1] << 2).to(torch.uint8)


def pack_(w: Tensor, scale: float, packed: Tensor, dense: Tensor, row: int) -> Tensor:
    """Write scale * soft24(w) as rows `row` and on of a packed [rows, cols] matrix and of the dense one, both in place.

    w [r, cols] of any strides, r and row multiples of 64. Returns how many entries of w are NaN, int64 [], on w's
    device: nothing here waits for a GPU.
    """
    (rows, cols), r = dense.shape, w.shape[0]
    soft, lanes = soft24(w)
    soft = (soft * scale).to(dense.dtype)
    dense[row : row + r] = soft
    values, metadata = layout.split(packed, rows, cols)
    values[row : row + r] = soft.view(r, -1, 4).gather(-1, lanes).view(r, cols // 2)
    layout.write_nibbles(metadata, _nibbles(lanes), row, 0, rows, cols, layout.metadata_order(w.device))
    return w.detach().isnan().sum()


def soft_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    packed: Tensor,
    dense: Tensor,
    seeds: Tensor,
    index: int,
    wgrad: str,
    transposed: bool,
) -> Tensor:
    """`linear.sparse_linear` for S(W): packed [F, K] is S(W) of all weights, dense [F, K] the same with its zeros."""
    tokens = x.reshape(-1, x.shape[-1])
    y: Tensor = _SoftLinear.apply(tokens, packed, dense, seeds, index, wgrad, transposed, *weights)
    return y.view(*x.shape[:-1], y.shape[-1])


class _SoftLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, packed, dense, seeds, index, wgrad, transposed, *weights):  # type: ignore[no-untyped-def]
        ctx.sizes = [w.shape[1] if transposed else w.shape[0] for w in weights]
        ctx.dtypes, ctx.index, ctx.wgrad, ctx.transposed = [w.dtype for w in weights], index, wgrad, transposed
        ctx.save_for_backward(tokens, dense, seeds)
        return ops.spmm(packed, tokens, sum(ctx.sizes))

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
        tokens, dense, seeds = ctx.saved_tensors
        dx: Tensor | None = None
        dws: Sequence[Tensor | None] = [None] * len(ctx.sizes)
        if ctx.needs_input_grad[0]:
            dx = dy @ dense
        if any(ctx.needs_input_grad[7:]):
            if ctx.wgrad == "mvue":
                dw = ops.wgrad(ops.pack_gradient(dy, seeds, ctx.index), tokens, dy.shape[1])
            else:
                dw = dy.t() @ tokens
            parts = dw.split(ctx.sizes)
            dws = [(p.t() if ctx.transposed else p).to(d) for p, d in zip(parts, ctx.dtypes, strict=True)]
        return dx, None, None, None, None, None, None, *dws
