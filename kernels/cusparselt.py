"""cuSPARSELt through ctypes, with plans that are kept: no compiler is needed on the user's machine.

`torch._cslt_sparse_mm` builds its descriptors and its plan anew at every call, which costs ten times the host time of a
call with a kept plan, and picks algorithm 0, which is often not the fastest.
Handles and plans belong to one thread and one device (backward runs on another thread than forward). The C interface is
that of versions 0.6 to 0.10.
"""

import ctypes
import importlib.util
import threading
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_CUDA_TYPE = {torch.float16: 2, torch.bfloat16: 14}
_ROW, _COL = 2, 1
_PLAIN, _TRANSPOSED = 0, 1
_COMPUTE_32F = 2
_ALG_CONFIG_ID, _ALG_CONFIG_MAX_ID = 0, 1


#: Algorithm ids from here on are never tried: with fp16 and a transposed output, 36 to 43 of version 0.8.0 end in an
#: illegal instruction on an H100, after which the process cannot use the GPU any more. None of them was the fastest at
#: any bf16 shape.
SAFE_ALGORITHMS = 36
#: Those that were the fastest of a problem in benchmarks/results, the most frequent first: measured before the others,
#: which are then left after their first runs.
USUAL_ALGORITHMS = (17, 3, 2, 6, 12, 5, 0)
#: Of a version what is known to be wrong with it, and what is done about it.
FAULTS = {
    "0.8.0": f"algorithms {SAFE_ALGORITHMS} to 43 end in an illegal instruction for fp16 on an H100: ids from "
    f"{SAFE_ALGORITHMS} on are never tried",
}


class Unavailable(RuntimeError):
    """There is no usable cuSPARSELt, with the reason."""


class Failed(RuntimeError):
    """A call into the library returned an error."""


def _path() -> str:
    """The library that torch loaded, else the one of NVIDIA's package."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        for line in maps.read_text().splitlines():
            if "libcusparseLt.so" in line:
                return line.split(maxsplit=5)[5]
    spec = importlib.util.find_spec("nvidia.cusparselt") if importlib.util.find_spec("nvidia") else None
    for folder in spec.submodule_search_locations or () if spec else ():
        for file in sorted(Path(folder).glob("lib/libcusparseLt.so*")):
            return str(file)
    raise Unavailable("found no libcusparseLt.so beside PyTorch; install nvidia-cusparselt for your CUDA version")


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The loaded library. Raises Unavailable with the reason."""
    try:
        found = ctypes.CDLL(_path())
    except OSError as error:
        raise Unavailable(str(error)) from error
    # declared, as this one is called in every step: addresses pass as plain numbers
    found.cusparseLtMatmul.argtypes = [ctypes.c_void_p] * 10 + [ctypes.c_int]
    return found


def version() -> str:
    """The library's version, such as "0.8.0". Raises Unavailable."""
    major, minor, patch = (ctypes.c_int(0) for _ in range(3))
    for i, out in enumerate((major, minor, patch)):
        library().cusparseLtGetProperty(ctypes.c_int(i), ctypes.byref(out))
    return f"{major.value}.{minor.value}.{patch.value}"


