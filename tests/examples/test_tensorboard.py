"""The TensorBoard example: its event files hold what the session said."""

import importlib
import io
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_its_event_files_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("with_tensorboard")
    torch._dynamo.reset()
    loss = example.main(
        ["--out", str(tmp_path), "--steps", "4", "--save-every", "2", "--batch", "2", "--inner", "eager"]
    )
    events = accumulator.EventAccumulator(str(tmp_path), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    assert [e.step for e in scalars["loss"]] == [2, 4] and scalars["loss"][-1].value == pytest.approx(loss)
    layers = [name for name in scalars if name.startswith("sparse24/flip_rate/")]
    assert len(layers) == 4
    pooled = sum(scalars[name][-1].value for name in layers) / 4  # all of one size
    assert scalars["sparse24/flip_rate"][-1].value == pytest.approx(pooled) and pooled > 0
    assert scalars["sparse24/sparse_weights"][-1].value == 4 and scalars["sparse24/memory/packed"][-1].value > 0
    masks = [name for name in events.Tags()["images"] if name.startswith("mask/")]
    assert len(masks) == 4
    for name in masks:
        picture = image.open(io.BytesIO(events.Images(name)[-1].encoded_image_string)).convert("L")
        assert picture.histogram()[255] * 2 == picture.width * picture.height  # half of the weights are kept
