"""Runs before any test imports Triton: without a GPU the kernels run under its interpreter, on CPU tensors."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when @triton.jit decorates, Triton's own functions included


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Tests of a group share launches that would be made by every worker if pytest-xdist took no notice of groups."""
    if getattr(config.option, "loadgroup", False):
        grouped = [item.nodeid for item in items if item.get_closest_marker("xdist_group")]
        if not all("@" in nodeid for nodeid in grouped):
            found = f"pytest {pytest.__version__}, under which pytest-xdist takes no notice of groups"
            raise pytest.UsageError(f"found {found}, need the versions of constraints.txt")
