"""What a layer costs a training step, by direction: measured on this GPU, or predicted for one by its roofline."""

import math
from dataclasses import dataclass, fields

import torch

from . import layout
from .gain import MARGIN, Layer, gain, matmuls
from .providers import CusparseLt, MaskedDense
from .reference import padded


@dataclass(frozen=True, slots=True)
class Gpu:
    """Rates that a GPU sustains, not those of its data sheet: it settles at a lower clock under load.

    dense, sparse: TFLOP/s of 16-bit matmuls, the operations of the dense product counted for both. memory, packing:
    TB/s of a copy and of the packing kernels, which each read and write their bytes once.
    """

    name: str
    dense: float
    sparse: float
    memory: float
    packing: float


#: Measured on an H200 at its 700 W limit, after two seconds of load, with torch 2.11, cuSPARSELt 0.8.0 and bf16
#: (benchmarks/results/h200/gemm.json, pack.json). Of matmuls with a 14336x4096 weight and 16k tokens: dense 631 to 691
#: TFLOP/s, cuSPARSELt's best algorithm 979 to 1051. Packing both forms of 14336x4096 with the mask kept: 3.3 TB/s;
#: pruning and packing a gradient of 16384x8192: 3.0, with the activation's backward 3.6.
GPUS = {"H200": Gpu("H200", dense=658, sparse=1015, memory=4.1, packing=3.2)}

#: Layers narrower than this do not reach these rates: at 768x3072 a sparse matmul took 0.84 to 0.93 of the dense time,
#: at 2048x8192 0.65 to 0.71.
LARGE = 2048


@dataclass(frozen=True, slots=True)
class Times:
    """ms a training step. packing: of the weight once a step, the masked decay included, and of the gradient."""

    forward: float = 0.0
    dgrad: float = 0.0
    wgrad: float = 0.0
    packing: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.dgrad + self.wgrad + self.packing

    def share(self, part: float) -> "Times":
        """Those of a part of the layer."""
        return Times(*(getattr(self, f.name) * part for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Cost:
    """dense, sparse: times of a layer. wgrad: "dense" where the pruned weight gradient would not pay for its packing.
    providers: who multiplies in forward, dgrad and wgrad. measured: on this GPU; else predicted.
    """

    dense: Times
    sparse: Times
    wgrad: str
    providers: tuple[str, str, str]
    measured: bool

    @property
    def faster(self) -> bool:
        return self.sparse.total < MARGIN * self.dense.total


def gpu_named(name: str) -> Gpu:
    """A GPU of `GPUS`. Raises ValueError that lists them."""
    if name not in GPUS:
        raise ValueError(f"sparse24: found gpu={name!r}, need one whose rates are known: {', '.join(GPUS)}")
    return GPUS[name]


def measured(layer: Layer) -> Cost:
    """Cost of a layer on a GPU, by the measurements of `gain`."""
    found = gain(layer)
    forward, dgrad, product = matmuls(layer)
    wgrad_ms, wgrad_by = (
        (product.ms, product.provider) if found.wgrad == "mvue" else (product.dense_ms, MaskedDense.name)
    )
    packing = found.sparse_ms - forward.ms - dgrad.ms - wgrad_ms
    return Cost(
        Times(forward.dense_ms, dgrad.dense_ms, product.dense_ms),
        Times(forward.ms, dgrad.ms, wgrad_ms, packing),
        found.wgrad,
        (forward.provider, dgrad.provider, wgrad_by if found.wgrad == "mvue" else "dense"),
        True,
    )


def predicted(rows: int, cols: int, tokens: int, master: torch.dtype, gpu: Gpu, wgrad: str) -> Cost:
    """Cost of a weight [rows, cols] of dtype `master`, multiplied in a 16-bit type, by a roofline.

    A matmul takes the time of its operations and of its bytes, one after the other. Too kind to layers below `LARGE`.
    """
    weight, moved = rows * cols, 2 * tokens * (rows + cols)  # bytes of x and y

    def matmul(rate: float, operand: float) -> float:
        return 2 * tokens * weight / (rate * 1e9) + (moved + operand) / (gpu.memory * 1e9)

    packed = layout.numel(rows, cols, torch.bfloat16) * 2
    dense, sparse = matmul(gpu.dense, 2 * weight), matmul(gpu.sparse, packed)
    dense_wgrad = matmul(gpu.dense, 2 * weight)
    packed_dy = layout.numel(rows, padded(tokens), torch.bfloat16) * 2
    gradient = (2 * tokens * rows + packed_dy) / (gpu.packing * 1e9)
    sparse_wgrad = matmul(gpu.sparse, 2 * weight) if wgrad == "mvue" else math.inf
    pruned = sparse_wgrad + gradient < dense_wgrad
    packing = (weight * master.itemsize + 2 * packed) / (gpu.packing * 1e9)
    decay = weight * (3 * master.itemsize + 1 / 8) / (gpu.memory * 1e9)  # reads W, g and the mask, writes g
    times = Times(
        sparse, sparse, sparse_wgrad if pruned else dense_wgrad, packing + decay + (gradient if pruned else 0.0)
    )
    by = CusparseLt.name
    providers = (by, by, by if pruned else "dense")
    return Cost(Times(dense, dense, dense_wgrad), times, "mvue" if pruned else "dense", providers, False)
