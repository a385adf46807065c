"""Fixtures of the kernel tests, and repairs of Triton's interpreter, under which they run where there is no GPU."""

import os

import numpy as np
import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

try:
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    from sparse24.kernels import triton_ops
except ImportError:  # a machine without Triton tests the twins alone
    triton = triton_ops = None

from sparse24.kernels import layout, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _cast(self, src, dst_type):
    """The interpreter truncates fp32 -> bf16 and mangles bf16 denormals; GPUs round to nearest even, as torch does."""
    pair = src.dtype.scalar, dst_type.scalar
    if pair == (tl.float32, tl.bfloat16):
        data = torch.from_numpy(np.array(src.data)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    elif pair == (tl.bfloat16, tl.float32):
        data = (src.data.astype(np.uint32) << 16).view(np.float32)
    else:
        return _unrepaired_cast(self, src, dst_type)
    return interpreter.TensorHandle(data, dst_type.scalar)


if triton is not None and triton.knobs.runtime.interpret:
    _unrepaired_cast = interpreter.InterpreterBuilder.cast_impl
    interpreter.InterpreterBuilder.cast_impl = _cast


@pytest.fixture(autouse=True)
def fresh():
    """Each test draws the same numbers; numpy is silent where a GPU makes infinities silently."""
    torch.manual_seed(0)
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def fast():
    """The Triton twins."""
    if triton_ops is None:
        pytest.skip("Triton is not installed")
    return triton_ops


@pytest.fixture
def device():
    """Where the Triton twins run: the GPU, or the CPU under the interpreter."""
    return DEVICE


@pytest.fixture(params=["reference", "triton"])
def impl(request):
    """Both implementations of each op, for tests of behaviour. Tensors lie on the device that `impl.device` names."""
    if request.param == "reference":
        return Implementation(reference, torch.device("cpu"))
    return Implementation(request.getfixturevalue("fast"), DEVICE)


class Implementation:
    def __init__(self, module, device):
        self.module, self.device = module, device
        self.order = layout.metadata_order(device)

    def __getattr__(self, name):
        return getattr(self.module, name)


@pytest.fixture(params=["sm_90", "sm_80"])
def order(request, monkeypatch):
    """Both orders of the metadata, whatever the device."""
    monkeypatch.setattr(layout, "metadata_order", lambda device: request.param)
    return request.param


def assert_same_packed(found, expected, rows, cols):
    """The same bytes; the payload of a NaN and the sign of a zero may differ."""
    found, expected = found.cpu(), expected.cpu()
    (values, metadata), (values_, metadata_) = layout.split(found, rows, cols), layout.split(expected, rows, cols)
    assert torch.equal(metadata, metadata_)
    both = (values.isnan() & values_.isnan()) | ((values == 0) & (values_ == 0))
    bits = torch.int32 if values.dtype.itemsize == 4 else torch.int16
    assert torch.equal(values.view(bits).masked_fill(both, 0), values_.view(bits).masked_fill(both, 0))


@pytest.fixture
def same_packed():
    return assert_same_packed


@pytest.fixture
def poisoned():
    """A maker of packed buffers full of NaN."""

    def make(rows, cols, dtype, device="cpu"):
        return torch.full((layout.numel(rows, cols, dtype),), float("nan"), dtype=dtype, device=device)

    return make
