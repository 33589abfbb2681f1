"""Training runs killed at random moments, resumed by the same command, and compared with one that was never killed.

    make soak KILLS=1000

Each run is the tiny one of `run_cases`: of one process, of two that share the experts, or of a number that changes
with the starts. Every start draws the manner (``MANNERS``) in which it saves and reads data. Most processes are forked
from this one, which has imported everything; a share of the runs consists of real `openv4 train` commands. SIGKILL
comes at a moment drawn from all the time that the run has left, or, three times of four, in a save or the step after
it.

After every kill, each published checkpoint must match its checksums and be byte for byte that of the same step of the
run without kills, `latest` must name a complete one, and the newest must not be older than before. At the end of a run
its checkpoints (weights, optimizer state, router biases, random state, position in the data), rows of metrics, expert
loads and summary must be those of the run without kills.

Samples: a forked process notes what its loader gives to each step, before the step begins. Every note must be what the
run without kills got for that step, and every step must have notes of all its processes. A step that is in the final
weights was done on the checkpoint before it by those who noted it last, and once. So what went into the weights is the
sequence of the run without kills, whose epochs are counted token by token. Real commands note nothing; there, equal
bits of weights and momenta, which every sample has moved, say the same. Where the number of processes changes, sums
are rounded otherwise: there samples, counters and the position in the data are compared, the other bits are not.
"""

import argparse
import fcntl
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from run_cases import OVERRIDES, contents, prepare_small_data, rows, summary, tiny_config

from openv4.data.loader import Batch, Loader
from openv4.data.shards import PreparedData
from openv4.launch.train import die_with_parent
from openv4.train.checkpoint import latest_checkpoint, verify
from openv4.train.config import CheckpointError, TrainConfig
from openv4.train.loop import train
from openv4.train.metrics import read_lines

FORK = multiprocessing.get_context("fork")
# The numbers of processes that the starts of a run may have; one process is the quickest.
KINDS = ((1,), (1,), (2,), (1, 2))
MANNERS = (
    ("checkpoint.every=1", "checkpoint.asynchronous=false", "data.workers=0"),
    ("checkpoint.every=1", "checkpoint.asynchronous=true", "data.workers=2"),
    ("checkpoint.every=2", "checkpoint.asynchronous=true", "data.workers=0"),
    ("checkpoint.every=3", "checkpoint.asynchronous=false", "data.workers=1"),
)
LIMIT = 300.0  # seconds after which a process counts as hanging
FAILURES = 10  # so many, and the soak ends

Rows = list[Any]  # of a step: of each row the pieces of documents in it


@dataclass
class Tally:
    kills: Counter[str] = field(default_factory=Counter)  # by what they hit
    victims: Counter[str] = field(default_factory=Counter)  # kills by kind of processes
    starts: int = 0
    runs: int = 0  # that came to their end and were compared
    checkpoints: int = 0  # looked at after kills
    unloadable: int = 0
    latest_wrong: int = 0  # it named no complete checkpoint, or the newest was older than before
    files_differing: int = 0
    rows_differing: int = 0
    samples: int = 0  # pieces of documents that went into steps
    samples_lost: int = 0
    samples_repeated: int = 0
    failed: int = 0  # starts that ended by neither a kill nor success
    recovery: dict[str, list[float]] = field(default_factory=dict)  # seconds from a start to its first step
    problems: list[str] = field(default_factory=list)

    def found(self, what: str, count: int, where: object) -> None:
        """Counts what must not be."""
        if count:
            setattr(self, what, getattr(self, what) + count)
            self.problems.append(f"{what} {count}: {where}")

    def result(self) -> dict[str, Any]:
        """As JSON."""
        times = {
            how: {"starts": len(seconds), "mean": mean(seconds), "longest": max(seconds)}
            for how, seconds in sorted(self.recovery.items())
        }
        return {**vars(self), "recovery": times}


