"""Search lambda of the masked decay for the model of train_gpt.py, in the warm-up of its learning rate.

    python examples/find_decay.py                        then: python examples/train_gpt.py --decay WHAT_IT_SAYS
    python examples/find_decay.py --trial-steps 200      longer trials: less noise

A dense trial, then sparse ones from the same start. Kept for training is a decay whose masks flip 0.60 to 0.95 times as
often as those of the dense model would. The output folder receives decay.json, from which a search that was killed goes
on, and decay.svg. All settings of train_gpt.py are taken, and should be those of the run to come.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import sparse24
from _corpus import standard_library
from _settings import parse, recipe
from train_gpt import GPT, learning_rate


def settings(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--trial-steps", type=int, metavar="N", help="steps of a trial (default: the warm-up of the run)")
    p.add_argument("--low", type=float, default=1e-6, help="smallest decay to try (default: %(default)s)")
    p.add_argument("--high", type=float, default=1e-2, help="largest decay to try (default: %(default)s)")
    p.add_argument(
        "--feasible",
        type=float,
        nargs=2,
        default=(0.60, 0.95),
        metavar=("LOW", "HIGH"),
        help="range of the flip rate over that of the dense model (default: 0.60 0.95)",
    )
    p.add_argument("--average", type=int, default=3, metavar="N", help="last refreshes averaged (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("runs/find_decay"), metavar="FOLDER", help="output folder")
    return p.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> float:
    search, others = settings(argv)
    args = parse(others)
    search.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    corpus = standard_library(args.device)

    def make_model() -> nn.Module:
        return GPT(width=args.width, depth=args.depth, ff=args.ff, context=args.context).to(args.device)

    def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step_fn(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        batch = corpus.batch(step, seed=args.seed, batch=args.batch, context=args.context)
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.device.type == "cuda"):
            loss: Tensor = model(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    try:
        found = sparse24.find_decay(
            make_model,
            make_optimizer,
            step_fn,
            steps=search.trial_steps or max(args.warm_up, 3 * args.refresh_every),
            options=recipe(args),
            low=search.low,
            high=search.high,
            feasible=tuple(search.feasible),
            average=search.average,
            evidence=search.out / "decay.json",
            seed=args.seed,
        )
    except ValueError as error:  # what was measured until then is in decay.json
        raise SystemExit(str(error)) from error
    found.plot(search.out / "decay.svg")
    print(found)
    return found.decay


if __name__ == "__main__":
    main()
