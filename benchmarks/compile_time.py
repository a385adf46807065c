"""Time to the first step, dense and sparse, each in a process of its own with empty caches.

The models are those of step.py. The first step contains tracing, compilation, Triton's compilation and, for sparse24,
the measuring of its choices (given apart: the same again with the choices kept on disk). Parts of it are given too, in
s: matmuls measured, waiting for kernels that other processes compile, kernels compiled here, and the compiler behind.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from common import environment, parser, save
from step import MODELS, Run

TINY = {"d": 128, "ff": 256, "heads": 2, "layers": 1, "batch": 2, "seq": 64, "vocab": 256}


class Clock:
    """Seconds spent in functions that are replaced by their timed selves."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    def on(self, name: str, owner: Any, attribute: str) -> None:
        function = getattr(owner, attribute)
        self.parts[name] = 0.0

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.parts[name] += time.perf_counter() - began

        setattr(owner, attribute, timed)


def clock() -> Clock:
    from sparse24.compiler import backend
    from sparse24.kernels import ahead, choice

    found = Clock()
    found.on("matmuls measured", choice, "measure")
    found.on("waited for kernels", ahead, "wait")
    found.on("compiler behind", backend, "compile_inner")
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        return found
    found.on("kernels compiled here", JITFunction, "_do_compile")
    return found


def measure(shape: dict[str, Any], kind: str, inner: str) -> dict[str, Any]:
    """This process's first step, in s, and its parts where it is sparse."""
    parts = clock().parts if kind != "dense" else {}
    sparse = {"backend": "sparse24", "options": {"when": "faster", "inner": inner}}
    options = {"backend": inner} if kind == "dense" else sparse
    run = Run(dict(shape), options)
    began = time.perf_counter()
    run.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"first_step_s": time.perf_counter() - began, "parts": parts}


def in_a_process(model: str, kind: str, inner: str, choices: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        command = [sys.executable, __file__, "--one", model, kind, "--inner", inner]
        environ = {**os.environ, **caches, "SPARSE24_CACHE": choices}
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def main() -> None:
    p = parser(__doc__, "compile_time.json")
    p.add_argument("--models", nargs="+", default=["llama-1b-width"], choices=[*MODELS, "tiny"], help="which models")
    p.add_argument("--inner", default="inductor", choices=["inductor", "aot_eager"], help="the compiler behind")
    p.add_argument("--one", nargs=2, metavar=("MODEL", "KIND"), help="measure in this process and print")
    args = p.parse_args()
    if args.one:
        model, kind = args.one
        print(json.dumps(measure(TINY if model == "tiny" else MODELS[model], kind, args.inner)))
        return
    rows: list[dict[str, Any]] = []
    print(environment())
    print(f"{'model':20s} {'kind':18s} {'first step s':>12s} {'of dense':>8s}")
    for model in args.models:
        dense_s = float("nan")
        with tempfile.TemporaryDirectory() as choices:
            for kind in ("dense", "sparse", "sparse, choices kept"):
                found = in_a_process(model, kind.split(",")[0], args.inner, choices)
                took = found["first_step_s"]
                dense_s = took if kind == "dense" else dense_s
                rows.append({"model": model, "kind": kind, **found, "of_dense": took / dense_s})
                parts = ", ".join(f"{name} {s:.1f}" for name, s in found["parts"].items())
                print(f"{model:20s} {kind:18s} {took:12.1f} {took / dense_s:8.2f}  {parts}", flush=True)
                save(args.out, {"rows": rows})


if __name__ == "__main__":
    main()
