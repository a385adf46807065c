"""Forward and backward of one feed-forward layer over its width, dense and sparse, both compiled: the paper's table.

bf16, 16384 tokens, hidden width 4 d (gelu) or 8/3 d (gated). The optimizer step with its repacking is not in here
(step.py). "bound": the six matmuls at twice the data sheet's rate for dense bf16 (989 TFLOP/s), one after the other
with the bytes of the activation and the pruned gradients at 4.8 TB/s. The kernels of one sparse step are saved too, in
the order they ran: no copy or transpose stands between matmul, activation and matmul.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import Rows, environment, in_turns, parser, percentiles
from torch import Tensor, nn


class FeedForward(nn.Module):
    def __init__(self, d: int, gated: bool) -> None:
        super().__init__()
        ff = -(-8 * d // 3 // 256) * 256 if gated else 4 * d
        self.gate = nn.Linear(d, ff, bias=False) if gated else None
        self.up, self.down = nn.Linear(d, ff, bias=not gated), nn.Linear(ff, d, bias=not gated)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x) if self.gate is not None else F.gelu(self.up(x), approximate="tanh")
        return self.down(h)


def step_of(model: nn.Module, x: Tensor, dy: Tensor, **how: Any) -> Callable[[], None]:
    compiled = torch.compile(model, **how)
    inputs = [x, *model.parameters()]

    def step() -> None:
        torch.autograd.grad(compiled(x), inputs, dy)

    return step


def bound_ms(tokens: int, d: int, ff: int, gated: bool) -> float:
    """Each byte once: the activation and its backward (z, h, dh, dz), and the gradients packed from dy and dz."""
    up = 2 * ff if gated else ff
    flops = 6 * tokens * d * (up + ff)
    moved = 2 * tokens * ((up + ff) + (2 * up + ff + up * 9 / 16) + d * 25 / 16)
    return flops / (2 * 989e12) * 1e3 + moved / 4.8e12 * 1e3


def kernels(step: Callable[[], None]) -> list[str]:
    """What one step runs on the GPU, in order; nothing on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    events = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [e.name[:80] for e in sorted(events, key=lambda e: e.time_range.start)]


def main() -> None:
    p = parser(__doc__, "ffn.json", resumable=True)
    p.add_argument("--widths", type=int, nargs="+", default=[768, 1024, 1280, 1600, 2048, 3072, 4096, 6144, 8192])
    p.add_argument("--tokens", type=int, default=16384, help="tokens of the input")
    p.add_argument("--when", default="always", choices=["faster", "always"], help="the recipe's option")
    p.add_argument("--tiny", action="store_true", help="one small width, to try the script on a CPU")
    args = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inner = {"inner": "eager"} if args.tiny else {}
    rows = Rows(args.out, ("d", "kind"), args.resume, when=args.when, tokens=args.tokens)
    print(environment())
    print(f"{'d':>6s} {'kind':6s} {'dense ms':>9s} {'sparse ms':>9s} {'ratio':>6s} {'bound ms':>9s}")
    for d in [192] if args.tiny else args.widths:
        for kind in ("gelu", "gated"):
            if (d, kind) in rows:
                continue
            torch._dynamo.reset()
            model = FeedForward(d, kind == "gated").to(device, torch.bfloat16)
            x = torch.randn(128 if args.tiny else args.tokens, d, device=device).bfloat16().requires_grad_()
            dy = torch.randn_like(x)
            runs = {
                "dense": step_of(model, x, dy, backend=inner.get("inner", "inductor")),
                "sparse": step_of(model, x, dy, backend="sparse24", options={"when": args.when, **inner}),
            }
            times = in_turns(runs, 5, 2 if args.tiny else 10, 0.0 if args.tiny else 2.0)
            ms = {name: percentiles(values) for name, values in times.items()}
            row = {"d": d, "kind": kind, "tokens": x.shape[0], "ms": ms}
            row["ratio"] = ms["dense"]["p50"] / ms["sparse"]["p50"]
            row["bound_ms"] = bound_ms(x.shape[0], d, model.up.out_features, kind == "gated")
            row["kernels"] = kernels(runs["sparse"])
            numbers = f"{ms['dense']['p50']:9.3f} {ms['sparse']['p50']:9.3f} {row['ratio']:6.3f} {row['bound_ms']:9.3f}"
            print(f"{d:6d} {kind:6s} {numbers}", flush=True)
            rows.add(row)
            del runs, model
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
