"""What the code blocks of the pages take for granted: a small model, its data, an optimizer.

`from stand_ins import *` is a setup comment of theirs; the blocks run in a folder with this file.
"""

import torch
import torch.nn.functional as F  # noqa: F401  the blocks' name for it
from my_models import GPT
from torch import nn  # noqa: F401  the same

import sparse24  # noqa: F401  the same

torch.manual_seed(0)
model = GPT(width=128, depth=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
tokens = torch.randint(256, (2, 32))
steps = 6
batches = [torch.randint(256, (2, 32)) for _ in range(steps)]


def train(count: int) -> None:
    """Some steps of `model`, compiled with options that change masks soon."""
    compiled = torch.compile(model, backend="sparse24", options={"refresh_every": 1, "inner": "eager"})
    for _ in range(count):
        compiled(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
