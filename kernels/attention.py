"""Core attention of DeepSeek-V4: sliding window and compressed entries under one softmax, with a sink per head.

Shapes: B batch, T tokens, P tokens before them, H heads, C head dim (keys and values are the same vectors), N
compressed entries, W window, k selected entries, c tokens in a chunk, g chunks in a group, t = g c tokens of it, n
entries that it sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import implementation, jit, tl, triton
from .documents import Blocks
from .entries import View, additive_mask, is_selected
from .norm import at_least_fp32
from .numerics import cast, dot


def hybrid_attention_reference(
    q: Tensor,
    kv: Tensor,
    sink: Tensor,
    first: Tensor,
    window: int,
    entries: Tensor | None = None,
    blocks: Blocks | None = None,
    selected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``hybrid_attention`` written for reading, the oracle of the tests: all scores at once, ``[B, T, H, P+T+N]``."""
    heads, dim = q.shape[2:]
    token = torch.arange(q.shape[1], device=q.device)
    key = torch.arange(q.shape[1] - kv.shape[1], q.shape[1], device=q.device)
    distance = token[:, None] - key
    attends = (distance >= 0) & (distance < window) & (key >= first.unsqueeze(-1))  # [B, T, P + T]
    keys = kv
    if entries is not None and blocks is not None:
        attends = torch.cat((attends, _sees(entries, blocks, selected)), 2)
        keys = torch.cat((kv, entries), 1)
    scores = at_least_fp32(torch.einsum("bthc,bsc->bths", q, keys)) * dim**-0.5
    scores = scores.masked_fill(~attends.unsqueeze(2), float("-inf"))
    with_sink = torch.cat((scores, at_least_fp32(sink).view(1, 1, heads, 1).expand(*q.shape[:3], 1)), -1)
    probability = with_sink.softmax(-1)
    out = torch.einsum("bths,bsc->bthc", probability[..., :-1].to(q.dtype), keys)
    return out, with_sink.logsumexp(-1).detach()


# Elements of a group's scores. On a CPU they stay in the cache; a GPU wants large launches.
CPU_ELEMENTS, GPU_ELEMENTS = 2**18, 2**26


class _Group(NamedTuple):
    """Whole chunks of tokens, of all rows, and the keys they reach."""

    start: int
    tokens: int  # t, may exceed what is left of the row
    near: Tensor  # [B g, c + reach, C] of the window
    near_hidden: Tensor  # [B, t, 1, c + reach] 0 or -inf
    far: View | None


def _product(rows: Tensor, matrices: Tensor) -> Tensor:
    """``rows [B, t, H, x]`` times ``matrices [b, x, y]``, each of which serves an equal share of consecutive rows."""
    return (rows.view(len(matrices), -1, rows.shape[-1]) @ matrices).view(*rows.shape[:3], -1)


