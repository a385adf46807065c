"""Time to the first step and memory of a run, dense and sparse, each in a process of its own with empty caches.

The models are those of step.py. The first step contains tracing, compilation, Triton's compilation and, for sparse24,
the measuring of its choices (given apart: the same again with the choices kept on disk). Memory is the peak that
PyTorch allocated in three steps.
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


def measure(shape: dict[str, Any], kind: str) -> dict[str, float]:
    """This process's first step, in s, and its peak, in GiB."""
    options = {} if kind == "dense" else {"backend": "sparse24", "options": {"when": "faster"}}
    run = Run(dict(shape), options)
    began = time.perf_counter()
    run.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    first = time.perf_counter() - began
    for _ in range(2):
        run.step()
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")
    return {"first_step_s": first, "peak_gib": peak}


def in_a_process(model: str, kind: str, choices: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        command = [sys.executable, __file__, "--one", model, kind]
        environ = {**os.environ, **caches, "SPARSE24_CACHE": choices}
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    p = parser(__doc__, "first_step.json")
    p.add_argument("--models", nargs="+", default=["llama-1b-width"], choices=[*MODELS, "tiny"], help="which models")
    p.add_argument("--one", nargs=2, metavar=("MODEL", "KIND"), help="measure in this process and print")
    args = p.parse_args()
    if args.one:
        model, kind = args.one
        print(json.dumps(measure(TINY if model == "tiny" else MODELS[model], kind)))
        return
    rows: list[dict[str, Any]] = []
    print(environment())
    print(f"{'model':20s} {'kind':18s} {'first step s':>12s} {'of dense':>8s} {'peak GiB':>9s}")
    for model in args.models:
        dense_s = float("nan")
        with tempfile.TemporaryDirectory() as choices:
            for kind in ("dense", "sparse", "sparse, choices kept"):
                found = in_a_process(model, kind.split(",")[0], choices)
                dense_s = found["first_step_s"] if kind == "dense" else dense_s
                row = {"model": model, "kind": kind, **found, "of_dense": found["first_step_s"] / dense_s}
                rows.append(row)
                numbers = f"{found['first_step_s']:12.1f} {row['of_dense']:8.2f} {found['peak_gib']:9.2f}"
                print(f"{model:20s} {kind:18s} {numbers}", flush=True)
                save(args.out, {"rows": rows})


if __name__ == "__main__":
    main()
