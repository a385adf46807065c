"""The benchmark scripts run, and what README and docs say of their results is what was saved."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)


def run(script, *args):
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / script, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


PAGES = ["README.md", "docs/results.md", "docs/kernels.md", "docs/export.md"]


def test_the_tables_of_the_pages_are_those_of_the_results(tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    copies = []
    for name in PAGES:
        copies.append(tmp_path / name.replace("/", "_"))
        stale = re.sub(r"(?m)^\|.*\d.*\|\n", "", (ROOT / name).read_text())
        assert "made by benchmarks/tables.py" in stale, name
        copies[-1].write_text(stale)
    run("tables.py", "--results", tmp_path / "results", "--pages", *copies)
    for name, copy in zip(PAGES, copies, strict=True):
        made = [block.group() for block in tables.BLOCK.finditer(copy.read_text())]
        assert made == [block.group() for block in tables.BLOCK.finditer((ROOT / name).read_text())], name
    assert "<svg" in (tmp_path / "results" / "h200" / "steps.svg").read_text()


def environment(gpu="GPU", date="today", torch="2"):
    return {"gpu": gpu, "torch": torch, "triton": "3", "cusparselt": "", "date": date, "command": "python x"}


def put(path, **saved):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(saved))


def step(model, ratio, **more):
    times = {"dense_ms": 3.0, "sparse_ms": 2.0, "ratio": ratio, "micro_ratio": ratio}
    return {"model": model, "layers": "ffn", "sparse_weights": 4, **times, **more}


def test_each_gpu_has_tables_of_its_own_the_fullest_and_then_the_newest_first(tmp_path):
    row = {"kernel": "glu", "of": "tokens", "gb_per_s": 3e3, "of_a_copy": 0.75}
    for gpu, date, ms in (("old", "2026-11-24", 2.0), ("new", "2026-11-28", 1.0)):
        put(tmp_path / gpu / "pack.json", environment=environment(gpu, date), shape={}, rows=[row | {"ms": ms}])
    (tmp_path / "cpu").mkdir()
    text = tables.TABLES["kernels"](tmp_path)
    order = ["1.0000", "new, torch 2, triton 3, 2026-11-28.", "2.0000", "old, torch 2, triton 3, 2026-11-24."]
    assert re.findall("|".join(map(re.escape, order)), text) == order and text.count("| kernel |") == 2
    (tmp_path / "new" / "pack.json").unlink()
    text = tables.TABLES["kernels"](tmp_path)
    assert "2.0000" in text and "old, torch" in text and "new" not in text and text.count("| kernel |") == 1


def test_steps_name_each_date_and_version_of_their_rows(tmp_path):
    kernels = {"profile_dense": {tables.ALL: 3.0}, "profile_sparse": {tables.ALL: 2.0}}
    put(tmp_path / "a" / "step_1.json", environment=environment("A", "1"), rows=[step("gpt2-small", 1.5, **kernels)])
    put(tmp_path / "a" / "step_2.json", environment=environment("A", "2"), rows=[step("vit-l", 1.1)])
    put(tmp_path / "b" / "step.json", environment=environment("B", "3"), rows=[step("vit-l", 1.2)])
    two, one = tables.TABLES["steps"](tmp_path).split("A, torch 2, triton 3, 1 and 2.")
    assert "| 1.20 |" in one and "| 1.10 |" in two and "| 1.50 |" in two
    assert "B, torch 2, triton 3, 3." in one
    text = tables.TABLES["profile"](tmp_path)  # only one row has one
    assert text.count("triton") == 1 and "A, torch 2, triton 3, 1.\n" in text
    put(tmp_path / "a" / "step_2.json", environment=environment("A", "2", "9"), rows=[step("vit-l", 1.1)])
    text = tables.TABLES["steps"](tmp_path)
    assert "A, torch 2, triton 3, 1.\n" in text and "A, torch 9, triton 3, 2.\n" in text
    put(tmp_path / "a" / "step_1.json", environment=environment("A", "1"), rows=[step("vit-l", 1.5)])
    assert "torch 2, triton 3, 1." not in tables.TABLES["steps"](tmp_path)  # its only row was taken again
    put(tmp_path / "a" / "step_2.json", environment=environment("B", "2"), rows=[])
    with pytest.raises(SystemExit, match="are of A and B: each needs a folder of its own"):
        tables.TABLES["steps"](tmp_path)


def test_each_folder_of_steps_has_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    assert "No saved results yet" in tables.TABLES["steps"](tmp_path)
    with pytest.raises(AssertionError, match=r"found no step\*\.json in the folders of"):
        run("tables.py", "--results", tmp_path, "--pages", tmp_path / "page.md")
    for gpu in "ab":
        put(tmp_path / gpu / "step.json", environment=environment(gpu), rows=[step("vit-l", 1.1)])
    (tmp_path / "page.md").write_text("<!-- made by benchmarks/tables.py -->\n<!-- end -->\n")
    run("tables.py", "--results", tmp_path, "--pages", tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text().count("| ViT-L") == 2
    assert all("<svg" in (tmp_path / gpu / "steps.svg").read_text() for gpu in "ab")


def test_tables_of_kernels_and_matmuls_hold_every_row(tmp_path):
    for name in ("kernels", "matmuls"):
        assert "No saved results yet" in tables.TABLES[name](tmp_path)
    row = {"kernel": "glu", "of": "torch.float32", "ms": 0.5, "gb_per_s": 3e3, "of_a_copy": 0.75}
    put(tmp_path / "gpu" / "pack.json", environment=environment(), shape={"rows": 64, "out": "file"}, rows=[row])
    text = tables.TABLES["kernels"](tmp_path)
    assert "| glu | float32 | 0.5000 | 3000 | 0.75 |" in text and "rows 64." in text and "python x" in text
    run("gemm.py", "--tiny", "--out", tmp_path / "gpu" / "gemm.json")
    rows = json.loads((tmp_path / "gpu" / "gemm.json").read_text())["rows"]
    text = tables.TABLES["matmuls"](tmp_path)
    assert all(f"| {row['matmul']} | {row['with']}" in text and f"{row['ms']['p50']:.4f}" in text for row in rows)


def test_the_table_of_families_leaves_out_what_failed(tmp_path):
    assert "No saved results yet" in tables.TABLES["families"](tmp_path)
    row = {"model": "gpt2", "parameters": 2e6, "sparse_weights": 4, "dense_ms": 3.0, "sparse_ms": 2.0, "ratio": 1.5}
    rows = [row | {"relative_loss_difference": 2e-4}, {"model": "bert", "error": "out of memory"}]
    put(tmp_path / "gpu" / "models.json", environment=environment(), rows=rows)
    text = tables.TABLES["families"](tmp_path)
    assert "| gpt2 | 2M | 4 | 3.0 ms | 2.0 ms | 1.50 | 2e-04 |" in text and "bert" not in text


def test_the_tables_of_gluon_tell_wrong_variants_and_the_fastest(tmp_path):
    times = {
        ("forward", 4096): {"dense": 3.0, "cusparselt": 2.0, "slow": 2.5, "fast": 1.6},
        ("wgrad", 4096): {"dense": 3.0, "cusparselt": 2.0, "fast": 2.0},
        ("forward", 1024): {"dense": 1.0, "cusparselt": 0.8, "slow": 0.5, "fast": 1.0},
        ("forward", 64): {"dense": 1.0, "slow": 0.5},  # where cuSPARSELt has no right algorithm
    }
    rows = [
        {"k": k, "f": 2 * k, "matmul": matmul, "with": name, "ms": {"p50": ms}, "of_peak": 1.0}
        for (matmul, k), found in times.items()
        for name, ms in found.items()
    ]
    of = {"k": 64, "f": 128, "kind": "swiglu"}
    fused = [of | {"with": name, "ms": {"p50": ms}} for name, ms in (("cusparselt", 3.0), ("fast", 2.0))]
    checks = {"slow": {"right": True}, "fast": {"right": True}, "bad": {"right": False}}
    saved = {"environment": environment(), "checks": checks, "rows": rows, "fused": fused}
    put(tmp_path / "gpu" / "gluon.json", **saved)
    text = tables.TABLES["gluon"](tmp_path)
    assert "| 4096 x 8192 | forward | 2.0000 | 1.6000 | `fast` | 1.25 | 1.88 | 1.00 |" in text
    assert "| 1024 x 2048 | forward | 0.8000 | 0.5000 | `slow` | 1.60 | 2.00 | 1.00 |" in text
    assert "| 64 x 128 | swiglu | 3.0000 | 2.0000 | `fast` | 1.50 |" in text and "| 64 x 128 | forward" not in text
    ablations = [rows[1] | {"with": name, "ms": {"p50": ms}} for name, ms in (("fast", 2.0), ("fast:stores", 1.8))]
    put(tmp_path / "gpu" / "gluon_variants.json", **saved, ablations=[rows[1], *ablations])
    text = tables.TABLES["gluon_variants"](tmp_path)
    assert "| `slow` | yes | 0.80 |  |" in text and "| `fast` | yes | 1.25 | 1.00 |" in text
    assert "| `bad` | no |  |  |" in text and "| `fast` | stores | 0.90 |" in text


def test_a_profile_is_counted_whole():
    kinds = tables._by_kind({"nvjet_a": 2.0, "sm90_xmma_sparse_gemm_b": 3.0, "glu_c": 1.0, "all kernels": 10.0})
    assert kinds["dense matmuls"] == 2.0 and kinds["sparse matmuls"] == 3.0 and kinds[tables.OTHER] == 4.0


@pytest.mark.parametrize(
    ("script", "kinds"),
    [
        ("gemm.py", {"dense", "sparse24"}),
        ("ffn.py", {"dense", "sparse"}),
        ("inference.py", {"dense", "sparse24"}),
    ],
)
def test_a_script_saves_the_time_of_each(tmp_path, script, kinds):
    out = tmp_path / "gpu" / script.replace(".py", ".json")
    run(script, "--tiny", "--out", out)
    saved = json.loads(out.read_text())
    assert saved["environment"]["torch"] and len(saved["rows"]) > 1
    found = {row["with"] for row in saved["rows"]} if script == "gemm.py" else set(saved["rows"][0]["ms"])
    assert kinds <= found
    assert all(row["ratio"] > 0 for row in saved["rows"])
    if script != "gemm.py":
        lines = tables.TABLES[script.removesuffix(".py")](tmp_path).splitlines()
        rows = sum(len(row["ms"]) if script == "inference.py" else 1 for row in saved["rows"])
        assert sum(line.startswith("| ") for line in lines) == 1 + rows


def test_a_run_that_was_cut_is_resumed(tmp_path):
    out = tmp_path / "gemm.json"
    run("gemm.py", "--tiny", "--out", out)
    saved = json.loads(out.read_text())
    kept = [row | {"ratio": -1.0} for row in saved["rows"] if row["matmul"] != "dgrad"]
    out.write_text(json.dumps(saved | {"rows": [*kept, {"matmul": "dgrad", "error": "out of memory"}]}))
    run("gemm.py", "--tiny", "--out", out, "--resume")
    rows = json.loads(out.read_text())["rows"]
    assert rows[: len(kept)] == kept and {row["matmul"] for row in rows[len(kept) :]} == {"dgrad"}
    assert all(row["ratio"] > 0 for row in rows[len(kept) :])


def test_rows_of_other_versions_code_or_settings_are_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from common import Rows

    out = tmp_path / "rows.json"
    Rows(out, ("k",), tokens=64).add({"k": 1}, {"k": 2, "error": "out of memory"})
    again = Rows(out, ("k",), True, tokens=64)
    assert again.rows == [{"k": 1}] and (1,) in again and (2,) not in again
    with pytest.raises(SystemExit, match="was measured with tokens 64, is 128; leave out --resume"):
        Rows(out, ("k",), True, tokens=128)
    saved = json.loads(out.read_text())
    for name in ("torch", "code"):
        other = {**saved, "environment": {**saved["environment"], name: "1.0"}}
        out.write_text(json.dumps(other))
        with pytest.raises(SystemExit, match=f"was measured with {name} '1.0'"):
            Rows(out, ("k",), True, tokens=64)
        assert json.loads(out.read_text()) == other


def test_memory_and_compile_time_of_each_kind(tmp_path):
    for script, kinds, number in (
        ("memory.py", ["dense", "sparse"], "peak_gib"),
        ("compile_time.py", ["dense", "sparse", "sparse, choices kept"], "of_dense"),
    ):
        out = tmp_path / "gpu" / script.replace(".py", ".json")
        run(script, "--models", "tiny", "--inner", "aot_eager", "--out", out)
        rows = json.loads(out.read_text())["rows"]
        assert [row["kind"] for row in rows] == kinds and all(number in row for row in rows)
        lines = tables.TABLES[script.removesuffix(".py")](tmp_path).splitlines()
        assert [line.split(" | ")[1] for line in lines if line.startswith("| tiny")] == kinds
    parts = rows[1]["parts"]
    assert not rows[0]["parts"] and 0 < parts["compiler behind"] < rows[1]["first_step_s"]


def test_a_result_names_the_variable_that_added_kernels(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from common import command

    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "gemm.py"), "--tiny"])
    monkeypatch.delenv("SPARSE24_GLUON", raising=False)
    assert command() == "python benchmarks/gemm.py --tiny"
    monkeypatch.setenv("SPARSE24_GLUON", "1")
    assert command() == "SPARSE24_GLUON=1 python benchmarks/gemm.py --tiny"
