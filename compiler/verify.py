"""verify: which matrices of a file are 2:4, and along which dimension. It reads the numbers, whoever wrote them."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: The entry of a safetensors file's metadata that lists its 2:4 tensors.
METADATA_KEY = "sparse24"
#: Nodes between a stored tensor and a product that keep its zeros where they are, or swap its axes.
_FOLLOWED = ("Transpose", "Cast", "Identity")


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a file.

    shape: as stored. dims: the dimensions along which every aligned group of four has at most two entries that are not
    zero. nonzero: their share, in [0, 1]. reduced: the dimensions that products reduce over, as an ONNX graph shows or
    the safetensors metadata lists them; empty where the file does not tell.
    """

    name: str
    shape: tuple[int, int]
    dims: tuple[int, ...]
    nonzero: float
    reduced: tuple[int, ...] = ()

    @property
    def two_four(self) -> bool:
        """Whether it is 2:4 as a sparse GEMM needs it: along all of `reduced`, or, where that is unknown, along any."""
        return bool(self.dims) and set(self.reduced) <= set(self.dims)


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found. matrices: in the file's order. broken: names that the file lists as 2:4 and that are not,
    or that it does not hold as a matrix. str() is a table.
    """

    path: str
    matrices: tuple[Matrix, ...]
    broken: tuple[str, ...] = ()

    @property
    def two_four(self) -> dict[str, Matrix]:
        """The matrices that are 2:4, by name."""
        return {m.name: m for m in self.matrices if m.two_four}

    def __getitem__(self, name: str) -> Matrix:
        for matrix in self.matrices:
            if matrix.name == name:
                return matrix
        raise KeyError(name)

    def __str__(self) -> str:
        width = max((len(m.name) for m in self.matrices), default=0)
        lines = [f"{self.path}: {len(self.two_four)} of {len(self.matrices)} matrices are 2:4"]
        for m in self.matrices:
            along = ", ".join(map(str, m.dims)) or "-"
            reduced = ", ".join(map(str, m.reduced)) or "?"
            verdict = "2:4" if m.two_four else "dense"
            shape = f"{m.shape[0]} x {m.shape[1]}"
            lines.append(
                f"{m.name:{width}}  {shape:>15}  {verdict:5}  2:4 along {along:5} reduced {reduced:5} "
                f"nonzero {m.nonzero:.3f}"
            )
        lines += [f"{name}: listed as 2:4, but it is not" for name in self.broken]
        return "\n".join(lines)


def verify(path: str | os.PathLike[str]) -> Verification:
    """Which matrices of a .safetensors or .onnx file are 2:4, and along which dimension.

    A matrix is a tensor of two dimensions of any numeric dtype; tensors are read one after the other. In an ONNX model
    these are initializers and constants, with external data or without, and a MatMul or Gemm that reads one, through
    Transpose, Cast and Identity too, tells the dimension it is reduced over; dimensions are those of the tensor as
    stored. Raises FileNotFoundError, ValueError for another kind of file, and ImportError where safetensors or onnx is
    not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"sparse24: found no file {path}")
    if path.suffix == ".safetensors":
        return _verify_safetensors(path)
    if path.suffix == ".onnx":
        return _verify_onnx(path)
    raise ValueError(f"sparse24: found {path.name}, need a .safetensors or .onnx file")


def _verify_safetensors(path: Path) -> Verification:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        entry = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        listed = {name: tuple(dims) for name, dims in entry.get("two_four", {}).items()}
        matrices = []
        for name in file.keys():  # noqa: SIM118 (the file is no mapping)
            if len(file.get_slice(name).get_shape()) == 2:
                matrices.append(measure(name, _nonzero(file.get_tensor(name)), listed.get(name, ())))
    good = {m.name for m in matrices if m.two_four}
    return Verification(str(path), tuple(matrices), tuple(name for name in listed if name not in good))


def _verify_onnx(path: Path) -> Verification:
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

    graphs = list(_graphs(onnx.load(path, load_external_data=False).graph))
    nodes = [node for graph in graphs for node in graph.node]
    tensors = [(tensor.name, tensor) for graph in graphs for tensor in graph.initializer]
    tensors += [(n.output[0], a.t) for n in nodes if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    reduced = _reduced(nodes)
    matrices = []
    for name, tensor in tensors:
        if len(tensor.dims) == 2 and tensor.data_type != onnx.TensorProto.STRING:
            external = uses_external_data(tensor)
            if external:
                load_external_data_for_tensor(tensor, str(path.parent))
            nonzero = torch.from_numpy(onnx.numpy_helper.to_array(tensor).astype(bool))
            matrices.append(measure(name, nonzero, tuple(sorted(reduced.get(name, ())))))
            if external:
                tensor.ClearField("raw_data")
    return Verification(str(path), tuple(matrices))


def _graphs(graph: Any) -> Iterator[Any]:
    """The graph and those in its nodes' attributes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _graphs(inner)


def _reduced(nodes: Sequence[Any]) -> dict[str, set[int]]:
    """Of each tensor that is a matrix operand of MatMul or Gemm: the dimensions of it, as stored, that are reduced."""
    producers = {output: node for node in nodes for output in node.output}
    found: dict[str, set[int]] = {}
    for node in nodes:
        if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
            continue
        flags = {a.name: a.i for a in node.attribute}
        for name, dim in zip(node.input, (1 - flags.get("transA", 0), flags.get("transB", 0)), strict=False):
            while (producer := producers.get(name)) is not None and producer.op_type in _FOLLOWED:
                name = producer.input[0]
                perm = next((list(a.ints) for a in producer.attribute if a.name == "perm"), [1, 0])
                if producer.op_type == "Transpose" and perm == [1, 0]:
                    dim = 1 - dim
            found.setdefault(name, set()).add(dim)
    return found


def _nonzero(tensor: Tensor) -> Tensor:
    """bool of the tensor's shape; through float32 for 8-bit floats, which do not compare."""
    return (tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor) != 0


def measure(name: str, nonzero: Tensor, reduced: tuple[int, ...] = ()) -> Matrix:
    """The Matrix of a bool [rows, cols] that is True where an entry is not zero."""
    rows, cols = nonzero.shape
    dims = []
    for dim in (0, 1):
        size = nonzero.shape[dim]
        if size and size % 4 == 0 and bool((nonzero.unflatten(dim, (-1, 4)).sum(dim + 1) <= 2).all()):
            dims.append(dim)
    share = nonzero.double().mean().item() if nonzero.numel() else 0.0
    return Matrix(name, (rows, cols), tuple(dims), share, reduced)
