"""Shared by the operator tests: unwritten memory shows, and one thread keeps them quick beside other work."""

import pytest
import torch


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty and its kin return NaN, so that memory an operator forgot to write reaches the result."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
