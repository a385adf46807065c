"""What benchmarks/quality/report.py says of made-up results."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def saved(folder: Path, arm: str, seed: int, loss: float, seconds: float, **settings: Any) -> None:
    """A result as run.py writes it, with made-up numbers."""
    settings = {"family": "gpt", "scale": "small", "arm": arm, "seed": seed, "steps": 4, "lr": 2e-3, **settings}
    settings = {"shared": False, "device": "H", "size": {"batch": 2}, "options": {"refresh_every": 40}, **settings}
    steps = settings["steps"]
    held_out = [[steps // 2, seconds / 2, loss + 1, None], [steps, seconds, loss, None]]
    run = {"data": {"name": "text"}, "parameters": 1, "error": None, "seconds": seconds, "losses": [[steps, loss]]}
    run |= {"settings": settings, "held_out": held_out, "flips": [], "environment": {"torch": "2", "date": "today"}}
    (folder / f"gpt_small_{settings['lr']:g}_{seed}_{arm}.json").write_text(json.dumps(run))


def reported(module: Any, folder: Path) -> str:
    module("report").main(["--results", str(folder), "--document", str(folder / "results.md")])
    return (folder / "results.md").read_text()


def test_the_report_pairs_runs_by_seed_and_judges_claims_and_order(tmp_path: Path, module: Any) -> None:
    pytest.importorskip("matplotlib")
    for seed, base in ((0, 2.0), (1, 4.0)):  # seeds differ by far more than arms do
        saved(tmp_path, "dense", seed, base, 8.0)
        saved(tmp_path, "fst", seed, base * (1.004 if seed == 0 else 1.002), 4.0)
        saved(tmp_path, "fst-sparse-end", seed, base * 1.01, 4.0, shared=True)
        saved(tmp_path, "half", seed, base * 1.001, 4.0, shared=True)
        saved(tmp_path, "dense-third", seed, base * (1.003 if seed == 0 else 1.0028), 4.0, shared=True)
    text = reported(module, tmp_path)
    assert "| +0.0080 ± 0.0000 (+0.30 ± 0.14%) |" in text
    assert "the loss of FST is +0.30 ± 0.14% from that of dense: the claim of 0.5% holds" in text
    row = "| GPT decoder, next token, about 20M parameters | 3.0000 | {} |  |  |  |  |  | +0.10 ± 0.00 |"
    assert row.format("**+0.30 ± 0.14**") in text
    assert "| +0.0006 ± 0.0037 (-0.01 ± 0.13%) | in 1 of 2 seeds |" in text
    assert "dense (+0.0000), half (+0.0030), fst (+0.0080), fst-sparse-end (+0.0300)" in text
    assert "DIFFERS in 1 of 2 pairs: fst is not better than half (+0.0050, better in 0 of 2 seeds)" in text
    assert "Seed 0: the steps of FST take 0.500 times as long" in text
    assert "at equal time (4 s) it is at 2.0080 and dense at 3.0000" in text
    saved(tmp_path, "fst", 0, 2.1, 4.0)
    text = reported(module, tmp_path)
    assert "the claim of 0.5% DOES NOT HOLD" in text and row.format("+2.60 ± 3.39") in text


def test_where_the_least_loss_is_known_the_claim_is_of_accuracy(module: Any) -> None:
    def run(arm: str, accuracy: float) -> dict[str, Any]:
        return {
            "settings": {"arm": arm, "seed": 0},
            "data": {"least_loss": 0.0},
            "error": None,
            "held_out": [[4, 1.0, 9.0, accuracy]],
        }

    results = {"dense": [run("dense", 0.8)], "fst": [run("fst", 0.798)], "fst-lr": [run("fst-lr", 0.792)]}
    *_, row, _ = module("report").summary({("vit", "small", 5e-4): results, ("vit", "small", 1e-3): results})
    assert row == "| ViT classifier, about 20M parameters | 0.8000 | **-0.25** | -1.00 |  |  |  |  |  |"


def test_the_report_says_what_a_mask_search_costs_at_once(module: Any) -> None:
    def run(arm: str, losses: dict[int, float], **options: Any) -> dict[str, Any]:
        settings = {"arm": arm, "seed": 0, "steps": 1000, "options": {"refresh_every": 40, **options}}
        return {
            "settings": settings,
            "data": {},
            "error": None,
            "held_out": [[s, 0.0, v, None] for s, v in losses.items()],
        }

    def losses(behind: float) -> dict[int, float]:
        """Twice what dense has there; more right behind a search, and far more in the first fifth and the dense end."""
        return {s: 2.0 + (behind if s % 200 == 0 else 0.0) + 50.0 * (s < 150 or s > 900) for s in range(50, 1001, 50)}

    claims = module("claims")
    results = {
        "dense": [run("dense", dict.fromkeys(range(50, 1001, 50), 1.0), dense_after=0)],
        "fst": [run("fst", losses(0.02), dense_after=900)],
        "ste": [run("ste", losses(0.01), dense_after=None)],
        "s-ste": [run("s-ste", losses(0.5), dense_after=None, recipe="s-ste")],
        "half": [run("half", losses(0.5), dense_after=0)],
    }
    said, ends = claims.behind_searches(results)
    assert said.endswith("to the dense end: ste +1.00, fst +2.00.")
    assert "in percent over dense: ste +5100.00." in ends  # at 950
    assert claims.rises_of(results["fst"][0], results["dense"][0]) == pytest.approx([2.0] * 4)  # at 200, 400, 600, 800
    everywhere = {arm: [{**runs[0], "held_out": runs[0]["held_out"][3::4]}] for arm, runs in results.items()}
    assert claims.behind_searches(everywhere) == []  # all evaluations came right behind a search
    results["fst"][0]["data"]["least_loss"] = 0.0
    assert "fst" not in claims.behind_searches(results)[0]
    assert claims.behind_searches({"fst": results["fst"]}) == []


def test_runs_at_another_learning_rate_have_a_section_of_their_own(tmp_path: Path, module: Any) -> None:
    pytest.importorskip("matplotlib")
    for lr, losses in ((2e-3, (2.0, 2.2, 2.004)), (1e-3, (3.0, 3.3, 3.03))):
        for arm, loss in zip(("dense", "fst", "fst-lr"), losses, strict=True):
            saved(tmp_path, arm, 0, loss, 8.0, shared=True, lr=lr)
        saved(tmp_path, "lr-dense-start", 0, losses[2] - 0.003, 8.0, shared=True, lr=lr)
    saved(tmp_path, "dense-lr", 0, 1.992, 8.0, shared=True, lr=2e-3)
    text = reported(module, tmp_path)
    own, other = text.split("### GPT decoder, next token, about 20M parameters")[1:]
    assert other.startswith(", learning rate 0.001\n") and own.startswith("\n")
    assert "the loss of FST is +10.00% from" in own and "the loss of FST is +10.00% from" in other
    assert "FST with `lr_scale` is +0.20% from that of dense: the claim of 0.5% holds" in own
    assert "FST with `lr_scale` is +1.00% from that of dense: the claim of 0.5% DOES NOT HOLD" in other
    assert "The loss of FST with `lr_scale` is +0.60% from that of dense with the same rates." in own
    assert "same rates" not in other and "FST is +0.40% from that of dense with" not in own
    assert (
        "| +0.0010 (+0.05%) | -0.0030 (-0.15%) | in 1 of 1 seeds |" in own
    )  # a trial with lr_scale, against FST with it
    assert "gpt_small_steps.svg" in own and "gpt_small_lr0.001_steps.svg" in other


def test_dense_in_fewer_steps_tells_who_is_ahead_at_equal_time(tmp_path: Path, module: Any) -> None:
    pytest.importorskip("matplotlib")
    for arm, loss, seconds in (("dense", 2.0, 9.0), ("fst", 2.02, 8.0), ("fst-lr", 2.1, 8.0)):
        saved(tmp_path, arm, 0, loss, seconds)
    short = {"steps": 4, "share": 8 / 9}
    saved(tmp_path, "dense-short", 0, 2.04, 8.1, **short)
    saved(tmp_path, "dense-short", 1, 1.0, 8.1, **short)  # another seed
    saved(tmp_path, "dense-short", 0, 1.0, 8.1, **short, lr=1e-3)
    text = reported(module, tmp_path)
    assert text.count("At equal time, both at the end of their schedules") == 2
    assert "FST in 4 steps and 8.0 s ends at 2.0200, dense in 4 steps and 8.1 s at 2.0400: FST is ahead" in text
    assert "is ahead by 0.98%" in text and "8.1 s at 2.0400: dense is ahead by 2.94%" in text
    saved(tmp_path, "dense-short", 0, 2.04, 8.1, **short, shared=True)  # its time says nothing
    assert "both at the end" not in reported(module, tmp_path)
    saved(tmp_path, "dense-short", 0, 2.04, 8.1, steps=3, share=8 / 9)
    with pytest.raises(SystemExit, match="results of 2 different steps"):
        reported(module, tmp_path)


def test_shared_runs_have_no_times_in_the_report(tmp_path: Path, module: Any) -> None:
    pytest.importorskip("matplotlib")
    for arm in ("dense", "fst"):
        saved(tmp_path, arm, 0, 2.0, 77.0, shared=True)
    text = reported(module, tmp_path)
    assert "gpt_small_steps.svg" in text
    assert "gpt_small_time.svg" not in text and "equal time" not in text and "| 77 |" not in text
    for arm in ("dense", "fst"):
        saved(tmp_path, arm, 0, 2.0, 77.0)
    text = reported(module, tmp_path)
    assert "gpt_small_time.svg" in text and "equal time" in text and "| 77 |" in text


def test_the_pages_say_of_the_saved_runs_what_the_report_does(
    tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    report, curves = module("report"), Path("benchmarks", "results", "quality", "curves")
    for draw in ("draw", "draw_flips"):
        monkeypatch.setattr(report, draw, lambda results, picture, *more: picture.write_text("<svg"))
    shutil.copytree(ROOT / curves.parent, tmp_path / curves.parent)
    (tmp_path / "docs").mkdir()
    pages = {"docs/results.md": report.BEGIN, "README.md": report.BEGIN_SUMMARY}
    for name, begin in pages.items():
        before, after = (ROOT / name).read_text().split(f"{begin}\n")
        (tmp_path / name).write_text(f"{before}{begin}\n| stale |\n" + after[after.index(report.END) :])
    results, *targets = (str(tmp_path / name) for name in (curves.parent, *pages))
    report.main(["--results", results, "--document", targets[0], "--readme", targets[1]])
    for name in pages:
        made = (tmp_path / name).read_text()
        assert made == (ROOT / name).read_text() and "stale" not in made, name
    pictures = re.findall(r"\(\.\./(\S+/curves/\S+\.svg)\)", (ROOT / "docs" / "results.md").read_text())
    assert pictures and all((ROOT / picture).exists() for picture in pictures)
