"""benchmarks/quality/plan.py: what it runs, in what order and where, and what it says of what fails or is missing."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.xdist_group("quality")  # the text is tokenized once


class Finished:
    """In subprocess.Popen's place: run.py that is done at once, or fails, or never ends."""

    started: list[tuple[str, list[str]]]
    fails: str
    ends = True

    def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
        run = sys.modules["run"]
        args = run.parse(command[2:])
        what = ["text"] if args.prepare else ["search"] if args.search_only else args.arms
        type(self).started.append((env["CUDA_VISIBLE_DEVICES"], [args.family, str(args.seed), *what]))
        self.pid, self.returncode = 0, None
        if not self.ends:
            return
        self.returncode = 0
        args.out.mkdir(parents=True, exist_ok=True)
        if args.prepare:
            run.Family(args.family, args.size, args.work, 1_000_000, torch.device("cpu"))
        elif args.search_only:
            evidence = {"decay": 1.0, "settings": {"steps": args.search_steps}}
            run.evidence_of(args).write_text(json.dumps(evidence))
        for arm in args.arms:
            if arm == self.fails:
                self.returncode = 1
                return
            (args.out / f"{args.name}_{arm}.json").write_text("{}")

    def poll(self) -> int | None:
        return self.returncode

    def terminate(self) -> None:
        self.returncode = 143

    def wait(self) -> None:
        pass


@pytest.fixture
def planned(
    module: Any, monkeypatch: pytest.MonkeyPatch, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[list[Any], str]]:
    """Runs a plan with `Finished`; what it started and said."""
    plan = module("plan")
    monkeypatch.setattr(plan.subprocess, "Popen", Finished)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(Finished, "ends", True)

    def go(*more: str, fails: str = "", seconds: float = 1000) -> tuple[list[Any], str]:
        Finished.started, Finished.fails = [], fails
        options = ["--", "--out", str(tmp_path / "out"), "--work", str(work)]
        plan.main(["--scale", "tiny", "--seconds", str(seconds), *more, *options])
        return Finished.started, capsys.readouterr().out

    return go


def test_a_plan_runs_the_most_important_first_on_all_gpus_and_nothing_twice(planned: Any, work: Path) -> None:
    for path in work.glob("text_*"):
        path.unlink()
    started, said = planned("--families", "gpt", "vit", "--seeds", "0", "1", "--gpus", "2", "--per-gpu", "2")
    what = [jobs for _, jobs in started]
    assert what.index(["gpt", "0", "text"]) < what.index(["gpt", "0", "search"])
    assert what[0] == ["gpt", "0", "text"] and ["vit", "0", "search"] in what[:4]
    assert started[0][0] == "" and {gpu for gpu, _ in started[1:]} == {gpu for gpu, _ in started[1:5]} == {"0", "1"}
    order = [(family, seed, arm) for family, seed, *arms in what for arm in arms]
    assert len(order) == len(set(order)) == 3 + 2 * 2 * 14 + 2 * 15
    assert all(order.index(("gpt", s, "fst")) < order.index(("gpt", s, "combined")) for s in "01")
    assert order.index(("gpt", "0", "combined")) < order.index(("gpt", "0", "ste")) < order.index(("gpt", "1", "fst"))
    assert not [jobs for jobs in what if jobs[0] == "vit" and "combined" in jobs] and max(map(len, what)) == 5
    assert "89 of 89 are done" in said and "missing" not in said
    assert planned("--families", "gpt", "vit", "--seeds", "0", "1")[0] == []


def test_what_fails_is_said_and_the_rest_goes_on(planned: Any) -> None:
    more = ("--families", "vit", "--seeds", "0", "--arms", "fst,fst-sparse-end,ste,half", "--gpus", "1")
    started, said = planned(*more, fails="ste")
    assert [jobs for _, jobs in started][-1] == ["vit", "0", "half"]
    assert "FAILED with exit code 1" in said and "failed: vit 0 ste" in said and "missing" not in said
    assert [jobs for _, jobs in planned(*more)[0]] == [["vit", "0", "ste"]]


def test_a_plan_ends_in_time_and_says_what_is_missing(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Finished, "ends", False)
    began = time.monotonic()
    more = ("--families", "vit", "--seeds", "0", "--worth-starting", "0.1")
    started, said = planned(*more, "--arms", "dense,fst", "--gpus", "1", seconds=21)
    assert time.monotonic() - began < 5
    assert sorted(jobs for _, jobs in started) == [["vit", "0", "dense"], ["vit", "0", "search"]]
    assert "0 of 3 are done" in said and "missing: vit search; vit 0 dense; vit 0 fst" in said and "failed" not in said
    assert planned(*more, seconds=20)[0] == []  # nothing is begun without time for it


def test_a_plan_runs_run_py(tmp_path: Path, module: Any, capsys: pytest.CaptureFixture) -> None:
    where = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    plan = [
        "--scale",
        "tiny",
        "--seconds",
        "300",
        "--families",
        "vit",
        "--seeds",
        "0",
        "--arms",
        "dense",
        "--gpus",
        "1",
    ]
    module("plan").main([*plan, "--per-gpu", "2", "--", "--steps", "4", "--inner", "eager", *where])
    assert "1 of 1 are done" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "vit_tiny_0_dense.json").read_text())
    assert result["step"] == 4 and result["settings"]["shared"]
    assert "held-out loss" in (tmp_path / "work" / "logs" / "vit_tiny_0_dense.log").read_text()
