"""Compression of token blocks into single entries, by a softmax over the block, per channel.

Shapes: B batch, T tokens, N entries, C channels of an entry, R rotated pairs. The tokens that an entry pools are its
slots: those of its own block and, where blocks overlap, those of the block before.
Source: recipe 2.2; paper eq. 9-12 and 20-23.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import numerics
from .dispatch import implementation, jit, tl, triton
from .documents import Blocks
from .norm import at_least_fp32, rms_factor, rms_slope
from .rope import norm_rope, rope_tile, turn

HELD = 4096  # numbers of kv that a program holds
# Numbers of all programs' sums for the gradient of the gate's bias. A constant, so that sums have the same order on
# every device: two programs for each multiprocessor of an H100.
PARTS = 264 * HELD


def compress(kv: Tensor, gate: Tensor, position_bias: Tensor, blocks: Blocks, overlap: bool) -> Tensor:
    """Pools every complete block of tokens into one entry, ``[B, N, C]`` (recipe 2.2; paper eq. 9-12 and 20-23).

    Args:
        kv: ``[B, T, C]``, or ``[B, T, 2C]`` with ``overlap``: the first half is what a token gives to the *next* block,
            the second half what it gives to its own.
        gate: of the same shape.
        position_bias: ``[ratio, C or 2C]``, added to the gate by place within the block.
        overlap: CSA pools 2 * ratio slots (previous block and own), HCA only its own.

    Entries that do not exist (see ``Blocks``) hold arbitrary finite numbers. A gradient that they get is lost in
    Triton; in torch, it goes to the first tokens of the row.
    """
    chosen = implementation(kv, gate, position_bias)
    if chosen == "triton":
        dtype = torch.promote_types(torch.promote_types(kv.dtype, gate.dtype), position_bias.dtype)
        entries: Tensor = _Compress.apply(kv, gate, position_bias, None, None, None, blocks, _Options(overlap, dtype))
        return entries
    if chosen == "reference":
        return compress_reference(kv, gate, position_bias, blocks, overlap)
    ratio = position_bias.shape[0]
    rows = torch.arange(kv.shape[0], device=kv.device).view(-1, 1, 1)
    token = blocks.start.unsqueeze(-1) + torch.arange(ratio, device=kv.device)  # [B, N, ratio]
    kv = kv[rows, token]  # [B, N, ratio, C or 2C]
    gate = gate[rows, token] + position_bias
    if overlap:
        alone = ~blocks.chained[:, :, None, None]
        give_kv, own_kv = kv.chunk(2, -1)
        give_gate, own_gate = gate.chunk(2, -1)
        given_gate = _previous(give_gate).masked_fill(alone, float("-inf"))
        kv = torch.cat((_previous(give_kv), own_kv), 2)  # [B, N, 2 ratio, C]
        gate = torch.cat((given_gate, own_gate), 2)
    return (gate.softmax(2) * kv).sum(2)


def _previous(x: Tensor) -> Tensor:
    """Moves entry n - 1 to n; entry 0 is never chained, so what it gets does not matter."""
    return torch.cat((x[:, :1], x[:, :-1]), 1)


def compress_entries(
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    blocks: Blocks,
    overlap: bool,
    weight: Tensor,
    eps: float,
    table: tuple[Tensor, Tensor],
    skip: int = 0,
) -> Tensor:
    """Entries as attention reads them: ``norm_rope(compress(...)[:, skip:], weight, eps, table)``.

    Args:
        kv, gate, position_bias, blocks, overlap: as for ``compress``.
        weight: ``[C]``, of the RMS norm of each entry.
        table: (cos, sin), each ``[B, N - skip, R]`` float32.
        skip: entries at the beginning of each row that are not asked for.

    Returns:
        ``[B, N - skip, C]``, computed in at least float32, in the dtype of ``kv``.
    """
    if implementation(kv, gate, position_bias, weight) == "triton":
        options = _Options(overlap, kv.dtype, skip, eps, table[0].shape[-1])
        if options.fits(position_bias):
            entries: Tensor = _Compress.apply(kv, gate, position_bias, weight, *table, blocks, options)
            return entries
        # Long blocks make few entries: to write these once more is little, to have one program for each is slow.
        pooled = _Options(overlap, torch.float32, skip)
        entries = _Compress.apply(kv, gate, position_bias, None, None, None, blocks, pooled)
    else:
        entries = compress(at_least_fp32(kv), at_least_fp32(gate), position_bias, blocks, overlap)[:, skip:]
    return norm_rope(entries, weight, eps, table).to(kv.dtype)


def compress_reference(kv: Tensor, gate: Tensor, position_bias: Tensor, blocks: Blocks, overlap: bool) -> Tensor:
    """``compress``, entry by entry."""
    ratio, channels = len(position_bias), kv.shape[2] // (1 + overlap)
    entries = (gate[..., :channels] + position_bias[0, :channels]).new_zeros(*blocks.start.shape, channels)
    for row, starts in enumerate(blocks.start.tolist()):
        for n, start in enumerate(starts):
            own = slice(start, start + ratio)
            value, score = kv[row, own, -channels:], gate[row, own, -channels:] + position_bias[:, -channels:]
            if overlap and n > 0 and blocks.chained[row, n]:
                before = slice(start - ratio, start)
                value = torch.cat((kv[row, before, :channels], value))
                score = torch.cat((gate[row, before, :channels] + position_bias[:, :channels], score))
            entries[row, n] = (score.softmax(0) * value).sum(0)
    return entries


@jit
def _pooling(kv, gate, bias, slots, taken, exists):
    """Values of the slots, their weights, both [SLOTS, BLOCK] float32, and what they make, [1, BLOCK]."""
    inside = taken[:, None] & exists[None, :]
    value = tl.load(kv + slots, mask=inside, other=0.0).to(tl.float32)
    score = tl.load(gate + slots, mask=inside, other=0.0).to(tl.float32) + bias
    score = tl.where(taken[:, None], score, float("-inf"))
    share = tl.exp(score - tl.max(score, 0)[None, :])
    share /= tl.sum(share, 0)[None, :]
    return value, share, tl.sum(share * value, 0)[None, :]


@jit
def _compress_kernel(
    kv,
    gate,
    position_bias,
    weight,
    cos,
    sin,
    start,
    chained,
    out,
    tokens,
    entries,
    skip,
    count,
    ratio,
    columns,
    width,
    still,
    pairs,
    eps,
    OWN: tl.constexpr,
    SHIFT: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One entry after another; ``count``: how many there are in all rows, without the skipped ones."""
    slot, column = tl.arange(0, SLOTS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK) - SHIFT
    exists = (column >= 0) & (column < columns)
    place = slot % (SLOTS - OWN)
    spot = (place * width + (slot >= OWN).to(tl.int32) * (width - columns))[:, None] + column[None, :]
    bias = tl.load(position_bias + spot, mask=(place < ratio)[:, None] & exists[None, :], other=0.0).to(tl.float32)
    if weight is not None:
        scale = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    slots = spot - (slot < OWN).to(tl.int32)[:, None] * (ratio * width)
    for index in range(tl.program_id(0), count, tl.num_programs(0)):
        row, n = index // (entries - skip), index % (entries - skip) + skip
        at = (row * tokens + tl.load(start + row * entries + n)) * width
        linked = (tl.load(chained + row * entries + n) != 0) & (n > 0)
        taken = (place < ratio) & (slot >= tl.where(linked, 0, OWN))
        _, _, entry = _pooling(kv + at, gate + at, bias, slots, taken, exists)
        if weight is not None:
            entry = entry * rms_factor(entry, columns, eps)[:, None] * scale
            token = index + tl.arange(0, 1)
            entry = turn(entry, cos, sin, token, token >= 0, still, pairs, False, 1, BLOCK)
        to = tl.arange(0, 1).to(tl.int64) + index
        rounded = numerics.cast(entry, out.dtype.element_ty)
        tl.store(out + to[:, None] * columns + column[None, :], rounded, mask=exists[None, :])


