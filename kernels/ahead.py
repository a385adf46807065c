"""Compiling Triton kernels before they are needed, in processes of their own, while matmuls are being measured.

Triton's compiler holds Python's lock, so threads would take turns. What the ops would launch is noted here, on tensors
without data, and compiled by the processes into Triton's cache, where the launches of this process then find it. They
use no GPU and no memory of one, and do without torch: importing it takes longer than compiling most of the kernels.
Where anything fails, the launches compile for themselves, as they would have.
"""

import contextlib
import hashlib
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from . import layout
from .layout import Block
from .reference import GATED

log = logging.getLogger("sparse24")

#: An op of `triton_ops` and what `_launches` makes its arguments of.
Call = tuple[str | bool | None, ...]
_SLOWEST_S = 60.0  # after which what still runs is given up
#: Seconds that a call takes to compile, about.
_COSTS = {"glu_backward_pack": 2.4, "glu_backward": 1.4, "pack_gradient": 1.1, "glu": 0.9, "masked_decay_": 0.9}
#: Without what `sparse24/__init__` imports, and with a torch of which any name is there and nothing does anything: that
#: is all that the modules of the kernels need of it to be imported. A process is ready in a sixth of the time.
_PROGRAM = """
import sys, types
class Nothing(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls
for name in ("torch", "torch.nn", "torch.nn.functional"):
    sys.modules[name] = Nothing("torch", (), {})
parent = sys.modules["sparse24"] = types.ModuleType("sparse24")
parent.__path__ = [sys.argv[1]]
from sparse24.kernels.ahead import main
main(*sys.argv[2:])
"""


class _Work(NamedTuple):
    """A process, what it says, and the files that are to say that it is done."""

    process: subprocess.Popen[bytes]
    said: IO[bytes]
    marks: Sequence[Path]


_pending: list[_Work] = []
_lock = threading.Lock()


def calls_of(dtype: torch.dtype, master: torch.dtype, wgrad: str, kind: str | None, bias: bool) -> list[Call]:
    """The launches of a training step of one layer (`gain`). Its sizes do not matter: all are multiples of 64."""
    of, to = (str(t).removeprefix("torch.") for t in (master, dtype))
    bias_of = of if bias and kind is not None else None  # autocast leaves a bias as it is
    found: list[Call] = [("pack_weights_", of, to, search) for search in (True, False)]
    found.append(("masked_decay_", of, to))
    if kind is not None:
        found += [(op, to, kind, bias_of) for op in ("glu_backward", "glu")]
    if wgrad == "mvue":
        found.append(("pack_gradient" if kind is None else "glu_backward_pack", to, kind, bias_of))
    return found


def start(calls: Iterable[Call], device: torch.device, inductor: bool) -> None:
    """Compile for these calls on `device`; returns at once. Nothing where that was done before, or would not help.

    inductor: whether Inductor compiles the rest. It moves Triton's cache when it first builds a kernel; so that what
    was compiled before is found, the cache is there from now on.
    """
    try:
        import triton
    except ImportError:
        return
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return
    if inductor:
        with contextlib.suppress(ImportError):
            from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

            index = torch.cuda.current_device() if device.index is None else device.index
            os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(index))
    capability = torch.cuda.get_device_capability(device)
    _start(calls, capability[0] * 10 + capability[1], layout.metadata_order(device))


def _start(calls: Iterable[Call], arch: int, order: str) -> None:
    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"  # one of them compiles for all
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if rank != "0" or cores < 4 or not sys.executable or getattr(sys, "frozen", False):
        return
    try:
        with _lock:
            _collect()
            begun = {mark for work in _pending for mark in work.marks}
            marks = {call: _mark(json.dumps([arch, order, call])) for call in sorted(set(calls), key=str)}
            missing = [call for call, mark in marks.items() if mark not in begun and not mark.exists()]
            for group in _groups(missing, cores - 2):  # one for this process, one for the compiler behind
                launches = [launch for call in group for launch in _launches(call, order)]
                command = [sys.executable, "-c", _PROGRAM, str(Path(__file__).parents[1])]
                said = tempfile.TemporaryFile()  # noqa: SIM115  # of the process, until it is waited for
                process = subprocess.Popen(
                    [*command, json.dumps([arch, launches])], stdout=subprocess.DEVNULL, stderr=said
                )
                _pending.append(_Work(process, said, [marks[call] for call in group]))
    except Exception as error:  # whatever it is, the launches will say it where it matters
        log.info("sparse24: compiles its kernels when they are needed: %s", error)


