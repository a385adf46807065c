"""The command line: python -m sparse24 explain | doctor | bench."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse24.compiler import doctor
from sparse24.compiler.command import main
from sparse24.kernels import cost, format_check, layout
from sparse24.kernels.gain import Layer
from sparse24.kernels.providers import MaskedDense, Problem

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = ["vocab=128", "width=64", "depth=2", "heads=4", "ff=128"]


@pytest.fixture
def inside_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(EXAMPLES)


def failed(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.usefixtures("inside_examples")
def test_explain_prints_the_report_of_a_model_made_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "blocks:NanoGPT", "--args", *SIZES, "--input", "2x16", "--options", "layers=all"]) == 0
    out = capsys.readouterr().out
    assert "8 of 9 are sparse" in out and "blocks.1.mlp.proj.weight" in out


@pytest.mark.usefixtures("inside_examples")
def test_explain_names_what_is_wrong_with_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["explain", "blocks:NanoGPT", "--args", *SIZES]
    assert "need a shape such as 8x2048" in failed([*model, "--input", "8by2048"], capsys)
    assert "need one of float32" in failed([*model, "--input", "8x8:int5"], capsys)
    assert "need NAME=VALUE" in failed([*model, "--input", "8x8", "--options", "all"], capsys)
    assert "did you mean layers" in failed([*model, "--input", "8x8", "--options", "layer=all"], capsys)
    assert "No module named 'nowhere'" in failed(["explain", "nowhere:make"], capsys)
    assert "has no attribute 'Nano'" in failed(["explain", "blocks:Nano"], capsys)
    assert "need MODULE:FACTORY" in failed(["explain", "blocks"], capsys)
    assert "missing 5 required" in failed(["explain", "blocks:NanoGPT"], capsys)
    assert "returned a OrderedDict, need an nn.Module" in failed(["explain", "collections:OrderedDict"], capsys)
    assert main(model) == 1 and "failed with no --input" in capsys.readouterr().err
    assert main([*model, "--input", "2x16:float32"]) == 1 and "input 2x16 torch.float32" in capsys.readouterr().err


def test_doctor_on_a_machine_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SPARSE24_CACHE", str(tmp_path / "not" / "there"))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "training runs by masked dense matmuls" in out and "FAIL" not in out
    assert "spmm: 1 of 1 algorithms right" in out and str(tmp_path / "not" / "there") in out
    assert not list(tmp_path.iterdir())


class Wrong(MaskedDense):
    """Right with algorithm 0, wrong with 1."""

    name = "wrong"

    def algorithms(self, problem: Problem) -> Sequence[int | None]:
        return [0, 1]

    def run(self, problem: Problem, packed: Tensor, x: Tensor, algorithm: int | None) -> Tensor:
        return super().run(problem, packed, x, algorithm) * (1 if algorithm == 0 else 1.1)


class Broken(Wrong):
    name = "broken"

    def algorithms(self, problem: Problem) -> Sequence[int | None]:
        return [1] if problem.direction == "wgrad" else [0]


def test_doctor_fails_where_no_algorithm_of_a_provider_is_right(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PROVIDERS", (Wrong(),))
    assert main(["doctor"]) == 0
    assert "spmm: 1 of 2 algorithms right" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "PROVIDERS", (Broken(),))
    assert main(["doctor"]) == 1
    assert "wgrad: 0 of 1 algorithms right" in capsys.readouterr().out


def test_doctor_says_what_to_do_about_a_cache_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSE24_CACHE", str(tmp_path / "file"))
    assert main(["doctor"]) == 1
    assert "set SPARSE24_CACHE to a folder" in capsys.readouterr().out


@pytest.mark.parametrize("reason", [None, "it packs bfloat16 in another order than the known one (sm_90)"])
def test_doctor_reports_the_check_of_the_packed_format(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_check, "check", lambda device: reason)
    found = doctor._format(torch.device("cuda"))
    assert found.ok == (reason is None) and found.found == (reason or "as expected")
    assert doctor._format(torch.device("cpu")).ok


def test_doctor_names_a_gpu_whose_format_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(layout, "arch", lambda device: None)
    found = {check.what: check for check in doctor._gpu(torch.device("cuda"))}
    assert not found["sparse tensor cores"].ok and "12.0" in found["sparse tensor cores"].found


def test_bench_predicts_without_a_gpu_and_says_so(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--d", "4096", "--ff", "14336", "--tokens", "16384", "--gated"]) == 0
    out = capsys.readouterr().out
    assert "predicted for H200 (there is no GPU here)" in out and "28672x4096" in out and "1.40x" in out
    assert "gains less" not in out
    assert main(["bench", "--d", "256", "--ff", "1024", "--tokens", "64"]) == 0
    assert "sparse is faster for: nothing; the layer gains 1.00x" in (out := capsys.readouterr().out)
    assert "this layer gains less" in out


def test_bench_measures_on_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(*args: object) -> cost.Cost:
        asked.append(args)
        return cost.Cost(cost.Times(1, 1, 1), cost.Times(0.5, 0.5, 0.5, 0.5), "mvue", ("a", "a", "a"), True)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr("sparse24.compiler.command.why_slow", lambda *_: None)
    monkeypatch.setattr(cost, "measured", measured)
    assert main(["bench", "--d", "64", "--ff", "128", "--tokens", "32", "--master", "bfloat16"]) == 0
    device = torch.device("cuda")
    assert asked == [
        (Layer(128, 64, 32, torch.bfloat16, torch.bfloat16, device, "mvue", "gelu"),),
        (Layer(64, 128, 32, torch.bfloat16, torch.bfloat16, device, "mvue", None),),
    ]
    assert "measured on Some GPU" in (out := capsys.readouterr().out) and "gains 1.50x" in out


def test_bench_names_a_width_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert "argument --d: found 100, need a multiple of 64" in failed(
        ["bench", "--d", "100", "--ff", "128", "--tokens", "1"], capsys
    )
    assert "at least 1" in failed(["bench", "--d", "64", "--ff", "128", "--tokens", "0"], capsys)


def test_it_runs_as_a_module(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "sparse24", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(word in done.stdout for word in ("explain", "doctor", "bench"))
    for command in ("explain", "doctor", "bench"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert not stopped.value.code and len(capsys.readouterr().out) > 200
