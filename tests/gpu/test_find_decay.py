"""find_decay on a GPU: autocast, fused AdamW, masks searched by the kernels, virtual ones by the reference."""

import pytest
import torch
import torch.nn as nn

import sparse24

from ..compiler.models import Stack, SwiGLU

pytestmark = pytest.mark.gpu
D = 256


def test_the_search_ends_in_the_range_and_leaves_the_generators_alone(tmp_path) -> None:
    def make_model() -> nn.Module:
        return Stack(SwiGLU(D, 704), SwiGLU(D, 704), d=D).cuda()

    def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step_fn(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        x = torch.randn(512, D, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = model(x)
        (y.float() - x.roll(1, 1)[:, :10]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    before = torch.cuda.get_rng_state()
    options = {"refresh_every": 5, "inner": "eager", "when": "always"}
    found = sparse24.find_decay(
        make_model, make_optimizer, step_fn, steps=40, options=options, high=1.0, evidence=tmp_path / "e.json"
    )
    assert torch.equal(before, torch.cuda.get_rng_state())
    assert 0.6 <= found.evidence["trials"][-1]["mu"] <= 0.95
    assert len(found.evidence["dense"]["rates"]) == 8
