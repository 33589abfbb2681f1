"""Faults of runs of several processes. Others: test_processes, test_async_checkpoint, test_preflight, test_parallel.

Each docstring begins with the fault's number in docs/reliability.md.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_cases import OVERRIDES, STEPS, contents, rows

from openv4.train.metrics import read_lines

pytestmark = pytest.mark.xdist_group("processes")

SECONDS = 240


def start(data: Path, output: Path, *overrides: str) -> "subprocess.Popen[str]":
    """A run of four processes, each with one expert."""
    command = [str(Path(sys.executable).with_name("openv4")), "train", *OVERRIDES, f"data={data}", f"output={output}"]
    return subprocess.Popen(
        [*command, "parallel.nproc=4", "parallel.expert=4", "checkpoint.every=1", "checkpoint.keep=3", *overrides],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def child_of(pid: int, rank: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(next(c for c in children if f"RANK={rank}" in Path(f"/proc/{c}/environ").read_text().split("\0")))


@pytest.mark.slow
def test_one_of_four_killed_in_a_step_and_a_checkpoint_damaged(small_data: Path, tmp_path: Path) -> None:
    """F3, F11: `kill -9` while the others are in the middle of a step; they end within seconds, and it is named. Then
    the newest checkpoint is damaged as well: all four go on from the one before, bit for bit as if nothing had been."""
    straight, run = tmp_path / "straight", tmp_path / "run"
    text, _ = start(small_data, straight).communicate(timeout=SECONDS)
    assert len(rows(straight)) == STEPS, text

    process, deadline = start(small_data, run), time.monotonic() + SECONDS
    checkpoints = run / "checkpoints"
    while not (checkpoints / "step_3").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    victim = child_of(process.pid, 2)
    os.kill(victim, signal.SIGSTOP)  # the others go on to where they need it, in the step or between two
    time.sleep(1.0)
    assert process.poll() is None
    os.kill(victim, signal.SIGKILL)
    begun = time.monotonic()
    text, _ = process.communicate(timeout=SECONDS)
    assert time.monotonic() - begun < 60
    assert process.returncode == 128 + signal.SIGKILL, text
    assert "error: process 2 of 4 was ended by SIGKILL; the others were stopped" in text

    newest = (checkpoints / "latest").read_text().strip()
    (path,) = (checkpoints / newest).glob("optimizer-00003-of-*.safetensors")
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    process = start(small_data, run)
    text, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, text
    told = [event["text"] for event in read_lines(run / "events.jsonl") if event["kind"] == "damaged"]
    assert len(told) == text.count("damaged: ") == 1
    assert told[0].startswith(f"{path}: checksum") and f"damaged_{newest}, going on from step_" in told[0]
    assert (checkpoints / f"damaged_{newest}").is_dir()
    assert contents(checkpoints / f"step_{STEPS}") == contents(straight / "checkpoints" / f"step_{STEPS}")
    assert rows(run) == rows(straight)
