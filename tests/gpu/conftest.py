import pytest
import torch


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Every test here needs a GPU; each compiles anew and draws the same numbers."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch._dynamo.reset()
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that the other workers have something to do beside it."""
    items.sort(key=lambda item: not item.name.startswith("test_a_run_with_everything"))
