"""recipe="s-ste" through the backend: against the model that multiplies beta * soft24(W) in float64."""

import copy

import pytest
import torch
import torch.nn as nn

import sparse24
from sparse24.kernels import layout, soft

from .models import GPT2MLP, MLP, Stack, SwiGLU, compiled, loss_and_grads, masked_twin, relative, sparse_names, train


def soft_twin(model: nn.Module, scales: dict[str, float]) -> nn.Module:
    """The model in float64 whose sparse weights hold S(W): its gradients are the straight-through ones."""
    twin = copy.deepcopy(model).double()
    params = dict(twin.named_parameters())
    for name, scale in scales.items():
        across = name.endswith(("c_fc.weight", "c_proj.weight"))
        w = params[name].data
        groups = (w.t() if across else w).reshape(-1, 4)
        s = groups.sign() * (groups.abs() - groups.abs().sort(-1).values[:, 1:2]).clamp(min=0)
        s = scale * (s.view(w.shape[::-1]).t() if across else s.view(w.shape))
        params[name].data.copy_(s)
    return twin


def scales_of(model: nn.Module) -> dict[str, float]:
    weights = sparse24.session(model).weights
    return {n: w.scale for n, w in weights.items() if w.reason_skipped is None and w.scale is not None}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("block", [MLP, SwiGLU, GPT2MLP])
def test_loss_and_gradients_are_those_of_the_twin(block: type[nn.Module], inner: str) -> None:
    model, x = Stack(block(), block()), torch.randn(4, 16, 64)
    run = compiled(model, recipe="s-ste", inner=inner)
    for steps in range(2):  # at the start, and after an optimizer step with beta as it was
        loss, grads = loss_and_grads(run, model, x)
        scales = scales_of(model)
        assert len(scales) == len(sparse_names(model)) >= 4
        twin = soft_twin(model, scales)
        expected, expected_grads = loss_and_grads(twin, twin, x.double())
        assert relative(loss, expected) < 1e-5
        for name, grad in expected_grads.items():
            assert relative(grads[name], grad) < 1e-4, (steps, name)
        dense = copy.deepcopy(model)
        assert relative(loss, dense(x).square().mean()) > 1e-2  # the twin is not the dense model
        if not steps:
            assert all(1.0 < scale < 2.0 for scale in scales.values())
            torch.optim.AdamW(model.parameters(), lr=1e-1).step()
    assert scales_of(model) == scales


def test_mvue_is_unbiased() -> None:
    model, x = Stack(MLP()), torch.randn(256, 64)
    _, exact = loss_and_grads(compiled(model, recipe="s-ste"), model, x)
    torch._dynamo.reset()
    run = compiled(model, recipe="s-ste", wgrad="mvue")
    draws = [loss_and_grads(run, model, x)[1]["blocks.0.up.weight"].double() for _ in range(64)]
    one = relative(draws[0], exact["blocks.0.up.weight"])
    assert 0.05 < one < 1.5
    assert relative(torch.stack(draws).mean(0), exact["blocks.0.up.weight"]) < 1.5 * one / 8


def test_trains_and_counts_flips_at_the_interval() -> None:
    model = Stack(SwiGLU())
    run, session = compiled(model, recipe="s-ste", refresh_every=2, wgrad="mvue"), sparse24.session(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before: dict[str, torch.Tensor] = {}
    losses = []
    for step in range(1, 13):
        losses += train(run, optimizer, 1, seed=0)
        now = {n: w.mask() for n, w in session.weights.items() if w.reason_skipped is None}
        if step % 2 == 0 and before:
            flips = sum(int((now[n] ^ before[n]).sum()) for n in now)
            assert session.flip_rate() == pytest.approx(flips / sum(m.numel() for m in now.values())) and flips
        if step % 2 == 0:
            before = now
    assert losses[-1] < 0.5 * losses[0]


def test_a_resumed_run_goes_on_with_the_same_numbers() -> None:
    def start(seed: int) -> tuple[nn.Module, object, torch.optim.Optimizer]:
        torch._dynamo.reset()
        torch.manual_seed(seed)
        model = Stack(GPT2MLP(), SwiGLU())
        run = compiled(model, recipe="s-ste", wgrad="mvue", refresh_every=2)
        return model, run, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, run, optimizer = start(0)
    train(run, optimizer, 3)
    session = sparse24.session(model)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), session.state_dict()))
    expected, rate = train(run, optimizer, 3, seed=1), session.flip_rate()
    other, run, optimizer = start(1)
    other.load_state_dict(saved[0]), optimizer.load_state_dict(saved[1])
    sparse24.session(other).load_state_dict(saved[2])
    assert train(run, optimizer, 3, seed=1) == expected
    assert sparse24.session(other).flip_rate() == rate > 0


