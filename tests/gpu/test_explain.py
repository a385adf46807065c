"""explain, doctor and bench on a GPU: measured times, and the choices that compiling makes."""

import math

import pytest
import torch

import sparse24
from sparse24.compiler.command import main

from ..compiler.models import Stack, SwiGLU

pytestmark = pytest.mark.gpu


def test_its_choices_and_times_are_those_of_compiling() -> None:
    model = Stack(SwiGLU(2048, 8192), d=2048).cuda().bfloat16()
    x = torch.randn(8192, 2048, device="cuda", dtype=torch.bfloat16)
    state = torch.cuda.get_rng_state()
    report = sparse24.explain(model, x)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    torch.compile(model, backend="sparse24", options={"inner": "eager"})(x)
    assert {row.name: row.reason for row in report.rows} == {
        name: weight.reason_skipped for name, weight in sparse24.session(model).weights.items()
    }
    for row in report.rows[:-1]:
        assert row.cost is not None and row.cost.measured
        assert math.isfinite(row.cost.dense.total) and row.cost.sparse.packing > 0
        assert row.sparse == row.cost.faster
    assert "measured for 3 layers" in str(report)


def test_doctor_and_bench(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor"])
    assert status == 0, capsys.readouterr().out
    assert main(["bench", "--d", "2048", "--ff", "8192", "--tokens", "8192"]) == 0
    assert "measured on" in capsys.readouterr().out
