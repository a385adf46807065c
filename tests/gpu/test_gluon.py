"""Our own sparse matmuls on a GPU, each variant against float64: tails, both outputs, and what is not a number."""

import threading

import pytest
import torch

from sparse24.kernels import choice, gluon_matmul, layout, ops, providers, reference

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
HALVES = [torch.bfloat16, torch.float16]
ORDERS = {"gluon_wgmma": "sm_90", "gluon_mma": "sm_80"}
KERNELS = [*(("gluon_wgmma", i) for i in range(3)), ("gluon_mma", 0), ("gluon_mma", 1)]  # module, variant


def named(variant):
    return f"{variant[0]}-{variant[1]}"


@pytest.fixture(params=KERNELS, ids=named)
def multiply(request):
    """(order of the metadata, multiply) of a variant. Both kernels run on Hopper."""
    return loaded(*request.param)


def loaded(name, index):
    if name == "gluon_wgmma" and torch.cuda.get_device_capability(GPU)[0] != 9:
        pytest.skip("needs Hopper")
    if torch.cuda.get_device_capability(GPU)[0] not in (8, 9):
        pytest.skip("needs mma.sp")
    kernels = pytest.importorskip(f"sparse24.kernels.{name}")

    def run(packed, x, rows, inner, transposed, bias=None):
        poison(rows * (x.shape[1] if transposed else x.shape[0]), x.dtype)
        return kernels.multiply(kernels.VARIANTS[index], packed, x, rows, inner, transposed, bias)

    return ORDERS[name], run


def poison(numel, dtype):
    """Leave memory full of NaN for the allocator to hand out next."""
    torch.full((numel,), float("nan"), dtype=dtype, device=GPU)


def sparse(rows, inner, dtype, order):
    """A 2:4 matrix, dense and packed, of a mask that changes from group to group."""
    mask = (torch.rand(rows, inner // 4, 4, device=GPU).argsort(-1) < 2).view(rows, inner)
    a = torch.randn(rows, inner, device=GPU).to(dtype) * mask
    return a, layout.pack(a, mask, order)


def assert_rounded(y, exact):
    """Each entry within rounding of the exact one, and of the sum's."""
    eps = torch.finfo(y.dtype).eps
    assert y.shape == exact.shape and y.is_contiguous()
    assert bool(((y.double() - exact).abs() <= eps * (exact.abs() + 0.05 * exact.square().mean().sqrt())).all())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("outer", [1, 3, 64, 77, 1000])
@pytest.mark.parametrize(("blocks", "inner"), [(1, 64), (3, 192), (5, 448), (8, 1024)])
def test_spmm(multiply, blocks, inner, outer, biased, dtype):
    order, run = multiply
    rows = blocks * layout.ROW_BLOCK[order]
    a, packed = sparse(rows, inner, dtype, order)
    x, bias = torch.randn(outer, inner, device=GPU).to(dtype), torch.randn(rows, device=GPU).to(dtype)
    exact = x.double() @ a.double().t() + (bias.double() if biased else 0)
    assert_rounded(run(packed, x, rows, inner, False, bias if biased else None), exact)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "inner"), [(1, 64), (63, 64), (128, 128), (131, 192), (1000, 1024)])
@pytest.mark.parametrize("outer", [64, 320, 512])
def test_wgrad(multiply, outer, tokens, inner, biased, dtype):
    order, run = multiply
    rows = 3 * layout.ROW_BLOCK[order]
    a, packed = sparse(rows, inner, dtype, order)
    x, bias = torch.randn(tokens, outer, device=GPU).to(dtype), torch.randn(rows, device=GPU).to(dtype)
    exact = a[:, :tokens].double() @ x.double() + (bias.double()[:, None] if biased else 0)
    assert_rounded(run(packed, x, rows, inner, True, bias if biased else None), exact)


@pytest.mark.parametrize("transposed", [False, True])
def test_many_tiles_a_program_always_the_same(multiply, transposed):
    """Rings of shared memory go round many times; a race would show in one of the runs."""
    order, run = multiply
    rows, inner, outer = (2048, 4096, 4096) if transposed else (4096, 1024, 8192)
    a, packed = sparse(rows, inner, torch.bfloat16, order)
    x = torch.randn((inner, outer) if transposed else (outer, inner), device=GPU).bfloat16()
    first = run(packed, x, rows, inner, transposed)
    assert_rounded(first, a.double() @ x.double() if transposed else x.double() @ a.double().t())
    for _ in range(20):
        assert torch.equal(run(packed, x, rows, inner, transposed), first)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("blocks", "inner", "outer"), [(5, 4160, 960), (1, 8192, 64), (33, 2560, 4032), (9, 8192, 576)]
)
def test_tiles_that_are_cut(multiply, blocks, inner, outer, transposed):
    """Few tiles in many hands, or a last round that is not full: sums are put together in one order."""
    order, run = multiply
    rows = blocks * layout.ROW_BLOCK[order]
    a, packed = sparse(rows, inner, torch.bfloat16, order)
    x = torch.randn((inner, outer) if transposed else (outer, inner), device=GPU).bfloat16()
    bias = torch.randn(rows, device=GPU).bfloat16()
    first = run(packed, x, rows, inner, transposed, bias)
    exact = a.double() @ x.double() if transposed else x.double() @ a.double().t()
    assert_rounded(first, exact + (bias.double()[:, None] if transposed else bias.double()))
    for _ in range(10):
        assert torch.equal(run(packed, x, rows, inner, transposed, bias), first)


