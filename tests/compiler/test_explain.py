"""explain: its rows, that they are what compiling does, and that it leaves nothing behind."""

import copy
import gc
import json
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

import sparse24
from sparse24.compiler import decide, weights
from sparse24.compiler.explain import NOT_CALLED, NOT_TRACED
from sparse24.kernels import choice, cost, providers
from sparse24.kernels.gain import Gain, Layer

from .models import GPT2MLP, MLP, Stack, SwiGLU, compiled

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def reasons(model: nn.Module) -> dict[str, str | None]:
    return {name: weight.reason_skipped for name, weight in sparse24.session(model).weights.items()}


def found(report: sparse24.Report) -> dict[str, str | None]:
    return {row.name: row.reason for row in report.rows}


class Partly(nn.Module):
    """One layer that is called, one that is not, one called where Dynamo does not look."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.unused, self.eager = MLP(), nn.Linear(64, 128), nn.Linear(64, 64)

    @torch.compiler.disable
    def outside(self, x: Tensor) -> Tensor:
        return self.eager(x)

    def forward(self, x: Tensor) -> Tensor:
        assert self.unused.weight.dtype == x.dtype  # a look at it is no call
        return self.outside(self.block(x))


class Branches(nn.Module):
    """Needs data: it branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.table = MLP(), torch.ones(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if (x * self.table).sum().item() > 0 else x


def test_the_rows_are_what_compiling_does_and_every_dense_one_has_a_reason() -> None:
    model, x = Stack(SwiGLU(), MLP(ff=100), GPT2MLP()), torch.randn(4, 16, 64)
    report = sparse24.explain(model, x, options={"skip": ["blocks.2.c_proj*"]})
    assert found(report) == {
        "blocks.0.gate.weight": None,
        "blocks.0.up.weight": None,
        "blocks.0.down.weight": None,
        "blocks.1.up.weight": "it has out_features=100, need a multiple of 64",
        "blocks.1.down.weight": "it has in_features=100, need a multiple of 64",
        "blocks.2.c_fc.weight": None,
        "blocks.2.c_proj.weight": "skip names it",
        "head.weight": "not part of a feed-forward layer",
    }
    run = compiled(model, skip=["blocks.2.c_proj*"])
    run(x).sum().backward()
    torch.optim.AdamW(model.parameters()).step()
    assert reasons(model) == found(report)
    assert found(sparse24.explain(run, x)) == found(report)  # of a model in training, with the options in force

    up = report["blocks.0.up.weight"]
    assert up.shape == (128, 64) and up.tokens == 64 and up.dense_bytes == 128 * 64 * 4
    assert up.together == ("blocks.0.gate.weight", "blocks.0.up.weight")
    weight = sparse24.session(model).weights["blocks.0.up.weight"]
    operand = next(iter(weight.operands.values()))
    assert 2 * up.packed_bytes == sum(t.nbytes for t in operand.inputs)  # two weights share it
    assert report["blocks.2.c_fc.weight"].shape == (128, 64)  # stored [in, out]
    assert [row.role for row in report.rows] == ["gate", "up", "down", "up", "down", "up", "down", "head"]


def test_a_linear_that_no_graph_holds_says_whether_it_was_called() -> None:
    model, x = Partly(), torch.randn(4, 64)
    report = sparse24.explain(model, x)
    assert report["unused.weight"].reason == NOT_CALLED
    assert report["eager.weight"].reason == NOT_TRACED
    assert report["block.up.weight"].sparse
    compiled(model, fullgraph=False)(x)
    assert reasons(model) == {name: r for name, r in found(report).items() if r not in (NOT_CALLED, NOT_TRACED)}


def test_nothing_is_left_behind() -> None:
    model, x = Stack(SwiGLU(), MLP()), torch.randn(4, 16, 64)
    model.register_buffer("calls", torch.zeros(()))
    run = torch.compile(model, backend="eager")
    run(x)
    before, keys = copy.deepcopy(model.state_dict()), set(vars(model))
    state, python = torch.random.get_rng_state(), random.getstate()
    entries = len(_debug_get_cache_entry_list(Stack.forward.__code__))
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for size in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11):  # more than the recompilation limit
        sparse24.explain(model, torch.randn(size, 16, 64, generator=torch.Generator()))
    assert torch.equal(torch.random.get_rng_state(), state) and random.getstate() == python
    alive = [e for e in _debug_get_cache_entry_list(Stack.forward.__code__) if e.code is not None]
    assert len(alive) == entries
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations + 10
    run(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations + 10  # still compiled
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=2):
        run(torch.randn(7, 16, 64, generator=torch.Generator()))  # what explain compiled does not count
    assert not sparse24.session(model).weights and set(vars(model)) == keys
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert all(p.grad is None for p in model.parameters())


