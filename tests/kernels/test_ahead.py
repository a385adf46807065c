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

from sparse24.kernels import ahead, layout

SWIGLU = (torch.bfloat16, torch.float32, "mvue", "swiglu", False)
BIASED = (torch.bfloat16, torch.bfloat16, "mvue", None, True)


def launches():
    """A training step of both layers as a process with a GPU launches it, on tensors with data and other sizes."""
    from triton.runtime import driver

    from sparse24.kernels import triton_launch, triton_ops

    driver.set_active(ahead._Target(90))
    triton_launch.compile_only = True
    tokens, features, seeds = 200, 320, torch.zeros(3, dtype=torch.int64)
    for dtype, master, _, kind, _ in (SWIGLU, BIASED):
        w, packed = torch.randn(192, 320).to(master), torch.zeros(layout.numel(192, 320, dtype), dtype=dtype)
        blocks = [layout.Block(w, packed, packed.clone(), 0, 0, 192, 320)] * 2
        for search in (True, False):
            triton_ops.pack_weights_(blocks, search)
        triton_ops.masked_decay_([w, w], blocks, 1e-4)
        if kind is None:
            triton_ops.pack_gradient(torch.randn(tokens, features).to(dtype), seeds, 2)
        else:
            z, dh = torch.randn(tokens, 2 * features).to(dtype), torch.randn(tokens, features).to(dtype)
            triton_ops.glu(z, None, kind)
            triton_ops.glu_backward(dh, z, None, kind)
            triton_ops.glu_backward_pack(dh, z, None, kind, seeds, 2)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    if not list(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*")):
        pytest.skip("this build of Triton brings no ptxas")
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    return tmp_path


def entries(cache):
    return {path.parent.name for path in cache.glob("*/*.cubin")}


def test_launches_find_what_was_compiled_ahead(cache):
    calls = [call for of in (SWIGLU, BIASED) for call in ahead.calls_of(*of)]
    ahead._start(calls, 90, "sm_90")
    assert len(ahead._pending) == 3
    ahead.wait()
    compiled = entries(cache)
    assert len(compiled) == len(calls) == 10 and len(list(cache.glob("sparse24-*"))) == 3
    subprocess.run([sys.executable, __file__], check=True)
    assert entries(cache) == compiled
    ahead._start(calls, 90, "sm_90")
    assert not ahead._pending  # done before
    ahead._start([*calls, ("masked_decay_", "float16", "float16")], 90, "sm_90")
    assert len(ahead._pending) == 1
    ahead.wait()
    assert len(entries(cache)) == 11


def test_a_process_that_fails_leaves_no_mark_and_is_told_of(cache, caplog):
    caplog.set_level("INFO", "sparse24")
    ahead._start([("glu", "no_dtype", "swiglu", False)], 90, "sm_90")
    ahead.wait()
    assert "compiles its kernels when they are needed" in caplog.text and "no_dtype" in caplog.text
    assert not list(cache.glob("sparse24-*")) and not ahead._pending


def test_nothing_is_compiled_ahead_without_a_gpu_or_cores_to_spare(cache, monkeypatch):
    calls = ahead.calls_of(*SWIGLU)
    ahead.start(calls, torch.device("cpu"))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    ahead._start(calls, 90, "sm_90")
    assert not ahead._pending


if __name__ == "__main__":
    launches()
