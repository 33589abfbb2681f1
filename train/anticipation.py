"""Anticipatory routing: experts chosen by the parameters of some steps ago (recipe 7), and the batches for it, early.

While it is on, the batch of step t + delay is fetched at step t and run through the model once without gradients; the
ids that its routers choose are kept and followed at step t + delay, where the experts are weighed by the parameters of
then. Where it begins, the parameters of its first step choose for the first ``delay`` steps. Router biases belong to
the parameters that choose; they move by the load that results. Hash layers choose by token and have nothing to
anticipate.
"""

import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.loader import Batch, Loader
from ..model.transformer import Transformer
from ..optim.schedule import Plan, Schedule
from .checkpoint import TrainState, chosen_ahead
from .config import TrainConfig
from .evaluation import without_dropout
from .parallel import Alone

# The ids of a step in a checkpoint: of every so many-th row from one on, their tokens from one on.
_NAME = re.compile(r"ahead\.(\d+)\.row\.(\d+)\.of\.(\d+)\.token\.(\d+)")


@dataclass
class _Fetched:
    step: int
    tokens: int  # trained before it
    plan: Plan
    batch: Batch
    position: dict[str, Any]  # of the loader, after it


class Feed:
    """The batches of a run's steps: this process's rows, as many as any process has.

    Args:
        model: chooses experts where routing is anticipated.
        pad: token of rows that fill up.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Transformer,
        loader: Loader,
        schedule: Schedule,
        processes: Alone,
        pad: int,
        device: torch.device,
    ) -> None:
        self._config, self._model, self._loader = config, model, loader
        # Beyond `steps` too: the run that is given more of them finds what it would have chosen.
        self._schedules = schedule, Schedule(schedule.stages, None)
        self._processes, self._pad, self._device = processes, pad, device
        self._ahead: deque[_Fetched] = deque()
        self._known: dict[int, list[tuple[re.Match[str], Tensor]]] = {}  # ids from a checkpoint, by step
        self._position = loader.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The loader's position after the last batch that was taken."""
        return self._position

    def load_state_dict(self, position: dict[str, Any] | None, checkpoint: Path | None) -> None:
        """Goes on from a position, with the ids in a checkpoint, of any number of processes."""
        self._ahead.clear()
        self._known.clear()
        for name, tensor in chosen_ahead(checkpoint, self._shares_rows) if checkpoint else ():
            match = _NAME.fullmatch(name)
            assert match is not None, name
            self._known.setdefault(int(match[1]), []).append((match, tensor))
        self._loader.load_state_dict(position or self._loader.state_dict())
        self._position = self._loader.state_dict()

    def tensors(self) -> dict[str, Tensor]:
        """The ids of steps to come, by name; each process has those of its part of the rows."""
        replica, replicas = self._processes.replica, self._processes.replicas
        return {
            f"ahead.{each.step}.row.{replica}.of.{replicas}.token.{self._part(each.plan)[0]}": each.batch.experts
            for each in self._ahead
            if each.batch.experts is not None
        }

    def fetch(self, state: TrainState, anticipated: range, skips: Sequence[tuple[int, Any]]) -> None:
        """Has the batch of the step to come, and where routing is anticipated those of the steps after it.

        Args:
            state: its step and tokens are those done.
            anticipated: the steps that follow ids.
            skips: steps from which the data go on at another position of the loader.
        """
        last = state.step
        if state.step in anticipated:
            last = min(state.step + self._config.stability.delay, anticipated.stop - 1)
        step, tokens, following = state.step, state.tokens, self._plan(state.step, state.tokens)
        if self._ahead:
            before = self._ahead[-1]
            step, tokens = before.step + 1, before.tokens + before.plan.tokens
            following = self._plan(step, tokens)
        while step <= last and following is not None:
            for first, position in skips:
                if first == step:
                    self._loader.load_state_dict(position)
            self._ahead.append(self._read(step, tokens, following))
            step, tokens = step + 1, tokens + following.tokens
            following = self._plan(step, tokens)

    def take(self, plan: Plan, anticipated: range) -> Batch:
        """The batch of the step to come, which ``fetch`` has read; its experts, and of those after it, are chosen."""
        for each in self._ahead:
            if each.step in anticipated and each.batch.experts is None:
                ids = self._recalled(each)
                each.batch = each.batch._replace(experts=self._chosen(each, plan) if ids is None else ids)
        taken = self._ahead.popleft()
        self._known.pop(taken.step, None)
        self._position = taken.position
        return taken.batch

    def _plan(self, step: int, tokens: int) -> Plan | None:
        plans = (schedule.plan(step, tokens) for schedule in self._schedules)
        return next((plan for plan in plans if plan is not None), None)

    def _read(self, step: int, tokens: int, plan: Plan) -> _Fetched:
        replica, replicas = self._processes.replica, self._processes.replicas
        batch = self._loader.next_batch(plan.rows, plan.sequence_length, replica, replicas)
        batch = filled(batch, math.ceil(plan.rows / replicas), self._pad)
        return _Fetched(step, tokens, plan, batch, self._loader.state_dict())

    def _chosen(self, fetched: _Fetched, now: Plan) -> Tensor:
        """What the routers choose now, of the step's micro-batches in turn, as the step itself will run them."""
        model, plan, precision = self._model, fetched.plan, self._config.precision
        if plan.compute != now.compute:
            self._processes.set_precision(model, precision, plan.compute)
        with without_dropout(model):
            ids = [
                model.choose_experts(batch.tokens, batch.segments, plan.attention, mtp=plan.mtp_weight > 0)
                for batch in split_batch(fetched.batch, self._config.micro_batch_tokens, self._device)
            ]
        if plan.compute != now.compute:
            self._processes.set_precision(model, precision, now.compute)
        return torch.cat(ids)

    def _recalled(self, fetched: _Fetched) -> Tensor | None:
        """What a checkpoint knows of the ids of a step, for this process's part of the rows."""
        parts = self._known.get(fetched.step)
        if not parts:
            return None
        replica, replicas = self._processes.replica, self._processes.replicas
        start, stop = self._part(fetched.plan)
        gates, k = parts[0][1].shape[1], parts[0][1].shape[3]
        # Rows that fill up choose any experts: other processes may not have had them.
        ids = torch.arange(k, dtype=parts[0][1].dtype).expand(len(fetched.batch.tokens), gates, stop - start, k).clone()
        for match, tensor in parts:
            first, of, token = (int(match[group]) for group in (2, 3, 4))
            low, high = max(start, token), min(stop, token + tensor.shape[2])
            for row in range(len(ids)):
                there, rest = divmod(replica + row * replicas - first, of)
                if rest == 0 and there < len(tensor) and low < high:
                    ids[row, :, low - start : high - start] = tensor[there, :, low - token : high - token]
        return ids.to(self._device)

    def _shares_rows(self, name: str) -> bool:
        """Whether ids in a checkpoint are of rows that this process has too."""
        match = _NAME.fullmatch(name)
        if match is None:
            return False
        first, of = int(match[2]), int(match[3])
        return (self._processes.replica - first) % math.gcd(self._processes.replicas, of) == 0

    def _part(self, plan: Plan) -> tuple[int, int]:
        """The tokens of each row that this process computes."""
        positions = self._model.part(torch.arange(plan.sequence_length).expand(1, -1))[0]
        return int(positions[0]), int(positions[-1]) + 1


def filled(batch: Batch, rows: int, pad: int) -> Batch:
    """The batch with rows of padding, where other processes have a row more; all go through as many passes."""
    missing = rows - len(batch.tokens)
    if not missing:
        return batch

    def grown(tensor: Tensor, value: int) -> Tensor:
        return torch.cat((tensor, tensor.new_full((missing, *tensor.shape[1:]), value)))

    trained = None if batch.trained is None else grown(batch.trained, 0)
    return Batch(grown(batch.tokens, pad), grown(batch.segments, -1), (*batch.pieces, *((),) * missing), trained)


def split_batch(batch: Batch, micro_batch_tokens: int, device: torch.device) -> list[Batch]:
    """The rows of a step's batch in portions of at most ``micro_batch_tokens`` (one row at least), on the device."""
    rows = max(1, micro_batch_tokens // batch.tokens.shape[1])
    return [_portion(batch, slice(first, first + rows), device) for first in range(0, len(batch.tokens), rows)]


def _portion(batch: Batch, rows: slice, device: torch.device) -> Batch:
    def cut(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor[rows].to(device, non_blocking=True)

    return Batch(cut(batch.tokens), cut(batch.segments), batch.pieces[rows], cut(batch.trained), cut(batch.experts))
