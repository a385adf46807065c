"""Whatever elementwise expression stands between up and down: the layer is found, and its numbers are right."""

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from .capture import FF, D, Net, assert_equals_masked, roles, tokens

NOT_AFFINE = [
    "F.gelu({})",
    "F.relu({})",
    "F.silu({})",
    "torch.tanh({})",
    "torch.sin({})",
    "F.softplus({})",
    "({}) ** 2",
]
UNARY = [
    *NOT_AFFINE,
    "-({})",
    "0.5 * ({})",
    "1 - ({})",
    "({}) * m.scale + m.shift",
    "({}).reshape(-1, FF).view(h.shape)",
    "F.dropout({}, 0.25)",
    "({}).to(h.dtype)",
    "torch.clamp({}, -2, 3)",
]
BINARY = ["({}) * ({})", "({}) + ({})", "({}) - 0.5 * ({})", "torch.maximum({}, {})", "({}) / (1 + ({}).abs())"]


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    unary = st.builds(str.format, st.sampled_from(UNARY), inner)
    return unary | st.builds(str.format, st.sampled_from(BINARY), inner, inner)


#: Python expressions of h, every one of which is not affine in it.
expressions = st.builds(str.format, st.sampled_from(NOT_AFFINE), st.recursive(st.just("h"), grown, max_leaves=4))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(expressions, st.booleans())
def test_found_and_right(expression: str, bias: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    act = eval(f"lambda m, h: {expression}", {"torch": torch, "F": F, "FF": FF})  # a failure prints the expression
    children = {"up": nn.Linear(D, FF, bias=bias), "down": nn.Linear(FF, D, bias=bias)}
    constants = {"scale": nn.Parameter(torch.randn(FF)), "shift": nn.Buffer(torch.randn(FF))}
    model = Net(lambda m, x: m.down(act(m, m.up(x))), **children, **constants)
    assert roles(assert_equals_masked(model, tokens())) == {"up": "up", "down": "down"}
