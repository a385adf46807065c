"""The four model families, in plain PyTorch: GPT decoder, BERT masked LM, DeiT-like ViT classifier, encoder-decoder.

GELU feed-forward layers of four times the width, biases, learned positions, pre-norm. BERT too: post-norm, as it was
published, it long stayed where only words' frequencies are learnt, dense or sparse.
A model returns (mean loss in nats, share of hits or None); which of its weights are sparse is not its concern.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from corpora import IGNORE, Images, Text, Translation, masked
from torch import Tensor, nn

HEAD = 64


@dataclass(frozen=True, slots=True)
class Size:
    """depth: of each stack. context: tokens a sequence; of images: pixels a side. classes: or words.

    lr: of those tried the one at which dense ends best, at the small scale. tuned_at: the width at which it was found,
    where that is another one; the model and its optimizer are then scaled from there as muP has it (arXiv 2203.03466).
    """

    width: int
    depth: int
    context: int
    batch: int
    classes: int
    steps: int
    lr: float
    patch: int = 0
    tuned_at: int = 0

    @property
    def hidden_factor(self) -> float:
        """Of the learning rate of hidden matrices, of their variance at the start, and of the logits."""
        return self.tuned_at / self.width if self.tuned_at else 1.0


SIZES = {
    "gpt": {
        "tiny": Size(64, 1, 32, 8, 512, 60, 3e-3),
        "small": Size(384, 10, 256, 64, 8192, 2000, 2e-3),
        "base": Size(768, 12, 1024, 32, 50304, 4000, 1e-3),  # GPT-2 124M; 131M tokens
        "wide": Size(4096, 3, 1024, 16, 8192, 1200, 2e-3, tuned_at=384),  # Llama-3-8B's width; 20M tokens
    },
    "bert": {
        "tiny": Size(64, 1, 32, 16, 512, 60, 3e-3),
        "small": Size(384, 10, 128, 64, 8192, 4000, 1e-3),
        "base": Size(768, 12, 512, 64, 30592, 4000, 1e-3),  # BERT-base; 131M tokens
    },
    "vit": {
        "tiny": Size(64, 1, 16, 32, 4, 60, 3e-3, patch=4),
        "small": Size(384, 12, 32, 256, 100, 2000, 5e-4, patch=4),  # DeiT-S
        "base": Size(768, 12, 64, 256, 1000, 10000, 5e-4, patch=8),  # DeiT-B
    },
    "translation": {
        "tiny": Size(64, 1, 32, 16, 64, 60, 3e-3),
        "small": Size(384, 5, 64, 256, 8192, 3000, 5e-4),
        "base": Size(768, 6, 128, 128, 8192, 10000, 4e-4),
    },
}


SCALES = tuple(SIZES["gpt"])  # a family may lack some


def kind(family: str, scale: str, lr: float) -> str:
    """What the files of runs that compare are named by: another learning rate than the scale's is named too."""
    return f"{family}_{scale}" + (f"_lr{lr:g}" if lr != SIZES[family][scale].lr else "")


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, causal: bool) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.view(*t.shape[:2], self.heads, HEAD).transpose(1, 2)

        q, k, v = split(self.q(x)), split(self.k(memory)), split(self.v(memory))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class FeedForward(nn.Module):
    def __init__(self, width: int, ff: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, ff), nn.Linear(ff, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int, ff: int, causal: bool = False, cross: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.attention, self.feed_forward = Attention(width), FeedForward(width, ff)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if cross else 2))
        self.cross = Attention(width) if cross else None

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, self.causal)
        if self.cross is not None:
            x = x + self.cross(self.norms[2](x), memory, False)
        return x + self.feed_forward(self.norms[1](x))


