"""Launching a Triton kernel in little host time: one that was launched alike before is run as it was compiled.

Triton finds the compiled kernel anew at every call, from the types and values of all arguments, options and globals.
That takes longer than most of these kernels run at small widths.
"""

import sys
from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import ahead, layout

noted: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []  # kernel, args and constants, see `launch`
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}  # with what it takes behind the arguments


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    *args: Any,
    key: Hashable = None,
    cluster: int = 1,
    **constants: Any,
) -> None:
    """Run `kernel` on `device` (Triton itself launches on the current one); an empty grid is no launch.

    args: tensors and numbers, all arguments of the kernel that are not constexpr. constants: the constexpr ones, and
    Triton's options. key: what Triton compiles the kernel anew for, where the caller knows that (needed with tensor
    descriptors); else it is found from all of these. cluster: of so many programs, of which the grid counts clusters.
    On tensors without data (device "meta") nothing runs: `noted` gets what would, for `ahead`.
    """
    if 0 in grid:
        return
    if device.type == "meta":
        noted.append((kernel, args, constants))
        return
    found = (*[_kind(arg) for arg in args], *constants.items()) if key is None else key
    key = kernel.fn, device, cluster, found
    with layout.on(device):
        known = _compiled.get(key)
        if known is None:
            hash_callees_first(kernel.fn.__module__)
            ahead.wait()
            last = tuple(constants[name] for name in kernel.arg_names[len(args) :])
            if cluster == 1:  # compiles and runs
                compiled = kernel[grid](*args, **constants, enable_fp_fusion=False)
                if compiled is not None:  # None: the interpreter compiles nothing
                    _compiled[key] = compiled, last
                return
            compiled = _clustered(kernel.warmup(*args, grid=grid, **constants, enable_fp_fusion=False), cluster)
            known = _compiled[key] = compiled, last
        compiled, last = known
        three = (*grid, 1, 1)
        compiled[three](*args, *last)


def _clustered(compiled: Any, cluster: int) -> Any:
    """A kernel compiled for one program, launched in clusters: what its programs share is in its inline PTX alone.

    Triton's own clusters (`num_ctas`) spread each tensor over the programs instead.
    """
    warps, _, shared = compiled.packed_metadata
    compiled.packed_metadata = warps, cluster, shared
    return compiled


@lru_cache
def hash_callees_first(module: str) -> None:
    """Triton 3.6 hashes a function differently where what it calls was hashed before it, and then misses its cache.

    `DependenciesFinder._update_hash` takes over a callee's globals before it has found them. A function here is defined
    before those that call it.
    """
    for name in (f"{__package__}.triton_common", module):
        for member in list(vars(sys.modules[name]).values()):
            getattr(member, "cache_key", None)


def _kind(arg: Any) -> object:
    """What Triton compiles a kernel anew for: dtypes, aligned addresses and multiples of 16, a 1, and wide integers."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    return type(arg), arg % 16 == 0, arg == 1, -(2**31) <= arg < 2**31
