"""Two GPUs of one machine, through NCCL: tests/distributed/train.py in bf16, compiled by Inductor."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.xdist_group("many_gpus"),
]
SCENARIOS = ["tp+saved", "fsdp+from_tp", "fsdp", "ddp", "fsdp+mvue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).parents[1] / "distributed" / "train.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for how, scenarios in (([], ["alone"]), (torchrun, SCENARIOS)):
        command = [sys.executable, *how, str(script), str(made), ",".join(scenarios), "cuda"]
        environment = {**os.environ, "OMP_NUM_THREADS": "4"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
        assert done.returncode == 0, done.stderr[-6000:]
    return made


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_gpus_train_as_one_with_the_whole_batch(folder: Path, scenario: str) -> None:
    """To the rounding of bf16; to the bit among the ranks. `train.py` has called check_ranks."""
    alone: dict[str, Any] = torch.load(folder / "alone-0.pt")
    first, second = (torch.load(folder / f"{scenario}-{rank}.pt") for rank in range(2))
    assert set(first["reasons"].values()) == {None} and len(first["masks"]) == 9
    assert first["losses"] == pytest.approx(alone["losses"][-len(first["losses"]) :], rel=0.03)
    assert alone["losses"][-1] < 0.95 * alone["losses"][0]
    for kind in ("masks", "model"):
        assert all(torch.equal(first[kind][name], second[kind][name]) for name in first[kind])
    if "mvue" not in scenario:
        for name, mask in alone["masks"].items():
            assert (mask != first["masks"][name]).float().mean() < 0.05
