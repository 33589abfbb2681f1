"""What a run tells: rows of ``metrics.jsonl``, the terminal, W&B, and the loss plot."""

import json
import math
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..model.tensor_files import write_json
from ..optim.groups import Optimizers

Row = dict[str, float | int]

# Dense bfloat16 tensor-core rates of the makers' data sheets, TFLOP/s.
_PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0, "4090": 165.0}


class MetricsFile:
    """``metrics.jsonl``: one JSON object a logged step. Rows after ``step`` are from a run that was cut off there
    before its next checkpoint; they are dropped, and written again as the run repeats those steps."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(finite(row)) + "\n" for row in kept))
        temporary.rename(path)

    def write(self, row: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(finite(row)) + "\n")


def read_metrics(path: Path) -> list[Row]:
    """The rows of a ``metrics.jsonl``, null as NaN; a last line that was cut off mid-write is left out."""
    rows: list[Row] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


def finite(row: Mapping[str, float | int | None]) -> dict[str, float | int | None]:
    """The row as JSON can hold it, which knows no NaN and no infinity: null in their place."""
    return {key: value if value is not None and math.isfinite(value) else None for key, value in row.items()}


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
        if "indexer/kl" in row:
            text += f"  indexer KL {row['indexer/kl']:.3f} of {row['indexer/kl_uniform']:.3f}"
            text += f", recall {row['indexer/recall']:.2f}" if "indexer/recall" in row else ""
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


class WandbLog:
    """Weights & Biases, the same run on every resume. What fails there is reported once and never stops training."""

    def __init__(self, mode: str, project: str, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._run: Any = None
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        if mode == "disabled":
            return
        with self._guarded():
            import wandb

            id_file = folder / "wandb_run_id"
            if not id_file.exists():
                id_file.write_text(secrets.token_hex(4))
            self._run = wandb.init(
                mode=mode,  # type: ignore[arg-type]
                project=project,
                name=name,
                id=id_file.read_text().strip(),
                resume="allow" if mode == "online" else None,
                dir=folder,
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off", init_timeout=60),
            )

    def write(self, row: Row) -> None:
        if self._run is not None:
            with self._guarded():
                self._run.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))

    def image(self, key: str, path: Path) -> None:
        if self._run is not None:
            with self._guarded():
                import wandb

                self._run.log({key: wandb.Image(str(path))})

    def finish(self) -> None:
        if self._run is not None:
            with self._guarded():
                self._run.finish()

    def _guarded(self) -> "_Guard":
        return _Guard(self)

    def disable(self, error: BaseException) -> None:
        self._run = None
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"W&B stopped ({reason}); training goes on without it", file=sys.stderr)


class _Guard:
    def __init__(self, log: WandbLog) -> None:
        self._log = log

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Exception):  # the one place where anything is caught: a monitor must not stop its subject
            self._log.disable(error)
            return True
        return False


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


def group_table(optimizers: Optimizers) -> Table:
    """Which parameters go to which optimizer, to print at start."""
    table = Table("group", "optimizer", "tensors", "matrices", "parameters", "shapes", title="parameter groups")
    for row in optimizers.table():
        shapes = ", ".join("x".join(map(str, shape)) for shape in row.shapes[:3]) + (
            " ..." if len(row.shapes) > 3 else ""
        )
        table.add_row(
            row.group, row.optimizer, str(row.tensors), str(row.matrices or "-"), f"{row.parameters:,}", shapes
        )
    return table


def peak_flops(device: torch.device) -> float | None:
    """Peak rate of the device in FLOP/s: from the data sheet of a known GPU, measured on a CPU, else None."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak * 1e12 for key, peak in _PEAK_TFLOPS.items() if key in name), None)
    size = 1024
    matrix = torch.ones(size, size)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def write_environment(path: Path) -> None:
    """``env.json``: what the run ran on and with."""
    root = Path(__file__).parents[1]
    git = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    packages = ("openv4", "torch", "numpy", "safetensors", "tokenizers", "hydra-core", "wandb", "deepspeed")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    values = {
        "git": git.stdout.strip() or None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    write_json(path, values)
