"""The schedule of a run: a list of stages, and the plan of one step as a pure function of (steps done, tokens seen).

Stages end on tokens, as the paper counts; warm-up counts steps. `Schedule` walks the batch ramp once, in exact integer
arithmetic, so that the first step of each stage is known before the run starts.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, get_args

LrShape = Literal["constant", "linear", "cosine"]
Attention = Literal["dense", "indexer_warmup", "sparse"]
Compute = Literal["fp32", "bf16", "fp8", "fp4_qat"]


@dataclass(frozen=True)
class Stage:
    """One stage of training; everything but the batch and the learning rate is constant in it.

    Attributes:
        name: shown in the log and in errors.
        tokens: length of the stage.
        sequence_length: tokens in a row.
        batch_tokens: tokens in an optimizer step, a multiple of `sequence_length`.
        batch_tokens_start: the batch at the stage's start, growing linearly in tokens; None for `batch_tokens`.
        batch_ramp_tokens: tokens until the batch has grown to `batch_tokens`.
        lr: learning rate after the warm-up.
        lr_end: learning rate at the stage's last token; None for `lr`.
        lr_shape: the way from `lr` to `lr_end`, in tokens, from the step that ends the warm-up.
        warmup_steps: steps of linear growth from `lr / warmup_steps` at the stage's first step to `lr`.
        attention: what CSA layers attend to, and what trains their lightning indexer (recipe 2.5). `dense`: every
            visible compressed entry; the indexer is neither used nor trained. `indexer_warmup`: as dense, and all but
            the indexer is frozen: its KL loss is the only loss, and the router's biases rest. `sparse`: the indexer's
            top-k; the KL loss is restricted to them.
        mtp_weight: factor of the multi-token-prediction loss; as the next two, not used by an indexer warm-up.
        balance_weight: factor of the sequence-wise balance loss.
        bias_speed: step of the router's balancing biases.
        indexer_weight: factor of the indexer's KL loss under sparse attention; 0 trains no indexer. Not published for
            V4; the default is NVIDIA's (recipe 2.5).
        compute: what matrix products compute in, as `precision.compute`, which None leaves it to. `fp4_qat` may begin
            with any stage: the paper puts it after pretraining (recipe 8.2).

    Raises:
        ValueError: a value is out of range, or two values contradict each other.
    """

    name: str
    tokens: int
    sequence_length: int
    batch_tokens: int
    lr: float
    batch_tokens_start: int | None = None
    batch_ramp_tokens: int = 0
    lr_end: float | None = None
    lr_shape: LrShape = "constant"
    warmup_steps: int = 0
    attention: Attention = "sparse"
    mtp_weight: float = 0.3
    balance_weight: float = 1e-4
    bias_speed: float = 0.001
    indexer_weight: float = 0.01
    compute: Compute | None = None

    def __post_init__(self) -> None:
        for key in ("tokens", "sequence_length", "batch_tokens", "batch_tokens_start", "lr"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                self._refuse(key, "give a positive number")
        weights = ("mtp_weight", "balance_weight", "bias_speed", "indexer_weight")
        for key in ("batch_ramp_tokens", "warmup_steps", "lr_end", *weights):
            value = getattr(self, key)
            if value is not None and not 0 <= value < math.inf:
                self._refuse(key, "give 0 or more")
        for key in ("batch_tokens", "batch_tokens_start"):
            value = getattr(self, key)
            if value is not None and value % self.sequence_length:
                nearest = max(1, round(value / self.sequence_length)) * self.sequence_length
                self._refuse(key, f"make it a multiple of sequence_length = {self.sequence_length}, e.g. {nearest}")
        modes = (*get_args(Compute), None)
        for key, choices in (("lr_shape", get_args(LrShape)), ("attention", get_args(Attention)), ("compute", modes)):
            if getattr(self, key) not in choices:
                self._refuse(key, f"choose one of {', '.join(choice or 'null' for choice in choices)}")
        if self.lr_shape == "constant" and self.lr_end not in (None, self.lr):
            self._refuse("lr_end", f"drop it (lr = {self.lr}), or set lr_shape to linear or cosine")
        if self.lr_shape != "constant" and self.lr_end is None:
            self._refuse("lr_end", f"lr_shape = {self.lr_shape} needs the learning rate to arrive at")
        if (self.batch_tokens_start is None) != (self.batch_ramp_tokens == 0):
            self._refuse(
                "batch_ramp_tokens", f"goes with batch_tokens_start = {self.batch_tokens_start}: set both or none"
            )
        if self.batch_tokens_start is not None and self.batch_tokens_start > self.batch_tokens:
            self._refuse("batch_tokens_start", f"the batch can only grow: at most batch_tokens = {self.batch_tokens}")
        if self.batch_ramp_tokens > self.tokens:
            self._refuse("batch_ramp_tokens", f"the ramp must end within the stage: at most tokens = {self.tokens}")

    def _refuse(self, key: str, way_out: str) -> None:
        raise ValueError(f"stage {self.name!r}: {key} = {getattr(self, key)!r}: {way_out}")

    @property
    def final_lr(self) -> float:
        """The learning rate at the stage's last token."""
        return self.lr if self.lr_end is None else self.lr_end

    def rows(self, tokens: int) -> int:
        """Rows of the step that starts `tokens` into the stage: the ramp's value there, rounded down."""
        if self.batch_tokens_start is None or tokens >= self.batch_ramp_tokens:
            return self.batch_tokens // self.sequence_length
        growth = (self.batch_tokens - self.batch_tokens_start) * tokens
        return (self.batch_tokens_start * self.batch_ramp_tokens + growth) // (
            self.batch_ramp_tokens * self.sequence_length
        )

    def next_growth(self, tokens: int) -> int:
        """The first place in the stage, after `tokens`, where `rows` is larger; the stage's end if there is none."""
        if self.batch_tokens_start is None or self.rows(tokens) == self.batch_tokens // self.sequence_length:
            return self.tokens
        larger = (self.rows(tokens) + 1) * self.sequence_length - self.batch_tokens_start
        growth = self.batch_tokens - self.batch_tokens_start
        return min(_ceil_div(larger * self.batch_ramp_tokens, growth), self.tokens)


