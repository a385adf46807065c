"""Kernels compiled ahead in other processes are those that launches look for: the same entries of Triton's cache.

The interpreter of the other tests is chosen when Triton is imported, so what launches runs in a process of its own:
this file as a program.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse24.kernels import ahead, layout, reference

SWIGLU = (torch.bfloat16, torch.float32, "mvue", "swiglu", False)
GELU = (torch.bfloat16, torch.float32, "mvue", "gelu", True)  # under autocast: its bias stays fp32
DOWN = (torch.bfloat16, torch.bfloat16, "mvue", None, True)
EVERY = (SWIGLU, GELU, DOWN)


def launches():
    """A training step of the layers as a process with a GPU launches it, on tensors with data and other sizes."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from sparse24.kernels import triton_ops

    driver.set_active(ahead._Target(90))
    compile_ = JITFunction.run  # without running what it compiled, and so that `launch` keeps nothing
    JITFunction.run = lambda kernel, *args, warmup, **options: compile_(kernel, *args, warmup=True, **options) and None
    tokens, features, seeds = 200, 320, torch.zeros(3, dtype=torch.int64)
    for dtype, master, _, kind, has_bias in EVERY:
        w, packed = torch.randn(192, 320).to(master), torch.zeros(layout.numel(192, 320, dtype), dtype=dtype)
        blocks = [layout.Block(w, packed, packed.clone(), 0, 0, 192, 320)] * 2
        for search in (True, False):
            triton_ops.pack_weights_(blocks, search)
        triton_ops.masked_decay_([w, w], blocks, 1e-4)
        if kind is None:
            triton_ops.pack_gradient(torch.randn(tokens, features).to(dtype), seeds, 2)
            continue
        z, bias = torch.randn(tokens, 2 * features).to(dtype), torch.zeros(2 * features, dtype=master)
        dh = z[:, features if kind in reference.GATED else 0 :].contiguous()
        triton_ops.glu(z, bias if has_bias else None, kind)
        triton_ops.glu_backward(dh, z, bias if has_bias else None, kind)
        triton_ops.glu_backward_pack(dh, z, bias if has_bias else None, kind, seeds, 2)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    if not list(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*")):
        pytest.skip("this build of Triton brings no ptxas")
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    return tmp_path


def entries(cache):
    return {path.parent.name for path in cache.glob("*/*.cubin")}


def test_launches_find_what_was_compiled_ahead(cache):
    calls = [call for of in EVERY for call in ahead.calls_of(*of)]
    different = 13  # three of fp32 masters, three of bf16 ones, three of each activation, a gradient alone
    ahead._start(calls, 90, "sm_90")
    ahead._start(calls, 90, "sm_90")
    assert len(ahead._pending) == 6  # two of eight cores are left; what has begun is not begun again
    ahead.wait()
    compiled = entries(cache)
    assert len(compiled) == len(set(calls)) == different and len(list(cache.glob("sparse24-*"))) == different
    subprocess.run([sys.executable, __file__], check=True)
    assert entries(cache) == compiled
    ahead._start(calls, 90, "sm_90")
    assert not ahead._pending  # done before
    ahead._start([*calls, ("masked_decay_", "float16", "float16")], 90, "sm_90")
    assert len(ahead._pending) == 1
    ahead.wait()
    assert len(entries(cache)) == different + 1


def test_a_process_that_fails_leaves_no_mark_and_is_told_of(cache, caplog, monkeypatch):
    caplog.set_level("INFO", "sparse24")
    monkeypatch.setattr(ahead, "_launches", lambda call, order: [["sparse24.kernels.triton_glu", "no_kernel", [], {}]])
    ahead._start([("glu", "bfloat16", "swiglu", None)], 90, "sm_90")
    ahead.wait()
    assert "compiles its kernels when they are needed" in caplog.text and "no_kernel" in caplog.text
    assert not list(cache.glob("sparse24-*")) and not ahead._pending


def test_a_call_that_cannot_be_noted_is_told_of(cache, caplog):
    caplog.set_level("INFO", "sparse24")
    ahead._start([("glu", "no_dtype", "swiglu", None)], 90, "sm_90")
    assert "compiles its kernels when they are needed" in caplog.text and "no_dtype" in caplog.text
    assert not list(cache.glob("sparse24-*")) and not ahead._pending


def test_a_process_that_takes_too_long_is_ended(cache, caplog, monkeypatch):
    caplog.set_level("INFO", "sparse24")
    monkeypatch.setattr(ahead, "_SLOWEST_S", 0.0)
    ahead._start(ahead.calls_of(*DOWN), 90, "sm_90")
    processes = [work.process for work in ahead._pending]
    ahead.wait()
    assert "took too long" in caplog.text and not ahead._pending
    assert len(processes) == 4 and all(process.returncode for process in processes)


def test_calls_are_spread_over_the_processes_there_are():
    calls = sorted(set(ahead.calls_of(*SWIGLU)), key=str)
    assert sorted(map(len, ahead._groups(calls, 14))) == [1] * len(calls)
    search = ("pack_weights_", "float32", "bfloat16", True)
    two = ahead._groups(calls, 2)
    assert sorted(sum(two, []), key=str) == calls
    costs = [sum(map(ahead._cost, group)) for group in two]
    assert max(costs) - min(costs) < 1.0 and any(group[0] == search for group in two)
    assert ahead._groups([], 2) == []


def test_nothing_is_compiled_ahead_where_it_would_not_help(cache, monkeypatch):
    calls = ahead.calls_of(*SWIGLU)
    ahead.start(calls, torch.device("cpu"), True)
    with monkeypatch.context() as patch:
        patch.setenv("LOCAL_RANK", "1")  # rank 0 compiles for all
        ahead._start(calls, 90, "sm_90")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(2), raising=False)
    ahead._start(calls, 90, "sm_90")
    assert not ahead._pending


def test_a_cache_that_cannot_be_written_is_told_of(cache, caplog, monkeypatch):
    caplog.set_level("INFO", "sparse24")
    (cache / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache / "file"))
    ahead._start([("masked_decay_", "float16", "float16")], 90, "sm_90")
    ahead.wait()
    assert "when they are needed" in caplog.text and not ahead._pending


if __name__ == "__main__":
    launches()
