"""Measured choices on disk."""

import json

import pytest

from sparse24.kernels import choice

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
