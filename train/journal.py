"""What a run writes of itself while it trains: rows of metrics, expert loads, events, the terminal, W&B."""

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .checkpoint import TrainState
from .config import TrainConfig
from .environment import code_version
from .meter import StepReport, relative_load
from .metrics import EventLog, ExpertLoadFile, Lines, MetricsFile, Row, Terminal, finite, read_metrics
from .wandb_log import WandbLog


class Journal:
    """The files of a run's folder that grow, the terminal and W&B. Of many processes the first one alone writes;
    what the others tell their journals goes nowhere.

    Args:
        run: the folder; state: where the run stands, rows beyond which are dropped and written again.
        writes: whether this process is the first one.
        stack: closes what was opened.
    """

    def __init__(
        self, run: Path, config: TrainConfig, state: TrainState, total_steps: int, writes: bool, stack: ExitStack
    ) -> None:
        self._state, self._writes = state, writes
        self.repeated = 0  # logged steps that will be done again
        if not writes:
            return
        self._run = run
        self._open()
        self._events = EventLog(run / "events.jsonl")
        stack.enter_context(self._events.closing(state))
        self.repeated = max(0, self._metrics.reached - state.step)
        self._terminal = stack.enter_context(Terminal(total_steps, state.step))
        described = asdict(config) | {"code": code_version()}
        self._wandb = WandbLog(config.logging.wandb, config.logging.project, config.name, run, described)
        stack.callback(self._wandb.finish)

    def _open(self) -> None:
        self._metrics = MetricsFile(self._run / "metrics.jsonl", self._state.step)
        self._loads = ExpertLoadFile(self._run / "expert_load.jsonl", self._state.step)

    def go_back(self, kind: str, text: str) -> None:
        """The run stands at an earlier step now; the rows beyond it go to ``rolled_back.jsonl``."""
        if self._writes:
            rows = [row for row in read_metrics(self._run / "metrics.jsonl") if row["step"] > self._state.step]
            left = Lines(self._run / "rolled_back.jsonl")
            for row in rows:
                left.append(finite(row))
            self._open()
        self.warn(kind, text)

    def print(self, *objects: Any, **options: Any) -> None:
        """To the terminal."""
        if self._writes:
            self._terminal.console.print(*objects, **options)

    def event(self, kind: str, text: str) -> None:
        if self._writes:
            self._events.write(self._state.step, kind, text)

    def warn(self, kind: str, text: str) -> None:
        """An event that is to be seen at once."""
        if self._writes:
            print(f"{kind}: {text}", file=sys.stderr, flush=True)
            self.event(kind, text)

    def row(self, row: Row, report: StepReport) -> None:
        """The metrics of a logged step."""
        if self._writes:
            self._metrics.write(row)
            self._loads.write(self._state.step, relative_load(report.load))
            self._terminal.show(row)
            self._wandb.write(row)

    def conclude(self, summary: Mapping[str, Any], plot: Path) -> None:
        """The end of the run, for W&B."""
        if self._writes:
            self._wandb.conclude(summary, plot)
