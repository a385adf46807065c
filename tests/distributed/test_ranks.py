"""Several processes on CPUs: the run of one process with the whole batch, and what is noticed if not."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.xdist_group("ranks")  # its launches are made once

HERE = Path(__file__).parent
EXAMPLES = Path(__file__).parents[2] / "examples"

TWO = [
    "tp+saved", "fsdp+saved", "fsdp_bf16", "fsdp_kept+resumed", "ddp_outside", "ddp_split", "ddp+long", "ddp+mvue",
    "ddp+zero", "ddp+weights", "ddp+mask", "ddp+options", "ddp+later_options",
]  # fmt: skip
FOUR = ["ddp", "fsdp+from_tp", "ddp_tp+from_fsdp", "ddp_tp+mvue", "fsdp_tp+saved", "hsdp"]
PLAIN = ("", "saved", "resumed", "long", "zero", "from_tp", "from_fsdp")
SAME = [s for s in (*TWO, *FOUR) if s.partition("+")[2] in PLAIN and s not in ("fsdp_bf16", "ddp_split")]


def launch(script: Path, *arguments: object, ranks: int, restarts: int = 0) -> "subprocess.CompletedProcess[str]":
    how = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    how += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    command = [sys.executable, *(how if ranks > 1 else []), str(script), *map(str, arguments)]
    # without the last a restart meets at the store of the life before, where gloo may find the addresses of the dead
    switches = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {**os.environ, **switches}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


class Found:
    """What the scenarios of one process, of two and of four left."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, {}
        for ranks, scenarios in ((1, ["alone"]), (2, TWO), (4, FOUR)):  # in this order: four load what two saved
            self.said[ranks] = launch(HERE / "train.py", folder, ",".join(scenarios), ranks=ranks).stderr

    def __getitem__(self, scenario: str) -> list[dict[str, Any]]:
        ranks = 1 if scenario == "alone" else 2 if scenario in TWO else 4
        return [torch.load(self.folder / f"{scenario}-{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(tmp_path_factory.mktemp("ranks"))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("scenario", SAME)
def test_ranks_train_as_one_process_with_the_whole_batch(found: Found, scenario: str) -> None:
    """Same losses and masks, to the rounding of the reduction; to the bit among the ranks. Some go on from the
    checkpoint of other ranks, that were spread in another way.
    """
    (alone,), ranks = found["alone"], found[scenario]
    assert alone["losses"][-1] < 0.95 * alone["losses"][0] and len(alone["masks"]) == 9
    for rank in ranks:
        assert set(rank["reasons"].values()) == {None}
        assert rank["losses"] == pytest.approx(alone["losses"][-len(rank["losses"]) :], rel=1e-5)
        assert len(rank["losses"]) == (5 if "+from" in scenario else 10) and rank["step"] == alone["step"] == 10
        assert same(rank["model"], ranks[0]["model"]) and same(rank["masks"], ranks[0]["masks"])
        for name, mask in alone["masks"].items():
            assert (mask != rank["masks"][name]).float().mean() < 1e-3  # a near tie may fall the other way


def test_masks_are_the_same_on_all_ranks_after_a_hundred_steps(found: Found) -> None:
    first, second = (rank["late"] for rank in found["ddp+long"])
    assert first["step"] == second["step"] == 100
    assert same(first["masks"], second["masks"]) and same(first["model"], second["model"])
    assert not same(first["masks"], found["ddp+long"][0]["masks"])  # they did move


def test_pruned_gradients_leave_ranks_equal(found: Found) -> None:
    """Each data-parallel rank draws for itself; what the gradients are reduced to is the same on all."""
    for scenario in ("ddp+mvue", "ddp_tp+mvue"):
        ranks = found[scenario]
        assert all(same(rank["model"], ranks[0]["model"]) for rank in ranks)
        assert all(same(rank["masks"], ranks[0]["masks"]) for rank in ranks)
        assert not same(ranks[0]["model"], found["alone"][0]["model"])  # they were pruned


def test_seeds_differ_by_data_parallel_rank_and_agree_across_tensor_parallel_replicas(found: Found) -> None:
    first, second, third, fourth = (rank["seeds"] for rank in found["ddp_tp+mvue"])
    assert first == second and third == fourth and not set(first.values()) & set(third.values())
    assert len(set(first.values())) == len(first)
    first, second = (rank["seeds"] for rank in found["ddp+mvue"])
    assert not set(first.values()) & set(second.values())


def test_mixed_precision_gathers_and_packs_in_16_bit(found: Found) -> None:
    (alone,), (first, second) = found["alone"], found["fsdp_bf16"]
    assert same(first["masks"], second["masks"]) and same(first["model"], second["model"])
    assert first["losses"] == pytest.approx(alone["losses"], rel=5e-3) and first["losses"] != alone["losses"]


@pytest.mark.parametrize(
    ("scenario", "shards", "parts", "itemsize"),
    [("ddp", 1, 1, 4), ("fsdp+saved", 2, 1, 4), ("fsdp_bf16", 2, 1, 2), ("tp+saved", 1, 2, 4),
     ("fsdp_tp+saved", 2, 2, 4), ("fsdp+from_tp", 4, 1, 4), ("hsdp", 2, 1, 4)],
)  # fmt: skip
def test_what_each_rank_holds(found: Found, scenario: str, shards: int, parts: int, itemsize: int) -> None:
    """The masters of its shard; the packed forms, W and its transpose, of what a forward gathers."""
    entries = sum(mask.numel() for mask in found["alone"][0]["masks"].values())
    packed = entries * itemsize // 2 // parts + entries // 8 // parts
    for rank in found[scenario]:
        masters = 4 * entries // (shards * parts)
        assert rank["memory"] == {"masters": masters, "packed": packed, "packed_t": packed, "masks": 0}


def test_a_graph_that_ddp_splits_is_reported_with_the_way_out(found: Found) -> None:
    assert found.said[2].count("whose graph Dynamo splits at DDP's buckets") == 2  # once a rank
    assert "Set torch._dynamo.config.optimize_ddp = False" in found.said[2]


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("ddp+weights", r"found another weight of 0\.wq\.weight on rank 1 than on rank 0"),
        ("ddp+mask", r"found another mask of 1\.up\.weight on rank 1 than on rank 0"),
        ("ddp+later_options", r"found decay of 0\.wq\.weight as 0\.2 on rank 1 and 0\.1 on rank 0"),
    ],
)
def test_ranks_that_differ_are_noticed_on_all(found: Found, scenario: str, message: str) -> None:
    assert all(re.search(message, rank["error"] or "") for rank in found[scenario]), found[scenario]


