"""What the tests of benchmarks/quality share."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(QUALITY.parent)
    monkeypatch.syspath_prepend(QUALITY)
    return importlib.import_module


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of run.py's --work, shared: the text is tokenized once."""
    return tmp_path_factory.mktemp("work")