FUSED = [("swiglu", None), ("swiglu", torch.float32), ("geglu", torch.bfloat16), ("geglu_tanh", None)]
FUSED += [("geglu_tanh", torch.float32), ("geglu", None)]


@pytest.mark.parametrize(("blocks", "inner", "outer"), [(8, 192, 200), (12, 4160, 1000), (4, 64, 1)])
@pytest.mark.parametrize(("kind", "bias"), FUSED)
def test_the_activation_behind_a_product(kind, bias, blocks, inner, outer):
    if torch.cuda.get_device_capability(GPU)[0] != 9:
        pytest.skip("needs Hopper")
    kernels = pytest.importorskip("sparse24.kernels.gluon_wgmma")
    rows = 64 * blocks
    variant = next(v for v in kernels.VARIANTS if kernels.can_fuse(v, rows, kind))
    a, packed = sparse(rows, inner, torch.bfloat16, "sm_90")
    x = torch.randn(outer, inner, device=GPU).bfloat16()
    b = None if bias is None else torch.randn(rows, device=GPU).to(bias)
    poison(2 * rows * outer, x.dtype)
    z, h = kernels.multiply_glu(variant, packed, x, rows, inner, b, kind)
    assert_rounded(z, x.double() @ a.double().t())
    exact = reference.glu(z.double(), b, kind)
    assert h.shape == exact.shape
    assert bool(((h.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * exact.abs().max()).all())


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_not_finite_stays_in_its_row_of_x(multiply, transposed):
    order, run = multiply
    rows, inner, outer = 2 * layout.ROW_BLOCK[order], 192, 192
    a, packed = sparse(rows, inner, torch.bfloat16, order)
    x = torch.randn(outer, inner, device=GPU).bfloat16()
    x[5], x[77, 3], x[190] = float("inf"), float("nan"), 0.0
    y = run(packed, x.t().contiguous() if transposed else x, rows, inner, transposed)
    y = y.t() if transposed else y
    assert not bool(y[5].isfinite().any())
    assert torch.equal(y[77].isnan(), a[:, 3] != 0)
    assert bool((y[190] == 0).all())
    others = [i for i in range(outer) if i not in (5, 77)]
    assert_rounded(y[others].contiguous(), x[others].double() @ a.double().t())


def test_all_masks_of_a_group_are_read_right(multiply):
    """The identity shows each kept entry at its place."""
    order, run = multiply
    rows = inner = 256
    pair = torch.tensor(layout.PAIRS, device=GPU)[torch.randint(6, (rows, inner // 4), device=GPU)]
    mask = torch.zeros(rows, inner // 4, 4, device=GPU, dtype=torch.bool).scatter_(-1, pair, True).view(rows, inner)
    a = (1 + torch.arange(rows * inner, device=GPU) % 251).view(rows, inner).bfloat16() * mask
    eye = torch.eye(inner, device=GPU).bfloat16()
    packed = layout.pack(a, mask, order)
    assert torch.equal(run(packed, eye, rows, inner, False), a.t())
    assert torch.equal(run(packed, eye, rows, inner, True), a)


def test_operands_of_odd_strides_and_addresses(multiply):
    order, run = multiply
    rows, inner = 2 * layout.ROW_BLOCK[order], 128
    a, packed = sparse(rows, inner, torch.bfloat16, order)
    wide = torch.randn(70 * (inner + 1) + 1, device=GPU).bfloat16()
    for x in (
        wide[1 : 1 + 70 * inner].view(70, inner),  # at two bytes behind an aligned address
        wide[: 70 * (inner + 1)].view(70, inner + 1)[:, :inner],
        wide[: 70 * inner].view(inner, 70).t(),
        wide[:inner].view(1, inner).expand(70, inner),
    ):
        assert_rounded(run(packed, x, rows, inner, False), x.double() @ a.double().t())
    moved = torch.cat([packed[:1], packed])[1:]
    assert_rounded(run(moved, x, rows, inner, False), x.double() @ a.double().t())


def test_streams_and_threads_multiply_at_once(multiply):
    order, run = multiply
    rows, inner = 4 * layout.ROW_BLOCK[order], 4096
    a, packed = sparse(rows, inner, torch.bfloat16, order)
    x = torch.randn(1000, inner, device=GPU).bfloat16()
    expected = run(packed, x, rows, inner, False)
    torch.cuda.synchronize()
    same: list[bool] = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            ys = [run(packed, x, rows, inner, False) for _ in range(30)]
            torch.cuda.current_stream().synchronize()
            same.append(all(torch.equal(y, expected) for y in ys))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 4


def test_in_a_cuda_graph(multiply):
    order, run = multiply
    rows, inner = 2 * layout.ROW_BLOCK[order], 16384
    a, packed = sparse(rows, inner, torch.bfloat16, order)
    x = torch.randn(300, inner, device=GPU).bfloat16()
    run(packed, x, rows, inner, False)  # compiled outside
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(packed, x, rows, inner, False)
    for _ in range(2):
        x.neg_()
        graph.replay()
        assert_rounded(y, x.double() @ a.double().t())


# ------------------------------------------------------------------------------------------------------- as a provider


@pytest.fixture
def asked_for(monkeypatch, tmp_path):
    """The environment asks for the kernels, and choices are measured anew and kept apart."""
    monkeypatch.setenv(gluon_matmul.SWITCH, "1")
    monkeypatch.setenv("SPARSE24_CACHE", str(tmp_path))
    choice._store.cache_clear()
    monkeypatch.setattr(choice, "_choices", {})
    monkeypatch.setattr(choice, "_fused", {})
    yield
    choice._store.cache_clear()


def test_the_check_at_first_use_passes(asked_for):
    assert gluon_matmul.why_unavailable(GPU) is None


@pytest.mark.parametrize("direction", ["spmm", "wgrad"])
def test_every_variant_is_a_candidate_and_one_is_chosen_where_there_is_no_other(asked_for, monkeypatch, direction):
    problem = providers.Problem(direction, 256, 1024, 512, torch.bfloat16, GPU)
    tried = []
    real = choice._try

    def watched(run, name, expected, best):
        ms = real(run, name, expected, float("inf"))  # none is left out for being slow
        tried.append((name.split(" for ")[0], ms))
        return ms

    monkeypatch.setattr(choice, "_try", watched)
    monkeypatch.setattr(providers.CusparseLt, "supports", lambda self, problem: False)
    monkeypatch.setattr(providers.TorchCusparselt, "supports", lambda self, problem: False)
    found = choice.choose(problem)
    assert found.provider == "gluon" and found.ms > 0
    assert [name for name, _ in tried] == [f"gluon algorithm {i}" for i in range(gluon_matmul.variants(GPU))]
    assert all(ms is not None for _, ms in tried)


@pytest.mark.parametrize("kind", ["swiglu", "geglu_tanh"])
def test_a_product_and_its_activation_are_measured_together(asked_for, kind):
    w, bias = torch.randn(512, 256, device=GPU).bfloat16(), torch.randn(512, device=GPU)
    mask, x = reference.best_mask(w), torch.randn(300, 256, device=GPU).bfloat16()
    packed = layout.pack(w, mask, layout.metadata_order(GPU))
    z, h = ops.spmm_glu(packed, x, bias, 512, kind)
    ((_, found),) = choice._fused.items()
    assert found.ms > 0 and found.dense_ms > 0  # measured, whichever was faster
    assert_rounded(z, x.double() @ (w * mask).double().t())
    exact = reference.glu(z.double(), bias, kind)
    assert bool(((h.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * exact.abs().max()).all())
    choice._fused.clear()
    choice._store.cache_clear()
    ops.spmm_glu(packed, x, bias, 512, kind)
    assert list(choice._fused.values()) == [found]  # from the file


def test_a_kernel_that_fails_gives_way_to_the_library(asked_for, monkeypatch, caplog):
    problem = providers.Problem("spmm", 256, 128, 256, torch.bfloat16, GPU)
    w = torch.randn(256, 128, device=GPU).bfloat16()
    mask = reference.best_mask(w)
    packed, x = layout.pack(w, mask, layout.metadata_order(GPU)), torch.randn(256, 128, device=GPU).bfloat16()
    choice._choices[problem] = choice.Choice("gluon", 0)
    monkeypatch.setattr(gluon_matmul, "_withdrawn", {})

    def fails(*args):
        raise gluon_matmul.Failed("variant 0: OutOfResources: shared memory")

    monkeypatch.setattr(gluon_matmul, "multiply", fails)
    y = ops.spmm(packed, x, 256)
    assert_rounded(y, x.double() @ (w * mask).double().t())
    assert choice._choices[problem].provider != "gluon"
    assert "do not serve cuda:0: variant 0: OutOfResources" in caplog.text