def initialize(model: nn.Module, depth: int, hidden_factor: float = 1.0) -> None:
    """GPT-2's: normal of 0.02, at the ends of residual branches divided by sqrt(2 depth); biases zero."""
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.dim() > 1:
            std = 0.02 / math.sqrt(2 * depth) if name.endswith(("out.weight", "down.weight")) else 0.02
            nn.init.normal_(p, std=std * math.sqrt(hidden_factor) if name.startswith("blocks.") else std)


class LanguageModel(nn.Module):
    """GPT (causal, next token) or BERT (masked). tokens, targets int64 [batch, context]; the head is tied."""

    def __init__(self, size: Size, ff: int, causal: bool) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(size.classes, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size.width, ff, causal) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.classes, bias=False)
        self.head.weight, self.of_logits = self.embedding.weight, size.hidden_factor
        initialize(self, size.depth, size.hidden_factor)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        if self.of_logits != 1.0:
            logits = logits * self.of_logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE), None


class ViT(nn.Module):
    """images fp32 [batch, 3, side, side], labels int64 [batch]; a class token, as DeiT has."""

    def __init__(self, size: Size, ff: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, size.width, size.patch, size.patch)
        self.token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (size.context // size.patch) ** 2, size.width))
        self.blocks = nn.ModuleList(Block(size.width, ff) for _ in range(size.depth))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, size.classes)
        initialize(self, size.depth)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1).to(x.dtype), x), 1) + self.positions
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)[:, 0]).float()
        return F.cross_entropy(logits, labels), (logits.argmax(-1) == labels).float().mean()


class EncoderDecoder(nn.Module):
    """source, begun, targets int64 [batch, length]."""

    def __init__(self, size: Size, ff: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(size.classes, size.width), nn.Embedding(size.context, size.width)
        self.encoder = nn.ModuleList(Block(size.width, ff) for _ in range(size.depth))
        self.decoder = nn.ModuleList(Block(size.width, ff, causal=True, cross=True) for _ in range(size.depth))
        self.memory_norm, self.norm = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.classes, bias=False)
        self.head.weight = self.embedding.weight
        initialize(self, size.depth)

    def forward(self, source: Tensor, begun: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        positions = self.positions.weight[: source.shape[1]]
        memory = self.embedding(source) + positions
        for block in self.encoder:
            memory = block(memory)
        memory, x = self.memory_norm(memory), self.embedding(begun) + positions
        for block in self.decoder:
            x = block(x, memory)
        logits = self.head(self.norm(x)).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, (logits.argmax(-1) == targets).float().mean()


class Family:
    """A family at a size: its model, its data and its batches."""

    def __init__(self, name: str, size: Size, cache: Path, text_bytes: int, device: torch.device) -> None:
        self.name, self.size, self.device = name, size, device
        self.data: Any
        if name in ("gpt", "bert"):
            self.data = Text(cache, size.classes, text_bytes, device)
        elif name == "vit":
            self.data = Images(size.classes, size.context, device)
        else:
            self.data = Translation(size.classes, device)
        self.facts: dict[str, Any] = self.data.describe()

    def model(self, half: bool = False) -> nn.Module:
        """half: feed-forward layers of half the width, which have as many weights as 2:4 ones keep."""
        ff = self.size.width * (2 if half else 4)
        made: nn.Module
        if self.name in ("gpt", "bert"):
            made = LanguageModel(self.size, ff, causal=self.name == "gpt")
        else:
            made = ViT(self.size, ff) if self.name == "vit" else EncoderDecoder(self.size, ff)
        return made.to(self.device)

    def batch(self, seed: int, step: int) -> tuple[Tensor, ...]:
        size = self.size
        if self.name == "gpt":
            tokens = self.data.windows(seed, step, size.batch, size.context + 1)
            return tokens[:, :-1], tokens[:, 1:]
        if self.name == "bert":
            tokens = self.data.windows(seed, step, size.batch, size.context)
            return masked(tokens, seed, step, size.classes)
        if self.name == "vit":
            return self.data.batch(seed, step, size.batch)
        return self.data.batch(seed, step, size.batch, size.context)
