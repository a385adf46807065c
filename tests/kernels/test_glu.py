"""Activations, plain and gated, and their gradients against float64."""

import math

import pytest
import torch

from sparse24.kernels import reference

ACTIVATIONS = {
    "silu": lambda z: z * torch.sigmoid(z),
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "gelu_tanh": lambda z: z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
    "relu": lambda z: z * (z > 0),
    "relu2": lambda z: (z * (z > 0)) ** 2,
}
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
KINDS = (*GATED, *ACTIVATIONS)


def exact(gate_up, bias, kind, dh=None):
    """h, or with dh the gradient of gate_up, in float64."""
    z = gate_up.double().requires_grad_()
    y = z if bias is None else z + bias.double()
    if kind in GATED:
        gate, up = y.chunk(2, -1)
        h = ACTIVATIONS[GATED[kind]](gate) * up
    else:
        h = ACTIVATIONS[kind](y)
    return h.detach() if dh is None else torch.autograd.grad(h, z, dh.double())[0]


def problem(kind, dtype, biased, tokens=37, features=48):
    gate_up = (3 * torch.randn(tokens, features)).to(dtype)
    bias = torch.randn(features).to(dtype) if biased else None
    dh = torch.randn(tokens, features // 2 if kind in GATED else features).to(dtype)
    return dh, gate_up, bias


def error(found, expected, dtype):
    """Largest distance from float64 in units of what the dtype resolves at that magnitude (or of 1)."""
    return float(((found.double() - expected).abs() / expected.abs().clamp(min=1)).max()) / torch.finfo(dtype).eps


def on(device, *tensors):
    return [x if x is None else x.to(device) for x in tensors]


def first(result):
    return result[0] if isinstance(result, tuple) else result


def test_every_kind_is_tested():
    assert set(KINDS) == set(reference.KINDS) and reference.GATED == GATED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_float64_to_rounding(impl, kind, biased, dtype):
    dh, gate_up, bias = problem(kind, dtype, biased)
    dh_, gate_up_, bias_ = on(impl.device, dh, gate_up, bias)
    h, d = impl.glu(gate_up_, bias_, kind).cpu(), impl.glu_backward(dh_, gate_up_, bias_, kind)[0].cpu()
    assert h.dtype == d.dtype == dtype and h.shape == dh.shape and d.shape == gate_up.shape
    tolerance = 0.6 if dtype != torch.float32 else 40  # half a unit where the result is rounded from fp32
    assert error(h, exact(gate_up, bias, kind), dtype) < tolerance
    assert error(d, exact(gate_up, bias, kind, dh), dtype) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_kernels_are_as_near_to_float64_as_the_twins(fast, device, kind):
    dh, gate_up, bias = problem(kind, torch.float32, True, 64, 128)
    fast_args = on(device, dh, gate_up, bias)
    for name, truth in (("glu", exact(gate_up, bias, kind)), ("glu_backward", exact(gate_up, bias, kind, dh))):
        skip = 1 if name == "glu" else 0
        ours = error(first(getattr(fast, name)(*fast_args[skip:], kind)).cpu(), truth, torch.float32)
        twins = error(first(getattr(reference, name)(*(dh, gate_up, bias)[skip:], kind)), truth, torch.float32)
        assert ours <= 3 * twins + 1


@pytest.mark.parametrize("kind", KINDS)
def test_infinities_and_large_inputs_come_out_as_in_the_twin(fast, device, kind):
    extremes = torch.tensor(
        [math.inf, -math.inf, math.nan, 0.0, -0.0, 3e38, -3e38, 1e4, -1e4, 89.0, -89.0, 1e-40, -1e-40]
    )
    z = (
        extremes[:, None].expand(13, 13)
        if kind not in GATED
        else torch.cat(torch.meshgrid(extremes, extremes, indexing="ij"), 1)
    )
    dh = torch.ones(13, 13)
    for name, args in (("glu", (z, None, kind)), ("glu_backward", (dh, z, None, kind))):
        expected = first(getattr(reference, name)(*args))
        found = first(getattr(fast, name)(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in args))).cpu()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-36, equal_nan=True)


@pytest.mark.parametrize("tokens", [0, 1, 3, 65])
@pytest.mark.parametrize("kind", ["swiglu", "relu2"])
def test_odd_shapes(impl, kind, tokens):
    for features in (2, 30, 130):
        dh, gate_up, bias = problem(kind, torch.float32, True, tokens, features)
        dh_, gate_up_, bias_ = on(impl.device, dh, gate_up, bias)
        h, d = impl.glu(gate_up_, bias_, kind).cpu(), impl.glu_backward(dh_, gate_up_, bias_, kind)[0].cpu()
        torch.testing.assert_close(h.double(), exact(gate_up, bias, kind), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(d.double(), exact(gate_up, bias, kind, dh), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [0, 3, 64, 193])
@pytest.mark.parametrize("kind", ["swiglu", "relu2"])
def test_the_gradient_of_the_bias(impl, kind, tokens):
    """The column sums of the rounded gradient, in fp32."""
    for features in (2, 30, 130):
        dh, gate_up, bias = on(impl.device, *problem(kind, torch.bfloat16, True, tokens, features))
        d, sums = impl.glu_backward(dh, gate_up, bias, kind)
        assert sums.dtype == torch.float32
        torch.testing.assert_close(sums.double(), d.double().sum(0), rtol=1e-5, atol=1e-4)
        assert impl.glu_backward(dh, gate_up, None, kind)[1].shape == (0,)


def test_inputs_of_any_strides(impl):
    dh, gate_up, bias = problem("swiglu", torch.float32, True, 64, 128)
    args = on(impl.device, dh, gate_up, bias)
    odd = [x.t().contiguous().t() for x in args[:2]] + [args[2].repeat_interleave(2)[::2]]
    assert torch.equal(impl.glu(*odd[1:], "swiglu"), impl.glu(*args[1:], "swiglu"))
    assert torch.equal(impl.glu_backward(*odd, "swiglu")[0], impl.glu_backward(*args, "swiglu")[0])
    spread = torch.ones((), device=impl.device).expand(64, 64)  # what sum().backward() hands down
    contiguous = impl.glu_backward(spread.contiguous(), *args[1:], "swiglu")
    assert torch.equal(impl.glu_backward(spread, *args[1:], "swiglu")[0], contiguous[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_is_the_gradient_of_the_forward_by_input_and_bias(kind):
    gate_up = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    h = reference.glu(gate_up, bias, kind)
    dh = torch.randn_like(h)
    expected_d, expected_sums = torch.autograd.grad(h, (gate_up, bias), dh)
    d, sums = reference.glu_backward(dh, gate_up.detach(), bias.detach(), kind)
    torch.testing.assert_close(d, expected_d)
    torch.testing.assert_close(sums, expected_sums.float())


def test_errors_of_the_fast_kernels_say_what_is_needed(fast):
    with pytest.raises(ValueError, match="found activation 'tanhshrink', need one of swiglu"):
        fast.glu(torch.zeros(2, 4), None, "tanhshrink")
    with pytest.raises(ValueError, match="found gate_up of torch.float64, need float32, bfloat16 or float16"):
        fast.glu(torch.zeros(2, 4, dtype=torch.float64), None, "silu")
    with pytest.raises(ValueError, match="found gate_up of 5 columns"):
        fast.glu(torch.zeros(2, 5), None, "swiglu")
    with pytest.raises(ValueError, match=r"found dh \(2, 4\), need \(2, 2\)"):
        fast.glu_backward(torch.zeros(2, 4), torch.zeros(2, 4), None, "swiglu")
