"""Pruning a gradient 2:4: unbiased, of least variance, two lanes a group, and a function of the seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse24.kernels import layout, reference

INF, NAN, TINY = float("inf"), float("nan"), 2.0**-149


def probabilities(x):
    """float64 [4, ...]: the p_i = min(1, |x_i| / c), sum p = 2, of least variance (found by bisection on c)."""
    a = x.double().abs()
    low, high = torch.zeros_like(a[0]), a.sum(0) + 1e-300
    for _ in range(100):
        c = (low + high) / 2
        enough = (a / c).clamp(max=1).nan_to_num(1.0).sum(0) > 2
        low, high = torch.where(enough, c, low), torch.where(enough, high, c)
    return (a / high).clamp(max=1)


def variance(x):
    """float64, like x: the variance that each entry has under those probabilities."""
    p = probabilities(x)
    return torch.where(p > 0, x.double().square() * (1 / p - 1), 0.0)


def draws(n):
    """fp32 [n] from `uniform`, the smallest and the largest number it makes among them."""
    u = reference.uniform(torch.tensor([5]), n)
    u[: n // 16], u[n // 16 : n // 8] = 2.0**-23, 1 - 2.0**-23
    return u


def pruned(x, u):
    """fp32 [4, ...]: x with all but the two kept lanes zero."""
    i, j, vi, vj = reference.mvue(x, u)
    return torch.zeros_like(x).scatter(0, torch.stack((i, j)), torch.stack((vi, vj)))


def moments(x, draws=4096):
    """Mean and mean square deviation of the pruned x [4, n] over evenly spaced uniforms."""
    u = (torch.arange(draws) + 0.5) / draws
    s = pruned(x[..., None].expand(*x.shape, draws).contiguous(), u.expand(x.shape[1], draws)).double()
    return s.mean(-1), (s - x.double()[..., None]).square().mean(-1)


GROUPS = {
    "gaussian": lambda: torch.randn(4, 500),
    "heavy_tailed": lambda: torch.randn(4, 500).pow(5),
    "one_dominates": lambda: torch.randn(4, 500) * torch.tensor([1.0, 1e4, 1e-4, 1.0])[torch.rand(4, 500).argsort(0)],
    "ties": lambda: torch.randint(-2, 3, (4, 500)).float(),
    "tiny": lambda: torch.randn(4, 500) * 1e-36,
    "huge": lambda: torch.randn(4, 500).clamp(-3, 3) * 2e37,
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_mean_is_the_gradient_and_the_variance_the_least_there_is(name):
    x = GROUPS[name]()
    mean, square = moments(x)
    scale = x.double().abs().sum(0)
    assert float(((mean - x.double()).abs() / scale.clamp(min=1e-300)).max()) < 1e-3  # spacing of u: 1 / 4096
    expected = variance(x).sum(0)
    gap = (square.sum(0) - expected).abs() / scale.square().clamp(min=1e-300)
    assert float(gap.max()) < 1e-3


def test_gaussian_gradients_lose_the_known_share_of_their_energy():
    x = torch.randn(4, 20_000)
    energy = x.double().square().sum()
    assert abs(float(variance(x).sum() / energy) - 0.4748) < 0.007
    s = pruned(x, torch.rand(20_000)).double()
    assert abs(float((s - x).square().sum() / energy) - 0.4748) < 0.015  # the two-draw estimator: 0.50


@pytest.mark.parametrize("name", GROUPS)
def test_two_lanes_are_kept_in_order_and_a_spike_always_and_as_it_is(name):
    x = GROUPS[name]().repeat(1, 20)
    u = draws(x.shape[1])
    i, j, _, _ = reference.mvue(x, u)
    assert bool((i >= 0).all() and (i < j).all() and (j <= 3).all())
    a = x.double().abs()
    spike = a > a.sum(0) - a + 1e-5 * a.sum(0)
    s = pruned(x, u)
    assert torch.equal(s[spike], x[spike])
    assert bool((s[x == 0] == 0).all()) and bool(((s == 0) | (s.sign() == x.sign())).all())


def test_groups_of_two_or_fewer_are_kept_exactly():
    u = draws(1000)
    for n in range(3):
        for lanes in torch.combinations(torch.arange(4), n) if n else [torch.empty(0, dtype=torch.int64)]:
            for values in ([3.0, 3.0], [-1.0, 2e-9], [5e30, -1.0], [1e-37, 1e-37], [1e-37, -1.0])[: None if n else 1]:
                x = torch.zeros(4)
                x[lanes] = torch.tensor(values[:n])
                s = pruned(x[:, None].expand(4, 1000).contiguous(), u)
                assert torch.equal(s, x[:, None].expand_as(s)), (x, u[(s != x[:, None]).any(0)])


@pytest.mark.parametrize("bad", [[INF], [-INF], [NAN], [INF, -INF], [NAN, INF], [3e38, 3e38, 3e38]])
def test_what_is_not_finite_stays_so(bad):
    x = torch.randn(4, 64)
    for lane, value in enumerate(bad):
        x[lane, 7] = value
    i, j, vi, vj = reference.mvue(x, torch.rand(64))
    assert not (vi[7].isfinite() and vj[7].isfinite()) and bool((i < j).all())
    keep = torch.arange(64) != 7
    assert bool(vi[keep].isfinite().all() and vj[keep].isfinite().all())


# ------------------------------------------------------------------------------------------------------------ uniforms


def test_uniforms_are_uniform():
    n = 1 << 20
    for seed in (0, 1, -1, 2**40, -(2**63)):
        u = reference.uniform(torch.tensor([seed]), n)
        assert u.dtype == torch.float32 and float(u.min()) >= 0 and float(u.max()) < 1
        assert torch.equal(u * 2**24, (u * 2**24).round())
        assert abs(float(u.double().mean()) - 0.5) < 5 * (1 / 12 / n) ** 0.5
        counts = torch.histc(u, 256, 0, 1)
        chi2 = float(((counts - n / 256).square() / (n / 256)).sum())
        assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5


def test_neighbouring_seeds_and_positions_are_unrelated():
    n = 1 << 18

    def draw(seed):
        return reference.uniform(torch.tensor([seed]), n).double() - 0.5

    base, bound = draw(1234), 5 / 12 / n**0.5
    for other in (1235, 1234 + (1 << 32), 1234 ^ (1 << 31), 0, -1234):
        assert abs(float((base * draw(other)).mean())) < bound
    for shift in (1, 2, 3, 4, 64, 4096):
        assert abs(float((base[shift:] * base[:-shift]).mean())) < bound


@pytest.mark.parametrize("other", [6, 4, 5 + 2**31, 5 + 2**32, -5])
def test_no_two_seeds_draw_the_same_numbers_in_another_order(other):
    n = 1 << 12
    a, b = (reference.uniform(torch.tensor([seed]), n) for seed in (5, other))
    assert int(torch.isin(a, b).sum()) < 16  # of 2^24 numbers, 4096 and 4096 drawn at random share one


# ------------------------------------------------------------------------------------------------------------- packing


def unpacked(packed, tokens, features, order):
    return layout.unpack(packed.cpu(), features, reference.padded(tokens), order)[:, :tokens].t()


def test_the_packed_gradient_is_unbiased_over_seeds(impl):
    """Each entry's mean lies within its predicted error."""
    n = 400 if impl.module is reference else 60
    dy = torch.randn(64, 64).pow(3).to(impl.device)
    seeds = torch.arange(n, device=impl.device)
    total = torch.zeros(64, 64, dtype=torch.float64)
    for k in range(n):
        total += unpacked(impl.pack_gradient(dy, seeds, k), 64, 64, impl.order).double()
    groups = dy.cpu().view(16, 4, 64).transpose(0, 1)
    error, spread, p = (
        x.transpose(0, 1).reshape(64, 64)
        for x in (
            (total / n - dy.cpu().double()).view(16, 4, 64).transpose(0, 1),
            variance(groups) / n,
            probabilities(groups),
        )
    )
    always = p > 1 - 1e-6
    assert float(error[always].abs().max()) < 1e-5 * float(dy.abs().max())
    often = (p > 0.1) & (p < 0.95)  # enough draws either way for the error to be nearly normal
    z = error[often] / spread[often].sqrt()
    assert abs(float(z.mean())) < 5 / z.numel() ** 0.5
    assert 0.85 < float(z.square().mean()) < 1.15
    assert float(z.abs().max()) < 6


