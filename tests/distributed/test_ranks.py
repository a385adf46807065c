"""DDP and FSDP2 on CPU processes: the run of one process with the whole batch, and what is noticed if not."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TRAIN = Path(__file__).with_name("train.py")


def launch(folder: Path, what: str, ranks: int) -> "subprocess.CompletedProcess[str]":
    folder.mkdir(exist_ok=True)
    how = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *how, str(TRAIN), str(folder), what]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def results(folder: Path, what: str, ranks: int) -> list[dict[str, Any]]:
    done = launch(folder, what, ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results(tmp_path_factory.mktemp("alone"), "alone", 1)[0]


@pytest.mark.parametrize(
    ("what", "ranks"), [("ddp", 4), ("ddp_outside", 2), ("fsdp", 4), ("fsdp_kept", 2), ("fsdp_resumed", 2)]
)
def test_ranks_train_as_one_process_with_the_whole_batch(
    tmp_path: Path, alone: dict[str, Any], what: str, ranks: int
) -> None:
    """Same losses and masks, to the rounding of the reduction; to the bit among the ranks."""
    found = results(tmp_path, what, ranks)
    assert alone["losses"][-1] < 0.8 * alone["losses"][0]
    for rank in found:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert rank["step"] == alone["step"] == len(alone["losses"])
        assert all(torch.equal(rank["model"][name], found[0]["model"][name]) for name in rank["model"])
        for name, mask in rank["masks"].items():
            assert torch.equal(mask, found[0]["masks"][name])
            assert (mask != alone["masks"][name]).float().mean() < 1e-3  # a near tie may fall the other way


def test_a_graph_that_ddp_splits_is_reported_with_the_way_out(tmp_path: Path) -> None:
    done = launch(tmp_path, "ddp_split", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("whose graph Dynamo splits at DDP's buckets") == 2  # once a rank
    assert "Set torch._dynamo.config.optimize_ddp = False" in done.stderr


def test_pruned_gradients_leave_ranks_equal(tmp_path: Path) -> None:
    """Each rank draws for itself; what the gradients are reduced to is the same on all."""
    first, second = results(tmp_path, "mvue", 2)
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    assert all(torch.equal(first["masks"][name], second["masks"][name]) for name in first["masks"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("weights", "found another weight of .*0.up.weight on rank 1 than on rank 0"),
        ("mask", "found another mask of .*0.up.weight on rank 1 than on rank 0"),
        ("options", r"found decay of .*0.up.weight as 0.2 on rank 1 and 0.1 on rank 0"),
    ],
)
def test_ranks_that_differ_are_noticed(tmp_path: Path, what: str, message: str) -> None:
    import re

    done = launch(tmp_path, what, 2)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr[-3000:]


def test_ranks_draw_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed of a draw is another one on each rank, and the mean over ranks is unbiased as that over steps is."""
    import torch.distributed as dist

    from sparse24.compiler.seeds import draw_seed

    class Weight:
        class recipe:
            seed = 0

        step, calls, layer = 3, 0, 1

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    drawn = []
    for rank in range(8):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        drawn.append(draw_seed(Weight))  # type: ignore[arg-type]
    assert len(set(drawn)) == 8


def test_a_shard_that_cannot_be_decayed_says_why() -> None:
    from types import SimpleNamespace

    from torch.distributed.tensor import Replicate, Shard

    from sparse24.compiler import fsdp

    def unfit(rows: int, ranks: int, *placements: Any) -> str | None:
        mesh = SimpleNamespace(size=lambda: ranks)
        param = SimpleNamespace(placements=placements, shape=(rows, 64), device_mesh=mesh)
        return fsdp.Shard(param, 0).unfit()

    assert unfit(256, 4, Shard(0)) is None
    assert unfit(256, 8, Shard(0)) == "FSDP shards its 256 rows over 8 ranks, need a multiple of 64 on each"
    assert "need whole rows on each rank" in (unfit(256, 4, Shard(1)) or "")
    assert "need whole rows on each rank" in (unfit(256, 4, Replicate(), Shard(0)) or "")
