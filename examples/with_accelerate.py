"""accelerate with 2:4 sparse feed-forward layers: the session is one more object that it saves and loads.

python examples/with_accelerate.py --out runs/accelerate [--resume]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import sparse24
from _tiny import CONTEXT, VOCABULARY, Bytes, parse, recipe
from blocks import NanoGPT


def main(argv: Sequence[str] | None = None) -> float:
    """Trains, and returns the last loss."""
    args = parse(__doc__, argv)
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    model = NanoGPT(vocab=VOCABULARY, width=64, depth=2, heads=4, ff=128, context=CONTEXT)
    model.compile(backend="sparse24", options=recipe(args))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Bytes(), batch_size=args.batch))
    session = sparse24.session(accelerator.unwrap_model(model))
    accelerator.register_for_checkpointing(session)
    loss, step = torch.zeros(()), 0
    if args.resume:
        folder = max(args.out.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
        accelerator.load_state(folder)
        step = int(folder.name.removeprefix("step_"))
    done = 0
    while done < args.steps:
        for batch in loader:
            with accelerator.accumulate(model):
                if done >= step:  # a resumed run goes past the data that it has seen
                    loss, _ = model(batch)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            done += 1
            if done > step and done % args.save_every == 0:
                accelerator.print({"step": done, "loss": loss.item(), **session.metrics(per_layer=False)})
                accelerator.save_state(args.out / f"step_{done}")
            if done >= args.steps:
                break
    return loss.item()


if __name__ == "__main__":
    main()