def test_a_loaded_checkpoint_is_followed_and_pruned_to_what_is_multiplied() -> None:
    model, x = Stack(SwiGLU(), GPT2MLP()), torch.randn(4, 64)
    run = compiled(model, recipe="s-ste")
    run(x)
    old = scales_of(model)
    model.load_state_dict(Stack(SwiGLU(), GPT2MLP()).state_dict())
    y = run(x)
    assert scales_of(model) != old
    plain = sparse24.prune(model)
    assert relative(plain(x), y) < 1e-6
    weights = sparse24.session(model).weights
    for name in sparse_names(model):
        held = plain.get_parameter(name)
        assert torch.equal(held, weights[name].masked())
        assert layout.mask_of(held.t() if "c_" in name else held) is not None
        assert relative(held, weights[name].param) < 1.0


def test_dense_phase_and_evaluation() -> None:
    model, x = Stack(MLP()), torch.randn(4, 64)
    run, session = compiled(model, recipe="s-ste", dense_after=1), sparse24.session(model)
    sparse = run(x)
    with torch.no_grad():
        assert relative(run(x), sparse) < 1e-6
    train(run, torch.optim.SGD(model.parameters(), lr=1e-2), 1)
    assert session.phase == "dense" and session.memory()["packed"] == 0
    assert relative(run(x), copy.deepcopy(model)(x)) < 1e-6
    session.to_sparse()
    twin = soft_twin(model, scales_of(model))
    assert relative(run(x), twin(x.double())) < 1e-5


@pytest.mark.parametrize("block", [SwiGLU, GPT2MLP])
def test_a_model_compiled_under_the_other_recipe_goes_on_under_the_new_one(block: type[nn.Module]) -> None:
    model, x = Stack(block()), torch.randn(4, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for recipe in ("fst", "s-ste", "fst"):
        torch._dynamo.reset()
        run = compiled(model, recipe=recipe, refresh_every=1)
        y = run(x)
        twin = masked_twin(model).double() if recipe == "fst" else soft_twin(model, scales_of(model))
        assert relative(y, twin(x.double())) < 1e-5, recipe
        assert bool(scales_of(model)) == (recipe == "s-ste")
        train(run, optimizer, 2)
        assert 0 < sparse24.session(model).flip_rate() < 0.5


def test_has_no_decay_and_no_costs_to_explain() -> None:
    assert sparse24.Recipe(recipe="s-ste").decay == 0
    with pytest.raises(sparse24.OptionError, match="no decay"):
        sparse24.Recipe(recipe="s-ste", decay=1e-3)
    with pytest.raises(sparse24.OptionError, match="'fst' or 's-ste'"):
        sparse24.Recipe(recipe="sste")
    with pytest.raises(sparse24.OptionError, match="explain"):
        sparse24.explain(Stack(MLP()), torch.randn(4, 64), options={"recipe": "s-ste", "inner": "eager"})


def test_nan_raises_and_names_the_weight() -> None:
    model = Stack(MLP())
    run = compiled(model, recipe="s-ste")
    run(torch.randn(2, 64)).square().mean().backward()
    model.blocks[0].down.weight.grad[3, 5] = float("nan")
    with pytest.raises(sparse24.NotFiniteError, match=r"blocks\.0\.down\.weight has 1 NaN"):
        torch.optim.SGD(model.parameters(), lr=1e-2).step()


def test_zero_weights_get_scale_one() -> None:
    model = Stack(MLP())
    nn.init.zeros_(model.blocks[0].down.weight)
    compiled(model, recipe="s-ste")(torch.randn(2, 64))
    assert scales_of(model)["blocks.0.down.weight"] == 1.0
    assert soft.best_scale(model.blocks[0].up.weight) == scales_of(model)["blocks.0.up.weight"]
