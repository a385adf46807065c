"""prune, save_safetensors and verify."""

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_file
from torch import Tensor, nn

import sparse24

from .models import GPT2MLP, MLP, Stack, SwiGLU, compiled, masked_twin, sparse_names, train


def two_four(w: Tensor, dim: int) -> bool:
    """At most two nonzero in every aligned group of four, said once more."""
    groups = w.movedim(dim, -1).reshape(-1, 4)
    return all(int(group.count_nonzero()) <= 2 for group in groups)


def trained(steps: int = 3, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Stack(MLP(), SwiGLU(), GPT2MLP()) if model is None else model
    wrapper = compiled(model, **options)
    train(wrapper, torch.optim.AdamW(model.parameters(), 1e-3), steps)
    return model, wrapper


def test_the_copy_holds_the_masked_weights_and_computes_what_the_sparse_model_does():
    model, wrapper = trained()
    names = sparse_names(model)
    assert len(names) == 7
    before = copy.deepcopy(model.state_dict())
    plain = sparse24.prune(model)
    for name, param in plain.named_parameters():
        source = before[name]
        if name in names:
            mask = sparse24.session(model).weights[name].mask()
            assert two_four(param, 0) and two_four(param, 1)
            assert torch.equal(param, torch.where(mask, source, 0))
            assert param.count_nonzero() == source.numel() // 2
        else:
            assert torch.equal(param, source)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the original changed"
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), masked_twin(model)(x), rtol=0, atol=0)
        torch.testing.assert_close(plain(x), wrapper(x), rtol=1e-4, atol=1e-5)


def test_the_copy_carries_no_trace_of_the_backend():
    model, wrapper = trained()
    plain = sparse24.prune(wrapper)
    assert type(plain) is Stack and list(plain.state_dict()) == list(model.state_dict())
    assert sparse24.session(plain).weights == {}
    assert all(type(p) is nn.Parameter and p.requires_grad for p in plain.parameters())
    assert {k for m in plain.modules() for k in m.__dict__} == {k for m in model.modules() for k in m.__dict__}
    optimizer = torch.optim.SGD(plain.parameters(), 1e-3)
    plain(torch.randn(2, 5, 64)).sum().backward()
    optimizer.step()  # and none of our hooks finds it


@pytest.mark.parametrize("how", ["wrapper", "module.compile", "parts", "forward"])
def test_every_way_to_compile_gives_the_same_copy(how):
    reference = sparse24.prune(trained()[0]).state_dict()
    torch.manual_seed(0)
    model: Any = Stack(MLP(), SwiGLU(), GPT2MLP())
    params = list(model.parameters())
    options = {"inner": "eager", "wgrad": "dense"}
    run = model
    if how == "wrapper":
        run = torch.compile(model, backend="sparse24", options=options)
    elif how == "module.compile":
        model.compile(backend="sparse24", options=options)
    elif how == "parts":
        for i, block in enumerate(model.blocks):
            model.blocks[i] = torch.compile(block, backend="sparse24", options=options)
    else:
        model.forward = torch.compile(model.forward, backend="sparse24", options=options)
    train(run, torch.optim.AdamW(params, 1e-3), 3)
    plain = sparse24.prune(run)
    assert list(plain.state_dict()) == list(reference)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(value, reference[name], rtol=1e-5, atol=1e-6)
    assert plain._compiled_call_impl is None and "forward" not in plain.__dict__
    assert not any(hasattr(m, "_orig_mod") for m in plain.modules())
    with torch.no_grad():
        plain.head.weight.zero_(), plain.head.bias.zero_()
        assert plain(torch.randn(1, 3, 64)).abs().sum() == 0, "its forward is the original's"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp, self.head = nn.Embedding(128, 64), MLP(), nn.Linear(64, 128, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mlp(self.embed(ids)))


def test_tied_parameters_stay_tied_in_the_copy_and_through_the_file(tmp_path):
    model = Tied()
    compiled(model)(torch.arange(8)[None]).sum().backward()
    plain = sparse24.prune(model)
    assert plain.head.weight is plain.embed.weight and plain.head.weight is not model.head.weight
    sparse24.save_safetensors(model, tmp_path / "m.safetensors")
    fresh = Tied()
    load_model(fresh, tmp_path / "m.safetensors")
    assert fresh.head.weight is fresh.embed.weight
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in fresh.state_dict().items())


def test_a_dense_phase_is_refused_unless_the_last_masks_are_asked_for():
    model, wrapper = trained(steps=4, dense_after=2, refresh_every=1)
    with pytest.raises(sparse24.StateError, match=r'7 of 7 sparse layers in the dense phase.*masks="last"'):
        sparse24.prune(model)
    plain = sparse24.prune(model, masks="last")
    names = {name for name, p in plain.named_parameters() if p.dim() == 2 and two_four(p, 1) and two_four(p, 0)}
    assert names == set(sparse_names(model))


