"""What the trainer examples share: their command line, and a little text to train on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

VOCABULARY, CONTEXT = 256, 64


class Bytes(Dataset[Tensor]):
    """Windows of this folder's source text: int64 [CONTEXT] each, one a byte."""

    def __init__(self) -> None:
        text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
        self.data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def __len__(self) -> int:
        return len(self.data) // CONTEXT

    def __getitem__(self, i: int) -> Tensor:
        return self.data[i * CONTEXT : (i + 1) * CONTEXT]


def parse(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder for checkpoints")
    p.add_argument("--steps", type=int, default=100, help="optimizer steps at which the run ends")
    p.add_argument("--save-every", type=int, default=50, help="steps between two checkpoints")
    p.add_argument("--batch", type=int, default=8, help="windows of text a step")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    p.add_argument(
        "--inner", default="aot_eager", choices=["inductor", "aot_eager", "eager"], help="the compiler behind"
    )
    return p.parse_args(argv)


def recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The options of torch.compile(..., backend="sparse24", options=...)."""
    return {"refresh_every": 2, "inner": args.inner}
