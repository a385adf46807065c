"""Would a layer gain: its sparse GEMMs and everything that packing costs, against its dense GEMMs, as measured on this
GPU.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from . import choice, layout, ops
from .providers import Problem
from .reference import GATED, padded

_TOGETHER = 16  # weights packed by one call where that is timed
#: Sparse must be this much faster: the search of the masks, and what a compiler fuses into dense matmuls, is not timed.
MARGIN = 0.98


@dataclass(frozen=True, slots=True)
class Gain:
    """ms of one training step of one layer. wgrad: "dense" where the pruned weight gradient would not pay for its
    packing.
    """

    sparse_ms: float
    dense_ms: float
    wgrad: str

    @property
    def faster(self) -> bool:
        return not self.sparse_ms >= MARGIN * self.dense_ms  # nan: nothing was measured


class Layer(NamedTuple):
    """A weight [rows, cols] of dtype `master`, multiplied in `dtype` with `tokens` tokens at an optimizer step each.

    wgrad: as the recipe has it. kind: of the activation that is fused behind it. bias: whether it has one.
    """

    rows: int
    cols: int
    tokens: int
    dtype: torch.dtype
    master: torch.dtype
    device: torch.device
    wgrad: str
    kind: str | None = None
    bias: bool = False


def gain(layer: Layer) -> Gain:
    """What one layer would gain.

    Counted: forward, dgrad, wgrad; pruning and packing the output gradient, where an activation is fused only what that
    adds to its backward; repacking the weight and the masked decay once. The search of the masks, once in
    `refresh_every` steps, costs about as much as one repacking and is left out.
    """
    if layer.device.type != "cuda":
        return Gain(math.nan, math.nan, layer.wgrad)
    forward, dgrad, product = matmuls(layer)
    dense = forward.dense_ms + dgrad.dense_ms
    packing = _kernel_ms("pack_weights", layer.rows, layer.cols, layer.master, layer.dtype, layer.device)
    sparse = forward.ms + dgrad.ms + packing
    dense_wgrad, sparse_wgrad = product.dense_ms, math.inf
    if layer.wgrad == "mvue":
        sparse_wgrad = product.ms + (
            _kernel_ms("pack_gradient", layer.tokens, layer.rows, layer.dtype, layer.dtype, layer.device)
            if layer.kind is None
            else _fused_packing_ms(layer)
        )
    kept = "mvue" if sparse_wgrad < dense_wgrad else "dense"
    return Gain(sparse + min(sparse_wgrad, dense_wgrad), dense + dense_wgrad, kept)


def matmuls(layer: Layer) -> tuple[choice.Choice, choice.Choice, choice.Choice]:
    """The choices of forward, dgrad and wgrad."""
    rows, cols, tokens, dtype, _, device, *_ = layer
    forward = choice.choose(Problem("spmm", rows, cols, tokens, dtype, device))
    dgrad = choice.choose(Problem("spmm", cols, rows, tokens, dtype, device))
    return forward, dgrad, choice.choose(Problem("wgrad", rows, padded(tokens), cols, dtype, device))


def _kernel_ms(
    kernel: Literal["pack_weights", "pack_gradient"],
    rows: int,
    cols: int,
    source: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """ms of packing a [rows, cols] matrix, kept with the measured choices. "pack_weights" includes the decay."""
    key = f"{kernel} {rows}x{cols} {source} {dtype}".replace("torch.", "")

    def measure() -> float:
        with torch.no_grad(), torch.cuda.device(device):
            m = torch.randn(rows, cols, device=device).to(source)
            if kernel == "pack_gradient":
                seeds = torch.zeros(1, dtype=torch.int64, device=device)
                return choice.time_ms(lambda: ops.pack_gradient(m, seeds, 0), 5)
            size = layout.numel(rows, cols, dtype)
            packed, packed_t = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
            # the weights of a model share two launches a step: the time of a launch is not that of each weight
            blocks = [layout.Block(m, packed, packed_t, 0, 0, rows, cols)] * _TOGETHER
            grads = [torch.zeros_like(m)] * _TOGETHER
            ops.pack_weights_(blocks, True)

            def step() -> None:
                ops.pack_weights_(blocks, False)
                ops.masked_decay_(grads, blocks, 1e-4)

            return choice.time_ms(step, 5) / _TOGETHER

    return choice.kept(device, key, measure)


def _fused_packing_ms(layer: Layer) -> float:
    """ms that packing adds to the backward of the activation behind a layer."""
    tokens, width, dtype, device = layer.tokens, layer.rows, layer.dtype, layer.device
    kind, with_bias = str(layer.kind), f" bias {layer.master}" if layer.bias else ""
    key = f"fused packing {tokens}x{width} {kind}{with_bias} {dtype}".replace("torch.", "")

    def measure() -> float:
        with torch.no_grad(), torch.cuda.device(device):
            z = torch.randn(tokens, width, device=device).to(dtype)
            dh = z[:, : width // 2 if kind in GATED else width].contiguous()
            bias = torch.zeros(width, dtype=layer.master, device=device) if layer.bias else None
            seeds = torch.zeros(1, dtype=torch.int64, device=device)
            packing = choice.time_ms(lambda: ops.glu_backward_pack(dh, z, bias, kind, seeds, 0), 5)
            return packing - choice.time_ms(lambda: ops.glu_backward(dh, z, bias, kind), 5)

    return choice.kept(device, key, measure)
