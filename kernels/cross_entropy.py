"""Cross-entropy of an output head, computed from hidden states without ever holding all logits.

Shapes: M tokens (leading dimensions flattened), m tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import numerics
from .dispatch import implementation, jit, tl, triton
from .norm import at_least_fp32
from .product import halves, product

IGNORED = -100

# Logits that are alive at once: 2**23 float32 are 32 MB, 64 tokens of V4's vocabulary. A GPU wants larger products.
CPU_ELEMENTS, GPU_ELEMENTS = 2**23, 2**28
TRITON_ELEMENTS = 120_000_000  # of two bytes: 232 MB, 896 tokens of V4's vocabulary


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """``token_cross_entropy`` by all logits at once, the oracle of the tests."""
    logits = F.linear(at_least_fp32(hidden), at_least_fp32(weight)).flatten(0, -2)
    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(hidden W^T)[target], 0-dim, at least float32; ``IGNORED`` targets count nothing.

    Logits are formed in float32 (recipe 4), a chunk of tokens at a time. The gradient of a sum is known up to a factor
    before the backward pass, so each chunk's is taken while its logits exist: three products a chunk, as many as with
    all logits in memory.

    bfloat16 hidden states on a GPU multiply a bfloat16 weight, with float32 logits, and so do the slopes of the logits:
    rounding a float32 weight moves the loss as much as rounding the hidden states did (5e-3 a token, either sign, at
    logits of size 3), and a second product with what was rounded away would add a third to the time. The gradient of a
    bfloat16 weight is then rounded once a chunk. All other inputs are multiplied in float32.

    Args:
        hidden: ``[..., D]``; weight: ``[V, D]``; targets: ``[...]`` int64.
    """
    chosen = implementation(hidden, weight, targets)
    if chosen == "reference":
        return linear_cross_entropy_reference(hidden, weight, targets).sum()
    by_triton = chosen == "triton" and hidden.dtype == torch.bfloat16
    function = _TritonLinearCrossEntropy if by_triton else _LinearCrossEntropy
    total: Tensor = function.apply(hidden, weight, targets)
    return total


