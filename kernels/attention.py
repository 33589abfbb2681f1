"""Core attention of DeepSeek-V4: sliding window and compressed entries under one softmax, with a sink per head.

Shapes: B batch, T tokens, H heads, C head dim (keys and values are the same vectors), N compressed entries, W window,
c tokens in a chunk, n chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .documents import Blocks
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
    """``hybrid_attention`` written for reading: every score is materialised, ``[B, T, H, T + N]``."""
    heads, dim = q.shape[2:]
    token = torch.arange(q.shape[1], device=q.device)
    distance = token[:, None] - token
    attends = (distance >= 0) & (distance < window) & (token >= first.unsqueeze(-1))  # [B, T, T]
    keys = kv
    if entries is not None and blocks is not None:
        attends = torch.cat((attends, _sees(entries, blocks, selected)), 2)
        keys = torch.cat((kv, entries), 1)
    scores = at_least_fp32(torch.einsum("bthc,bsc->bths", q, keys)) * dim**-0.5
    scores = scores.masked_fill(~attends.unsqueeze(2), float("-inf"))
    with_sink = torch.cat((scores, at_least_fp32(sink).view(1, 1, heads, 1).expand(*q.shape[:3], 1)), -1)
    probability = with_sink.softmax(-1)
    return torch.einsum("bths,bsc->bthc", probability[..., :-1].to(q.dtype), keys), probability[..., -1].detach()


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

    Tokens are taken in chunks, and a chunk is multiplied with the few keys that its windows reach, so the window's cost
    is linear in T. Entries are still scored densely.

    Args:
        q: ``[B, T, H, C]``; kv: ``[B, T, C]``, key and value at once; sink: ``[H]``, a logit that enters only the
            denominator; first: ``[B, T]``, first token of each token's document; window: W, the token itself included.
        entries: ``[B, N, C]`` compressed keys/values, with ``blocks`` saying who may see which; None for window only.
        selected: ``[B, T, k]`` the entries to attend to, -1 for none; None attends to every visible one.

    Returns:
        output ``[B, T, H, C]`` in the dtype of ``q``, and the share of the softmax that fell to the sink, ``[B, T, H]``
        float32, detached.
    """
    batch, length, heads, dim = q.shape
    chunk = min(max(window, 32), length)
    reach = min(window, length) - 1  # keys before the chunk that its first token sees
    chunks = -(-length // chunk)
    pad = chunks * chunk - length
    queries = F.pad(q * dim**-0.5, (0, 0, 0, 0, 0, pad)).view(batch * chunks, chunk * heads, dim)
    near = F.pad(kv, (0, 0, reach, pad)).unfold(1, chunk + reach, chunk).transpose(2, 3)  # [B, n, c + reach, C]
    near = near.flatten(0, 1)

    at = torch.arange(chunks, device=q.device).view(-1, 1, 1) * chunk
    query = at + torch.arange(chunk, device=q.device).view(1, -1, 1)  # [n, c, 1] token index
    key = at + torch.arange(chunk + reach, device=q.device) - reach  # [n, 1, c + reach]
    begin = F.pad(first, (0, pad)).view(batch, chunks, chunk, 1)
    attends = (key <= query) & (key > query - window) & (key >= begin)  # [B, n, c, c + reach]
    attends |= query >= length  # rows of padding are cut off below; they only must not divide by zero

    def masked(keys: Tensor, seen: Tensor) -> Tensor:
        scores = at_least_fp32(queries.view(len(keys), -1, dim) @ keys.transpose(1, 2))
        scores = scores.view(batch * chunks, chunk, heads, -1)
        return scores.masked_fill_(~seen.reshape(batch * chunks, chunk, 1, -1), float("-inf"))

    scores = [masked(near, attends)]
    if entries is not None and blocks is not None:
        scores.append(masked(entries, F.pad(_sees(entries, blocks, selected), (0, 0, 0, pad))))
    scores.append(at_least_fp32(sink).view(1, 1, heads, 1).expand(batch * chunks, chunk, heads, 1))
    probability = torch.cat(scores, -1).softmax(-1)
    share = probability[..., -1].detach().view(batch, -1, heads)[:, :length]
    probability = probability.to(q.dtype).flatten(1, 2)
    split = chunk + reach
    out = (probability[..., :split] @ near).view(batch, -1, heads, dim)
    if entries is not None:
        far = probability.view(batch, -1, probability.shape[-1])[..., split:-1] @ entries
        out = out + far.view_as(out)
    return out[:, :length], share


def _sees(entries: Tensor, blocks: Blocks, selected: Tensor | None) -> Tensor:
    """Which entries each token attends to, ``[B, T, N]`` bool."""
    count = entries.shape[1]
    if selected is None:
        entry = torch.arange(count, device=entries.device)
        return (entry >= blocks.first.unsqueeze(-1)) & (entry < blocks.end.unsqueeze(-1))
    slot = torch.where(selected < 0, count, selected)
    seen = torch.zeros(*selected.shape[:2], count + 1, dtype=torch.bool, device=entries.device)
    return seen.scatter(2, slot, True)[..., :-1]
