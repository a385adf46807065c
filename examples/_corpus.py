"""The text that train_gpt.py learns: the source of Python's own standard library, which every machine has, as bytes."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256


@dataclass(frozen=True, slots=True)
class Corpus:
    """Two texts as uint8 [bytes], and the SHA-256 of both together: results are comparable where it is the same."""

    train: Tensor
    held_out: Tensor
    files: int
    sha256: str

    def batch(self, step: int, *, seed: int, batch: int, context: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [batch, context] each, from random places of the training text.

        A function of the seed and the step alone, so that a resumed run, and a second run to compare with, read the
        same batches without a generator's state being kept anywhere.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.train) - context, (batch,), generator=generator)
        return _windows(self.train, starts, context)

    def held_out_batches(self, count: int, *, batch: int, context: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` batches as above, from places spread evenly over the held-out text."""
        starts = torch.linspace(0, len(self.held_out) - context - 1, count * batch, dtype=torch.float64).long()
        for part in starts.split(batch):
            yield _windows(self.held_out, part, context)


def standard_library(device: torch.device) -> Corpus:
    """About 30 MB. A hash of its path puts one file in 20 into the held-out text."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(("site-packages/", "dist-packages/")):
            continue
        held_out = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 20 == 0
        parts[held_out].append(path.read_bytes())
    if not parts[True]:
        raise SystemExit(f"no Python source in {root}: this interpreter comes without its standard library's text")
    texts = [b"\n".join(parts[held_out]) for held_out in (False, True)]
    train, held_out_text = (torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device) for text in texts)
    return Corpus(train, held_out_text, sum(map(len, parts.values())), hashlib.sha256(b"".join(texts)).hexdigest())


def _windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    places = starts.to(text.device, non_blocking=True)[:, None] + torch.arange(context + 1, device=text.device)
    windows = text[places].long()
    return windows[:, :-1], windows[:, 1:]
