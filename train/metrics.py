"""What a run writes of itself, without torch: the files of its folder, the terminal, the loss plot.

metrics.jsonl      a row per logged step; every name belongs to one of ``GROUPS``
expert_load.jsonl  the load of every expert, at steps so far apart that the file stays small
events.jsonl       what happened: start, resume, stages, checkpoints, skipped steps, the end

A run that was interrupted and resumed leaves the same metrics and loads as one that was not, but for what ``varies``.
"""

import errno
import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from .config import Preempted
from .secret import redacted

GROUPS = ("train", "validation", "data", "moe", "attn", "mhc", "optim", "precision", "stability", "system")

Row = dict[str, float | int]


def varies(key: str) -> bool:
    """Whether a metric tells of time or memory, which differ between two runs of the same training."""
    return key.startswith("system/") or key in ("train/tokens_per_second", "train/mfu")


def is_detail(key: str) -> bool:
    """Whether a statistic is that of one block: ``moe/activation_max/layers.3``."""
    return key.count("/") > 1


class MetricsFile:
    """``metrics.jsonl``: one JSON object a logged step. Rows after ``step`` are from a run that was cut off there
    before its next checkpoint; they are dropped, and written again as the run repeats those steps.

    Attributes:
        reached: the step of the last row that was found, dropped or not; 0 for a new file.
    """

    def __init__(self, path: Path, step: int) -> None:
        found = read_metrics(path)
        self.reached = int(found[-1]["step"]) if found else 0
        _rewrite(path, [finite(row) for row in found if row["step"] <= step])
        self._lines = Lines(path)

    def write(self, row: Row) -> None:
        self._lines.append(finite(row))


_LOAD_ROWS = 200
_LOAD_BYTES = 4_000_000


