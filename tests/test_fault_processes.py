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

from openv4.launch import train as launch
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


ENDS = {
    "all is well": ("exit 0", "exit 0", "exit 0", 0, ""),
    "all refused": ("exit 2", "exit 2", "exit 2", 2, ""),
    "one failed": ("sleep 60", "exit 1", "sleep 60", 1, "1 of 3 ended with exit code 1"),
    "killed, and seen last": ("exit 1", "exit 1", "sleep 0.2; kill -9 $$", 137, "2 of 3 was ended by SIGKILL"),
    "killed, and seen first": ("sleep 0.2; exit 1", "kill -9 $$", "sleep 60", 137, "1 of 3 was ended by SIGKILL"),
    "aborted by a lost peer": ("kill -6 $$", "sleep 60", "sleep 0.2; kill -11 $$", 139, "2 of 3 was ended by SIGSEGV"),
    "aborted by a failed peer": ("sleep 0.2; kill -6 $$", "sleep 60", "exit 1", 1, "2 of 3 ended with exit code 1"),
    "aborted by itself": ("sleep 60", "kill -6 $$", "sleep 0.2; exit 1", 134, "1 of 3 was ended by SIGABRT"),
    "told to end": ("sleep 60", "sleep 0.2; exit 1", "sleep 60", 1, "1 of 3 ended with exit code 1"),
    "deaf when told to end": ("trap '' 15; sleep 9; sleep 9", "exit 1", "exit 0", 1, "1 of 3 ended with exit code 1"),
    "saved in time": ("exit 85", "sleep 0.2; exit 85", "exit 85", 85, ""),
    "one saved, one failed": ("exit 85", "sleep 0.2; exit 1", "exit 85", 1, "1 of 3 ended with exit code 1"),
}


@pytest.mark.parametrize("case", ENDS)
def test_which_process_is_named(case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """F3: who is killed is often seen to end after those who lost the connection to it."""
    monkeypatch.setattr(launch, "GRACE", 0.5)
    *commands, code, text = ENDS[case]
    begun = time.monotonic()
    assert launch._watch([subprocess.Popen(["bash", "-c", str(command)]) for command in commands]) == code
    assert time.monotonic() - begun < 8
    told = capsys.readouterr().err
    assert str(text) in told and bool(text) == bool(told)


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