@pytest.mark.parametrize("tokens", [1, 3, 4, 63, 64, 65, 130])
def test_groups_run_along_tokens_and_the_padding_is_empty(impl, poisoned, tokens):
    dy = torch.randn(tokens, 64)
    packed = impl.pack_gradient(dy.to(impl.device), torch.tensor([3], device=impl.device), 0)
    padded = reference.padded(tokens)
    assert packed.shape == (layout.numel(64, padded, torch.float32),) and padded % 64 == 0
    assert layout.with_room(packed, 64, padded) is packed
    assert not packed[: 32 * padded].isnan().any()
    dense = layout.unpack(packed.cpu(), 64, padded, impl.order)
    assert not dense[:, tokens:].any()
    assert int((dense.view(64, -1, 4) != 0).sum(-1).max()) <= 2
    if tokens % 4 in (1, 2):  # a last group of at most two is kept as it is
        assert torch.equal(dense[:, tokens - tokens % 4 : tokens], dy[tokens - tokens % 4 :].t())


def test_no_tokens_make_an_empty_gradient(impl):
    packed = impl.pack_gradient(torch.empty(0, 64, device=impl.device), torch.tensor([3], device=impl.device), 0)
    assert packed.shape == (0,)


def test_a_draw_is_a_function_of_its_seed(impl):
    dy = torch.randn(64, 64, device=impl.device)
    seeds = torch.tensor([5, 6, 5, 5 + 2**32], device=impl.device)
    draws = [impl.pack_gradient(dy, seeds, k).view(torch.uint8) for k in range(4)]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[3])


def test_the_errors_of_two_seeds_are_unrelated():
    dy = torch.randn(1024, 256)
    seeds = torch.tensor([5, 6])
    a, b = (unpacked(reference.pack_gradient(dy, seeds, k), 1024, 256, "sm_90") - dy for k in range(2))
    r = float((a * b).sum() / (a.norm() * b.norm()))
    assert abs(r) < 5 / dy.numel() ** 0.5


@settings(max_examples=30, deadline=None)
@given(group=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 3.0, 1e-36, 1e30, -1e-30]), min_size=4, max_size=4))
def test_what_is_kept_has_the_sum_of_magnitudes_of_the_group(group):
    x = torch.tensor(group)
    s = pruned(x[:, None].expand(4, 64).contiguous(), (torch.arange(64) + 0.5) / 64.0).double()
    torch.testing.assert_close(s.abs().sum(0), x.double().abs().sum().expand(64), rtol=1e-6, atol=0.0)
