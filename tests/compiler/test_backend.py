"""The backend as users meet it: options, reasons, fallbacks, the installed package."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

import sparse24
from sparse24.compiler import backend, decide, weights
from sparse24.kernels import choice, layout
from sparse24.kernels.providers import Problem

from .models import MLP, Stack, SwiGLU, compiled, relative, sparse_names, train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deacy": 1e-4}, r"unknown option 'deacy' \(did you mean decay\?\); valid are decay, decay_on, refresh_every"),
        ({"decay": -1.0}, r"decay=-1\.0, need a finite number >= 0"),
        ({"decay": float("nan")}, "need a finite number"),
        ({"refresh_every": 0}, "refresh_every=0, need an int >= 1"),
        ({"refresh_every": 2.5}, "need an int >= 1"),
        ({"dense_after": -1}, "need None or an int >= 0"),
        ({"wgrad": "sparse"}, "wgrad='sparse', need 'mvue' or 'dense' or 'mixed'"),
        ({"decay_on": "both"}, "need 'gradient' or 'weight'"),
        ({"layers": "mlp"}, "need 'ffn', 'all' or a list of patterns"),
        ({"layers": [1]}, "need 'ffn', 'all' or a list of patterns"),
        ({"skip": "head"}, "need a list of patterns"),
        ({"when": "never"}, "need 'faster' or 'always'"),
        ({"inner": "nvfuser"}, "need 'inductor' or 'aot_eager' or 'eager'"),
        ({"seed": "a"}, "need an int"),
        ({"inductor": 1}, "need a dict"),
        ({"strict": 1}, "need True or False"),
    ],
)
def test_bad_options_raise_value_error(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse24.Recipe.from_options(options)
    with pytest.raises(ValueError, match=message):
        torch.compile(MLP(), backend="sparse24", options=options)(torch.randn(1, 64))


def test_a_layer_of_odd_width_stays_dense_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = Stack(MLP(ff=100), MLP())
    backend._said.clear()
    y = compiled(model)(torch.randn(3, 64))
    assert y.isfinite().all()
    assert sparse_names(model) == ["blocks.1.up.weight", "blocks.1.down.weight"]
    said = [r.getMessage() for r in caplog.records]
    assert any(
        "blocks.0.up.weight: it has out_features=100, need a multiple of 64; it stays dense (skip it to silence this)"
        in m
        for m in said
    )
    assert not any("head" in m for m in said)  # never wanted
    caplog.clear()
    torch._dynamo.reset()
    compiled(Stack(MLP(ff=100), MLP()), skip=["blocks.0.*"])(torch.randn(3, 64))
    assert not caplog.records
    with pytest.raises(sparse24.SkippedError, match="out_features=100"):
        compiled(Stack(MLP(ff=100)), strict=True)(torch.randn(3, 64))


def test_meta_parameters_stay_dense_with_the_reason() -> None:
    with torch.device("meta"):
        model, x = Stack(MLP()), torch.randn(3, 64)
    assert compiled(model)(x).shape == (3, 10)
    assert "device meta" in sparse24.session(model).weights["blocks.0.up.weight"].reason_skipped


def test_layers_and_skip_take_patterns() -> None:
    model = Stack(MLP(), SwiGLU(), d=64, classes=64)
    compiled(model, layers=["head.*", "*.up.weight"], skip=["blocks.1.*"])(torch.randn(1, 64))
    assert sparse_names(model) == ["blocks.0.up.weight", "head.weight"]


def test_attention_projections_are_an_option() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
            self.mlp = MLP()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (p(x).view(2, 16, 4, 16).transpose(1, 2) for p in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.mlp(x + self.o(y.transpose(1, 2).reshape(2, 16, 64)))

    model, x = Stack(Block()), torch.randn(2, 16, 64)
    compiled(model)(x)
    assert sparse_names(model) == ["blocks.0.mlp.up.weight", "blocks.0.mlp.down.weight"]
    torch._dynamo.reset()
    run = compiled(model, layers="all")
    from .models import masked_twin

    run(x)
    assert len(sparse_names(model)) == 6
    assert relative(run(x), masked_twin(model)(x)) < 1e-5


def test_speed_is_measured_for_the_merged_matmul_and_decides(monkeypatch) -> None:
    """gate and up together have 256 out_features, down has 64; what is slower stays dense and says so."""
    from sparse24.kernels.gain import Gain, Layer

    asked = []

    def gain(layer: Layer) -> Gain:
        asked.append((layer.rows, layer.cols, layer.tokens))
        return Gain(sparse_ms=1.0, dense_ms=2.0 if layer.rows == 256 else 0.5, wgrad="dense")

    monkeypatch.setattr(decide, "gain", gain)
    model = Stack(SwiGLU())
    compiled(model, wgrad="mvue")(torch.randn(2, 5, 64))
    assert sorted(asked) == [(64, 128, 10), (256, 64, 10), (256, 64, 10)]
    assert sparse_names(model) == ["blocks.0.gate.weight", "blocks.0.up.weight"]
    found = sparse24.session(model).weights
    assert found["blocks.0.down.weight"].reason_skipped == "dense is faster here, 0.50 ms a step against 1.00 ms"
    assert found["blocks.0.up.weight"].wgrad == "dense"
    state = sparse24.session(model).state_dict()
    monkeypatch.setattr(
        decide, "gain", lambda *args: Gain(1.0, 9.0, "mvue")
    )  # elsewhere all would gain: kept as it was
    other = Stack(SwiGLU())
    sparse24.session(other).load_state_dict(state)
    torch._dynamo.reset()
    compiled(other, wgrad="mvue")(torch.randn(2, 5, 64))
    assert sparse_names(other) == sparse_names(model)
    assert sparse24.session(other).weights["blocks.0.up.weight"].wgrad == "dense"


def test_a_matmul_that_fails_is_served_by_another_provider(monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    """An algorithm measured for a rounded number of tokens may refuse the true one: training goes on."""
    from sparse24.kernels import choice, cusparselt, layout, ops, reference

    class Refuses:
        name = "refuses"

        def run(self, *args: object) -> torch.Tensor:
            raise cusparselt.Failed("status 3")

    monkeypatch.setitem(choice._BY_NAME, "refuses", Refuses())
    monkeypatch.setattr(choice, "_find", lambda problem: choice.Choice("refuses"))
    monkeypatch.setattr(choice, "_choices", {})
    w, x = torch.randn(64, 128), torch.randn(5, 128)
    mask = reference.best_mask(w)
    y = ops.spmm(layout.pack(w, mask, "sm_90"), x, 64)
    assert relative(y, x @ (w * mask).t()) < 1e-6
    assert any("status 3" in r.getMessage() for r in caplog.records)


def test_a_graph_that_cannot_be_compiled_stays_dense(monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    """An exception of ours costs speed, never the run; strict=True shows it."""

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(backend, "rewrite", broken)
    model, x = Stack(MLP()), torch.randn(4, 64)
    run = compiled(model)
    assert relative(run(x), model(x)) < 1e-6
    reason = sparse24.session(model).weights["blocks.0.up.weight"].reason_skipped
    assert reason == "compilation failed: RuntimeError: no such luck"
    assert any("they stay dense" in r.getMessage() for r in caplog.records)
    train(run, torch.optim.SGD(model.parameters(), lr=1e-2), 1)
    assert sparse24.session(model).step == 0
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no such luck"):
        compiled(Stack(MLP()), strict=True)(x)


def test_mode_reaches_inductor() -> None:
    model, x = MLP(), torch.randn(4, 64)
    run = torch.compile(model, backend="sparse24", mode="max-autotune-no-cudagraphs")
    y = run(x)
    assert sparse_names(model) == ["up.weight", "down.weight"] and y.isfinite().all()
    torch._dynamo.reset()
    options = {"inductor": {"epilogue_fusion": False}}
    assert relative(torch.compile(model, backend="sparse24", options=options)(x), y) < 1e-6


def test_recompiled_with_another_recipe_the_new_one_is_in_force(caplog: pytest.LogCaptureFixture) -> None:
    model = Stack(MLP())
    compiled(model, decay=0.5)(torch.randn(1, 64))
    torch._dynamo.reset()
    compiled(model, decay=0.25)(torch.randn(1, 64))
    assert {w.recipe.decay for w in sparse24.session(model).weights.values()} >= {0.25}
    assert any("another recipe" in r.getMessage() for r in caplog.records)


def test_recompiled_without_a_layer_that_layer_is_dense() -> None:
    model, x = Stack(MLP()), torch.randn(4, 64)
    compiled(model)(x)
    torch._dynamo.reset()
    compiled(model, skip=["*"])(x)
    assert sparse_names(model) == []


def test_training_step_function_and_model_compile() -> None:
    model, x = Stack(MLP()), torch.randn(4, 64)

    @torch.compile(backend="sparse24", options={"inner": "aot_eager", "wgrad": "dense"}, fullgraph=True)
    def loss_of(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m(x).square().mean()

    expected = loss_of(model, x)
    assert sparse_names(model) == ["blocks.0.up.weight", "blocks.0.down.weight"]
    model.compile(backend="sparse24", options={"inner": "aot_eager", "wgrad": "dense"})
    assert relative(model(x).square().mean(), expected) < 1e-6


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_import_of_sparse24_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys, torch, torch.nn as nn\n"
        "m = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))\n"
        "assert 'sparse24' not in sys.modules and 'sparse24' in torch.compiler.list_backends()\n"
        "c = torch.compile(m, backend='sparse24', options={'inner': 'eager'})\n"
        "c(torch.randn(3, 64)).sum().backward()\n"
        "import sparse24\n"
        "print(len(sparse24.session(c).weights), m[0].weight.grad.shape)"
    )
    assert run_python(code, tmp_path) == "2 torch.Size([128, 64])"


def test_only_sparse24_becomes_importable(tmp_path: Path) -> None:
    names = ["compiler", "passes", "kernels"]
    imports = ", ".join(f"sparse24.{name}" for name in names)
    code = f"import importlib.util as u, {imports}; print([u.find_spec(name) for name in {names}])"
    assert run_python(code, tmp_path) == "[None, None, None]"


def test_the_dense_end_is_compiled_from_inductors_cache(tmp_path, monkeypatch) -> None:
    """It is compiled outside of Dynamo's tracing, with static shapes all the same."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for hits in (0, 2):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = MLP(), torch.randn(7, 64)
        run = compiled(model, inner="inductor", dense_after=1)
        run(x).sum().backward()
        sparse24.session(model).to_dense()
        counters.clear()
        assert relative(run(x), model(x)) < 1e-5
        run(x).sum().backward()
        assert counters["inductor"]["fxgraph_cache_bypass"] == 0
        assert counters["inductor"]["fxgraph_cache_hit"] == hits


