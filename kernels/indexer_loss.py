"""The loss that trains the lightning indexer, and how much of the attention its choice catches.

Shapes: B batch, T tokens, I index heads, J index dim, N compressed entries, k selected, H attention heads, C head dim,
t tokens of a portion or chunk, n entries that it looks at, K slots of a token's list of entries. Source: recipe 2.5.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import implementation, jit, tl, triton
from .documents import Blocks
from .entries import View, is_selected
from .indexer import budget, index_scores, load_rows, portions, select_top_k
from .norm import at_least_fp32
from .numerics import cast, dot


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
        for start, stop in portions(valid, max(heads, q.shape[2]), blocks, selected):
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
            sums[1] += entropy + torch.where(chosen, seen, 1).to(lse.dtype).log().sum()
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


def _logits(q: Tensor, entries: Tensor, view: View) -> Tensor:
    """Attention logits ``[B, t, H, n]`` of ``q [B, t, H, C]``, -inf where hidden."""
    keys = view.keys(entries)
    scores = at_least_fp32(q.reshape(len(keys), -1, q.shape[-1]) @ keys.mT).mul_(q.shape[-1] ** -0.5)
    return scores.view(*q.shape[:3], -1).add_(view.hidden.unsqueeze(2))


def _mass(logits: Tensor, lse: Tensor) -> Tensor:
    """Attention probability of each entry, summed over heads, ``[B, t, n]``; overwrites the logits."""
    return logits.sub_(lse.unsqueeze(-1)).exp_().sum(2)


# Triton. A token's entries are a list of slots: the chosen ones, or a range. They are the rows of a tile and the heads
# its columns, so that sums over heads stay within a thread, all but their last steps.

LOG2E: tl.constexpr = tl and tl.constexpr(math.log2(math.e))
TINY: tl.constexpr = tl and tl.constexpr(torch.finfo(torch.float32).tiny)


@jit
def _list(begins, ends, selected, token, K, CHOSEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """The first entry of a token's list, if that is a range, and how many slots it has."""
    if CHOSEN:
        slot = tl.arange(0, BLOCK_K)
        entry = tl.load(selected + token * K + slot, mask=slot < K, other=-1)
        return 0, tl.max(tl.where(entry >= 0, slot + 1, 0), 0)
    else:
        begin = tl.load(begins + token).to(tl.int32)
        return begin, tl.load(ends + token).to(tl.int32) - begin


@jit
def _entries(selected, token, slot, begin, size, K, CHOSEN: tl.constexpr):
    """The entries in some slots of a token's list, -1 where there is none."""
    if CHOSEN:
        return tl.load(selected + token * K + slot, mask=slot < size, other=-1).to(tl.int32)
    else:
        return tl.where(slot < size, begin + slot, -1)


@jit
def _sum_groups(mass, place, inside, T, K, GROUPS: tl.constexpr):
    """The mass in some places of ``[groups, t, K]``, summed over groups; 0 where not inside."""
    total = tl.load(mass + place, mask=inside, other=0.0)
    for group in tl.static_range(1, GROUPS):
        total += tl.load(mass + group * T * K + place, mask=inside, other=0.0)
    return total


@jit
def _mass_kernel(
    q, entries, lse, begins, ends, selected, mass, start, scale, T, N, K,
    CHOSEN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Attention probability of each entry in a token's list, summed over a group of heads, ``[groups, t, K]``."""
    place = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)  # late ones see more: they go first
    token = start + place
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_D)
    begin, size = _list(begins, ends, selected, token, K, CHOSEN, BLOCK_K)
    query = load_rows(q + (token * HEADS + head) * DIM, head < HEADS, column, DIM)
    shift = tl.load(lse + token * HEADS + head, mask=head < HEADS, other=float("inf")) * LOG2E
    entries += token // T * N * DIM
    mass += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + place) * K
    for at in range(0, size, BLOCK_N):
        slot = at + tl.arange(0, BLOCK_N)
        entry = _entries(selected, token, slot, begin, size, K, CHOSEN)
        key = load_rows(entries + entry.to(tl.int64) * DIM, entry >= 0, column, DIM)
        logit = dot(query, tl.trans(key)) * (scale * LOG2E) - shift[:, None]
        share = tl.sum(tl.exp2(logit), 0)
        tl.store(mass + slot, tl.where(entry >= 0, share, 0.0), mask=slot < size)


