"""What the tests of checkpoints share: processes played by threads, tensors dealt out to them, processes that die."""

import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TypeVar

import pytest
from run_cases import contents
from torch import Tensor

from openv4.train.checkpoint import Processes, latest_checkpoint, make_latest, remove_leftovers
from openv4.train.checkpoint_writer import Snapshot

T = TypeVar("T")


def in_threads(world: int, action: Callable[[Processes], T]) -> list[T | BaseException]:
    """What ``action`` returns or raises for each of so many processes, played by threads that agree with each other."""
    barrier, texts = threading.Barrier(world, timeout=60), [""] * world

    def play(rank: int) -> T | BaseException:
        def agree(text: str) -> str:
            texts[rank] = text
            barrier.wait()
            first = next(filter(None, texts), "")
            barrier.wait()  # nobody writes the next text before all have read this one
            return first

        try:
            return action(Processes(rank, world, agree))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(play, range(world)))


def deal(snapshot: Snapshot, rank: int, world: int) -> Snapshot:
    """The share of one process: every tensor goes to one of them, single experts too. Adapters all go to rank 0."""

    def share(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for index, (name, tensor) in enumerate(tensors.items()) if index % world == rank}

    weights = share(snapshot.weights) if snapshot.adapter is None else snapshot.weights if rank == 0 else {}
    return replace(snapshot, weights=weights, optimizer=share(snapshot.optimizer))


# The functions that a save consists of.
SAVING = {"save", "wait", "_open", "_write", "_failing", "_write_part", "_write_stem", "_publish", "_collect"}
SAVING |= {
    "_assemble",
    "_merged",
    "_abandon",
    "make_latest",
    "write_tensors",
    "write_json",
    "write_index",
    "tried",
    "sync",
    "file_checksum",
    "write_text",
    "rename",
}
SAVING |= {"mkdir", "rmtree", "_rmtree_safe_fd", "_rmtree_safe_fd_step"}


def killer(line: int) -> Callable[..., object]:
    """A trace function that ends the process, without a word, at the n-th line of the functions that save."""
    passed = 0

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., object] | None:
        nonlocal passed
        if frame.f_code.co_name not in SAVING:
            return None
        if event == "line":
            passed += 1
            if passed == line:
                os._exit(9)
        return trace

    return trace


def whole_after_a_kill(work: Path, before: Path, after: Path, expected: Mapping[str, bytes], line: int) -> Path:
    """The newest checkpoint of ``work``, where saving step 3 was killed at a line: byte for byte one of ``before`` or
    ``after``, and so is the whole folder once leftovers are gone. ``expected`` holds the files of both."""
    newest = latest_checkpoint(work)
    assert newest is not None
    found = {f"{newest.name}/{name}": data for name, data in contents(newest).items()}
    assert found == {name: data for name, data in expected.items() if name.startswith(newest.name)}, line
    remove_leftovers(work)
    make_latest(newest, keep=2)
    assert contents(work) == contents(after if newest.name == "step_3" else before), line
    return newest


@contextmanager
def tmpfs(folder: Path, *options: str) -> Iterator[None]:
    """A file system of its own at ``folder``, which must not exist; skips the test where none can be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here ({mounted.stderr.strip()})")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
