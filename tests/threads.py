"""A fixture for folders whose tests compute with small tensors; their conftest.py imports it."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tensors this small only wait for one another's threads, for minutes where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
