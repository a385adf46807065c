"""When the Gluon kernels are used, and when they step aside: without a GPU, with stand-ins for the kernels."""

import logging
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sparse24.kernels import choice, gluon_matmul, layout, linear, providers, reference

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Nothing checked and nothing withdrawn, before and after."""
    kept = gluon_matmul._kernels, gluon_matmul._check
    for function in kept:
        function.cache_clear()
    monkeypatch.setattr(gluon_matmul, "_withdrawn", {})
    yield
    for function in kept:
        function.cache_clear()


def stand_in(scale=1.0, error=None):
    """Kernels that multiply by the reference, `scale` times too much, or fail."""

    def multiply(variant, packed, x, rows, inner, transposed, bias=None):
        if error is not None:
            raise error
        return scale * (reference.wgrad if transposed else reference.spmm)(packed, x, rows)

    return SimpleNamespace(VARIANTS=("only",), multiply=multiply)


def test_right_kernels_pass_the_check(monkeypatch):
    monkeypatch.setattr(gluon_matmul, "_kernels", lambda device: stand_in())
    assert gluon_matmul.why_unavailable(CPU) is None


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [
        (stand_in(scale=1.05), "is wrong (relative error 0.05)"),
        (stand_in(scale=float("nan")), "is wrong (relative error nan)"),
        (stand_in(error=RuntimeError("ptxas: (C7602)\nmore")), "could not be run: RuntimeError: ptxas: (C7602)"),
    ],
)
def test_kernels_that_are_wrong_or_fail_are_withdrawn_with_one_warning(monkeypatch, caplog, kernels, reason):
    monkeypatch.setattr(gluon_matmul, "_kernels", lambda device: kernels)
    with caplog.at_level(logging.WARNING, "sparse24"):
        for _ in range(3):
            assert (gluon_matmul.why_unavailable(CPU) or "").endswith(reason)
    assert [record.getMessage().endswith(reason) for record in caplog.records] == [True]


@pytest.mark.parametrize(("arch", "module"), [("sm_90", "gluon_wgmma"), ("sm_80", "gluon_mma")])
def test_a_triton_without_this_gluon_is_a_reason_and_no_error(monkeypatch, arch, module):
    monkeypatch.setattr(layout, "arch", lambda device: arch)
    monkeypatch.setitem(sys.modules, f"sparse24.kernels.{module}", None)  # importing it raises
    monkeypatch.delattr(sys.modules["sparse24.kernels"], module, raising=False)
    assert "this Triton has no Gluon that they are written for" in (gluon_matmul.why_unavailable(GPU) or "")


def problem(**changes):
    return providers.Problem("spmm", 256, 192, 77, torch.bfloat16, GPU)._replace(**changes)


def test_problems_are_taken_where_asked_for_and_possible(monkeypatch):
    provider = providers.Gluon()
    monkeypatch.setattr(layout, "arch", lambda device: "sm_90")
    monkeypatch.setattr(gluon_matmul, "why_unavailable", lambda device: None)
    assert not provider.supports(problem())
    monkeypatch.setenv(gluon_matmul.SWITCH, "1")
    assert provider.supports(problem()) and provider.supports(problem(dtype=torch.float16))
    assert provider.supports(problem(direction="wgrad", outer=64))
    for changes in (
        {"dtype": torch.float32},
        {"rows": 32},
        {"inner": 96},
        {"outer": 0},
        {"device": CPU},
        {"direction": "wgrad", "outer": 72},
    ):
        assert not provider.supports(problem(**changes)), changes
    monkeypatch.setattr(gluon_matmul, "why_unavailable", lambda device: "a reason")
    assert not provider.supports(problem())


def test_nothing_of_gluon_is_imported_where_it_is_not_asked_for():
    code = """
