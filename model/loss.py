"""The training losses, as sums and counts, so that they add up over micro-batches and ranks.

Shapes: B batch, T tokens, V vocabulary, E experts.
"""

import itertools
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.cross_entropy import IGNORED, linear_cross_entropy, token_cross_entropy
from ..kernels.hyper_connection import composite_gains
from ..kernels.indexer_loss import IndexerLoss
from .attention import AttentionTask, IndexerReport
from .config import AttentionMode
from .outliers import Outliers
from .transformer import BlockReport, Transformer


@dataclass(frozen=True)
class Counts:
    """What the loss sums of a batch are divided by, 0-dim int64 tensors."""

    main: Tensor  # tokens whose next token is in their document and trained on
    mtp: Tensor  # the same of the next but one
    valid: Tensor  # tokens that are not padding

    @classmethod
    def of(cls, segments: Iterable[Tensor], trained: Iterable[Tensor | None] | None = None) -> "Counts":
        """Over all micro-batches of a step: ``segments [B, T]`` and ``trained [B, T]`` of each, None for all tokens."""
        pairs = (
            zip(segments, itertools.repeat(None), strict=False)
            if trained is None
            else zip(segments, trained, strict=True)
        )
        counts = [
            [(shifted_targets(s, s, n, mask) != IGNORED).sum() for n in (1, 2)] + [(s >= 0).sum()] for s, mask in pairs
        ]
        return cls(*(torch.stack(column).sum() for column in zip(*counts, strict=True)))


@dataclass(frozen=True)
class Losses:
    """Sums over one micro-batch; the first four carry gradients."""

    main: Tensor  # next-token cross-entropy, nats
    mtp: Tensor  # cross-entropy of the token after it, nats
    balance: Tensor  # sequence-wise balance loss times tokens, summed over layers
    indexer: IndexerLoss  # KL divergence of the indexers, nats, summed over tokens and CSA layers
    load: dict[str, Tensor]  # by block: [E] tokens per expert
    statistics: dict[str, Tensor]  # 0-dim, detached; empty unless asked for; means, but for `outliers.MAXIMA`

    def total(self, counts: Counts, mtp_weight: float, balance_weight: float, indexer_weight: float = 0.0) -> Tensor:
        """The scalar to differentiate: each sum over its count of the whole step (recipe 2.5, 3, 9)."""
        main = self.main / counts.main.clamp(min=1)
        mtp = self.mtp / counts.mtp.clamp(min=1)
        per_token = balance_weight * self.balance + indexer_weight * self.indexer.kl
        return main + mtp_weight * mtp + per_token / counts.valid.clamp(min=1)


def shifted_targets(tokens: Tensor, segments: Tensor, distance: int, trained: Tensor | None = None) -> Tensor:
    """``[B, T]`` token at t + distance where it lies in the same document and ``trained [B, T]`` (None: all) counts it,
    else ``IGNORED``."""
    targets = torch.full_like(tokens, IGNORED, dtype=torch.long)
    if distance < tokens.shape[1]:
        # Documents are contiguous, so equal ids at the ends of the step and no change between mean one document.
        same = segments[:, 1:] == segments[:, :-1]
        within = same.unfold(1, distance, 1).all(-1) & (segments[:, :-distance] >= 0)
        if trained is not None:
            within &= trained[:, distance:]
        targets[:, :-distance] = torch.where(within, tokens[:, distance:], IGNORED)
    return targets