@torch.no_grad()
def token_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The terms of ``linear_cross_entropy``, ``[...]``, 0 where the target is ``IGNORED``; no gradient."""
    chosen = implementation(hidden, weight, targets)
    if chosen == "reference":
        return linear_cross_entropy_reference(hidden, weight, targets)
    if chosen == "triton" and hidden.dtype == torch.bfloat16:
        return _triton_losses(hidden, weight, targets).view_as(targets)
    chunks = _chunks(at_least_fp32(hidden).flatten(0, -2), at_least_fp32(weight), targets.flatten())
    return torch.cat([losses for _, losses, _, _ in chunks]).view_as(targets)


def _chunks(flat: Tensor, weight: Tensor, target: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """For each chunk its tokens, their losses ``[m]``, exp(logits - max) ``[m, V]`` and its sums ``[m, 1]``."""
    size = max(1, (CPU_ELEMENTS if flat.device.type == "cpu" else GPU_ELEMENTS) // weight.shape[0])
    buffer = flat.new_empty(min(size, len(flat)), weight.shape[0])  # one for all: two chunks are never alive at once
    for start in range(0, max(len(flat), 1), size):
        tokens = slice(start, start + size)
        logits = torch.mm(flat[tokens], weight.mT, out=buffer[: len(flat[tokens])])
        label = target[tokens].unsqueeze(-1)
        logits.sub_(logits.amax(-1, keepdim=True))
        losses = -logits.gather(-1, label.clamp(min=0))
        total = logits.exp_().sum(-1, keepdim=True)
        yield tokens, losses.add_(total.log()).masked_fill_(label == IGNORED, 0.0).squeeze(-1), logits, total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        flat, target, wide = at_least_fp32(hidden).flatten(0, -2), targets.flatten(), at_least_fp32(weight)
        to_hidden = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(wide) if ctx.needs_input_grad[1] else None
        total = flat.new_zeros(())
        for tokens, losses, exponentials, sums in _chunks(flat, wide, target):
            total += losses.sum()
            if to_hidden is None and to_weight is None:
                continue
            label = target[tokens].unsqueeze(-1)
            counted = (label != IGNORED).to(sums.dtype)
            slope = exponentials.mul_(counted / sums)  # softmax - one-hot, 0 for ignored tokens
            slope.scatter_add_(1, label.clamp(min=0), -counted)
            if to_hidden is not None:
                torch.mm(slope, wide, out=to_hidden[tokens])
            if to_weight is not None:
                to_weight.addmm_(slope.mT, flat[tokens])
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.like = hidden.shape, hidden.dtype, weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, total: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden, to_weight = ctx.saved_tensors
        shape, hidden_dtype, weight_dtype = ctx.like
        # In place: these gradients exist for this call alone, and the head's is the size of the head.
        return (
            None if to_hidden is None else to_hidden.mul_(total).view(shape).to(hidden_dtype),
            None if to_weight is None else to_weight.mul_(total).to(weight_dtype),
            None,
        )


# The Triton path. The product for the logits ends, while a tile of them is in registers, with their largest value and
# the sum of their exponentials over each PART of the vocabulary; what is kept of a logit, in float16, is its distance
# from the largest of its part. So the loss has all digits of float32, and a slope exp(logit - log sum) an error of at
# most 2^-12 of the largest slope of its part, less than its own rounding to bfloat16, for half of float32's memory.
# That lets a chunk be twice as long: its share of the head's gradient is added to memory half as often.


@jit
def _ce_part(total, row, left, targets, logits, peaks, sums, at_target, tokens, vocabulary, KEEP: tl.constexpr):
    """What is told of the logits ``total [m, PART]``."""
    column = left + tl.arange(0, total.shape[1])
    within, inside = row < tokens, column < vocabulary
    total = tl.where(inside[None, :], total, float("-inf"))
    peak = tl.max(total, 1)
    distance = total - tl.where(peak == float("-inf"), 0.0, peak)[:, None]
    part = left // total.shape[1]
    tl.store(peaks + part * tokens + row, peak, mask=within)
    tl.store(sums + part * tokens + row, tl.sum(tl.exp(distance), 1), mask=within)
    target = tl.load(targets + row, mask=within, other=-1)
    hit = column[None, :] == target[:, None]
    found = within & (target >= left) & (target < left + total.shape[1])
    tl.store(at_target + row, tl.sum(tl.where(hit, total, 0.0), 1), mask=found)
    if KEEP:
        at = row.to(tl.int64)[:, None] * vocabulary + column[None, :]
        kept = numerics.cast(tl.maximum(distance, -65504.0), tl.float16)
        tl.store(logits + at, kept, mask=within[:, None] & inside[None, :])


@jit
def _ce_logits_kernel(
    hidden, weight, targets, logits, peaks, sums, at_target, tokens, vocabulary, width, token_tiles,
    KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of the logits; programs that run at once share rows of the weight."""
    top, left = tl.program_id(0) % token_tiles * BM, tl.program_id(0) // token_tiles * BN
    row, column = tl.arange(0, BM), tl.arange(0, BN)
    x, w = hidden + top.to(tl.int64) * width, weight + left.to(tl.int64) * width
    total = product(
        x, w, x, w, row, column, tokens - top, vocabulary - left, 0, width, width, 1, 1, width, TERMS=1, BK=BK
    )
    first, second = halves(total)
    _ce_part(first, top + row, left, targets, logits, peaks, sums, at_target, tokens, vocabulary, KEEP)
    _ce_part(second, top + row, left + BN // 2, targets, logits, peaks, sums, at_target, tokens, vocabulary, KEEP)


@jit
def _ce_losses_kernel(
    peaks, sums, at_target, targets, losses, log_sums, tokens, parts,
    IGNORED: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within = token < tokens
    highest, total = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        at, inside = part[:, None] * tokens + token[None, :], (part < parts)[:, None] & within[None, :]
        peak = tl.load(peaks + at, mask=inside, other=-3e38)  # -inf less -inf would be NaN
        above = tl.maximum(highest, tl.max(peak, 0))
        share = tl.load(sums + at, mask=inside, other=0.0) * tl.exp(peak - above[None, :])
        total = total * tl.exp(highest - above) + tl.sum(share, 0)
        highest = above
    log_sum = highest + tl.log(tl.where(within, total, 1.0))
    tl.store(log_sums + token, log_sum, mask=within)
    counted = within & (tl.load(targets + token, mask=within, other=IGNORED) != IGNORED)
    loss = log_sum - tl.load(at_target + token, mask=counted, other=0.0)
    tl.store(losses + token, tl.where(counted, loss, 0.0), mask=within)


@jit
def _ce_slopes_kernel(
    logits, slopes, peaks, log_sums, targets, tokens, vocabulary, token_tiles,
    IGNORED: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """softmax - one-hot in bfloat16, 0 for ignored tokens; ``slopes`` is the memory of ``logits``."""
    part = tl.program_id(0) // token_tiles
    row, column = tl.program_id(0) % token_tiles * BLOCK + tl.arange(0, BLOCK), part * PART + tl.arange(0, PART)
    within = row < tokens
    target = tl.load(targets + row, mask=within, other=IGNORED)
    shift = tl.load(peaks + part * tokens + row, mask=within, other=0.0)
    shift -= tl.load(log_sums + row, mask=within, other=0.0)
    at = row.to(tl.int64)[:, None] * vocabulary + column[None, :]
    inside = within[:, None] & (column < vocabulary)[None, :]
    distance = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    slope = tl.exp(distance + shift[:, None]) - tl.where(column[None, :] == target[:, None], 1.0, 0.0)
    slope = tl.where((target != IGNORED)[:, None], slope, 0.0)
    tl.store(slopes + at, numerics.cast(slope, tl.bfloat16), mask=inside)


@jit
def _ce_store(total, row, left, out, rows, columns, ADD: tl.constexpr):
    column = left + tl.arange(0, total.shape[1])
    at, inside = row[:, None] * columns + column[None, :], (row < rows)[:, None] & (column < columns)[None, :]
    if ADD:
        total += tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, numerics.cast(total, out.dtype.element_ty), mask=inside)


@jit
def _ce_product_kernel(
    a, b, out, rows, columns, inner, a_stride, a_inner, b_inner, b_stride, column_tiles,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of A B, or ADDed to ``out [rows, columns]``; programs that run at once share rows of A."""
    top, left = tl.program_id(0) // column_tiles * BM, tl.program_id(0) % column_tiles * BN
    row, column = tl.arange(0, BM), tl.arange(0, BN)
    x, y = a + top.to(tl.int64) * a_stride, b + left.to(tl.int64) * b_stride
    total = product(
        x, y, x, y, row, column, rows - top, columns - left, 0, inner, a_stride, a_inner, b_inner, b_stride, 1, BK
    )
    out += top.to(tl.int64) * columns
    first, second = halves(total)
    _ce_store(first, row, left, out, rows - top, columns, ADD)
    _ce_store(second, row, left + BN // 2, out, rows - top, columns, ADD)


PART = 128  # logits that share a largest value: half a tile


def _triton_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, to_hidden: Tensor | None = None, to_weight: Tensor | None = None
) -> Tensor:
    """Each token's loss ``[M]``, float32; the gradients of the sum go to ``to_hidden [M, D]`` and ``to_weight``."""
    flat, target = hidden.flatten(0, -2).contiguous(), targets.flatten()
    head = weight.to(flat.dtype).contiguous()
    (count, width), vocabulary = flat.shape, len(head)
    size = max(1, min(count, max(PART, TRITON_ELEMENTS // vocabulary // PART * PART)))
    losses, log_sums = (flat.new_empty(count, dtype=torch.float32) for _ in range(2))
    at_target = torch.empty_like(losses)
    slopes = flat.new_empty(size, vocabulary) if not (to_hidden is None and to_weight is None) else None
    tiles = triton.cdiv(vocabulary, 2 * PART)
    peaks, sums = (losses.new_empty(2 * tiles, size) for _ in range(2))
    for start in range(0, count, size):
        tokens = slice(start, start + size)
        x, y, told = flat[tokens], target[tokens], (peaks, sums)
        m = len(x)
        logits = (flat if slopes is None else slopes).view(torch.float16)
        token_tiles = triton.cdiv(m, 128)
        _ce_logits_kernel[(token_tiles * tiles,)](
            x, head, y, logits, *told, at_target[tokens], m, vocabulary, width, token_tiles,
            KEEP=slopes is not None, BM=128, BN=2 * PART, BK=64, num_warps=8, num_stages=3,
        )  # fmt: skip
        _ce_losses_kernel[(triton.cdiv(m, 16),)](
            *told, at_target[tokens], y, losses[tokens], log_sums[tokens], m, 2 * tiles,
            IGNORED=IGNORED, BLOCK=16, PARTS=64,
        )  # fmt: skip
        if slopes is None:
            continue
        token_tiles = triton.cdiv(m, 32)
        _ce_slopes_kernel[(token_tiles * 2 * tiles,)](
            logits, slopes, peaks, log_sums[tokens], y, m, vocabulary, token_tiles,
            IGNORED=IGNORED, BLOCK=32, PART=PART,
        )  # fmt: skip
        slope = slopes[:m]
        if to_hidden is not None:
            _multiply(slope, head, to_hidden[tokens], add=False)
        if to_weight is not None:
            _multiply(slope.mT, x, to_weight, add=start > 0)
    return losses


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """``out = a b``, or ``out += a b``, in the dtype of ``out``."""
    (rows, inner), columns = a.shape, b.shape[1]
    # Long sums take the tile that reads least; short ones two smaller ones on a multiprocessor, whose beginnings and
    # ends, which wait for memory, overlap.
    width, warps = (256, 8) if inner > rows else (128, 4)
    column_tiles = triton.cdiv(columns, width)
    _ce_product_kernel[(triton.cdiv(rows, 128) * column_tiles,)](
        a, b, out, rows, columns, inner, *a.stride(), *b.stride(), column_tiles,
        ADD=add, BM=128, BN=width, BK=64, num_warps=warps, num_stages=3,
    )  # fmt: skip


class _TritonLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        fresh = torch.empty if targets.numel() else torch.zeros
        wanted = [
            fresh(x.shape, dtype=x.dtype, device=x.device) if needed else None
            for x, needed in zip((hidden, weight), ctx.needs_input_grad, strict=False)
        ]
        to_hidden, to_weight = wanted
        rows = None if to_hidden is None else to_hidden.flatten(0, -2)
        losses = _triton_losses(hidden, weight, targets, rows, to_weight)
        ctx.save_for_backward(to_hidden, to_weight)
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, total: Tensor) -> tuple[Tensor | None, ...]:
        # In place, as in _LinearCrossEntropy.
        return *(None if gradient is None else gradient.mul_(total) for gradient in ctx.saved_tensors), None
