"""Whole training steps, sparse against dense: forward, backward, fused AdamW, and everything sparse24 does.

Both models are compiled by torch.compile, dense and with backend="sparse24"; weights, gradients and AdamW's state are
bf16. They run in turns of ten steps in one process after two warm seconds each; the sparse turns together are 40 steps
and so hold one search of the masks. "micro" is the steady forward and backward without the optimizer step. With
--cudagraphs forward and backward of both are CUDA graphs: of small models the host otherwise bounds the step.
"""

import functools
import gc
import time
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from common import Rows, environment, parser, percentiles, timed
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS: dict[str, dict[str, Any]] = {
    "llama3-8b-width": {
        "d": 4096,
        "ff": 14336,
        "heads": 32,
        "kv": 8,
        "layers": 4,
        "batch": 8,
        "seq": 2048,
        "gated": True,
    },
    "llama-1b-width": {
        "d": 2048,
        "ff": 8192,
        "heads": 32,
        "kv": 8,
        "layers": 8,
        "batch": 16,
        "seq": 2048,
        "gated": True,
    },
    "gpt2-xl-width": {"d": 1600, "ff": 6400, "heads": 25, "layers": 12, "batch": 16, "seq": 1024},
    "gpt2-large-width": {"d": 1280, "ff": 5120, "heads": 20, "layers": 12, "batch": 32, "seq": 1024},
    "gpt2-medium-width": {"d": 1024, "ff": 4096, "heads": 16, "layers": 12, "batch": 32, "seq": 1024},
    "gpt2-small": {"d": 768, "ff": 3072, "heads": 12, "layers": 12, "batch": 32, "seq": 1024},
    "vit-l": {
        "d": 1024,
        "ff": 4096,
        "heads": 16,
        "layers": 12,
        "batch": 64,
        "seq": 256,
        "causal": False,
        "vocab": 1024,
    },
    "bert-base": {
        "d": 768,
        "ff": 3072,
        "heads": 12,
        "layers": 12,
        "batch": 64,
        "seq": 512,
        "causal": False,
        "vocab": 30528,
    },
}


class Block(nn.Module):
    def __init__(self, d: int, ff: int, heads: int, kv: int, gated: bool, causal: bool) -> None:
        super().__init__()
        self.heads, self.kv, self.causal, bias = heads, kv, causal, not gated
        head = d // heads
        norm = nn.RMSNorm if gated else nn.LayerNorm
        self.n1, self.n2 = norm(d), norm(d)
        self.q, self.o = nn.Linear(d, heads * head, bias=bias), nn.Linear(heads * head, d, bias=bias)
        self.k, self.v = nn.Linear(d, kv * head, bias=bias), nn.Linear(d, kv * head, bias=bias)
        self.gate = nn.Linear(d, ff, bias=False) if gated else None
        self.up, self.down = nn.Linear(d, ff, bias=bias), nn.Linear(ff, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        h = self.n1(x)
        q = self.q(h).view(b, t, self.heads, -1).transpose(1, 2)
        k, v = (p(h).view(b, t, self.kv, -1).transpose(1, 2) for p in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.kv != self.heads)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, d))
        h = self.n2(x)
        h = F.silu(self.gate(h)) * self.up(h) if self.gate is not None else F.gelu(self.up(h), approximate="tanh")
        return x + self.down(h)


