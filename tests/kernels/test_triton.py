"""The Triton kernels against their twins: the same bytes where something is decided, whatever the numbers are."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sparse24.kernels import layout, reference

triton = pytest.importorskip("triton")
tl = triton.language

from sparse24.kernels import triton_common  # noqa: E402

from ..packing import masked_decay_, pack_weight_  # noqa: E402

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1.0,
    2.0,
    -0.5,
    3.0,
    INF,
    -INF,
    NAN,
    2.0**-149,
    -(2.0**-133),
    3e38,
    -2e38,
    1e-30,
    6e4,
    2.0**123,
]
FEW = settings(
    max_examples=3,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # to shrink an example takes minutes under the interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def special(rows, cols, seed, share):
    """Gaussian numbers of many magnitudes, `share` of them replaced by special ones."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=g).pow(3)
    chosen = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), x.shape, generator=g)]
    return torch.where(torch.rand(x.shape, generator=g) < share, chosen, x)


@triton.jit
def address_kernel(m, c, byte, shift, rows, cols, ORDER: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    b, s = triton_common.nibble_address(tl.load(m + i), tl.load(c + i), rows, cols, ORDER)
    tl.store(byte + i, b)
    tl.store(shift + i, s)


@pytest.mark.parametrize("order", ["sm_90", "sm_80"])
def test_nibble_addresses(device, order):
    for rows, cols in ((256, 64), (128, 512), (1 << 20, 1 << 17)):  # the last is beyond 32 bits
        m, c = torch.randint(rows, (1024,)), torch.randint(cols // 4, (1024,))
        byte, shift = torch.full((1024,), -1, device=device), torch.full((1024,), -1, device=device)
        address_kernel[(1,)](m.to(device), c.to(device), byte, shift, rows, cols, ORDER=order, N=1024)
        expected = layout.nibble_address(m, c, rows, cols, order)
        assert torch.equal(byte.cpu(), expected[0]) and torch.equal(shift.cpu(), expected[1])


@triton.jit
def uniform_kernel(seed, position, u, N: tl.constexpr):
    i = tl.arange(0, N)
    keys = triton_common.keys_of(tl.load(seed))
    tl.store(u + i, triton_common.uniform(keys, tl.load(position + i).to(tl.uint32)))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63), 2**32 - 1])
def test_uniforms(device, seed):
    position, u = torch.arange(1024), torch.full((1024,), NAN, device=device)
    uniform_kernel[(1,)](torch.tensor([seed], device=device), position.to(device), u, N=1024, enable_fp_fusion=False)
    assert torch.equal(u.cpu(), reference.uniform(torch.tensor([seed]), 1024))


@triton.jit
def mvue_kernel(x, u, nibble, first, last, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    x0, x1, x2, x3 = tl.load(x + i), tl.load(x + n + i), tl.load(x + 2 * n + i), tl.load(x + 3 * n + i)
    k, a, b = triton_common.mvue(x0, x1, x2, x3, tl.load(u + i))
    tl.store(nibble + i, k)
    tl.store(first + i, a)
    tl.store(last + i, b)


def test_mvue_at_every_boundary(device):
    """All groups of a few magnitudes, at uniforms that hit the ends of lanes, and the extremes."""
    values = torch.tensor([0.0, 1.0, -1.0, 3.0, 2.0**-24, 1e30, 2.0**-149, INF, NAN, 1.0000001])
    groups = torch.cartesian_prod(values, values, values, values).t()
    u = torch.tensor([0.0, 0.25, 1 / 3, 0.5, 0.99999, 1 - 2.0**-24])
    x = groups.repeat_interleave(len(u), 1)
    u = u.repeat(groups.shape[1])
    short = -x.shape[1] % 1024
    x, u = torch.nn.functional.pad(x, (0, short)).contiguous(), torch.nn.functional.pad(u, (0, short))
    n = u.numel()
    nibble, first, last = (torch.full((n,), p, device=device) for p in (-1, NAN, NAN))
    mvue_kernel[(n // 1024,)](x.to(device), u.to(device), nibble, first, last, n, N=1024, enable_fp_fusion=False)
    i, j, vi, vj = reference.mvue(x, u)
    assert torch.equal(nibble.cpu(), i | j << 2)
    for found, expected in ((first.cpu(), vi), (last.cpu(), vj)):
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(0.0).view(torch.int32), expected.nan_to_num(0.0).view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128), (63, 128), (130, 256)])
def test_pack_gradient(fast, device, order, same_packed, shape, dtype):
    dy, seeds = special(*shape, 0, 0.1).to(dtype), torch.tensor([3, -(2**61) + 9])
    found = fast.pack_gradient(dy.to(device), seeds.to(device), 1)
    same_packed(found, reference.pack_gradient(dy, seeds, 1), shape[1], reference.padded(shape[0]))


