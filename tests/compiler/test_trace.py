"""What PyTorch's own tools show: TORCH_LOGS and TORCH_TRACE, set as a user sets them, before torch is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Linear(64, 10))
run = torch.compile(model, backend="sparse24", options={"inner": "aot_eager"})
run(torch.randn(2, 64)).sum().backward()
"""


def run(**environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("TORCH_LOGS", "TORCH_TRACE")} | environment
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(("setting", "lines"), [("+sparse24", 4), ("sparse24", 1), ("-sparse24", 0), ("dynamic", 0)])
def test_torch_logs_prints_a_line_for_each_linear(setting: str, lines: int) -> None:
    said = [line for line in run(TORCH_LOGS=setting).splitlines() if "sparse24: " in line]
    assert len(said) == lines
    if lines:
        assert "2 of 3 linears are sparse" in said[0]
    if lines > 1:
        assert "0.weight (up, 128x64, 2 tokens, float32): sparse, wgrad mvue" in said[1]
        assert "3.weight (linear, 10x64, 2 tokens, float32): dense: not part of a feed-forward layer" in said[3]


def test_torch_trace_holds_each_stage_of_a_graph(tmp_path: Path) -> None:
    run(TORCH_TRACE=str(tmp_path))
    (file,) = tmp_path.iterdir()
    lines = file.read_text().splitlines()
    found: dict[str, str] = {}
    for i, line in enumerate(lines):
        _, brace, rest = line.partition("{")
        if not brace or '"artifact"' not in rest:
            continue
        record = json.loads(brace + rest)
        payload = []
        for following in lines[i + 1 :]:
            if not following.startswith("\t"):
                break
            payload.append(following[1:])
        if record["artifact"]["name"].startswith("sparse24_"):
            assert record["frame_id"] == record["frame_compile_id"] == 0
            found[record["artifact"]["name"]] = "\n".join(payload)
    assert list(found) == [f"sparse24_{stage}" for stage in ("original", "tidied", "linears", "rewritten")]
    assert "sparse_linear" in found["sparse24_rewritten"] and "sparse_linear" not in found["sparse24_original"]
    assert [x["reason"] for x in json.loads(found["sparse24_linears"])] == [
        None,
        None,
        "not part of a feed-forward layer",
    ]
