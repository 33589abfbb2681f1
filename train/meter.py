"""Rows of metrics from step reports; the only place of the training loop that waits for the device."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data.loader import Batch
from ..model.accounting import training_flops_per_token
from ..model.loss import Counts
from ..model.outliers import MAXIMA
from ..optim.groups import Optimizers
from ..optim.schedule import Plan
from .checkpoint import TrainState
from .config import TrainConfig
from .environment import peak_flops, peak_memory_gb
from .metrics import Row, is_detail
from .parallel import ALONE, Alone


@dataclass
class StepReport:
    """Sums over the micro-batches of one step, still on the device."""

    main: Tensor  # nats
    mtp: Tensor
    balance: Tensor
    indexer: Tensor  # [3] KL and what a uniform indexer would have, nats, and tokens x CSA layers
    counts: Counts
    grad_norm: Tensor
    found_inf: Tensor  # 1 if the step was skipped, else 0
    load: dict[str, Tensor] = field(default_factory=dict)  # by block: tokens per expert
    statistics: dict[str, Tensor] = field(default_factory=dict)  # of the first micro-batch

    @property
    def loss(self) -> Tensor:
        """Nats per predicted token."""
        return self.main / self.counts.main.clamp(min=1)


class Meter:
    """Turns step reports into rows of metrics; the only place that waits for the device."""

    def __init__(self, config: TrainConfig, device: torch.device, processes: Alone = ALONE) -> None:
        self.config, self.processes = config, processes
        self.steps = 0
        self._restart()
        self._device, self._skipped = device, torch.zeros((), device=device)
        given = config.logging.peak_tflops
        self._peak = given * 1e12 if given else peak_flops(device)

    def _restart(self) -> None:
        self._tokens, self._since, self._steps, self._waited = 0, time.perf_counter(), 0, 0.0
        self._aside: dict[str, float] = {}

    def count(self, plan: Plan, report: StepReport) -> None:
        self.steps += 1
        self._steps += 1
        self._tokens += plan.tokens
        self._skipped += report.found_inf

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """What happens within is no training, and does not count as its time."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._since += seconds
        self._aside[what] = self._aside.get(what, 0.0) + seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, training waits for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def settle(self, state: TrainState) -> int:
        """Moves the count of skipped steps from the device to the state, and returns it."""
        skipped = int(self._skipped)
        state.skipped += skipped
        self._skipped.zero_()
        return skipped

    def row(self, state: TrainState, plan: Plan, report: StepReport, optimizers: Optimizers, batch: Batch) -> Row:
        """The metrics of the step just done; times and speeds are since the last row. All processes call it."""
        counts = report.counts
        peaks = peak_memory_gb(self._device)
        epoch = max((piece[1] for pieces in batch.pieces for piece in pieces), default=0)
        epoch, *most = self.processes.largest(torch.tensor([epoch, *peaks.values()], dtype=torch.float64)).tolist()
        row: Row = {
            "step": state.step,
            "tokens": state.tokens,
            "train/loss": float(report.loss),
            "train/mtp_loss": float(report.mtp / counts.mtp.clamp(min=1)),
            "train/balance_loss": float(report.balance / counts.valid.clamp(min=1)),
            "train/lr": plan.lr,
            "train/grad_norm": float(report.grad_norm),
            "train/stage": plan.stage,
            "train/sequence_length": plan.sequence_length,
            "train/batch_tokens": plan.tokens,
            "data/padding": 1 - int(counts.valid) / plan.tokens,
            "data/epoch": int(epoch),
            "stability/skipped_steps": state.skipped,
        }
        kl, uniform, compared = report.indexer.tolist()
        if compared:
            row |= {"attn/indexer_kl": kl / compared, "attn/indexer_kl_uniform": uniform / compared}
        if report.statistics:
            detail = self.config.logging.detail
            kept = {name: value for name, value in report.statistics.items() if detail or not is_detail(name)}
            row |= over_processes(kept, self.processes)
        if row.pop("attn/indexer_recall_tokens", 1) == 0:
            del row["attn/indexer_recall"]  # rows so short that the indexer takes all there is
        row |= load_metrics(report.load, self.config.logging.detail)
        row |= dict(zip(peaks, most, strict=True))
        row |= {f"optim/update_rms/{g.replace(' ', '_')}": float(v) for g, v in optimizers.update_rms().items()}
        residuals = optimizers.residuals().items()
        row |= {f"optim/newton_schulz_residual/{g.replace(' ', '_')}": float(v) for g, v in residuals}
        row |= {f"system/{what}_seconds": seconds for what, seconds in self._aside.items()}
        elapsed = time.perf_counter() - self._since
        row["system/step_seconds"] = elapsed / self._steps
        row["system/data_wait"] = self._waited / elapsed
        row["train/tokens_per_second"] = speed = self._tokens / elapsed
        if self._peak is not None:
            flops = training_flops_per_token(
                self.config.model,
                plan.sequence_length,
                plan.attention,
                plan.mtp_weight > 0,
                indexer_loss=plan.indexer_weight > 0,
                lora=self.config.lora,
            )
            row["train/mfu"] = speed * flops / (self._peak * self.processes.world)
        self._restart()
        return row


def over_processes(statistics: Mapping[str, Tensor], processes: Alone) -> Row:
    """Means over processes, or maxima of ``MAXIMA``. Processes whose part of the rows is padding alone have no mean
    (NaN), and do not count."""
    values = torch.stack([value.float() for value in statistics.values()])
    known = ~values.isnan()
    sums = processes.total(torch.stack((values.nan_to_num(), known.float())))
    largest = processes.largest(values.where(known, -torch.inf))
    means = zip(statistics, largest.tolist(), (sums[0] / sums[1]).tolist(), strict=True)
    return {name: most if name.startswith(MAXIMA) else mean for name, most, mean in means}


def relative_load(load: dict[str, Tensor]) -> dict[str, list[float]]:
    """Load of each expert over the mean of its block (1 = even), from tokens per expert."""
    return dict(zip(load, _relative(_counts(load)).tolist(), strict=True))


def load_metrics(load: dict[str, Tensor], detail: bool = False) -> Row:
    """Largest and smallest load of an expert over the mean of its layer (1 = even), and experts without a token; with
    ``detail`` also those of each layer."""
    if not load:
        return {}
    counts = _counts(load)
    relative = _relative(counts)
    row: Row = {f"moe/load_max/{name}": float(value) for name, value in zip(load, relative.amax(1), strict=True)}
    row |= {"moe/load_max": float(relative.max()), "moe/load_mean": float(counts.mean())}
    dead = (counts == 0).sum(1)
    row |= {"moe/load_min": float(relative.min()), "moe/dead_experts": int(dead.sum())}
    if detail:
        row |= {f"moe/dead_experts/{name}": int(value) for name, value in zip(load, dead, strict=True)}
    return row


def _counts(load: dict[str, Tensor]) -> Tensor:
    """Tokens of each expert, float32 ``[blocks, E]``, on the host."""
    return torch.stack([count.float() for count in load.values()]).cpu()


def _relative(counts: Tensor) -> Tensor:
    return counts / counts.mean(1, keepdim=True).clamp(min=1e-9)
