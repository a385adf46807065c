"""Two decoders as people write them, for 2:4 sparse training as they are: in the styles of nanoGPT and torchtitan.

    model = torch.compile(blocks.Titan(vocab=32000, width=2048, depth=16, heads=16, ff=8192), backend="sparse24")
    loss = model(tokens)[0]

Both take tokens, int64 [batch, context], and return (mean loss of the next token, logits [batch, context, vocab]).
Widths (width, ff) should be multiples of 64: layers of other widths stay dense.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


# nanoGPT: learned positions, LayerNorm, one packed qkv, GELU.


class NanoAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, context, width = x.size()
        q, k, v = self.qkv(x).split(width, dim=2)
        q, k, v = (t.view(batch, context, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).contiguous().view(batch, context, width))


class NanoMLP(nn.Module):
    def __init__(self, width: int, ff: int) -> None:
        super().__init__()
        self.fc, self.gelu, self.proj = nn.Linear(width, ff), nn.GELU(), nn.Linear(ff, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.gelu(self.fc(x)))


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int, ff: int) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(width), NanoAttention(width, heads)
        self.norm_2, self.mlp = nn.LayerNorm(width), NanoMLP(width, ff)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class NanoGPT(nn.Module):
    def __init__(self, *, vocab: int, width: int, depth: int, heads: int, ff: int, context: int = 1024) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(NanoBlock(width, heads, ff) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return next_token_loss(logits, tokens), logits


# torchtitan: rotary positions as complex numbers, RMSNorm, grouped queries, SwiGLU with w1, w2, w3.


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """x [batch, context, heads, head]; turns [context, head / 2], complex."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[: x.shape[1], None, :]).flatten(3).type_as(x)


class TitanAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, max(1, heads // 2), width // heads
        self.wq = nn.Linear(width, heads * self.head, bias=False)
        self.wk = nn.Linear(width, self.kv_heads * self.head, bias=False)
        self.wv = nn.Linear(width, self.kv_heads * self.head, bias=False)
        self.wo = nn.Linear(heads * self.head, width, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        batch, context, _ = x.shape
        q = rotate(self.wq(x).view(batch, context, self.heads, self.head), turns)
        k = rotate(self.wk(x).view(batch, context, self.kv_heads, self.head), turns)
        v = self.wv(x).view(batch, context, self.kv_heads, self.head)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(y.transpose(1, 2).reshape(batch, context, -1))


class TitanFeedForward(nn.Module):
    def __init__(self, width: int, ff: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, ff, bias=False), nn.Linear(width, ff, bias=False)
        self.w2 = nn.Linear(ff, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TitanBlock(nn.Module):
    def __init__(self, width: int, heads: int, ff: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(width), TitanAttention(width, heads)
        self.ffn_norm, self.feed_forward = nn.RMSNorm(width), TitanFeedForward(width, ff)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turns)
        return x + self.feed_forward(self.ffn_norm(x))


class Titan(nn.Module):
    turns: Tensor

    def __init__(self, *, vocab: int, width: int, depth: int, heads: int, ff: int, context: int = 4096) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab, width)
        self.layers = nn.ModuleDict({str(i): TitanBlock(width, heads, ff) for i in range(depth)})
        self.norm, self.output = nn.RMSNorm(width), nn.Linear(width, vocab, bias=False)
        head = width // heads
        angles = torch.outer(torch.arange(context).float(), 10000.0 ** (-torch.arange(0, head, 2) / head))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = layer(x, self.turns)
        logits = self.output(self.norm(x))
        return next_token_loss(logits, tokens), logits
