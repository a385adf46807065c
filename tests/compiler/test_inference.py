"""Pruned models under torch.compile(backend="sparse24") without gradients: packed once, never trained."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse24
from sparse24.compiler import inference
from sparse24.compiler.session import contents
from sparse24.kernels import choice, layout

from .models import GPT2MLP, MLP, Stack, SwiGLU, compiled, relative, sparse_names, train


def two_of_four(w: Tensor, dim: int) -> Tensor:
    """The two largest of each group along `dim`: 2:4 along it and not along the other."""
    groups = w.movedim(dim, -1).unflatten(-1, (-1, 4))
    kept = groups.abs().argsort(-1).argsort(-1) >= 2
    return (groups * kept).flatten(-2).movedim(-1, dim)


def pruned(*blocks: nn.Module) -> nn.Module:
    """A model whose feed-forward weights are 2:4 along in_features alone, as other tools make them."""
    model = Stack(*(blocks or (MLP(), SwiGLU(), GPT2MLP())))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() == 2 and "head" not in name:
                param.copy_(two_of_four(param, 0 if "c_" in name else 1))
    return model


def operands(model: nn.Module) -> list[Any]:
    found = {id(o): o for w in sparse24.session(model).weights.values() for o in w.operands.values()}
    return list(found.values())


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_a_pruned_model_is_multiplied_as_it_is(how, inner, monkeypatch):
    model, x = pruned(), torch.randn(2, 5, 64)
    before, expected = copy.deepcopy(model.state_dict()), model(x).detach()
    calls = []
    monkeypatch.setattr(choice, "matmul", lambda p, *a, _run=choice.matmul: calls.append(p.rows) or _run(p, *a))
    run = compiled(model, inner=inner)
    if how == "frozen":
        model.requires_grad_(False)
        y = run(x)
    else:
        with torch.no_grad() if how == "no_grad" else torch.inference_mode():
            y = run(x)
    assert relative(y, expected) < 1e-5
    assert sorted(calls) == [64, 64, 64, 128, 128, 256]  # gate and up are one matmul
    assert len(sparse_names(model)) == 7
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    memory = sparse24.session(model).memory()
    assert memory["packed_t"] == 0
    assert memory["packed"] == memory["masters"] * 17 // 32  # fp32: half of the values, and one bit in 32 each
    for name in sparse_names(model):
        weight = sparse24.session(model).weights[name]
        assert torch.equal(weight.masked(), before[name]), name


def test_weights_of_attention_that_are_2_4_are_taken_too_and_others_stay_dense_with_the_reason():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
            self.mlp = MLP()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).view(2, 16, 4, 16).transpose(1, 2) for p in (self.q, self.k, self.v))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.mlp(x + self.o(y.transpose(1, 2).reshape(2, 16, 64)))

    model, x = Stack(Block(), classes=64), torch.randn(2, 16, 64)
    with torch.no_grad():
        for layer in (model.blocks[0].k, model.blocks[0].mlp.down, model.head):
            layer.weight.copy_(two_of_four(layer.weight, 1))
        expected = model(x)
        assert relative(compiled(model, layers="all")(x), expected) < 1e-5
        found = sparse24.session(model).weights
        assert sparse_names(model) == ["blocks.0.k.weight", "blocks.0.mlp.down.weight", "head.weight"]
        assert found["blocks.0.q.weight"].reason_skipped == inference.NOT_TWO_FOUR
        assert found["blocks.0.mlp.up.weight"].reason_skipped == inference.NOT_TWO_FOUR
        torch._dynamo.reset()
        other = copy.deepcopy(model)
        assert relative(compiled(other, skip=["*.k.*", "head.*"])(x), expected) < 1e-5
        assert sparse_names(other) == ["blocks.0.mlp.down.weight"]
        torch._dynamo.reset()
        with pytest.raises(sparse24.SkippedError, match="not 2:4 along in_features"):
            compiled(copy.deepcopy(model), strict=True)(x)


def test_changed_weights_are_packed_anew_in_the_same_memory_and_dense_while_not_2_4():
    model, x = pruned(), torch.randn(2, 5, 64)
    run = compiled(model)
    with torch.no_grad():
        run(x)
        places = [o.inputs[0].data_ptr() for o in operands(model)]
        torch.manual_seed(5)
        other = pruned()
        model.load_state_dict(other.state_dict())
        assert relative(run(x), other(x)) < 1e-5
        assert [o.inputs[0].data_ptr() for o in operands(model)] == places and len(places) == 6
        dense = Stack(MLP(), SwiGLU(), GPT2MLP())
        model.load_state_dict(dense.state_dict())
        assert relative(run(x), dense(x)) < 1e-5
        reasons = {w.reason_skipped for w in sparse24.session(model).weights.values() if "head" not in w.name}
        assert reasons == {inference.NOT_TWO_FOUR} and operands(model) == []
        model.load_state_dict(other.state_dict())
        assert relative(run(x), other(x)) < 1e-5
        assert len(sparse_names(model)) == 7


def test_a_model_loaded_in_inference_mode():
    with torch.inference_mode():
        model, x = pruned(), torch.randn(2, 5, 64)
        assert relative(compiled(model)(x), model(x)) < 1e-5
        assert len(sparse_names(model)) == 7


def test_one_graph_serves_all_blocks_and_each_has_its_own_packed_weights():
    model, x = pruned(MLP(), MLP(), MLP()), torch.randn(2, 5, 64)
    with torch.no_grad():
        model.blocks[2].down.weight.normal_()
        expected = model(x)
        for i, block in enumerate(model.blocks):
            model.blocks[i] = compiled(block)
        assert relative(model(x), expected) < 1e-5
        assert len(sparse_names(model)) == 5
        found = sparse24.session(model).weights
        assert found["blocks.2._orig_mod.down.weight"].reason_skipped == inference.NOT_TWO_FOUR


def test_speed_is_judged_by_the_forward_alone(monkeypatch):
    asked = []

    def choose(problem: Any) -> choice.Choice:
        asked.append((problem.direction, problem.rows, problem.inner, problem.outer))
        return choice.Choice("masked_dense", None, ms=1.0, dense_ms=2.0 if problem.rows == 256 else 0.5)

    model = pruned(SwiGLU())
    monkeypatch.setattr(choice, "choose", choose)
    with torch.no_grad():
        x = torch.randn(2, 5, 64)
        assert relative(compiled(model)(x), model(x)) < 1e-5
    assert set(asked) == {("spmm", 64, 128, 10), ("spmm", 256, 64, 10)}
    assert sparse_names(model) == ["blocks.0.gate.weight", "blocks.0.up.weight"]
    reason = sparse24.session(model).weights["blocks.0.down.weight"].reason_skipped
    assert reason == "dense is faster in the forward, 0.50 ms against 1.00 ms"


def test_a_forward_that_is_faster_dense_does_not_decide_for_training(monkeypatch):
    model, x = pruned(SwiGLU()), torch.randn(2, 5, 64)
    monkeypatch.setattr(choice, "choose", lambda problem: choice.Choice("masked_dense", None, ms=2.0, dense_ms=1.0))
    run = compiled(model)
    with torch.no_grad():
        run(x)
    assert sparse_names(model) == []
    train(run, torch.optim.AdamW(model.parameters(), 1e-2), 2)
    assert len(sparse_names(model)) == 3
    with torch.no_grad():
        y = run(x)
    assert relative(y, sparse24.prune(model)(x)) < 1e-5 and relative(y, model(x)) > 1e-3


def test_a_model_in_training_is_evaluated_with_its_masks_and_not_taken_for_pruned():
    model, x = Stack(MLP(), SwiGLU()), torch.randn(2, 5, 64)
    run = compiled(model)
    train(run, torch.optim.AdamW(model.parameters(), 1e-3), 3)
    with torch.no_grad():
        assert relative(run(x), sparse24.prune(model)(x)) < 1e-5
    assert not any(w.pruned for w in sparse24.session(model).weights.values())


@pytest.mark.parametrize("layers", ["ffn", "all"])
def test_a_pruned_model_that_is_evaluated_first_can_be_trained_on(layers):
    """As trainers do that validate before the first step. Afterwards its evaluation shows the masks in training."""
    model, x = Stack(MLP(), SwiGLU(), MLP()), torch.randn(2, 5, 64)
    with torch.no_grad():
        model.blocks[0].up.weight.copy_(two_of_four(model.blocks[0].up.weight, 1))
    run = compiled(model, layers=layers)
    with torch.no_grad():
        assert relative(run(x), model(x)) < 1e-5
    assert sparse_names(model) == ["blocks.0.up.weight"]
    assert contents(sparse24.session(model).state_dict())["weights"] == {}
    train(run, torch.optim.AdamW(model.parameters(), 1e-2), 3)
    assert len(sparse_names(model)) == 7
    assert not any(w.pruned for w in sparse24.session(model).weights.values())
    with torch.no_grad():
        y = run(x)
    assert relative(y, sparse24.prune(model)(x)) < 1e-5 and relative(y, model(x)) > 1e-3


def test_an_optimizer_does_not_decay_a_pruned_weight_nor_count_its_steps():
    model, x = pruned(MLP()), torch.randn(2, 5, 64)
    with torch.no_grad():
        compiled(model, decay=0.5)(x)
    name = "blocks.0.up.weight"
    weight, param = sparse24.session(model).weights[name], dict(model.named_parameters())[name]
    param.grad = torch.zeros_like(param)
    torch.optim.SGD([param], 0.1).step()
    assert not param.grad.any() and weight.step == 0


def test_zero_weights_do_not_make_a_model_pruned():
    """A zero initialization is 2:4 too; its model is evaluated before training as ever."""
    model, x = Stack(MLP()), torch.randn(2, 64)
    with torch.no_grad():
        model.blocks[0].down.weight.zero_()
        compiled(model)(x)
    assert not any(w.pruned for w in sparse24.session(model).weights.values())


def test_shapes_that_change_and_a_merge_of_trained_and_pruned_weights():
    model = pruned(SwiGLU())
    run = torch.compile(model, backend="sparse24", options={"inner": "aot_eager"}, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (5, 3, 8):
            x = torch.randn(2, tokens, 64)
            assert relative(run(x), model(x)) < 1e-5
        names = sparse_names(model)
    torch._dynamo.reset()
    trained = compiled(model, layers=["*.gate.*"])
    train(trained, torch.optim.SGD(model.parameters(), 1e-3), 1)
    model.blocks[0].up.weight.data.copy_(two_of_four(model.blocks[0].up.weight.data, 1))
    model.blocks[0].down.weight.data.copy_(two_of_four(model.blocks[0].down.weight.data, 1))
    with torch.no_grad():
        y = trained(x)
    found = sparse24.session(model).weights
    assert {n: found[n].pruned for n in names} == {n: "gate" not in n for n in names}
    twin = copy.deepcopy(model)
    twin.blocks[0].gate.weight.data.mul_(found["blocks.0.gate.weight"].mask())
    assert relative(y, twin(x)) < 1e-5


@pytest.mark.parametrize("rows", [64, 128])
def test_the_mask_of_a_matrix_keeps_two_of_each_group_and_all_that_is_not_zero(rows):
    w = two_of_four(torch.randn(rows, 64), 1)
    w[:, 1::4] = 0
    w[:8] = 0
    mask = layout.mask_of(w)
    assert mask is not None and bool((mask.view(rows, -1, 4).sum(-1) == 2).all())
    assert torch.equal(w * mask, w)
    packed = layout.pack(w, mask, "sm_90")
    assert torch.equal(layout.unpack(packed, rows, 64, "sm_90"), w)
    w[3, 4:7] = 1e-30
    assert layout.mask_of(w) is None
