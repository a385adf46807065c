"""The pruned model as TensorRT engines, through torch-tensorrt's front end for torch.export.

TensorRT multiplies a 2:4 weight on sparse tensor cores where the builder is allowed to look for zeros and measures that
as faster, layer by layer. Engines are built on the GPU that runs them. The other way is the ONNX file and `trtexec`.
"""

import os
import shlex
from typing import Any

import torch
from torch import Tensor, nn

from . import export

#: What is passed to `torch_tensorrt.dynamo.compile` beside the inputs. Precisions are not: networks are strongly typed
#: (always from TensorRT 11 on, by default in torch-tensorrt 2.11), so that the model's dtypes are those of the engine.
#: min_block_size=1: a linear layer between operations that TensorRT does not take is an engine of its own.
SETTINGS: dict[str, Any] = {"sparse_weights": True, "min_block_size": 1}


def export_tensorrt(
    model: nn.Module, args: tuple[Tensor, ...] | dict[str, Tensor], path: str | os.PathLike[str], masks: str = "current"
) -> None:
    """Build TensorRT engines of the pruned model with sparse weights allowed, and write them as a torch.export program.

    model: a model trained sparse or its compiled wrapper, pruned here as `prune(model, masks)` does; or what `prune`
    returned, or such a model loaded again. It is built for its dtype (make it fp16 or bf16 before: sparse tensor cores
    take no fp32) on the current CUDA device, where a copy of it is moved. args: example inputs, a tuple of positional
    or a dict of named tensors; the engines take inputs of these shapes and dtypes. path: the file; it is loaded with
    `torch_tensorrt.load(path).module()` on a GPU of the same kind.

    Raises ImportError where torch-tensorrt is missing or does not load (pip install 'sparse24[tensorrt]'), RuntimeError
    where there is no CUDA GPU or where TensorRT took no part of the model, TypeError for an input that is no tensor,
    StateError as `export_onnx` does; errors of torch.export and of TensorRT for models that they cannot take. A file
    that was there before then stays.
    """
    positional, named = ((), args) if isinstance(args, dict) else (tuple(args), {})
    for value in (*positional, *named.values()):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"sparse24: found an input of type {type(value).__name__}, need tensors; set what else the model takes "
                "beforehand (model.config.use_cache = False, for instance)"
            )
    torch_tensorrt = _torch_tensorrt()
    if not torch.cuda.is_available():
        raise RuntimeError(
            "sparse24: found no CUDA GPU, need the one that the engines are to run on: TensorRT measures kernels as it "
            "builds. Run export_tensorrt there, or move an ONNX file there (sparse24.export_onnx) and run "
            f"{trtexec('model.onnx')}"
        )
    plain, _ = export.finished(model, masks)
    plain = plain.requires_grad_(False).cuda()
    positional = tuple(value.cuda() for value in positional)
    named = {name: value.cuda() for name, value in named.items()}
    program = torch.export.export(plain, positional, named)
    engines = torch_tensorrt.dynamo.compile(program, arg_inputs=positional, kwarg_inputs=named, **SETTINGS)
    if not any("TensorRTModule" in type(part).__name__ for part in engines.modules()):
        raise RuntimeError(
            "sparse24: found no part of this model that TensorRT takes, need one; torch_tensorrt.dynamo.compile(..., "
            "dryrun=True) says why"
        )

    def write(temporary: str) -> None:
        torch_tensorrt.save(engines, temporary, arg_inputs=positional, kwarg_inputs=named, pickle_protocol=4)

    export.replace(path, write, ".pt2")


def trtexec(onnx: str | os.PathLike[str], engine: str | os.PathLike[str] | None = None) -> str:
    """The command line that builds an engine with sparse weights from a file of `export_onnx`.

    onnx: the file; engine: what to write, by default `onnx` with the suffix .plan. For TensorRT 11 and later; TensorRT
    10 needs `--stronglyTyped` as well, to keep an fp16 or bf16 model's dtypes. Nothing is run here.
    """
    plan = os.path.splitext(os.fspath(onnx))[0] + ".plan" if engine is None else os.fspath(engine)
    return shlex.join(["trtexec", f"--onnx={os.fspath(onnx)}", f"--saveEngine={plan}", "--sparsity=enable"])


def _torch_tensorrt() -> Any:
    try:
        import torch_tensorrt
    except Exception as error:  # where TensorRT's libraries are missing it raises whatever it met
        raise ImportError(
            f"sparse24: found no torch-tensorrt that loads ({type(error).__name__}: {error}), need the one for torch "
            f"{torch.__version__}: pip install 'sparse24[tensorrt]' on a machine with an NVIDIA GPU; or run "
            f"{trtexec('model.onnx')} on a file of export_onnx"
        ) from error
    return torch_tensorrt
