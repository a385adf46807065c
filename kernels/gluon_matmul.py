"""The Gluon kernels as one provider: which of them serves a GPU, and whether it can be trusted there.

Gluon is experimental, and the kernels rest on what it does not promise: that Triton puts the largest shared buffer at
offset 0, and the order of the registers that inline PTX sees. So they are imported only when asked for, a small product
is checked at first use, and wrong numbers and errors of compiling or launching make the provider unavailable with a
reason. A kernel that hangs, or after whose fault the process cannot use the GPU any more, ends a training.
"""

import hashlib
import logging
import os
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import layout, reference

log = logging.getLogger("sparse24")

#: Set to 1, this variable lets `choice` measure the Gluon kernels too. Not by default: compiling them takes seconds.
SWITCH = "SPARSE24_GLUON"
#: Relative error (Frobenius) of the small product above which nothing is trusted: twice what rounding to bf16 costs.
TOLERANCE = 1e-2
_withdrawn: dict[torch.device, str] = {}


class Failed(RuntimeError):
    """A kernel could not be compiled or launched."""


def asked_for() -> bool:
    """Whether the environment asks for these kernels."""
    return os.environ.get(SWITCH, "") not in ("", "0")


@lru_cache(maxsize=64)
def _kernels(device: torch.device) -> ModuleType | str:
    """The module whose kernels serve `device`, or why there is none."""
    if device.type != "cuda" or layout.arch(device) is None:
        return "it has no sparse tensor cores whose format is known"
    try:
        if layout.arch(device) == "sm_90":
            from . import gluon_wgmma

            return gluon_wgmma
        from . import gluon_mma

        return gluon_mma
    except Exception as error:  # whatever this Triton lacks
        return f"this Triton has no Gluon that they are written for: {type(error).__name__}: {error}"


@lru_cache(maxsize=64)
def _check(device: torch.device) -> str | None:
    """None where small products of both directions are right on `device`, else what is wrong. Some seconds, once."""
    kernels = _kernels(device)
    if isinstance(kernels, str):
        return kernels
    rows, inner, outer = 3 * layout.ROW_BLOCK[layout.metadata_order(device)], 192, 200
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, inner, generator=generator).bfloat16()
    mask = reference.best_mask(a)
    x = torch.randn(outer, inner, generator=generator).bfloat16()
    packed = layout.pack(a, mask, layout.metadata_order(device)).to(device)
    expected = (a * mask).double() @ x.double().t()
    for transposed in (False, True):
        operand = x.t().contiguous() if transposed else x
        try:
            with layout.on(device):
                y = kernels.multiply(kernels.VARIANTS[0], packed, operand.to(device), rows, inner, transposed).cpu()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"a small product could not be run: {type(error).__name__}: {_first_line(error)}"
        off = float((y.double() - (expected if transposed else expected.t())).norm() / expected.norm())
        if not off < TOLERANCE:
            return f"a small product is wrong (relative error {off:.2g})"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def why_unavailable(device: torch.device) -> str | None:
    """Why the Gluon kernels do not serve `device`, None where they do. Warns once where they were expected to."""
    if device not in _withdrawn:
        reason = _check(device)
        if reason is None:
            return None
        withdraw(device, reason)
    return _withdrawn[device]


def withdraw(device: torch.device, reason: str) -> None:
    """Use these kernels no more on `device` in this process; one warning."""
    if device not in _withdrawn:
        _withdrawn[device] = reason
        log.warning("sparse24: the Gluon kernels do not serve %s: %s", device, reason)


def variants(device: torch.device) -> int:
    """How many variants there are to choose from on a device that they serve."""
    kernels = _kernels(device)
    return 0 if isinstance(kernels, str) else len(kernels.VARIANTS)


def fusing(device: torch.device, rows: int, kind: str) -> list[int]:
    """The variants that take the activation `kind` behind a product with a packed matrix of so many rows."""
    kernels = _kernels(device)
    if isinstance(kernels, str) or not hasattr(kernels, "multiply_glu"):
        return []
    return [i for i, variant in enumerate(kernels.VARIANTS) if kernels.can_fuse(variant, rows, kind)]


def multiply(variant: int, packed: Tensor, x: Tensor, rows: int, inner: int, transposed: bool) -> Tensor:
    """The packed [rows, inner] matrix times x: x [outer, inner] -> [outer, rows], or transposed, x [<= inner, outer] ->
    [rows, outer].

    Raises Failed where the variant cannot be compiled or launched.
    """
    y: Tensor = _run("multiply", variant, packed, x, rows, inner, transposed)
    return y


def multiply_glu(
    variant: int, packed: Tensor, x: Tensor, rows: int, bias: Tensor | None, kind: str
) -> tuple[Tensor, Tensor]:
    """`multiply`, not transposed, and `ops.glu` of its result with `bias`: both. Raises Failed as `multiply` does."""
    both: tuple[Tensor, Tensor] = _run("multiply_glu", variant, packed, x, rows, x.shape[1], bias, kind)
    return both


def _run(name: str, variant: int, packed: Tensor, *args: Any) -> Any:
    kernels = _kernels(packed.device)
    if isinstance(kernels, str):
        raise Failed(kernels)
    try:
        with layout.on(packed.device):
            return getattr(kernels, name)(kernels.VARIANTS[variant], packed, *args)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        raise Failed(f"variant {variant}: {type(error).__name__}: {_first_line(error)}") from error


def sources() -> str:
    """A digest of the kernels: what was measured of others does not count."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("gluon_*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
