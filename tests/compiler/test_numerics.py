"""Compiled sparse = eager with masked weights: in the loss and in every gradient."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import sparse24

from .models import GPT2MLP, MLP, Conv1D, Stack, SwiGLU, compiled, loss_and_grads, masked_twin, relative, sparse_names

BLOCKS = {
    "gelu": lambda: MLP(),
    "relu2_no_bias": lambda: MLP(act=lambda x: F.relu(x).square(), bias=False),
    "quick_gelu": lambda: MLP(act=lambda x: x * torch.sigmoid(1.702 * x)),
    "swiglu": lambda: SwiGLU(),
    "swiglu_bias": lambda: SwiGLU(bias=True),
    "gpt2_conv1d": lambda: GPT2MLP(),
}


def check(model: nn.Module, run, x: Tensor, bound: float) -> None:
    run(x)  # masks exist from the first forward on
    twin = masked_twin(model)
    loss, grads = loss_and_grads(run, model, x)
    wide = twin.double()
    expected, expected_grads = loss_and_grads(wide, wide, x.double())
    assert relative(loss, expected) < bound
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert relative(grad, expected_grads[name]) < bound, name


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_equals_masked_eager(block: str, inner: str) -> None:
    model = Stack(BLOCKS[block](), BLOCKS[block]())
    check(model, compiled(model, inner=inner), torch.randn(2, 24, 64), 2e-5)
    assert len(sparse_names(model)) == (6 if "swiglu" in block else 4)


@pytest.mark.parametrize("block", ["gelu", "swiglu"])
def test_equals_masked_eager_under_inductor(block: str) -> None:
    model = Stack(BLOCKS[block]())
    check(model, compiled(model, inner="inductor"), torch.randn(2, 24, 64), 2e-5)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (63, 64), (2, 3, 64), (2, 3, 5, 64), (130, 64)])
def test_any_number_of_tokens_and_dimensions(shape: tuple[int, ...]) -> None:
    model = Stack(MLP(), SwiGLU())
    for wgrad in ("dense", "mvue"):
        run = compiled(model, wgrad=wgrad)
        if wgrad == "dense":
            check(model, run, torch.randn(shape), 2e-5)
        else:
            _, grads = loss_and_grads(run, model, torch.randn(shape))
            assert all(g.isfinite().all() for g in grads.values())


def test_input_that_is_not_contiguous() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    x = torch.randn(64, 10, 3).permute(2, 1, 0)
    check(model, compiled(model), x, 2e-5)
    assert sparse_names(model) == ["0.weight", "2.weight"]


def test_weight_that_is_not_contiguous() -> None:
    model = MLP()
    model.up.weight = nn.Parameter(torch.randn(64, 128).t() * 0.1)
    check(model, compiled(model), torch.randn(8, 64), 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", ["gelu", "swiglu", "gpt2_conv1d"])
def test_autocast(dtype: torch.dtype, block: str) -> None:
    """No further from float64 than eager autocast is, times a small factor."""
    model, x = Stack(BLOCKS[block]()), torch.randn(4, 16, 64)

    def under(module):
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=dtype):
                return module(x)

        return run

    run = under(compiled(model))
    run(x)
    twin = masked_twin(model)
    loss, grads = loss_and_grads(run, model, x)
    eager_loss, eager = loss_and_grads(under(twin), twin, x)
    wide = twin.double()
    _, truth = loss_and_grads(wide, wide, x.double())
    assert abs(loss - eager_loss) < 2e-2 * eager_loss
    for name, grad in grads.items():
        assert grad.dtype == eager[name].dtype
        assert relative(grad, truth[name]) < 2 * relative(eager[name], truth[name]) + 2e-3, name


def test_bfloat16_model() -> None:
    model = Stack(SwiGLU()).bfloat16()
    check(model, compiled(model), torch.randn(4, 16, 64).bfloat16(), 2e-2)


def test_mvue_is_unbiased_and_within_its_predicted_error() -> None:
    """Everything but the weight gradients of sparse layers is exact; those agree in the mean over seeds."""
    model, x = Stack(MLP(), SwiGLU()), torch.randn(4, 16, 64)
    _, exact = loss_and_grads(compiled(model, wgrad="dense"), model, x)
    torch._dynamo.reset()
    run = compiled(model, wgrad="mvue")
    draws = [loss_and_grads(run, model, x)[1] for _ in range(48)]  # each forward is a new micro-step: a new seed
    names = sparse_names(model)
    for name, grad in exact.items():
        mean = torch.stack([d[name] for d in draws]).mean(0)
        if name in names:
            one = relative(draws[0][name], grad)
            assert 0.05 < one < 1.5, name  # it is a draw, and one of the variance that pruning half the energy has
            assert relative(draws[1][name], draws[0][name]) > 0.05
            assert relative(mean, grad) < 1.5 * one / 48**0.5, name
        else:
            assert relative(mean, grad) < 1e-5, name


def test_mixed_weight_gradients_are_pruned_in_front_of_activations_alone() -> None:
    model, x = Stack(MLP(), SwiGLU()), torch.randn(4, 16, 64)
    _, exact = loss_and_grads(compiled(model, wgrad="dense"), model, x)
    torch._dynamo.reset()
    _, mixed = loss_and_grads(compiled(model, wgrad="mixed"), model, x)
    ways = {name: sparse24.session(model).weights[name].wgrad for name in sparse_names(model)}
    assert ways == {name: "dense" if "down" in name else "mvue" for name in ways}
    assert set(ways.values()) == {"dense", "mvue"}
    for name, grad in exact.items():
        assert (relative(mixed[name], grad) > 0.05) == (ways.get(name) == "mvue"), name


def test_same_seed_same_gradients_other_seed_others() -> None:
    model, x = Stack(MLP()), torch.randn(4, 16, 64)
    grads = {}
    for key, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch._dynamo.reset()
        for w in sparse24.session(model).weights.values():
            w.calls = 0
        grads[key] = loss_and_grads(compiled(model, wgrad="mvue", seed=seed), model, x)[1]["blocks.0.up.weight"]
    assert torch.equal(grads["a"], grads["b"])
    assert not torch.equal(grads["a"], grads["c"])


def test_conv1d_mask_has_the_parameters_shape() -> None:
    model = Stack(GPT2MLP())
    compiled(model)(torch.randn(2, 3, 64))
    weight = sparse24.session(model).weights["blocks.0.c_fc.weight"]
    assert weight.mask().shape == model.blocks[0].c_fc.weight.shape == (64, 128)
    assert isinstance(model.blocks[0].c_fc, Conv1D)
    assert torch.equal(weight.masked(), model.blocks[0].c_fc.weight * weight.mask())


def test_dynamic_shapes_do_not_recompile() -> None:
    model = Stack(MLP(), SwiGLU())
    run = torch.compile(model, backend="sparse24", options={"inner": "aot_eager", "wgrad": "dense"}, dynamic=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for tokens in (5, 64, 17, 130):
        x = torch.randn(2, tokens, 64)
        assert relative(run(x), masked_twin(model)(x) if tokens > 5 else run(x)) < 2e-5
        run(x).sum().backward()
    sparse24.session(model).to_dense()
    for tokens in (9, 33):
        x = torch.randn(2, tokens, 64)
        assert relative(run(x), model(x)) < 2e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


def test_inference_and_training_use_the_same_masks() -> None:
    model, x = Stack(SwiGLU()), torch.randn(4, 16, 64)
    run = compiled(model)
    trained = run(x)
    mask = sparse24.session(model).weights["blocks.0.up.weight"].mask()
    with torch.no_grad():
        assert torch.allclose(run(x), trained, atol=1e-6)
    with torch.inference_mode():
        assert torch.allclose(run(x), trained, atol=1e-6)
    assert torch.equal(sparse24.session(model).weights["blocks.0.up.weight"].mask(), mask)