import sys, torch, sparse24
from sparse24.kernels import choice, layout, ops, providers
a = torch.randn(64, 64)
ops.spmm(layout.pack(a, ops.reference.best_mask(a), "sm_90"), torch.randn(8, 64), 64)
assert [p.name for p in providers.PROVIDERS if p.supports(providers.Problem("spmm", 64, 64, 8, a.dtype, a.device))]
print([m for m in sys.modules if "experimental.gluon" in m or m.startswith("sparse24.kernels.gluon_")])
"""
    environment = {k: v for k, v in os.environ.items() if k != gluon_matmul.SWITCH}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "['sparse24.kernels.gluon_matmul']\n", done.stderr


def test_choices_are_kept_apart_and_without_the_switch_as_before(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE24_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch, "__version__", "2.11")
    monkeypatch.setattr(choice.cusparselt, "version", lambda: "0.8.0")
    store = choice._store.__wrapped__
    without = store(GPU)
    assert without.path.name == "A-GPU-2-11-0-8-0.json"
    assert without.header == {"gpu": "A GPU", "torch": "2.11", "cusparselt": "0.8.0", "format": "1"}
    monkeypatch.setenv(gluon_matmul.SWITCH, "1")
    assert store(GPU).path.name == "A-GPU-2-11-0-8-0-gluon.json"
    assert store(GPU).header == {**without.header, "gluon": gluon_matmul.sources()}


@pytest.mark.parametrize(("kept", "again"), [("cusparselt", False), ("torch_cusparselt", False), ("gluon", True)])
def test_only_a_kept_choice_of_gluon_is_measured_again_where_it_no_longer_serves(monkeypatch, tmp_path, kept, again):
    store = choice._Store(tmp_path / "choices.json", {})
    store.add(choice._key(choice._rounded(problem())), choice.Choice(kept, 1))
    monkeypatch.setattr(choice, "_store", lambda device: store)
    monkeypatch.setattr(choice, "measure", lambda problem: choice.Choice("cusparselt", 7))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    first = SimpleNamespace(name="cusparselt", supports=lambda problem: True)
    monkeypatch.setattr(choice, "PROVIDERS", (first,))
    assert choice._find(problem()) == (choice.Choice("cusparselt", 7) if again else choice.Choice(kept, 1))


def test_a_kernel_that_fails_in_training_is_replaced(monkeypatch, caplog):
    a = torch.randn(64, 64)
    mask = reference.best_mask(a)
    here = providers.Problem("spmm", 64, 64, 8, torch.float32, CPU)
    monkeypatch.setattr(choice, "_choices", {here: choice.Choice("gluon", 0)})
    monkeypatch.setattr(gluon_matmul, "_kernels", lambda device: stand_in(error=RuntimeError("no resources")))
    x = torch.randn(8, 64)
    with caplog.at_level(logging.WARNING, "sparse24"):
        y = choice.matmul(here, layout.pack(a, mask, "sm_90"), x)
    torch.testing.assert_close(y, x @ (a * mask).t())
    assert choice._choices[here].provider == "masked_dense"
    assert "do not serve cpu: variant 0: RuntimeError: no resources" in caplog.text


@pytest.mark.parametrize("bias", [None, torch.randn(64)])
def test_a_fused_kernel_that_fails_gives_way_to_two(monkeypatch, caplog, bias):
    w, x = torch.randn(64, 64), torch.randn(5, 64)
    packed = layout.pack(w, reference.best_mask(w), "sm_90")
    monkeypatch.setattr(choice, "_fusing", lambda *args: 3)

    def fails(variant, *args):
        raise gluon_matmul.Failed(f"variant {variant}: no")

    monkeypatch.setattr(gluon_matmul, "multiply_glu", fails)
    z, h = choice.matmul_glu(problem(rows=64, inner=64, device=CPU), packed, x, bias, "gelu", reference.glu)
    assert torch.equal(z, reference.spmm(packed, x, 64)) and torch.equal(h, reference.glu(z, bias, "gelu"))
    assert "variant 3: no" in caplog.text


@pytest.mark.parametrize(
    ("rows", "kind", "expected"),
    [(256, "gelu", []), (256, "swiglu", [2]), (256, "geglu", [2]), (256, "reglu", []), (320, "swiglu", [])],
)
def test_gated_kinds_are_fused_by_tiles_that_hold_both_halves(monkeypatch, rows, kind, expected):
    monkeypatch.setattr(layout, "arch", lambda device: "sm_90")
    kernels = gluon_matmul._kernels(GPU)
    if isinstance(kernels, str):
        pytest.skip(kernels)
    assert gluon_matmul.fusing(GPU, rows, kind) == expected


def test_the_polynomial_of_gelu_is_the_logarithm_of_the_normal_tail():
    """So GELU in fp32 is off by less than a rounding to fp16 or bf16, and vanishes behind the fitted range."""
    coefficients = pytest.importorskip("sparse24.kernels.gluon_wgmma_kernel", exc_type=ImportError).TAIL.value

    def tail_log2(z):
        p = torch.full_like(z, coefficients[0])
        for coefficient in coefficients[1:]:
            p = p * z.abs() + coefficient
        return p

    z = torch.linspace(-6, 6, 100_001)
    exact = torch.special.log_ndtr(-z.abs().double()) / math.log(2)
    assert (tail_log2(z) - exact).abs().max() < 1e-5
    gelu, twin = z.clamp(min=0) - z.abs() * tail_log2(z).exp2(), torch.nn.functional.gelu(z.double())
    assert ((gelu - twin).abs() <= 1e-5 * twin.abs()).all()
    far = torch.tensor([6.0, 8.0, 30.0, 1e3, 1e38])
    assert (tail_log2(far).diff() < 0).all() and (far * tail_log2(far).exp2() < 1e-8).all()


def test_with_the_switch_one_op_gives_a_product_and_its_activation(monkeypatch):
    w, bias, x = torch.randn(128, 64), torch.randn(128), torch.randn(10, 64)
    mask, seeds = reference.best_mask(w), torch.tensor([7])
    packed, packed_t = layout.pack(w, mask, "sm_90"), layout.pack(w.t().contiguous(), mask.t().contiguous(), "sm_90")

    def step():
        inputs = [t.clone().requires_grad_() for t in (x, w, bias)]
        h = linear.sparse_linear_glu(
            inputs[0], [inputs[1]], packed, packed_t, seeds, 0, "mvue", False, inputs[2], "swiglu"
        )
        return [h, *torch.autograd.grad(h.square().sum(), inputs)]

    def ops_of_a_step():
        with torch.profiler.profile() as recorded:
            found = step()
        return found, {e.name.removeprefix("sparse24::") for e in recorded.events() if e.name.startswith("sparse24::")}

    apart, names = ops_of_a_step()
    assert {"spmm", "glu"} <= names and "spmm_glu" not in names
    monkeypatch.setenv(gluon_matmul.SWITCH, "1")
    together, names = ops_of_a_step()
    assert "spmm_glu" in names and "glu" not in names
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
