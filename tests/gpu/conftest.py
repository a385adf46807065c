import pytest
import torch


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Every test here needs a GPU; each compiles anew and draws the same numbers."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch._dynamo.reset()
    torch.manual_seed(0)
