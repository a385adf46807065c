"""benchmarks/gluon.py as far as it goes without a GPU, with stand-ins for the kernels and for its processes."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse24.kernels import layout

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gluon(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("benchmarks_gluon", ROOT / "benchmarks" / "gluon.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_it_needs_a_gpu():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "gluon.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "needs an NVIDIA GPU" in done.stderr


def test_each_ablation_finds_what_it_leaves_out(gluon):
    found = set()
    for ablation in gluon.ABLATIONS:
        texts = gluon.source(ablation)
        found.add("".join(texts.values()).replace(f"_{ablation.replace('-', '_')} import", " import"))
        for name, text in texts.items():
            compile(text, f"{name}.py", "exec")
            assert name.endswith(ablation.replace("-", "_"))
    assert len(found) == len(gluon.ABLATIONS)


def test_an_ablation_is_a_kernel_of_its_own(gluon):
    pytest.importorskip("triton")
    module = gluon.ablated("no-loads")
    assert module.kernel.fn.__module__ == "sparse24.kernels.gluon_wgmma_kernel_no_loads"


def test_the_variants_of_the_package_are_among_those_measured(gluon):
    pytest.importorskip("triton")
    from sparse24.kernels import gluon_mma, gluon_wgmma

    variants = [gluon_wgmma.Variant(**arguments) for arguments in gluon.WGMMA.values()]
    assert set(gluon_wgmma.VARIANTS) <= set(variants)
    assert {variant.slots for variant in variants} == {27}
    assert set(gluon_mma.VARIANTS) == {gluon_mma.Variant(**arguments) for arguments in gluon.MMA.values()}


def test_the_page_lists_each_variant_with_its_bound(gluon):
    text = (ROOT / "docs" / "kernels.md").read_text().split("### Variants")[1].split("Measured")[0]
    rows = dict(re.findall(r"(?m)^\| `([\w-]+)` \|.*\| ([\d.]+|not predicted) \|$", text))
    names = [*gluon.WGMMA, *gluon.MMA]
    assert rows == {n: f"{gluon.bound(n):.2f}" if gluon.bound(n) else "not predicted" for n in names}


@pytest.mark.parametrize("name", ["128x256", "mma-128x128"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [(0.0, ""), (0.5, " off, from "), (float("nan"), " off, from "), (RuntimeError("ptxas"), "RuntimeError: ptxas")],
)
def test_a_check_tells_right_from_wrong(gluon, monkeypatch, name, wrong, said):
    order = "sm_80" if name in gluon.MMA else "sm_90"

    def multiply(packed, x, rows, inner, transposed, bias=None):
        if isinstance(wrong, Exception):
            raise wrong
        a = layout.unpack(packed, rows, inner, order).float()
        y = a[:, : len(x)] @ x.float() if transposed else x.float() @ a.t()
        if bias is not None:
            y += bias.float()[:, None] if transposed else bias.float()
        y[-1, -1] += wrong * y.abs().max()
        return y.to(x.dtype)

    found = []
    monkeypatch.setattr(gluon, "load", lambda name: (multiply, order))
    monkeypatch.setattr(gluon, "emit", lambda line: found.append(json.loads(json.dumps(line))))
    monkeypatch.setattr(gluon, "CASES", [case for case in gluon.CASES if case[1] < 450])
    gluon.check(name)
    cases = [line for line in found if "case" in line]
    kernels, of_them = (6, 8) if name in gluon.THOROUGH else (2, 4)
    assert len(cases) == (kernels if isinstance(wrong, Exception) else of_them)
    assert [line["good"] for line in cases] == [not said] * len(cases)
    assert all(line.get("note", "").find(said) >= 0 for line in cases)
    places = [line["diagnosis"]["wrong"] for line in found if "diagnosis" in line]
    assert places == ([1, 1] if "off" in said else [])
    assert found[-1] == {"done": True}


def test_a_variant_that_ends_its_process_is_left_out_of_the_next(gluon, monkeypatch, tmp_path, capsys):
    jobs = []

    def ask(**job):
        """Processes of which the second variant ends each."""
        jobs.append(job)
        if job["do"] == "check":
            yield {"case": [1], "good": job["name"] != "mma-128x64"}
            yield {"done": True}
        elif job["do"] == "time":
            for matmul, k, f, _ in job["problems"]:
                for name in ("dense", *job["names"]):
                    yield {"running": name}
                    if name.startswith("256x192") and (name == "256x192" or "bare" in name):
                        yield {"exit": -9, "said": "an illegal instruction"}
                        return
                ms = dict.fromkeys(("p20", "p50", "p80"), 1.0)
                row = {"k": k, "f": f, "matmul": matmul, "ms": ms, "ratio": 1.0, "of_peak": 1.0, "bound": None}
                row["host_us"] = {"p50": 50.0}
                yield {"rows": [row | {"with": name} for name in ("dense", *job["names"])]}
        yield {"exit": 0, "said": ""}

    monkeypatch.setattr(gluon, "ask", ask)
    monkeypatch.setattr(gluon, "environment", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gluon, "save", lambda path, result: path.write_text(json.dumps(result)))
    out = tmp_path / "gluon.json"
    variants = ["128x256", "256x192", "mma-128x64"]
    monkeypatch.setattr(sys, "argv", ["gluon.py", "--ablations", "--out", str(out), "--variants", *variants])
    gluon.main()
    saved = json.loads(out.read_text())
    assert {name: check["right"] for name, check in saved["checks"].items()} == {
        "128x256": True,
        "256x192": True,
        "mma-128x64": False,
    }
    assert [failed["running"] for failed in saved["failed"]] == ["256x192", "256x192:bare", "256x192"]
    assert {row["with"] for row in saved["rows"]} == {"dense", "128x256"}
    assert len(saved["rows"]) == 2 * 3 * len(gluon.SHAPES)
    assert [(row["k"], row["f"]) for row in saved["rows"][::6]][:3] == gluon.FIRST
    assert {row["with"] for row in saved["ablations"]} > {"dense", "128x256", "128x256:bare", "256x192:no-loads"}
    assert "WRONG  mma-128x64" in capsys.readouterr().out


def test_a_process_that_fails_says_why(gluon):
    """A real one, which finds no such work, or no GPU."""
    *found, end = gluon.ask(do="nothing")
    assert found == [] and end["exit"] == 1 and end["said"]


def test_gemm_times_the_chosen_variant_beside_the_others(gluon, monkeypatch):
    import gemm

    assert set(gemm.forward(128, 256, 64, "cpu")[-1]) == {"dense", "sparse24"}
    monkeypatch.setattr(gemm.Gluon, "supports", lambda self, problem: True)
    monkeypatch.setattr(gemm.Gluon, "run", lambda self, problem, packed, x, algorithm: (problem.direction, algorithm))
    monkeypatch.setattr(gemm.choice, "measure", lambda problem, providers: gemm.choice.Choice("gluon", 2))
    for make, direction in ((gemm.forward, "spmm"), (gemm.wgrad, "wgrad")):
        assert make(128, 256, 64, "cpu")[-1]["gluon 2"]() == (direction, 2)
    monkeypatch.setattr(gemm.choice, "measure", lambda problem, providers: gemm.choice.Choice("masked_dense"))
    assert set(gemm.forward(128, 256, 64, "cpu")[-1]) == {"dense", "sparse24"}
