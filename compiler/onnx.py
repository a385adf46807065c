"""The pruned model as an ONNX file, through torch.onnx's exporter on torch.export.

MatMul and Gemm reduce over the rows of a second operand [K, N] (over its columns with transB=1); sparse tensor cores
need the zeros along that axis. W.M is 2:4 along both, so the weights are right whichever way the exporter stores them,
and the file is read back to see it.
"""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import export
from .errors import StateError
from .verify import verify

#: The opset that files are written in: the one torch's exporter translates to; others are converted from it.
OPSET = 20
#: From this many bytes of weights on they stand in a second file: a protobuf holds at most 2 GiB.
EXTERNAL_DATA = 2**31 - 2**26


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...] | dict[str, Any],
    path: str | os.PathLike[str],
    dynamic_shapes: Any = None,
    masks: str = "current",
) -> None:
    """Write the pruned model, in evaluation mode, as ONNX with opset 20.

    model: a model trained sparse or its compiled wrapper, pruned here as `prune(model, masks)` does; or what `prune`
    returned, or such a model loaded again. args: example inputs, a tuple of positional or a dict of named ones.
    dynamic_shapes: as of `torch.export.export`; for named args a dict by the same names. Weights keep the model's
    dtype. path: the file; where the weights take about 2 GiB or more, they go to `path` + ".data" beside it.

    A weight that the exporter stores transposed is named as its parameter plus ".T". The file passes onnx.checker and
    is read back before it gets its name: each 2:4 weight is 2:4 along the axis that its product reduces over.

    Raises StateError as `prune` does, for a plain model without a 2:4 weight, and where a weight of the file read back
    is not 2:4 or not found; ImportError where onnx or onnxscript is missing (pip install 'sparse24[export]'); errors of
    torch's exporter for models that it cannot take.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise ImportError("sparse24: export_onnx needs onnx and onnxscript: pip install 'sparse24[export]'") from error

    plain, expected = export.finished(model, masks)
    positional, named = ((), args) if isinstance(args, dict) else (args, None)
    program = torch.onnx.export(
        plain, positional, kwargs=named, dynamo=True, dynamic_shapes=dynamic_shapes, opset_version=OPSET, verbose=False
    )
    assert program is not None  # it is one for dynamo=True
    _name_transposed(program.model.graph, {name: p.detach() for name, p in plain.named_parameters() if p.dim() == 2})
    size = sum(tensor.nbytes for tensor in plain.state_dict().values())

    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name  # of the final name: the model refers to its data by name
        program.save(temporary, external_data=size >= EXTERNAL_DATA)
        onnx.checker.check_model(temporary, full_check=True)
        found = verify(temporary)
        for name in expected:
            stored = [m for m in found.matrices if m.name in (name, f"{name}.T")]
            if not any(m.reduced and m.two_four for m in stored):
                what = f"2:4 along {stored[0].dims}, reduced over {stored[0].reduced}" if stored else "not there"
                raise StateError(
                    f"sparse24: {name} is {what} in the ONNX file read back, need a MatMul or Gemm over a 2:4 axis; "
                    f"{path} was not written"
                )
        files = sorted(Path(folder).iterdir(), key=lambda f: f == temporary)  # the model last
        for file in files:
            os.replace(file, path.parent / file.name)
    if len(files) == 1:  # what an earlier, larger export left beside it
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)


def _name_transposed(graph: Any, params: dict[str, Tensor]) -> None:
    """Give transposed weights their parameter's name and ".T": the exporter folds the transpose and numbers them."""
    left = {(tuple(p.t().shape), _digest(p.t())): name for name, p in params.items() if name not in graph.initializers}
    for value in list(graph.initializers.values()):
        stored = value.const_value
        if value.name not in params and stored is not None and len(stored.shape) == 2:
            name = left.pop((tuple(stored.shape), hashlib.sha256(stored.tobytes()).digest()), None)
            if name is not None:
                value.name = f"{name}.T"


def _digest(tensor: Tensor) -> bytes:
    """Of its bytes, row-major and little-endian, as ONNX holds them."""
    return hashlib.sha256(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()).digest()
