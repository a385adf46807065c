"""recipe="s-ste" on a GPU: its packed form on sparse tensor cores, against float64 and against the CPU's bytes."""

import copy

import pytest
import torch

import sparse24
from sparse24.kernels import layout, soft

from ..compiler.models import GPT2MLP, Stack, SwiGLU, loss_and_grads, relative, sparse_names
from ..compiler.test_soft import scales_of, soft_twin

pytestmark = pytest.mark.gpu
D = 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packs_the_bytes_that_the_cpu_packs(dtype: torch.dtype) -> None:
    w = torch.randn(128, 256)
    forms = {}
    for device in ("cpu", "cuda"):
        packed = torch.zeros(layout.numel(128, 256, dtype), dtype=dtype, device=device)
        dense = torch.zeros(128, 256, dtype=dtype, device=device)
        assert soft.pack_(w.to(device), 1.5, packed, dense, 0).item() == 0
        forms[device] = packed.cpu(), dense.cpu()
    if layout.arch(torch.device("cuda")) == "sm_90":
        assert torch.equal(forms["cpu"][0].view(torch.uint8), forms["cuda"][0].view(torch.uint8))
    assert torch.equal(forms["cpu"][1], forms["cuda"][1])


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("block", [lambda: SwiGLU(D, 704), lambda: GPT2MLP(D, 4 * D)], ids=["swiglu", "gpt2"])
def test_no_further_from_float64_than_dense_matmuls_are(block, inner: str) -> None:
    model = Stack(block(), block(), d=D).cuda()
    x = torch.randn(2, 256, D, device="cuda")
    options = {"recipe": "s-ste", "wgrad": "dense", "inner": inner}
    run = torch.compile(model, backend="sparse24", options=options, fullgraph=True)

    def under_autocast(module):
        def forward(x):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return module(x)

        return forward

    for _ in range(2):
        loss, grads = loss_and_grads(under_autocast(run), model, x)
        wide = soft_twin(model, scales_of(model))
        twin = copy.deepcopy(wide).float()
        eager_loss, eager = loss_and_grads(under_autocast(twin), twin, x)
        truth_loss, truth = loss_and_grads(wide, wide, x.double())
        assert len(sparse_names(model)) >= 4
        assert relative(loss, truth_loss) < 2 * relative(eager_loss, truth_loss) + 2e-3
        for name, grad in grads.items():
            assert relative(grad, truth[name]) < 2 * relative(eager[name], truth[name]) + 2e-3, name
        torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True).step()  # new numbers and patterns, in place


def test_trains_with_pruned_gradients_and_counts_flips() -> None:
    model, x = Stack(SwiGLU(D, 704), d=D).cuda(), torch.randn(512, D, device="cuda")
    options = {"recipe": "s-ste", "refresh_every": 2, "inner": "eager"}
    run, session = torch.compile(model, backend="sparse24", options=options), sparse24.session(model)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), []
    for _ in range(12):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = run(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and 0 < session.flip_rate() < 0.5
    for name in sparse_names(model):
        assert torch.equal(session.weights[name].mask().cpu(), soft.mask_of(session.weights[name].param.cpu()))


def test_virtual_flips_of_a_dense_run() -> None:
    model, x = Stack(SwiGLU(D, 704), d=D).cuda().bfloat16(), torch.randn(512, D, device="cuda").bfloat16()
    options = {"dense_after": 0, "virtual_flips": True, "refresh_every": 2, "inner": "eager", "when": "always"}
    run, session = torch.compile(model, backend="sparse24", options=options), sparse24.session(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(4):
        run(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert session.phase == "dense" and 0 < session.flip_rate() < 0.5
