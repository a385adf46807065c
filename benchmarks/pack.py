"""The memory-bound kernels beside a copy of the same tensor: packing, masked decay, activations, pruned gradients.

GB/s counts every byte read and written once; "of a copy" is that rate over the rate of `Tensor.clone` on the same
tensor. Times are the GPU's alone: a call is a CUDA graph, replayed with nothing of it in the L2.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from common import environment, parser, percentiles, save
from torch import Tensor

from sparse24.kernels import layout, ops


def times(run: Callable[[], Any]) -> dict[str, float]:
    """ms of a call, as `percentiles`."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # compiles, and makes the tables that packing keeps for a stream
        run()
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return percentiles(triton.testing.do_bench(graph.replay, warmup=100, rep=200, return_mode="all"))


def weight_kernels(rows: int, cols: int, master: torch.dtype) -> dict[str, tuple[Callable[[], Any], int, Tensor]]:
    """name -> (call, bytes moved, tensor whose copy it is held against)."""
    w = torch.randn(rows, cols, device="cuda").to(master)
    dtype = torch.float16 if master == torch.float16 else torch.bfloat16
    size = layout.numel(rows, cols, dtype)
    packed, packed_t = (torch.zeros(size, dtype=dtype, device="cuda") for _ in range(2))
    blocks, grads = [layout.Block(w, packed, packed_t, 0, 0, rows, cols)], [torch.zeros_like(w)]
    ops.pack_weights_(blocks, True)
    moved = w.nbytes + packed.nbytes + packed_t.nbytes
    return {
        "pack_weights, new mask": (lambda: ops.pack_weights_(blocks, True), moved, w),
        "pack_weights, mask kept": (lambda: ops.pack_weights_(blocks, False), moved, w),
        "masked_decay": (lambda: ops.masked_decay_(grads, blocks, 1e-4), 3 * w.nbytes, w),
    }


def token_kernels(tokens: int, features: int) -> dict[str, tuple[Callable[[], Any], int, Tensor]]:
    dy = torch.randn(tokens, features, device="cuda").bfloat16()
    gate_up = torch.randn(tokens, 2 * features, device="cuda").bfloat16()
    seeds, n = torch.zeros(1, dtype=torch.int64, device="cuda"), dy.nbytes
    fused = n * 5 + gate_up.nbytes * 9 // 16
    return {
        "pack_gradient": (lambda: ops.pack_gradient(dy, seeds, 0), n * 25 // 16, dy),
        "glu": (lambda: ops.glu(gate_up, None, "swiglu"), n * 3, dy),
        "glu_backward": (lambda: ops.glu_backward(dy, gate_up, None, "swiglu"), n * 5, dy),
        "glu_backward_pack": (lambda: ops.glu_backward_pack(dy, gate_up, None, "swiglu", seeds, 0), fused, dy),
    }


def main() -> None:
    p = parser(__doc__, "pack.json")
    p.add_argument("--rows", type=int, default=14336, help="out_features of the weight")
    p.add_argument("--cols", type=int, default=4096, help="in_features of the weight")
    p.add_argument("--tokens", type=int, default=16384, help="tokens of the gradients and activations")
    p.add_argument("--features", type=int, default=8192, help="their features")
    args = p.parse_args()
    cases = {f"{m}": weight_kernels(args.rows, args.cols, m) for m in (torch.bfloat16, torch.float16, torch.float32)}
    cases["tokens"] = token_kernels(args.tokens, args.features)
    rows = []
    print(environment())
    print(f"{'kernel':24s} {'of':16s} {'ms':>8s} {'GB/s':>7s} {'of a copy':>9s}")
    for of, kernels in cases.items():
        for name, (run, moved, tensor) in kernels.items():
            found, copy = times(run), times(tensor.clone)["p50"]
            took = found["p50"]
            rate, share = moved / took / 1e6, moved / took / (2 * tensor.nbytes / copy)
            rows.append({"kernel": name, "of": of, "ms": took, "gb_per_s": rate, "of_a_copy": share})
            rows[-1]["percentiles"] = found
            print(f"{name:24s} {of:16s} {took:8.4f} {rate:7.0f} {share:9.2f}", flush=True)
    save(args.out, {"shape": vars(args) | {"out": str(args.out)}, "rows": rows})


if __name__ == "__main__":
    main()
