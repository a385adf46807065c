"""Who multiplies: a provider is a small class with `supports(problem)` and `run(...)`. Adding one touches no other
file.

Every provider computes the same product, packed [rows, inner] times a dense operand, and differs in how. `choice`
picks.
"""

import threading
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cusparselt, gluon_matmul, layout, reference
from .format_check import readable


class Problem(NamedTuple):
    """One matmul with a packed operand.

    direction "spmm":  packed [rows, inner], x [outer, inner] -> [outer, rows]       (forward and dgrad; outer = tokens)
    direction "wgrad": packed [rows, inner], x [<= inner, outer] -> [rows, outer]    (inner = padded tokens)
    """

    direction: Literal["spmm", "wgrad"]
    rows: int
    inner: int
    outer: int
    dtype: torch.dtype
    device: torch.device


class Provider(Protocol):
    name: str

    def supports(self, problem: Problem) -> bool:
        """Whether `run` can compute it, fast or not."""
        ...

    def algorithms(self, problem: Problem) -> Sequence[int | None]:
        """Ways of computing it to choose between; [None] where there is one."""
        ...

    def run(self, problem: Problem, packed: Tensor, x: Tensor, algorithm: int | None) -> Tensor:
        """The product, [outer, rows] or [rows, outer], contiguous."""
        ...


class MaskedDense:
    """Unpacks and multiplies densely: right everywhere, fast nowhere. The CPU's provider."""

    name = "masked_dense"

    def supports(self, problem: Problem) -> bool:
        return True

    def algorithms(self, problem: Problem) -> Sequence[int | None]:
        return [None]

    def run(self, problem: Problem, packed: Tensor, x: Tensor, algorithm: int | None) -> Tensor:
        twin = reference.spmm if problem.direction == "spmm" else reference.wgrad
        return twin(packed, x, problem.rows)


class CusparseLt:
    """cuSPARSELt with kept plans; every algorithm the library offers is a candidate."""

    name = "cusparselt"

    def supports(self, problem: Problem) -> bool:
        return why_slow(problem.rows, problem.inner, problem.dtype, problem.device) is None and (
            problem.device.type == "cuda" and problem.outer > 0 and problem.inner > 0
        )

    def __init__(self) -> None:
        self._plans = threading.local()  # as the library's plans are: one for each thread

    def plan(self, problem: Problem, algorithm: int | None) -> cusparselt.Plan:
        """The kept plan of this thread. Raises cusparselt.Unavailable or Failed."""
        try:
            plan: cusparselt.Plan = self._plans.known[problem, algorithm]
        except (AttributeError, KeyError):
            plan = cusparselt.plan(self._shape(problem), algorithm, problem.device)
            self._plans.__dict__.setdefault("known", {})[problem, algorithm] = plan
        return plan

    def _shape(self, problem: Problem) -> cusparselt.Shape:
        spmm = problem.direction == "spmm"
        outer = _aligned(problem.outer)
        return cusparselt.Shape(problem.rows, outer, problem.inner, problem.dtype, spmm, spmm)

    def algorithms(self, problem: Problem) -> Sequence[int | None]:
        known = cusparselt.plan(self._shape(problem), None, problem.device).algorithms
        safe, usual = range(min(known, cusparselt.SAFE_ALGORITHMS)), cusparselt.USUAL_ALGORITHMS
        return [*(a for a in usual if a in safe), *(a for a in safe if a not in usual)]

    def run(self, problem: Problem, packed: Tensor, x: Tensor, algorithm: int | None) -> Tensor:
        packed = readable(packed, problem.rows, problem.inner)
        outer = _aligned(problem.outer)
        if problem.direction == "spmm":
            x = _padded(x, outer, x.shape[1])
            y = x.new_empty(outer, problem.rows)
        else:
            x = _padded(x, problem.inner, outer)
            y = x.new_empty(problem.rows, outer)
        with layout.on(problem.device):
            self.plan(problem, algorithm)(packed, x, y)
        if outer == problem.outer:
            return y
        return y[: problem.outer] if problem.direction == "spmm" else y[:, : problem.outer].contiguous()


class TorchCusparselt:
    """`torch._cslt_sparse_mm`: cuSPARSELt with descriptors and plan built anew at every call. Serves where ctypes
    cannot.
    """

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

    def algorithms(self, problem: Problem) -> Sequence[int | None]:
        return [None]

    def run(self, problem: Problem, packed: Tensor, x: Tensor, algorithm: int | None) -> Tensor:
        compressed = readable(packed, problem.rows, problem.inner).view(problem.rows, -1)
        outer = _aligned(problem.outer)
        if problem.direction == "wgrad":
            x = _padded(x, problem.inner, outer)
            return torch._cslt_sparse_mm(compressed, x)[:, : problem.outer].contiguous()
        x = _padded(x, outer, problem.inner)
        return torch._cslt_sparse_mm(compressed, x.t(), transpose_result=True)[: problem.outer]


class Gluon:
    """Our own kernels on sparse tensor cores, where `gluon_matmul.SWITCH` asks for them; a tile shape is an
    algorithm.
    """

    name = "gluon"

    def supports(self, problem: Problem) -> bool:
        if not (gluon_matmul.asked_for() and problem.device.type == "cuda" and problem.outer > 0 and problem.inner > 0):
            return False
        order = layout.arch(problem.device)
        return (
            order is not None
            and problem.dtype in (torch.float16, torch.bfloat16)
            and problem.rows % layout.ROW_BLOCK[order] == 0
            and problem.inner % layout.TILE == 0
            and (problem.direction == "spmm" or problem.outer % layout.TILE == 0)
            and gluon_matmul.why_unavailable(problem.device) is None
        )

    def algorithms(self, problem: Problem) -> Sequence[int | None]:
        return range(gluon_matmul.variants(problem.device))

    def run(self, problem: Problem, packed: Tensor, x: Tensor, algorithm: int | None) -> Tensor:
        return gluon_matmul.multiply(
            algorithm or 0, packed, x, problem.rows, problem.inner, problem.direction == "wgrad"
        )


PROVIDERS: tuple[Provider, ...] = (CusparseLt(), TorchCusparselt(), Gluon(), MaskedDense())


def _aligned(outer: int) -> int:
    """cuSPARSELt takes dense rows of whole 16 bytes only."""
    return -(-outer // 8) * 8


def _padded(x: Tensor, rows: int, cols: int) -> Tensor:
    """x [<= rows, <= cols] with zeros behind, contiguous; x itself where it fits already."""
    if x.shape != (rows, cols):
        x = F.pad(x, (0, cols - x.shape[1], 0, rows - x.shape[0]))
    return x.contiguous()


def why_slow(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why sparse tensor cores cannot multiply a [rows, cols] weight of `dtype` on `device`; None where they can, or on
    a CPU.
    """
    if device.type == "cpu":
        return None
    order = layout.arch(device)
    if order is None:
        return f"{torch.cuda.get_device_name(device)} has no sparse tensor cores whose format is known"
    if dtype not in (torch.float16, torch.bfloat16):
        return "it computes in float32, for which there is no 2:4 matmul; use autocast, or when='always'"
    try:
        cusparselt.library()
    except cusparselt.Unavailable as error:
        return f"there is no 2:4 matmul: {error}"
    block = layout.ROW_BLOCK[order]
    if rows % block or cols % block:
        return f"it is {rows}x{cols}, need multiples of {block} on this GPU"
    return None
