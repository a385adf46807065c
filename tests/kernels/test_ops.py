"""The torch.library face: what torch.compile is told about each op is true; the matmuls against dense float64."""

import pytest
import torch

from sparse24.kernels import choice, layout, ops, providers, reference

TOKENS = [0, 1, 3, 63, 64, 65]


def packed_weight(rows, cols, dtype=torch.float32):
    w = torch.randn(rows, cols).to(dtype)
    mask = reference.best_mask(w)
    return layout.pack(w, mask, "sm_90"), (w * mask).double()


def samples():
    """An argument list for every op, one with and one without each optional argument."""
    seeds = torch.tensor([3, 4])
    packed, _ = packed_weight(64, 128)
    gate_up, dh, bias = torch.randn(70, 128), torch.randn(70, 64), torch.randn(128)
    grad_packed = reference.pack_gradient(gate_up, seeds, 0)
    yield "spmm", (packed, torch.randn(5, 128), 64)
    yield "spmm_glu", (packed, torch.randn(5, 128), None, 64, "swiglu")
    yield "spmm_glu", (packed, torch.randn(5, 128), bias[:64], 64, "gelu")
    yield "wgrad", (grad_packed, torch.randn(70, 32), 128)
    yield "pack_gradient", (gate_up, seeds, 1)
    yield "glu", (gate_up, None, "swiglu")
    yield "glu", (gate_up, bias, "gelu")
    yield "glu_backward", (dh, gate_up, bias, "swiglu")
    yield "glu_backward", (gate_up, gate_up, None, "relu2")
    yield "glu_backward_pack", (dh, gate_up, bias, "geglu_tanh", seeds, 1)
    yield "glu_backward_pack", (gate_up, gate_up, None, "silu", seeds, 0)


@pytest.mark.parametrize("index", range(11))
def test_what_the_compiler_is_told_of_an_op_is_true(index):
    name, args = list(samples())[index]
    torch.library.opcheck(getattr(torch.ops.sparse24, name).default, args)


def test_every_op_has_a_sample():
    defined = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("sparse24::")}
    assert {f"sparse24::{name}" for name, _ in samples()} == defined
    assert len(list(samples())) == 11


@pytest.mark.parametrize("kind", reference.KINDS)
def test_the_backward_runs_where_autograd_records_nothing(kind):
    """As under a dispatch mode (a FLOP counter, selective checkpointing)."""
    gate_up, dh = torch.randn(4, 8), torch.randn(4, 4 if kind in reference.GATED else 8)
    expected, _ = ops.glu_backward(dh, gate_up, None, kind)
    with torch._C._AutoDispatchBelowAutograd():
        assert torch.equal(ops.glu_backward(dh, gate_up, None, kind)[0], expected)


@pytest.mark.parametrize("tokens", TOKENS)
def test_spmm_is_the_product_with_the_masked_weight(tokens):
    packed, w = packed_weight(192, 128)
    x = torch.randn(tokens, 128)
    y = ops.spmm(packed, x, 192)
    assert y.shape == (tokens, 192) and y.dtype == x.dtype
    torch.testing.assert_close(y.double(), x.double() @ w.t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dgrad_is_spmm_with_the_transposed_form(dtype):
    w = torch.randn(192, 128)
    packed, packed_t = (torch.empty(layout.numel(192, 128, dtype), dtype=dtype) for _ in range(2))
    ops.pack_weights_([layout.Block(w, packed, packed_t, 0, 0, 192, 128)], True)
    dy = torch.randn(65, 192).to(dtype)
    expected = dy.double() @ (w.to(dtype) * reference.best_mask(w)).double()
    found = ops.spmm(packed_t, dy, 128).double()
    assert float((found - expected).norm() / expected.norm()) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("tokens", TOKENS)
def test_wgrad_is_the_product_with_the_pruned_gradient(tokens):
    dy, x, seeds = torch.randn(tokens, 64), torch.randn(tokens, 48), torch.tensor([9])
    packed = ops.pack_gradient(dy, seeds, 0)
    dw = ops.wgrad(packed, x, 64)
    assert dw.shape == (64, 48) and dw.dtype == x.dtype
    pruned = layout.unpack(packed, 64, reference.padded(tokens), "sm_90")[:, :tokens]
    torch.testing.assert_close(dw.double(), pruned.double() @ x.double(), rtol=1e-5, atol=1e-4)


def test_wgrad_is_unbiased():
    dy, x, n = torch.randn(64, 64), torch.eye(64), 400
    seeds = torch.arange(n)
    mean = sum(ops.wgrad(ops.pack_gradient(dy, seeds, k), x, 64).double() for k in range(n)) / n
    expected = (0.475 / n) ** 0.5  # the share of the energy of dy that pruning adds as noise, averaged over the draws
    assert 0.9 * expected < float((mean - dy.double().t()).norm() / dy.norm()) < 1.1 * expected


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("biased", [False, True])
def test_the_fused_backward_is_its_two_halves(kind, biased):
    gate_up, seeds = torch.randn(70, 128), torch.tensor([1, 2])
    bias = torch.randn(128) if biased else None
    dh = torch.randn(70, 64 if kind in reference.GATED else 128)
    d, packed, sums = ops.glu_backward_pack(dh, gate_up, bias, kind, seeds, 1)
    assert sums.shape == (128 if biased else 0,) and sums.dtype == torch.float32
    if biased:
        torch.testing.assert_close(sums, d.sum(0))
    assert torch.equal(d, ops.glu_backward(dh, gate_up, bias, kind)[0])
    assert torch.equal(packed, ops.pack_gradient(d, seeds, 1))


def test_the_cpu_multiplies_densely():
    problem = providers.Problem("spmm", 64, 64, 8, torch.float32, torch.device("cpu"))
    assert choice.choose(problem).provider == "masked_dense"


def test_a_packed_operand_of_another_size_is_refused():
    packed, _ = packed_weight(64, 128)
    with pytest.raises(ValueError, match="found a packed buffer of shape"):
        ops.spmm(packed, torch.randn(4, 64), 64)
