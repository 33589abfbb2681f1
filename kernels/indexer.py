"""The lightning indexer: cheap scores of compressed entries, the choice of the best k, and the loss that trains it.

Shapes: B batch, T tokens, I index heads, J index dim, N compressed entries, k selected, H attention heads, C head dim,
t tokens of a portion, n entries that it looks at. Source: recipe 2.3 and 2.5; paper eq. 16.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .documents import Blocks
from .entries import View, is_selected
from .norm import at_least_fp32

# Elements of the scores [t, I, n] or [t, H, n] of a portion: in the cache on a CPU, large launches on a GPU.
CPU_ELEMENTS, GPU_ELEMENTS = 2**20, 2**26


def index_scores(queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """I[t, s] = sum_h w[t, h] * ReLU(q[t, h] . k[s]), ``[B, T, N]``, at least float32.

    Args:
        queries: ``[B, T, I, J]``; keys: ``[B, N, J]``; weights: ``[B, T, I]``, with the scale J^-1/2 I^-1/2 applied.
    """
    batch, length, heads, _ = queries.shape
    scores = at_least_fp32(queries).flatten(1, 2) @ at_least_fp32(keys).mT  # [B, T I, N]
    scores = scores.relu_().view(batch * length, heads, keys.shape[1])
    return (at_least_fp32(weights).reshape(batch * length, 1, heads) @ scores).view(batch, length, keys.shape[1])


def select_top_k(scores: Tensor, first: Tensor, end: Tensor, k: int) -> Tensor:
    """The k best visible entries of each token, ascending, ``[B, T, min(k, N)]`` int64; -1 last if fewer are visible.

    Of equal scores at the border the lowest entries win (a zero after ReLU is a common tie, and torch.topk leaves its
    order open).

    Args:
        scores: ``[B, T, N]``; first, end: ``[B, T]``: entries first <= n < end are visible.
    """
    return _select(scores.clone(), first, end, min(k, scores.shape[-1]))


def _select(scores: Tensor, first: Tensor, end: Tensor, k: int) -> Tensor:
    """``select_top_k`` for k <= N; overwrites the scores."""
    count = scores.shape[-1]
    if not k:
        return scores.new_zeros(*scores.shape[:2], 0, dtype=torch.long)
    # What all tokens see needs no mask. Finding out makes the host wait, which costs a CPU nothing.
    common = (int(first.max()), int(end.min())) if scores.device.type == "cpu" and len(scores) else (count, 0)
    for low, high in ((0, count),) if common[0] >= common[1] else ((0, common[0]), (common[1], count)):
        entry = torch.arange(low, high, device=scores.device)
        unseen = (entry < first.unsqueeze(-1)) | (entry >= end.unsqueeze(-1))
        scores[..., low:high].masked_fill_(unseen, float("-inf"))
    best, chosen = scores.topk(min(k + 1, count))
    chosen = chosen[..., :k]
    if k < count:
        crowded = (best[..., k - 1] == best[..., k]) & best[..., k].isfinite()
        if crowded.any():  # sorting only these rows: a sort of all costs ten times what topk does
            chosen[crowded] = scores[crowded].sort(dim=-1, descending=True, stable=True).indices[..., :k]
    seen = (chosen >= first.unsqueeze(-1)) & (chosen < end.unsqueeze(-1))
    chosen = torch.where(seen, chosen, count).sort(-1).values
    return chosen.masked_fill_(chosen == count, -1)


@torch.no_grad()
def select_entries(queries: Tensor, keys: Tensor, weights: Tensor, blocks: Blocks, k: int) -> Tensor:
    """``select_top_k`` of ``index_scores``, portion by portion: no ``[T, N]`` scores exist. Arguments as in these two.

    Returns:
        ``[B, T, min(k, N)]`` int64, ascending, then -1.
    """
    batch, length = queries.shape[:2]
    k = min(k, keys.shape[1])
    selected = torch.full((batch, length, k), -1, dtype=torch.long, device=queries.device)
    for start, stop in _portions(blocks.end, 1, blocks):  # scores of all heads exist for a tile of entries only
        low, high = blocks.span(start, stop)
        part = slice(start, stop)
        scores = torch.empty(
            batch, stop - start, high - low, dtype=at_least_fp32(queries[:0]).dtype, device=keys.device
        )
        for tile in _tiles(queries[:, part], high - low):
            scores[..., tile] = index_scores(queries[:, part], keys[:, low:high][:, tile], weights[:, part])
        first, end = blocks.first[:, part] - low, blocks.end[:, part] - low
        best = _select(scores, first, end, min(k, high - low))
        selected[:, part, : best.shape[2]] = torch.where(best < 0, best, best + low)
    return selected


def _tiles(queries: Tensor, entries: int) -> Iterator[slice]:
    """Ranges of entries whose scores ``[B, t, I, n]`` fill the budget: wide, thin products are half as fast."""
    size = max(1, _budget(queries) // max(queries.shape[:3].numel(), 1))
    for start in range(0, entries, size):
        yield slice(start, min(start + size, entries))


class Attended(NamedTuple):
    """What the core attention did, the target of the indexer; its gradient is not wanted."""

    q: Tensor  # [B, T, H, C] queries
    entries: Tensor  # [B, N, C]
    lse: Tensor  # [B, T, H] logarithm of the softmax's denominator over window, entries and sink


class IndexerLoss(NamedTuple):
    """Sums over tokens, 0-dim; ``kl`` carries the indexer's gradient."""

    kl: Tensor  # KL(target || indexer), nats
    uniform: Tensor  # what it would be if the indexer gave every entry the same score
    tokens: Tensor  # int64: tokens that had a choice


