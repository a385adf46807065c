"""doctor: is this machine ready? Each check says what it found and, where that is bad, what to do."""

import importlib.metadata
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from ..kernels import choice, cusparselt, format_check, gluon_matmul, layout
from ..kernels.providers import PROVIDERS, Gluon, Problem, Provider

_ROWS, _INNER, _OUTER = 128, 256, 64


@dataclass(frozen=True, slots=True)
class Check:
    """what: its subject. found: in words. ok: whether training can rely on it."""

    what: str
    found: str
    ok: bool = True

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.what:22} {self.found}"


def checks() -> Iterator[Check]:
    """Every check of this machine, one after the other; some seconds on a GPU."""
    yield Check("versions", f"sparse24 {_version('sparse24')}, torch {torch.__version__}, Python {_python()}")
    yield _triton()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield from _gpu(device)
    yield _format(device)
    for provider in PROVIDERS:
        if not isinstance(provider, Gluon) or gluon_matmul.asked_for():
            yield _provider(provider, device)
    yield _cache()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> str:
    return platform.python_version()


def _triton() -> Check:
    found = _version("triton")
    if torch.cuda.is_available() and found is None:
        return Check("Triton", "is not installed, need it for the packing kernels: pip install triton", False)
    return Check("Triton", found or "is not installed; it is needed on a GPU alone")


def _gpu(device: torch.device) -> Iterator[Check]:
    if device.type == "cpu":
        yield Check("GPU", "none: training runs by masked dense matmuls, right and slower than dense")
        return
    major, minor = torch.cuda.get_device_capability(device)
    yield Check("GPU", f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}")
    order = layout.arch(device)
    if order is None:
        found = (
            f"none whose format is known on compute capability {major}.{minor}, need 8.x or 9.x: no layer gains here"
        )
        yield Check("sparse tensor cores", found, False)
    else:
        yield Check("sparse tensor cores", f"yes, metadata as on {order}")
    try:
        version = cusparselt.version()
    except cusparselt.Unavailable as error:
        yield Check("cuSPARSELt", str(error), False)
        return
    yield Check("cuSPARSELt", f"{version}; {cusparselt.FAULTS.get(version, 'no fault of it is known')}")


def _format(device: torch.device) -> Check:
    if device.type == "cpu":
        return Check("packed format", "nothing reads it here but our own code")
    reason = format_check.check(device)
    return Check("packed format", reason or "as expected", reason is None)


def _provider(provider: Provider, device: torch.device) -> Check:
    """A small product in each direction by each algorithm, against float64; one right algorithm is enough."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    said, ok = [], True
    directions: tuple[Literal["spmm", "wgrad"], ...] = ("spmm", "wgrad")
    for direction in directions:
        problem = Problem(direction, _ROWS, _INNER, _OUTER, dtype, device)
        if not provider.supports(problem):
            return Check(f"matmul {provider.name}", "does not serve this machine")
        try:
            errors = [_error(provider, problem, algorithm) for algorithm in provider.algorithms(problem)]
        except RuntimeError as error:
            return Check(f"matmul {provider.name}", f"{direction}: {error}", False)
        right = [e for e in errors if e < choice.TOLERANCE]
        best = f", error {min(right):.0e}" if right else ""
        said.append(f"{direction}: {len(right)} of {len(errors)} algorithms right{best}")
        ok = ok and bool(right)
    return Check(f"matmul {provider.name}", "; ".join(said), ok)


def _error(provider: Provider, problem: Problem, algorithm: int | None) -> float:
    """Relative error (Frobenius) of one product; inf where the algorithm does not run."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(problem.rows, problem.inner, generator=generator)
    keep = torch.rand(problem.rows, problem.inner // 4, 4, generator=generator).argsort(-1) < 2
    spmm = problem.direction == "spmm"
    x = torch.randn((problem.outer, problem.inner) if spmm else (problem.inner, problem.outer), generator=generator)
    a, x, mask = a.to(problem.dtype), x.to(problem.dtype), keep.view(a.shape)
    masked = a.double() * mask
    exact = x.double() @ masked.t() if spmm else masked @ x.double()
    order = layout.metadata_order(problem.device)
    packed = layout.pack(a.to(problem.device), mask.to(problem.device), order)
    try:
        y = provider.run(problem, packed, x.to(problem.device), algorithm)
    except cusparselt.Failed:
        return float("inf")
    return float((y.cpu().double() - exact).norm() / exact.norm())


def _cache() -> Check:
    """Whether measured choices can be kept. A folder that is not there yet is looked for upwards."""
    folder = choice.cache_folder()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        advice = f"{folder} cannot be written ({error}); set SPARSE24_CACHE to a folder that can"
        return Check("cache of choices", advice, False)
    files = len(list(folder.glob("*.json"))) if folder.exists() else 0
    return Check("cache of choices", f"{folder}, {files} files")
