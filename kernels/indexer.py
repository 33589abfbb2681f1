"""The lightning indexer: cheap scores of compressed entries and the choice of the best k."""

import torch
from torch import Tensor

from .norm import at_least_fp32


def index_scores(queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """I[t, s] = sum_h w[t, h] * ReLU(q[t, h] . k[s]), ``[B, T, N]`` float32 (recipe 2.3, paper eq. 16).

    Args:
        queries: ``[B, T, H, C]``; keys: ``[B, N, C]``; weights: ``[B, T, H]``, with the scale C^-1/2 H^-1/2 applied.
    """
    batch, length, heads, _ = queries.shape
    scores = at_least_fp32(queries).flatten(1, 2) @ at_least_fp32(keys).transpose(1, 2)  # [B, T*H, N]
    scores = scores.relu_().view(batch, length, heads, -1)
    return torch.einsum("bthn,bth->btn", scores, at_least_fp32(weights))


def select_top_k(scores: Tensor, first: Tensor, end: Tensor, k: int) -> Tensor:
    """The k best visible entries of each token, ``[B, T, min(k, N)]`` int64, -1 where fewer are visible.

    Ties go to the lowest entry (a zero after ReLU is a common tie, and torch.topk leaves its order open).

    Args:
        scores: ``[B, T, N]``; first, end: ``[B, T]``: entries first <= n < end are visible.
    """
    entry = torch.arange(scores.shape[-1], device=scores.device)
    visible = (entry >= first.unsqueeze(-1)) & (entry < end.unsqueeze(-1))
    order = scores.masked_fill(~visible, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    chosen = order[..., :k]
    return torch.where(visible.gather(-1, chosen), chosen, -1)
