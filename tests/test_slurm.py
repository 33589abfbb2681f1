"""Jobs under a real SLURM of two nodes on this machine: they train, are told of the end of their time, come back.

What happens to the script alone is in test_submit.py. Training across two tasks needs openv4/train/parallel.py.
"""

import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_cases import SMALL_RUN, Run, console
from run_cases import rows
from slurm_cases import Slurm, events, running_slurm, stand_in, why_not

from openv4.launch import slurm as launch_slurm

pytestmark = [pytest.mark.skipif(bool(why_not()), reason=why_not()), pytest.mark.xdist_group("slurm")]

# Two tasks that meet on this machine, and none of what a node of GPUs has.
TWO = (
    *("launch=slurm", "launch.nodes=2", "launch.processes_per_node=1", "launch.gpus_per_node=0"),
    *("launch.cpus_per_process=1", "launch.memory=null", "launch.exclusive=false", "launch.time=10"),
    "launch.master_addr=127.0.0.1",
)
ONE = (*TWO, "launch.nodes=1")
FOUR_BY_NODE = (*TWO, "launch.tasks=node", "launch.processes_per_node=2")

several = pytest.mark.skipif(
    importlib.util.find_spec("openv4.train.parallel") is None, reason="this version trains in one process"
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with running_slurm(tmp_path_factory.mktemp("slurm") / "c") as cluster:
        yield cluster


@pytest.fixture
def here(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stands_in(here: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, where `openv4` is a program that behaves as training does."""
    stand_in(here / "bin")
    monkeypatch.setenv("PATH", f"{here / 'bin'}:{os.environ['PATH']}")
    return here


def submit(openv4: Run, *words: object) -> str:
    """The number of the submitted job."""
    result = openv4("submit", *words)
    assert result.code == 0, result
    found = re.search(r"^job: +(\d+)$", result.out, re.MULTILINE)
    assert found
    return found[1]


def output(run: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((run / "slurm").glob("*.log")))


def tell(slurm: Slurm, number: str, run: Path, ranks: int) -> None:
    """USR1 to the batch shell, as --signal=B:USR1 sends it, once all ranks train."""
    deadline = time.monotonic() + 60
    while len([event for event in events(run) if "start" in event]) < ranks:
        assert time.monotonic() < deadline, output(run) + slurm.logs()
        time.sleep(0.1)
    slurm.command("scancel", "--batch", "--signal=USR1", number)


@pytest.mark.parametrize(("words", "ranks"), [(TWO, 2), (FOUR_BY_NODE, 4)], ids=["rank", "node"])
def test_every_task_learns_its_place(
    words: tuple[str, ...], ranks: int, slurm: Slurm, stands_in: Path, openv4: Run
) -> None:
    number = submit(openv4, "run=smoke", "output=out", "steps=2", *words)
    assert slurm.ended(number).state == "COMPLETED", output(stands_in / "out")
    starts = [event for event in events(stands_in / "out") if "start" in event]
    assert [event["RANK"] for event in starts] == [str(rank) for rank in range(ranks)]
    assert [event["LOCAL_RANK"] for event in starts] == [str(rank % (ranks // 2)) for rank in range(ranks)]
    assert {event["WORLD_SIZE"] for event in starts} == {str(ranks)}
    assert {event["MASTER_PORT"] for event in starts} == {str(15000 + int(number) % 15000)}
    (log,) = (stands_in / "out" / "slurm").glob(f"train-{number}-*.log")
    if words is TWO:  # each line begins with the task; processes of one task write into each other's lines
        assert sorted(log.read_text().splitlines()) == ["0: training from step 0", "1: training from step 0"]
    assert log.read_text().count("training from step 0") == ranks


def test_the_first_node_is_where_they_meet(slurm: Slurm, stands_in: Path, openv4: Run) -> None:
    number = submit(openv4, "run=smoke", "output=out", "steps=1", *TWO[:-1])
    assert slurm.ended(number).state == "COMPLETED"
    assert {event["MASTER_ADDR"] for event in events(stands_in / "out") if "start" in event} == {"node1"}


def test_secrets_are_inherited(slurm: Slurm, stands_in: Path, openv4: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-value-of-mine")
    look = "launch.setup=['test -n \"$WANDB_API_KEY\" && echo it is here']"
    number = submit(openv4, "run=smoke", "output=out", "steps=1", look, *ONE)
    assert slurm.ended(number).state == "COMPLETED" and "it is here" in output(stands_in / "out")
    assert not [path for path in (stands_in / "out").rglob("*") if path.is_file() and b"s3cr3t" in path.read_bytes()]


def test_a_hostile_name_reaches_training_as_it_is(slurm: Slurm, stands_in: Path, openv4: Run) -> None:
    name = 'it\'s "$(touch pwned)"; #SBATCH --nodes=9 %j `touch pwned`'
    number = submit(openv4, "run=smoke", "output=out", "steps=1", f"name={name}", *ONE)
    assert slurm.ended(number).state == "COMPLETED", output(stands_in / "out")
    (start,) = [event for event in events(stands_in / "out") if "start" in event]
    assert start["words"] == ["run=smoke", "output=out", "steps=1", f"name={name}"]
    assert not list(stands_in.rglob("pwned"))


def test_cancelled_is_not_requeued(slurm: Slurm, stands_in: Path, openv4: Run) -> None:
    """TERM reaches every process once, from SLURM itself."""
    number = submit(openv4, "run=smoke", "output=out", "steps=1000", *TWO)
    slurm.wait(number, lambda job: len([e for e in events(stands_in / "out") if "start" in e]) == 2)
    slurm.command("scancel", number)
    job = slurm.ended(number)
    assert (job.state, job.restarts) == ("CANCELLED", 0)
    assert [e["signal"] for e in events(stands_in / "out") if "signal" in e] == ["SIGTERM"] * 2
    assert "back into the queue" not in output(stands_in / "out")


def test_a_crash_ends_the_others(slurm: Slurm, stands_in: Path, openv4: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 crashes; rank 0, which would go on for minutes, is ended, and the job has failed."""
    monkeypatch.setattr(launch_slurm, "WAIT_SECONDS", 2)
    number = submit(openv4, "run=smoke", "output=out", "seed=1", "steps=3000", *TWO)
    job = slurm.ended(number, seconds=60)
    assert job.state == "FAILED" and job.restarts == 0
    assert "1: crashed" in output(stands_in / "out")


@pytest.mark.slow
@pytest.mark.parametrize(("words", "ranks"), [(TWO, 2), (FOUR_BY_NODE, 4)], ids=["rank", "node"])
def test_requeued_and_resumed(words: tuple[str, ...], ranks: int, slurm: Slurm, stands_in: Path, openv4: Run) -> None:
    """Told once, every process saves; the job comes back, and each goes on from the step that it had reached."""
    run = stands_in / "out"
    number = submit(openv4, "run=smoke", "output=out", "steps=60", *words)
    tell(slurm, number, run, ranks)
    job = slurm.ended(number, seconds=240)
    assert (job.state, job.restarts) == ("COMPLETED", 1), output(run) + slurm.logs()
    found = events(run)
    assert [event["signal"] for event in found if "signal" in event] == ["SIGUSR1"] * ranks
    for rank in range(ranks):
        mine = [event for event in found if event["rank"] == rank]
        starts = [event["start"] for event in mine if "start" in event]
        ends = [event["end"] for event in mine if "end" in event]
        assert starts == [0, ends[0]] and 0 < ends[0] < 60 == ends[1]
    text = output(run)  # appended to, not written over
    assert "training from step 0" in text and re.search(r"training from step [1-9]", text)
    assert "back into the queue" in text


@pytest.mark.slow
def test_the_end_of_the_time_requeues(slurm: Slurm, stands_in: Path, openv4: Run) -> None:
    """The signal comes of itself before the limit: a job of a minute that needs longer is done in two goes."""
    run = stands_in / "out"
    number = submit(openv4, "run=smoke", "output=out", "steps=480", *TWO, "launch.time=1", "launch.signal_seconds=40")
    job = slurm.ended(number, seconds=400)
    assert job.state == "COMPLETED" and job.restarts >= 1, output(run) + slurm.logs()
    assert {event["signal"] for event in events(run) if "signal" in event} == {"SIGUSR1"}


# Real training.


@pytest.mark.slow
def test_one_process_trains(slurm: Slurm, here: Path, openv4: Run, small_data: Path) -> None:
    words = [*SMALL_RUN, "model.vocab_size=512", f"data={small_data}", "steps=2"]
    number = submit(openv4, *words, "output=job", *ONE)
    assert slurm.ended(number, seconds=240).state == "COMPLETED", output(here / "job")
    assert console("train", *words, "output=alone") == 0
    assert rows(here / "job") == rows(here / "alone")


@pytest.mark.slow
@several
@pytest.mark.parametrize("tasks", ["rank", "node"])
def test_two_tasks_train_and_come_back(tasks: str, slurm: Slurm, here: Path, openv4: Run, small_data: Path) -> None:
    """Requeued on the way, a run of two processes ends as one that was not: the same rows, under the same W&B id."""
    words = [
        *SMALL_RUN,
        "model.vocab_size=512",
        f"data={small_data}",
        "logging.wandb=offline",
        "checkpoint.every=0",
        "steps=60",
    ]
    words += [*TWO, f"launch.tasks={tasks}"]
    whole = submit(openv4, *words, "output=whole")
    assert slurm.ended(whole, seconds=400).state == "COMPLETED", output(here / "whole")

    number = submit(openv4, *words, "output=job")
    run = here / "job"
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 2:
        assert time.monotonic() < deadline and slurm.job(number).state in ("PENDING", "RUNNING"), output(run)
        time.sleep(0.02)
    identity = (run / "wandb_run_id").read_text()
    slurm.command("scancel", "--batch", "--signal=USR1", number)
    job = slurm.ended(number, seconds=400)
    assert (job.state, job.restarts) == ("COMPLETED", 1), output(run)
    assert rows(run) == rows(here / "whole")
    assert (run / "wandb_run_id").read_text() == identity
    kinds = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert kinds.count("start") == 1 and kinds.count("resume") == 1