def indexer_loss_reference(
    queries: Tensor,
    keys: Tensor,
    weights: Tensor,
    attention: Attended,
    blocks: Blocks,
    valid: Tensor,
    selected: Tensor | None = None,
) -> IndexerLoss:
    """``indexer_loss`` written for reading, the oracle of the tests: ``[B, T, H, N]`` at once, gradient by autograd."""
    entry = torch.arange(keys.shape[1], device=keys.device)
    allowed = (entry >= blocks.first.unsqueeze(-1)) & (entry < blocks.end.unsqueeze(-1))  # [B, T, N]
    if selected is not None:
        allowed &= (entry.view(1, 1, 1, -1) == selected.unsqueeze(-1)).any(2)
    q, entries, lse = attention
    logits = torch.einsum("bthc,bnc->bthn", q, entries).to(lse.dtype) * q.shape[-1] ** -0.5 - lse.unsqueeze(-1)
    mass = (logits.exp().sum(2) * allowed).detach()
    chosen = valid & (mass.sum(-1) > 0)
    target = (mass / mass.sum(-1, keepdim=True))[chosen]
    scores = index_scores(queries, keys, weights).masked_fill(~allowed, float("-inf"))[chosen]
    kl = torch.xlogy(target, target) - torch.where(target > 0, target * scores.log_softmax(-1), 0.0)
    uniform = torch.xlogy(target, target).sum(-1) + allowed[chosen].sum(-1).log()
    return IndexerLoss(kl.sum(), uniform.sum(), chosen.sum())


def indexer_loss(
    queries: Tensor,
    keys: Tensor,
    weights: Tensor,
    attention: Attended,
    blocks: Blocks,
    valid: Tensor,
    selected: Tensor | None = None,
) -> IndexerLoss:
    """KL divergence of the indexer's softmax from what the attention heads looked at (recipe 2.5).

    The target is the probability that attention gave to each compressed entry (window and sink in the denominator),
    summed over heads and normalised over the entries; it is a constant. Cost and gradient come portion by portion in
    the forward pass, so that nothing of size T N outlives it.

    Args:
        queries: ``[B, T, I, J]``; keys: ``[B, N, J]``; weights: ``[B, T, I]``, as for ``index_scores``.
        valid: ``[B, T]`` bool, False for padding.
        selected: ``[B, T, k]``, -1 for none: entries to which both distributions are restricted (sparse training);
            None: all visible ones (the warm-up).
    """
    sums: tuple[Tensor, Tensor, Tensor] = _IndexerLoss.apply(
        queries, keys, weights, *attention, blocks, valid, selected
    )
    return IndexerLoss(*sums)


class _IndexerLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        weights: Tensor,
        q: Tensor,
        entries: Tensor,
        lse: Tensor,
        blocks: Blocks,
        valid: Tensor,
        selected: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads = queries.shape[0], queries.shape[2]
        learns = any(ctx.needs_input_grad)
        gradients = (
            [torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (queries, keys, weights)] if learns else []
        )
        sums = torch.zeros(2, dtype=lse.dtype, device=lse.device)
        tokens = torch.zeros((), dtype=torch.long, device=lse.device)
        for start, stop in _portions(valid, max(heads, q.shape[2]), blocks, selected):
            view = View.of(blocks, selected, start, stop - start)
            if not view.hidden.shape[2]:
                continue
            part = slice(start, stop)
            mass = _mass(_logits(q[:, part], entries, view), lse[:, part])
            total = mass.sum(-1, keepdim=True)
            # Where all mass underflows, or nothing is visible, there is no target.
            chosen = valid[:, part].unsqueeze(-1) & (total > torch.finfo(total.dtype).tiny)
            target = torch.where(chosen, mass / total, 0.0)  # [B, t, n]

            own = at_least_fp32(view.keys(keys))
            query, weight = at_least_fp32(queries[:, part]), at_least_fp32(weights[:, part])
            positive = (query.reshape(len(own), -1, query.shape[-1]) @ own.mT).relu_()
            positive = positive.view(batch, stop - start, heads, -1)  # [B, t, I, n]
            scores = (weight.unsqueeze(2) @ positive).squeeze(2) + view.hidden
            scores = torch.where(chosen, scores, 0.0)
            log_softmax = scores.log_softmax(-1)
            entropy = torch.xlogy(target, target).sum()
            sums[0] += entropy - torch.where(target > 0, target * log_softmax, 0.0).sum()
            seen = (view.hidden == 0).sum(-1, keepdim=True)
            sums[1] += entropy + torch.where(chosen, seen, 1).log().sum()
            tokens += chosen.sum()
            if learns:
                slope = torch.where(chosen, log_softmax.exp_() - target, 0.0).unsqueeze(2)  # [B, t, 1, n]
                gradients[2][:, part] = (positive @ slope.mT).squeeze(-1)
                slope = (positive > 0).to(slope.dtype).mul_(slope).mul_(weight.unsqueeze(-1))
                slope = slope.view(len(own), -1, slope.shape[-1])
                gradients[0][:, part] = (slope @ own).view_as(query)
                view.add_gradient(gradients[1], slope.mT @ query.reshape(len(own), -1, query.shape[-1]))
        if learns:
            ctx.save_for_backward(*(g.to(x.dtype) for g, x in zip(gradients, (queries, keys, weights), strict=True)))
        ctx.mark_non_differentiable(tokens)
        return sums[0], sums[1], tokens

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, kl: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient * kl.to(gradient.dtype) for gradient in ctx.saved_tensors), *[None] * 6