def test_what_has_no_mask_is_refused():
    model = Stack(MLP())
    with pytest.raises(sparse24.StateError, match="it never ran under torch.compile"):
        sparse24.prune(model)
    dense, _ = trained(dense_after=0)
    with pytest.raises(sparse24.StateError, match="has no mask yet"):
        sparse24.prune(dense, masks="last")
    again, _ = trained(steps=3, dense_after=2)
    sparse24.session(again).to_sparse()
    with pytest.raises(sparse24.StateError, match="has no mask yet.*run one forward"):
        sparse24.prune(again)
    odd = Stack(MLP(d=64, ff=100))
    compiled(odd)(torch.randn(1, 4, 64))
    with pytest.raises(sparse24.StateError, match="stays dense: .*100"):
        sparse24.prune(odd)
    with pytest.raises(ValueError, match="found masks='best'"):
        sparse24.prune(again, masks="best")
    with pytest.raises(TypeError, match="need an nn.Module"):
        sparse24.prune(lambda x: x)  # type: ignore[arg-type]


def test_a_checkpoint_loaded_before_the_first_step_brings_its_own_mask():
    model = Stack(MLP())
    run = compiled(model)
    run(torch.randn(1, 4, 64))
    torch.manual_seed(7)
    other = Stack(MLP())
    model.load_state_dict(other.state_dict())
    plain = sparse24.prune(model)
    run(torch.randn(1, 4, 64))  # searches anew
    for name in sparse_names(model):
        assert torch.equal(plain.state_dict()[name], sparse24.session(model).weights[name].masked())


@pytest.mark.parametrize("masks", ["current", "last"])
def test_the_file_lists_each_sparse_weight_with_the_dimension_it_reduces_over(tmp_path, masks):
    model, _ = trained(dense_after=None if masks == "current" else 2)
    path = tmp_path / "m.safetensors"
    sparse24.save_safetensors(model, path, masks)
    with safe_open(path, framework="pt") as file:
        entry = json.loads(file.metadata()["sparse24"])
        assert file.metadata()["format"] == "pt"
        for name, dims in entry["two_four"].items():
            assert dims == ([0] if "blocks.2" in name else [1])  # GPT-2's weights are [in, out]
            assert all(two_four(file.get_tensor(name), dim) for dim in dims)
    assert set(entry["two_four"]) == set(sparse_names(model))
    found = sparse24.verify(path)
    assert set(found.two_four) == set(sparse_names(model)) and found.broken == ()
    assert found["blocks.0.up.weight"].dims == (0, 1) and found["blocks.0.up.weight"].nonzero == 0.5
    assert "7 of 8 matrices are 2:4" in str(found)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_refused_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(sparse24.StateError):
        sparse24.save_safetensors(Stack(MLP()), path)
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_the_file_is_as_readable_as_any_other(tmp_path):
    model, _ = trained()
    sparse24.save_safetensors(model, tmp_path / "m.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "other"]


def test_verify_reads_the_numbers_and_not_the_claim(tmp_path):
    w = torch.zeros(8, 8)
    w[:, ::2] = 1.0  # two of four along 1; all of four along 0 in every other column
    broken = w.clone()
    broken[7, 1] = 1e-30
    path = tmp_path / "any.safetensors"
    claim = json.dumps({"format": 1, "two_four": {"w": [1], "broken": [1], "wrong": [0], "absent": [1]}})
    tensors = {"w": w, "wrong": w.half(), "broken": broken, "odd": torch.zeros(6, 6), "fp8": w.to(torch.float8_e4m3fn)}
    save_file({**tensors, "bias": torch.zeros(8)}, path, {"sparse24": claim})
    found = sparse24.verify(path)
    assert {m.name: m.dims for m in found.matrices} == {"w": (1,), "wrong": (1,), "broken": (), "odd": (), "fp8": (1,)}
    assert found.broken == ("broken", "wrong", "absent")
    assert set(found.two_four) == {"w", "fp8"}
    assert "broken: listed as 2:4, but it is not" in str(found)
    with pytest.raises(ValueError, match="need a .safetensors"):
        sparse24.verify(Path(__file__))
    with pytest.raises(FileNotFoundError):
        sparse24.verify(tmp_path / "none.safetensors")


def test_importing_sparse24_needs_torch_alone():
    code = """
        import sys
        sys.modules.update(dict.fromkeys(["safetensors", "onnx", "onnxscript", "onnxruntime", "transformers"]))
        import sparse24
        sparse24.prune, sparse24.verify, sparse24.save_safetensors
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
