"""Models and packed rows that one process computes whole, and several in parts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from model_cases import random_config, random_model
from torch import Tensor

from openv4.kernels.dispatch import Choice, using
from openv4.model import Transformer
from openv4.model.config import AttentionMode, Recompute
from openv4.model.loss import Counts, Losses, token_losses, training_losses
from openv4.train.context import ContextGroup

LENGTH = 80  # parts of 20 or 40 tokens: more than any window and block of a random config reaches back


@dataclass(frozen=True)
class Case:
    """``rows`` are the lengths of the documents of each row, padding after them."""

    seed: int
    rows: tuple[tuple[int, ...], ...]
    attention: AttentionMode = "sparse"
    recompute: Recompute = "none"
    dtype: torch.dtype = torch.float64
    indexer: bool = True
    kernels: Choice = "auto"
    fixed: dict[str, Any] = field(default_factory=dict)

    def model(self) -> Transformer:
        config = random_config(self.seed + 700, **{"index_topk": 3, "num_hash_layers": 1} | self.fixed)
        model = random_model(config, self.seed).to(self.dtype)
        model.recompute = self.recompute
        return model

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, segments, and which tokens are trained on, ``[B, T]`` each."""
        generator = torch.Generator().manual_seed(self.seed)
        tokens = torch.randint(0, self.model().config.vocab_size, (len(self.rows), LENGTH), generator=generator)
        segments = torch.full_like(tokens, -1)
        for row, lengths in enumerate(self.rows):
            numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            segments[row, : len(numbers)] = numbers
        return tokens, segments, torch.rand(tokens.shape, generator=generator) < 0.8


def compute(case: Case, context: ContextGroup | None = None, tokens: Tensor | None = None) -> dict[str, Any]:
    """Everything that a training step asks of a model, of this process's part of the rows."""
    model = case.model()
    model.context = context
    drawn, segments, trained = case.batch()
    tokens = drawn if tokens is None else tokens
    with using(case.kernels):
        with torch.no_grad():
            logits = model(tokens, segments, attention="dense" if case.attention == "dense" else "sparse")
            tokenwise, _ = token_losses(model, tokens, segments, case.attention)
        before = 0 if context is None else context.sent
        losses = training_losses(model, tokens, segments, case.attention, True, case.indexer, True, trained)
        total(losses, segments, trained).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    sums = {name: getattr(losses, name).detach() for name in ("main", "mtp", "balance")}
    sums |= {f"indexer.{name}": value.detach() for name, value in losses.indexer._asdict().items()}
    sent = 0 if context is None else context.sent - before
    return {
        "logits": logits,
        "token_losses": tokenwise,
        "sums": sums,
        "load": losses.load,
        "statistics": losses.statistics,
        "gradients": gradients,
        "sent": sent,
    }


def total(losses: Losses, segments: Tensor, trained: Tensor) -> Tensor:
    return losses.total(Counts.of([segments], [trained]), 0.3, 0.1, 0.7)


def compute_parts(cases: Sequence[Case], size: int) -> list[dict[str, Any] | None]:
    """In a process of a world: every case by a group of ``size`` ranks, groups taking turns; None for others' cases."""
    groups = [dist.new_group(list(range(low, low + size))) for low in range(0, dist.get_world_size(), size)]
    mine = dist.get_rank() // size
    context = ContextGroup(groups[mine])
    return [compute(case, context) if i % len(groups) == mine else None for i, case in enumerate(cases)]
