"""A training loop whose loss, flip rates, memory and masks TensorBoard shows.

python examples/with_tensorboard.py --out runs/tensorboard, then tensorboard --logdir runs/tensorboard

Other loggers take the same numbers: wandb.log({"loss": loss.item(), **session.metrics()}, step=step), and trackio.log
with the same arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.tensorboard import SummaryWriter

import sparse24
from _tiny import CONTEXT, VOCABULARY, Bytes, parse, recipe
from blocks import NanoGPT


def log(writer: SummaryWriter, session: sparse24.Session, loss: float, step: int) -> None:
    """The numbers of one step, and the mask of each sparse layer: white where a weight is kept."""
    writer.add_scalar("loss", loss, step)
    for name, value in session.metrics().items():
        writer.add_scalar(f"sparse24/{name}", value, step)
    for name, weight in session.weights.items():
        if weight.sparse:
            writer.add_image(f"mask/{name}", weight.mask()[:256, :256].float(), step, dataformats="HW")


def main(argv: Sequence[str] | None = None) -> float:
    """Trains, and returns the last loss."""
    args = parse(__doc__, argv)
    torch.manual_seed(0)
    model = NanoGPT(vocab=VOCABULARY, width=64, depth=2, heads=4, ff=128, context=CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    compiled = torch.compile(model, backend="sparse24", options=recipe(args))
    session, data, loss = sparse24.session(model), Bytes(), torch.zeros(())
    with SummaryWriter(str(args.out)) as writer:
        for step in range(1, args.steps + 1):
            picks = torch.randint(len(data), (args.batch,))
            loss, _ = compiled(torch.stack([data[int(i)] for i in picks]))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % args.save_every == 0:
                log(writer, session, loss.item(), step)
    return loss.item()


if __name__ == "__main__":
    main()
