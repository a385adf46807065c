"""The three matmuls of a linear layer, dense and sparse, beside what stock PyTorch offers.

forward  [T, K] by W^T       wgrad  dY^T by X        dgrad is a forward with K and F exchanged
sparse24: the chosen provider. cslt: `torch._cslt_sparse_mm`. semi_structured: `torch.sparse.to_sparse_semi_structured`,
forward only. gluon N: with SPARSE24_GLUON=1, variant N of our own kernels, the fastest right one; they are then
candidates of sparse24 too. What packing costs is not in here (pack.py). Sustained: in turns after two warm seconds;
cold: the median of single calls with 20 ms of rest before each. "of peak" holds the rate against the data sheet's for
dense bf16, 989 TFLOP/s; a sparse matmul counts the operations of the dense one, so its bound is 2. host: microseconds
until a call returns, of calls one behind another that the GPU does not keep waiting; kept: those of a cuSPARSELt call
with its kept plan alone, without PyTorch's way to an op, the choice and the output's allocation.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from common import Rows, environment, in_turns, parser, percentiles, timed

from sparse24.kernels import choice, layout, ops, reference
from sparse24.kernels.providers import CusparseLt, Gluon, Problem

PEAK = 989e12
#: in_features, out_features
SHAPES = [(768, 3072), (1024, 4096), (1280, 5120), (1600, 6400), (2048, 8192), (4096, 14336), (4096, 28672)]
#: the problem, its packed operand, the other one, and what computes it
Case = tuple[Problem, torch.Tensor, torch.Tensor, dict[str, Callable[[], Any]]]


def cold(run: Callable[[], Any], n: int = 7) -> float:
    times = []
    for _ in range(n):
        time.sleep(0.02)
        times.append(timed(run, 1))
    return sorted(times)[n // 2]


def host_us(run: Callable[[], Any], turns: int = 25, n: int = 20) -> dict[str, float]:
    """Percentiles over single calls, one behind another: n of them fit into the queue of the GPU, which then drains."""
    times = []
    for _ in range(turns):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for _ in range(n):
            began = time.perf_counter()
            run()
            times.append((time.perf_counter() - began) * 1e6)
    return percentiles(times)


def gluon(problem: Problem, packed: torch.Tensor, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The fastest right variant of the Gluon kernels, where they are asked for and serve the problem."""
    provider = Gluon()
    if not provider.supports(problem):
        return {}
    found = choice.measure(problem, [provider])
    if found.provider != provider.name:
        return {}
    return {f"gluon {found.algorithm}": lambda: provider.run(problem, packed, x, found.algorithm)}


def kept_us(problem: Problem, algorithm: int | None, packed: torch.Tensor, x: torch.Tensor) -> dict[str, float]:
    """`host_us` of the library's call alone: the kept plan of a problem whose size needs no padding is run."""
    provider = CusparseLt()
    y = provider.run(problem, packed, x, algorithm)
    return host_us(lambda: provider.plan(problem, algorithm)(packed, x, y))


def forward(k: int, f: int, tokens: int, device: str) -> Case:
    w = torch.randn(f, k, device=device).bfloat16()
    x = torch.randn(tokens, k, device=device).bfloat16()
    masked = w * reference.best_mask(w)
    order = layout.metadata_order(x.device)
    packed = layout.pack(w, reference.best_mask(w), order)
    runs: dict[str, Callable[[], Any]] = {"dense": lambda: x @ masked.t(), "sparse24": lambda: ops.spmm(packed, x, f)}
    if device == "cuda":
        compressed = torch._cslt_compress(masked)
        runs["cslt"] = lambda: torch._cslt_sparse_mm(compressed, x.t(), transpose_result=True)
        semi = torch.sparse.to_sparse_semi_structured(masked)
        runs["semi_structured"] = lambda: torch.nn.functional.linear(x, semi)
    problem = Problem("spmm", f, k, tokens, x.dtype, x.device)
    return problem, packed, x, runs | gluon(problem, packed, x)


def wgrad(k: int, f: int, tokens: int, device: str) -> Case:
    dy = torch.randn(tokens, f, device=device).bfloat16()
    x = torch.randn(tokens, k, device=device).bfloat16()
    packed = ops.pack_gradient(dy, torch.zeros(1, dtype=torch.int64, device=device), 0)
    runs: dict[str, Callable[[], Any]] = {"dense": lambda: dy.t() @ x, "sparse24": lambda: ops.wgrad(packed, x, f)}
    if device == "cuda":
        compressed = packed.view(f, -1)
        runs["cslt"] = lambda: torch._cslt_sparse_mm(compressed, x)
    problem = Problem("wgrad", f, reference.padded(tokens), k, x.dtype, x.device)
    return problem, packed, x, runs | gluon(problem, packed, x)


def main() -> None:
    p = parser(__doc__, "gemm.json", resumable=True)
    p.add_argument("--tokens", type=int, default=16384, help="tokens of the inputs")
    p.add_argument("--tiny", action="store_true", help="one small shape, to try the script on a CPU")
    args = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = Rows(args.out, ("k", "f", "matmul"), args.resume, tokens=args.tokens)
    print(environment())
    numbers = f"{'ms':>8s} {'ratio':>6s} {'of peak':>8s} {'cold ms':>8s} {'host':>5s} {'kept':>5s}"
    print(f"{'K':>6s} {'F':>6s} {'matmul':8s} {'with':16s} {numbers}")
    for k, f in [(128, 256)] if args.tiny else SHAPES:
        tokens = 128 if args.tiny else args.tokens
        for name, make in (("forward", forward), ("wgrad", wgrad), ("dgrad", forward)):
            if (k, f, name) in rows:
                continue
            problem, packed, x, runs = make(*((f, k) if name == "dgrad" else (k, f)), tokens, device)
            chosen = choice.choose(problem)
            times = in_turns(runs, 6, 2 if args.tiny else 20, 0.0 if args.tiny else 2.0)
            found = []
            dense = percentiles(times["dense"])["p50"]
            for provider, run in runs.items():
                ms = percentiles(times[provider])
                share = 2 * tokens * k * f / ms["p50"] * 1e3 / PEAK
                row = {"k": k, "f": f, "tokens": tokens, "matmul": name, "with": provider, "ms": ms}
                row |= {"ratio": dense / ms["p50"], "of_peak": share, "cold_ms": cold(run), "host_us": host_us(run)}
                if provider == "sparse24":
                    row |= {"provider": chosen.provider, "algorithm": chosen.algorithm}
                if row.get("provider") == CusparseLt.name:
                    row["kept_us"] = kept_us(problem, chosen.algorithm, packed, x)
                found.append(row)
                numbers = f"{ms['p50']:8.4f} {row['ratio']:6.2f} {share:8.2f} {row['cold_ms']:8.4f}"
                for host in ("host_us", "kept_us"):
                    numbers += f" {row[host]['p50'] if host in row else float('nan'):5.0f}"
                print(f"{k:6d} {f:6d} {name:8s} {provider:16s} {numbers}", flush=True)
            rows.add(*found)


if __name__ == "__main__":
    main()
