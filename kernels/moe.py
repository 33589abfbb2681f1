"""Mixture of experts: router scores, the choice of experts, and their clamped SwiGLU.

Shapes: M tokens (batch and length flattened), D hidden, E experts, K experts per token, F expert intermediate.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import at_least_fp32

# An expert's tokens are padded to whole tiles. BLAS picks another summation order for products of few rows (measured:
# fewer than 12 with MKL), and then a token's output would depend on how many others, of whatever document, chose the
# same expert.
TILE = 16


def router_scores(x: Tensor, weight: Tensor) -> Tensor:
    """sqrt(softplus(x W^T)), ``[M, E]`` float32 (recipe 3).

    Below a logit of -20 the value is exp(logit / 2) to 1e-9 relative; taking that branch keeps the gradient finite
    where softplus underflows to zero and the square root's slope does not.
    """
    logits = F.linear(at_least_fp32(x), at_least_fp32(weight))
    tail = logits < -20
    return torch.where(tail, (logits / 2).exp(), F.softplus(logits.masked_fill(tail, 0.0)).sqrt())


def top_experts(scores: Tensor, k: int) -> Tensor:
    """Ids of the k best experts of each token, ``[M, K]`` int64; ties go to the lowest id."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def expert_weights(scores: Tensor, ids: Tensor, scale: float) -> Tensor:
    """Scores of the chosen experts, normalised to sum to ``scale``, ``[M, K]``."""
    chosen = scores.gather(1, ids)
    return chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * scale


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clip(up, -limit, limit), at least float32; no clamp if ``limit`` is 0 (recipe 3)."""
    gate, up = at_least_fp32(gate), at_least_fp32(up)
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def clamp_hits(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """Share of elements that ``clamped_swiglu`` clamps, 0-dim float32."""
    if limit <= 0:
        return gate.new_zeros((), dtype=torch.float32)
    return ((gate > limit).float().mean() + (up.abs() > limit).float().mean()) / 2


def routed_experts(
    x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float
) -> tuple[Tensor, Tensor]:
    """Sum over each token's experts of weight * expert(x), nothing dropped.

    Args:
        x: ``[M, D]``; ids, weights: ``[M, K]``; w1 (gate), w3 (up): ``[E, F, D]``; w2 (down): ``[E, D, F]``.

    Returns:
        output ``[M, D]`` float32 (experts are summed in float32), and the share of clamped elements (0-dim).

    The routing weight multiplies before w2, as in the official code. Tokens are sorted by expert and put back by the
    inverse permutation, so no atomic addition decides the order of a sum.
    """
    count = ids.shape[1]
    order = ids.flatten().argsort(stable=True)
    sizes = torch.bincount(ids.flatten(), minlength=w1.shape[0]).tolist()
    outputs, hits = [], x.new_zeros((), dtype=torch.float32)
    tokens = x[order // count].split(sizes)
    scales = weights.flatten()[order].unsqueeze(-1).split(sizes)
    # unbind, not indexing: the gradient of w[e] is a whole [E, ...] tensor of zeros for every expert.
    for t, s, gate_w, up_w, down_w in zip(tokens, scales, w1.unbind(), w3.unbind(), w2.unbind(), strict=True):
        rows = len(t)
        t, s = (F.pad(a, (0, 0, 0, -rows % TILE)) for a in (t, s))
        gate, up = F.linear(t, gate_w.to(x.dtype)), F.linear(t, up_w.to(x.dtype))
        if rows:
            hits = hits + clamp_hits(gate.detach()[:rows], up.detach()[:rows], limit) * rows
        hidden = (clamped_swiglu(gate, up, limit) * s).to(x.dtype)
        outputs.append(at_least_fp32(F.linear(hidden, down_w.to(x.dtype)))[:rows])
    inverse = order.argsort()
    return torch.cat(outputs)[inverse].unflatten(0, (-1, count)).sum(1), hits / max(len(order), 1)
