"""Measured choices on disk."""

import json
from contextlib import nullcontext
from functools import partial
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


class Fake:
    """Candidates 0 to 5: alone 1 is the fastest and 5 the fifth, in turns 2 is; 3 is wrong."""

    name = "cusparselt"
    alone = (0.9, 0.8, 0.95, 0.1, 0.98, 0.99)
    under_load = (1.0, 1.3, 0.9, 0.1, 1.1, 0.5)

    def supports(self, problem):
        return True

    def algorithms(self, problem):
        return range(6)

    def run(self, problem, packed, x, algorithm):
        y = x @ layout.unpack(packed, problem.rows, problem.inner, layout.metadata_order(problem.device)).t()
        return 1.1 * y if algorithm == 3 else y


def measured(monkeypatch, fake):
    """The choice among a fake's candidates, and what was timed, in order; dense is None."""
    timed = []

    def time_ms(run, repeats):
        algorithm = run.args[-1] if isinstance(run, partial) else None
        timed.append((algorithm, repeats))
        if algorithm is None:
            return 2.0
        in_turns = any(algorithm is None for algorithm, _ in timed)
        return (fake.under_load if in_turns else fake.alone)[algorithm]

    monkeypatch.setattr(choice, "time_ms", time_ms)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    problem = Problem("spmm", 128, 64, 64, torch.float32, torch.device("cpu"))
    return choice.measure(problem, [fake]), timed


def test_the_fastest_alone_are_timed_once_more_in_turns(monkeypatch, caplog):
    found, timed = measured(monkeypatch, Fake())
    assert found == choice.Choice("cusparselt", 2, 0.9, 2.0)
    assert "struck cusparselt algorithm 3" in caplog.text
    last = timed[-5 * choice._TURNS :]
    turns = [[algorithm for algorithm, _ in last[i : i + 5]] for i in range(0, len(last), 5)]
    assert all(sorted(turn, key=str) == [0, 1, 2, 4, None] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > choice._TURNS // 2  # in orders of their own
    assert {repeats for algorithm, repeats in last if algorithm is None} == {round(choice._TURN_MS / 2.0)}


def test_where_all_are_wrong_the_masked_dense_product_serves(monkeypatch, caplog):
    fake = Fake()
    monkeypatch.setattr(fake, "algorithms", lambda problem: [3])
    found, _ = measured(monkeypatch, fake)
    assert found.provider == "masked_dense" and "masked dense matmuls serve" in caplog.text
