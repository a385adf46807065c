"""Measured choices on disk."""

import json
from types import SimpleNamespace

import pytest
import torch

from sparse24.kernels import choice, cusparselt, layout, providers
from sparse24.kernels.providers import Problem

HEADER = {"gpu": "one"}


def test_choices_of_several_processes_are_kept_together(tmp_path):
    path = tmp_path / "folder" / "choices.json"
    first, second = choice._Store(path, HEADER), choice._Store(path, HEADER)
    first.add("a", choice.Choice("cusparselt", 3, 1.0, 2.0))
    second.add("b", choice.Choice("torch_cusparselt"))
    first.add("c", choice.Choice(choice.KERNEL, ms=0.5))
    assert first.choices.keys() == choice._Store(path, HEADER).choices.keys() == {"a", "b", "c"}
    assert choice._Store(path, HEADER).choices["a"] == choice.Choice("cusparselt", 3, 1.0, 2.0)
    assert [p.name for p in path.parent.iterdir()] == ["choices.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Expecting property name"),
        (json.dumps({"header": {"gpu": "another"}, "choices": {}}), "it is of {'gpu': 'another'}"),
        (json.dumps({"header": HEADER, "choices": {"a": {"provider": "nobody"}}}), "it names unknown providers"),
        (json.dumps({"header": HEADER, "choices": {"a": {"speed": 1}}}), "unexpected keyword"),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_and_replaced(tmp_path, caplog, text, said):
    path = tmp_path / "choices.json"
    path.write_text(text)
    store = choice._Store(path, HEADER)
    assert not store.choices and "ignored the cache of measured choices" in caplog.text and said in caplog.text
    store.add("b", choice.Choice("cusparselt", 1))
    caplog.clear()
    assert choice._Store(path, HEADER).choices.keys() == {"b"} and not caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("direction", "rows", "inner"), [("spmm", 1152, 192), ("wgrad", 128, 320)])
def test_data_is_a_packed_matrix_and_the_dense_product_of_its_numbers(order, direction, rows, inner, dtype):
    problem = Problem(direction, rows, inner, 64, dtype, torch.device("cpu"))
    packed, x, dense = choice._data(problem)
    a = layout.unpack(packed, rows, inner, order)
    mask = layout.read_mask(packed, rows, inner, order)
    assert torch.equal(layout.pack(a, mask, order), packed)
    assert torch.equal(dense(), x @ a.t() if direction == "spmm" else a @ x)
    pairs = layout.nibbles_from_mask(mask).unique(return_counts=True)
    assert pairs[0].tolist() == sorted(layout.NIBBLES)
    assert (pairs[1] / mask.numel() * 24 - 1).abs().max() < 0.1  # each as often
    assert abs(a[mask].float().std() - 1) < 0.05 and abs(x.float().std() - 1) < 0.05
    assert all(torch.equal(one, other) for one, other in zip((packed, x), choice._data(problem), strict=False))


@pytest.mark.parametrize(("wrong_at", "checked"), [(None, 3), (0, 1), (1, 2), (2, 3)])
def test_a_candidate_is_checked_three_times(monkeypatch, wrong_at, checked):
    monkeypatch.setattr(choice, "time_ms", lambda run, repeats: 1.0)
    runs = []

    def run():
        runs.append(None)
        return torch.full((4,), 1.1 if len(runs) - 1 == wrong_at else 1.0)

    assert choice._try(run, "it", torch.ones(4), 2.0) == (1.0 if wrong_at is None else None)
    assert len(runs) == checked
    assert choice._try(lambda: torch.full((4,), float("nan")), "it", torch.ones(4), 2.0) is None
    assert choice._try(lambda: torch.ones(4), "it", torch.ones(4), 0.5) is None  # much slower than the best


def test_the_algorithms_that_usually_win_are_measured_first(monkeypatch):
    monkeypatch.setattr(cusparselt, "plan", lambda *args: SimpleNamespace(algorithms=10))
    problem = Problem("spmm", 128, 128, 64, torch.bfloat16, torch.device("cuda", 0))
    assert providers.CusparseLt().algorithms(problem) == [3, 2, 6, 5, 0, 1, 4, 7, 8, 9]
