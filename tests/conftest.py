"""What several test files share."""

import os
from pathlib import Path

import pytest
import torch

from openv4.data.prepare import KING_JAMES, ensure_prepared

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench", action="store_true", help="run the benchmarks and write docs/results/")


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    """As many as the smallest machine has, so that sums have the same order everywhere."""
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def king_james(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped text, prepared once for all tests."""
    return ensure_prepared(KING_JAMES, tmp_path_factory.mktemp("data") / "king_james")
