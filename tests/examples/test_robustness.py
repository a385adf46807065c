"""Killed at any moment, a full disk, a damaged checkpoint: what is lost is said, and never more than the last step."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse24.compiler.session import contents

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS, KILLS = 80, 20

# One process imports torch and forks a worker for each life: a life costs the compilation, not the import.
SUPERVISOR = """
    import json, os, random, signal, sys, time

    sys.path.insert(0, {examples!r})
    import torch
    import plain_loop

    torch.set_num_threads(1)
    plain_loop.recipe = lambda args: {{"inner": "eager", "refresh_every": 3, "dense_after": 60}}

    def start(folder):
        '''A worker that trains on from its last checkpoint, and the pipe of the lines it prints before it saves.'''
        readable, writable = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(writable, 1)
            os.close(readable)
            sys.stdout = os.fdopen(1, "w", buffering=1)
            resume = ["--resume"] if os.path.exists(os.path.join(folder, "checkpoint.pt")) else []
            try:
                plain_loop.main(["--out", folder, "--steps", "{steps}", "--save-every", "1", "--batch", "2", *resume])
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(writable)
        return pid, os.fdopen(readable)

    def finish(pid, lines):
        printed = lines.read().splitlines()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), len(printed)

    draws = random.Random(0)
    kills, steps = [], []
    for life in range({kills}):
        pid, lines = start("killed")
        if life % 5 == 0:
            time.sleep(draws.uniform(0, 0.6))  # while it loads and compiles
        else:
            for _ in range(draws.randint(1, 3)):
                lines.readline()
            time.sleep(draws.uniform(0, 0.008))  # while it saves, or in the step after that
        os.kill(pid, signal.SIGKILL)
        kills.append(finish(pid, lines)[0])
        if os.path.exists("killed/checkpoint.pt"):
            steps.append(torch.load("killed/checkpoint.pt", weights_only=True)["step"])
    print(json.dumps({{"kills": kills, "steps": steps, "killed": finish(*start("killed")),
                       "whole": finish(*start("whole"))}}))
"""


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_killed_twenty_times_a_run_ends_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    code = textwrap.dedent(SUPERVISOR).format(examples=str(EXAMPLES), steps=STEPS, kills=KILLS)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] == [-9] * KILLS, done.stderr
    assert told["steps"] == sorted(told["steps"]) and 0 < told["steps"][-1] < STEPS
    assert len(set(told["steps"])) > KILLS // 3, "the lives made no progress"
    assert told["killed"] == [0, STEPS - told["steps"][-1]] and told["whole"] == [0, STEPS]
    killed, whole = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("killed", "whole"))
    ended = contents(killed["session"])["weights"].values()
    assert killed["step"] == STEPS and {w["phase"] for w in ended} == {"dense"}
    assert same(killed, whole)


SETTINGS = """
    --device cpu --inner eager --steps 12 --warm-up 2 --refresh-every 3 --dense-steps 3 --log-every 2 --save-every 4
    --width 64 --depth 2 --ff 128 --context 64 --batch 2 --no-dense-run
"""
TINY = SETTINGS.split()


@pytest.fixture
def train_gpt(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    import train_gpt

    return train_gpt


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_leaves_the_checkpoint_before(
    train_gpt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train_gpt.Trainer.step

    def step(self: Any) -> torch.Tensor:
        if self.record.step == 6:
            (tmp_path / "checkpoint.tmp").symlink_to("/dev/full")
        return original(self)

    monkeypatch.setattr(train_gpt.Trainer, "step", step)
    with pytest.raises(SystemExit, match=r"checkpoint of step 8 could not be written.*still holds the one before"):
        train_gpt.main([*TINY, "--out", str(tmp_path)])
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4
    assert not (tmp_path / "checkpoint.tmp").is_symlink()
    monkeypatch.undo()
    monkeypatch.syspath_prepend(EXAMPLES)
    assert train_gpt.main([*TINY, "--out", str(tmp_path), "--resume"]) == 0
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 12


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "folder"])
def test_a_checkpoint_that_cannot_be_read_is_named_and_kept(train_gpt: Any, tmp_path: Path, damage: str) -> None:
    assert train_gpt.main([*TINY, "--out", str(tmp_path)]) == 0
    checkpoint = tmp_path / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    if damage == "folder":
        checkpoint.unlink()
        checkpoint.mkdir()
    else:
        checkpoint.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"not a checkpoint"}[damage])
    with pytest.raises(SystemExit, match=r"--resume: .*checkpoint\.pt cannot be read"):
        train_gpt.main([*TINY, "--out", str(tmp_path), "--resume"])
    assert checkpoint.exists() and (damage == "folder" or checkpoint.read_bytes() != whole)


def test_a_nan_ends_the_run_with_the_layer_and_the_last_good_checkpoint(
    train_gpt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train_gpt.Trainer.loss

    def loss(self: Any, *batch: torch.Tensor) -> torch.Tensor:
        return original(self, *batch) * (float("nan") if self.record.step == 6 else 1.0)

    monkeypatch.setattr(train_gpt.Trainer, "loss", loss)
    with pytest.raises(
        FloatingPointError, match=r"blocks\.0\.feed_forward\.\w+\.weight has \d+ NaN .* optimizer step 7"
    ):
        train_gpt.main([*TINY, "--out", str(tmp_path)])
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4 and all(t.isfinite().all() for t in state["model"].values())