@torch.no_grad()
def selection_recall(
    queries: Tensor,
    keys: Tensor,
    weights: Tensor,
    attention: Attended,
    blocks: Blocks,
    valid: Tensor,
    k: int,
    selected: Tensor | None = None,
    samples: int = 512,
) -> tuple[Tensor, Tensor]:
    """How much of the attention mass that the best k entries hold lies on the k that the indexer selects.

    Taken on at most ``samples`` evenly spaced tokens a row, because it needs every score of a token. With ``selected``
    given, ``attention.lse`` is that of the sparse softmax; the mass of the entries left out is added to it, so that
    heads are weighed as dense attention would weigh them.

    Returns:
        sum over tokens of the recall, in [0, 1] each, and their number: those that see more than k entries.
    """
    batch, length = valid.shape
    count = keys.shape[1]
    sums = torch.zeros(2, dtype=attention.lse.dtype, device=keys.device)
    sampled = torch.arange(0, length, -(-length // samples), device=keys.device)
    heads = max(queries.shape[2], attention.q.shape[2])
    for token in sampled.split(max(1, _budget(keys) // (batch * heads * max(count, 1)))) if count > k else ():
        first, end = blocks.first[:, token], blocks.end[:, token]
        view = View.range(first, end, 0, count)
        best = select_top_k(index_scores(queries[:, token], keys, weights[:, token]), first, end, k)
        logits, lse = _logits(attention.q[:, token], attention.entries, view), attention.lse[:, token]
        if selected is not None:
            inside = is_selected(selected[:, token], count).unsqueeze(2)
            lse = torch.logaddexp(lse, logits.masked_fill(inside, float("-inf")).logsumexp(-1))
        mass = _mass(logits, lse)
        caught = mass.gather(-1, best.clamp(min=0)).masked_fill(best < 0, 0.0).sum(-1)
        most = mass.topk(min(k, count), sorted=False).values.sum(-1)
        counted = valid[:, token] & (end - first > k) & (most > 0)
        sums += torch.stack((torch.where(counted, caught / most, 0.0).sum(), counted.sum()))
    recall, tokens = sums.unbind()
    return recall, tokens


def _logits(q: Tensor, entries: Tensor, view: View) -> Tensor:
    """Attention logits ``[B, t, H, n]`` of ``q [B, t, H, C]``, -inf where hidden."""
    keys = view.keys(entries)
    scores = at_least_fp32(q.reshape(len(keys), -1, q.shape[-1]) @ keys.mT).mul_(q.shape[-1] ** -0.5)
    return scores.view(*q.shape[:3], -1).add_(view.hidden.unsqueeze(2))


def _mass(logits: Tensor, lse: Tensor) -> Tensor:
    """Attention probability of each entry, summed over heads, ``[B, t, n]``; overwrites the logits."""
    return logits.sub_(lse.unsqueeze(-1)).exp_().sum(2)


def _budget(like: Tensor) -> int:
    return CPU_ELEMENTS if like.device.type == "cpu" else GPU_ELEMENTS


def _portions(valid: Tensor, heads: int, blocks: Blocks, selected: Tensor | None = None) -> Iterator[tuple[int, int]]:
    """Token ranges of growing distance from the document's start, so of growing sight, whose scores fill the budget."""
    batch, length = valid.shape
    room = _budget(valid) // (batch * heads)  # tokens times entries
    past = (blocks.start.shape[1] - length // blocks.ratio) * blocks.ratio  # of a row that goes on with a document
    start = 0
    while start < length:
        if selected is None:  # tokens * (past + start + tokens) / ratio entries
            before = past + start
            tokens = (math.isqrt(before * before + 4 * room * blocks.ratio) - before) // 2
        else:
            tokens = room // max(selected.shape[2], 1)
        yield start, min(length, start + max(tokens, 1))
        start += max(tokens, 1)
