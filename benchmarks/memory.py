"""Memory of a training run, dense and sparse: what stays between steps, and the peak of a step.

The models are those of step.py, weights, gradients and AdamW's state in bf16, gradients set to None between steps. Each
run is in a process of its own; the peak is that of three steps after three others.
"""

import json
import subprocess
import sys
from typing import Any

import torch
from common import environment, parser, save
from step import MODELS, Run

TINY = {"d": 128, "ff": 256, "heads": 2, "layers": 2, "batch": 2, "seq": 64, "vocab": 256}


def measure(shape: dict[str, Any], kind: str, layers: str, inner: str) -> dict[str, Any]:
    """GiB of this process; nan on a CPU, except for the parts that sparse24 counts itself."""
    import sparse24

    sparse = {"backend": "sparse24", "options": {"when": "always", "layers": layers, "inner": inner}}
    run = Run(dict(shape), {"backend": inner} if kind == "dense" else sparse)
    for _ in range(3):
        run.step()
    found = {"resident_gib": float("nan"), "peak_gib": float("nan")}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        found["resident_gib"] = torch.cuda.memory_allocated() / 2**30
        for _ in range(3):
            run.step()
        torch.cuda.synchronize()
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if kind == "sparse":
        found |= {f"{part}_gib": n / 2**30 for part, n in sparse24.session(run.model).memory().items()}
    return found


def main() -> None:
    p = parser(__doc__, "memory.json")
    p.add_argument("--models", nargs="+", default=["llama-1b-width"], choices=[*MODELS, "tiny"], help="which models")
    p.add_argument("--layers", default="ffn", choices=["ffn", "all"], help="which linears are sparse")
    p.add_argument("--inner", default="inductor", choices=["inductor", "aot_eager"], help="the compiler behind")
    p.add_argument("--one", nargs=2, metavar=("MODEL", "KIND"), help="measure in this process and print")
    args = p.parse_args()
    if args.one:
        model, kind = args.one
        print(json.dumps(measure(TINY if model == "tiny" else MODELS[model], kind, args.layers, args.inner)))
        return
    rows: list[dict[str, Any]] = []
    print(environment())
    print(f"{'model':20s} {'kind':8s} {'resident GiB':>12s} {'peak GiB':>9s}  of it")
    for model in args.models:
        for kind in ("dense", "sparse"):
            command = [sys.executable, __file__, "--one", model, kind, "--layers", args.layers, "--inner", args.inner]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            rows.append({"model": model, "kind": kind, "layers": args.layers, **found})
            parts = [f"{key} {value:.2f}" for key, value in found.items() if key not in ("resident_gib", "peak_gib")]
            numbers = f"{found['resident_gib']:12.2f} {found['peak_gib']:9.2f}"
            print(f"{model:20s} {kind:8s} {numbers}  {', '.join(parts)}", flush=True)
            save(args.out, {"rows": rows})


if __name__ == "__main__":
    main()
