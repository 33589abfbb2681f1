"""Runs whose loss spikes: a poisoned batch, a burst of the learning rate. Started by path, a process of such a run."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import tiny_config

from openv4.optim.schedule import Plan, Schedule
from openv4.train.anticipation import Feed
from openv4.train.config import TrainConfig
from openv4.train.loop import train
from openv4.train.metrics import read_lines

WINDOW, LENGTH = 8, 28  # steps
SPIKE = 18  # the step, from 0, whose batch is poisoned or whose rate bursts
EVERY = 3  # steps between checkpoints
Rows = list[tuple[Any, ...]]  # by row of a batch, its pieces


def spiking_config(data: Path, output: Path, *overrides: str) -> TrainConfig:
    """One stage without a ramp; a checkpoint every few steps."""
    config = tiny_config(
        data,
        output,
        f"checkpoint.every={EVERY}",
        "stages.0.batch_tokens_start=null",
        "stages.0.batch_ramp_tokens=0",
        f"stages.0.tokens={256 * LENGTH}",
        "stages.0.lr=3e-3",
        f"stability.window={WINDOW}",
        "stability.z=12",  # a window this short knows its noise badly
        "stability.delay=2",
        "stability.period=6",
        *overrides,
    )
    return replace(config, stages=config.stages[:1])


@contextmanager
def poisoned(rows: Rows) -> Iterator[None]:
    """Rows with these pieces are of random tokens, whenever they are read."""
    read = Feed._read

    def spoilt(self: Feed, *arguments: Any) -> Any:
        fetched = read(self, *arguments)
        batch = fetched.batch
        bad = torch.tensor([pieces in rows and bool(pieces) for pieces in batch.pieces])
        noise = torch.randint(3, 512, batch.tokens.shape, generator=torch.Generator().manual_seed(1))
        fetched.batch = batch._replace(tokens=torch.where(bad[:, None], noise, batch.tokens))
        return fetched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Feed, "_read", spoilt)
        yield


@contextmanager
def burst(run: Path, factor: float = 100.0) -> Iterator[None]:
    """Until the run has gone back once, the learning rate of one step is so many times what it should be."""
    plan = Schedule.plan

    def raised(self: Schedule, step: int, tokens: int) -> Plan | None:
        found = plan(self, step, tokens)
        if found is None or step != SPIKE or read_lines(run / "rollbacks.jsonl"):
            return found
        return replace(found, lr=found.lr * factor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Schedule, "plan", raised)
        yield


@contextmanager
def reading() -> Iterator[dict[int, list[Rows]]]:
    """The rows that are trained on, by step from 0; several lists where a step is done again."""
    found: dict[int, list[Rows]] = {}
    take = Feed.take

    def look(self: Feed, *arguments: Any) -> Any:
        step = self._ahead[0].step
        batch = take(self, *arguments)
        found.setdefault(step, []).append(list(batch.pieces))
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Feed, "take", look)
        yield found


def train_together(data: Path, output: Path, rows: Rows, count: int, *overrides: str) -> None:
    """The poisoned run in ``count`` processes."""
    port = str(29500 + os.getpid() % 5000)
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    more = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, __file__, str(data), str(output), repr(rows), *overrides]
    children = [
        subprocess.Popen(
            command,
            env=os.environ | shared | more | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        said = [child.communicate(timeout=120)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * count, said


if __name__ == "__main__":
    with poisoned(eval(sys.argv[3])):
        train(spiking_config(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[4:]))
    sys.stdout.flush()
    os._exit(0)
