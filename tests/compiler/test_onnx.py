"""export_onnx and verify on ONNX files: refusals, external data, layouts."""

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import sparse24
from sparse24.compiler import onnx as exporter

from .models import MLP, Stack, compiled, sparse_names


def trained() -> Stack:
    model = Stack(MLP())
    compiled(model)(torch.randn(2, 4, 64)).sum().backward()
    return model


def test_a_trained_model_its_wrapper_and_a_pruned_copy_give_the_same_file(tmp_path):
    model, x = trained(), torch.randn(2, 4, 64)
    wrapper = compiled(model)
    for i, given in enumerate((model, wrapper, sparse24.prune(model))):
        sparse24.export_onnx(given, (x,), tmp_path / f"{i}.onnx")
    found = [sparse24.verify(tmp_path / f"{i}.onnx") for i in range(3)]
    assert found[0].matrices == found[1].matrices == found[2].matrices
    assert {name.removesuffix(".T") for name in found[0].two_four} == set(sparse_names(model))
    assert model.training


def test_large_weights_stand_in_a_second_file(tmp_path, monkeypatch):
    model, x = trained(), torch.randn(2, 4, 64)
    monkeypatch.setattr(exporter, "EXTERNAL_DATA", 1000)
    path = tmp_path / "m.onnx"
    sparse24.export_onnx(model, (x,), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert path.stat().st_size < (tmp_path / "m.onnx.data").stat().st_size
    found = sparse24.verify(path)
    assert {name.removesuffix(".T") for name in found.two_four} == set(sparse_names(model))
    run = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = run.run(None, {run.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), sparse24.prune(model).eval()(x), rtol=1e-5, atol=1e-5)


def test_nothing_sparse_is_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"before")
    with pytest.raises(sparse24.StateError, match="found no 2:4 weight"):
        sparse24.export_onnx(Stack(MLP()), (torch.randn(2, 4, 64),), path)
    model = trained()
    sparse24.session(model).to_dense()
    with pytest.raises(sparse24.StateError, match="in the dense phase"):
        sparse24.export_onnx(model, (torch.randn(2, 4, 64),), path)
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_bf16_weights_keep_name_and_zeros(tmp_path):
    model = trained()
    sparse24.export_onnx(sparse24.prune(model).bfloat16(), (torch.randn(2, 4, 64).bfloat16(),), tmp_path / "m.onnx")
    found = sparse24.verify(tmp_path / "m.onnx")
    assert {name.removesuffix(".T") for name in found.two_four} == set(sparse_names(model))
    kinds = {i.data_type for i in onnx.load(tmp_path / "m.onnx").graph.initializer if len(i.dims) == 2}
    assert kinds == {TensorProto.BFLOAT16}


def test_a_weight_that_the_file_does_not_keep_is_an_error(tmp_path, monkeypatch):
    def all_ones(graph, params):  # as an exporter would that rewrites the weights
        for value in graph.initializers.values():
            if len(value.shape) == 2:
                value.const_value = onnx_ir.tensor(np.ones(tuple(value.shape), np.float32))

    monkeypatch.setattr(exporter, "_name_transposed", all_ones)
    with pytest.raises(sparse24.StateError, match="in the ONNX file read back"):
        sparse24.export_onnx(trained(), (torch.randn(2, 4, 64),), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_verify_resolves_each_layout_to_the_axis_as_stored(tmp_path):
    along_1 = np.zeros((8, 8), np.float32)
    along_1[:, ::4] = 1
    along_1[:, 1::4] = 2  # two of four along axis 1, four of four along axis 0

    def const(name: str, value: np.ndarray) -> onnx.TensorProto:
        return numpy_helper.from_array(value, name)

    nodes = [
        helper.make_node("MatMul", ["x", "b"], ["y0"]),
        helper.make_node("Transpose", ["t"], ["t1"], perm=[1, 0]),
        helper.make_node("Cast", ["t1"], ["t2"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["y0", "t2"], ["y1"]),
        helper.make_node("Gemm", ["y1", "g"], ["y2"], transB=1),
        helper.make_node("Constant", [], ["c"], value=const("", along_1.T.copy())),
        helper.make_node("MatMul", ["y2", "c"], ["y3"]),
        helper.make_node("Add", ["y3", "unused_in_products"], ["y"]),
    ]
    values = [const(n, along_1.astype(np.float16) if n == "t" else along_1) for n in ("b", "t", "g")]
    values += [const("unused_in_products", along_1)]
    io = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [8, 8]) for n in ("x", "y")]
    model = helper.make_model(helper.make_graph(nodes, "layouts", io[:1], io[1:], values))
    path = tmp_path / "layouts.onnx"
    onnx.save(model, path)
    found = {m.name: (m.dims, m.reduced, m.two_four) for m in sparse24.verify(path).matrices}
    assert found == {
        "b": ((1,), (0,), False),  # zeros along the axis that no product reduces over
        "t": ((1,), (1,), True),
        "g": ((1,), (1,), True),
        "c": ((0,), (0,), True),
        "unused_in_products": ((1,), (), True),
    }
