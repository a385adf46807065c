"""A tiny GPT trained sparse on text, and its held-out loss: the metric that no export may change."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

CONTEXT, BATCH = 64, 8
#: Without decay the weights outside of the masks stay large: the loss tells pruned weights from dense ones.
OPTIONS = {"inner": "eager", "wgrad": "dense", "when": "always", "refresh_every": 10, "decay": 0.0}


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.n1, self.n2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.gate, self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        for layer in (self.gate, self.up, self.down):
            nn.init.normal_(layer.weight, std=2 * d**-0.5)  # a feed-forward layer that counts

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (h.view(b, t, 4, -1).transpose(1, 2) for h in self.qkv(self.n1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, d))
        h = self.n2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class GPT(nn.Module):
    """Bytes [batch, CONTEXT] -> logits [batch, CONTEXT, 256]."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, d), nn.Parameter(torch.randn(CONTEXT, d) * 0.1)
        self.blocks = nn.ModuleList(Block(d) for _ in range(2))
        self.norm, self.head = nn.RMSNorm(d), nn.Linear(d, 256)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def windows() -> Tensor:
    """A file of Python's standard library as int64 [windows, CONTEXT + 1]; the last BATCH are held out."""
    text = torch.frombuffer(bytearray(Path(textwrap.__file__).read_bytes()), dtype=torch.uint8).long()
    return text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)


def trained(d: int = 64, steps: int = 60, device: str = "cpu") -> GPT:
    """A GPT after sparse training on all but the held-out text."""
    torch.manual_seed(0)
    model, data = GPT(d).to(device), windows()[:-BATCH].to(device)
    run = torch.compile(model, backend="sparse24", options=OPTIONS, fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        at = torch.arange(step * BATCH, (step + 1) * BATCH, device=device) % len(data)
        loss = F.cross_entropy(run(data[at, :-1]).flatten(0, 1), data[at, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch._dynamo.reset()
    return model


def held_out_ids(device: str = "cpu") -> Tensor:
    return windows()[-BATCH:, :-1].to(device)


def held_out(run: Callable[[Tensor], Tensor], device: str = "cpu") -> float:
    """Cross-entropy on the held-out text, in nats a byte."""
    with torch.no_grad():
        logits = run(held_out_ids(device)).float().cpu()
    return F.cross_entropy(logits.flatten(0, 1), windows()[-BATCH:, 1:].flatten()).item()