class Transformer(nn.Module):
    def __init__(
        self, d: int, ff: int, heads: int, layers: int, kv: int, gated: bool, causal: bool, vocab: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList(Block(d, ff, heads, kv, gated, causal) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


class Run:
    """One model, its optimizer and its compiled form."""

    def __init__(self, shape: dict[str, Any], compile_options: dict[str, Any]) -> None:
        shape = {"gated": False, "causal": True, "vocab": 32000, "kv": shape["heads"], **shape}
        self.batch, self.seq, self.vocab = shape.pop("batch"), shape.pop("seq"), shape["vocab"]
        torch.manual_seed(0)
        self.model = Transformer(**shape).to(DEVICE, torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.compiled = torch.compile(self.model, **compile_options)
        self.data = torch.randint(self.vocab, (self.batch, self.seq), device=DEVICE)

    def micro(self) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # nothing without CUDA graphs
        loss = self.compiled(self.data, self.data.roll(-1, 1))
        loss.backward()
        return loss

    def step(self) -> Tensor:
        loss = self.micro()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def peak(run: Run) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run.step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def profile(run: Run, top: int = 14) -> dict[str, float]:
    """ms a step by kernel, the largest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        for _ in range(3):
            run.step()
        torch.cuda.synchronize()
    kernels: dict[str, float] = {}
    for event in recorded.key_averages():
        if event.self_device_time_total and not event.key.startswith(("aten::", "sparse24::", "Optimizer", "autograd")):
            kernels[event.key[:90]] = kernels.get(event.key[:90], 0.0) + event.self_device_time_total / 3e3
    ordered = sorted(kernels.items(), key=lambda kv: -kv[1])
    return {name: round(ms, 3) for name, ms in ordered[:top]} | {"all kernels": round(sum(kernels.values()), 3)}


def compare(name: str, layers: str, when: str, wgrad: str, cudagraphs: bool, with_profile: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    import sparse24

    inductor = {"triton.cudagraphs": True} if cudagraphs else {}
    options = {"layers": layers, "when": when, "wgrad": wgrad, "inductor": inductor}
    dense = Run(MODELS[name], {"options": inductor} if cudagraphs else {})
    sparse = Run(MODELS[name], {"backend": "sparse24", "options": options})
    seconds = {}
    for key, run in (("dense", dense), ("sparse", sparse)):
        start = time.perf_counter()
        run.step()
        torch.cuda.synchronize()
        seconds[key] = time.perf_counter() - start
        while time.perf_counter() - start < seconds[key] + 2:
            run.step()
            torch.cuda.synchronize()
    session = sparse24.session(sparse.model)
    while session.step % 40:  # the timed steps then are one whole refresh interval
        sparse.step()
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    micro: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(4):
        for key, run in (("dense", dense), ("sparse", sparse)):
            times[key].append(timed(run.step, 10))

    def steady(run: Run) -> None:
        run.micro()
        if cudagraphs:  # the next replay writes where these gradients are
            run.optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        for key, run in (("dense", dense), ("sparse", sparse)):
            micro[key].append(timed(functools.partial(steady, run), 3))
            run.optimizer.zero_grad(set_to_none=True)
    mean = {key: sum(values) / len(values) for key, values in times.items()}
    result = {
        "model": name,
        "layers": layers,
        "dense_ms": mean["dense"],
        "sparse_ms": mean["sparse"],
        "ratio": mean["dense"] / mean["sparse"],
        "micro_ratio": percentiles(micro["dense"])["p50"] / percentiles(micro["sparse"])["p50"],
        "percentiles": {key: percentiles(values) for key, values in times.items()},
        "micro": {key: percentiles(values) for key, values in micro.items()},
        "first_step_s": seconds,
        "peak_gib_above_resident": {"dense": peak(dense), "sparse": peak(sparse)},
        "resident_gib": {kind: n / 2**30 for kind, n in session.memory().items()},
        "sparse_weights": sum(w.reason_skipped is None for w in session.weights.values()),
        "dense_reasons": sorted({w.reason_skipped for w in session.weights.values() if w.reason_skipped}),
        "flip_rate": session.flip_rate(),
    }
    if with_profile:
        result["profile_dense"], result["profile_sparse"] = profile(dense), profile(sparse)
    return result


def main() -> None:
    p = parser(__doc__, "step.json", resumable=True)
    p.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="which models")
    p.add_argument("--layers", nargs="+", default=["ffn", "all"], help="which linears are sparse")
    p.add_argument("--when", default="faster", choices=["faster", "always"], help="the recipe's option")
    p.add_argument("--wgrad", default="mvue", choices=["mvue", "dense", "mixed"], help="the recipe's option")
    p.add_argument("--cudagraphs", action="store_true", help="compile both into CUDA graphs")
    p.add_argument("--profile", action="store_true", help="add the time of each kernel")
    args = p.parse_args()
    settings = {"when": args.when, "wgrad": args.wgrad, "cudagraphs": args.cudagraphs}
    rows = Rows(args.out, ("model", "layers"), args.resume, **settings)
    print(environment())
    print(
        f"{'model':20s} {'layers':6s} {'dense ms':>9s} {'sparse ms':>9s} {'ratio':>6s} {'micro':>6s}  sparse weights",
        flush=True,
    )
    for name in args.models:
        for layers in args.layers:
            if (name, layers) in rows:
                continue
            row = compare(name, layers, **settings, with_profile=args.profile)
            print(
                f"{name:20s} {layers:6s} {row['dense_ms']:9.2f} {row['sparse_ms']:9.2f} {row['ratio']:6.3f} "
                f"{row['micro_ratio']:6.3f}  {row['sparse_weights']}",
                flush=True,
            )
            rows.add(row)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
