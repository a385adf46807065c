"""Lightning with 2:4 sparse feed-forward layers: module.compile inside the LightningModule, and a callback.

python examples/with_lightning.py --out runs/lightning [--resume]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

import sparse24
from _tiny import CONTEXT, VOCABULARY, Bytes, parse, recipe
from blocks import Titan


class Sparse24Callback(lightning.Callback):
    """Logs the session's metrics, and keeps its state in the checkpoints."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        pl_module.log_dict({f"sparse24/{k}": v for k, v in sparse24.session(pl_module).metrics().items()})

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["sparse24"] = sparse24.session(pl_module).state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        sparse24.session(pl_module).load_state_dict(checkpoint["sparse24"])


class Model(lightning.LightningModule):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.net = Titan(vocab=VOCABULARY, width=128, depth=2, heads=4, ff=256, context=CONTEXT)
        self.net.compile(backend="sparse24", options=recipe(args))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss, _ = self.net(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(argv: Sequence[str] | None = None) -> float:
    """Trains, and returns the last loss."""
    args = parse(__doc__, argv)
    torch.manual_seed(0)
    checkpoints = ModelCheckpoint(dirpath=args.out, every_n_epochs=1, save_last=True)
    trainer = lightning.Trainer(
        max_epochs=args.steps // args.save_every,
        limit_train_batches=args.save_every,  # an epoch: within one a plain DataLoader could not be resumed
        callbacks=[Sparse24Callback(), checkpoints],
        gradient_clip_val=1.0,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(Bytes(), batch_size=args.batch)
    trainer.fit(Model(args), loader, ckpt_path=str(args.out / "last.ckpt") if args.resume else None)
    return trainer.callback_metrics["loss"].item()


if __name__ == "__main__":
    main()
