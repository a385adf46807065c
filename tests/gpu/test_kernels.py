"""The kernels on a GPU against their twins on the CPU (the same bytes), and the format against cuSPARSELt itself."""

import pytest
import torch

from sparse24.kernels import cusparselt, layout, ops, reference
from sparse24.kernels.providers import PROVIDERS, CusparseLt, Problem

from ..packing import masked_decay_, pack_weight_

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
GPU = torch.device("cuda")


@pytest.fixture
def order(monkeypatch):
    """The order of this GPU's metadata, made that of the CPU's twins too."""
    order = layout.metadata_order(GPU)
    monkeypatch.setattr(layout, "metadata_order", lambda device: order)
    return order


def assert_same_packed(found, expected, rows, cols):
    """The same bytes; the payload of a NaN and the sign of a zero may differ."""
    (values, metadata), (values_, metadata_) = (layout.split(x.cpu(), rows, cols) for x in (found, expected))
    assert torch.equal(metadata, metadata_)
    both = (values.isnan() & values_.isnan()) | ((values == 0) & (values_ == 0))
    bits = torch.int32 if values.dtype.itemsize == 4 else torch.int16
    assert torch.equal(values.view(bits).masked_fill(both, 0), values_.view(bits).masked_fill(both, 0))


def spread(*shape):
    """Numbers of many magnitudes, with some zeros, ties, infinities and NaN among them."""
    x = torch.randn(shape).pow(3)
    special = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 2.0**-149, 2.0**-133, 3e38]
    )
    return torch.where(torch.rand(shape) < 0.02, special[torch.randint(len(special), shape)], x)


def poisoned(rows, cols, dtype, device):
    return torch.full((layout.numel(rows, cols, dtype),), float("nan"), dtype=dtype, device=device)


# ------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128), (63, 256), (64, 128), (65, 384), (1000, 640), (2048, 1024)])
def test_a_gradient_packs_to_the_bytes_of_the_twin(order, shape, dtype):
    dy, seeds = spread(*shape).to(dtype), torch.tensor([3, -(2**61) + 9])
    found = ops.pack_gradient(dy.to(GPU), seeds.to(GPU), 1)
    assert_same_packed(found, ops.pack_gradient(dy, seeds, 1), shape[1], reference.padded(shape[0]))


