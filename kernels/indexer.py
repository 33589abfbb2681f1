"""The lightning indexer: cheap scores of compressed entries, and the choice of the best k (its loss: indexer_loss.py).

Shapes: B batch, T tokens, I index heads, J index dim, N compressed entries, k selected, t tokens of a portion or tile,
n entries that it looks at. Source: recipe 2.3; paper eq. 16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import implementation, jit, tl, triton
from .documents import Blocks
from .norm import at_least_fp32
from .numerics import dot, order_of

# Elements of the scores [t, I, n] or [t, H, n] of a portion: in the cache on a CPU, large launches on a GPU.
CPU_ELEMENTS, GPU_ELEMENTS = 2**20, 2**26


def budget(like: Tensor) -> int:
    """Elements of scores that may exist at once."""
    return CPU_ELEMENTS if like.device.type == "cpu" else GPU_ELEMENTS


def portions(valid: Tensor, heads: int, blocks: Blocks, selected: Tensor | None = None) -> Iterator[tuple[int, int]]:
    """Token ranges of growing distance from the document's start, so of growing sight, whose scores fill the budget."""
    batch, length = valid.shape
    room = budget(valid) // (batch * heads)  # tokens times entries
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


def _torch_scores(queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    batch, length, heads, _ = queries.shape
    scores = at_least_fp32(queries).flatten(1, 2) @ at_least_fp32(keys).mT  # [B, T I, N]
    scores = scores.relu_().view(batch * length, heads, keys.shape[1])
    return (at_least_fp32(weights).reshape(batch * length, 1, heads) @ scores).view(batch, length, keys.shape[1])


def _torch_select(scores: Tensor, first: Tensor, end: Tensor, k: int) -> Tensor:
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


def _torch_select_entries(queries: Tensor, keys: Tensor, weights: Tensor, blocks: Blocks, k: int) -> Tensor:
    """``select_entries`` for k <= N, portion by portion."""
    batch, length = queries.shape[:2]
    selected = torch.full((batch, length, k), -1, dtype=torch.long, device=queries.device)
    for start, stop in portions(blocks.end, 1, blocks):  # scores of all heads exist for a tile of entries only
        low, high = blocks.span(start, stop)
        part = slice(start, stop)
        scores = torch.empty(
            batch, stop - start, high - low, dtype=at_least_fp32(queries[:0]).dtype, device=keys.device
        )
        for tile in _tiles(queries[:, part], high - low):
            scores[..., tile] = _torch_scores(queries[:, part], keys[:, low:high][:, tile], weights[:, part])
        first, end = blocks.first[:, part] - low, blocks.end[:, part] - low
        best = _torch_select(scores, first, end, min(k, high - low))
        selected[:, part, : best.shape[2]] = torch.where(best < 0, best, best + low)
    return selected


def _tiles(queries: Tensor, entries: int) -> Iterator[slice]:
    """Ranges of entries whose scores ``[B, t, I, n]`` fill the budget: wide, thin products are half as fast."""
    size = max(1, budget(queries) // max(queries.shape[:3].numel(), 1))
    for start in range(0, entries, size):
        yield slice(start, min(start + size, entries))


# Triton. Scores of a tile are products with a few tokens' heads side by side, [n, t I]: the sum over heads then stays
# within a thread, all but its last steps.

INFINITY: tl.constexpr = tl and tl.constexpr(0x7F800000)
LOWEST: tl.constexpr = tl and tl.constexpr(-(2**31))


@jit
def load_rows(rows, inside, column, DIM: tl.constexpr):
    """Columns of rows at these addresses, 0 where a row is not inside."""
    return tl.load(rows[:, None] + column[None, :], mask=inside[:, None] & (column < DIM)[None, :], other=0.0)


@jit
def _scores(query, weight, key, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """``[n, t]`` of ``query [t I, J]``, ``weight [t I]`` and ``key [n, J]``."""
    product = tl.maximum(dot(key, tl.trans(query)), 0.0) * weight[None, :]
    return tl.sum(tl.reshape(product, [key.shape[0], BLOCK_T, BLOCK_H]), 2)


@jit
def _scores_kernel(
    queries, keys, weights, scores, T, N, SPAN,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores of a few tokens for a span of entries."""
    groups = tl.cdiv(T, BLOCK_T)
    row = (tl.program_id(0) // groups).to(tl.int64)
    t = tl.program_id(0) % groups * BLOCK_T
    line = tl.arange(0, BLOCK_T * BLOCK_H)
    head = (row * T + t + line // BLOCK_H) * HEADS + line % BLOCK_H
    inside = (t + line // BLOCK_H < T) & (line % BLOCK_H < HEADS)
    column = tl.arange(0, BLOCK_D)
    query = load_rows(queries + head * DIM, inside, column, DIM)
    weight = tl.load(weights + head, mask=inside, other=0.0).to(tl.float32)
    lane = t + tl.arange(0, BLOCK_T)
    low = tl.program_id(1) * SPAN
    for at in range(low, tl.minimum(low + SPAN, N), BLOCK_N):
        entry = at + tl.arange(0, BLOCK_N)
        key = load_rows(keys + (row * N + entry) * DIM, entry < N, column, DIM)
        score = _scores(query, weight, key, BLOCK_T, BLOCK_H)
        place = scores + (row * T + lane)[None, :] * N + entry[:, None]
        tl.store(place, score, mask=(lane < T)[None, :] & (entry < N)[:, None])


@jit
def _order(score):
    """int32 in the order of float32 scores: both zeros are one, and NaN counts as infinity."""
    order = order_of(score.to(tl.float32))
    return tl.minimum(tl.where(order == -1, 0, order), INFINITY)


@jit
def _sift(values, names, target, border, count, k, limit, CAPACITY: tl.constexpr, CHUNK: tl.constexpr):
    """Chooses some of the ``count [t]`` candidates that lie in the order of entries at ``values`` and ``names``.

    None is below the border. Those that stay hold the k best: all above a new border, and of those that equal it the
    first until there are k. It is found by halving, until at most ``limit`` >= k are not below it; where there are no
    more, it remains. They stay in place, moved together, or their names go to ``target [t]`` if there is one.

    Returns:
        the new border and count ``[t]``.
    """
    slot = tl.arange(0, CAPACITY)[None, :]
    value = tl.where(slot < count[:, None], tl.load(values[:, None] + slot), LOWEST)
    low = border
    high = tl.full(low.shape, INFINITY + 1, tl.int32)
    size = count
    searched = (size > limit) & (low + 1 < high)
    while tl.max(searched.to(tl.int32), 0) > 0:
        middle = (low & high) + ((low ^ high) >> 1)
        reach = tl.sum((value >= middle[:, None]).to(tl.int32), 1)
        up = searched & (reach >= k)
        high = tl.where(searched & (reach < k), middle, high)
        low = tl.where(up, middle, low)
        size = tl.where(up, reach, size)
        searched = (size > limit) & (low + 1 < high)
    room = tl.maximum(k - tl.sum((value > low[:, None]).to(tl.int32), 1), 0)  # for those at the border
    past = tl.zeros(low.shape, tl.int32)  # how many were above it, and 2^16 times how many at it
    for at in range(0, tl.max(count, 0), CHUNK):
        near = at + tl.arange(0, CHUNK)[None, :]
        moved = tl.where(near < count[:, None], tl.load(values[:, None] + near), LOWEST)
        name = tl.load(names[:, None] + near)
        above = moved > low[:, None]
        level = moved == low[:, None]
        rank = past[:, None] + tl.cumsum(above.to(tl.int32) + (level.to(tl.int32) << 16), 1)
        past += tl.sum(above.to(tl.int32) + (level.to(tl.int32) << 16), 1)
        stays = above | (level & ((rank >> 16) <= room[:, None]))
        place = (rank & 0xFFFF) + tl.minimum(rank >> 16, room[:, None]) - 1
        tl.debug_barrier()  # some may still read what others write
        if target is None:
            tl.store(values[:, None] + place, moved, mask=stays)
            tl.store(names[:, None] + place, name, mask=stays)
        else:
            tl.store(target[:, None] + place, name.to(tl.int64), mask=stays)
    return low, (past & 0xFFFF) + tl.minimum(past >> 16, room)


@jit
def _select_kernel(
    queries, keys, weights, scores, firsts, ends, selected, scratch, T, N, K, rows, limit,
    GIVEN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SECTION: tl.constexpr,
    CAPACITY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The best K visible entries of each token; programs take turns in groups of BLOCK_T tokens.

    Entries come in sections. Of each, the scores that exceed a token's border join its candidates; before these might
    outgrow their memory, they are sifted.
    """
    lane = tl.arange(0, BLOCK_T)
    line = tl.arange(0, BLOCK_T * BLOCK_H)
    column = tl.arange(0, BLOCK_D)
    step = tl.arange(0, SECTION)
    fresh_values = scratch + (tl.program_id(0) * BLOCK_T + lane) * (SECTION + 2 * CAPACITY)
    values = fresh_values + SECTION
    names = values + CAPACITY
    groups = tl.cdiv(T, BLOCK_T)
    for turn in range(tl.program_id(0), rows * groups, tl.num_programs(0)):
        row = (turn % rows).to(tl.int64)
        t = (groups - 1 - turn // rows) * BLOCK_T  # late ones see more: they go first
        token = row * T + t + lane
        first = tl.load(firsts + token, mask=t + lane < T, other=0).to(tl.int32)
        end = tl.load(ends + token, mask=t + lane < T, other=0).to(tl.int32)
        crowded = end - first > K
        low = tl.min(tl.where(crowded, first, N), 0)
        high = tl.max(tl.where(crowded, end, 0), 0)
        if not GIVEN:
            head = (row * T + t + line // BLOCK_H) * HEADS + line % BLOCK_H
            inside = (t + line // BLOCK_H < T) & (line % BLOCK_H < HEADS)
            query = load_rows(queries + head * DIM, inside, column, DIM)
            weight = tl.load(weights + head, mask=inside, other=0.0).to(tl.float32)
        border = tl.full([BLOCK_T], LOWEST + 1, tl.int32)
        count = tl.zeros([BLOCK_T], tl.int32)
        for section in range(low, high, SECTION):
            entry = section + step
            seen = crowded[:, None] & (entry[None, :] >= first[:, None]) & (entry[None, :] < end[:, None])
            if GIVEN:
                fresh = _order(tl.load(scores + token[:, None] * N + entry[None, :], mask=seen, other=0.0))
            else:
                for at in range(section, tl.minimum(section + SECTION, high), BLOCK_N):
                    near = at + tl.arange(0, BLOCK_N)
                    key = load_rows(keys + (row * N + near) * DIM, near < high, column, DIM)
                    score = _scores(query, weight, key, BLOCK_T, BLOCK_H)
                    tl.store(fresh_values[None, :] + (near - section)[:, None], _order(score))
                tl.debug_barrier()
                fresh = tl.load(fresh_values[:, None] + step[None, :])
            joins = seen & (fresh > border[:, None])
            target = count[:, None] + tl.cumsum(joins.to(tl.int32), 1) - 1
            tl.store(values[:, None] + target, fresh, mask=joins)
            tl.store(names[:, None] + target, tl.broadcast_to(entry[None, :], target.shape), mask=joins)
            count += tl.sum(joins.to(tl.int32), 1)
            tl.debug_barrier()
            if tl.max(count, 0) > CAPACITY - SECTION:
                border, count = _sift(values, names, None, border, count, K, limit, CAPACITY, CHUNK)
                tl.debug_barrier()
        if low < high:
            _sift(values, names, selected + token * K, border, count, K, K, CAPACITY, CHUNK)
        choice = tl.arange(0, BLOCK_K)[None, :]
        alone = (t + lane < T)[:, None] & (choice < K) & ~crowded[:, None]
        chosen = tl.where(choice < (end - first)[:, None], first[:, None] + choice, -1)
        tl.store(selected + token[:, None] * K + choice, chosen.to(tl.int64), mask=alone)


# Entries of a section, candidates that are moved at a time, and how many of them a program may hold: in its registers,
# where their border is searched.
SECTION, CHUNK, HELD = 512, 512, 2**12
# More than MOST are not selected here: a candidate's rank has 15 bits. Up to FEW tokens are not worth a program each.
MOST, FEW = 2**13, 16


def _tile(queries: Tensor, k: int) -> dict[str, int]:
    """Tiles of a product with several tokens' queries."""
    heads, dim = queries.shape[2:]
    block_h = max(16, triton.next_power_of_2(heads))
    most = 1 if queries.dtype == torch.float32 else 128 // block_h
    return {
        "HEADS": heads,
        "DIM": dim,
        "BLOCK_T": max(1, min(2, most, HELD // _capacity(k))),
        "BLOCK_H": block_h,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_N": 16 if queries.dtype == torch.float32 else 64,
    }


def _capacity(k: int) -> int:
    return int(triton.next_power_of_2(k + 2 * SECTION))


def _triton_scores(queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    batch, length = queries.shape[:2]
    count = keys.shape[1]
    scores = torch.empty(batch, length, count, dtype=torch.float32, device=queries.device)
    if scores.numel():
        tile = _tile(queries, 0)
        grid = (batch * triton.cdiv(length, tile["BLOCK_T"]), triton.cdiv(count, SECTION))
        operands = (queries.contiguous(), keys.contiguous(), weights.contiguous())
        warps = 8 if queries.dtype == torch.float32 else 4
        _scores_kernel[grid](*operands, scores, length, count, SECTION, **tile, num_warps=warps, num_stages=3)
    return scores


def _triton_select(first: Tensor, end: Tensor, k: int, count: int, operands: tuple[Tensor, ...]) -> Tensor:
    """The choice of 0 < k <= N entries by the scores ``[B, T, N]``, or by those of queries, keys and weights."""
    batch, length = first.shape
    given = len(operands) == 1
    selected = torch.empty(batch, length, k, dtype=torch.long, device=first.device)
    tile = _tile(operands[0][..., :1].unsqueeze(2) if given else operands[0], k)
    capacity = _capacity(k)
    programs = min(batch * triton.cdiv(length, tile["BLOCK_T"]), _programs(first))
    scratch = torch.empty(programs, tile["BLOCK_T"], SECTION + 2 * capacity, dtype=torch.int32, device=first.device)
    operands = tuple(x.contiguous() for x in operands)
    if programs:
        _select_kernel[(programs,)](
            *(operands * 4 if given else (*operands, operands[0])), first.contiguous(), end.contiguous(), selected,
            scratch, length, count, k, batch, k + (capacity - SECTION - k) // 4,
            GIVEN=given, **tile, BLOCK_K=triton.next_power_of_2(k), SECTION=SECTION, CAPACITY=capacity,
            CHUNK=min(CHUNK, capacity), num_warps=4, num_stages=4,
        )  # fmt: skip
    return selected


def _programs(like: Tensor) -> int:
    """Two on each multiprocessor, so that one multiplies while the other sums and sifts."""
    return 2 * torch.cuda.get_device_properties(like.device).multi_processor_count if like.is_cuda else 2


def index_scores(queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """I[t, s] = sum_h w[t, h] * ReLU(q[t, h] . k[s]), ``[B, T, N]``, at least float32.

    Args:
        queries: ``[B, T, I, J]``; keys: ``[B, N, J]``; weights: ``[B, T, I]``, with the scale J^-1/2 I^-1/2 applied.
    """
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (queries, keys, weights))
    scores = _triton_scores if implementation(queries, keys, weights) == "triton" and not learns else _torch_scores
    return scores(queries, keys, weights)


@torch.no_grad()
def select_top_k(scores: Tensor, first: Tensor, end: Tensor, k: int) -> Tensor:
    """The k best visible entries of each token, ascending, ``[B, T, min(k, N)]`` int64; -1 last if fewer are visible.

    Of equal scores at the border the lowest entries win (a zero after ReLU is a common tie, and torch.topk leaves its
    order open).

    Args:
        scores: ``[B, T, N]``; first, end: ``[B, T]``: entries first <= n < end are visible.
    """
    k = min(k, scores.shape[-1])
    if implementation(scores, first, end) == "triton" and 0 < k <= MOST:
        return _triton_select(first, end, k, scores.shape[-1], (scores,))
    return _torch_select(scores.clone(), first, end, k)


@torch.no_grad()
def select_entries(queries: Tensor, keys: Tensor, weights: Tensor, blocks: Blocks, k: int) -> Tensor:
    """``select_top_k`` of ``index_scores``: no ``[T, N]`` scores exist. Arguments as in these two.

    On a GPU the programs keep their candidates in some 40 kB of memory each, whatever T and N are, and a score is
    computed once.

    Returns:
        ``[B, T, min(k, N)]`` int64, ascending, then -1.
    """
    k = min(k, keys.shape[1])
    if implementation(queries, keys, weights, blocks.end) == "triton" and 0 < k <= MOST:
        few = blocks.end.numel() <= FEW  # they get their scores from many programs, which takes little memory
        operands = (_triton_scores(queries, keys, weights),) if few else (queries, keys, weights)
        return _triton_select(blocks.first, blocks.end, k, keys.shape[1], operands)
    return _torch_select_entries(queries, keys, weights, blocks, k)
