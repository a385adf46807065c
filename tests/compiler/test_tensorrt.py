"""export_tensorrt up to the call of torch-tensorrt, and that call against torch-tensorrt's own source.

Building engines takes a GPU: tests/gpu/test_export.py.
"""

import ast
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparse24
from sparse24.compiler import tensorrt
from sparse24.compiler.verify import measure

from .models import MLP, Stack, compiled, sparse_names

SOURCE = importlib.util.find_spec("torch_tensorrt")  # found, not imported: that takes a GPU


class TorchTensorRTModule(nn.Module):
    """Stands for an engine."""


def trained() -> nn.Module:
    model = Stack(MLP())
    compiled(model)(torch.randn(2, 4, 64)).sum().backward()
    return model


def pretend(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    """What the module sees of torch; the rest of torch sees the truth."""
    cuda = types.SimpleNamespace(is_available=lambda: gpu)
    seen = types.SimpleNamespace(cuda=cuda, export=torch.export, __version__=torch.__version__)
    monkeypatch.setattr(tensorrt, "torch", seen)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A torch-tensorrt that keeps what it is called with and builds one empty engine; this CPU passes for a GPU."""
    calls: dict[str, Any] = {"engines": nn.Sequential(TorchTensorRTModule())}

    def compile(program: Any, **kwargs: Any) -> nn.Module:
        calls["program"], calls["compile"] = program, kwargs
        return calls["engines"]

    def save(module: nn.Module, path: str, **kwargs: Any) -> None:
        calls["save"] = kwargs
        Path(path).write_bytes(b"engines")
        if calls.get("fails"):
            raise OSError("no space")

    package: Any = types.ModuleType("torch_tensorrt")
    package.dynamo, package.save = types.SimpleNamespace(compile=compile), save
    monkeypatch.setitem(sys.modules, "torch_tensorrt", package)
    pretend(monkeypatch, True)
    monkeypatch.setattr(nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    return calls


def test_the_pruned_model_is_built_with_sparse_weights_for_the_inputs_given(tmp_path, recorded):
    model, x = trained(), torch.randn(2, 4, 64)
    plain = sparse24.prune(model).eval()
    for args in ((x,), {"x": x}):
        sparse24.export_tensorrt(model, args, tmp_path / "m.pt2")
        assert (tmp_path / "m.pt2").read_bytes() == b"engines" and len(list(tmp_path.iterdir())) == 1
        assert recorded["compile"]["sparse_weights"] is True
        program = recorded["program"]
        stored = dict(program.named_parameters())
        for name in sparse_names(model):
            assert measure(name, stored[name] != 0).dims == (0, 1)
        with torch.no_grad():
            call = program.module()
            y = call(**args) if isinstance(args, dict) else call(*args)
            torch.testing.assert_close(y, plain(x))
        given = [recorded[which][k] for which in ("compile", "save") for k in ("arg_inputs", "kwarg_inputs")]
        assert given == ([(), args] * 2 if isinstance(args, dict) else [args, {}] * 2)
    assert model.training


def test_a_failed_write_or_no_engine_leaves_the_old_file(tmp_path, recorded):
    path = tmp_path / "m.pt2"
    path.write_bytes(b"before")
    recorded["fails"] = True
    with pytest.raises(OSError, match="no space"):
        sparse24.export_tensorrt(trained(), (torch.randn(2, 4, 64),), path)
    recorded["engines"] = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="no part of this model that TensorRT takes"):
        sparse24.export_tensorrt(trained(), (torch.randn(2, 4, 64),), path)
    with pytest.raises(sparse24.StateError, match="found no 2:4 weight"):
        sparse24.export_tensorrt(Stack(MLP()), (torch.randn(2, 4, 64),), path)
    with pytest.raises(TypeError, match="found an input of type bool, need tensors"):
        sparse24.export_tensorrt(trained(), {"x": torch.randn(2, 4, 64), "flag": True}, path)
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_without_the_package_or_a_gpu_the_error_says_what_to_do(tmp_path, monkeypatch, recorded):
    pretend(monkeypatch, False)
    with pytest.raises(RuntimeError, match=r"found no CUDA GPU.*trtexec --onnx=model\.onnx .*--sparsity=enable"):
        sparse24.export_tensorrt(trained(), (torch.randn(2, 4, 64),), tmp_path / "m.pt2")
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(ImportError, match=r"pip install 'sparse24\[tensorrt\]'.*export_onnx"):
        sparse24.export_tensorrt(trained(), (torch.randn(2, 4, 64),), tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_for_an_onnx_file():
    assert sparse24.trtexec("a b/m.onnx") == ("trtexec '--onnx=a b/m.onnx' '--saveEngine=a b/m.plan' --sparsity=enable")
    assert sparse24.trtexec(Path("m.onnx"), "e.engine").split()[2] == "--saveEngine=e.engine"


def keywords(file: Path, function: str) -> set[str]:
    """The named parameters of a top-level function, read without importing it."""
    found = next(n for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == function)
    return {a.arg for a in (*found.args.args, *found.args.kwonlyargs)}


@pytest.mark.skipif(
    SOURCE is None,
    reason="torch-tensorrt is not installed: the settings passed to it are NOT checked against its source. Its Python "
    "can be read on any machine: pip install --no-deps --target FOLDER torch-tensorrt, then PYTHONPATH=FOLDER",
)
def test_every_keyword_is_one_of_torch_tensorrts(tmp_path, recorded):
    """`compile` and `save` take **kwargs and ignore what they do not know: a misspelt setting would go unnoticed."""
    assert SOURCE is not None and SOURCE.origin is not None
    package = Path(SOURCE.origin).parent
    sparse24.export_tensorrt(trained(), (torch.randn(2, 4, 64),), tmp_path / "m.pt2")
    assert set(recorded["compile"]) <= keywords(package / "dynamo" / "_compiler.py", "compile")
    assert set(recorded["save"]) <= keywords(package / "_compile.py", "save")
    interpreter = (package / "dynamo" / "conversion" / "_TRTInterpreter.py").read_text()
    assert "settings.sparse_weights" in interpreter and "trt.BuilderFlag.SPARSE_WEIGHTS" in interpreter
    runtime = (package / "dynamo" / "runtime" / "_TorchTensorRTModule.py").read_text()
    assert "class TorchTensorRTModule(torch.nn.Module)" in runtime
