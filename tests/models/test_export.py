"""Models of transformers, trained sparse, as pruned modules and as ONNX files run by onnxruntime."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import sparse24

from .families import BY_NAME, loss_of

# Beyond these, a difference is not rounding of the dtype: of the largest output, for onnxruntime against PyTorch.
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3}


def trained(name: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The family's model after three sparse steps, its training inputs, and those for the export: without labels."""
    torch._dynamo.reset()
    model, inputs = BY_NAME[name].build()
    options = {"inner": "eager", "wgrad": "dense"}
    run = torch.compile(model, backend="sparse24", options=options, fullgraph=BY_NAME[name].fullgraph)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        loss_of(run(**inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, inputs, {k: v for k, v in inputs.items() if k != "labels"}


def in_onnxruntime(path: Path, inputs: dict[str, Any]) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
    return torch.from_numpy(np.asarray(session.run(None, feeds)[0]))


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def metric(output: Tensor, labels: Tensor) -> float:
    """Cross-entropy of what a model put out."""
    return nn.functional.cross_entropy(output.float().flatten(0, -2), labels.flatten()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", ["GPT-2", "BERT", "Llama", "ViT"])
def test_onnxruntime_computes_what_pytorch_does_from_2_4_weights(tmp_path, name, dtype):
    model, training, inputs = trained(name)
    names = [n for n, w in sparse24.session(model).weights.items() if w.reason_skipped is None]
    assert names == BY_NAME[name].expected(model, BY_NAME[name].feed_forward(model)) != []
    plain = sparse24.prune(model).eval()
    exact = logits(plain, inputs)
    plain = plain.to(dtype)
    inputs_exact, inputs = (
        inputs,
        {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()},
    )
    path = tmp_path / "model.onnx"
    sparse24.export_onnx(plain, inputs, path)

    assert [o.version for o in onnx.load(path).opset_import if o.domain == ""] == [20]
    found = sparse24.verify(path)
    stored = {m.name.removesuffix(".T"): m for m in found.two_four.values()}
    assert set(names) <= set(stored)
    for n in names:
        assert stored[n].reduced and set(stored[n].reduced) <= set(stored[n].dims)
        assert stored[n].nonzero == pytest.approx(0.5, abs=1e-3)  # fp16 may round an entry to zero
    assert all(m.name.removesuffix(".T") in names for m in found.two_four.values() if m.nonzero > 0)

    output, torchs = in_onnxruntime(path, inputs), logits(plain, inputs)
    assert output.dtype == dtype
    assert (output - torchs).abs().max() <= ROUNDING[dtype] * torchs.abs().max()
    labels = training["labels"]
    before, after = metric(exact, labels), metric(output, labels)
    assert abs(after - before) <= ROUNDING[dtype] * before
    dense = logits(copy.deepcopy(model).eval(), inputs_exact)
    change = (dense - exact).abs().max() / exact.abs().max()
    assert change > 5 * ROUNDING[dtype], "the outputs would not tell pruned from dense weights"


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "Llama", "ViT"])
def test_the_sparse_kernels_compute_what_the_pruned_model_does(name):
    model, _, inputs = trained(name)
    names = [n for n, w in sparse24.session(model).weights.items() if w.reason_skipped is None]
    plain = sparse24.prune(model).eval()
    expected = logits(plain, inputs)
    torch._dynamo.reset()
    run = torch.compile(plain, backend="sparse24", options={"inner": "eager"}, fullgraph=True)
    found = logits(run, inputs)
    assert (found - expected).abs().max() <= ROUNDING[torch.float32] * expected.abs().max()
    weights = sparse24.session(plain).weights
    assert [n for n, w in weights.items() if w.reason_skipped is None] == names
    assert sparse24.session(plain).memory()["packed_t"] == 0


def test_a_dynamic_batch_and_length_run_at_other_sizes(tmp_path):
    model, _, inputs = trained("Llama")
    ids = inputs["input_ids"]
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    path = tmp_path / "model.onnx"
    shapes = {"input_ids": {0: batch, 1: length}, "use_cache": None}
    sparse24.export_onnx(model, inputs, path, dynamic_shapes=shapes)
    plain = sparse24.prune(model).eval()
    other = {"input_ids": ids.repeat(2, 2)[:3, :23], "use_cache": False}
    expected = logits(plain, other)
    torch.testing.assert_close(in_onnxruntime(path, other), expected, rtol=1e-4, atol=1e-5)


def test_a_pruned_model_survives_transformers_own_format(tmp_path):
    from transformers import GPT2LMHeadModel

    model, _, inputs = trained("GPT-2")
    plain = sparse24.prune(model).eval()
    plain.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), logits(plain, inputs))
    names = [n for n, w in sparse24.session(model).weights.items() if w.reason_skipped is None]
    assert set(names) == set(sparse24.verify(tmp_path / "model.safetensors").two_four)


def test_a_pruned_timm_model_and_its_file_load_into_a_new_one(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed: loading a pruned model into it is NOT tested")
    from safetensors.torch import load_file

    model, _, inputs = trained("ViT (timm)")
    plain = sparse24.prune(model).eval()
    sparse24.save_safetensors(model, tmp_path / "m.safetensors")
    assert type(plain) is type(model)
    fresh = BY_NAME["ViT (timm)"].make()[0].eval()
    fresh.load_state_dict(load_file(tmp_path / "m.safetensors"))
    with torch.no_grad():
        assert torch.equal(fresh(**inputs), plain(**inputs))
    timm.models.load_checkpoint(fresh, str(tmp_path / "m.safetensors"))  # timm's own way
    names = [n for n, w in sparse24.session(model).weights.items() if w.reason_skipped is None]
    assert set(names) == set(sparse24.verify(tmp_path / "m.safetensors").two_four)
