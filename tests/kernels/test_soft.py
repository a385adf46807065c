"""soft24 and the linear of S-STE against their definitions, written with sorts and dense matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse24.kernels import layout, soft


def defined(w: torch.Tensor) -> torch.Tensor:
    groups = w.double().view(w.shape[0], -1, 4)
    second = groups.abs().sort(-1).values[..., 1:2]
    return (groups.sign() * (groups.abs() - second).clamp(min=0)).view(w.shape)


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.5, 3.0]), min_size=8, max_size=8))
@settings(max_examples=200, deadline=None)
def test_takes_off_the_second_smallest_magnitude_also_where_some_are_equal(entries: list[float]) -> None:
    w = torch.tensor([entries])
    values, lanes = soft.soft24(w)
    assert torch.equal(values.double(), defined(w))
    assert (lanes[..., 0] < lanes[..., 1]).all()
    mask = soft.mask_of(w)
    assert (mask.view(-1, 4).sum(-1) == 2).all() and not values[~mask].any()
    assert (
        w.abs().view(-1, 4).gather(-1, lanes.view(-1, 2)).sum(-1) == w.abs().view(-1, 4).topk(2).values.sum(-1)
    ).all()


def test_is_continuous_where_a_hard_mask_jumps() -> None:
    w = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    nudged = w + torch.tensor([[0.0, 0.0, -1e-3, 1e-3]])
    assert not torch.equal(soft.mask_of(w), soft.mask_of(nudged))
    assert (soft.soft24(w)[0] - soft.soft24(nudged)[0]).abs().max() <= 2.1e-3


def test_scale_is_the_best_one() -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 64, dtype=torch.float64)
    beta, s = soft.best_scale(w), defined(w)
    distances = [(w - (beta + off) * s).norm() for off in (-1e-3, 0.0, 1e-3)]
    assert distances[1] == min(distances) and beta > 1
    assert soft.best_scale(torch.zeros(64, 64)) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_and_dense_hold_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(64, 128), torch.randn(192, 64).t().repeat(1, 1)[:, :128]
    packed, dense = torch.zeros(layout.numel(128, 128, dtype), dtype=dtype), torch.zeros(128, 128, dtype=dtype)
    for _ in range(2):  # a second time over what stands there
        assert soft.pack_(second, 0.5, packed, dense, 64).item() == 0
        assert soft.pack_(first, 1.5, packed, dense, 0).item() == 0
    expected = torch.cat((1.5 * defined(first), 0.5 * defined(second)))
    assert torch.allclose(dense.double(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    assert torch.equal(layout.unpack(packed, 128, 128, "sm_90"), dense)
    first[3, 5] = float("nan")
    assert soft.pack_(first, 1.5, packed, dense, 0).item() == 1


def test_gradients_are_those_of_the_dense_matrix_straight_through() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(64, 128, requires_grad=True), torch.randn(5, 7, 128, requires_grad=True)
    packed, dense = torch.zeros(layout.numel(64, 128, w.dtype)), torch.zeros(64, 128)
    soft.pack_(w, 1.25, packed, dense, 0)
    y = soft.soft_linear(x, [w], packed, dense, torch.zeros(1, dtype=torch.int64), 0, "dense", False)
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    s = 1.25 * defined(w.detach())
    assert torch.allclose(y.double(), x.double() @ s.t(), atol=1e-4)
    assert torch.allclose(dx.double(), dy.double() @ s, atol=1e-4)
    assert torch.allclose(dw.double(), torch.einsum("btf,btk->fk", dy.double(), x.double()), atol=1e-4)
