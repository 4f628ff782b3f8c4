"""One thread: these tensors are small, and the machine's other cores belong to others."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