@pytest.mark.parametrize("recipe", ["fst", "s-ste"])
def test_every_packed_form_that_is_multiplied_has_room_behind_it(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noting(problem: Problem, packed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        assert layout.with_room(packed, problem.rows, problem.inner) is packed
        seen.append((problem.direction, problem.rows, problem.inner))
        return multiply(problem, packed, x)

    multiply = choice.matmul
    monkeypatch.setattr(choice, "matmul", noting)
    model = Stack(MLP(ff=192), SwiGLU())
    run = compiled(model, wgrad="mvue", recipe=recipe)
    train(run, torch.optim.SGD(model.parameters(), 0.1), 2)
    with torch.no_grad():
        run(torch.randn(3, 64))
    pruned = sparse24.prune(model)
    with torch.no_grad():
        compiled(pruned)(torch.randn(3, 64))
    assert len({direction for direction, *_ in seen}) == 2
    assert sum(layout._room(*of) > 0 for _, *of in seen) > len(seen) // 2


def test_the_compiler_behind_runs_before_weights_are_packed_and_sees_operands_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, real, seen = Stack(MLP(), SwiGLU()).bfloat16(), backend.compile_inner, []

    def noting(gm: torch.fx.GraphModule, inputs: list, *args: object) -> object:
        known = [weights.get(p) for p in model.parameters()]
        assert not any(weight.operands for weight in known if weight is not None)
        seen.append(inputs)
        return real(gm, inputs, *args)

    def running(variant: backend.Variant, args: list, known: list) -> object:
        operands = variant.pack(known)
        examples = seen[-1][len(args) + 1 :]
        assert len(examples) == len(operands) > 0
        for example, operand in zip(examples, operands, strict=True):
            assert isinstance(example, FakeTensor) and not isinstance(operand, FakeTensor)
            for of in ("shape", "dtype", "device", "requires_grad"):
                assert getattr(example, of) == getattr(operand, of)
            assert example.stride() == operand.stride()
        return call(variant, args, known)

    call = backend.Variant.__call__
    monkeypatch.setattr(backend, "compile_inner", noting)
    monkeypatch.setattr(backend.Variant, "__call__", running)
    torch._dynamo.reset()
    run = torch.compile(model, backend="sparse24", options={"inner": "aot_eager"})
    run(torch.randn(3, 64).bfloat16()).float().square().mean().backward()
    assert len(seen) == 1
