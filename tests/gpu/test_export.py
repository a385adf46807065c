"""Pruned models on a GPU: the sparse kernels, torch's semi-structured tensors and TensorRT keep the held-out loss."""

import copy
import functools
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparse24
from sparse24.compiler import inference
from sparse24.kernels import choice

from ..compiler.models import GPT2MLP, MLP, Stack, SwiGLU, relative
from ..compiler.test_inference import two_of_four
from ..exporting import GPT, held_out, held_out_ids, trained

pytestmark = pytest.mark.gpu
D = 256
ROUNDING = 1e-3  # of the loss: several times what casting the model to bf16 or fp16 changes
DTYPES = [torch.bfloat16, torch.float16]


@functools.cache
def model() -> GPT:
    return trained(128)


def plain(dtype: torch.dtype) -> nn.Module:
    return sparse24.prune(model()).to("cuda", dtype).eval()


def sparse_inference(folder: Path, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    pruned = plain(dtype)
    compiled = torch.compile(pruned, backend="sparse24", options={"when": "always"}, fullgraph=True)

    def run(ids: Tensor) -> Tensor:
        y: Tensor = compiled(ids)
        assert sum(w.reason_skipped is None for w in sparse24.session(pruned).weights.values()) == 6, "it ran dense"
        return y

    return run


def semi_structured(folder: Path, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return sparse24.to_semi_structured(plain(dtype))


def semi_structured_compiled(folder: Path, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return torch.compile(sparse24.to_semi_structured(plain(dtype)))


def tensorrt(folder: Path, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    try:
        import torch_tensorrt
    except Exception as error:  # it raises whatever it met where TensorRT is missing
        pytest.skip(f"torch-tensorrt does not load (pip install 'sparse24[tensorrt]'): NO engine was built ({error})")
    sparse24.export_tensorrt(plain(dtype), (held_out_ids("cuda"),), folder / "m.pt2")
    return torch_tensorrt.load(str(folder / "m.pt2")).module()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", [sparse_inference, semi_structured, semi_structured_compiled, tensorrt])
def test_the_held_out_loss_is_that_of_the_pruned_model(tmp_path, target, dtype):
    before = held_out(plain(torch.float32), "cuda")
    after = held_out(target(tmp_path, dtype), "cuda")
    assert after == pytest.approx(before, rel=ROUNDING)
    assert abs(held_out(model()) - before) > 3 * ROUNDING * before, "masks do not show in the loss"


def test_trtexec_builds_an_engine_from_the_onnx_file(tmp_path):
    sparse24.export_onnx(plain(torch.float16).cpu(), (held_out_ids(),), tmp_path / "m.onnx")
    try:
        subprocess.run(["trtexec", "--help"], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no trtexec on the PATH (it comes with TensorRT): NO engine was built from the ONNX file")
    done = subprocess.run(sparse24.trtexec(tmp_path / "m.onnx"), shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert (tmp_path / "m.plan").stat().st_size > 0


def pruned(*blocks: nn.Module, dtype: torch.dtype) -> nn.Module:
    """2:4 along in_features alone."""
    model = Stack(*blocks, d=D).to("cuda", dtype).requires_grad_(False)
    for name, param in model.named_parameters():
        if param.dim() == 2 and "head" not in name:
            param.copy_(two_of_four(param, 0 if "c_" in name else 1))
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_masks_along_in_features_alone_are_multiplied_right(inner, dtype):
    model = pruned(MLP(D, 1024), SwiGLU(D, 704), GPT2MLP(D, 1024), dtype=dtype)
    x = torch.randn(4, 77, D, device="cuda", dtype=dtype)
    run = torch.compile(model, backend="sparse24", options={"inner": inner, "when": "always"}, fullgraph=True)
    truth = copy.deepcopy(model).double()(x.double())
    assert relative(run(x), truth) < 2 * relative(model(x), truth) + 2e-3
    assert sum(w.reason_skipped is None for w in sparse24.session(model).weights.values()) == 7
    memory = sparse24.session(model).memory()
    assert memory["packed"] == memory["masters"] * 9 // 16 and memory["packed_t"] == 0


def test_changed_weights_reach_a_cuda_graph():
    model, other = (pruned(MLP(D, 1024), SwiGLU(D, 704), dtype=torch.bfloat16) for _ in range(2))
    x = torch.randn(256, D, device="cuda").bfloat16()
    options = {"when": "always", "inductor": {"triton.cudagraphs": True}}
    run = torch.compile(model, backend="sparse24", options=options, fullgraph=True)
    for source in (copy.deepcopy(model), other):
        model.load_state_dict(source.state_dict())
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            y = run(x).clone()
        assert relative(y, source(x)) < 2e-2


def test_speed_decides_by_the_forward(monkeypatch):
    """The times that are compared are those of the chosen provider for the forward's own shape."""
    model, x = pruned(MLP(D, 1024), dtype=torch.bfloat16), torch.randn(512, D, device="cuda").bfloat16()
    real, asked = choice.choose, []
    monkeypatch.setattr(choice, "choose", lambda problem: asked.append(problem) or real(problem))
    torch.compile(model, backend="sparse24", options={"inner": "eager"}, fullgraph=True)(x)
    assert {(p.direction, p.rows, p.inner, p.outer) for p in asked} == {("spmm", 1024, D, 512), ("spmm", D, 1024, 512)}
    for name in ("blocks.0.up.weight", "blocks.0.down.weight"):
        weight = sparse24.session(model).weights[name]
        rows, inner = weight.param.shape
        found = next(real(p) for p in asked if (p.rows, p.inner) == (rows, inner))
        assert (weight.reason_skipped is None) == (found.ms < found.dense_ms)
        assert weight.reason_skipped != inference.NOT_TWO_FOUR


def test_semi_structured_weights_take_nine_sixteenths_and_conv1d_is_converted_too():
    model = pruned(MLP(D, 1024), GPT2MLP(D, 1024), dtype=torch.bfloat16)
    copied = sparse24.to_semi_structured(model)
    x = torch.randn(256, D, device="cuda").bfloat16()
    truth = copy.deepcopy(model).double()(x.double())
    assert relative(copied(x), truth) < 2 * relative(model(x), truth) + 2e-3
    kinds = {name: type(p).__name__ for name, p in copied.named_parameters() if p.dim() == 2 and "head" not in name}
    assert set(kinds.values()) == {"SparseSemiStructuredTensorCUSPARSELT"} and len(kinds) == 4
    packed = copied.blocks[0].up.weight.packed
    assert packed.nbytes == model.blocks[0].up.weight.nbytes * 9 // 16
    assert type(model.blocks[0].up.weight) is nn.Parameter
    with pytest.raises(ValueError, match="found blocks.0.up.weight in float32 on cuda"):
        sparse24.to_semi_structured(copy.deepcopy(model).float())
