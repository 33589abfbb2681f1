"""Core attention of DeepSeek-V4: sliding window and compressed entries under one softmax, with a sink per head.

Shapes: B batch, T tokens, H heads, C head dim (keys and values are the same vectors), N compressed entries.
"""

import torch
from torch import Tensor

from .documents import Blocks
from .norm import at_least_fp32


def hybrid_attention(
    q: Tensor,
    kv: Tensor,
    sink: Tensor,
    window_start: Tensor,
    entries: Tensor | None = None,
    blocks: Blocks | None = None,
    selected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each token over its window and over compressed entries (recipe 2.4, paper eq. 27).

    Args:
        q: ``[B, T, H, C]``; kv: ``[B, T, C]``, key and value at once; sink: ``[H]``, a logit that enters only the
            denominator; window_start: ``[B, T]``, the earliest token that each token sees.
        entries: ``[B, N, C]`` compressed keys/values, with ``blocks`` saying who may see which; None for window only.
        selected: ``[B, T, k]`` the entries to attend to, -1 for none; None attends to every visible one.

    Returns:
        output ``[B, T, H, C]`` in the dtype of ``q``, and the logarithm of the softmax denominator (sink included)
        ``[B, T, H]`` float32, from which the sink's share is exp(sink - it).
    """
    batch, length, heads, dim = q.shape
    token = torch.arange(length, device=q.device)
    attends = (token <= token[:, None]) & (token >= window_start.unsqueeze(-1))  # [B, T, T]
    keys = kv
    if entries is not None and blocks is not None:
        entry = torch.arange(entries.shape[1], device=q.device)
        if selected is None:
            seen = (entry >= blocks.first.unsqueeze(-1)) & (entry < blocks.end.unsqueeze(-1))  # [B, T, N]
        else:
            slot = torch.where(selected < 0, entries.shape[1], selected)
            seen = torch.zeros(batch, length, entries.shape[1] + 1, dtype=torch.bool, device=q.device)
            seen = seen.scatter(2, slot, True)[..., :-1]
        attends = torch.cat((attends, seen), 2)
        keys = torch.cat((kv, entries), 1)
    scores = at_least_fp32(q.flatten(1, 2) @ keys.transpose(1, 2)).view(batch, length, heads, -1) * dim**-0.5
    scores = scores.masked_fill(~attends.unsqueeze(2), float("-inf"))
    denominator = torch.logaddexp(scores.logsumexp(-1), at_least_fp32(sink))  # [B, T, H]
    probability = (scores - denominator.unsqueeze(-1)).exp().to(q.dtype)
    return (probability.flatten(1, 2) @ keys).view_as(q), denominator
