"""benchmarks/quality in small: every arm trains, killed runs end as whole ones, the report says what was saved."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tokenizers")
QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(QUALITY.parent)
    monkeypatch.syspath_prepend(QUALITY)
    return importlib.import_module


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the tests: the text is tokenized once."""
    return tmp_path_factory.mktemp("work")


def tiny(family: str, out: Path, work: Path, *more: str) -> list[str]:
    return ["--family", family, "--tiny", "--inner", "eager", "--out", str(out), "--work", str(work), *more]


def load(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / f"{name}.json").read_text())


def test_every_arm_trains_and_the_report_says_what_was_saved(tmp_path: Path, work: Path, module: Any) -> None:
    pytest.importorskip("matplotlib")
    run, report = module("run"), module("report")
    run.main(tiny("gpt", tmp_path / "out", work, "--steps", "30", "--decay", "1e-2"))
    results = {arm: load(tmp_path / "out", f"gpt_tiny_0_{arm}") for arm in run.ARMS}
    for arm, result in results.items():
        first, last = result["held_out"][0], result["held_out"][-1]
        assert last[0] == 30 and last[2] < first[2] - 0.3, arm  # held-out loss
        assert result["losses"][-1][1] < result["losses"][0][1] - 0.3, arm
        to_the_end = arm in ("dense", "half", "s-ste", "ste", "fst-sparse-end")
        assert [step for step, _ in result["flips"]] == list(range(3, 31 if to_the_end else 25, 3)), arm
        assert any(rate > 0 for _, rate in result["flips"]), arm
        dense = arm in ("dense", "half")
        assert result["sparse_weights"] == (0 if dense else 4) and result["error"] is None
        assert result["data"] == results["dense"]["data"] and len(result["data"]["sha256"]) == 64
    assert results["half"]["parameters"] < results["dense"]["parameters"] == results["fst"]["parameters"]
    finals = {result["held_out"][-1][2] for result in results.values()}
    assert len(finals) == len(run.ARMS)  # no two arms are the same run
    assert results["decay-too-large"]["settings"]["options"]["decay"] == 0.5

    document = tmp_path / "results.md"
    report.main(["--results", str(tmp_path / "out"), "--document", str(document)])
    text = document.read_text()
    for arm in run.ARMS:
        assert f"| {report.MEANING[arm]} |" in text and f"{results[arm]['held_out'][-1][2]:.4f}" in text
    base, loss = (results[arm]["held_out"][-1][2] for arm in ("dense", "fst"))
    assert f"{loss - base:+.4f} ({100 * (loss / base - 1):+.2f}%)" in text
    for kind in ("steps", "time", "flips"):
        assert f"(out/curves/gpt_tiny_{kind}.svg)" in text
        assert "<svg" in (tmp_path / "out" / "curves" / f"gpt_tiny_{kind}.svg").read_text()
    report.main(["--results", str(tmp_path / "out"), "--document", str(document)])
    assert document.read_text() == text


@pytest.mark.parametrize("family", ["bert", "vit", "translation"])
def test_the_other_families_search_a_decay_and_train(family: str, tmp_path: Path, work: Path, module: Any) -> None:
    run, report = module("run"), module("report")
    more = ("--arms", "dense,fst", "--steps", "30", "--highest-decay", "100", "--feasible", "0.2", "0.95")
    run.main(tiny(family, tmp_path, work, *more))
    evidence = load(tmp_path, f"{family}_tiny_0_decay")
    results = [load(tmp_path, f"{family}_tiny_0_{arm}") for arm in ("dense", "fst")]
    for result in results:
        assert min(row[2] for row in result["held_out"]) < result["losses"][0][1] - 0.02
        assert (result["held_out"][-1][3] is None) == (family == "bert")
    assert evidence["decay"] == results[1]["settings"]["options"]["decay"]
    assert results[1]["sparse_weights"] == 4
    report.main(["--results", str(tmp_path), "--document", str(tmp_path / "results.md")])
    text = (tmp_path / "results.md").read_text()
    assert f"decay {evidence['decay']:.2g} was taken" in text
    assert ("the least loss possible is" in text) == (family != "bert")


