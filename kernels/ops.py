"""The ops of sparse24: their torch.library face. Importing this module defines them under `torch.ops.sparse24`.

Letters: T tokens, K in_features, F features of an output, rows x cols a packed matrix. Dtypes are fp32, bf16 or fp16;
packed buffers have the dtype of what they multiply (form: `layout`). CPU tensors run `reference`; CUDA tensors run the
Triton kernels, and the matmuls the provider that `choice` takes. No op here has an autograd formula of its own (one
costs each call of the op a detour through Python): `linear` puts them together into differentiable functions.
`pack_weights_` and `masked_decay_`, which no graph holds, are plain functions on all weights of an optimizer step at
once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import choice, layout, reference
from .layout import Block
from .providers import Problem
from .reference import padded

try:
    from . import triton_ops as _fast
except ImportError:  # a CPU build of torch comes without Triton
    _fast = None  # type: ignore[assignment]

_lib = torch.library.Library("sparse24", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def _define(schema: str) -> None:
    _lib.define(schema, tags=_TAGS)


_define("spmm(Tensor packed, Tensor x, int rows) -> Tensor")
_define("spmm_glu(Tensor packed, Tensor x, Tensor? bias, int rows, str kind) -> (Tensor, Tensor)")
_define("wgrad(Tensor packed, Tensor x, int rows) -> Tensor")
_define("pack_gradient(Tensor dy, Tensor seeds, int index) -> Tensor")
_define("glu(Tensor gate_up, Tensor? bias, str kind) -> Tensor")
_define("glu_backward(Tensor dh, Tensor gate_up, Tensor? bias, str kind) -> (Tensor, Tensor)")
_define(
    "glu_backward_pack(Tensor dh, Tensor gate_up, Tensor? bias, str kind, Tensor seeds, int index)"
    " -> (Tensor, Tensor, Tensor)"
)


# ------------------------------------------------------------------------------------------------------------- the face


def spmm(packed: Tensor, x: Tensor, rows: int) -> Tensor:
    """x [T, K] times a packed [rows, K] matrix, transposed -> [T, rows], fp32 accumulation. Forward and dgrad."""
    return torch.ops.sparse24.spmm(packed, x, rows)


def spmm_glu(packed: Tensor, x: Tensor, bias: Tensor | None, rows: int, kind: str) -> tuple[Tensor, Tensor]:
    """`spmm` and `glu` of it, gated or not: both results, from one kernel where that was measured faster."""
    return torch.ops.sparse24.spmm_glu(packed, x, bias, rows, kind)


def wgrad(packed: Tensor, x: Tensor, rows: int) -> Tensor:
    """A packed gradient [rows, T'] (T' = T padded to 64) times x [T, K] -> [rows, K], fp32 accumulation."""
    return torch.ops.sparse24.wgrad(packed, x, rows)


def pack_gradient(dy: Tensor, seeds: Tensor, index: int) -> Tensor:
    """dy [T, F] -> packed dy^T [F, T'], pruned 2:4 along tokens by exact MVUE (`reference.mvue`).

    seeds int64 [n]; the draw is a function of seeds[index] and the position alone.
    """
    return torch.ops.sparse24.pack_gradient(dy, seeds, index)


def glu(gate_up: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """act(gate) * up for the gated kinds, gate_up [T, 2F] -> [T, F]; act(z) for the others, [T, F] -> [T, F].

    kind: swiglu, geglu, geglu_tanh, reglu; silu, gelu, gelu_tanh, relu, relu2. bias [2F or F] is added first.
    """
    return torch.ops.sparse24.glu(gate_up, bias, kind)


def glu_backward(dh: Tensor, gate_up: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """Gradient of `glu` at gate_up, dh [T, F] -> the shape of gate_up, and that of the bias, fp32 [2F or F].

    The latter is the column sum of the former; without a bias it is empty, [0].
    """
    return torch.ops.sparse24.glu_backward(dh, gate_up, bias, kind)


def glu_backward_pack(
    dh: Tensor, gate_up: Tensor, bias: Tensor | None, kind: str, seeds: Tensor, index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`glu_backward`, with the `pack_gradient` of its first gradient in between, from one read of dh and gate_up."""
    return torch.ops.sparse24.glu_backward_pack(dh, gate_up, bias, kind, seeds, index)


def pack_weights_(blocks: Sequence[Block], search: bool) -> Tensor:
    """Write each weight as its block of the packed forms, all in one launch where they are alike.

    search=True takes the optimal transposable mask (`reference.best_mask`) and writes the metadata; search=False keeps
    the mask that the metadata of `packed` holds and rewrites the values. Returns int64 [n, 2] on the device: how many
    mask bits of each weight changed, and how many of its entries are NaN. Weights fp32, bf16 or fp16, on one device.
    Raises ValueError where a block does not fit its matrix.
    """
    return _twin("pack_weights_", blocks[0].packed)(blocks, search)


def best_mask(w: Tensor) -> Tensor:
    """The mask that `pack_weights_` finds of w [rows, cols], bool of its shape: `reference.best_mask`.

    On a GPU by the same kernel, into packed forms that are thrown away (2.25 bytes an entry meanwhile): the reference
    would take many times as long and as much memory there.
    """
    order = layout.metadata_order(w.device)
    if w.device.type == "cpu" or _fast is None or any(n % layout.ROW_BLOCK[order] for n in w.shape):
        return reference.best_mask(w)
    (rows, cols), dtype = w.shape, w.dtype if w.dtype.itemsize == 2 else torch.bfloat16
    packed, packed_t = torch.zeros(2, layout.numel(rows, cols, dtype), dtype=dtype, device=w.device)
    pack_weights_([Block(w, packed, packed_t, 0, 0, rows, cols)], True)
    metadata = layout.split(packed, rows, cols)[1]
    return layout.mask_from_nibbles(layout.read_nibbles(metadata, rows, cols, order))


def masked_decay_(grads: Sequence[Tensor], blocks: Sequence[Block], decay: float) -> None:
    """grad += decay * (1 - M) * w in place for each weight w and its mask M: the paper's masked decay, in one launch.

    A gradient has the shape of its weight, in fp32, bf16 or fp16 and any strides; the sum is taken in fp32. With
    grad = w and a negative decay this is the decay on weights. Raises ValueError where shapes or dtypes do not fit.
    """
    _twin("masked_decay_", blocks[0].packed)(grads, blocks, decay)


def _twin(name: str, tensor: Tensor) -> Any:
    return getattr(reference if tensor.device.type == "cpu" or _fast is None else _fast, name)


# ------------------------------------------------------------------------------------------------------ implementations


def _run_spmm(packed: Tensor, x: Tensor, rows: int) -> Tensor:
    return choice.matmul(Problem("spmm", rows, x.shape[1], x.shape[0], x.dtype, x.device), packed, x)


def _run_spmm_glu(packed: Tensor, x: Tensor, bias: Tensor | None, rows: int, kind: str) -> tuple[Tensor, Tensor]:
    problem = Problem("spmm", rows, x.shape[1], x.shape[0], x.dtype, x.device)
    return choice.matmul_glu(problem, packed, x, bias, kind, _twin("glu", x))


def _run_wgrad(packed: Tensor, x: Tensor, rows: int) -> Tensor:
    return choice.matmul(Problem("wgrad", rows, padded(x.shape[0]), x.shape[1], x.dtype, x.device), packed, x)


_FUSED = ("pack_gradient", "glu", "glu_backward", "glu_backward_pack")


def _register() -> None:
    for key in ("CPU", "CUDA"):
        _lib.impl("spmm", _run_spmm, key)
        _lib.impl("spmm_glu", _run_spmm_glu, key)
        _lib.impl("wgrad", _run_wgrad, key)
    for name in _FUSED:
        _lib.impl(name, getattr(reference, name), "CPU")
        if _fast is not None:
            _lib.impl(name, getattr(_fast, name), "CUDA")


_register()


# ---------------------------------------------------------------------------------------------------------------- fakes


@torch.library.register_fake("sparse24::spmm", lib=_lib)
def _(packed: Tensor, x: Tensor, rows: int) -> Tensor:
    return x.new_empty(x.shape[0], rows)


@torch.library.register_fake("sparse24::spmm_glu", lib=_lib)
def _(packed: Tensor, x: Tensor, bias: Tensor | None, rows: int, kind: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], rows), x.new_empty(x.shape[0], rows // 2 if kind in reference.GATED else rows)


@torch.library.register_fake("sparse24::wgrad", lib=_lib)
def _(packed: Tensor, x: Tensor, rows: int) -> Tensor:
    return x.new_empty(rows, x.shape[1])


@torch.library.register_fake("sparse24::pack_gradient", lib=_lib)
def _(dy: Tensor, seeds: Tensor, index: int) -> Tensor:
    return dy.new_empty(layout.numel(dy.shape[1], padded(dy.shape[0]), dy.dtype))


@torch.library.register_fake("sparse24::glu", lib=_lib)
def _(gate_up: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    features = gate_up.shape[1] // 2 if kind in reference.GATED else gate_up.shape[1]
    return gate_up.new_empty(gate_up.shape[0], features)


def _fake_sums(gate_up: Tensor, bias: Tensor | None) -> Tensor:
    return gate_up.new_empty(0 if bias is None else gate_up.shape[1], dtype=torch.float32)


@torch.library.register_fake("sparse24::glu_backward", lib=_lib)
def _(dh: Tensor, gate_up: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), _fake_sums(gate_up, bias)


@torch.library.register_fake("sparse24::glu_backward_pack", lib=_lib)
def _(
    dh: Tensor, gate_up: Tensor, bias: Tensor | None, kind: str, seeds: Tensor, index: int
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, width = gate_up.shape
    packed = gate_up.new_empty(layout.numel(width, padded(tokens), gate_up.dtype))
    return gate_up.new_empty(gate_up.shape), packed, _fake_sums(gate_up, bias)
