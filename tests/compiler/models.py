"""Small models, and the eager twin of a sparse one: the same model with its weights multiplied by their masks."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import sparse24


class MLP(nn.Module):
    """linear -> activation -> linear, with a residual and a norm."""

    def __init__(self, d: int = 64, ff: int = 128, act: Callable[[Tensor], Tensor] = F.gelu, bias: bool = True) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(d), act
        self.up, self.down = nn.Linear(d, ff, bias=bias), nn.Linear(ff, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class SwiGLU(nn.Module):
    def __init__(self, d: int = 64, ff: int = 128, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d)
        self.gate, self.up = nn.Linear(d, ff, bias=bias), nn.Linear(d, ff, bias=bias)
        self.down = nn.Linear(ff, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Conv1D(nn.Module):
    """GPT-2's way of storing a linear: weight [in, out], product by addmm on a flattened input."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d, out) * 0.1), nn.Parameter(torch.randn(out) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.shape[:-1], self.weight.shape[1])


class GPT2MLP(nn.Module):
    def __init__(self, d: int = 64, ff: int = 128) -> None:
        super().__init__()
        self.norm, self.c_fc, self.c_proj = nn.LayerNorm(d), Conv1D(d, ff), Conv1D(ff, d)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(self.norm(x))
        h = 0.5 * h * (1.0 + torch.tanh(0.7978845608 * (h + 0.044715 * h**3)))
        return x + self.c_proj(h)


class Stack(nn.Module):
    """Blocks and a head."""

    def __init__(self, *blocks: nn.Module, d: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(d, classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def compiled(model: nn.Module, fullgraph: bool = True, **options: Any) -> Any:
    options = {"inner": "eager", "wgrad": "dense", **options}
    return torch.compile(model, backend="sparse24", options=options, fullgraph=fullgraph)


def sparse_names(model: nn.Module) -> list[str]:
    return [name for name, w in sparse24.session(model).weights.items() if w.reason_skipped is None]


def masked_twin(model: nn.Module) -> nn.Module:
    """A copy whose sparse weights hold W.M: its gradients are the straight-through ones."""
    twin = copy.deepcopy(model)
    params = dict(twin.named_parameters())
    for name, weight in sparse24.session(model).weights.items():
        if weight.reason_skipped is None and weight.sparse:
            params[name].data.mul_(weight.mask())
    return twin


def loss_and_grads(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and the gradient of every parameter and of the input."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    loss = run(x).float().square().mean()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return loss.detach(), {**grads, "input": x.grad}


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def train(step: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> list[float]:
    """Some steps on random data; the losses."""
    data = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = step(torch.randn(4, 16, 64, generator=data)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
