"""Every export computes the held-out loss of the model it came from. On a GPU: tests/gpu/test_export.py."""

import functools
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_model
from torch import Tensor, nn

import sparse24

from ..exporting import GPT, OPTIONS, held_out, held_out_ids, trained

ROUNDING = 1e-5  # of the loss, fp32


@functools.cache
def model() -> GPT:
    return trained()


@functools.cache
def before() -> float:
    """The loss as the sparse training evaluates it."""
    run = torch.compile(model(), backend="sparse24", options=OPTIONS, fullgraph=True)
    return held_out(run)


def pruned(folder: Path) -> Callable[[Tensor], Tensor]:
    return sparse24.prune(model())


def safetensors(folder: Path) -> Callable[[Tensor], Tensor]:
    sparse24.save_safetensors(model(), folder / "m.safetensors")
    fresh = GPT(64)
    load_model(fresh, folder / "m.safetensors")
    return fresh


def onnx(folder: Path, source: nn.Module | None = None) -> Callable[[Tensor], Tensor]:
    sparse24.export_onnx(source or model(), (held_out_ids(),), folder / "m.onnx")
    run = onnxruntime.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"])
    return lambda ids: torch.from_numpy(run.run(None, {run.get_inputs()[0].name: ids.numpy()})[0])


def sparse_inference(folder: Path) -> Callable[[Tensor], Tensor]:
    plain = sparse24.prune(model())
    compiled = torch.compile(plain, backend="sparse24", fullgraph=True)

    def run(ids: Tensor) -> Tensor:
        y: Tensor = compiled(ids)
        found = sparse24.session(plain).weights
        assert sum(w.reason_skipped is None for w in found.values()) == 6, "it ran dense"
        return y

    return run


def onnx_of_what_ran(folder: Path) -> Callable[[Tensor], Tensor]:
    """Of a pruned model that ran sparse before, one of whose layers stays dense."""
    plain = sparse24.prune(model())
    options = {"inner": "eager", "skip": ["blocks.0.up.*"]}
    with torch.no_grad():
        torch.compile(plain, backend="sparse24", options=options)(held_out_ids())
    return onnx(folder, plain)


@pytest.mark.parametrize("target", [pruned, safetensors, onnx, sparse_inference, onnx_of_what_ran])
def test_the_held_out_loss_is_that_of_the_sparse_model(tmp_path, target):
    torch._dynamo.reset()
    after = held_out(target(tmp_path))
    assert after == pytest.approx(before(), rel=ROUNDING)


def test_the_metric_tells_pruned_from_dense_and_trained_from_untrained():
    assert abs(held_out(model()) - before()) > 100 * ROUNDING * before(), "masks do not show in it"
    torch.manual_seed(0)
    assert held_out(GPT(64)) > 1.5 * before(), "nothing was learned"
