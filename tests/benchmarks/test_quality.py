"""benchmarks/quality in small: every arm trains, killed runs end as whole ones, the report says what was saved."""

import argparse
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse24.compiler.flips import FlipWatch

pytest.importorskip("tokenizers")
QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"


pytestmark = pytest.mark.xdist_group("quality")  # its arms are trained once


def tiny(family: str, out: Path, work: Path, *more: str) -> list[str]:
    return ["--family", family, "--tiny", "--inner", "eager", "--out", str(out), "--work", str(work), *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, work: Path) -> Path:
    """The folder of results of all arms of the tiny GPT, 30 steps each."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(QUALITY.parent)
        patched.syspath_prepend(QUALITY)
        importlib.import_module("run").main(tiny("gpt", out, work, "--steps", "30", "--decay", "1e-2", "--arms", "all"))
    return out


def load(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / f"{name}.json").read_text())


def test_every_arm_trains_and_the_report_says_what_was_saved(tmp_path: Path, trained: Path, module: Any) -> None:
    pytest.importorskip("matplotlib")
    report, arms = module("report"), module("arms")
    shutil.copytree(trained, tmp_path / "out")
    results = {arm: load(tmp_path / "out", f"gpt_tiny_0_{arm}") for arm in arms.ARMS}
    to_the_end = (*range(3, 31, 3),)
    for arm, result in results.items():
        steps = 27 if arm == "dense-short" else 30
        assert result["held_out"][-1][0] == steps and result["held_out"][-1][2] < result["losses"][0][1] - 0.3, arm
        assert result["losses"][-1][1] < result["losses"][0][1] - 0.3, arm
        refreshes = tuple(step for step, _ in result["flips"])
        if arm in ("dense", "dense-lr", "half", "s-ste", "ste", "fst-sparse-end", "lr-sparse-end", "lr-s-ste"):
            assert refreshes == to_the_end, arm
        elif arm == "dense-short":
            assert refreshes == to_the_end[:-1]
        elif arm == "refresh-grows":
            assert refreshes == (1, 2, 3, 4, 5, 6, 9, 12, 15, 24)  # every 1 to step 5, every 12 from 15 on
        else:
            begin = 3 * (arm in ("lr-dense-start", "lr-dense-ends"))
            end = 20 if arm in ("dense-third", "lr-dense-third", "lr-dense-ends") else 25
            assert refreshes == tuple(r for r in to_the_end if begin < r < end), arm
        assert any(rate > 0 for _, rate in result["flips"]), arm
        dense = arm in ("dense", "dense-lr", "dense-short", "half")
        assert result["sparse_weights"] == (0 if dense else 2) and result["error"] is None
        assert result["data"] == results["dense"]["data"] and len(result["data"]["sha256"]) == 64
        assert result["seconds"] > 0 and result["compile_seconds"] > 0
    assert results["half"]["parameters"] < results["dense"]["parameters"] == results["fst"]["parameters"]
    finals = {result["held_out"][-1][2] for result in results.values()}
    assert len(finals) == len(arms.ARMS)  # no two arms are the same run
    assert results["decay-too-large"]["settings"]["options"]["decay"] == 0.5

    document = tmp_path / "results.md"
    report.main(["--results", str(tmp_path / "out"), "--document", str(document)])
    text = document.read_text()
    for arm in arms.ARMS:
        assert f"| {report.MEANING[arm]} |" in text
        assert arm in arms.TRIALS or f"{results[arm]['held_out'][-1][2]:.4f}" in text
    base, loss, other = (results[arm]["held_out"][-1][2] for arm in ("dense", "fst", "dense-third"))
    assert f"{loss - base:+.4f} ({100 * (loss / base - 1):+.2f}%)" in text
    assert f"{other - loss:+.4f} ({100 * (other / loss - 1):+.2f}%) | in {int(other < loss)} of 1 seeds" in text
    for kind in ("steps", "trials", "time", "flips", "trials_flips"):
        assert f"(out/curves/gpt_tiny_{kind}.svg)" in text
        assert "<svg" in (tmp_path / "out" / "curves" / f"gpt_tiny_{kind}.svg").read_text()
    document.write_text(f"# Page\n\n{report.BEGIN}\nof before\n{report.END}\n\n## After\n")
    report.main(["--results", str(tmp_path / "out"), "--document", str(document)])
    assert document.read_text() == f"# Page\n\n{text}\n## After\n"
    document.write_text("# A page of something else\n")
    with pytest.raises(SystemExit, match="found no line <!-- made by benchmarks/quality/report.py -->"):
        report.main(["--results", str(tmp_path / "out"), "--document", str(document)])
    assert document.read_text() == "# A page of something else\n"


@pytest.mark.parametrize("family", ["bert", "vit", "translation"])
def test_the_other_families_train_and_search_a_decay(family: str, tmp_path: Path, work: Path, module: Any) -> None:
    run, report = module("run"), module("report")
    search = ("--highest-decay", "100", "--feasible", "0.2", "0.95") if family == "vit" else ("--decay", "1e-2")
    run.main(tiny(family, tmp_path, work, "--arms", "dense,fst", "--steps", "30", *search))
    results = [load(tmp_path, f"{family}_tiny_0_{arm}") for arm in ("dense", "fst")]
    for result in results:
        assert min(row[2] for row in result["held_out"]) < result["losses"][0][1] - 0.02
        assert (result["held_out"][-1][3] is None) == (family == "bert")
    assert results[1]["sparse_weights"] == (4 if family == "translation" else 2)
    report.main(["--results", str(tmp_path), "--document", str(tmp_path / "results.md")])
    text = (tmp_path / "results.md").read_text()
    if family == "vit":
        decay = load(tmp_path, "vit_tiny_decay")["decay"]
        assert f"decay {decay:.2g} was taken" in text and decay == results[1]["settings"]["options"]["decay"]
    assert ("the least loss possible is" in text) == (family != "bert")


@pytest.mark.parametrize("arm", ["combined", "refresh-grows", "saliency-v4"])
def test_a_killed_run_ends_as_one_that_was_not(
    arm: str,
    tmp_path: Path,
    work: Path,
    trained: Path,
    module: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Also where the checkpoint is in another phase than the start (16), and at the very step of a change (20)."""
    run = module("run")
    more = ("--arms", arm, "--steps", "30", "--decay", "1e-2", "--save-every", "4")
    step = run.Run.step

    for at in (16, 20):

        def killed(self: Any, at: int = at) -> torch.Tensor:
            if self.record.step == at + 1:
                raise KeyboardInterrupt
            return step(self)

        monkeypatch.setattr(run.Run, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            run.main(tiny("gpt", tmp_path, work, *more))
        monkeypatch.setattr(run.Run, "step", step)
    with pytest.raises(SystemExit, match="steps was 30, is 31"):
        run.main(tiny("gpt", tmp_path, work, *more, "--steps", "31"))
    run.main(tiny("gpt", tmp_path, work, *more))
    said = capsys.readouterr().out
    assert "goes on from step 16" in said and "goes on from step 20" in said
    whole, again = (load(where, f"gpt_tiny_0_{arm}") for where in (trained, tmp_path))
    assert whole["losses"] == again["losses"] and whole["flips"] == again["flips"]
    assert [row[2] for row in whole["held_out"]] == [row[2] for row in again["held_out"]]
    assert not list(work.glob("gpt*.pt"))
    monkeypatch.setattr(run.Run, "step", None)  # what is finished is not run again
    run.main(tiny("gpt", tmp_path, work, *more))
    with pytest.raises(SystemExit, match="was made with other settings .steps was 30, is 31"):
        run.main(tiny("gpt", tmp_path, work, *more, "--steps", "31"))


def test_a_run_told_to_stop_leaves_a_checkpoint_of_that_moment(
    tmp_path: Path, work: Path, module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = module("run")
    step = run.Run.step

    def stopped(self: Any) -> torch.Tensor:
        if self.record.step == 2:
            run.STOP.set()
        return step(self)

    more = tiny("vit", tmp_path, tmp_path, "--arms", "dense", "--steps", "6")
    with monkeypatch.context() as patched:
        patched.setattr(run.Run, "step", stopped)
        with pytest.raises(SystemExit, match="stopped after step 3"):
            run.main(more)
    run.STOP.clear()
    run.main(more)
    assert "goes on from step 3" in capsys.readouterr().out and load(tmp_path, "vit_tiny_0_dense")["step"] == 6


def test_seconds_of_training_leave_out_what_is_no_part_of_it(
    tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compilation, or a count of virtual flips, is charged as any other step of its interval of the log."""
    run, training = module("run"), module("training")
    clock = [0.0]
    step = training.train_step

    def costly(family: Any, args: Any, model: Any, optimizer: Any, at: int) -> torch.Tensor:
        clock[0] += 1.0 + 1000.0 * (at == 0) + 100.0 * (at % 3 == 2)  # the first step compiles, each third counts
        return step(family, args, model, optimizer, at)

    monkeypatch.setattr(training, "train_step", costly)
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    parse = run.parse
    monkeypatch.setattr(run, "parse", lambda argv: argparse.Namespace(**{**vars(parse(argv)), "log_every": 4}))
    run.main(tiny("vit", tmp_path, tmp_path, "--arms", "dense,ste", "--steps", "12"))
    dense, ste = (load(tmp_path, f"vit_tiny_0_{arm}") for arm in ("dense", "ste"))
    assert dense["seconds"] == pytest.approx(12) and dense["compile_seconds"] == 1001
    assert ste["seconds"] == pytest.approx(12 + 300 + 100 * 4 / 3)  # its counts are refreshes, which are training


@pytest.mark.parametrize(("arm", "count"), [("dense", 1), ("fst", 2), ("combined", 3)])
def test_an_arm_compiles_no_more_graphs_than_it_has(
    arm: str, count: int, tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation adds none; the weight gradient of another kind, and the dense end, one each."""
    from sparse24.compiler import backend

    inner = backend.compile_inner
    compiled = []

    def counted(*args: Any) -> Any:
        compiled.append(args)
        return inner(*args)

    monkeypatch.setattr(backend, "compile_inner", counted)
    module("run").main(tiny("vit", tmp_path, tmp_path, "--arms", arm, "--steps", "12", "--decay", "1e-2"))
    assert len(compiled) == count


def test_masks_by_saliency_keep_the_largest_and_are_packed(tmp_path: Path, module: Any) -> None:
    from sparse24.kernels.reference import best_mask

    run, training, arms = module("run"), module("training"), module("arms")
    args = run.parse(tiny("vit", tmp_path, tmp_path, "--steps", "12"))
    family = module("families").Family("vit", args.size, tmp_path, 0, torch.device("cpu"))
    common = {"refresh_every": 3, "when": "always", "inner": "eager", "decay": 0.0}
    one = training.Run(family, args, arms.Arm(common, saliency=0.5))
    for _ in range(3):
        one.step()
    for name, weight in one.session.weights.items():
        if weight.reason_skipped is None:
            v = one.optimizer.state[weight.param]["exp_avg_sq"]
            assert torch.equal(weight.mask(), best_mask(weight.param.detach() * v.sqrt())), name
            assert not torch.equal(weight.mask(), best_mask(weight.param))
            for operand in weight.operands.values():
                packed = training.layout.unpack(
                    operand.packed, *weight.shape, training.layout.metadata_order(torch.device("cpu"))
                )
                assert torch.equal(packed, weight.param * weight.mask())
    assert 0 < one.record.flips[0][1] < 0.5


def test_the_decay_follows_the_learning_rate(tmp_path: Path, module: Any) -> None:
    run, training, arms = module("run"), module("training"), module("arms")
    args = run.parse(tiny("vit", tmp_path, tmp_path, "--steps", "20"))
    family = module("families").Family("vit", args.size, tmp_path, 0, torch.device("cpu"))
    common = {"refresh_every": 3, "when": "always", "inner": "eager", "decay": 1e-2}
    one = training.Run(family, args, arms.Arm(common, decay_follows_lr=True))
    seen = []
    for _ in range(4):
        one.step()
        (decay,) = {w.recipe.decay for w in one.session.weights.values() if w.reason_skipped is None}
        seen.append(decay)
    assert seen == pytest.approx([1e-2 * training.lr_factor(args, step) for step in (1, 2, 3, 4)])
    assert seen[0] > seen[1] > seen[2] > seen[3]


def test_other_seeds_take_the_decay_that_seed_0_searched(
    tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = module("run")
    more = ("--steps", "12", "--highest-decay", "100", "--feasible", "0.1", "0.99")
    seed_1 = tiny("vit", tmp_path, tmp_path, *more, "--arms", "fst", "--seed", "1")
    with pytest.raises(SystemExit, match="vit_tiny_decay.json, which seed 0 searches .* --search-only"):
        run.main(seed_1)
    run.main(tiny("vit", tmp_path, tmp_path, *more, "--search-only"))
    assert [path.name for path in tmp_path.glob("*.json")] == ["vit_tiny_decay.json"]
    trials = load(tmp_path, "vit_tiny_decay")["trials"]
    run.main(tiny("vit", tmp_path, tmp_path, *more, "--search-only"))  # found: not searched again
    assert load(tmp_path, "vit_tiny_decay")["trials"] == trials
    monkeypatch.setattr(run.sparse24, "find_decay", None)
    run.main(seed_1)
    found = load(tmp_path, "vit_tiny_1_fst")["settings"]["options"]["decay"]
    assert found == load(tmp_path, "vit_tiny_decay")["decay"]
    with pytest.raises(SystemExit, match="found a search over 9 steps in .*need one over 18"):
        run.main([*seed_1, "--steps", "200"])


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
    assert "NaN" in fst["error"] and dense["error"] is None and dense["step"] == 12
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


def test_of_the_saved_runs_the_one_that_lost_by_its_flips_is_called_an_explosion(module: Any) -> None:
    """What the constants of FlipWatch rest on."""
    training, arms = module("training"), module("arms")
    paths = sorted((QUALITY.parent / "results" / "quality").glob("*_[0-9]_*.json"))
    assert len(paths) > 15
    called = set()
    for path in paths:
        file = json.loads(path.read_text())
        settings, watch = file["settings"], FlipWatch()
        arm = arms.arms(1.0, settings["steps"], 40)[settings["arm"]]
        for step, rate in file["flips"]:
            lr = training.lr_factor(argparse.Namespace(**settings), int(step) - 1)
            if watch.observe(rate, lr, arm.options_at(int(step) - 1).get("refresh_every", 40)) is not None:
                called.add(path.stem)
    assert called == {"translation_small_0_ste"}


@pytest.mark.parametrize("script", ["run", "report", "plan"])
def test_help(script: str, module: Any, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        module(script).main(["--help"])
    assert ended.value.code == 0 and "usage" in capsys.readouterr().out


def test_noise_of_mvue_is_that_of_pruning_and_saved(tmp_path: Path, work: Path, module: Any) -> None:
    noise, saved_to = module("noise"), tmp_path / "noise.json"
    noise.main([*tiny("gpt", tmp_path, work), "--steps", "4", "--at", "0.5", "1", "--save", str(saved_to)])
    rows = json.loads(saved_to.read_text())["rows"]
    layers = [f"blocks.0.feed_forward.{name}" for name in ("down", "up")]
    assert [(row["step"], row["layer"]) for row in rows] == [(step, layer) for step in (2, 4) for layer in layers]
    x = torch.randn(64, 64)
    assert (
        noise.noise(x, torch.zeros(64, 64).index_fill(0, torch.arange(0, 64, 2), 1.0))["of dy"] < 1e-10
    )  # 2:4 already
    assert 0.4 < noise.noise(x, torch.randn(64, 64))["of dy"] < 0.55  # of Gaussian groups 0.475
    assert all(0 < row["of dy"] < 1 for row in rows)


def test_arms_are_named_by_group_and_unknown_ones_refused(module: Any) -> None:
    arms = module("arms")
    assert arms.named("trials,dense,dense") == [*arms.TRIALS, "dense"]
    with pytest.raises(ValueError, match="found arm denes, need some of ablations, trials, all, dense"):
        arms.named("denes")
    without = {"dense", "dense-lr", "dense-short", "half", "ste", "sr-ste", "s-ste", "lr-s-ste"}
    assert {arm for arm in arms.ARMS if not arms.needs_decay(arm)} == without


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
        expected: list[int] = []
        phrase: list[int] = []
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
