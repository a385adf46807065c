"""A plain training loop with 2:4 sparse feed-forward layers.

python examples/plain_loop.py --out runs/plain [--resume]
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

import sparse24
from _tiny import CONTEXT, VOCABULARY, Bytes, parse, recipe
from blocks import NanoGPT


def main(argv: Sequence[str] | None = None) -> float:
    """Trains, and returns the last loss."""
    args = parse(__doc__, argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = NanoGPT(vocab=VOCABULARY, width=64, depth=2, heads=4, ff=128, context=CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    compiled = torch.compile(model, backend="sparse24", options=recipe(args))
    session = sparse24.session(model)
    data, step, checkpoint = Bytes(), 0, args.out / "checkpoint.pt"
    if args.resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        session.load_state_dict(state["session"])
        step = state["step"]
    loss = torch.zeros(())
    while step < args.steps:
        picks = torch.randint(len(data), (args.batch,), generator=torch.Generator().manual_seed(step))
        loss, _ = compiled(torch.stack([data[int(i)] for i in picks]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % args.save_every == 0:
            print({"step": step, "loss": loss.item(), "flip_rate": session.flip_rate()})
            parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "session": session}
            state = {"step": step, **{name: part.state_dict() for name, part in parts.items()}}
            torch.save(state, checkpoint.with_suffix(".tmp"))  # renamed when whole: a killed run keeps the last one
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    return loss.item()


if __name__ == "__main__":
    main()