def test_other_options_raise_where_the_first_graph_is_compiled(found: Found) -> None:
    """Before the first step, without a call of ours in the script."""
    first, second = found["ddp+options"]
    assert first["error"] is None
    assert re.search(r"found option decay=0\.2 on rank 1 and 0\.1 on rank \d, need the same", second["error"])


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    """torchrun starts all ranks again; the curve is that of a run that was not killed."""
    numbers = {"steps": 8, "save-every": 3, "refresh-every": 2, "width": 128, "ff": 128, "depth": 1, "inner": "eager"}
    settings = [word for name, value in numbers.items() for word in (f"--{name}", value)]
    curves = {}
    for name, restarts in (("whole", 0), ("killed", 1)):
        arguments = [tmp_path / name, *settings]
        done = launch(HERE / "killed.py", EXAMPLES, "--out", *arguments, ranks=2, restarts=restarts)
        told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        curves[name] = {row["step"]: (row["loss"], row["flip_rate"]) for row in told}
        if restarts:
            assert [row["step"] for row in told] == [1, 2, 3, 4, 4, 5, 6, 7, 8]  # killed in step 5, saved after step 3
    assert curves["killed"] == curves["whole"] and len(curves["whole"]) == 8


def test_the_mean_over_data_parallel_ranks_is_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weight gradient that each of eight ranks prunes by itself; were their draws the same, eight ranks would be
    no better than one.
    """
    import torch.distributed as dist

    from sparse24.compiler.seeds import draw_seed
    from sparse24.kernels import ops

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    weight = SimpleNamespace(recipe=SimpleNamespace(seed=0), step=0, calls=0, layer=1, split=False)
    generator = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(64, 64, generator=generator) for _ in range(2))
    exact, apart, alike = dy.t() @ x, torch.zeros(64, 64), torch.zeros(64, 64)
    steps, seeds = 40, set()
    for step in range(steps):
        weight.step = step
        for rank in range(8):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            seeds.add(draw_seed(weight))  # type: ignore[arg-type]
            drawn = torch.tensor([draw_seed(weight)])  # type: ignore[arg-type]
            found = ops.wgrad(ops.pack_gradient(dy, drawn, 0), x, 64)
            apart += found / (8 * steps)
            if rank == 0:
                alike += found / steps
    assert len(seeds) == 8 * steps
    errors = [((mean - exact).norm() / exact.norm()).item() for mean in (apart, alike)]
    assert errors[0] < 1.3 * errors[1] / 8**0.5, errors  # as the error of 320 independent draws beside that of 40


def test_the_decision_of_the_first_rank_to_measure_holds_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from sparse24.compiler import ranks

    assert ranks.first_of("a", "mine") == "mine"
    store = dist.HashStore()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks, "_store", lambda: store)
    assert [ranks.first_of("a", said) for said in ("first", "second", "third")] == ["first"] * 3
    assert ranks.first_of("b", "second") == "second"
    monkeypatch.setattr(ranks, "_store", FakeStore)
    assert ranks.first_of("a", "mine") == "mine"  # of PyTorch's fake backend, for dry runs


def test_a_shard_that_cannot_be_decayed_says_why() -> None:
    from sparse24.compiler.fsdp import Shard

    assert Shard(None, 0, 256, 3, 4).unfit() is None and Shard(None, 0, 256, 3, 4).first == 192
    assert Shard(None, 0, 256, 0, 8).unfit() == "FSDP shards its 256 rows over 8 ranks, need a multiple of 64 on each"
    assert Shard(None, 1, 256, 0, 4).unfit() == "FSDP shards its dimension 1, need whole rows on each rank"
    assert Shard(None, 1, 256, 0, 1).unfit() is None  # replicate


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_torchtitan_trains_sparse_with_the_small_file(tmp_path: Path, tensor_parallel: int) -> None:
    """FSDP on two ranks, and tensor parallelism on two."""
    pytest.importorskip("torchtitan", reason="needs pip install torchtitan==0.3.0, which has many dependencies")
    arguments = ["--parallelism.tensor_parallel_degree", tensor_parallel]
    launch(HERE / "titan.py", EXAMPLES, tmp_path, *arguments, ranks=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["losses"][-1] < found["losses"][0] - 0.5
        sparse = {name for name, reason in found["reasons"].items() if reason is None}
        assert len(sparse) == 18 and all("feed_forward" in name for name in sparse)
