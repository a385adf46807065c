"""examples/find_decay.py in small: what it leaves behind, and that it goes on from it."""

import importlib
import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS = "--device cpu --inner eager --width 64 --depth 1 --ff 128 --context 64 --batch 2 --refresh-every 2 --lr 1e-2"


def test_a_search_ends_in_the_range_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("find_decay")
    settings = [*SETTINGS.split(), "--trial-steps", "8", "--warm-up", "8", "--out", str(tmp_path)]
    decay = example.main([*settings, "--feasible", "0.1", "0.95", "--high", "10"])
    evidence = json.loads((tmp_path / "decay.json").read_text())
    assert evidence["decay"] == decay and 0.1 <= evidence["trials"][-1]["mu"] <= 0.95
    assert "<svg" in (tmp_path / "decay.svg").read_text()
    monkeypatch.setattr(example.GPT, "forward", None)  # nothing is trained again
    assert example.main([*settings, "--feasible", "0.1", "0.95", "--high", "10"]) == decay
    with pytest.raises(SystemExit, match="steps was 8, is 10"):
        example.main([*settings, "--trial-steps", "10"])
