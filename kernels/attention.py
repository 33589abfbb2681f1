"""Core attention of DeepSeek-V4: sliding window and compressed entries under one softmax, with a sink per head.

Shapes: B batch, T tokens, P tokens before them, H heads, C head dim (keys and values are the same vectors), N
compressed entries, W window, k selected entries, c tokens in a chunk, g chunks in a group, t = g c tokens of it, n
entries that it sees.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .documents import Blocks
from .entries import View, additive_mask, is_selected
from .norm import at_least_fp32


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
        q: ``[B, T, H, C]``; kv: ``[B, P + T, C]``, key and value at once, those of P < W earlier tokens first (none in
            training); sink: ``[H]``, a logit that enters only the denominator; first: ``[B, T]``, first token of each
            token's document, negative for an earlier one; window: W, the token itself included.
        entries: ``[B, N, C]`` compressed keys/values, with ``blocks`` saying who may see which; None for window only.
        selected: ``[B, T, k]`` the entries to attend to, -1 for none; None attends to every visible one.

    Returns:
        output ``[B, T, H, C]`` in the dtype of ``q``, and the logarithm of the softmax's denominator, sink included,
        ``[B, T, H]``, at least float32, without gradient.
    """
    if entries is not None and not entries.shape[1]:
        blocks = None
    result: tuple[Tensor, Tensor] = _HybridAttention.apply(q, kv, sink, first, window, entries, blocks, selected)
    return result


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