@jit
def _compress_backward_kernel(
    kv,
    gate,
    position_bias,
    weight,
    cos,
    sin,
    start,
    chained,
    end,
    gradient,
    to_kv,
    to_gate,
    to_bias,
    to_weight,
    tokens,
    entries,
    skip,
    count,
    ends,
    ratio,
    columns,
    width,
    still,
    pairs,
    eps,
    OWN: tl.constexpr,
    SHIFT: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One entry after another; each writes the gradients of its slots, which it shares with no other.

    ``count`` holds one entry more for each row than it has. The i-th one that does not exist clears the i-th ``ratio``
    tokens after the row's last block; entries that exist clear those between the block before and their own.
    """
    slot, column = tl.arange(0, SLOTS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK) - SHIFT
    exists = (column >= 0) & (column < columns)
    place = slot % (SLOTS - OWN)
    spot = (place * width + (slot >= OWN).to(tl.int32) * (width - columns))[:, None] + column[None, :]
    inside = (place < ratio)[:, None] & exists[None, :]
    bias = tl.load(position_bias + spot, mask=inside, other=0.0).to(tl.float32)
    bias_total = tl.zeros([SLOTS, BLOCK], tl.float32)
    nothing = tl.zeros([SLOTS, BLOCK], tl.float32)
    if weight is not None:
        scale = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)[None, :]
        total = tl.zeros([1, BLOCK], tl.float32)
    slots = spot - (slot < OWN).to(tl.int32)[:, None] * (ratio * width)
    for index in range(tl.program_id(0), count, tl.num_programs(0)):
        row, n = index // (entries + 1), index % (entries + 1)
        here = row * entries
        known = tl.minimum(tl.load(end + row * ends + ends - 1, mask=ends > 0, other=0), entries)
        real = n < known
        begin = tl.load(start + here + n, mask=real, other=0)
        linked = tl.load(chained + here + n, mask=real & (n > 0), other=0) != 0
        closes = tl.load(chained + here + n + 1, mask=n + 1 < known, other=0) == 0  # the last of its document
        before = tl.minimum(n, known) - 1
        low = tl.load(start + here + before, mask=before >= 0, other=-ratio) + ratio
        low = tl.where(real, low, low + (n - known) * ratio)
        high = tl.where(real, begin, tl.minimum(low + ratio, tokens))
        for token in range(low, high, ratio):
            at = (row * tokens + token) * width
            outside = ((place < ratio) & (token + place < high))[:, None] & exists[None, :]
            tl.store(to_kv + at + spot, nothing, mask=outside)
            tl.store(to_gate + at + spot, nothing, mask=outside)
        # What the last block of a document gives, nobody takes.
        at = (row * tokens + begin) * width
        ungiven = (slot < tl.where(real & closes, OWN, 0))[:, None] & inside
        tl.store(to_kv + at + spot, nothing, mask=ungiven)
        tl.store(to_gate + at + spot, nothing, mask=ungiven)

        one = row * (entries - skip) + n - skip + tl.arange(0, 1)
        live = one >= tl.where(real, row * (entries - skip), count)
        to = one[:, None].to(tl.int64) * columns + column[None, :]
        upper = tl.load(gradient + to, mask=live[:, None] & exists[None, :], other=0.0).to(tl.float32)
        if weight is not None:
            upper = turn(upper, cos, sin, one, live, still, pairs, True, 1, BLOCK)
        taken = (place < ratio) & (slot >= tl.where(linked, 0, OWN))
        held = (column >= 0) & (column < tl.where(real, columns, 0))
        value, share, entry = _pooling(kv + at, gate + at, bias, slots, taken, held)
        if weight is not None:
            factor = rms_factor(entry, columns, eps)
            normed = entry * factor[:, None]
            total += upper * normed
            upper = rms_slope(normed, upper * scale, factor, columns)
        to_value = share * upper
        to_score = to_value * (value - entry)
        bias_total += to_score
        stored = taken[:, None] & held[None, :]
        tl.store(to_kv + at + slots, numerics.cast(to_value, to_kv.dtype.element_ty), mask=stored)
        tl.store(to_gate + at + slots, numerics.cast(to_score, to_gate.dtype.element_ty), mask=stored)
    part = tl.program_id(0).to(tl.int64)
    tl.store(to_bias + part * ratio * width + spot, bias_total, mask=inside)
    if weight is not None:
        tl.store(to_weight + part * columns + column[None, :], total, mask=exists[None, :])


class _Options(NamedTuple):
    """Of a call; ``dtype`` is that of the result, ``pairs`` the rotated ones of an entry that is normed."""

    overlap: bool
    dtype: torch.dtype
    skip: int = 0
    eps: float = 0.0
    pairs: int | None = None

    def launch(self, position_bias: Tensor) -> tuple[int, int, int, dict[str, int]]:
        """Channels, blocks of them, pairs of a tile that stand still; and how a kernel is launched."""
        ratio, width = position_bias.shape
        columns = width // (1 + self.overlap)
        own = int(triton.next_power_of_2(ratio))
        slots, shift, still = own * (1 + self.overlap), 0, 0
        if self.pairs is None:
            block = min(triton.next_power_of_2(columns), max(HELD // slots, 8))
        else:
            still, tile = rope_tile(columns, self.pairs)
            block, shift = tile["BLOCK"], tile["SHIFT"]
        constants = {"OWN": slots - own, "SHIFT": shift, "SLOTS": slots, "BLOCK": block}
        # Of 8 warps that have 128 registers for a thread, a multiprocessor holds two programs.
        limits = {"num_warps": max(slots * block // 512, 1), "maxnreg": 128}
        return columns, triton.cdiv(columns, block), still, constants | limits

    def fits(self, position_bias: Tensor) -> bool:
        """Whether one program can hold all slots of an entry in all channels, which its norm asks for."""
        *_, tile = self.launch(position_bias)
        return tile["SLOTS"] * tile["BLOCK"] <= HELD


class _Compress(torch.autograd.Function):
    """Saves its inputs. With a weight the entries are normed and, by the table, turned."""

    @staticmethod
    def forward(
        ctx: Any,
        kv: Tensor,
        gate: Tensor,
        position_bias: Tensor,
        weight: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        blocks: Blocks,
        options: _Options,
    ) -> Tensor:
        given = kv, gate, position_bias, weight, cos, sin, blocks.start, blocks.chained.view(torch.uint8)
        tensors = [None if tensor is None else tensor.contiguous() for tensor in given]
        (batch, tokens, width), entries = kv.shape, blocks.start.shape[1]
        columns, across, still, tile = options.launch(position_bias)
        out = kv.new_empty(batch, entries - options.skip, columns, dtype=options.dtype)
        count = batch * (entries - options.skip)
        sizes = tokens, entries, options.skip, count, len(position_bias), columns, width, still, options.pairs
        _compress_kernel[(min(count, 1024), across)](*tensors, out, *sizes, options.eps, **tile)
        ctx.save_for_backward(*tensors, blocks.end)
        ctx.options = options
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, end = ctx.saved_tensors
        kv, gate, position_bias, weight = tensors[:4]
        (batch, tokens, width), entries, ratio = kv.shape, tensors[6].shape[1], len(position_bias)
        columns, across, still, tile = ctx.options.launch(position_bias)
        count = batch * (entries + 1)
        programs = min(-(-count // 2), max(PARTS // (tile["SLOTS"] * tile["BLOCK"] * across), 1))
        to_kv, to_gate = torch.empty_like(kv), torch.empty_like(gate)
        to_bias = kv.new_empty(programs, ratio, width, dtype=torch.float32)
        to_weight = None if weight is None else kv.new_empty(programs, columns, dtype=torch.float32)
        tensors += end.contiguous(), gradient.contiguous(), to_kv, to_gate, to_bias, to_weight
        sizes = tokens, entries, ctx.options.skip, count, end.shape[1], ratio, columns, width, still, ctx.options.pairs
        _compress_backward_kernel[(programs, across)](*tensors, *sizes, ctx.options.eps, **tile)
        if weight is not None and to_weight is not None:
            to_weight = to_weight.sum(0).to(weight.dtype)
        return to_kv, to_gate, to_bias.sum(0).to(position_bias.dtype), to_weight, None, None, None, None
