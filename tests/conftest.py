"""What several test files share."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from openv4.data.prepare import KING_JAMES, PrepareConfig, ensure_prepared, prepare

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


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dozen sentences of the shipped text, some 600 tokens of a vocabulary of 512: for runs of a second."""
    folder = tmp_path_factory.mktemp("small_data")
    with gzip.open(KING_JAMES, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"][:65] for line in file][::50]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PrepareConfig(input=str(folder / "text.jsonl"), output=str(folder / "prepared"), vocab_size=512)
    prepare(config)
    return folder / "prepared"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of many tiny operations, where a second thread only waits; undoes what `train` sets in the process."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