def training_losses(
    model: Transformer,
    tokens: Tensor,
    segments: Tensor,
    attention: AttentionMode = "sparse",
    mtp: bool = True,
    indexer: bool = False,
    statistics: bool = False,
    trained: Tensor | None = None,
    experts: Tensor | None = None,
) -> Losses:
    """Runs the model on ``tokens [B, T]`` packed as ``segments [B, T]`` says, and sums its losses: in a model with a
    context, those of this process's part of the rows.

    ``trained [B, T]`` bool are the tokens whose prediction counts (None: all): a chat's replies, not its prompts. The
    losses of router and indexer are over all tokens: prompts pass through both. ``experts`` as in ``Transformer.run``.

    ``indexer`` computes the indexers' loss as well. In the mode "indexer_warmup" it is the only one with a gradient:
    everything else is frozen, and what it costs to remember for a backward pass is saved (recipe 2.5).
    """
    warmup = attention == "indexer_warmup"
    task = AttentionTask(attention, indexer or warmup, statistics)
    outliers = Outliers()
    if statistics:
        model.gauge.start()
    with torch.set_grad_enabled(torch.is_grad_enabled() and not warmup):
        with outliers.watch(model) if statistics else nullcontext():
            output = model.run(tokens, segments, task=task, mtp=mtp and not warmup, experts=experts)
        targets = model.part(shifted_targets(tokens, segments, 1, trained))
        main = linear_cross_entropy(model.hidden(output.streams), model.head.weight, targets)
        mtp_sum = main.new_zeros(())
        if output.mtp_streams is not None:
            hidden = model.hidden(output.mtp_streams, model.mtp[0])
            targets = model.part(shifted_targets(tokens, segments, 2, trained))
            mtp_sum = linear_cross_entropy(hidden, model.head.weight, targets)
    routing = {name: report.routing for name, report in output.reports.items()}
    indexers = [report.indexer for report in output.reports.values() if report.indexer is not None]
    found: dict[str, Tensor] = {}
    if statistics:
        valid = model.part(segments >= 0)
        found = summarize(output.reports, valid) | recall_statistics(indexers)
        found |= outliers.maxima(valid) | model.gauge.take()
    zero = main.new_zeros(())
    columns = zip((zero, zero, zero.long()), *(report.loss for report in indexers), strict=True)
    return Losses(
        main,
        mtp_sum,
        torch.stack([r.balance for r in routing.values()]).sum(),
        IndexerLoss(*(torch.stack(column).sum() for column in columns)),
        {name: r.load for name, r in routing.items()},
        found,
    )


def token_losses(
    model: Transformer, tokens: Tensor, segments: Tensor, attention: AttentionMode, trained: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For evaluation: each token's next-token cross-entropy in nats ``[B, T]``, and the targets ``[B, T]``.

    In a model with a context, those of this process's part of the rows.
    """
    output = model.run(tokens, segments, task=AttentionTask(attention), mtp=False)
    targets = model.part(shifted_targets(tokens, segments, 1, trained))
    return token_cross_entropy(model.hidden(output.streams), model.head.weight, targets), targets


def recall_statistics(indexers: Iterable[IndexerReport]) -> dict[str, Tensor]:
    """Mean over sampled tokens and CSA layers of ``kernels.indexer.selection_recall``, and how many had a choice."""
    recalls = [report.recall for report in indexers if report.recall is not None]
    if not recalls:
        return {}
    caught, tokens = torch.stack([torch.stack(recall) for recall in recalls]).sum(0).unbind()
    return {"attn/indexer_recall": caught / tokens.clamp(min=1), "attn/indexer_recall_tokens": tokens}


@torch.no_grad()
def summarize(reports: dict[str, BlockReport], valid: Tensor) -> dict[str, Tensor]:
    """Health of the architecture's parts, 0-dim float32 tensors, means over valid tokens.

    mhc/forward_gain and mhc/backward_gain are ``composite_gains`` of all stream mixings of a token, from first site to
    last: how much a signal or gradient can grow on its way through the depth (recipe 13).
    """
    main = {name: report for name, report in reports.items() if name.startswith("layers")}
    gains = composite_gains([matrix for report in main.values() for matrix in report.residuals])
    sink = torch.stack([report.sink[valid].mean() for report in main.values()])
    clamped = torch.stack([report.routing.clamped for report in reports.values()])
    stale = [report.routing.stale for report in reports.values() if report.routing.stale is not None]
    return {
        "mhc/forward_gain": gains.forward[-1][valid].mean(),
        "mhc/backward_gain": gains.backward[0][valid].mean(),
        "attn/sink_mass": sink.mean(),
        "attn/sink_mass_max": sink.max(),
        "stability/clamp_rate": clamped.mean(),
    } | ({"moe/stale_experts": torch.stack(stale).mean()} if stale else {})