def test_no_rounding_of_the_decision_differs(order):
    """Ties, spikes and boundaries, many times over: one contracted u * c + c would show."""
    few = torch.tensor([0.0, 1.0, -1.0, 3.0, 2.0**-24, 1.0000001, 1e30, 2.0**-140])
    dy, seeds = few[torch.randint(len(few), (8192, 512))], torch.tensor([1])
    assert_same_packed(ops.pack_gradient(dy.to(GPU), seeds.to(GPU), 0), ops.pack_gradient(dy, seeds, 0), 512, 8192)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_alone_is_that_of_the_twin(order, dtype):
    w = spread(384, 256).to(dtype)
    for view in (lambda x: x, lambda x: x.t(), lambda x: x[64:192, 128:]):
        assert torch.equal(ops.best_mask(view(w.to(GPU))).cpu(), reference.best_mask(view(w)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("master", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_packs_to_the_bytes_of_the_twin(order, master, dtype, transposed):
    block, (rows, cols) = (256, 640), (512, 768)
    base = spread(*(block[::-1] if transposed else block)).to(master)
    w = base.t() if transposed else base
    found = [poisoned(*size, dtype, GPU) for size in ((rows, cols), (cols, rows))]
    expected = [x.cpu() for x in found]
    stats, stats_ = torch.full((2,), -1, device=GPU), torch.full((2,), -1)
    for source, search in ((w, True), (w.neg().flip(0), True), (w, False)):
        pack_weight_(ops, source.to(GPU), *found, stats, 128, 128, rows, cols, search)
        pack_weight_(ops, source, *expected, stats_, 128, 128, rows, cols, search)
        assert_same_packed(found[0], expected[0], rows, cols)
        assert_same_packed(found[1], expected[1], cols, rows)
        assert stats.tolist() == stats_.tolist()


def test_the_mask_of_many_ties_is_that_of_the_twin(order):
    w = torch.randint(-2, 3, (1024, 1024)).float()
    found, found_t = (poisoned(1024, 1024, torch.bfloat16, GPU) for _ in range(2))
    pack_weight_(ops, w.to(GPU), found, found_t, torch.zeros(2, dtype=torch.int64, device=GPU), 0, 0, 1024, 1024, True)
    mask = reference.best_mask(w)
    assert_same_packed(found, layout.pack(w.bfloat16(), mask, order), 1024, 1024)
    assert_same_packed(found_t, layout.pack(w.bfloat16().t().contiguous(), mask.t().contiguous(), order), 1024, 1024)


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("master", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_decay_is_that_of_the_twin_to_the_bit(order, master, grad_dtype, transposed):
    w, grad = torch.randn(384, 640).to(master), torch.randn(384, 640).to(grad_dtype)
    packed = layout.pack(torch.randn(512, 768).bfloat16(), reference.best_mask(torch.randn(512, 768)), order)
    found = grad.to(GPU).t().contiguous().t() if transposed else grad.to(GPU)
    masked_decay_(ops, found, w.to(GPU), packed.to(GPU), 128, 128, 512, 768, 3e-4)
    masked_decay_(ops, grad, w, packed, 128, 128, 512, 768, 3e-4)
    assert torch.equal(found.cpu(), grad)


def needs_memory(gib):
    if torch.cuda.get_device_properties(GPU).total_memory < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of GPU memory")


@pytest.mark.xdist_group("memory")  # one after the other
def test_a_gradient_of_more_than_two_to_the_31_entries(order):
    needs_memory(30)
    tokens, features = 2**18, 8320
    dy = torch.randn(tokens, features, dtype=torch.bfloat16, device=GPU)
    packed = ops.pack_gradient(dy, torch.tensor([77], device=GPU), 0)
    last = dy[-64:].cpu().float().view(16, 4, features).transpose(0, 1)
    u = reference.uniform(torch.tensor([77]), 16 * features, (tokens // 4 - 16) * features).view(16, features)
    i, j, vi, vj = reference.mvue(last, u)
    values, metadata = layout.split(packed, features, tokens)
    assert torch.equal(values[:, -32:].cpu(), torch.stack((vi, vj), 1).view(32, features).t().bfloat16())
    m, c = torch.arange(features)[:, None], torch.arange(tokens // 4 - 16, tokens // 4)[None]
    byte, shift = layout.nibble_address(m, c, features, tokens, order)
    assert torch.equal((metadata[byte.to(GPU)].cpu() >> shift) & 15, (i | j << 2).t().to(torch.uint8))


@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_of_more_than_two_to_the_31_entries(order, transposed):
    needs_memory(30)
    rows, cols = 2**15 + 128, 2**16
    w = (
        torch.randn(cols, rows, dtype=torch.bfloat16, device=GPU).t()
        if transposed
        else (torch.randn(rows, cols, dtype=torch.bfloat16, device=GPU))
    )
    packed, packed_t = (torch.empty(layout.numel(rows, cols, w.dtype), dtype=w.dtype, device=GPU) for _ in range(2))
    stats = torch.zeros(2, dtype=torch.int64, device=GPU)
    pack_weight_(ops, w, packed, packed_t, stats, 0, 0, rows, cols, True)
    tile = w[-64:, -64:].cpu()
    mask = reference.best_mask(tile)
    for buffer, size, dense, kept in ((packed, (rows, cols), tile, mask), (packed_t, (cols, rows), tile.t(), mask.t())):
        values, metadata = layout.split(buffer, *size)
        assert torch.equal(values[-64:, -32:].cpu(), dense[kept].view(64, 32))
        m, c = torch.arange(size[0] - 64, size[0])[:, None], torch.arange(size[1] // 4 - 16, size[1] // 4)[None]
        byte, shift = layout.nibble_address(m, c, *size, order)
        nibbles = (metadata[byte.to(GPU)].cpu() >> shift) & 15
        assert torch.equal(nibbles, layout.nibbles_from_mask(kept.contiguous()))
    grad = torch.zeros_like(w)
    masked_decay_(ops, grad, w, packed, 0, 0, rows, cols, 0.5)
    assert torch.equal(grad[-64:, -64:].cpu(), torch.where(mask, 0.0, (0.5 * tile.float()).bfloat16()))


def test_a_replayed_graph_reads_the_seed_anew():
    dy, seeds = torch.randn(256, 256, device=GPU, dtype=torch.bfloat16), torch.tensor([1], device=GPU)
    ops.pack_gradient(dy, seeds, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed = ops.pack_gradient(dy, seeds, 0)
    for seed in (5, 6):
        seeds.fill_(seed)
        graph.replay()
        assert torch.equal(packed.view(torch.uint8), ops.pack_gradient(dy, seeds, 0).view(torch.uint8))


# --------------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("shape", [(1, 128), (131, 384)])
def test_activations_are_those_of_float64_to_rounding(order, kind, biased, dtype, shape):
    tokens, width = shape
    gate_up = (3 * torch.randn(shape)).to(dtype)
    bias = torch.randn(width).to(dtype) if biased else None
    dh = torch.randn(tokens, width // 2 if kind in reference.GATED else width).to(dtype)
    seeds = torch.tensor([4])
    on_gpu = [x if x is None else x.to(GPU) for x in (dh, gate_up, bias)]
    wide = [x if x is None else x.double() for x in (dh, gate_up, bias)]
    h, (d, sums_) = ops.glu(*on_gpu[1:], kind), ops.glu_backward(*on_gpu, kind)
    tolerance = {"rtol": (0.51 if dtype != torch.float32 else 40) * torch.finfo(dtype).eps, "atol": 2e-5}
    torch.testing.assert_close(h.cpu().double(), ops.glu(*wide[1:], kind), **tolerance)
    torch.testing.assert_close(d.cpu().double(), ops.glu_backward(*wide, kind)[0], **tolerance)
    d_, packed, sums = ops.glu_backward_pack(*on_gpu, kind, seeds.to(GPU), 0)
    torch.testing.assert_close(sums, sums_, rtol=1e-5, atol=1e-4)
    if biased:
        torch.testing.assert_close(sums.cpu().double(), d.cpu().double().sum(0), rtol=1e-5, atol=1e-4)
    assert torch.equal(d_, d)
    assert_same_packed(packed, ops.pack_gradient(d.cpu(), seeds, 0), width, reference.padded(tokens))


@pytest.mark.parametrize("kind", reference.KINDS)
def test_activations_of_infinities_are_those_of_the_twin(kind):
    z = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, 3e38, -3e38, 1e4, -1e4, 89.0, -89.0, 1e-40])
    z = z[:, None].expand(11, 2).contiguous()
    dh = torch.ones(11, 1 if kind in reference.GATED else 2)
    h, h_ = ops.glu(z.to(GPU), None, kind).cpu(), ops.glu(z, None, kind)
    d, d_ = ops.glu_backward(dh.to(GPU), z.to(GPU), None, kind)[0].cpu(), ops.glu_backward(dh, z, None, kind)[0]
    for found, expected in ((h, h_), (d, d_)):
        if kind == "gelu":  # far out torch's vectorized code differs from its own scalar code
            found, expected = found[6:], expected[6:]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-36, equal_nan=True)


def test_what_the_compiler_is_told_of_the_kernels_is_true():
    def on_gpu(*args):
        return tuple(x.to(GPU) if isinstance(x, torch.Tensor) else x for x in args)

    gate_up, dh, bias, seeds = torch.randn(70, 256), torch.randn(70, 128), torch.randn(256), torch.tensor([3, 4])
    for name, args in [
        ("pack_gradient", (gate_up, seeds, 1)),
        ("glu", (gate_up, bias, "swiglu")),
        ("glu_backward", (dh, gate_up, None, "swiglu")),
        ("glu_backward_pack", (dh, gate_up, bias, "geglu", seeds, 1)),
    ]:
        torch.library.opcheck(getattr(torch.ops.sparse24, name).default, on_gpu(*args))


# ------------------------------------------------------------------------------------------------------------ matmuls


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "cols"), [(128, 64), (128, 128), (256, 320), (512, 256), (256, 1024), (1024, 4096)])
def test_the_library_compresses_to_our_bytes(order, rows, cols, dtype):
    if not torch.backends.cusparselt.is_available():
        pytest.skip("needs cuSPARSELt")
    w = torch.randn(rows, cols).to(dtype)
    w[w == 0] = 1  # the library takes the nonzero entries
    mask = reference.best_mask(w)
    compressed = torch._cslt_compress((w * mask).to(GPU)).flatten().cpu()
    assert torch.equal(compressed.view(torch.uint8), layout.pack(w, mask, order).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 63, 64, 65, 1000])
@pytest.mark.parametrize("direction", ["spmm", "wgrad"])
@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda p: p.name)
def test_every_provider_multiplies_right(provider, direction, tokens, dtype):
    rows, cols = 256, 384
    order = layout.metadata_order(GPU)
    inner, outer = (cols, tokens) if direction == "spmm" else (reference.padded(tokens), cols)
    problem = Problem(direction, rows, inner, outer, dtype, GPU)
    if not provider.supports(problem):
        pytest.skip("unsupported")
    a = torch.randn(rows, inner).to(dtype)
    mask = reference.best_mask(a)
    packed = layout.pack(a, mask, order).to(GPU)
    x = torch.randn(tokens, cols).to(dtype)
    dense = (a * mask).double()
    expected = x.double() @ dense.t() if direction == "spmm" else dense[:, :tokens] @ x.double()
    for algorithm in list(provider.algorithms(problem))[:1]:
        y = provider.run(problem, packed, x.to(GPU), algorithm)
        assert y.shape == expected.shape and y.dtype == dtype
        error = float((y.cpu().double() - expected).norm() / expected.norm())
        assert error < (1e-3 if dtype == torch.float32 else torch.finfo(dtype).eps)  # fp32 may multiply in TF32


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("direction", ["spmm", "wgrad"])
@pytest.mark.parametrize(("rows", "inner"), [(64, 64), (128, 192), (192, 128), (256, 64), (320, 320), (448, 256)])
def test_what_is_behind_a_packed_form_does_not_count(order, rows, inner, direction, dtype):
    """Every algorithm gives the same numbers; compute-sanitizer tells whether one reads further than the room."""
    provider, problem = CusparseLt(), Problem(direction, rows, inner, 72, dtype, GPU)
    if not provider.supports(problem):
        pytest.skip("unsupported")
    a = torch.randn(rows, inner).to(dtype)
    packed = layout.empty(rows, inner, dtype, GPU)
    x = torch.randn((72, inner) if direction == "spmm" else (inner, 72), device=GPU).to(dtype)
    found: dict[int | None, list[torch.Tensor]] = {}
    for behind in (0x44, 0xFF):  # legal metadata, and illegal
        torch.empty(0, dtype=torch.uint8, device=GPU).set_(packed.untyped_storage()).fill_(behind)
        packed.copy_(layout.pack(a, reference.best_mask(a), order))
        for algorithm in provider.algorithms(problem):
            try:
                found.setdefault(algorithm, []).append(provider.run(problem, packed, x, algorithm))
            except cusparselt.Failed:
                continue
    assert found
    for algorithm, (one, other) in found.items():
        assert torch.equal(one.view(torch.int16), other.view(torch.int16)), algorithm


@pytest.mark.parametrize("tokens", [0, 5, 200])
def test_the_chosen_matmuls_are_those_of_the_masked_weight(tokens):
    w = torch.randn(256, 512, device=GPU)
    packed, packed_t = (
        torch.empty(layout.numel(256, 512, torch.bfloat16), dtype=torch.bfloat16, device=GPU) for _ in range(2)
    )
    pack_weight_(ops, w, packed, packed_t, torch.zeros(2, dtype=torch.int64, device=GPU), 0, 0, 256, 512, True)
    masked = (w.bfloat16() * reference.best_mask(w)).double()
    x = torch.randn(tokens, 512, device=GPU, dtype=torch.bfloat16)
    dy = torch.randn(tokens, 256, device=GPU, dtype=torch.bfloat16)
    seeds = torch.tensor([9], device=GPU)
    packed_dy = ops.pack_gradient(dy, seeds, 0)
    pruned = layout.unpack(packed_dy, 256, reference.padded(tokens), layout.metadata_order(GPU))[:, :tokens].double()
    for found, expected in (
        (ops.spmm(packed, x, 256), x.double() @ masked.t()),
        (ops.spmm(packed_t, dy, 512), dy.double() @ masked),
        (ops.wgrad(packed_dy, x, 256), pruned @ x.double()),
    ):
        assert found.shape == expected.shape
        assert float((found.double() - expected).norm()) <= 2**-7 * float(expected.norm())
