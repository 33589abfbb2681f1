"""Fixtures that need no more than torch, for conftest.py, and for `make gpu`, where conftest.py stays out."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    """As many as the smallest machine has, so that sums have the same order everywhere."""
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of many tiny operations, where a second thread only waits; undoes what `train` sets in the process."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
