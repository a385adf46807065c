"""How much noise MVUE adds to the weight gradients of feed-forward layers, over a dense training run.

    python benchmarks/quality/noise.py --family gpt --scale small            a GPU minute
    python benchmarks/quality/noise.py --family gpt --tiny                   seconds, on a CPU too

At some steps the gradient of each up and down projection is taken once from all of the output gradient dy, and several
times from dy pruned to 2:4 without bias. What is printed and saved is the mean squared difference, as a share of the
sum over tokens of |dy_t|^2 |x_t|^2: the energy of the gradient of single tokens. A share of s adds as much noise as
training on 1 / (1 + s) of the tokens would, where those of a batch are independent. `of x`: with the input pruned
instead.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from arms import Arm
from families import Family
from run import parse, save
from torch import Tensor, nn
from training import Run, autocast

from sparse24.kernels import ops

DRAWS = 4


def captured(run: Run) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (x [tokens, in], dy [tokens, out])} of each feed-forward linear, of a batch that is not trained on."""
    found: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in run.model.named_modules():
        if name.endswith(("feed_forward.up", "feed_forward.down")):

            def keep(module: nn.Module, inputs: Any, y: Tensor, name: str = name) -> None:
                found[name] = [inputs[0].detach().flatten(0, -2)]
                y.register_hook(lambda dy: found[name].append(dy.detach().flatten(0, -2)))

            hooks.append(module.register_forward_hook(keep))
    with autocast(run.family.device):
        loss, _ = run.model(*run.family.batch(run.args.seed, run.args.steps))  # eager: the compiled graph has no hooks
    loss.backward()
    run.optimizer.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    return {name: (x, dy) for name, (x, dy) in found.items()}


def noise(x: Tensor, dy: Tensor) -> dict[str, float]:
    """Shares of the energy of single tokens: the whole gradient, and what pruning adds to it."""
    if x.is_cuda:
        x, dy = x.bfloat16(), dy.bfloat16()
    exact, tokens = dy.float().t() @ x.float(), (dy.float().square().sum(1) * x.float().square().sum(1)).sum()
    of = {"of dy": 0.0, "of x": 0.0}
    for i in range(DRAWS):
        seeds = torch.tensor([i], device=x.device)
        drawn = {
            "of dy": ops.wgrad(ops.pack_gradient(dy, seeds, 0), x, dy.shape[1]),
            "of x": ops.wgrad(ops.pack_gradient(x, seeds, 0), dy, x.shape[1]).t(),
        }
        for what, gradient in drawn.items():
            of[what] += float((gradient - exact).square().sum() / tokens) / DRAWS
    return {**of, "signal": float(exact.square().sum() / tokens)}


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--save", type=Path, required=True, help="file for the result")
    p.add_argument("--at", type=float, nargs="+", default=[0.1, 0.4, 0.8], help="when, as shares of the steps")
    own, rest = p.parse_known_args(argv)
    args = parse([*rest, "--arms", "dense"])
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family = Family(args.family, args.size, args.work, args.text_mb * 1_000_000, device)
    run = Run(family, args, Arm({"dense_after": 0, "refresh_every": args.refresh_every, "inner": args.inner}))
    rows: list[dict[str, Any]] = []
    print(f"{'step':>6} {'layer':32} {'of dy':>7} {'of x':>7} {'signal':>7}")
    for at in sorted(round(share * args.steps) for share in own.at):
        while run.record.step < at:
            run.step()
        for name, (x, dy) in sorted(captured(run).items()):
            rows.append({"step": at, "layer": name, **noise(x, dy)})
            print(f"{at:6d} {name:32} " + " ".join(f"{rows[-1][what]:7.3f}" for what in ("of dy", "of x", "signal")))
    settings = {"family": args.family, "scale": args.scale, "lr": args.lr, "steps": args.steps, "seed": args.seed}
    save(own.save, {"settings": settings, "data": family.facts, "rows": rows})


if __name__ == "__main__":
    main()
