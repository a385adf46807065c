"""A pruned model for stock PyTorch: its 2:4 weights as torch's SparseSemiStructuredTensor, without the dense copies."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import export
from .errors import StateError
from .inference import rows_of, two_four

_MULTIPLE = 16  # of both dimensions, for torch's cuSPARSELt tensors


def to_semi_structured(model: nn.Module, masks: str = "current") -> nn.Module:
    """A copy of the model in evaluation mode whose 2:4 linear weights are torch.sparse.SparseSemiStructuredTensors.

    model: a model trained sparse or its compiled wrapper, pruned here as `prune(model, masks)` does; or what `prune`
    returned, or such a model loaded again. On a CUDA device, its linears in fp16 or bf16; inputs must come in the same
    dtype, without autocast. Taken are weights of nn.Linear, and of the Conv1D of transformers, that are 2:4 along
    in_features and that one module alone holds; they take 9/16 of the dense bytes. No parameter of the copy asks for a
    gradient. It runs under eager PyTorch and torch.compile, through `torch.sparse.to_sparse_semi_structured` with
    cuSPARSELt, and needs sparse24 no more. Save the pruned model, not this copy, and convert after loading.

    Raises RuntimeError where torch has no cuSPARSELt, ValueError for weights on another device or of another dtype,
    StateError as `export_onnx` does and where no linear layer can be taken.
    """
    if not torch.cuda.is_available() or not torch.backends.cusparselt.is_available():
        found = "no CUDA GPU" if not torch.cuda.is_available() else f"torch {torch.__version__} without cuSPARSELt"
        raise RuntimeError(
            f"sparse24: found {found}, need an NVIDIA GPU with sparse tensor cores and a CUDA build of torch with "
            "cuSPARSELt; run to_semi_structured there, or use sparse24.prune, whose copy runs anywhere"
        )
    plain, _ = export.finished(model, masks)
    plain.requires_grad_(False)
    linears = list(_linears(plain))
    if not linears:
        raise StateError(
            "sparse24: found no linear layer to convert, need an nn.Linear with a weight of its own that is 2:4 along "
            f"in_features and whose sizes are multiples of {_MULTIPLE}"
        )
    for name, module, transposed in linears:
        weight = module.weight
        if weight.device.type != "cuda" or weight.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"sparse24: found {name}.weight in {str(weight.dtype).removeprefix('torch.')} on {weight.device}, need "
                "float16 or bfloat16 on cuda: to_semi_structured(sparse24.prune(model).to('cuda', torch.bfloat16))"
            )
        packed = torch.sparse.to_sparse_semi_structured(rows_of(weight, transposed).contiguous())
        module.weight = nn.Parameter(packed.t() if transposed else packed, requires_grad=False)
    return plain


def _linears(model: nn.Module) -> Iterator[tuple[str, Any, bool]]:
    """(name, layer, whether its weight is [in, out]) of each that can be taken. Attention of torch has its own kernels,
    which take no such weights: the subclass of nn.Linear in there is left alone.
    """
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for name, module in model.named_modules():
        transposed = type(module).__name__ == "Conv1D"
        if type(module) is nn.Linear or transposed:
            weight: Tensor = module.weight  # type: ignore[assignment]
            fits = owners[id(weight)] == 1 and all(size % _MULTIPLE == 0 for size in weight.shape)
            if fits and two_four(weight, transposed):
                yield name, module, transposed
