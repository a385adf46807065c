"""Who multiplies: a provider is a small class with `supports(problem)` and `run(...)`; the first that supports a problem runs.

Every provider computes the same product, packed [rows, K] times a dense operand, and differs in how.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layout, reference


@dataclass(frozen=True, slots=True)
class Problem:
    """One matmul with a packed operand.

    direction "spmm":  packed [rows, inner], x [tokens, inner] -> [tokens, rows]     (forward and dgrad)
    direction "wgrad": packed [rows, inner], x [<= inner, out] -> [rows, out]        (inner = padded tokens)
    `outer` is the dimension of x that the product keeps.
    """

    direction: Literal["spmm", "wgrad"]
    rows: int
    inner: int
    outer: int
    dtype: torch.dtype
    device: torch.device


class Provider(Protocol):
    name: str

    def supports(self, problem: Problem) -> bool: ...

    def run(self, problem: Problem, packed: Tensor, x: Tensor) -> Tensor: ...


class MaskedDense:
    """Unpacks and multiplies densely: right everywhere, fast nowhere. The CPU's provider."""

    name = "masked_dense"

    def supports(self, problem: Problem) -> bool:
        return True

    def run(self, problem: Problem, packed: Tensor, x: Tensor) -> Tensor:
        twin = reference.spmm if problem.direction == "spmm" else reference.wgrad
        return twin(packed, x, problem.rows)


class TorchCusparselt:
    """`torch._cslt_sparse_mm`: sparse tensor cores, with descriptors and plan built anew at every call."""

    name = "torch_cusparselt"

    def supports(self, problem: Problem) -> bool:
        return (
            problem.device.type == "cuda"
            and problem.dtype in (torch.float16, torch.bfloat16)
            and layout.arch(problem.device) is not None
            and torch.backends.cusparselt.is_available()
            and problem.outer > 0
            and problem.inner > 0
        )

    def run(self, problem: Problem, packed: Tensor, x: Tensor) -> Tensor:
        compressed = packed.view(problem.rows, -1)
        if problem.direction == "wgrad":
            short = problem.inner - x.shape[0]
            x = (F.pad(x, (0, 0, 0, short)) if short else x).contiguous()
            return torch._cslt_sparse_mm(compressed, x)
        short = -problem.outer % 8  # the library takes 16-byte rows only
        x = (F.pad(x, (0, 0, 0, short)) if short else x).contiguous()
        return torch._cslt_sparse_mm(compressed, x.t(), transpose_result=True)[: problem.outer]


PROVIDERS: list[Provider] = [TorchCusparselt(), MaskedDense()]


def choose(problem: Problem) -> Provider:
    """The first provider that supports the problem."""
    return next(p for p in PROVIDERS if p.supports(problem))


def why_slow(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why sparse tensor cores cannot multiply a [rows, cols] weight of `dtype` on `device`; None where they can, or on a CPU."""
    if device.type == "cpu":
        return None
    order = layout.arch(device)
    if order is None or not torch.backends.cusparselt.is_available():
        return f"{torch.cuda.get_device_name(device)} with this PyTorch has no 2:4 matmul that is known to be right"
    if dtype not in (torch.float16, torch.bfloat16):
        return "it computes in float32, for which there is no 2:4 matmul; use autocast, or when='always'"
    block = layout.ROW_BLOCK[order]
    if rows % block or cols % block:
        return f"it is {rows}x{cols}, need multiples of {block} on this GPU"
    return None