def _groups(calls: list[Call], processes: int) -> list[list[Call]]:
    """The calls of each process: one each where there are enough, else such that they end at about the same time."""
    groups: list[list[Call]] = [[] for _ in range(processes)]
    for call in sorted(calls, key=_cost, reverse=True):
        min(groups, key=lambda group: sum(map(_cost, group))).append(call)
    return [group for group in groups if group]


def _cost(call: Call) -> float:
    return (3.1 if call[-1] else 1.5) if call[0] == "pack_weights_" else _COSTS[str(call[0])]


def _mark(said: str) -> Path:
    """The file in Triton's cache that says that this was compiled, by these sources and this Triton."""
    import triton

    digest = hashlib.sha256(f"{said} {triton.__version__} {sys.version}".encode())
    for source in sorted(Path(__file__).parent.glob("triton_*.py")):
        digest.update(source.read_bytes())
    return Path(triton.knobs.cache.dir, f"sparse24-{digest.hexdigest()[:32]}")


def wait() -> None:
    """Until the processes have ended; called before a kernel is compiled here."""
    if not _pending:
        return
    with _lock:
        until = time.monotonic() + _SLOWEST_S
        for work in _pending:
            try:
                work.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                work.process.kill()
                work.process.wait()
        _collect()


def _collect() -> None:
    """Mark what has been compiled, and say what has not."""
    for work in [work for work in _pending if work.process.poll() is not None]:
        _pending.remove(work)
        work.said.seek(0)
        said = work.said.read().decode(errors="replace")
        work.said.close()
        if work.process.returncode:
            log.info("sparse24: compiles its kernels when they are needed: %s", said or "the processes took too long")
            continue
        try:
            for mark in work.marks:
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()
        except OSError as error:
            log.info("sparse24: could not note what was compiled: %s", error)


# ------------------------------------------------------------------------------------------------- what is to compile


def _launches(call: Call, order: str) -> list[Any]:
    """What an op launches, as `main` takes it: module and name of each kernel, arguments, constants and options."""
    from . import triton_launch

    triton_launch.noted.clear()
    _run(*call)
    found = []
    for kernel, args, constants in triton_launch.noted:
        known = {**constants, "ORDER": order} if "ORDER" in constants else constants
        spelled = [{"pointer": str(x.dtype).removeprefix("torch.")} if isinstance(x, Tensor) else x for x in args]
        typed = {key: x if isinstance(x, str | int) else {"type": x.name} for key, x in known.items()}
        found.append([kernel.fn.__module__, kernel.fn.__name__, spelled, typed])
    return found


def _run(name: Any, *rest: Any) -> None:
    """Call an op on tensors without data."""
    from . import triton_ops as ops

    n = 2 * layout.TILE
    seeds = torch.empty(1, dtype=torch.int64, device="meta")

    def empty(dtype: str, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    if name in ("pack_weights_", "masked_decay_"):
        master, dtype, *search = rest
        w, packed = empty(master, n, n), empty(dtype, layout.numel(n, n, getattr(torch, dtype)))
        blocks = [Block(w, packed, packed, 0, 0, n, n)]
        if search:
            ops.pack_weights_(blocks, *search)
        else:
            ops.masked_decay_([w], blocks, 0.5)
        return
    dtype, kind, bias_of = rest
    z, bias = empty(dtype, n, 2 * n), None if bias_of is None else empty(bias_of, 2 * n)
    dh = empty(dtype, n, n if kind in GATED else 2 * n)
    if name == "pack_gradient":
        ops.pack_gradient(z, seeds, 0)
    elif name == "glu":
        ops.glu(z, bias, kind)
    elif name == "glu_backward":
        ops.glu_backward(dh, z, bias, kind)
    else:
        ops.glu_backward_pack(dh, z, bias, kind, seeds, 0)


# ------------------------------------------------------------------------------------------------- the other processes


class _Target:
    """What Triton asks of a driver when it compiles."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(said: str) -> None:
    """Compile the launches of one process."""
    import triton.language as tl
    from triton.runtime import driver
    from triton.runtime.jit import MockTensor

    from . import triton_launch

    def read(known: dict[str, Any]) -> Any:
        if "pointer" in known:
            return MockTensor(known["pointer"])
        return tl.dtype(known["type"]) if "type" in known else known

    arch, launches = json.loads(said, object_hook=read)
    driver.set_active(_Target(arch))
    for module, name, args, constants in launches:
        kernel = getattr(importlib.import_module(module), name)
        triton_launch.hash_callees_first(module)
        kernel.warmup(*args, grid=(1,), **constants, enable_fp_fusion=False)
