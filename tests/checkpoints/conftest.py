"""Let these tests import the training tools, and keep a tiny model on one thread."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "tools"))


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Threads that wait for each other cost a small model far more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
