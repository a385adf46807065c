"""examples/train_gpt.py in small: what it leaves behind, and that an interrupted run ends as one that was not."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS = """
    --device cpu --inner eager --steps 12 --warm-up 2 --refresh-every 3 --dense-steps 3 --log-every 4
    --width 64 --depth 2 --ff 128 --context 64 --batch 2
"""
TINY = SETTINGS.split()


@pytest.fixture
def train_gpt(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    import train_gpt

    return train_gpt


def interrupt_before(step: int, run: str, train_gpt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Presses Ctrl-C while the run named works on the step with this number."""
    original = train_gpt.Trainer.step

    def pressed(self: Any) -> torch.Tensor:
        if self.record.name == run and self.record.step == step:
            signal.raise_signal(signal.SIGINT)
        return original(self)

    monkeypatch.setattr(train_gpt.Trainer, "step", pressed)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_leaves_a_report_a_picture_and_checkpoints(train_gpt: Any, tmp_path: Path, capsys: Any) -> None:
    assert train_gpt.main([*TINY, "--out", str(tmp_path)]) == 0

    report = report_of(tmp_path)
    sparse, dense = report["runs"]["sparse24"], report["runs"]["dense"]
    assert [row["step"] for row in sparse["log"]] == [4, 8, 12]
    assert [row["phase"] for row in sparse["log"]] == ["sparse", "sparse", "dense"]
    assert {row["phase"] for row in dense["log"]} == {"dense"}
    for run in (sparse, dense):
        assert run["held_out"] < run["log"][0]["loss"], "nothing was learnt"
    assert report["held_out_over_dense_percent"] == 100 * (sparse["held_out"] / dense["held_out"] - 1)
    assert report["tokens_per_second"].keys() == {"sparse24", "dense"}

    feed_forward = {f"blocks.{i}.feed_forward.{name}.weight" for i in (0, 1) for name in ("gate", "up", "down")}
    assert {name for name, reason in sparse["weights"].items() if reason is None} == feed_forward
    assert [step for step, _ in sparse["flips"]] == [3, 6]
    assert all(0 <= rate <= 0.5 for _, rate in sparse["flips"])
    assert report["flip_rate"]["peak"] == max(rate for _, rate in sparse["flips"])

    text = (tmp_path / "report.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "of sparse weights 2 times that." in text
    assert "Flip rate over 3 steps" in text and "Trained dense from step 9 on" in text
    assert (tmp_path / "curves.svg").read_text().lstrip().startswith("<?xml")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 12 and state.keys() >= {"model", "optimizer", "session"}


def test_an_interrupted_and_resumed_run_ends_as_one_that_was_not(
    train_gpt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the sparse phase, in the dense phase, and in the dense run.

    Both runs go on from one checkpoint: the draws that prune gradients are numbered by layer over the whole process, so
    that a second model in it would draw others.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with monkeypatch.context() as patch:
        interrupt_before(1, "sparse24", train_gpt, patch)
        assert train_gpt.main([*TINY, "--out", str(whole)]) == 130
    shutil.copytree(whole, parts)
    assert train_gpt.main([*TINY, "--out", str(whole), "--resume"]) == 0

    for run, step in (("sparse24", 4), ("sparse24", 9), ("dense", 6)):
        with monkeypatch.context() as patch:
            interrupt_before(step, run, train_gpt, patch)
            assert train_gpt.main([*TINY, "--out", str(parts), "--resume"]) == 130
    assert not (parts / "report.json").exists()
    assert train_gpt.main([*TINY, "--out", str(parts), "--resume"]) == 0

    expected, found = report_of(whole)["runs"], report_of(parts)["runs"]
    assert found["sparse24"]["flips"] == expected["sparse24"]["flips"]
    for name in expected:
        assert found[name]["held_out"] == pytest.approx(expected[name]["held_out"], rel=1e-6)


def test_resume_refuses_other_settings_and_a_missing_checkpoint(train_gpt: Any, tmp_path: Path) -> None:
    arguments = [*TINY, "--no-dense-run", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="there is no"):
        train_gpt.main([*arguments, "--resume"])
    assert train_gpt.main(arguments) == 0
    assert report_of(tmp_path)["held_out_over_dense_percent"] is None
    with pytest.raises(SystemExit, match=r"decay was 0\.0002, is 0\.5"):
        train_gpt.main([*arguments, "--resume", "--decay", "0.5"])


def test_without_a_compiler_auto_takes_aot_eager_on_a_cpu(train_gpt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert train_gpt.parse(["--device", "cpu"]).inner == "aot_eager"
    assert train_gpt.parse(["--device", "cuda"]).inner == "inductor"


def test_every_setting_is_explained_with_its_default(train_gpt: Any) -> None:
    import _settings

    actions = [action for action in _settings.parser()._actions if action.dest != "help"]
    text = " ".join(_settings.parser().format_help().split())
    for action in actions:
        assert action.help
        takes_a_value = not isinstance(action, argparse._StoreTrueAction)
        if takes_a_value:
            assert f"{action.help.split(' (default')[0]} (default: " in text, action.dest


def test_widths_must_be_multiples_of_64(train_gpt: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        train_gpt.parse(["--ff", "100"])
    assert "--ff is 100, need a multiple of 64" in capsys.readouterr().err


def test_batches_depend_on_seed_and_step_alone(train_gpt: Any) -> None:
    text = torch.arange(5000).remainder(256).to(torch.uint8)
    corpus = train_gpt.Corpus(text, text, 1, "")
    sizes = {"batch": 3, "context": 8}
    tokens, targets = corpus.batch(5, seed=1, **sizes)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal(tokens, corpus.batch(5, seed=1, **sizes)[0])
    assert not torch.equal(tokens, corpus.batch(6, seed=1, **sizes)[0])
    assert not torch.equal(tokens, corpus.batch(5, seed=2, **sizes)[0])
    first, *_, last = corpus.held_out_batches(4, **sizes)
    assert first[0][0, 0] == 0 and last[1][-1, -1] == text[-1]