@FEW
@given(
    tokens=st.integers(1, 70),
    seed=st.integers(-(2**63), 2**63 - 1),
    share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_pack_gradient_of_anything(fast, device, same_packed, tokens, seed, share, dtype):
    dy, seeds = special(tokens, 64, seed % 2**32, share).to(dtype), torch.tensor([seed])
    found = fast.pack_gradient(dy.to(device), seeds.to(device), 0)
    same_packed(found, reference.pack_gradient(dy, seeds, 0), 64, reference.padded(tokens))


def test_pack_gradient_of_views(fast, device, same_packed):
    base, seeds = torch.randn(130, 192), torch.tensor([3])
    for dy in (base[:, 64:128], base[1:66, :64], base[::2, 128:], base.t()[:64, :128], base[:1, :64].expand(70, 64)):
        found = fast.pack_gradient(dy.to(device), seeds.to(device), 0)
        expected = reference.pack_gradient(dy.contiguous(), seeds, 0)
        same_packed(found, expected, dy.shape[1], reference.padded(dy.shape[0]))


def pair(poisoned, rows, cols, dtype, device):
    buffers = [poisoned(rows, cols, dtype, device), poisoned(cols, rows, dtype, device)]
    return *buffers, torch.full((2,), -1, device=device)


@FEW
@given(
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    master=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
)
def test_pack_weight_of_anything(fast, device, poisoned, same_packed, seed, share, master, dtype, transposed):
    w = special(64, 64, seed, share).to(master)
    w = w.t() if transposed else w
    found, expected = pair(poisoned, 128, 192, dtype, device), pair(poisoned, 128, 192, dtype, "cpu")
    for source, search in ((w, True), (w.neg().flip(0), True), (w, False)):
        pack_weight_(fast, source.to(device), *found, 64, 128, 128, 192, search)
        pack_weight_(reference, source, *expected, 64, 128, 128, 192, search)
        same_packed(found[0], expected[0], 128, 192)
        same_packed(found[1], expected[1], 192, 128)
        assert found[2].tolist() == expected[2].tolist()


def test_pack_weight_in_both_orders(fast, device, order, poisoned, same_packed):
    w = torch.randn(128, 128)
    found, expected = pair(poisoned, 256, 128, torch.bfloat16, device), pair(poisoned, 256, 128, torch.bfloat16, "cpu")
    for row, source, search in ((0, w, True), (128, w.t(), True), (0, -2 * w.t(), False)):
        pack_weight_(fast, source.to(device), *found, row, 0, 256, 128, search)
        pack_weight_(reference, source, *expected, row, 0, 256, 128, search)
    same_packed(found[0], expected[0], 256, 128)
    same_packed(found[1], expected[1], 128, 256)
    grad = torch.randn(128, 128)
    found_grad = grad.clone().to(device)
    masked_decay_(fast, found_grad, w.to(device), found[0], 128, 0, 256, 128, 0.1)
    masked_decay_(reference, grad, w, expected[0], 128, 0, 256, 128, 0.1)
    assert torch.equal(found_grad.cpu(), grad)


@pytest.mark.parametrize("master", DTYPES[:2])
def test_pack_weight_in_strips_of_unequal_length(fast, device, poisoned, same_packed, monkeypatch, master):
    """Programs of three tiles and of one; the last ones are halved."""
    from sparse24.kernels import triton_pack

    monkeypatch.setattr(triton_pack, "_STRIP", 3)
    monkeypatch.setattr(triton_pack, "_HALVED", 2)
    w = special(128, 256, 3, 0.02).to(master)
    found, expected = pair(poisoned, 128, 256, torch.bfloat16, device), pair(poisoned, 128, 256, torch.bfloat16, "cpu")
    for source, search in ((w, True), (w.neg(), False)):
        pack_weight_(fast, source.to(device), *found, 0, 0, 128, 256, search)
        pack_weight_(reference, source, *expected, 0, 0, 128, 256, search)
        same_packed(found[0], expected[0], 128, 256)
        same_packed(found[1], expected[1], 256, 128)
        assert found[2].tolist() == expected[2].tolist()


def test_many_ties(fast, device, poisoned, same_packed):
    w = torch.randint(-2, 3, (128, 128)).float()
    found, expected = pair(poisoned, 128, 128, torch.float32, device), pair(poisoned, 128, 128, torch.float32, "cpu")
    pack_weight_(fast, w.to(device), *found, 0, 0, 128, 128, True)
    pack_weight_(reference, w, *expected, 0, 0, 128, 128, True)
    same_packed(found[0], expected[0], 128, 128)


@FEW
@given(
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from([0.0, 0.3]),
    master=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    decay=st.sampled_from([1e-4, -0.3, 0.1, 0.0, 1e30]),
)
def test_masked_decay_of_anything(fast, device, seed, share, master, dtype, decay):
    w, grad = special(64, 64, seed, share).to(master), special(64, 64, seed + 1, share).to(dtype)
    packed = layout.pack(w, reference.best_mask(w), "sm_90")
    found = grad.clone().to(device)
    masked_decay_(fast, found, w.to(device), packed.to(device), 0, 0, 64, 64, decay)
    masked_decay_(reference, grad, w, packed, 0, 0, 64, 64, decay)
    torch.testing.assert_close(found.cpu(), grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", reference.KINDS)
def test_glu_backward_pack(fast, device, same_packed, kind, dtype):
    gate_up, bias, seeds = (2 * torch.randn(67, 128)).to(dtype), torch.randn(128).to(dtype), torch.tensor([1, -2])
    dh = torch.randn(67, 64 if kind in reference.GATED else 128).to(dtype)
    args = dh.to(device), gate_up.to(device), bias.to(device), kind
    d, packed, sums = fast.glu_backward_pack(*args, seeds.to(device), 1)
    torch.testing.assert_close(sums, fast.glu_backward(*args)[1], rtol=1e-5, atol=1e-4)
    assert torch.equal(d, fast.glu_backward(*args)[0])
    same_packed(packed, reference.pack_gradient(d.cpu(), seeds, 1), 128, 128)
    expected, _ = reference.glu_backward(dh, gate_up, bias, kind)
    torch.testing.assert_close(d.cpu(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize(("kind", "width"), [("reglu", 256), ("reglu", 64), ("relu", 128)])
def test_glu_backward_pack_with_rest_rows_and_an_infinite_bias(fast, device, same_packed, kind, width):
    """The rows past the last token are zero in the packed form; width 64 takes the way around."""
    gate_up, bias, seeds = torch.randn(5, width), torch.randn(width), torch.tensor([4])
    bias[1] = -INF
    dh = torch.randn(5, width // 2 if kind in reference.GATED else width)
    d, packed, sums = fast.glu_backward_pack(*(x.to(device) for x in (dh, gate_up, bias)), kind, seeds.to(device), 0)
    same_packed(packed, reference.pack_gradient(d.cpu(), seeds, 0), width, 64)
    torch.testing.assert_close(sums.cpu(), d.cpu().sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["swiglu", "relu"])
def test_tiles_in_strips_are_each_taken_once(fast, device, same_packed, kind):
    """Several strips in a row of tiles, the last one shorter."""
    gate_up, seeds = torch.randn(131, 640), torch.tensor([4])
    dh = torch.randn(131, 320 if kind == "swiglu" else 640)
    d, packed, sums = fast.glu_backward_pack(dh.to(device), gate_up.to(device), None, kind, seeds.to(device), 0)
    assert torch.equal(d, fast.glu_backward(dh.to(device), gate_up.to(device), None, kind)[0]) and len(sums) == 0
    expected = reference.pack_gradient(d.cpu(), seeds, 0)
    same_packed(packed, expected, 640, 192)
    same_packed(fast.pack_gradient(d, seeds.to(device), 0), expected, 640, 192)


def test_glu_backward_pack_in_both_orders(fast, device, order, same_packed):
    gate_up, dh, seeds = torch.randn(64, 256), torch.randn(64, 128), torch.tensor([4])
    d, packed, _ = fast.glu_backward_pack(dh.to(device), gate_up.to(device), None, "swiglu", seeds.to(device), 0)
    same_packed(packed, reference.pack_gradient(d.cpu(), seeds, 0), 256, 64)


def test_nothing_makes_nothing(fast, device, poisoned):
    seeds = torch.tensor([4], device=device)
    d, packed, _ = fast.glu_backward_pack(
        torch.empty(0, 64, device=device), torch.empty(0, 128, device=device), None, "swiglu", seeds, 0
    )
    assert d.shape == (0, 128) and packed.shape == (0,)
    assert fast.pack_gradient(torch.empty(64, 0, device=device), seeds, 0).shape == (0,)
    assert fast.glu(torch.empty(3, 0, device=device), None, "swiglu").shape == (3, 0)
    packed, packed_t, stats = pair(poisoned, 64, 64, torch.float32, device)
    pack_weight_(fast, torch.empty(0, 64, device=device), packed, packed_t, stats, 0, 0, 64, 64, True)
    assert packed.isnan()[:2048].all() and stats.tolist() == [0, 0]


def test_errors_say_what_was_found_and_what_is_needed(fast, device, poisoned):
    packed, packed_t, stats = pair(poisoned, 64, 128, torch.bfloat16, device)
    w, seeds = torch.randn(64, 128, device=device), torch.tensor([4], device=device)
    with pytest.raises(ValueError, match=r"found a 64x128 block at \(64, 0\) of a 64x128 matrix, need one inside it"):
        pack_weight_(fast, w, packed, packed_t, stats, 64, 0, 64, 128, True)
    with pytest.raises(ValueError, match=r"found a 32x128 block at \(0, 0\)"):
        pack_weight_(fast, w[:32], packed, packed_t, stats, 0, 0, 64, 128, True)
    with pytest.raises(ValueError, match="found a packed buffer of shape"):
        pack_weight_(fast, w, packed, packed_t[:-1], stats, 0, 0, 64, 128, True)
    with pytest.raises(ValueError, match="found w of torch.int64, need float32, bfloat16 or float16"):
        pack_weight_(fast, w.long(), packed, packed_t, stats, 0, 0, 64, 128, True)
    with pytest.raises(ValueError, match=r"found grad \(64, 64\) and w \(64, 128\), need one shape"):
        masked_decay_(fast, w[:, :64], w, packed, 0, 0, 64, 128, 0.1)
    for wrong in (
        lambda: pack_weight_(fast, w.to("meta"), packed, packed_t, stats, 0, 0, 64, 128, True),
        lambda: masked_decay_(fast, w.to("meta"), w, packed, 0, 0, 64, 128, 0.1),
    ):
        with pytest.raises(ValueError, match="found a weight or gradient on meta and its packed form on"):
            wrong()
    with pytest.raises(ValueError, match="found a 100x64 matrix, need rows in multiples of 64"):
        fast.pack_gradient(torch.randn(8, 100, device=device), seeds, 0)
    with pytest.raises(ValueError, match="found index 1 of seeds"):
        fast.pack_gradient(w, seeds, 1)
