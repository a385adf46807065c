import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # blocks.py


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Each test compiles anew and draws the same numbers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