@jit
def _token_kernel(
    queries, keys, weights, mass, begins, ends, selected, valid, kls, uniforms, counted, wholes, logs,
    query_gradient, weight_gradient, parts, start, T, N, K,
    GROUPS: tl.constexpr, LEARNS: tl.constexpr, CHOSEN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Divergence and gradients of one token, and what it adds to those of chosen keys, ``parts [t, K, J]``."""
    place = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    token = start + place
    head, column = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    begin, size = _list(begins, ends, selected, token, K, CHOSEN, BLOCK_K)
    query = load_rows(queries + (token * HEADS + head) * DIM, head < HEADS, column, DIM)
    weight = tl.load(weights + token * HEADS + head, mask=head < HEADS, other=0.0).to(tl.float32)
    keys += token // T * N * DIM

    # The denominators, in as many parts as a tile has rows.
    top = tl.full([BLOCK_N], -1e38, tl.float32)
    mantissa = tl.zeros([BLOCK_N], tl.float32)
    found = tl.zeros([BLOCK_N], tl.float32)
    seen = tl.zeros([BLOCK_N], tl.int32)
    for at in range(0, size, BLOCK_N):
        slot = at + tl.arange(0, BLOCK_N)
        entry = _entries(selected, token, slot, begin, size, K, CHOSEN)
        key = load_rows(keys + entry.to(tl.int64) * DIM, entry >= 0, column, DIM)
        score = tl.sum(tl.maximum(dot(key, tl.trans(query)), 0.0) * weight[None, :], 1)
        score = tl.where(entry >= 0, score, float("-inf"))
        higher = tl.maximum(top, score)
        mantissa = mantissa * tl.exp(top - higher) + tl.exp(score - higher)
        top = higher
        found += _sum_groups(mass, place * K + slot, slot < size, tl.num_programs(0), K, GROUPS)
        seen += (entry >= 0).to(tl.int32)
    highest = tl.max(top, 0)
    log_total = highest + tl.log(tl.sum(mantissa * tl.exp(top - highest), 0))
    whole = tl.sum(found, 0)
    counts = tl.load(valid + token) & (whole > TINY)
    # Of a token that does not count, every probability is 0.
    whole = tl.where(counts, whole, float("inf"))
    log_total = tl.where(counts, log_total, float("inf"))
    tl.store(counted + token, counts)
    tl.store(wholes + token, whole)
    tl.store(logs + token, log_total)

    kl = tl.zeros([BLOCK_N], tl.float32)
    entropy = tl.zeros([BLOCK_N], tl.float32)
    slope_query = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    slope_weight = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for at in range(0, size, BLOCK_N):
        slot = at + tl.arange(0, BLOCK_N)
        entry = _entries(selected, token, slot, begin, size, K, CHOSEN)
        key = load_rows(keys + entry.to(tl.int64) * DIM, entry >= 0, column, DIM)
        positive = tl.maximum(dot(key, tl.trans(query)), 0.0)
        score = tl.sum(positive * weight[None, :], 1)
        target = _sum_groups(mass, place * K + slot, slot < size, tl.num_programs(0), K, GROUPS) / whole
        logarithm = tl.log(tl.where(target > 0, target, 1.0))
        kl += tl.where(target > 0, target * (logarithm - (score - log_total)), 0.0)
        entropy += target * logarithm
        if LEARNS:
            slope = tl.exp(tl.where(entry >= 0, score, float("-inf")) - log_total) - target
            slope_weight += positive * slope[:, None]
            pull = cast(tl.where(positive > 0, slope[:, None] * weight[None, :], 0.0), key.dtype)
            slope_query = dot(tl.trans(pull), key, slope_query)
            if CHOSEN:
                part = cast(dot(pull, query), parts.dtype.element_ty)
                inside = (entry >= 0)[:, None] & (column < DIM)[None, :]
                tl.store(parts + (place * K + slot)[:, None] * DIM + column[None, :], part, mask=inside)
    tl.store(kls + token, tl.sum(kl, 0))
    log_seen = tl.log(tl.maximum(tl.sum(seen, 0), 1).to(tl.float32))
    tl.store(uniforms + token, tl.where(counts, tl.sum(entropy, 0) + log_seen, 0.0))
    if LEARNS:
        line = (token * HEADS + head)[:, None] * DIM + column[None, :]
        slope_query = cast(slope_query, query_gradient.dtype.element_ty)
        tl.store(query_gradient + line, slope_query, mask=(head < HEADS)[:, None] & (column < DIM)[None, :])
        slope_weight = cast(tl.sum(slope_weight, 0), weight_gradient.dtype.element_ty)
        tl.store(weight_gradient + token * HEADS + head, slope_weight, mask=head < HEADS)


@jit
def _entry_kernel(
    queries, keys, weights, mass, begins, ends, wholes, logs, lows, highs, total, start, stop, N, K,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds to a part of some keys' gradient, ``total [parts, B N, J]``, from a chunk's tokens that see them."""
    tiles = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    entry = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    head, column = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    low = tl.maximum(tl.load(lows + tl.program_id(0)), start)
    high = tl.minimum(tl.load(highs + tl.program_id(0)), stop)
    share = tl.cdiv(tl.maximum(high - low, 0), tl.num_programs(1))
    low += tl.program_id(1) * share
    line = ((tl.program_id(1) * (tl.num_programs(0) // tiles) + row) * N + entry)[:, None] * DIM + column[None, :]
    key = load_rows(keys + (row * N + entry) * DIM, entry < N, column, DIM)
    inside = (entry < N)[:, None] & (column < DIM)[None, :]
    slope_key = tl.load(total + line, mask=inside, other=0.0)
    for token in range(low, tl.minimum(low + share, high)):
        query = load_rows(queries + (token * HEADS + head) * DIM, head < HEADS, column, DIM)
        weight = tl.load(weights + token * HEADS + head, mask=head < HEADS, other=0.0).to(tl.float32)
        begin = tl.load(begins + token).to(tl.int32)
        seen = (entry >= begin) & (entry < tl.load(ends + token).to(tl.int32))
        place = (token - start) * K + entry - begin
        target = _sum_groups(mass, place, seen, stop - start, K, GROUPS) / tl.load(wholes + token)
        positive = tl.maximum(dot(key, tl.trans(query)), 0.0)
        score = tl.sum(positive * weight[None, :], 1)
        slope = tl.exp(tl.where(seen, score, float("-inf")) - tl.load(logs + token)) - target
        pull = cast(tl.where(positive > 0, slope[:, None] * weight[None, :], 0.0), key.dtype)
        slope_key = dot(pull, query, slope_key)
    tl.store(total + line, slope_key, mask=inside)


@jit
def _collect_kernel(
    parts, order, bounds, total, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """Adds to the gradient of one key what a chunk's tokens that chose it found, in their order."""
    entry = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    low, high = tl.load(bounds + entry), tl.load(bounds + entry + 1)
    found = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for at in range(low, high, BLOCK_T):
        pair = at + tl.arange(0, BLOCK_T)
        place = tl.load(order + pair, mask=pair < high, other=0)
        found += load_rows(parts + place * DIM, pair < high, column, DIM).to(tl.float32)
    if low < high:
        line = total + entry * DIM + column
        tl.store(line, tl.load(line, mask=column < DIM, other=0.0) + tl.sum(found, 0), mask=column < DIM)


# Bytes that a chunk of tokens may take. The gradient of all keys is shared by PROGRAMS, of which each takes at least so
# many tokens; constants, so that sums have the same order on every device.
SCRATCH, PROGRAMS, TOKENS = 2**29, 1024, 64


def _tile(rows: Tensor, most: int, many: int) -> dict[str, int]:
    """Tiles of entries, and of at most so many heads; float32 is multiplied in registers, which hold less."""
    heads, dim = rows.shape[2:]
    return {
        "HEADS": heads,
        "DIM": dim,
        "BLOCK_H": min(most, max(16, triton.next_power_of_2(heads))),
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_N": 16 if rows.dtype == torch.float32 else many,
    }


def _seers(blocks: Blocks, size: int) -> tuple[Tensor, Tensor]:
    """Of each tile of entries, the first of the flattened tokens that see any of it, and one past the last of them."""
    batch, length = blocks.end.shape
    edge = torch.arange(0, blocks.start.shape[1], size, device=blocks.end.device).expand(batch, -1).contiguous()
    row = torch.arange(0, batch * length, length, device=edge.device).unsqueeze(1)
    low = torch.searchsorted(blocks.end.contiguous(), edge, right=True)  # in a row, both bounds only grow
    high = torch.searchsorted(blocks.first.contiguous(), edge + size)
    return (low + row).flatten(), (high + row).flatten()


def _choosers(selected: Tensor, start: int, length: int, count: int, entries: int) -> tuple[Tensor, Tensor]:
    """The pairs of token and slot of ``selected [t, k]``, by entry, then by token, and where each entry's begin."""
    row = torch.arange(start, start + len(selected), device=selected.device).div(length, rounding_mode="floor")
    entry = torch.where(selected < 0, entries, selected + row.unsqueeze(1) * count).int().flatten()
    entry, order = entry.sort(stable=True)
    return order, torch.searchsorted(entry, torch.arange(entries + 1, device=entry.device, dtype=torch.int32))


class _TritonIndexerLoss(torch.autograd.Function):
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
        learns, device = any(ctx.needs_input_grad), keys.device
        queries, keys, weights, q, entries, lse = (x.contiguous() for x in (queries, keys, weights, q, entries, lse))
        (batch, length), (_, count, dim) = valid.shape, keys.shape
        slots = count if selected is None else selected.shape[2]
        tokens = batch * length
        make = torch.empty if tokens * slots else torch.zeros
        kl, uniform, whole, log_total = (make(tokens, device=device) for _ in range(4))
        counted = make(tokens, dtype=torch.bool, device=device)
        query_gradient, weight_gradient = (
            make(x.shape if learns else 0, dtype=x.dtype, device=device) for x in (queries, weights)
        )

        outer, inner = _tile(q, 16 if q.dtype == torch.float32 else 64, 32), _tile(queries, 2**16, 64)
        groups, places = triton.cdiv(q.shape[2], outer["BLOCK_H"]), batch * triton.cdiv(count, inner["BLOCK_N"])
        shares = max(1, min(PROGRAMS // max(places, 1), tokens // TOKENS)) if learns and selected is None else 1
        key_gradient = torch.zeros(shares, batch * count, dim, device=device)

        # What a thread holds: products of chosen keys too, or float32 operands, which do not go to tensor cores.
        narrow = selected is None and keys.dtype != torch.float32
        ahead = 4 if selected is None else 7  # the entries' names come before they do: four tiles in both cases
        begins, ends, valid = blocks.first.contiguous(), blocks.end.contiguous(), valid.contiguous()
        chosen, most = (begins, 1) if selected is None else (selected.contiguous(), max(slots, 1))
        lists = {"CHOSEN": selected is not None, "BLOCK_K": triton.next_power_of_2(most)}
        width = slots * dim * keys.element_size() if learns and selected is not None else 0
        chunk = max(1, min(tokens, SCRATCH // max(4 * groups * slots + width, 1)))
        mass = torch.empty(groups * chunk * slots, device=device)
        parts = torch.empty(chunk * slots if width else 0, dim, dtype=keys.dtype, device=device)
        for start in range(0, tokens if slots else 0, chunk):
            stop = min(start + chunk, tokens)
            numbers = length, count, slots
            _mass_kernel[(stop - start, groups)](
                q, entries, lse, begins, ends, chosen, mass, start, q.shape[3] ** -0.5, *numbers,
                **lists, **outer, num_warps=8, num_stages=ahead,
            )  # fmt: skip
            _token_kernel[(stop - start,)](
                queries, keys, weights, mass, begins, ends, chosen, valid, kl, uniform, counted, whole, log_total,
                query_gradient, weight_gradient, parts, start, *numbers,
                **lists, **inner, GROUPS=groups, LEARNS=learns,
                num_warps=4 if narrow else 8, num_stages=ahead,
            )  # fmt: skip
            if learns and selected is None:
                _entry_kernel[(places, shares)](
                    queries, keys, weights, mass, begins, ends, whole, log_total,
                    *_seers(blocks, inner["BLOCK_N"]), key_gradient, start, stop, count, slots, **inner, GROUPS=groups,
                    num_warps=4 if narrow else 8, num_stages=3,
                )  # fmt: skip
            elif learns:
                order, bounds = _choosers(chosen.view(tokens, slots)[start:stop], start, length, count, batch * count)
                _collect_kernel[(batch * count,)](
                    parts, order, bounds, key_gradient, DIM=dim, BLOCK_D=inner["BLOCK_D"], BLOCK_T=32
                )
        if learns:
            ctx.save_for_backward(query_gradient, key_gradient.sum(0).view(keys.shape).to(keys.dtype), weight_gradient)
        total = counted.sum()
        ctx.mark_non_differentiable(total)
        return kl.sum(), uniform.sum(), total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, kl: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient * kl.to(gradient.dtype) for gradient in ctx.saved_tensors), *[None] * 6


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
    chosen = implementation(queries, keys, weights, *attention)
    if chosen == "reference":
        return indexer_loss_reference(queries, keys, weights, attention, blocks, valid, selected)
    function = _TritonIndexerLoss if chosen == "triton" else _IndexerLoss
    sums: tuple[Tensor, Tensor, Tensor] = function.apply(queries, keys, weights, *attention, blocks, valid, selected)
    return IndexerLoss(*sums)


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
    for token in sampled.split(max(1, budget(keys) // (batch * heads * max(count, 1)))) if count > k else ():
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
