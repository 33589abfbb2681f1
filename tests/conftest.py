"""What several test files share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton kernels run through the interpreter, which must be asked for before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from cli_cases import SMALL_RUN, TEXTS, VOCAB, Result, Run, console, write_texts
from finetune_cases import conversations, write_base, write_chat
from run_cases import prepare_small_data
from thread_fixtures import _two_threads, one_thread  # noqa: F401 (fixtures)

from openv4.data.prepare import KING_JAMES, ensure_prepared

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench", action="store_true", help="run the benchmarks and write docs/results/")


@pytest.fixture(scope="session")
def king_james(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped text, prepared once for all tests."""
    return ensure_prepared(KING_JAMES, tmp_path_factory.mktemp("data") / "king_james")


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``prepare_small_data``, once for all tests."""
    return prepare_small_data(tmp_path_factory.mktemp("small_data"))


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without their drawing, which takes longer than they do."""
    monkeypatch.setattr("openv4.train.loop.plot_loss", lambda run: run / "plots" / "loss.png")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run in an empty folder, and leave nothing there that they were not asked for."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("OPENV4_TRACEBACK", raising=False)
    yield
    assert list(folder.iterdir()) == []


@pytest.fixture
def openv4(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process, as the console script would."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        return Result(console(*arguments), *capsys.readouterr())

    return run


@pytest.fixture
def refused(openv4: Run) -> Callable[..., str]:
    """Runs a command that must fail as bad input should, and returns its one line."""

    def run(*arguments: object) -> str:
        result = openv4(*arguments)
        assert result.code == 2, result
        assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
        assert "Traceback" not in result.out
        return result.err.removeprefix("error: ").strip()

    return run


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """texts -> `openv4 prepare` -> data -> `openv4 train` -> run, in a folder whose name needs quoting."""
    folder = tmp_path_factory.mktemp("workshop") / "it's a, (\u4f60)"
    write_texts(folder / "texts", TEXTS)
    assert console("prepare", f"input={folder / 'texts'}", f"output={folder / 'data'}", f"vocab_size={VOCAB}") == 0
    run = ["train", *SMALL_RUN, f"data={folder / 'data'}", f"output={folder / 'run'}", "checkpoint.every=4"]
    assert console(*run) == 0
    return folder


@pytest.fixture(scope="session")
def fp32(workshop: Path) -> Path:
    """`openv4 export` of the run in fp32."""
    output = workshop / "fp32"
    assert console("export", f"checkpoint={workshop / 'run'}", f"output={output}", "format=fp32") == 0
    return output


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small release in the instruct format, FP4 experts and FP8 matrices; not to be written to."""
    return write_base(tmp_path_factory.mktemp("release") / "base")


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations for it, some 950 tokens to train on."""
    return write_chat(tmp_path_factory.mktemp("chat") / "chat.jsonl", conversations(24))