def counters(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What a checkpoint counts, without the losses that the spike guard keeps; nothing of one that is not whole."""
    state: dict[str, Any] = {}
    with suppress(KeyError, ValueError):
        state = json.loads(files["state.json"])
    return {key: value for key, value in state.items() if key != "stability"}


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What a person reads of ``Tally.result``."""
    parts = [", ".join(f"{name}: {n:,}" for name, n in sorted(found[key].items())) for key in ("kills", "victims")]
    counts = {
        "starts": "starts",
        "runs": "runs that came to their end, compared",
        "checkpoints": "checkpoints looked at after kills",
        "unloadable": "unloadable checkpoints",
        "latest_wrong": "`latest` wrong, or a checkpoint gone",
        "files_differing": "files with other bits",
        "rows_differing": "rows of metrics that differ",
        "samples": "samples that went into steps",
        "samples_lost": "samples lost",
        "samples_repeated": "samples repeated",
        "failed": "starts that failed or hung",
    }
    return [
        ("kills", f"{sum(found['kills'].values()):,}"),
        ("by what they hit", parts[0]),
        ("by processes of the run", parts[1]),
        *((text, f"{found[key]:,}") for key, text in counts.items()),
        *(
            (f"start to first step, {how}", f"mean {s['mean']:.2f} s, longest {s['longest']:.2f} s, of {s['starts']:,}")
            for how, s in found["recovery"].items()
        ),
    ]


# Processes.


class Processes(Protocol):
    def codes(self) -> list[int | None]:
        """Exit codes, negative for signals; None: still running."""

    def kill(self, pauses: Sequence[float]) -> None:
        """SIGKILL, with a pause before each; returns when all are gone."""


class Forked:
    """Children of this process that train. Their notes of samples are for the steps from ``first`` + 1 on."""

    def __init__(self, count: int, config: TrainConfig, first: int, notes: str, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        jobs = [(rank, count, port, config, first, Path(f"{notes}-{rank}-{count}.jsonl"), log) for rank in range(count)]
        self._children = [FORK.Process(target=child, args=job, daemon=True) for job in jobs]
        for one in self._children:
            one.start()

    def codes(self) -> list[int | None]:
        return [one.exitcode for one in self._children]

    def kill(self, pauses: Sequence[float]) -> None:
        for one, pause in zip(self._children, pauses, strict=False):
            time.sleep(pause)
            one.kill()
        for one in self._children:
            one.join()


def child(rank: int, count: int, port: int, config: TrainConfig, first: int, notes: Path, log: Path) -> None:
    die_with_parent()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if count > 1:
        world = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"})
    note_samples(notes, first)
    try:
        train(config)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # as `openv4 train` ends one of several, `launch.cli._exit`


def note_samples(path: Path, first: int) -> None:
    file, step, plain = path.open("w", buffering=1), first, Loader.next_batch

    def next_batch(self: Loader, *arguments: Any, **options: Any) -> Batch:
        nonlocal step
        batch = plain(self, *arguments, **options)
        step += 1
        file.write(json.dumps({"step": step, "rows": batch.pieces}) + "\n")
        return batch

    Loader.next_batch = next_batch  # type: ignore[method-assign]


class Real:
    """``openv4 train``, and the processes that it starts."""

    def __init__(self, count: int, overrides: Sequence[str], log: Path) -> None:
        command = [str(Path(sys.executable).with_name("openv4")), "train", *OVERRIDES, *overrides]
        self._log = log.open("a")
        self._process = subprocess.Popen(
            [*command, f"parallel.nproc={count}"],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )

    def codes(self) -> list[int | None]:
        return [self._process.poll()]

    def kill(self, pauses: Sequence[float]) -> None:
        time.sleep(pauses[0])
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


def wait_until_free(run: Path) -> None:
    """A command's processes hold the lock of the run's folder until the last of them is gone."""
    if run.exists():
        with (run / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)


# A run.


@dataclass
class Reference:
    """A run without kills: its folder, with the checkpoints of all steps, and what each step got."""

    run: Path
    samples: list[Rows]


@dataclass
class Moment:
    """When to kill: so many seconds after the start, or after so many saves have begun."""

    seconds: float
    saves: int = 0


@dataclass
class Course:
    """What was seen of a start: seconds from it to each event."""

    first_step: float = 0.0  # 0: there was none
    saves: dict[str, list[float]] = field(default_factory=dict)  # begin and end, as far as seen
    end: float = 0.0
    steps: int = 0  # that it made, if it came to the run's end
    codes: list[int | None] = field(default_factory=list)


class Soak:
    """See the module's docstring.

    Args:
        scratch: a folder for the runs; those with differences stay.
        steps: of each run.
        kinds: the numbers of processes, see ``KINDS``.
        real: share of the runs that are real commands.
    """

    def __init__(
        self, scratch: Path, steps: int, seed: int, kinds: Sequence[tuple[int, ...]] = KINDS, real: float = 0.0
    ) -> None:
        self.scratch, self.steps, self.kinds, self.real = scratch, steps, kinds, real
        self.tally, self._rng = Tally(), random.Random(seed)
        prepare = FORK.Process(target=prepare_small_data, args=(scratch,))  # it starts threads, beside which none forks
        prepare.start()
        prepare.join()
        self.data = scratch / "prepared"
        self._courses: dict[tuple[int, bool], Course] = {}  # the last that was not killed
        self._references: dict[int, Reference] = {}
        for count in sorted({count for kind in kinds for count in kind}):
            folder = self._without_kills(count, real=False)
            self._references[count] = Reference(folder / "run", samples_of(folder / "notes", steps))
            if real:
                self._compare(self._without_kills(count, real=True), (count,))
        self._count_epochs()

    def go(self, kills: int, show: Callable[[Tally], None] = lambda tally: None) -> Tally:
        """Runs, until there were so many kills and the last of the runs has come to its end."""
        while self.tally.kills.total() < kills and self.tally.failed < FAILURES:
            folder, problems = self.scratch / f"run_{self.tally.runs + self.tally.failed}", len(self.tally.problems)
            self._run(folder, self._rng.choice(self.kinds), self._rng.random() < self.real, kills, show)
            if len(self.tally.problems) == problems:
                shutil.rmtree(folder)
        return self.tally

    def _run(self, folder: Path, kind: tuple[int, ...], real: bool, kills: int, show: Callable[[Tally], None]) -> None:
        """A run, from its first start to its end or to a start that fails."""
        (folder / "notes").mkdir(parents=True)
        name = f"{' or '.join(map(str, kind))} {'by command' if real else 'forked'}"
        number, newest, killed = 0, 0, True
        while killed:
            count = self._rng.choice(kind)
            moment = self._moment(newest, count, real) if self.tally.kills.total() < kills else None
            manner = (*self._rng.choice(MANNERS), "checkpoint.keep=2")
            course, hit = self._start(folder, number, count, real, newest, manner, moment)
            number += 1
            self.tally.starts += 1
            if course.first_step:
                how = f"{count} {'by command' if real else 'forked'}"
                self.tally.recovery.setdefault(how, []).append(course.first_step)
            if killed := bool(hit):
                self.tally.kills[hit] += 1
                self.tally.victims[name] += 1
                newest = self._inspect(folder / "run", kind, newest)
            show(self.tally)
        self._learn(count, real, course, self.steps - newest)
        if any(course.codes):
            said = (folder / f"log_{number - 1}").read_text().strip().splitlines()[-1:]
            self.tally.found("failed", 1, f"{folder}, start {number}: exit codes {course.codes}, {said}")
            return
        self.tally.runs += 1
        self._compare(folder, kind)
        if not real:
            self._compare_samples(folder / "notes")

    def _learn(self, count: int, real: bool, course: Course, steps: int) -> None:
        """How long things take just now, on a machine that may have other work; of a start that was not killed."""
        if course.first_step and course.saves:
            course.steps = steps
            self._courses[count, real] = course

    def _moment(self, newest: int, count: int, real: bool) -> Moment:
        course = self._courses[count, real]
        lasted = sorted(end - begin for begin, end in course.saves.values())
        step = (course.end - course.first_step) / course.steps
        where = self._rng.randrange(4)
        if where == 0:
            return Moment(self._rng.uniform(0, course.first_step + step * (self.steps - newest)))
        return Moment(
            self._rng.uniform(0, step if where == 1 else 2 * lasted[len(lasted) // 2]), self._rng.randint(1, 3)
        )

    def _start(
        self,
        folder: Path,
        number: int,
        count: int,
        real: bool,
        newest: int,
        manner: Sequence[str],
        moment: Moment | None,
    ) -> tuple[Course, str]:
        """One start of a run whose newest checkpoint is ``newest``. The text is what the kill hit, if there was one."""
        run, log = folder / "run", folder / f"log_{number}"
        metrics, checkpoints = run / "metrics.jsonl", run / "checkpoints"
        overrides = [f"steps={self.steps}", f"parallel.expert={count}", *manner]
        course, begun = Course(), time.monotonic()
        before = seen = identity(metrics)
        processes: Processes
        if real:
            processes = Real(count, [*overrides, f"data={self.data}", f"output={run}"], log)
        else:
            config = replace(composed(self.data, *overrides), output=str(run))
            processes = Forked(count, config, newest, str(folder / "notes" / f"{number}"), log)
        kill_at = moment.seconds if moment and not moment.saves else LIMIT
        try:
            while None in (codes := processes.codes()) and not any(codes):
                course.end = now = time.monotonic() - begun
                if now >= kill_at:
                    break
                if not course.first_step and identity(metrics) != seen:
                    seen = identity(metrics)
                    course.first_step = now if began(metrics, before, newest) else 0.0
                for name in os.listdir(checkpoints) if checkpoints.exists() else ():  # noqa: PTH208 (many times a save)
                    if name.endswith("-writing"):
                        course.saves.setdefault(name, [now, now])[1] = now
                if moment and kill_at == LIMIT and 0 < moment.saves <= len(course.saves):
                    kill_at = now + moment.seconds
                time.sleep(0.002 if real else 0.001)
        finally:
            processes.kill([0.0, self._rng.uniform(0, 0.02)])
            wait_until_free(run)
        course.codes = codes if any(codes) else processes.codes()
        if any(codes) or kill_at == LIMIT or -signal.SIGKILL not in course.codes:
            return course, ""
        if (checkpoints / f"step_{self.steps}").exists():
            return course, "after the last step"
        if not began(metrics, before, newest):
            return course, "starting"
        return course, "saving" if any(checkpoints.glob(".*")) else "training"

    def _without_kills(self, count: int, real: bool) -> Path:
        folder = self.scratch / f"whole_{count}_{'command' if real else 'forked'}"
        (folder / "notes").mkdir(parents=True)
        course, _ = self._start(folder, 0, count, real, 0, (*MANNERS[0], f"checkpoint.keep={self.steps}"), None)
        assert not any(course.codes), f"the run without kills failed: {(folder / 'log_0').read_text()}"
        self._learn(count, real, course, self.steps)
        return folder

    # What must hold.

    def _inspect(self, run: Path, kind: tuple[int, ...], before: int) -> int:
        """After a kill; ``before`` is the step of the newest checkpoint that there was. Returns what it is now."""
        checkpoints = run / "checkpoints"
        for folder in checkpoints.glob("step_*"):
            self.tally.checkpoints += 1
            try:
                verify(folder)
            except CheckpointError as error:
                self.tally.found("unloadable", 1, error)
            self.tally.found("files_differing", len(self._other_bits(folder, kind)), folder)
        pointer = checkpoints / "latest"
        if pointer.exists() and not (checkpoints / pointer.read_text().strip() / "manifest.json").exists():
            self.tally.found("latest_wrong", 1, f"{pointer} names {pointer.read_text()!r}")
        newest = latest_checkpoint(checkpoints)
        step = int(newest.name.removeprefix("step_")) if newest else 0
        self.tally.found("latest_wrong", int(step < before), f"{checkpoints}: from step {before} back to {step}")
        return step

    def _other_bits(self, checkpoint: Path, kind: tuple[int, ...]) -> list[str]:
        """The files of a checkpoint that are not those of the run without kills."""
        mine = contents(checkpoint)
        wanted = contents(self._references[kind[0]].run / "checkpoints" / checkpoint.name)
        if len(kind) > 1:  # sums in another order, hence other last bits; not of the counters and the data's position
            return ["state.json"] if counters(mine) != counters(wanted) else []
        return [name for name in mine.keys() | wanted.keys() if mine.get(name) != wanted.get(name)]

    def _compare(self, folder: Path, kind: tuple[int, ...]) -> None:
        """A run that has come to its end with that without kills."""
        run, reference = folder / "run", self._references[kind[0]].run
        for checkpoint in run.glob("checkpoints/step_*"):
            self.tally.found("files_differing", len(self._other_bits(checkpoint, kind)), checkpoint)
        names = {path.name for path in run.glob("checkpoints/*") if not path.name.startswith("step_")}
        last = (run / "checkpoints" / "latest").read_text().strip()
        odd = int(names != {"latest"}) + int(last != f"step_{self.steps}")
        self.tally.found("latest_wrong", odd, f"{folder}: {sorted(names)}, {last}")
        mine, wanted = rows(run), rows(reference)
        if len(kind) > 1:
            mine, wanted = ([counted(row) for row in found] for found in (mine, wanted))
        else:
            mine += [*read_lines(run / "expert_load.jsonl"), summary(run)]
            wanted += [*read_lines(reference / "expert_load.jsonl"), summary(reference)]
        differing = sum(a != b for a, b in zip(mine, wanted, strict=False)) + abs(len(mine) - len(wanted))
        self.tally.found("rows_differing", differing, folder)

    def _compare_samples(self, notes: Path) -> None:
        """Every note of a run, and that there is one for each step."""
        whole = next(iter(self._references.values())).samples
        found = read_notes(notes)
        for number, step, count, rank, given in found:
            # A faulty run may go beyond the last step, where nothing is to be read.
            right = whole[step - 1][rank::count] if step <= len(whole) else []
            mine, wanted = pieces(given), pieces(right)
            self.tally.samples += mine.total()
            self.tally.found("samples_lost", (wanted - mine).total(), f"{notes}: start {number}, step {step}")
            self.tally.found("samples_repeated", (mine - wanted).total(), f"{notes}: start {number}, step {step}")
            odd = int(mine == wanted and given != right)
            self.tally.found("samples_lost", odd, f"{notes}: start {number}, step {step}: another order")
        for step in range(1, self.steps + 1):
            noted = Counter((number, count) for number, at, count, _, _ in found if at == step)
            if not any(ranks == count for (_, count), ranks in noted.items()):
                self.tally.found("samples_lost", pieces(whole[step - 1]).total(), f"{notes}: no step {step}")

    def _count_epochs(self) -> None:
        """The runs without kills get the same, and every token once in each epoch that they complete."""
        whole = next(iter(self._references.values())).samples
        odd = sum(reference.samples != whole for reference in self._references.values())
        self.tally.found("samples_lost", odd, "runs without kills, of different numbers of processes")
        store = PreparedData(self.data).split("train")
        starts = np.concatenate(([0], np.cumsum(store.length(np.arange(store.documents)))))
        every = [piece for step in whole for piece in pieces(step).elements()]
        epochs = max(epoch for _, epoch, *_ in every)
        seen = np.zeros((epochs, store.tokens), dtype=np.int64)
        for _, epoch, document, start, length in every:
            if epoch < epochs:
                seen[epoch, starts[document] + start : starts[document] + start + length] += 1
        assert epochs >= 2, f"{self.steps} steps are fewer than two epochs; set more"
        self.tally.found("samples_lost", int((seen == 0).sum()), "tokens of an epoch, without kills")
        self.tally.found("samples_repeated", int((seen > 1).sum()), "tokens of an epoch, without kills")


@cache
def composed(data: Path, *overrides: str) -> TrainConfig:
    """A config, but for its output: to compose one takes longer than to start a process."""
    return tiny_config(data, Path("nowhere"), *overrides)


def identity(file: Path) -> tuple[int, int]:
    """Inode and size, which tell a file from what it was before; zeros: there is none."""
    status = file.stat() if file.exists() else None
    return (status.st_ino, status.st_size) if status else (0, 0)


def began(metrics: Path, before: tuple[int, int], step: int) -> bool:
    """Whether a start that resumed at ``step``, with the file as it was ``before``, has logged a step of its own: it
    first replaces the file, without the rows that it will write again."""
    return identity(metrics)[0] != before[0] and any(row["step"] > step for row in read_lines(metrics))


def counted(row: dict[str, Any]) -> dict[str, Any]:
    """Of a row, what does not depend on rounding."""
    return {key: value for key, value in row.items() if key.startswith(("step", "tokens", "data/"))}


def read_notes(folder: Path) -> list[tuple[int, int, int, int, Rows]]:
    """Number of the start, step, number of processes, rank and rows of each note."""
    found = []
    for path in folder.iterdir():
        number, rank, count = map(int, path.stem.split("-"))
        found += [(number, note["step"], count, rank, note["rows"]) for note in read_lines(path)]
    return found


def samples_of(notes: Path, steps: int) -> list[Rows]:
    """The rows of each step of a run that was started once."""
    whole: list[Rows] = [[] for _ in range(steps)]
    by_rank = {(step, rank): given for _, step, _, rank, given in read_notes(notes)}
    count = 1 + max(rank for _, rank in by_rank)
    for step in range(1, steps + 1):
        dealt = [by_rank[step, rank] for rank in range(count)]
        whole[step - 1] = [dealt[row % count][row // count] for row in range(sum(map(len, dealt)))]
    return whole


def pieces(given: Rows) -> Counter[tuple[int, ...]]:
    return Counter(tuple(piece) for row in given for piece in row)


# The program.


def warm_up() -> None:
    """What every child would do again otherwise."""
    import deepspeed  # noqa: F401
    import matplotlib.pyplot  # noqa: F401

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # imports much


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="kills runs at random moments; see the file's head")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--real", type=float, default=0.03, help="share of the runs that are `openv4 train` commands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of soak.json and soak.md")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    warm_up()
    console, begun = Console(), time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(scratch, options.steps, options.seed, real=options.real)
    with Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
        printed = begun

        def show(tally: Tally) -> None:
            nonlocal printed
            if console.is_terminal:
                live.update(as_table(tally), refresh=True)
            elif time.monotonic() > printed + 60:
                printed = time.monotonic()
                print(f"{tally.kills.total():,} of {options.kills:,} kills, {len(tally.problems)} problems", flush=True)

        with suppress(KeyboardInterrupt):  # what was found until then is worth a report
            soak.go(options.kills, show)
        tally = soak.tally
        live.update(as_table(tally))
    options.output.mkdir(parents=True, exist_ok=True)
    machine = f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, torch {torch.__version__}"
    asked = {key: getattr(options, key) for key in ("kills", "steps", "real", "seed")}
    found = {"asked": asked, "machine": machine, "seconds": time.monotonic() - begun, **tally.result()}
    (options.output / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.output / "soak.md").write_text(report(found))
    for problem in tally.problems[:20]:
        print(problem)
    if tally.problems:
        print(f"the runs that differ are in {scratch}")
    else:
        shutil.rmtree(scratch)
    return int(bool(tally.problems))


def as_table(tally: Tally) -> Table:
    table = Table(show_header=False)
    for line in lines(tally.result()):
        table.add_row(*line)
    return table


def report(found: dict[str, Any]) -> str:
    table = "\n".join(f"| {name} | {value} |" for name, value in lines(found))
    asked = " ".join(f"--{key} {value}" for key, value in found["asked"].items())
    kills = sum(found["kills"].values())
    early = "" if kills >= found["asked"]["kills"] else f" It was stopped after {kills:,} kills."
    return f"""# Soak: killed at random moments, and resumed

Written by `make soak` (`tests/soak.py {asked}`) in {found["seconds"] / 60:.0f} minutes, beside other work,
on {found["machine"]}; all numbers are in `soak.json`.{early} What is compared, and why it
shows that every sample went into the weights once, stands at the head of the program. Processes: 1, 2 that share the
experts, or "1 or 2" anew at each start; forked from a process that has imported everything, or started by command.

| | |
|---|---|
{table}
"""


if __name__ == "__main__":
    sys.exit(main())
