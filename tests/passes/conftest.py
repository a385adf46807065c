import pytest
import torch


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Each test captures its graphs anew and draws the same numbers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
