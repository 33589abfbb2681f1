"""The sequence-wise balance loss of a router, over packed documents.

Shapes: B rows, T tokens of a row, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import implementation, jit, tl, triton
from .router import MOST_EXPERTS, expert_tile

CHUNK = 128  # tokens of a row that one program sums; a document's sum adds such parts in their order


def balance_loss(scores: Tensor, best: Tensor, first: Tensor, valid: Tensor, elsewhere: Tensor | None = None) -> Tensor:
    """Sequence-wise balance loss of each document times its tokens, summed over the documents, 0-dim.

    For a document of n tokens, sum_e f_e P_e with f_e = E / (K n) * #(tokens whose K best scores include e) and
    P_e = mean_t s[t, e] / sum_j s[t, j] (V3's formula, best scores without the selection bias; recipe 3). Weighting by
    tokens makes rows of one document the mean over sequences; under packing nothing is published.

    Args:
        scores: ``[B, T, E]``; best: ``[B, T, K]`` int64, the K best experts by score, all different.
        first: ``[B, T]`` first token of each token's document; valid: ``[B, T]``.
        elsewhere: ``[B, 2, E + 1]`` int64, of rows that are parts of longer ones: what the other parts have of the
            documents of the part's first and last token, namely how often each expert is among the best, and tokens; 0
            for the second if it is the first. ``first`` is then negative where a document begins in another part, and
            the result is what the part's scores add to the loss of whole rows.
    """
    if elsewhere is not None:
        first = first.clamp(min=0)
    experts = scores.shape[-1]
    if scores.numel() and best.numel() and experts <= MOST_EXPERTS and implementation(scores) == "triton":
        loss: Tensor = _Balance.apply(scores, best, first, valid, elsewhere)
        return loss
    row = torch.arange(first.shape[0], device=scores.device).unsqueeze(1)
    document = (first + row * first.shape[1])[valid]  # a document's id is the flat index of its first token
    known, size = document.unique_consecutive(return_counts=True)
    if not len(size):  # segment_reduce refuses an empty batch
        return scores.sum() * 0.0
    scores = scores[valid]  # [tokens, E], the documents one after another
    chosen = torch.zeros_like(scores).scatter(1, best[valid], 1.0)
    times = torch.segment_reduce(chosen, "sum", lengths=size)  # [documents, E]
    mass = torch.segment_reduce(scores / scores.sum(-1, keepdim=True), "sum", lengths=size)
    if elsewhere is not None:
        ends = (first[:, [0, -1]] + row * first.shape[1]).flatten()
        at = torch.searchsorted(known, ends).clamp(max=len(known) - 1)
        more = elsewhere.flatten(0, 1) * (known[at] == ends).unsqueeze(1)  # no document is one of padding
        times = times.index_add(0, at, more[:, :-1].to(times.dtype))
        size = size.index_add(0, at, more[:, -1])
    # n * (E / (K n)) * times * (mass / n)
    total: Tensor = ((times * mass).sum(-1) / size).sum() * (experts / best.shape[-1])
    return total


# Triton. Nothing tells the host how many documents there are: what belongs to one stands at its first token.


@jit
def _part_sums_kernel(
    scores, best, first, valid, mass, times, sizes, length, experts, chunks,
    K: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Of the part of each document within a chunk: shares of the scores, times that an expert is among the best, and
    tokens; at the part's first token."""
    base = (tl.program_id(0) // chunks).to(tl.int64) * length
    start = tl.program_id(0) % chunks * LANES
    stop = tl.minimum(start + LANES, length)
    lane, expert = start + tl.arange(0, LANES), tl.arange(0, EXPERTS)
    firsts = tl.load(first + base + lane, mask=lane < stop, other=-1)
    at = start
    while at < stop:
        document = tl.load(first + base + at)
        part = at
        at += tl.sum((firsts == document).to(tl.int32), 0)
        share, count = tl.zeros((EXPERTS,), tl.float32), tl.zeros((EXPERTS,), tl.float32)
        size = 0
        for top in range(part, at, ROWS):
            row = top + tl.arange(0, ROWS)
            here = row < at
            here = here & (tl.load(valid + base + row, mask=here, other=0) != 0)
            inside = here[:, None] & (expert < experts)[None, :]
            score = tl.load(scores + (base + row)[:, None] * experts + expert[None, :], mask=inside, other=0.0)
            total = tl.sum(score, 1)
            share += tl.sum(score / tl.where(here, total, 1.0)[:, None], 0)
            for k in tl.static_range(K):
                chosen = tl.load(best + (base + row) * K + k, mask=here, other=-1)
                count += tl.sum((chosen[:, None] == expert[None, :]).to(tl.float32), 0)
            size += tl.sum(here.to(tl.int32), 0)
        to = (base + part) * experts + expert
        tl.store(mass + to, share, mask=expert < experts)
        tl.store(times + to, count, mask=expert < experts)
        tl.store(sizes + base + part, size)


@jit
def _documents_kernel(
    first, mass, times, sizes, losses, length, experts, scale, LANES: tl.constexpr, EXPERTS: tl.constexpr
):
    """The loss of each document at its first token, 0 at others; ``times`` becomes the slope of a token's shares."""
    base = (tl.program_id(0) // length).to(tl.int64) * length
    token, expert = tl.program_id(0) % length, tl.arange(0, EXPERTS)
    loss = 0.0
    if tl.load(first + base + token) == token:
        share, count = tl.zeros((EXPERTS,), tl.float32), tl.zeros((EXPERTS,), tl.float32)
        size, part, belongs = 0, token, True
        while belongs:
            at = (base + part) * experts + expert
            share += tl.load(mass + at, mask=expert < experts, other=0.0)
            count += tl.load(times + at, mask=expert < experts, other=0.0)
            size += tl.load(sizes + base + part)
            part = (part // LANES + 1) * LANES
            belongs = tl.load(first + base + part, mask=part < length, other=-1) == token
        slope = count * (scale / tl.maximum(size, 1).to(tl.float32))
        tl.store(times + (base + token) * experts + expert, slope, mask=expert < experts)
        loss = tl.sum(slope * share, 0)
    tl.store(losses + tl.program_id(0), loss)


@jit
def _balance_slopes_kernel(
    scores, first, valid, slope, gradient, to_scores, tokens, length, experts,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """With p = s / sum(s) and m the slope of p: ds = (m - sum(m p)) / sum(s)."""
    row, expert = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, EXPERTS)
    within = row < tokens
    here = within & (tl.load(valid + row, mask=within, other=0) != 0)
    document = row // length * length + tl.load(first + row, mask=here, other=0)
    inside = here[:, None] & (expert < experts)[None, :]
    at = row[:, None] * experts + expert[None, :]
    score = tl.load(scores + at, mask=inside, other=0.0)
    m = tl.load(slope + document[:, None] * experts + expert[None, :], mask=inside, other=0.0)
    total = tl.where(here, tl.sum(score, 1), 1.0)
    shift = tl.sum(m * score, 1) / total
    upper = tl.load(gradient)
    result = tl.where(inside, (m - shift[:, None]) / total[:, None] * upper, 0.0)
    tl.store(to_scores + at, result, mask=within[:, None] & (expert < experts)[None, :])


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, best: Tensor, first: Tensor, valid: Tensor, elsewhere: Tensor | None
    ) -> Tensor:
        scores, best, first = scores.float().contiguous(), best.contiguous(), first.contiguous()
        valid = valid.contiguous().view(torch.uint8)
        (rows, length, experts), k = scores.shape, best.shape[-1]
        mass, times = torch.empty_like(scores), torch.empty_like(scores)
        sizes, losses = scores.new_empty(rows, length, dtype=torch.int32), scores.new_empty(rows * length)
        tile = expert_tile(experts)
        chunks = triton.cdiv(length, CHUNK)
        _part_sums_kernel[(rows * chunks,)](
            scores, best, first, valid, mass, times, sizes, length, experts, chunks,
            K=k, LANES=CHUNK, **tile,
        )  # fmt: skip
        if elsewhere is not None:  # joins the first part of its document
            row = torch.arange(0, rows * length, length, device=first.device).unsqueeze(1)
            at, more = (first[:, [0, -1]] + row).flatten(), elsewhere.flatten(0, 1)
            times.view(-1, experts).index_add_(0, at, more[:, :-1].to(times.dtype))
            sizes.view(-1).index_add_(0, at, more[:, -1].to(sizes.dtype))
        _documents_kernel[(rows * length,)](
            first,
            mass,
            times,
            sizes,
            losses,
            length,
            experts,
            experts / k,
            LANES=CHUNK,
            EXPERTS=tile["EXPERTS"],
            num_warps=1,
        )
        ctx.save_for_backward(scores, first, valid, times)
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scores, first, valid, slope = ctx.saved_tensors
        _, length, experts = scores.shape
        to_scores, tokens = torch.empty_like(scores), first.numel()
        tile = expert_tile(experts)
        _balance_slopes_kernel[(triton.cdiv(tokens, tile["ROWS"]),)](
            scores, first, valid, slope, gradient.contiguous(), to_scores, tokens, length, experts, **tile
        )
        return to_scores, None, None, None, None
