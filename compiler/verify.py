"""verify: which matrices of a file are 2:4, and along which dimension. It reads the numbers, whoever wrote them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

#: The entry of a safetensors file's metadata that lists its 2:4 tensors.
METADATA_KEY = "sparse24"


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
    """Which matrices of a .safetensors file are 2:4, and along which dimension.

    A matrix is a tensor of two dimensions of any numeric dtype; tensors are read one after the other. Raises
    FileNotFoundError, ValueError for another kind of file, and ImportError where safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"sparse24: found no file {path}")
    if path.suffix == ".safetensors":
        return _verify_safetensors(path)
    raise ValueError(f"sparse24: found {path.name}, need a .safetensors file")


def _verify_safetensors(path: Path) -> Verification:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        entry = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        listed = {name: tuple(dims) for name, dims in entry.get("two_four", {}).items()}
        matrices = []
        for name in file.keys():  # noqa: SIM118: not a mapping
            if len(file.get_slice(name).get_shape()) == 2:
                matrices.append(measure(name, _nonzero(file.get_tensor(name)), listed.get(name, ())))
    good = {m.name for m in matrices if m.two_four}
    return Verification(str(path), tuple(matrices), tuple(name for name in listed if name not in good))


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
