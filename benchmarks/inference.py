"""A forward of one pruned transformer block over the number of tokens, as in a prefill: dense, sparse24, stock PyTorch.

bf16, the width of Llama-3-8B, sequences of up to 2048 tokens; feed-forward weights are 2:4 along in_features, attention
is dense. All are compiled, for each number of tokens anew, and run in turns in one process after two warm seconds.
semi_structured: torch's SparseSemiStructuredTensor, from sparse24.to_semi_structured. A peer that fails is reported.
"""

import copy
import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from common import environment, in_turns, parser, percentiles, save
from step import Block

import sparse24
from sparse24.kernels import layout

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@torch.no_grad()
def prune(block: nn.Module) -> None:
    """Keep the two largest of every four feed-forward weights along in_features."""
    for layer in (block.gate, block.up, block.down):
        groups = layer.weight.view(layer.weight.shape[0], -1, 4)
        groups *= torch.zeros_like(groups).scatter_(-1, groups.abs().topk(2, -1).indices, 1)
        assert layout.mask_of(layer.weight) is not None


def weight_bytes(model: nn.Module) -> int:
    """Of the parameters as they are held: dense, or packed by torch."""
    return sum(getattr(p, "packed", p).nbytes for p in model.parameters())


def peak_mib(run: Callable[[], Any]) -> float:
    """What a forward allocates above what is held, in MiB; 0 without a GPU."""
    if not CUDA:
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(block: nn.Module, tokens: int, when: str, tiny: bool) -> dict[str, Any]:
    """One row: times, memory and distance from the dense output of each way to run the block."""
    torch._dynamo.reset()
    sequence = min(tokens, 2048)
    width = block.up.weight.shape[1]
    x = torch.randn(tokens // sequence, sequence, width, device=DEVICE).bfloat16()
    inner = "eager" if tiny else "inductor"
    models = {"dense": block, "sparse24": copy.deepcopy(block)}
    options = {"when": when, "inner": inner}
    runs: dict[str, Callable[[], Any]] = {
        "dense": compiled(models["dense"], x, backend=inner),
        "sparse24": compiled(models["sparse24"], x, backend="sparse24", options=options),
    }
    expected = runs["dense"]()
    errors, failed = {}, {}
    try:
        models["semi_structured"] = sparse24.to_semi_structured(block)
        runs["semi_structured"] = compiled(models["semi_structured"], x, backend=inner)
        runs["semi_structured"]()
    except Exception as error:  # another library's: what it says is a result
        runs.pop("semi_structured", None)
        failed["semi_structured"] = f"{type(error).__name__}: {error}"
    for name, run in runs.items():
        errors[name] = ((run() - expected).float().norm() / expected.float().norm()).item()
        assert errors[name] < 2e-2, f"{name} computes something else: relative error {errors[name]}"
    times = in_turns(runs, 5, 2 if tiny else 5, 0.0 if tiny else 2.0)
    ms = {name: percentiles(values) for name, values in times.items()}
    held = {name: weight_bytes(models[name]) / 2**20 for name in runs}
    session = sparse24.session(models["sparse24"])
    held["sparse24"] += session.memory()["packed"] / 2**20
    return {
        "tokens": tokens,
        "ms": ms,
        "ratio": ms["dense"]["p50"] / ms["sparse24"]["p50"],
        "ratios": {name: ms["dense"]["p50"] / found["p50"] for name, found in ms.items()},
        "weights_mib": held,
        "peak_mib_above_weights": {name: peak_mib(run) for name, run in runs.items()},
        "relative_error": errors,
        "failed": failed,
        "sparse_weights": sum(w.reason_skipped is None for w in session.weights.values()),
        "dense_reasons": sorted({w.reason_skipped for w in session.weights.values() if w.reason_skipped}),
    }


def compiled(model: nn.Module, x: torch.Tensor, **how: Any) -> Callable[[], Any]:
    forward = torch.compile(model, dynamic=False, **how)

    def run() -> Any:
        with torch.no_grad():
            return forward(x)

    return run


def main() -> None:
    p = parser(__doc__, "inference.json")
    p.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192, 16384], help="of a forward")
    p.add_argument("--width", type=int, default=4096, help="of the residual stream; heads of 128")
    p.add_argument("--ff", type=int, default=14336, help="width of the feed-forward layer")
    p.add_argument("--when", default="always", choices=["faster", "always"], help="the recipe's option")
    p.add_argument("--tiny", action="store_true", help="one small width, to try the script on a CPU")
    args = p.parse_args()
    d, ff = (256, 512) if args.tiny else (args.width, args.ff)
    torch.manual_seed(0)
    heads = d // 128
    block = Block(d, ff, heads, max(1, heads // 4), gated=True, causal=True).to(DEVICE, torch.bfloat16).eval()
    prune(block)
    rows = []
    print(environment())
    print(f"{'tokens':>7s} {'with':16s}   p20 ms   p50 ms   p80 ms  ratio   weights     above")
    for tokens in [64, 128] if args.tiny else args.tokens:
        row = compare(block, tokens, args.when, args.tiny)
        rows.append(row)
        for name, ms in row["ms"].items():
            numbers = f"{ms['p20']:8.3f} {ms['p50']:8.3f} {ms['p80']:8.3f} {row['ratios'][name]:6.3f}"
            memory = f"{row['weights_mib'][name]:5.0f} MiB {row['peak_mib_above_weights'][name]:5.0f} MiB"
            print(f"{tokens:7d} {name:16s} {numbers} {memory}", flush=True)
        for name, why in row["failed"].items():
            print(f"{tokens:7d} {name:16s} failed: {why}", flush=True)
        save(args.out, {"width": d, "ff": ff, "when": args.when, "rows": rows})
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
