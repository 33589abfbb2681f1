"""Small soaks for `test_soak.py`: a healthy one, and some with a fault put into what makes runs resume.

Started by path, with the folder that gets a file for each.
"""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soak import FORK, Soak, Tally, warm_up

import openv4.train.journal as journal
import openv4.train.loop as loop
from openv4.data.loader import Loader
from openv4.model import Transformer
from openv4.train.checkpoint import Checkpoint
from openv4.train.checkpoint_writer import CheckpointWriter
from openv4.train.metrics import MetricsFile

STEPS, KILLS = 8, 30


def published_too_early() -> None:
    """A checkpoint has its name, and something like a manifest, before its files are written."""
    plain = CheckpointWriter._open

    def _open(self: CheckpointWriter, folder: Path, size: int) -> None:
        plain(self, folder, size)
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").touch()

    CheckpointWriter._open = _open  # type: ignore[method-assign]


def a_row_is_skipped() -> None:
    """A run that resumes goes on one row further."""
    plain = Loader.load_state_dict

    def load_state_dict(self: Loader, state: dict[str, Any]) -> None:
        state = copy.deepcopy(state)
        for source in state["sources"]:
            if source["cuts"]:
                source["cuts"][-1][1] += 1
        plain(self, state)

    Loader.load_state_dict = load_state_dict  # type: ignore[method-assign]


def biases_are_forgotten() -> None:
    """Router biases begin anew, as if they were no part of a checkpoint."""
    plain = Checkpoint.fill

    def fill(self: Checkpoint, model: Transformer) -> None:
        plain(self, model)
        for name, buffer in model.named_buffers():
            if name.endswith("gate.bias"):
                buffer.zero_()

    Checkpoint.fill = fill  # type: ignore[method-assign]


def rows_are_kept() -> None:
    """Rows of steps that are done again stand there twice."""
    journal.MetricsFile = lambda path, step: MetricsFile(path, sys.maxsize)  # type: ignore[assignment, misc]


# What must notice each.
FAULTS: dict[Callable[[], None], tuple[str, ...]] = {
    published_too_early: ("unloadable",),
    a_row_is_skipped: ("samples_lost", "files_differing"),
    biases_are_forgotten: ("files_differing",),
    rows_are_kept: ("rows_differing",),
}


def until_noticed(fault: Callable[[], None], soak: Soak, folder: Path) -> None:
    """In a child: runs with the fault, compared with the runs without kills of the healthy soak."""
    fault()
    soak.scratch, soak.kinds, soak.tally = folder / fault.__name__, ((1,),), Tally()
    for kills in range(3, KILLS, 3):
        if all(getattr(soak.go(kills), name) for name in FAULTS[fault]):
            break
    write(soak.tally, folder / f"{fault.__name__}.json")


def write(tally: Tally, path: Path) -> None:
    path.write_text(json.dumps(tally.result()))


def main(folder: Path) -> None:
    warm_up()
    loop.plot_loss = lambda run: run / "plots" / "loss.png"
    soak = Soak(folder, STEPS, seed=0, kinds=((1,), (1, 2)))
    soak.kinds = ((1,),)  # most of them: two processes take three times as long
    soak.go(KILLS - 5)
    soak.kinds = ((1, 2),)
    write(soak.go(KILLS), folder / "healthy.json")
    for fault in FAULTS:
        child = FORK.Process(target=until_noticed, args=(fault, soak, folder))
        child.start()
        child.join()
        assert child.exitcode == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