class _Opaque:
    """The 512 bytes, aligned to 16, that every object of the library takes."""

    __slots__ = ("_buffer", "pointer")

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(1024 + 16)
        self.pointer = ctypes.c_void_p((ctypes.addressof(self._buffer) + 15) // 16 * 16)


def _check(status: int, what: str) -> None:
    if status:
        raise Failed(f"cuSPARSELt: {what} returned status {status}")


class Shape(NamedTuple):
    """D [m, n] = A [m, k] B [k, n], A packed.

    b_transposed: B is stored [n, k] row-major, else [k, n]. d_transposed: D is stored [n, m] row-major, else [m, n].
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    b_transposed: bool
    d_transposed: bool


class Plan:
    """One shape with one algorithm on the current device, for the thread that made it."""

    def __init__(self, handle: _Opaque, shape: Shape, algorithm: int | None) -> None:
        lib, i64, u32 = library(), ctypes.c_int64, ctypes.c_uint32
        m, n, k, kind = shape.m, shape.n, shape.k, _CUDA_TYPE[shape.dtype]
        self._handle = handle
        self._kept = a, b, d, matmul, selection, self._plan = [_Opaque() for _ in range(6)]
        h = handle.pointer
        _check(
            lib.cusparseLtStructuredDescriptorInit(h, a.pointer, i64(m), i64(k), i64(k), u32(16), kind, _ROW, 0), "A"
        )
        rows, cols = (n, k) if shape.b_transposed else (k, n)
        _check(
            lib.cusparseLtDenseDescriptorInit(h, b.pointer, i64(rows), i64(cols), i64(cols), u32(16), kind, _ROW), "B"
        )
        ld, order = (m, _COL) if shape.d_transposed else (n, _ROW)
        _check(lib.cusparseLtDenseDescriptorInit(h, d.pointer, i64(m), i64(n), i64(ld), u32(16), kind, order), "D")
        op = _TRANSPOSED if shape.b_transposed else _PLAIN
        _check(
            lib.cusparseLtMatmulDescriptorInit(
                h, matmul.pointer, _PLAIN, op, a.pointer, b.pointer, d.pointer, d.pointer, _COMPUTE_32F
            ),
            "matmul descriptor",
        )
        _check(lib.cusparseLtMatmulAlgSelectionInit(h, selection.pointer, matmul.pointer, 0), "algorithm selection")
        top = ctypes.c_int(0)
        _check(
            lib.cusparseLtMatmulAlgGetAttribute(
                h, selection.pointer, _ALG_CONFIG_MAX_ID, ctypes.byref(top), ctypes.c_size_t(4)
            ),
            "number of algorithms",
        )
        self.algorithms = top.value
        if algorithm is not None:
            wanted = ctypes.c_int(algorithm)
            _check(
                lib.cusparseLtMatmulAlgSetAttribute(
                    h, selection.pointer, _ALG_CONFIG_ID, ctypes.byref(wanted), ctypes.c_size_t(4)
                ),
                f"algorithm {algorithm}",
            )
        _check(lib.cusparseLtMatmulPlanInit(h, self._plan.pointer, matmul.pointer, selection.pointer), "plan")
        size = ctypes.c_size_t(0)
        _check(lib.cusparseLtMatmulGetWorkspace(h, self._plan.pointer, ctypes.byref(size)), "workspace")
        self.workspace = size.value
        self._matmul = lib.cusparseLtMatmul
        self._one, self._zero = ctypes.byref(ctypes.c_float(1.0)), ctypes.byref(ctypes.c_float(0.0))
        self._stream = ctypes.c_void_p()
        self._streams = ctypes.byref(self._stream)

    def __call__(self, packed: Tensor, b: Tensor, d: Tensor) -> None:
        """d = A b on the current stream of the current device. All tensors contiguous."""
        # private, but what Inductor's and Triton's launches ask: torch.cuda.current_stream builds an object each time
        stream = self._stream.value = torch._C._cuda_getCurrentRawStream(d.get_device())
        # what torch.cuda.caching_allocator_alloc calls: a tensor around it would cost some microseconds more
        workspace = torch._C._cuda_cudaCachingAllocator_raw_alloc(self.workspace, stream) if self.workspace else None
        out = d.data_ptr()
        try:
            status = self._matmul(
                self._handle.pointer,
                self._plan.pointer,
                self._one,
                packed.data_ptr(),
                b.data_ptr(),
                self._zero,
                out,
                out,
                workspace,
                self._streams,
                1,
            )
        finally:
            if workspace is not None:  # the next to get it on this stream comes behind this call
                torch._C._cuda_cudaCachingAllocator_raw_delete(workspace)
        if status:
            _check(status, "matmul")


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.handles: dict[int, _Opaque] = {}
        self.plans: dict[tuple[int, Shape, int | None], Plan] = {}


_local = _PerThread()


def plan(shape: Shape, algorithm: int | None, device: torch.device) -> Plan:
    """The kept plan of this thread and device, made at first use. Raises Unavailable or Failed."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    key = (index, shape, algorithm)
    found = _local.plans.get(key)
    if found is None:
        with torch.cuda.device(index):
            handle = _local.handles.get(index)
            if handle is None:
                torch.empty(0, device=device)  # a CUDA context
                handle = _Opaque()
                _check(library().cusparseLtInit(handle.pointer), "init")
                _local.handles[index] = handle
            found = _local.plans[key] = Plan(handle, shape, algorithm)
    return found