def test_a_killed_run_ends_as_one_that_was_not(
    tmp_path: Path, work: Path, module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = module("run")
    more = ("--arms", "fst-dense-wgrad", "--steps", "30", "--decay", "1e-2", "--save-every", "8")
    run.main(tiny("gpt", tmp_path / "whole", work, *more))
    step = run.Run.step

    def killed(self: Any) -> torch.Tensor:
        if self.record.step == 21:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(run.Run, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run.main(tiny("gpt", tmp_path / "again", work, *more))
    monkeypatch.setattr(run.Run, "step", step)
    with pytest.raises(SystemExit, match="lr was 0.003, is 0.1"):
        run.main(tiny("gpt", tmp_path / "again", work, *more, "--lr", "0.1"))
    run.main(tiny("gpt", tmp_path / "again", work, *more))
    assert "goes on from step 16" in capsys.readouterr().out
    whole, again = (load(tmp_path / where, "gpt_tiny_0_fst-dense-wgrad") for where in ("whole", "again"))
    assert whole["losses"] == again["losses"] and whole["flips"] == again["flips"]
    assert [row[2] for row in whole["held_out"]] == [row[2] for row in again["held_out"]]
    assert not list(work.glob("gpt*.pt"))
    monkeypatch.setattr(run.Run, "step", None)  # what is finished is not run again
    run.main(tiny("gpt", tmp_path / "again", work, *more))
    with pytest.raises(SystemExit, match="was made with other settings .steps was 30, is 31"):
        run.main(tiny("gpt", tmp_path / "again", work, *more, "--steps", "31"))


def test_an_arm_that_ends_in_nan_is_a_result_and_the_others_go_on(
    tmp_path: Path, work: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, report = module("run"), module("report")
    step = run.Run.step

    def poisoned(self: Any) -> torch.Tensor:
        if self.record.step == 6 and self.session.phase == "sparse":
            self.model.blocks[0].feed_forward.up.weight.data[0, 0] = float("nan")
        return step(self)

    monkeypatch.setattr(run.Run, "step", poisoned)
    more = ("--arms", "fst,dense", "--steps", "12", "--decay", "1e-2")
    run.main(tiny("vit", tmp_path, work, *more))
    fst, dense = (load(tmp_path, f"vit_tiny_0_{arm}") for arm in ("fst", "dense"))
    assert "NaN" in fst["error"] and dense["error"] is None and len(dense["held_out"]) == 12
    report.main(["--results", str(tmp_path), "--document", str(tmp_path / "results.md")])
    assert "NaN after step" in (tmp_path / "results.md").read_text()


def test_results_that_do_not_compare_are_refused(tmp_path: Path, work: Path, module: Any) -> None:
    run, report = module("run"), module("report")
    with pytest.raises(SystemExit, match="found no result"):
        report.main(["--results", str(tmp_path), "--document", str(tmp_path / "results.md")])
    run.main(tiny("vit", tmp_path, work, "--arms", "dense", "--steps", "4"))
    run.main(tiny("vit", tmp_path, work, "--arms", "dense", "--steps", "5", "--seed", "1"))
    with pytest.raises(SystemExit, match="2 different steps"):
        report.main(["--results", str(tmp_path), "--document", str(tmp_path / "results.md")])


@pytest.mark.parametrize("script", ["run.py", "report.py"])
def test_help(script: str) -> None:
    done = subprocess.run([sys.executable, QUALITY / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout


def test_sizes_are_what_their_comments_say(module: Any) -> None:
    families = module("families")
    millions = {}
    for name, sizes in families.SIZES.items():
        for scale in ("small", "base"):
            size = sizes[scale]
            with torch.device("meta"):
                if name in ("gpt", "bert"):
                    model = families.LanguageModel(size, 4 * size.width, name == "gpt")
                else:
                    make = families.ViT if name == "vit" else families.EncoderDecoder
                    model = make(size, 4 * size.width)
            millions[name, scale] = sum(p.numel() for p in model.parameters()) / 1e6
    assert all(17 < count < 24 for (_, scale), count in millions.items() if scale == "small"), millions
    assert 123 < millions["gpt", "base"] < 126 and 108 < millions["bert", "base"] < 111
    assert 85 < millions["vit", "base"] < 88 and 100 < millions["translation", "base"] < 115


def test_translation_is_a_function_that_can_be_undone(module: Any) -> None:
    corpora = module("corpora")
    data = corpora.Translation(64, torch.device("cpu"))
    source, begun, target = data.batch(0, 3, 8, 32)
    assert torch.equal(begun[:, 1:], target[:, :-1]) and not begun[:, 0].any()
    for row, out in zip(source.tolist(), target.tolist(), strict=True):
        expected, phrase = [], []
        for token in row:
            if 1 <= token <= corpora.SEPARATORS:
                words = data.dictionaries[token % corpora.DICTIONARIES]
                expected += [words[w].item() for w in reversed(phrase)] + [token]
                phrase = []
            else:
                phrase.append(token)
        assert out == expected
    again, other = data.batch(0, 3, 8, 32)[0], data.batch(0, 4, 8, 32)[0]
    assert torch.equal(source, again) and not torch.equal(source, other)


def test_images_have_the_optimum_that_is_told(module: Any) -> None:
    """The likelihood of every pattern under every shift, by correlation: the best classifier there is."""
    corpora = module("corpora")
    data = corpora.Images(10, 16, torch.device("cpu"))
    images, labels = data.batch(0, 0, 4000)
    spectra = torch.fft.rfft2(data.patterns)
    scores = torch.stack(
        [torch.fft.irfft2((torch.fft.rfft2(images) * s.conj()).sum(1), s=(16, 16)).flatten(1).amax(1) for s in spectra],
        1,
    )
    told = data.describe()
    assert told["confusion"] < 1e-6
    hits = (scores.argmax(1) == labels).float().mean().item()
    assert hits == pytest.approx(told["best_accuracy"], abs=4 * (0.1 * 0.9 / 4000) ** 0.5)


def test_text_is_split_by_package_and_masked_as_bert_is(module: Any, work: Path) -> None:
    corpora = module("corpora")
    train, held_out = corpora.python_sources(1_000_000)
    assert train and held_out and not set(train) & set(held_out)
    tokens = torch.randint(511, (64, 512))
    inputs, targets = corpora.masked(tokens, 0, 0, 512)
    chosen = targets != corpora.IGNORE
    assert torch.equal(targets[chosen], tokens[chosen]) and torch.equal(inputs[~chosen], tokens[~chosen])
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (inputs[chosen] == 511).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (inputs[chosen] == tokens[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.03)
