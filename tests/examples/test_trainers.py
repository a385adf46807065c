"""The trainer examples on tiny models: sparse, logged, and resumed to the same bits as a run in one go."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparse24
from sparse24.compiler import weights as numbering

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "plain_loop": "torch",
    "with_accelerate": "accelerate",
    "with_hf_trainer": "transformers",
    "with_lightning": "lightning",
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_resumed_run_ends_with_the_bits_of_one_in_one_go(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(NEEDS[name])
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module(name)
    models: list[nn.Module] = []
    original = sparse24.session

    def session(model: Any) -> sparse24.Session:
        models.append(getattr(model, "_orig_mod", model))
        return original(model)

    def go(folder: str, steps: int, *extra: str) -> tuple[float, dict[str, torch.Tensor], sparse24.Session]:
        torch._dynamo.reset()
        if (
            not extra
        ):  # as in a new process, where layers are numbered from 0; a resumed run takes numbers from its state
            monkeypatch.setattr(numbering, "_layers", 0)
        settings = ["--steps", str(steps), "--save-every", "3", "--batch", "2", "--inner", "eager"]
        loss = example.main(["--out", str(tmp_path / folder), *settings, *extra])
        return loss, {n: p.detach().clone() for n, p in models[-1].named_parameters()}, original(models[-1])

    monkeypatch.setattr(sparse24, "session", session)
    loss, weights, found = go("whole", 9)
    metrics = found.metrics()
    assert metrics["step"] == 9 and metrics["sparse_weights"] in (4, 6) and metrics["flip_rate"] > 0
    go("parts", 6)
    again, resumed, after = go("parts", 9, "--resume")
    assert after.metrics() == metrics
    assert again == loss and all(torch.equal(resumed[n], weights[n]) for n in weights)
