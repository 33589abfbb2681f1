"""A run's folder as data for reports, read again and again while the run goes on. Without torch."""

import json
import math
import os
from array import array
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from ..model.accounting import count_parameters
from ..model.config import ModelConfig, ModelConfigError
from .config import ConfigError, TrainConfig, from_yaml, leaves, refuse_bombs
from .metrics import duration, read_lines

Column = NDArray[np.float64]


@dataclass(frozen=True)
class Record:
    """What a run's folder says at one moment.

    Attributes:
        name: the folder's, or as much of its path as tells it from the other runs of a report.
        columns: by metric, a number per logged step; NaN where a row has none, and where a number is not finite.
        loads: rows of ``expert_load.jsonl``.
        written: when ``metrics.jsonl`` last grew, seconds since the epoch.
    """

    folder: Path
    name: str
    columns: dict[str, Column]
    loads: list[dict[str, Any]]
    events: list[dict[str, Any]]
    config_text: str
    environment: dict[str, Any]
    summary: dict[str, Any]
    written: float

    @property
    def steps(self) -> Column:
        return self.columns.get("step", np.empty(0))

    @property
    def tokens(self) -> Column:
        return self.columns.get("tokens", np.empty(0))

    def column(self, key: str) -> Column:
        absent: Column = np.full(len(self.steps), math.nan)
        return self.columns.get(key, absent)

    def last(self, key: str) -> float | None:
        """The last finite value of a metric."""
        values = self.column(key)
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else None

    def median(self, key: str) -> float | None:
        values = self.column(key)
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else None

    @property
    def train_seconds(self) -> float:
        """Time in training steps: validation, checkpoints and pauses between processes do not count."""
        speed = self.column("train/tokens_per_second")
        return float(np.nansum(np.diff(self.tokens, prepend=0.0) / np.where(speed > 0, speed, math.nan)))

    def tokens_at(self, steps: Column) -> Column:
        """Tokens seen after steps that need not have a row, interpolated."""
        if not len(self.steps):
            return np.zeros_like(steps)
        tokens: Column = np.interp(steps, np.append(0.0, self.steps), np.append(0.0, self.tokens))
        return tokens

    @cached_property
    def config(self) -> dict[str, Any]:
        try:
            refuse_bombs(self.config_text)
            values = OmegaConf.to_container(OmegaConf.create(self.config_text), resolve=False)
        except (OmegaConfBaseException, YAMLError, RecursionError):
            return {}
        return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}

    @cached_property
    def model(self) -> ModelConfig | None:
        """None for a config that this version does not read."""
        try:
            return from_yaml(TrainConfig, self.config_text).model
        except (ConfigError, ModelConfigError, TypeError):
            return None

    @property
    def parameters(self) -> int | None:
        return None if self.model is None else count_parameters(self.model).total

    @property
    def stages(self) -> list[tuple[str, float, float]]:
        """Name, tokens before, and tokens after each stage that was trained in, as far as rows tell."""
        stage, tokens = self.column("train/stage"), np.append(0.0, self.tokens)
        cuts = [0, *(np.flatnonzero(np.diff(stage)) + 1).tolist(), len(stage)] if len(stage) else []
        given = self.config.get("stages")
        names = [str(s.get("name")) if isinstance(s, dict) else "" for s in given] if isinstance(given, list) else []
        return [
            (names[int(stage[a])] if 0 <= stage[a] < len(names) else "", float(tokens[a]), float(tokens[b]))
            for a, b in pairwise(cuts)
        ]

    def state(self, now: float) -> tuple[str, str]:
        """complete, interrupted, failed, running or silent, and a text that says more."""
        kinds = [str(event.get("kind")) for event in self.events]
        kind = kinds[-1] if kinds else ""
        if kind in ("interrupted", "failed"):
            return kind, str(self.events[-1].get("text"))
        done = self.summary.get("step")
        if isinstance(done, int) and done >= max(self.steps, default=0) and kind not in ("start", "resume", "stage"):
            return "complete", f"{done:,} steps"
        age = max(0.0, now - self.written)
        between = float(np.median(np.diff(self.steps, prepend=0.0))) if len(self.steps) else 0.0  # steps between rows
        if age < max(60.0, 10 * between * (self.median("system/step_seconds") or 0.0)):
            return "running", f"last row {age:.0f} s ago"
        return "silent", f"no row for {duration(age)}"


class RunReader:
    """Reads a run's folder; of a ``metrics.jsonl`` that has grown, only what is new.

    Raises:
        ConfigError: the folder is no run's.
    """

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        self.folder = Path(folder)
        self.name = name or self.folder.resolve().name
        self._metrics = self.folder / "metrics.jsonl"
        if not self._metrics.is_file():
            what = "holds no metrics.jsonl" if self.folder.is_dir() else "no such folder"
            raise ConfigError(f"{self.folder}: {what}; name the folder of a run of openv4 train, such as runs/smoke")
        self._inode, self._offset, self._rows = 0, 0, 0
        self._columns: dict[str, array[float]] = {}

    def read(self) -> Record:
        written = self._grow()
        text = self.folder / "config.yaml"
        return Record(
            self.folder,
            self.name,
            {key: np.array(column) for key, column in self._columns.items()},
            [row for row in read_lines(self.folder / "expert_load.jsonl") if row.get("load")],
            read_lines(self.folder / "events.jsonl"),
            text.read_text(errors="replace") if text.is_file() else "",
            _json(self.folder / "env.json"),
            _json(self.folder / "summary.json"),
            written,
        )

    def _grow(self) -> float:
        with self._metrics.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:  # a resume wrote it anew
                self._inode, self._offset, self._rows, self._columns = status.st_ino, 0, 0, {}
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # half of a row: the rest comes with the next look
                    break
                self._offset += len(line)
                self._add(line)
        return status.st_mtime

    def _add(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not isinstance(row, dict) or not {"step", "tokens"} <= row.keys():
            return
        for key, value in row.items():
            if key not in self._columns:
                self._columns[key] = array("d", [math.nan]) * self._rows
            number = isinstance(value, int | float) and math.isfinite(value)
            self._columns[key].append(value if number else math.nan)
        self._rows += 1
        for column in self._columns.values():
            if len(column) < self._rows:
                column.append(math.nan)


def open_runs(folders: tuple[str, ...]) -> list[RunReader]:
    """Readers whose names differ: the folder's own, or where two share one, the path as it was given.

    Raises:
        ConfigError: no folder, or one that is no run's.
    """
    if not folders:
        raise ConfigError("runs is empty: name the folder of a run, as in openv4 report runs/smoke")
    readers = [RunReader(folder) for folder in dict.fromkeys(folders)]
    names = [reader.name for reader in readers]
    for reader in readers:
        if names.count(reader.name) > 1:
            reader.name = str(reader.folder)
    return readers


def differences(records: list[Record]) -> list[tuple[str, list[Any]]]:
    """Keys of the configs whose values are not the same in all runs, but for names and places."""
    configs = [dict(leaves(record.config)) for record in records]
    keys = dict.fromkeys(key for config in configs for key in config)
    table = [(key, [config.get(key) for config in configs]) for key in keys if key not in ("name", "output")]
    return [(key, values) for key, values in table if any(value != values[0] for value in values)]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