def _groups(
    q: Tensor, kv: Tensor, first: Tensor, window: int, blocks: Blocks | None, selected: Tensor | None
) -> Iterator[_Group]:
    batch, length, heads, _ = q.shape
    # A chunk's matrix product covers c + W - 1 keys of which each token wants W: smaller chunks waste less, but thin
    # products are slow. Half a window is the best of what was measured (2 cores; W 64 and 128).
    chunk = min(max(window // 2, 16), length)
    reach = min(window, kv.shape[1]) - 1
    width = chunk + reach
    farthest = 0 if blocks is None else (blocks.start.shape[1] if selected is None else selected.shape[2])
    budget = CPU_ELEMENTS if q.device.type == "cpu" else GPU_ELEMENTS
    chunks = -(-length // chunk)
    many = min(chunks, max(1, budget // (batch * chunk * heads * (width + farthest))))
    past = kv.shape[1] - length
    padded = F.pad(kv, (0, 0, reach - past, chunks * chunk - length))
    for at in range(0, chunks, many):
        count = min(many, chunks - at)
        start, tokens = at * chunk, count * chunk
        near = padded[:, start : start + tokens + reach].unfold(1, width, chunk).mT  # [B, g, c + reach, C]
        query = torch.arange(start, start + tokens, device=q.device).view(count, chunk, 1)
        key = torch.arange(width, device=q.device) + query[:, :1] - reach  # [g, 1, c + reach]
        begin = F.pad(first[:, start : start + tokens], (0, max(0, start + tokens - length)), value=length)
        unseen = (key > query) | (key <= query - window) | (key < begin.view(batch, count, chunk, 1))
        hidden = additive_mask(unseen)
        view = None if blocks is None else View.of(blocks, selected, start, tokens)
        view = view if view is not None and view.hidden.shape[2] else None
        yield _Group(start, tokens, near.flatten(0, 1), hidden.view(batch, tokens, 1, width), view)


def _cut(x: Tensor, group: _Group) -> Tensor:
    """The group's tokens of ``[B, T, ...]``, contiguous, with zeros beyond the end."""
    part = x[:, group.start : group.start + group.tokens]
    if beyond := group.tokens - part.shape[1]:
        part = F.pad(part, (0, 0) * (x.dim() - 2) + (0, beyond))
    return part.contiguous()


class _HybridAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        sink: Tensor,
        first: Tensor,
        window: int,
        entries: Tensor | None,
        blocks: Blocks | None,
        selected: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[:3], dtype=at_least_fp32(q[:0]).dtype, device=q.device)
        logit = sink.to(lse.dtype)
        for group in _groups(q, kv, first, window, blocks, selected):
            scaled = _cut(q, group).mul(q.shape[-1] ** -0.5)
            keys = None if group.far is None or entries is None else group.far.keys(entries)
            near = at_least_fp32(_product(scaled, group.near.mT)).add_(group.near_hidden)
            far = None
            if group.far is not None and keys is not None:
                far = at_least_fp32(_product(scaled, keys.mT)).add_(group.far.hidden.unsqueeze(2))
            top = torch.maximum(near.amax(-1), logit)
            if far is not None:
                top = torch.maximum(top, far.amax(-1))
            near.sub_(top.unsqueeze(-1)).exp_()
            total = near.sum(-1).add_((logit - top).exp_())
            part = at_least_fp32(_product(near.to(q.dtype), group.near))
            if far is not None and keys is not None:
                far.sub_(top.unsqueeze(-1)).exp_()
                total += far.sum(-1)
                part += _product(far.to(q.dtype), keys)
            stop = min(group.start + group.tokens, q.shape[1])
            kept = stop - group.start
            out[:, group.start : stop] = part.div_(total.unsqueeze(-1))[:, :kept]
            lse[:, group.start : stop] = total.log_().add_(top)[:, :kept]
        ctx.save_for_backward(q, kv, sink, first, entries, selected, out, lse)
        ctx.window, ctx.blocks = window, blocks
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, out_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, sink, first, entries, selected, out, lse = ctx.saved_tensors
        window, scale = ctx.window, q.shape[-1] ** -0.5
        batch, length, _, dim = q.shape
        q_gradient = torch.empty_like(q, memory_format=torch.contiguous_format)
        # Sums over many groups are kept in float32.
        reach = min(window, kv.shape[1]) - 1
        kv_gradient = torch.zeros(batch, reach + length + 2 * max(window, 16), dim, dtype=lse.dtype, device=q.device)
        entry_gradient = None if entries is None else torch.zeros(entries.shape, dtype=lse.dtype, device=q.device)
        sink_gradient = torch.zeros_like(sink, dtype=lse.dtype)
        for group in _groups(q, kv, first, window, ctx.blocks, selected):
            scaled, upper = _cut(q, group).mul(scale), _cut(out_gradient, group)
            delta = (at_least_fp32(upper) * _cut(out, group)).sum(-1, keepdim=True)  # [B, t, H, 1]
            log_total = _cut(lse, group).unsqueeze(-1)
            stop = min(group.start + group.tokens, length)
            kept = slice(0, stop - group.start)
            share = (sink.to(lse.dtype).view(1, 1, -1, 1) - log_total[:, kept]).exp_()
            sink_gradient -= (share * delta[:, kept]).sum((0, 1, 3))
            pair, swapped = torch.cat((scaled, upper), 2), torch.cat((upper, scaled), 2)  # [B, t, 2 H, C]
            part, gradient = _pull_back(pair, swapped, group.near, group.near_hidden, log_total, delta)
            _overlap_add(kv_gradient, gradient.view(batch, -1, *gradient.shape[1:]), group, reach)
            if group.far is not None and entries is not None and entry_gradient is not None:
                keys, hidden = group.far.keys(entries), group.far.hidden.unsqueeze(2)
                far_part, gradient = _pull_back(pair, swapped, keys, hidden, log_total, delta)
                part += far_part
                group.far.add_gradient(entry_gradient, at_least_fp32(gradient))
            q_gradient[:, group.start : stop] = part.mul_(scale)[:, kept]
        kv_gradient = kv_gradient[:, reach + length - kv.shape[1] : reach + length].to(kv.dtype)
        if entry_gradient is not None:
            entry_gradient = entry_gradient.to(entries.dtype)
        return q_gradient, kv_gradient, sink_gradient.to(sink.dtype), None, None, entry_gradient, None, None


def _pull_back(
    pair: Tensor, swapped: Tensor, keys: Tensor, hidden: Tensor, log_total: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of scaled queries ``[B, t, H, C]`` and of keys ``[b, x, C]``.

    The queries and the gradients of their outputs, one above the other (``pair``, and in reverse order ``swapped``),
    meet the keys in one product, and so do probabilities and slopes on the way back: thin products are slow.
    """
    heads = delta.shape[2]
    both = at_least_fp32(_product(pair, keys.mT))  # [B, t, 2 H, x]
    scores, upper = both[:, :, :heads], both[:, :, heads:]
    probability = scores.add_(hidden).sub_(log_total).exp_()
    slope = upper.sub_(delta).mul_(probability)
    both = both.to(pair.dtype)
    gradient = both.view(len(keys), -1, both.shape[-1]).mT @ swapped.view(len(keys), -1, swapped.shape[-1])
    return at_least_fp32(_product(slope.to(pair.dtype).contiguous(), keys)), gradient


def _overlap_add(total: Tensor, gradient: Tensor, group: _Group, reach: int) -> None:
    """Adds the gradient ``[B, g, c + reach, C]`` of overlapping keys to that of the row, ``[B, reach + T + .., C]``."""
    count, width = gradient.shape[1:3]
    chunk = width - reach
    for piece in range(0, width, chunk):
        size = min(chunk, width - piece)
        target = total[:, group.start + piece : group.start + piece + count * chunk]
        target.view(len(total), count, chunk, -1)[:, :, :size] += gradient[:, :, piece : piece + size]


def _sees(entries: Tensor, blocks: Blocks, selected: Tensor | None) -> Tensor:
    """Which entries each token attends to, ``[B, T, N]`` bool."""
    count = entries.shape[1]
    if selected is None:
        entry = torch.arange(count, device=entries.device)
        return (entry >= blocks.first.unsqueeze(-1)) & (entry < blocks.end.unsqueeze(-1))
    return is_selected(selected, count)


# Triton. The heads of a token share its keys, so they are the rows of a tile; the keys are a list of slots, first the
# window's tokens and then the entries. All are read from one tensor, kv and entries in a row: [B, R, C], R = P + T + N.

LOG2E: tl.constexpr = tl and tl.constexpr(math.log2(math.e))
# Which entries a token attends to: none, a range of them, or chosen ones.
NONE: tl.constexpr = tl and tl.constexpr(0)
RANGE: tl.constexpr = tl and tl.constexpr(1)
CHOSEN: tl.constexpr = tl and tl.constexpr(2)


@jit
def _list(first, begins, ends, selected, token, T, P, K, W, ENTRIES: tl.constexpr, BLOCK_K: tl.constexpr):
    """A token's list: its window's first token, how many tokens follow from there, its first entry, all slots."""
    t = (token % T).to(tl.int32)
    low = tl.maximum(tl.maximum(tl.load(first + token).to(tl.int32), t - W + 1), -P)
    near = t - low + 1
    begin = 0
    far = 0
    if ENTRIES == RANGE:
        begin = tl.load(begins + token).to(tl.int32)
        far = tl.load(ends + token).to(tl.int32) - begin
    if ENTRIES == CHOSEN:
        slot = tl.arange(0, BLOCK_K)
        entry = tl.load(selected + token * K + slot, mask=slot < K, other=-1)
        far = tl.max(tl.where(entry >= 0, slot + 1, 0))
    return low, near, begin, near + far


@jit
def _keys(selected, token, slot, low, near, begin, slots, T, P, K, ENTRIES: tl.constexpr):
    """Rows of the keys in these slots, -1 where there is none."""
    row = P + low + slot
    if ENTRIES == RANGE:
        row = tl.where(slot < near, row, P + T + begin + slot - near)
    if ENTRIES == CHOSEN:
        inside = (slot >= near) & (slot < slots)
        entry = tl.load(selected + token * K + slot - near, mask=inside, other=-1).to(tl.int32)
        row = tl.where(slot < near, row, tl.where(entry < 0, -1, P + T + entry))
    return tl.where(slot < slots, row, -1)


@jit
def _load(rows, inside, column, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Columns of rows at these addresses, 0 where a row is not inside."""
    if C % BLOCK_C == 0:
        return tl.load(rows[:, None] + column[None, :], mask=inside[:, None], other=0.0)
    else:
        return tl.load(rows[:, None] + column[None, :], mask=inside[:, None] & (column < C)[None, :], other=0.0)


@jit
def _store(rows, inside, column, value, C: tl.constexpr):
    """As ``_load`` reads, rounded to the dtype of what is pointed to."""
    value = cast(value, rows.dtype.element_ty)
    tl.store(rows[:, None] + column[None, :], value, mask=inside[:, None] & (column < C)[None, :])


@jit
def _attention_forward_kernel(
    q, keys, sink, first, begins, ends, selected, out, lse, q_b, q_t, q_h, scale, T, P, H, R, K, W,
    ENTRIES: tl.constexpr, C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Output and logarithm of the denominator of some heads of one token."""
    token = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)  # late ones see more: they go first
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_C)
    keys += token // T * R * C
    low, near, begin, slots = _list(first, begins, ends, selected, token, T, P, K, W, ENTRIES, BLOCK_K)
    query = _load(q + token // T * q_b + token % T * q_t + head * q_h, head < H, column, C, BLOCK_C)
    top = tl.load(sink + head, mask=head < H, other=0.0).to(tl.float32) * LOG2E
    mass = tl.full([BLOCK_H], 1.0, tl.float32)
    total = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    for at in range(0, slots, BLOCK_N):
        row = _keys(selected, token, at + tl.arange(0, BLOCK_N), low, near, begin, slots, T, P, K, ENTRIES)
        key = _load(keys + row.to(tl.int64) * C, row >= 0, column, C, BLOCK_C)
        probability, shrink = tl.zeros([BLOCK_H, BLOCK_N], key.dtype), tl.full([BLOCK_H], 1.0, tl.float32)
        if at < slots:  # as ever, but it hides from the compiler that one product feeds the other: it would give whole
            # rows of the scores to each warp, and as 64 rows are too few for 8 warps, compute each score twice
            score = dot(query, tl.trans(key)) * (scale * LOG2E)
            score = tl.where((row >= 0)[None, :], score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None])
            shrink = tl.exp2(top - higher)
            mass = mass * shrink + tl.sum(weight, 1)
            probability = cast(weight, key.dtype)
            top = higher
        total = dot(probability, key, total * shrink[:, None])
    _store(out + (token * H + head) * C, head < H, column, total / mass[:, None], C)
    tl.store(lse + token * H + head, (top + tl.log2(mass)) / LOG2E, mask=head < H)


@jit
def _pair_row(row):
    """The place of a head's row in a tile of pairs. The second of the pair stands 8 below, in the same thread."""
    return row // 8 * 16 + row % 8


@jit
def _pair(
    q, upper, token, T, q_b, q_t, q_h, u_b, u_t, u_h, H, column, C: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Some heads' queries, paired with the gradients of their outputs: one operand ``[2 BLOCK_H, BLOCK_C]``."""
    row = tl.arange(0, 2 * BLOCK_H)
    head = tl.program_id(1) * BLOCK_H + row // 16 * 8 + row % 8
    query = q + token // T * q_b + token % T * q_t + head * q_h
    slope_out = upper + token // T * u_b + token % T * u_t + head * u_h
    return _load(tl.where(row // 8 % 2 == 0, query, slope_out), head < H, column, C, BLOCK_C)


@jit
def _attention_slopes_kernel(
    q, upper, out, keys, sink, lse, first, begins, ends, selected, both, sink_parts, start,
    q_b, q_t, q_h, u_b, u_t, u_h, scale, T, P, H, R, K, W, S,
    ENTRIES: tl.constexpr, C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Of a chunk's tokens, gradients of scores paired with probabilities, ``both [t, groups, 2 BLOCK_H, S]``."""
    token = start + tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_C)
    keys += token // T * R * C
    low, near, begin, slots = _list(first, begins, ends, selected, token, T, P, K, W, ENTRIES, BLOCK_K)
    slope_out = _load(upper + token // T * u_b + token % T * u_t + head * u_h, head < H, column, C, BLOCK_C)
    result = _load(out + (token * H + head) * C, head < H, column, C, BLOCK_C)
    mean = tl.sum(slope_out.to(tl.float32) * result.to(tl.float32), 1)
    log_total = tl.load(lse + token * H + head, mask=head < H, other=0.0)
    logit = tl.load(sink + head, mask=head < H, other=0.0).to(tl.float32)
    tl.store(sink_parts + token * H + head, -tl.exp(logit - log_total) * mean, mask=head < H)
    if PAIRS:
        query = _pair(q, upper, token, T, q_b, q_t, q_h, u_b, u_t, u_h, H, column, C, BLOCK_H, BLOCK_C)
    else:
        query = _load(q + token // T * q_b + token % T * q_t + head * q_h, head < H, column, C, BLOCK_C)
    place = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (2 * BLOCK_H)
    place = (place + _pair_row(tl.arange(0, BLOCK_H))) * S
    row = _keys(selected, token, tl.arange(0, BLOCK_N), low, near, begin, slots, T, P, K, ENTRIES)
    key = _load(keys + row.to(tl.int64) * C, row >= 0, column, C, BLOCK_C)
    for at in range(0, slots, BLOCK_N):
        slot = at + tl.arange(0, BLOCK_N)
        # The next tile is on its way to registers while this one is multiplied.
        later = _keys(selected, token, slot + BLOCK_N, low, near, begin, slots, T, P, K, ENTRIES)
        key_later = _load(keys + later.to(tl.int64) * C, later >= 0, column, C, BLOCK_C)
        score = dot(query, tl.trans(key))
        if PAIRS:
            product = tl.permute(tl.reshape(score, [BLOCK_H // 8, 2, 8, BLOCK_N]), [0, 2, 3, 1])
            score, gain = tl.split(tl.reshape(product, [BLOCK_H, BLOCK_N, 2]))
        else:
            gain = dot(slope_out, tl.trans(key))
        score = tl.where((row >= 0)[None, :], score * (scale * LOG2E), float("-inf"))
        probability = tl.exp2(score - (log_total * LOG2E)[:, None])
        slope = probability * (gain - mean[:, None]) * scale
        tile = both + place[:, None] + slot[None, :]
        tl.store(tile, cast(slope, both.dtype.element_ty))
        tl.store(tile + 8 * S, cast(probability, both.dtype.element_ty))
        row, key = later, key_later


@jit
def _attention_products_kernel(
    q, upper, keys, both, first, begins, ends, selected, q_gradient, parts, start,
    q_b, q_t, q_h, u_b, u_t, u_h, T, P, H, R, K, W, S,
    ENTRIES: tl.constexpr, C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Some channels of a query's gradient, and of what it adds to the gradients of its keys, ``[t, groups, S, C]``."""
    token = start + tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    keys += token // T * R * C
    low, near, begin, slots = _list(first, begins, ends, selected, token, T, P, K, W, ENTRIES, BLOCK_K)
    pair = _pair(q, upper, token, T, q_b, q_t, q_h, u_b, u_t, u_h, H, column, C, BLOCK_H, BLOCK_C)
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    parts += place * S * C
    both += place * (2 * BLOCK_H) * S
    total = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    for at in range(0, slots, BLOCK_N):
        slot = at + tl.arange(0, BLOCK_N)
        row = _keys(selected, token, slot, low, near, begin, slots, T, P, K, ENTRIES)
        key = _load(keys + row.to(tl.int64) * C, row >= 0, column, C, BLOCK_C)
        slope = tl.load(both + _pair_row(tl.arange(0, BLOCK_H))[:, None] * S + slot[None, :])
        total = dot(slope, key, total)
        slope_and_probability = tl.load(both + tl.arange(0, 2 * BLOCK_H)[:, None] * S + slot[None, :])
        part = dot(tl.trans(slope_and_probability), pair)
        _store(parts + slot.to(tl.int64) * C, slot < slots, column, part, C)
    _store(q_gradient + (token * H + head) * C, head < H, column, total, C)


@jit
def _attention_collect_kernel(
    parts, total, first, begins, ends, order, bounds, origin, start, stop, T, P, R, K, W, S, N, GROUPS,
    ENTRIES: tl.constexpr, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds to the gradient of one key what a chunk's tokens found, in their order. N: keys of a row that are summed."""
    place = origin + tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    base = place // N * T
    key = (place % N).to(tl.int32)
    if ENTRIES == CHOSEN:
        low = tl.load(bounds + place)
        high = tl.load(bounds + place + 1)
    elif ENTRIES == RANGE:
        low = tl.maximum(base, start)
        high = tl.minimum(base + T, stop)
    else:
        key -= P
        low = tl.maximum(base + tl.maximum(key, 0), start)
        high = tl.minimum(base + tl.minimum(key + W, T), stop)
    row = place // N * R + P + key
    if ENTRIES != NONE:
        row += T
    found = tl.zeros([BLOCK_C], tl.float32)
    for at in range(low, high, BLOCK_T):
        at_token = at + tl.arange(0, BLOCK_T)
        seen = at_token < high
        if ENTRIES == CHOSEN:
            at_slot = tl.load(order + at_token, mask=seen, other=0)
            at_token = start + at_slot // K
        t = (at_token - base).to(tl.int32)
        near_low = tl.maximum(tl.load(first + at_token, mask=seen, other=0).to(tl.int32), t - W + 1)
        near_low = tl.maximum(near_low, -P)
        near = t - near_low + 1
        if ENTRIES == CHOSEN:
            slot = near + (at_slot % K).to(tl.int32)
        elif ENTRIES == RANGE:
            begin = tl.load(begins + at_token, mask=seen, other=0).to(tl.int32)
            seen = seen & (key >= begin) & (key < tl.load(ends + at_token, mask=seen, other=0).to(tl.int32))
            slot = near + key - begin
        else:
            seen = seen & (key >= near_low)
            slot = key - near_low
        for group in range(GROUPS):
            part = _load(parts + (((at_token - start) * GROUPS + group) * S + slot) * C, seen, column, C, BLOCK_C)
            found += tl.sum(part.to(tl.float32), 0)
    if low < high:
        at_row = total + row * C + column
        tl.store(at_row, tl.load(at_row, mask=column < C, other=0.0) + found, mask=column < C)


# Bytes that a chunk of the backward pass may take. A pair of token and key takes C + 2 H numbers, 1.3 KB in V4-Flash,
# which are written once and read once: the gradients of keys need no atomic additions, whose order is left to chance.
SCRATCH = 2**30


class _Lists(NamedTuple):
    """Who attends to what, as kernels take it."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]  # first, begins, ends, selected
    numbers: tuple[int, int, int, int, int, int]  # T, P, H, R, K, W
    entries: Any  # NONE, RANGE or CHOSEN
    slots: int  # S, what a list may hold

    @classmethod
    def of(
        cls,
        q: Tensor,
        kv: Tensor,
        first: Tensor,
        window: int,
        count: int,
        blocks: Blocks | None,
        selected: Tensor | None,
    ) -> _Lists:
        length, heads, past = q.shape[1], q.shape[2], kv.shape[1] - q.shape[1]
        first = first.contiguous()
        begins = ends = chosen = first
        kind, far = NONE, 0
        if blocks is not None and selected is None:
            kind, far = RANGE, count
            begins, ends = blocks.first.contiguous(), blocks.end.contiguous()
        elif blocks is not None and selected is not None and selected.shape[2]:
            kind, far = CHOSEN, selected.shape[2]
            chosen = selected.contiguous()
        slots = triton.cdiv(max(1, min(window, kv.shape[1]) + far), 64) * 64  # a multiple of any BLOCK_N
        numbers = (length, past, heads, kv.shape[1] + count, far, window)
        return cls((first, begins, ends, chosen), numbers, kind, slots)


def _blocks(q: Tensor, lists: _Lists) -> dict[str, int]:
    """Tiles of heads, keys and channels, as large as a multiprocessor holds; float32 is multiplied in registers."""
    heads, dim = q.shape[2:]
    channels = max(16, triton.next_power_of_2(dim))
    rows, keys = (2**13, 2**13) if q.dtype == torch.float32 else (2**15, 2**14)
    return {
        "ENTRIES": lists.entries,
        "C": dim,
        "BLOCK_H": max(16, min(64, triton.next_power_of_2(heads), rows // channels)),
        "BLOCK_N": max(16, min(64, keys // channels)),
        "BLOCK_C": channels,
        "BLOCK_K": triton.next_power_of_2(max(1, lists.numbers[4])),
    }


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        sink: Tensor,
        first: Tensor,
        window: int,
        entries: Tensor | None,
        blocks: Blocks | None,
        selected: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        batch, length, heads, dim = q.shape
        lists = _Lists.of(q, kv, first, window, 0 if entries is None else entries.shape[1], blocks, selected)
        tiles = _blocks(q, lists)
        keys = kv.contiguous() if entries is None else torch.cat((kv, entries), 1)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        rows = _unit_stride(q)
        if batch * length:
            _attention_forward_kernel[(batch * length, triton.cdiv(heads, tiles["BLOCK_H"]))](
                rows, keys, sink, *lists.tensors, out, lse, *rows.stride()[:3], dim**-0.5, *lists.numbers,
                **tiles, num_warps=8, num_stages=7 if lists.entries == CHOSEN else 4,
            )  # fmt: skip
        ctx.save_for_backward(q, kv, sink, first, entries, selected, out, lse)
        ctx.window, ctx.blocks = window, blocks
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, out_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, sink, first, entries, selected, out, lse = ctx.saved_tensors
        batch, length, heads, dim = q.shape
        count = 0 if entries is None else entries.shape[1]
        lists = _Lists.of(q, kv, first, ctx.window, count, ctx.blocks, selected)
        tiles = _blocks(q, lists)
        tiles["BLOCK_N"] = min(64, 2 * tiles["BLOCK_N"])  # one tile of keys at a time, not four
        keys = kv.contiguous() if entries is None else torch.cat((kv, entries), 1)
        groups = triton.cdiv(heads, tiles["BLOCK_H"])
        rows, upper = _unit_stride(q), _unit_stride(out_gradient)
        strides = rows.stride()[:3] + upper.stride()[:3]
        q_gradient = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        total = torch.zeros(keys.shape, dtype=torch.float32, device=q.device)
        sink_parts = torch.empty(batch * length, heads, dtype=torch.float32, device=q.device)
        height = 2 * tiles["BLOCK_H"]
        chunk = _chunk(q, groups * (dim + height) * lists.slots * q.element_size())
        both = torch.empty(chunk, groups, height, lists.slots, dtype=q.dtype, device=q.device)
        parts = torch.empty(chunk, groups, lists.slots, dim, dtype=q.dtype, device=q.device)
        for start in range(0, batch * length, chunk):
            stop = min(start + chunk, batch * length)
            _attention_slopes_kernel[(stop - start, groups)](
                rows, upper, out, keys, sink, lse, *lists.tensors, both, sink_parts,
                start, *strides, dim**-0.5, *lists.numbers, lists.slots, **tiles,
                PAIRS=q.dtype != torch.float32,  # which is multiplied in registers, and one product takes too many
                num_warps=8, num_stages=1,
            )  # fmt: skip
            width = min(256, tiles["BLOCK_C"])
            _attention_products_kernel[(stop - start, groups, triton.cdiv(dim, width))](
                rows, upper, keys, both, *lists.tensors, q_gradient, parts,
                start, *strides, *lists.numbers, lists.slots, **tiles | {"BLOCK_C": width}, num_warps=8, num_stages=2,
            )  # fmt: skip
            _collect(parts, total, lists, start, stop)
        kv_gradient = total[:, : kv.shape[1]].to(kv.dtype)
        entry_gradient = None if entries is None else total[:, kv.shape[1] :].to(entries.dtype)
        return q_gradient, kv_gradient, sink_parts.sum(0).to(sink.dtype), None, None, entry_gradient, None, None


def _chunk(q: Tensor, size: int) -> int:
    """Tokens of which each takes ``size`` bytes: all, or what SCRATCH holds, on a GPU in whole waves of programs."""
    tokens = max(1, min(q.shape[0] * q.shape[1], SCRATCH // size))
    if q.is_cuda and tokens < q.shape[0] * q.shape[1]:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
        tokens -= tokens % processors if tokens > processors else 0
    return tokens


def _collect(parts: Tensor, total: Tensor, lists: _Lists, start: int, stop: int) -> None:
    """Sums what the tokens ``start:stop`` of the flattened rows add to the gradients of their keys."""
    first, begins, ends, selected = lists.tensors
    length, past, _, row, k, window = lists.numbers
    tokens, count = past + length, row - past - length
    groups, dim = parts.shape[1], parts.shape[3]
    tiles = {"C": dim, "BLOCK_C": min(128, max(16, triton.next_power_of_2(dim))), "BLOCK_T": 128}
    width = triton.cdiv(dim, tiles["BLOCK_C"])
    numbers = (start, stop, length, past, row, k, window, lists.slots)
    low = start // length * tokens + max(past + start % length - window + 1, 0)
    high = (stop - 1) // length * tokens + past + (stop - 1) % length + 1
    _attention_collect_kernel[(high - low, width)](
        parts, total, first, begins, ends, first, first, low, *numbers, tokens, groups, ENTRIES=NONE, **tiles
    )
    if lists.entries == NONE:
        return
    order = bounds = first
    low, high = start // length * count, ((stop - 1) // length + 1) * count
    if lists.entries == CHOSEN:
        # The chunk's pairs of token and entry by entry, and in the order of tokens.
        entry = selected.view(-1, k)[start:stop]
        row_of = torch.arange(start, stop, device=entry.device).div(length, rounding_mode="floor").unsqueeze(1)
        entry = torch.where(entry < 0, high, entry + row_of * count).int().flatten()
        entry, order = entry.sort(stable=True)
        bounds = torch.searchsorted(entry, torch.arange(high + 1, device=entry.device, dtype=torch.int32))
    _attention_collect_kernel[(high - low, width)](
        parts, total, first, begins, ends, order, bounds, low, *numbers, count, groups, ENTRIES=lists.entries, **tiles
    )


def hybrid_attention(
    q: Tensor,
    kv: Tensor,
    sink: Tensor,
    first: Tensor,
    window: int,
    entries: Tensor | None = None,
    blocks: Blocks | None = None,
    selected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each token over its window and over compressed entries (recipe 2.4, paper eq. 27).

    Costs are linear in T for the window and for selected entries. Nothing that is quadratic, or of size T H k, outlives
    a group of a few hundred tokens: the backward pass computes the scores once more.

    Args:
        q: ``[B, T, H, C]``; kv: ``[B, P + T, C]``, key and value at once, those of P < W earlier tokens first (none
            where one process trains on whole rows); sink: ``[H]``, a logit that enters only the denominator; first:
            ``[B, T]``, first token of each token's document, negative for an earlier one; window: W, the token itself
            included.
        entries: ``[B, N, C]`` compressed keys/values, with ``blocks`` saying who may see which; None for window only.
        selected: ``[B, T, k]`` the entries to attend to, -1 for none; None attends to every visible one.

    Returns:
        output ``[B, T, H, C]`` in the dtype of ``q``, and the logarithm of the softmax's denominator, sink included,
        ``[B, T, H]``, at least float32, without gradient.
    """
    if entries is not None and not entries.shape[1]:
        blocks = None
    chosen = implementation(q, kv, sink, first)
    if chosen == "reference":
        return hybrid_attention_reference(q, kv, sink, first, window, entries, blocks, selected)
    function = _TritonAttention if chosen == "triton" else _HybridAttention
    result: tuple[Tensor, Tensor] = function.apply(q, kv, sink, first, window, entries, blocks, selected)
    return result
