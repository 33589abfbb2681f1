"""Spikes of the loss: how they are found, where a run goes back to, and what it does differently then (recipe 7).

A run that goes back is a run that was resumed: what it decided is written to ``rollbacks.jsonl`` first, then newer
checkpoints are set aside, then the newest that is left is loaded, and the decisions that it does not know yet are added
to what it knows. So a run that is killed anywhere on the way back arrives at the same place.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import complete_checkpoints, remove, step_of
from .config import DivergedError, StabilityConfig
from .metrics import end_last_line, read_lines

FILE = "rollbacks.jsonl"
_WAY_OUT = "lower the learning rate or look at the data"
# Least deviations that are taken for one standard deviation: a share of the loss, and of the gradient norm.
LOSS_FLOOR, NORM_FLOOR = 0.01, 0.1
# Share of `z` from which a step may be where a spike began, and a loss lends weight to its gradient norm.
SUSPECT = 0.5


def deviation(value: float, history: Sequence[float], floor: float) -> float:
    """How many robust standard deviations ``value`` lies above the level of ``history``, which may fall but not rise.

    The level is the lowest of the medians of its quarters: the last one's where the loss falls, an earlier one's where
    it creeps up. The standard deviation is that of steps from one value to the next, over the square root of 2, for a
    trend does not add to it: 1.4826 times their median size, and at least ``floor``.
    """
    values = np.asarray(history)
    level = min(float(np.median(quarter)) for quarter in np.array_split(values, 4))
    scale = 1.4826 * float(np.median(np.abs(np.diff(values)))) / math.sqrt(2)
    return (value - level) / max(scale, floor)


@dataclass(frozen=True)
class Spike:
    """What the guard has found: after ``step`` steps, begun with step ``onset`` (both counted from 1)."""

    step: int
    onset: int
    reason: str

    def __str__(self) -> str:
        since = f", begun at step {self.onset}" if self.onset < self.step else ""
        return f"step {self.step}: {self.reason}{since}"


@dataclass(frozen=True)
class Rollback:
    """A decision, as ``rollbacks.jsonl`` holds it.

    Attributes:
        step, onset, reason: of the spike.
        to: steps done at the checkpoint that the run goes back to.
        skip: None, or the first step (from 0) that gets other data, and the loader's position after the spike's.
        anticipate: None, or the steps (from 0, the last excluded) whose experts are chosen early.
    """

    step: int
    onset: int
    reason: str
    to: int
    skip: tuple[int, dict[str, Any]] | None
    anticipate: tuple[int, int] | None

    def __str__(self) -> str:
        text = f"to step {self.to}, from step {self.step}"
        if self.skip is not None:
            text += f"; the data go on after those of step {self.step}, from step {self.skip[0] + 1} on"
        if self.anticipate is not None:
            first, stop = self.anticipate
            text += f"; steps {first + 1} to {stop} with anticipatory routing"
        return text


class Guard:
    """Watches the loss of a run; every process has one, and all come to the same conclusions from the same numbers."""

    def __init__(self, config: StabilityConfig, run: Path) -> None:
        self.config, self._run = config, run
        self.load({}, [])

    def load(self, state: dict[str, Any], decided: Sequence[dict[str, Any]]) -> None:
        """Takes up what ``state_dict`` said, and what was decided since; ``decided`` are all rows of ``decisions``."""
        self._stage: int | None = state.get("stage")
        self._last = 0.0  # how far the last step was above the level
        # Of the last steps: loss, log of the gradient norm, and how far the step was above the level.
        self._history: list[tuple[float, float, float]] = [tuple(row) for row in state.get("history", [])]
        self._lost = state.get("lost", 0)  # steps in a row without a finite gradient
        self.rollbacks: int = state.get("rollbacks", 0)
        self.skips: list[tuple[int, dict[str, Any]]] = [tuple(skip) for skip in state.get("skips", [])]
        self._window: tuple[int, int] | None = tuple(state["window"]) if state.get("window") else None
        for row in decided[self.rollbacks :]:
            self._adopt(Rollback(**row))

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to decide as this one, as JSON."""
        return {
            "stage": self._stage,
            "history": [list(row) for row in self._history],
            "lost": self._lost,
            "rollbacks": self.rollbacks,
            "skips": [list(skip) for skip in self.skips],
            "window": self._window and list(self._window),
        }

    @property
    def anticipated(self) -> range:
        """The steps (from 0) whose experts are chosen by older parameters."""
        if self.config.anticipatory == "always":
            return range(2**62)
        return range(*(self._window or (0, 0)))

    def metrics(self, step: int) -> dict[str, float]:
        """For the row of the ``step``th step, which was the last one observed."""
        return {
            "stability/spike_score": self._last,
            "stability/rollbacks": self.rollbacks,
            "stability/anticipated": int(step - 1 in self.anticipated),
        }

    def observe(self, step: int, stage: int, loss: Tensor, norm: Tensor) -> Spike | None:
        """Looks at the step just done, the ``step``th; ``loss`` and gradient ``norm`` are 0-dim tensors. Waits for the
        device.

        Raises:
            DivergedError: too many steps in a row were lost, and nothing is to be done about it.
        """
        config = self.config
        if config.on_spike == "ignore":
            return None
        value, size = torch.stack((loss.detach().float(), norm.detach().float())).tolist()
        if stage != self._stage:  # other rows, other attention, another level
            self._stage, self._history = stage, []
        self._lost = 0 if math.isfinite(value) and math.isfinite(size) else self._lost + 1
        if self._lost >= config.max_skipped:
            spike = Spike(step, step - self._lost + 1, f"{self._lost} steps in a row had no finite gradient")
            if config.on_spike == "warn":
                raise DivergedError(f"{self._run}: {spike} (stability.max_skipped); {_WAY_OUT}")
            return spike
        if not math.isfinite(value):
            return None
        score, reason = self._score(value, size)
        self._last = score
        suspects = 0
        while suspects < len(self._history) and self._history[-1 - suspects][2] >= SUSPECT * config.z:
            suspects += 1
        told = any(before[2] >= config.z for before in self._history[len(self._history) - suspects :])
        if math.isfinite(size):
            self._history = [*self._history, (value, _log(size), score)][-config.window :]
        if score < config.z or told:
            return None
        return Spike(step, step - suspects, reason)

    def _score(self, loss: float, norm: float) -> tuple[float, str]:
        """How far a step lies above the level; 0 while too little is known."""
        if len(self._history) < self.config.window:
            return 0.0, ""
        losses, sizes, _ = zip(*self._history, strict=True)
        above = deviation(loss, losses, LOSS_FLOOR * abs(losses[-1]))
        growth = deviation(_log(norm), sizes, NORM_FLOOR)
        reason = f"loss {loss:.4f}, {above:.1f} deviations above its level; gradient norm {norm:.3g}, {growth:.1f}"
        # A gradient alone may be large: it is clipped, and the next loss tells. With the loss it is a spike earlier.
        return max(above, min(growth, above / SUSPECT)), reason

    # The way back.

    def decide(self, spike: Spike, position: dict[str, Any]) -> Rollback | None:
        """Where to go back to from a spike; None where there is no checkpoint from before it.

        Args:
            position: of the loader, after the last batch that was trained on.

        Raises:
            DivergedError: there have been ``max_rollbacks`` already.
        """
        config = self.config
        if self.rollbacks >= config.max_rollbacks:
            raise DivergedError(
                f"{self._run}: {spike}; the run has gone back {self.rollbacks} times "
                f"(stability.max_rollbacks={config.max_rollbacks}); {_WAY_OUT}; a larger number lets it go on"
            )
        # The batch or update before the first step that looked odd may be the cause of it.
        cause = max(0, spike.onset - 2)
        found = [step_of(path) for path in complete_checkpoints(self._run / "checkpoints")]
        to = max((step for step in found if step <= cause), default=None)
        if to is None:
            return None
        skip = (cause, position) if config.batch == "skip" else None
        anticipate = (to, to + config.period) if config.anticipatory == "after_rollback" else None
        return Rollback(spike.step, spike.onset, spike.reason, to, skip, anticipate)

    def record(self, rollback: Rollback) -> None:
        """Makes a decision last; one process does it."""
        end_last_line(self._run / FILE)
        with (self._run / FILE).open("a") as file:
            file.write(json.dumps(asdict(rollback)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def stay(self, step: int) -> None:
        """There is nothing to go back to: experts are chosen early from here on, and the level is learned anew."""
        self._history, self._lost = [], 0
        if self.config.anticipatory == "after_rollback":
            self._window = (step, step + self.config.period)

    def _adopt(self, rollback: Rollback) -> None:
        self.rollbacks += 1
        if rollback.anticipate is not None:
            self._window = (rollback.anticipate[0], rollback.anticipate[1])
        if rollback.skip is not None:
            first, position = rollback.skip
            # An earlier jump stays if this one ends before it: nothing was read beyond `rollback.step`.
            self.skips = [*(skip for skip in self.skips if skip[0] >= rollback.step), (first, position)]


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))


def decisions(run: Path) -> list[dict[str, Any]]:
    """All rollbacks of a run, as its file has them."""
    return read_lines(run / FILE)


def drop_spiked(run: Path) -> None:
    """Removes the checkpoints that a rollback has gone back behind; one process does it, before any reads them."""
    rollbacks = decisions(run)
    for path in complete_checkpoints(run / "checkpoints") if rollbacks else ():
        try:
            state = json.loads((path / "state.json").read_text())
            known = state.get("stability", {}).get("rollbacks", 0)
        except (OSError, ValueError, AttributeError):  # damaged, which is found when it is loaded
            continue
        if state["step"] > rollbacks[-1]["to"] and known < len(rollbacks):
            remove(path)