class ExpertLoadFile:
    """``expert_load.jsonl``: of every block, each expert's share of the tokens over the mean share (1 = even).

    Of every stretch of steps of equal length the first logged one has a row; the stretch is a power of two, doubled as
    the run gets longer, so that no run exceeds ``_LOAD_ROWS`` rows or about ``_LOAD_BYTES``, however large its model.
    That a row stays depends on nothing but the steps, hence not on interruptions. Rows after ``step`` are dropped, as
    in ``MetricsFile``.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path, self._stretch = path, 0
        kept = [row for row in read_lines(path) if row["step"] <= step]
        _rewrite(path, kept)
        self._lines = Lines(path)
        self._last = int(kept[-1]["step"]) if kept else -1

    def write(self, step: int, load: Mapping[str, Sequence[float]]) -> None:
        """``load``: by block, relative to its mean."""
        limit = max(20, min(_LOAD_ROWS, _LOAD_BYTES // (6 * max(1, sum(map(len, load.values()))))))
        stretch = 1
        while step > stretch * limit:
            stretch *= 2
        if stretch != self._stretch:
            with suppress(OSError):  # with the next row, then; what has no space grows by that one alone
                rows = [next(rows) for _, rows in groupby(read_lines(self.path), lambda row: row["step"] // stretch)]
                _rewrite(self.path, rows)
                self._stretch = stretch
        if self._last < 0 or step // stretch > self._last // stretch:
            self._lines.append({"step": step, "load": {name: [round(x, 2) for x in load[name]] for name in load}})
            self._last = step


class Stepping(Protocol):
    step: int


class EventLog:
    """``events.jsonl``: one JSON object an event, with ``time`` (UTC), ``step``, ``kind`` and ``text``. It is never
    shortened: what was repeated after an interruption stands there twice."""

    def __init__(self, path: Path) -> None:
        self.path, self._lines = path, Lines(path)
        end_last_line(path)

    def write(self, step: int, kind: str, text: str) -> None:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        self._lines.append({"time": time, "step": step, "kind": kind, "text": text})

    @contextmanager
    def closing(self, state: Stepping) -> Iterator[None]:
        """Tells what ended the block, if it was an exception."""
        try:
            yield
        except Preempted:  # has its own event
            raise
        except BaseException as error:
            kind = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            reason = redacted(" ".join(str(error).split()))[:200]
            self.write(state.step, kind, f"{type(error).__name__}{reason and ': '}{reason}")
            raise


def end_last_line(path: Path) -> None:
    """Where a process was killed in the middle of a line, the next one shall begin a line of its own."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:
            file.write("\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; what was cut off mid-write is left out."""
    return list(_objects(path.read_text(errors="replace"))) if path.exists() else []


def _objects(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def read_metrics(path: Path) -> list[Row]:
    """The rows of a ``metrics.jsonl``, null as NaN; a last line that was cut off mid-write is left out."""
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in read_lines(path)]


def finite(row: Mapping[str, float | int | None]) -> dict[str, float | int | None]:
    """The row as JSON can hold it, which knows no NaN and no infinity: null in their place."""
    return {key: value if value is not None and math.isfinite(value) else None for key, value in row.items()}


class Lines:
    """Appends to a file of JSON lines, from any thread. A line that cannot be written stops nobody: it is kept, and
    written before the next one for which the disk has room again, or is there again."""

    MOST = 100_000  # lines kept: some 200 MB

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._waiting: deque[str] = deque(maxlen=self.MOST)

    def append(self, row: Mapping[str, Any]) -> None:
        with self._lock:
            failed = len(self._waiting)
            self._waiting.append(json.dumps(row) + "\n")
            try:
                self._write("".join(self._waiting))
            except OSError as error:
                if not failed:
                    reason = f"cannot write ({error}); training goes on, lines are kept until they can be written"
                    print(f"{self._path}: {reason}", file=sys.stderr, flush=True)
                return
            if failed:
                print(f"{self._path}: {failed:,} lines that had waited are written", file=sys.stderr, flush=True)
            self._waiting.clear()

    def _write(self, text: str) -> None:
        """All of it or nothing."""
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size, data = os.fstat(file).st_size, text.encode()
            if os.write(file, data) < len(data):
                os.ftruncate(file, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)


def _rewrite(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.rename(path)


class Terminal:
    """A progress bar where there is a terminal, otherwise a line every few seconds."""

    def __init__(self, total_steps: int, done: int) -> None:
        self.console = Console(highlight=False, markup=False, soft_wrap=True)  # brackets in a path are brackets
        if not self.console.is_terminal:
            self.console.width = 120  # a log file has no width of its own
        self._total, self._printed = total_steps, 0.0
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("", total=total_steps, completed=done)
        self._started, self._first = time.monotonic(), done

    def __enter__(self) -> "Terminal":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, row: Row) -> None:
        """One logged step."""
        text = f"loss {row['train/loss']:.4f}  {row['train/tokens_per_second']:,.0f} tokens/s"
        if "attn/indexer_kl" in row:
            text += f"  indexer KL {row['attn/indexer_kl']:.3f} of {row['attn/indexer_kl_uniform']:.3f}"
            text += f", recall {row['attn/indexer_recall']:.2f}" if "attn/indexer_recall" in row else ""
        if "validation/bits_per_byte" in row:
            text += f"  validation {row['validation/bits_per_byte']:.3f} bits per byte"
        self._bar.update(self._task, completed=int(row["step"]), description=text)
        now = time.monotonic()
        notable = row["step"] == self._total or "validation/loss" in row
        if not self.console.is_terminal and (notable or now - self._printed > 5):
            per_step = (now - self._started) / max(int(row["step"]) - self._first, 1)
            left = time.strftime("%H:%M:%S", time.gmtime((self._total - int(row["step"])) * per_step))
            self.console.print(f"step {row['step']}/{self._total}  {text}  ETA {left}")
            self._printed = now


def summarize_rows(rows: Sequence[Row]) -> Row:
    """A whole run in a few numbers: the last loss, medians of the speeds, time, memory."""
    if not rows:
        return {}
    summary: Row = {"train/loss": rows[-1]["train/loss"]}
    for key in ("train/tokens_per_second", "train/mfu"):
        if found := [row[key] for row in rows if key in row]:
            summary[key] = median(found)
    steps = zip(rows, [0, *(row["tokens"] for row in rows)], strict=False)
    summary["system/train_seconds"] = sum(
        (row["tokens"] - before) / row["train/tokens_per_second"] for row, before in steps
    )
    for key in ("system/peak_memory_gb", "system/peak_gpu_memory_gb"):
        if found := [row[key] for row in rows if key in row]:
            summary[key] = max(found)
    return summary


def summary_table(summary: Mapping[str, Any]) -> Table:
    """``summary.json`` to print at the end of a run."""
    table = Table("run", "", show_header=False, title="summary")
    for label, key, form in _SUMMARY:
        if (value := summary.get(key)) is not None:
            table.add_row(label, form.format(value))
    if summary.get("system/train_seconds") is not None:
        table.add_row("training time", duration(summary["system/train_seconds"]))
    if summary.get("git"):
        table.add_row("code", f"{summary['git'][:12]}{', changed since' if summary['git_dirty'] else ''}")
    return table


_SUMMARY = (
    ("parameters", "parameters", "{:,}"),
    ("steps", "step", "{:,}"),
    ("tokens", "tokens", "{:,}"),
    ("skipped steps", "skipped", "{:,}"),
    ("last training loss", "train/loss", "{:.4f}"),
    ("final validation loss", "validation/loss", "{:.4f}"),
    ("best validation, in training", "validation/best_loss", "{:.4f}"),
    ("tokens/s, median", "train/tokens_per_second", "{:,.0f}"),
    ("MFU, median", "train/mfu", "{:.1%}"),
    ("peak memory", "system/peak_memory_gb", "{:.1f} GB"),
    ("peak GPU memory", "system/peak_gpu_memory_gb", "{:.1f} GB"),
)


def duration(seconds: float) -> str:
    """``1d 02:03:04``."""
    days, rest = divmod(round(seconds), 86400)
    return (f"{days}d " if days else "") + f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"


def plot_loss(run: Path) -> Path:
    """Draws ``plots/loss.png`` from ``metrics.jsonl``: training loss, validation loss, learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(run / "metrics.jsonl")
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    tokens = [row["tokens"] for row in rows]
    axis.plot(tokens, [row["train/loss"] for row in rows], linewidth=0.8, label="training loss", color="tab:blue")
    validated = [row for row in rows if "validation/loss" in row]
    points = [(row["tokens"], row["validation/loss"]) for row in validated]
    if rows and "validation/untrained_loss" in rows[0]:
        points.insert(0, (0, rows[0]["validation/untrained_loss"]))
    if points:
        axis.plot(*zip(*points, strict=True), "o-", label="validation loss", color="tab:orange")
    axis.set(xlabel="tokens", ylabel="loss (nats per token)", title=run.name)
    axis.grid(alpha=0.3)
    rate = axis.twinx()
    rate.plot(tokens, [row["train/lr"] for row in rows], linewidth=0.8, color="tab:gray", alpha=0.7)
    rate.set_ylabel("learning rate", color="tab:gray")
    axis.legend()
    path = run / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
