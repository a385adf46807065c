"""Time to the first step, dense and sparse, each in a process of its own with empty caches.

The models are those of step.py. The first step contains tracing, compilation, Triton's compilation and, for sparse24,
the measuring of its choices (given apart: the same again with the choices kept on disk).
"""

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

TINY = {"d": 128, "ff": 256, "heads": 2, "layers": 2, "batch": 2, "seq": 64, "vocab": 256}


def measure(shape: dict[str, Any], kind: str) -> float:
    """This process's first step, in s."""
    options = {} if kind == "dense" else {"backend": "sparse24", "options": {"when": "faster"}}
    run = Run(dict(shape), options)
    began = time.perf_counter()
    run.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_a_process(model: str, kind: str, choices: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        command = [sys.executable, __file__, "--one", model, kind]
        environ = {**os.environ, **caches, "SPARSE24_CACHE": choices}
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
        return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    p = parser(__doc__, "compile_time.json")
    p.add_argument("--models", nargs="+", default=["llama-1b-width"], choices=[*MODELS, "tiny"], help="which models")
    p.add_argument("--one", nargs=2, metavar=("MODEL", "KIND"), help="measure in this process and print")
    args = p.parse_args()
    if args.one:
        model, kind = args.one
        print(json.dumps(measure(TINY if model == "tiny" else MODELS[model], kind)))
        return
    rows: list[dict[str, Any]] = []
    print(environment())
    print(f"{'model':20s} {'kind':18s} {'first step s':>12s} {'of dense':>8s}")
    for model in args.models:
        dense_s = float("nan")
        with tempfile.TemporaryDirectory() as choices:
            for kind in ("dense", "sparse", "sparse, choices kept"):
                found = in_a_process(model, kind.split(",")[0], choices)
                dense_s = found if kind == "dense" else dense_s
                rows.append({"model": model, "kind": kind, "first_step_s": found, "of_dense": found / dense_s})
                print(f"{model:20s} {kind:18s} {found:12.1f} {found / dense_s:8.2f}", flush=True)
                save(args.out, {"rows": rows})


if __name__ == "__main__":
    main()