def test_sizes_that_explain_saw_make_no_later_graph_dynamic() -> None:
    class Fresh(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = MLP()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    model, dynamic = Fresh(), []
    for size in (2, 3):
        sparse24.explain(model, torch.randn(size, 16, 64))

    def look(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        dynamic.extend(isinstance(n.meta["example_value"], torch.SymInt) for n in gm.graph.find_nodes(op="placeholder"))
        return gm

    torch.compile(model, backend=look)(torch.randn(4, 16, 64))
    assert dynamic and not any(dynamic)


@pytest.mark.parametrize("needs_data", [False, True])
def test_the_model_can_be_freed_afterwards(needs_data: bool) -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(t) is nn.Parameter and t.shape == (128, 64) for t in gc.get_objects())

    before = alive()  # what other tests of this process left
    model = Branches() if needs_data else MLP()
    report = sparse24.explain(model, torch.ones(4, 64))
    weight = weakref.ref(model.block.up.weight if needs_data else model.up.weight)  # type: ignore[union-attr]
    assert alive() <= before + 1, "a copy of the model is kept"
    del model
    gc.collect()
    assert weight() is None and report.rows


def test_a_forward_that_needs_data_runs_on_a_copy() -> None:
    model, x = Branches(), torch.ones(4, 64)
    assert found(sparse24.explain(model, x)) == {"block.up.weight": None, "block.down.weight": None}
    assert {row.reason for row in sparse24.explain(model, -x).rows} == {NOT_CALLED}
    with pytest.raises(RuntimeError, match="meta"):
        sparse24.explain(Branches().to("meta"), x.to("meta"))


def test_an_error_of_the_models_own_forward_is_its_error() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        sparse24.explain(MLP(), torch.randn(4, 65))


def test_regional_compilation_is_looked_through() -> None:
    model, x = Stack(MLP(), MLP()), torch.randn(4, 64)
    for block in model.blocks:
        block.compile(backend="sparse24", options={"inner": "eager"})
    assert [row.name for row in sparse24.explain(model, x).rows if row.sparse] == [
        f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("up", "down")
    ]
    assert not sparse24.session(model).weights


def test_a_weight_that_two_calls_share_and_a_tied_head_have_one_row_each() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.block, self.head = nn.Embedding(128, 64), MLP(), nn.Linear(64, 128, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.block(self.block(self.embedding(tokens))))

    report = sparse24.explain(Tied(), torch.zeros(4, 16, dtype=torch.long))
    assert report["embedding.weight"].role == "head"
    assert report["block.up.weight"].reason == "its weight is used 2 times (tied or shared)"
    assert len(report.rows) == 3


def test_autocast_around_it_is_taken_into_account() -> None:
    model, x = SwiGLU(), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        report = sparse24.explain(model, x)
        compiled(model)(x)
    assert {row.dtype for row in report.rows} == {torch.bfloat16}
    operands = {id(o): o for w in sparse24.session(model).weights.values() for o in w.operands.values()}.values()
    assert {o.packed.dtype for o in operands} == {torch.bfloat16}
    assert sum(r.packed_bytes for r in report.rows) == sum(t.nbytes for o in operands for t in o.inputs)


def test_the_table_has_a_line_for_each_row_and_names_reasons_and_totals() -> None:
    report = sparse24.explain(Stack(SwiGLU(), GPT2MLP()), torch.randn(4, 16, 64), options={"when": "always"})
    lines = str(report).splitlines()
    for row, line in zip(report.rows, lines[1:], strict=False):
        assert line.startswith(row.name) and (row.sparse or line.endswith(str(row.reason)))
    assert "5 of 6 are sparse" in str(report) and "H200" in str(report) and "masked dense" in str(report)
    assert report.graphs["original"] and "sparse_linear_glu" in report.graphs["sparse"][0].code


def test_of_a_distributed_model_it_is_the_one_inside_and_a_sharded_one_is_refused(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(MLP())
        assert [row.name for row in sparse24.explain(parallel, torch.randn(4, 64)).rows if row.sparse] == [
            "up.weight",
            "down.weight",
        ]
        sharded = MLP()
        fully_shard(sharded)
        with pytest.raises(TypeError, match="sharded by FSDP.*before sharding"):
            sparse24.explain(sharded, torch.randn(4, 64))
    finally:
        torch.distributed.destroy_process_group()


def test_of_a_model_without_linears_the_report_is_empty() -> None:
    report = sparse24.explain(nn.LayerNorm(64), torch.randn(4, 64))
    assert report.rows == () and report.step_gain == 1.0 and "0 of 0 are sparse" in str(report)


def test_bad_arguments_are_named() -> None:
    x = torch.randn(4, 64)
    with pytest.raises(ValueError, match="found gpu='H999', need one whose rates are known: H200"):
        sparse24.explain(MLP(), x, gpu="H999")
    with pytest.raises(sparse24.OptionError, match="did you mean layers"):
        sparse24.explain(MLP(), x, options={"layer": "all"})
    with pytest.raises(TypeError, match="need an nn.Module"):
        sparse24.explain(F.linear, x)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- numbers


class Llama(nn.Module):
    """The layers of benchmarks/step.py at a Llama width, in bfloat16: what its times are made of."""

    def __init__(self, d: int, ff: int, kv: int, layers: int, vocab: int) -> None:
        super().__init__()
        heads = {"q": d, "k": kv, "v": kv}
        self.projections = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(d, out, bias=False) for n, out in heads.items()}) for _ in range(layers)
        )
        self.outs = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(layers))
        self.ffns = nn.ModuleList(SwiGLU(d, ff) for _ in range(layers))
        self.embedding, self.head = nn.Embedding(vocab, d), nn.Linear(d, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for projections, out, ffn in zip(self.projections, self.outs, self.ffns, strict=True):
            q, k, v = (projections[n](x).unflatten(-1, (-1, 128)).transpose(1, 2) for n in ("q", "k", "v"))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = ffn(x + out(attended.transpose(1, 2).flatten(2)))
        return self.head(x)


@pytest.mark.parametrize("layers", ["ffn", "all"])
def test_the_prediction_comes_close_to_the_measured_step(layers: str) -> None:
    saved = [row for path in (RESULTS / "h200").glob("step_*.json") for row in json.loads(path.read_text())["rows"]]
    row = next(row for row in saved if row["model"] == "llama3-8b-width" and row["layers"] == layers)
    with torch.device("meta"):
        model = Llama(4096, 14336, 1024, 4, 32000).bfloat16()
    tokens = torch.zeros(8, 2048, dtype=torch.long, device="meta")
    report = sparse24.explain(model, tokens, options={"layers": layers})
    assert sum(r.sparse for r in report.rows) == row["sparse_weights"]
    assert report.dense_ms + report.other_ms == pytest.approx(row["dense_ms"], rel=0.08)
    assert report.sparse_ms + report.other_ms == pytest.approx(row["sparse_ms"], rel=0.08)
    assert report.step_gain == pytest.approx(row["ratio"], rel=0.04)


def test_a_layer_that_would_lose_counts_as_dense_unless_it_is_wanted() -> None:
    x = torch.randn(4, 16, 64)
    losing = sparse24.explain(MLP(), x)
    assert all(row.sparse and row.cost is not None and not row.cost.faster for row in losing.rows)
    assert losing.sparse_ms == losing.dense_ms and losing.step_gain == 1.0
    assert "dense is faster on H200" in str(losing)
    wanted = sparse24.explain(MLP(), x, options={"when": "always"})
    assert wanted.sparse_ms > wanted.dense_ms and wanted.step_gain < 1


def test_times_of_a_merged_matmul_are_shared_out_by_rows() -> None:
    with torch.device("meta"):
        model, x = SwiGLU(4096, 14336), torch.zeros(16384, 4096)
    rows = {row.name: row.cost for row in sparse24.explain(model, x).rows}
    whole = cost.predicted(2 * 14336, 4096, 16384, torch.float32, cost.GPUS["H200"], "mvue")
    for times in ("dense", "sparse"):
        shared = sum(getattr(rows[name], times).total for name in ("up.weight", "gate.weight"))
        assert shared == pytest.approx(getattr(whole, times).total)


def test_of_a_gpu_the_times_are_those_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """kernels.gain's total, split by direction: what is left of it is packing."""
    device = torch.device("cuda")
    ms = {"spmm": (1.0, 2.0), "wgrad": (3.0, 5.0)}
    monkeypatch.setattr(
        choice, "choose", lambda problem: choice.Choice("cusparselt", 7, *ms[problem.direction]), raising=True
    )
    for kept, total in (("mvue", 1.0 + 1.0 + 3.0 + 0.25), ("dense", 1.0 + 1.0 + 5.0 + 0.25)):
        monkeypatch.setattr(cost, "gain", lambda *args, kept=kept, total=total: Gain(total, 9.0, kept))
        spent = cost.measured(Layer(256, 128, 64, torch.bfloat16, torch.float32, device, "mvue"))
        assert spent.measured and spent.wgrad == kept and spent.dense.total == 9.0
        assert spent.sparse.total == pytest.approx(total) and spent.sparse.packing == pytest.approx(0.25)
        assert spent.providers == ("cusparselt", "cusparselt", "cusparselt" if kept == "mvue" else "dense")


def test_what_measuring_decides_explain_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "why_slow", lambda *_: None)
    monkeypatch.setattr(
        decide, "gain", lambda layer: Gain(1.0, 2.0, "dense") if layer.rows == 256 else Gain(2.0, 1.0, "dense")
    )
    model, x = SwiGLU(), torch.randn(4, 64)
    report = sparse24.explain(model, x)
    compiled(model)(x)
    assert found(report) == reasons(model)
    assert [row.sparse for row in report.rows] == [False, True, True, False][1:]
    assert (report["down.weight"].reason or "").startswith(weights.SLOWER)
