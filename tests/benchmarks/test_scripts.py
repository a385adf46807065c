"""The benchmark scripts run, and what the README says of their results is what was saved."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script, *args):
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / script, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_table_of_the_readme_is_that_of_the_results(tmp_path):
    pytest.importorskip("matplotlib")
    results = tmp_path / "results"
    results.mkdir()
    for path in (ROOT / "benchmarks" / "results" / "h200").glob("step*.json"):
        (results / path.name).write_text(path.read_text())
    readme = tmp_path / "README.md"
    text = (ROOT / "README.md").read_text()
    readme.write_text(text.replace("| 1.", "| 9."))  # a stale table
    run("tables.py", "--results", results, "--readme", readme)
    assert readme.read_text() == text
    assert "<svg" in (results / "steps.svg").read_text()


@pytest.mark.parametrize(
    ("script", "kinds"),
    [
        ("gemm.py", {"dense", "sparse24"}),
        ("ffn.py", {"dense", "sparse"}),
        ("inference.py", {"dense", "sparse24"}),
    ],
)
def test_a_script_saves_the_time_of_each(tmp_path, script, kinds):
    run(script, "--tiny", "--out", tmp_path / "found.json")
    saved = json.loads((tmp_path / "found.json").read_text())
    assert saved["environment"]["torch"] and len(saved["rows"]) > 1
    found = {row["with"] for row in saved["rows"]} if script == "gemm.py" else set(saved["rows"][0]["ms"])
    assert kinds <= found
    assert all(row["ratio"] > 0 for row in saved["rows"])


def test_memory_and_compile_time_of_each_kind(tmp_path):
    for script, kinds, number in (
        ("memory.py", ["dense", "sparse"], "peak_gib"),
        ("compile_time.py", ["dense", "sparse", "sparse, choices kept"], "of_dense"),
    ):
        run(script, "--models", "tiny", "--out", tmp_path / "found.json")
        rows = json.loads((tmp_path / "found.json").read_text())["rows"]
        assert [row["kind"] for row in rows] == kinds and all(number in row for row in rows)
