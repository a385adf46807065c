"""The transposable mask, packing a weight by it, and the decay on what it prunes. `impl` is the twin, then Triton."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse24.kernels import layout, reference

from ..packing import masked_decay_, pack_weight_

INF, NAN, TINY = float("inf"), float("nan"), 2.0**-126
ROWS = [torch.tensor([i in pair for i in range(4)]) for pair in layout.PAIRS]
PATTERNS = torch.stack([m for m in map(torch.stack, product(ROWS, repeat=4)) if bool((m.sum(0) == 2).all())])


def best_score(w):
    """float64 [rows / 4, cols / 4]: the largest sum of magnitudes that any of the 90 patterns keeps."""
    return torch.einsum("rict,pit->rcp", tiles(w).abs(), PATTERNS.double()).amax(-1)


def score(w, mask):
    return (tiles(w).abs() * tiles(mask)).sum((1, 3))


def tiles(x):
    return x.double().view(x.shape[0] // 4, 4, -1, 4)


def assert_transposable(mask):
    assert bool((tiles(mask).sum(1) == 2).all()) and bool((tiles(mask).sum(3) == 2).all())


def test_there_are_ninety_patterns():
    assert PATTERNS.shape == (90, 4, 4)


@pytest.mark.parametrize("power", [1, 5])
def test_no_pattern_keeps_more_of_random_weights(power):
    w = torch.randn(256, 256).pow(power)
    mask = reference.best_mask(w)
    assert_transposable(mask)
    torch.testing.assert_close(score(w, mask), best_score(w), rtol=2.0**-17, atol=0.0)  # entries are compared rounded


def test_bf16_entries_are_compared_as_they_are():
    w = torch.rand(256, 256).add(0.01).bfloat16()  # their 8 bits, within 2^-11 of the largest
    assert torch.equal(score(w, reference.best_mask(w)), best_score(w))


def test_of_equal_sums_the_largest_bits_win():
    """The definition once more: the sum of keys over each of the 90 patterns."""
    w = torch.randint(-3, 4, (64, 64)).float()
    keys = torch.stack([torch.stack(row) for row in reference.keys(w)]).long()  # [4, 4, tiles down, tiles across]
    sums = torch.einsum("rcij,prc->pij", keys, PATTERNS.long())
    assert int((sums == sums.amax(0)).sum()) == sums[0].numel()  # no two are equal
    best = PATTERNS[sums.argmax(0)].permute(0, 2, 1, 3).reshape(64, 64)
    assert torch.equal(reference.best_mask(w), best)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([0, 0, 1, 1, -1, 2, 3, 7, -8]), min_size=64, max_size=64),
    scale=st.sampled_from([1, TINY]),
)
def test_no_pattern_keeps_more_where_many_tie(values, scale):
    w = torch.tensor(values, dtype=torch.float32).view(4, 16) * scale  # every sum is exact
    mask = reference.best_mask(w)
    assert_transposable(mask)
    assert torch.equal(score(w, mask), best_score(w))


@pytest.mark.parametrize("entry", [INF, -INF, NAN, 2.0**121, -(2.0**127)])
def test_a_tile_with_an_entry_that_is_no_usual_number_is_taken_for_equal_entries(entry):
    w = torch.randn(4, 8)
    expected = torch.cat([reference.best_mask(torch.zeros(4, 4)), reference.best_mask(w[:, 4:])], dim=1)
    w[1, 2] = entry
    assert torch.equal(reference.best_mask(w), expected)


def test_entries_below_that_are_told_apart():
    w = torch.randn(64, 64)
    w *= 2.0**121 / w.abs().amax()
    w.clamp_(-(2.0**121) * (1 - 2.0**-24), 2.0**121 * (1 - 2.0**-24))
    torch.testing.assert_close(score(w, reference.best_mask(w)), best_score(w), rtol=2.0**-17, atol=0.0)


def test_the_mask_of_equal_entries_is_one_and_the_same():
    first = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    for w in (torch.zeros(4, 4), torch.ones(4, 4), torch.full((4, 4), -INF), torch.full((4, 4), NAN)):
        assert torch.equal(reference.best_mask(w), first)


def test_the_mask_is_a_function_of_the_weight():
    w = torch.randn(64, 64).bfloat16()
    assert torch.equal(reference.best_mask(w), reference.best_mask(w.clone()))
    assert torch.equal(reference.best_mask(w), reference.best_mask(-w))
    assert torch.equal(reference.best_mask(w.float()), reference.best_mask(w))


def test_a_nan_leaves_a_legal_mask_and_the_other_tiles_alone():
    w = torch.randn(64, 64)
    mask = reference.best_mask(w)
    w[5, 6] = NAN
    found = reference.best_mask(w)
    assert_transposable(found)
    mask[4:8, 4:8] = found[4:8, 4:8]
    assert torch.equal(found, mask)


def test_the_share_kept_of_gaussian_weights_is_the_known_one():
    a = torch.randn(512, 512).abs()
    kept = float((a * reference.best_mask(a)).sum() / a.sum())
    by_row = float(a.view(-1, 4).sort(-1).values[:, 2:].sum() / a.sum())
    assert abs(kept - 0.7025) < 0.003  # a greedy choice of the largest in each tile: 0.695
    assert abs(by_row - 0.7445) < 0.003


# ------------------------------------------------------------------------------------------------------------- packing


def packed_pair(rows, cols, dtype, device, poisoned):
    return poisoned(rows, cols, dtype, device), poisoned(cols, rows, dtype, device), torch.full((2,), -1, device=device)


def dense(packed, packed_t, rows, cols, order):
    """What the two buffers hold, which must be one matrix."""
    w = layout.unpack(packed, rows, cols, order)
    assert torch.equal(w, layout.unpack(packed_t, cols, rows, order).t())
    return w.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_both_packed_forms_hold_the_masked_weight(impl, poisoned, master, dtype):
    w = torch.randn(128, 64).to(master)
    buffers = packed_pair(128, 64, dtype, impl.device, poisoned)
    pack_weight_(impl, w.to(impl.device), *buffers, 0, 0, 128, 64, True)
    assert torch.equal(dense(*buffers[:2], 128, 64, impl.order), (w * reference.best_mask(w)).to(dtype))


def test_two_weights_in_one_operand_pack_like_their_concatenation(impl, poisoned):
    gate, up = torch.randn(64, 64), torch.randn(128, 64)
    apart = packed_pair(192, 64, torch.bfloat16, impl.device, poisoned)
    whole = packed_pair(192, 64, torch.bfloat16, impl.device, poisoned)
    pack_weight_(impl, gate.to(impl.device), *apart, 0, 0, 192, 64, True)
    pack_weight_(impl, up.to(impl.device), *apart, 64, 0, 192, 64, True)
    pack_weight_(impl, torch.cat((gate, up)).to(impl.device), *whole, 0, 0, 192, 64, True)
    for found, expected in zip(apart[:2], whole[:2], strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_a_block_leaves_the_rest_of_the_operand_alone(impl, poisoned):
    packed, packed_t, stats = packed_pair(192, 256, torch.bfloat16, impl.device, poisoned)
    before = packed.clone(), packed_t.clone()
    w = torch.randn(64, 128, device=impl.device)
    pack_weight_(impl, w, packed, packed_t, stats, 128, 64, 192, 256, True)
    for found, old, (rows, cols), (row, col, r, c) in [
        (packed, before[0], (192, 256), (128, 64, 64, 128)),
        (packed_t, before[1], (256, 192), (64, 128, 128, 64)),
    ]:
        (values, metadata), (old_values, old_metadata) = layout.split(found, rows, cols), layout.split(old, rows, cols)
        nibbles = layout.read_nibbles(metadata, rows, cols, impl.order)
        old_nibbles = layout.read_nibbles(old_metadata, rows, cols, impl.order)
        assert not values[row : row + r, col // 2 : (col + c) // 2].isnan().any()
        values[row : row + r, col // 2 : (col + c) // 2] = old_values[0, 0]
        nibbles[row : row + r, col // 4 : (col + c) // 4] = old_nibbles[row : row + r, col // 4 : (col + c) // 4]
        assert values.isnan().all() and torch.equal(nibbles, old_nibbles)


def test_a_frozen_mask_stays_and_the_values_follow(impl, poisoned):
    w, later = torch.randn(64, 128), torch.randn(64, 128)
    packed, packed_t, stats = packed_pair(64, 128, torch.bfloat16, impl.device, poisoned)
    pack_weight_(impl, w.to(impl.device), packed, packed_t, stats, 0, 0, 64, 128, True)
    pack_weight_(impl, later.to(impl.device), packed, packed_t, stats, 0, 0, 64, 128, False)
    assert torch.equal(dense(packed, packed_t, 64, 128, impl.order), (later * reference.best_mask(w)).bfloat16())
    assert stats.tolist() == [0, 0]


def test_flips_are_the_mask_bits_that_changed(impl, poisoned):
    w, later = torch.randn(128, 64), torch.randn(128, 64)
    packed, packed_t, stats = packed_pair(192, 64, torch.bfloat16, impl.device, poisoned)
    pack_weight_(impl, w.to(impl.device), packed, packed_t, stats, 64, 0, 192, 64, True)
    pack_weight_(impl, w.to(impl.device), packed, packed_t, stats, 64, 0, 192, 64, True)
    assert stats.tolist() == [0, 0]
    pack_weight_(impl, later.to(impl.device), packed, packed_t, stats, 64, 0, 192, 64, True)
    flips = int((reference.best_mask(w) ^ reference.best_mask(later)).sum())
    assert stats.tolist() == [flips, 0]
    assert abs(flips / w.numel() - 0.5) < 0.05  # unrelated masks


@pytest.mark.parametrize("search", [True, False])
def test_nan_is_counted_and_infinity_is_not(impl, poisoned, search):
    w = torch.randn(64, 128)
    packed, packed_t, stats = packed_pair(64, 128, torch.bfloat16, impl.device, poisoned)
    pack_weight_(impl, w.to(impl.device), packed, packed_t, stats, 0, 0, 64, 128, True)
    w[3, 70:73], w[63, 127], w[0, 0], w[0, 1] = NAN, NAN, INF, -INF
    pack_weight_(impl, w.to(impl.device), packed, packed_t, stats, 0, 0, 64, 128, search)
    assert int(stats[1]) == 4
    dense(packed.nan_to_num(7.0), packed_t.nan_to_num(7.0), 64, 128, impl.order)
    assert_transposable(layout.read_mask(packed, 64, 128, impl.order).cpu())


@pytest.mark.parametrize("view", ["transposed", "row_slice", "every_other"])
def test_a_weight_may_have_any_strides(impl, poisoned, view):
    base = torch.randn(64, 128, device=impl.device)
    w = {"transposed": base.t(), "row_slice": base[:, 64:], "every_other": base[:, ::2]}[view]
    rows, cols = w.shape
    found = packed_pair(rows, cols, torch.float16, impl.device, poisoned)
    expected = packed_pair(rows, cols, torch.float16, impl.device, poisoned)
    for search in (True, False):
        for buffers, source in ((found, w), (expected, w.contiguous())):
            pack_weight_(impl, source, *buffers, 0, 0, rows, cols, search)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        w.mul_(-2.0)


# --------------------------------------------------------------------------------------------------------------- decay


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decay_pulls_on_what_is_pruned_and_nothing_else(impl, poisoned, dtype, grad_dtype):
    w, grad = torch.randn(64, 128).to(dtype), torch.randn(64, 128).to(grad_dtype)
    packed, packed_t, stats = packed_pair(192, 256, torch.bfloat16, impl.device, poisoned)
    pack_weight_(impl, w.to(impl.device), packed, packed_t, stats, 64, 128, 192, 256, True)
    mask, found = reference.best_mask(w), grad.clone().to(impl.device)
    masked_decay_(impl, found, w.to(impl.device), packed, 64, 128, 192, 256, 0.3)
    found = found.cpu()
    assert torch.equal(found[mask], grad[mask])
    expected = grad.double() + 0.3 * w.double()
    torch.testing.assert_close(found[~mask].double(), expected[~mask], rtol=2 * torch.finfo(grad_dtype).eps, atol=1e-6)


def test_decay_may_act_on_the_weight_itself(impl, poisoned):
    w = torch.randn(64, 64)
    packed, packed_t, stats = packed_pair(64, 64, torch.bfloat16, impl.device, poisoned)
    found = w.clone().to(impl.device)
    pack_weight_(impl, found, packed, packed_t, stats, 0, 0, 64, 64, True)
    masked_decay_(impl, found, found, packed, 0, 0, 64, 64, -0.25)
    assert torch.equal(found.cpu(), torch.where(reference.best_mask(w), w, w - 0.25 * w))


@pytest.mark.parametrize("transposed", [(True, True), (True, False), (False, True)])
def test_decay_takes_any_strides(impl, poisoned, transposed):
    w, grad = torch.randn(64, 128, device=impl.device), torch.randn(64, 128, device=impl.device)
    packed, packed_t, stats = packed_pair(64, 128, torch.bfloat16, impl.device, poisoned)
    pack_weight_(impl, w, packed, packed_t, stats, 0, 0, 64, 128, True)
    w_, grad_ = (x.t().contiguous().t() if t else x.clone() for x, t in zip((w, grad), transposed, strict=True))
    expected = grad.clone()
    masked_decay_(impl, expected, w, packed, 0, 0, 64, 128, 0.5)
    masked_decay_(impl, grad_, w_, packed, 0, 0, 64, 128, 0.5)
    assert torch.equal(grad_, expected)


def test_many_weights_at_once_are_packed_and_decayed_as_one_by_one(impl, poisoned):
    """Of several dtypes, strides, and places in shared buffers."""
    device, halves = impl.device, (torch.bfloat16, torch.float16)
    gate, up, wide = torch.randn(64, 128), torch.randn(64, 128).bfloat16(), torch.randn(64, 128).t()
    weights = [w.to(device) for w in (gate, up, wide, torch.randn(64, 64))]
    outcomes = []
    for together in (True, False):
        merged = poisoned(128, 128, halves[0], device), poisoned(128, 128, halves[0], device)
        alone = poisoned(128, 64, halves[1], device), poisoned(64, 128, halves[1], device)
        small = poisoned(64, 64, halves[0], device), poisoned(64, 64, halves[0], device)
        blocks = [
            layout.Block(weights[0], *merged, 0, 0, 128, 128),
            layout.Block(weights[1], *merged, 64, 0, 128, 128),
            layout.Block(weights[2], *alone, 0, 0, 128, 64),
            layout.Block(weights[3], *small, 0, 0, 64, 64),
        ]
        flipped = [b._replace(w=b.w.neg().flip(0)) for b in blocks]
        grads = [torch.ones_like(w) for w in weights]
        parts = [slice(0, 4)] if together else [slice(i, i + 1) for i in range(4)]
        found = []
        for now, search in ((blocks, True), (flipped, False)):
            stats = torch.cat([impl.pack_weights_(now[part], search) for part in parts])
            found += [stats, *(x.clone() for x in (*merged, *alone, *small))]
            assert bool(stats[:, 0].all()) == search
        for part in parts:
            impl.masked_decay_(grads[part], blocks[part], 0.5)
        outcomes.append([*found, *grads])
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
