"""Experts whose linears are plain: each sees the tokens routed to it, and is sparse."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse24

EXPERTS, D, FF = 4, 64, 128


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in ((D, FF), (D, FF), (FF, D)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Mixture(nn.Module):
    """Each token goes to its best two experts, in the loop that older models of transformers had."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, EXPERTS), nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        shares, chosen = self.router(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == i)
            out = out.index_add(0, token, expert(flat[token]) * shares[token, slot, None])
        return x + out.view(x.shape)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_experts_of_plain_linears_are_sparse(inner: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(Mixture(), Mixture())
    with torch.no_grad():
        model[0].router.bias[3] = -100.0  # no token ever goes to this one
    options = {"inner": inner, "wgrad": "dense", "refresh_every": 2}
    run = torch.compile(model, backend="sparse24", options=options)
    data = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stats = torch._dynamo.utils.counters["stats"]
    graphs = []
    for step in range(10):  # other numbers of tokens each time
        x = torch.randn(2, 16, D, generator=data)
        optimizer.zero_grad()
        run(x).square().mean().backward()
        if step in (0, 9):
            twin = copy.deepcopy(model)
            for name, weight in sparse24.session(model).weights.items():
                if weight.reason_skipped is None:
                    twin.get_parameter(name).data.mul_(weight.mask())
            twin.zero_grad()
            twin(x).square().mean().backward()
            for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), name
                assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-6), name
        optimizer.step()
        graphs.append(stats["unique_graphs"])
    weights = sparse24.session(model).weights
    assert {n for n, w in weights.items() if w.reason_skipped is None} == {
        n for n, _ in model.named_parameters() if "experts" in n
    }
    assert graphs[-1] == graphs[5], "every number of tokens compiles anew"
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and "sparse24" in r.name]