@dataclass(frozen=True)
class Plan:
    """Everything that one optimizer step needs to know of the schedule; a global batch is `rows` rows.

    The weights are those of the step's attention mode: `indexer_weight` is 0 under dense attention, and in an indexer
    warm-up it is 1 and the others are 0.
    """

    stage: int
    name: str
    sequence_length: int
    rows: int
    lr: float
    attention: Attention
    mtp_weight: float
    balance_weight: float
    bias_speed: float
    indexer_weight: float
    compute: Compute | None = None

    @property
    def tokens(self) -> int:
        """Tokens in the step's global batch."""
        return self.rows * self.sequence_length


@dataclass(frozen=True)
class _Run:
    """Consecutive steps of one batch size: the first one's index and tokens seen before it, and the size."""

    step: int
    tokens: int
    batch_tokens: int


class Schedule:
    """The stages of a run, one after the other.

    A stage ends when the sum of all stages' tokens up to it has been seen. Its last batch is a whole one and may
    overshoot; the next stage still ends at its own nominal sum, so that no error piles up.

    Args:
        stages: at least one.
        steps: stop after so many optimizer steps, without any other change to the schedule, so that a run of 30 steps
            resumed with 60 equals one of 60. Beyond the stages' end, the last one goes on at its final values.

    Attributes:
        total_steps: optimizer steps of the whole run.
        total_tokens: tokens seen in them.

    Raises:
        ValueError: no stages, negative `steps`, or a warm-up longer than its stage.
    """

    def __init__(self, stages: Sequence[Stage], steps: int | None = None) -> None:
        if not stages:
            raise ValueError("schedule: stages is empty: give at least one stage")
        if steps is not None and steps < 0:
            raise ValueError(f"schedule: steps = {steps}: give 0 or more, or null for all stages")
        self.stages = tuple(stages)
        self.steps = steps
        self._ends = list(accumulate(stage.tokens for stage in stages))
        self._first_steps: list[int] = []
        self._runs: list[_Run] = []
        step = tokens = 0
        for stage, end in zip(self.stages, self._ends, strict=True):
            self._first_steps.append(step)
            begin = end - stage.tokens
            while tokens < end:
                batch = stage.rows(tokens - begin) * stage.sequence_length
                self._runs.append(_Run(step, tokens, batch))
                count = _ceil_div(begin + stage.next_growth(tokens - begin) - tokens, batch)
                step, tokens = step + count, tokens + count * batch
            if stage.warmup_steps > step - self._first_steps[-1]:
                held = step - self._first_steps[-1]
                raise ValueError(
                    f"stage {stage.name!r}: warmup_steps = {stage.warmup_steps}: the stage holds {held} steps; "
                    "shorten the warm-up or lengthen the stage"
                )
        # Beyond the end, the last stage goes on with its full batch.
        self._runs.append(_Run(step, tokens, self.stages[-1].batch_tokens))
        # The learning rate starts to move at the step that first reaches it.
        self._decay_starts = [
            self.tokens_before(first + max(stage.warmup_steps - 1, 0))
            for first, stage in zip(self._first_steps, self.stages, strict=True)
        ]
        self.total_steps = step if steps is None else steps
        self.total_tokens = self.tokens_before(self.total_steps)

    @property
    def stage_steps(self) -> list[int]:
        """Optimizer steps of each stage, whatever ``steps`` says."""
        return [after - first for first, after in pairwise([*self._first_steps, self._runs[-1].step])]

    def plan(self, step: int, tokens: int) -> Plan | None:
        """The next step's plan after `step` completed steps and `tokens` seen tokens; None when the run is over."""
        if step >= self.total_steps if self.steps is not None else tokens >= self._ends[-1]:
            return None
        index = min(bisect_right(self._ends, tokens), len(self.stages) - 1)
        stage = self.stages[index]
        warms_indexer = stage.attention == "indexer_warmup"
        indexer_weight = {"dense": 0.0, "indexer_warmup": 1.0, "sparse": stage.indexer_weight}[stage.attention]
        return Plan(
            stage=index,
            name=stage.name,
            sequence_length=stage.sequence_length,
            rows=stage.rows(tokens - self._ends[index] + stage.tokens),
            lr=self._lr(index, step, tokens),
            attention=stage.attention,
            mtp_weight=0.0 if warms_indexer else stage.mtp_weight,
            balance_weight=0.0 if warms_indexer else stage.balance_weight,
            bias_speed=0.0 if warms_indexer else stage.bias_speed,
            indexer_weight=indexer_weight,
            compute=stage.compute,
        )

    def _lr(self, index: int, step: int, tokens: int) -> float:
        stage, start, end = self.stages[index], self._decay_starts[index], self._ends[index]
        warm = max(step - self._first_steps[index], 0) + 1
        if warm < stage.warmup_steps:
            return stage.lr * warm / stage.warmup_steps
        if stage.lr_shape == "constant":
            return stage.lr
        done = min(max(tokens - start, 0) / max(end - start, 1), 1.0)
        if stage.lr_shape == "cosine":
            done = 0.5 * (1 - math.cos(math.pi * done))
        return stage.lr * (1 - done) + stage.final_lr * done  # exact at both ends

    def tokens_before(self, step: int) -> int:
        """Tokens seen before the step of that index, when every earlier batch was whole."""
        run = self._runs[bisect_right(self._runs, step, key=lambda run: run.step) - 1]
        return run.tokens + (step - run.step) * run.batch_tokens


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
