"""The router of a mixture of experts: scores, the choice of experts, and the weights of those chosen.

Shapes: M tokens (batch and length flattened), D hidden, E experts, K experts per token. Source: recipe 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import numerics
from .dispatch import implementation, jit, tl, triton
from .norm import at_least_fp32

# A Triton program holds the weights of all experts, 32 columns at a time: more do not fit into shared memory.
MOST_EXPERTS = 512


def router_scores(x: Tensor, weight: Tensor) -> Tensor:
    """sqrt(softplus(x W^T)), ``[M, E]`` float32; x ``[M, D]``, weight ``[E, D]`` (recipe 3).

    Below a logit of -20 the value is exp(logit / 2) to 1e-9 relative; taking that branch keeps the gradient finite
    where softplus underflows to zero and the square root's slope does not.
    """
    if x.numel() and len(weight) <= MOST_EXPERTS and implementation(x, weight) == "triton":
        scores: Tensor = _Scores.apply(x, weight)
        return scores
    logits = F.linear(at_least_fp32(x), at_least_fp32(weight))
    tail = logits < -20
    return torch.where(tail, (logits / 2).exp(), F.softplus(logits.masked_fill(tail, 0.0)).sqrt())


def top_experts(scores: Tensor, k: int) -> Tensor:
    """Ids of the k best experts of each token, ``[M, K]`` int64; ties go to the lowest id, NaN counts as largest."""
    if scores.numel() and k and scores.shape[1] <= MOST_EXPERTS and implementation(scores) == "triton":
        return _top_on_device(scores, k)
    # A copy: a view would keep the order of all experts alive until the backward pass, 2.7 GB in a LoRA step of Flash.
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()


def expert_weights(scores: Tensor, ids: Tensor, scale: float) -> Tensor:
    """Scores of the chosen experts, normalised to sum to ``scale``, ``[M, K]``."""
    if ids.numel() and scores.shape[1] <= MOST_EXPERTS and implementation(scores) == "triton":
        weights: Tensor = _Weights.apply(scores, ids, scale)
        return weights
    chosen = scores.gather(1, ids)
    return chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * scale


def expert_load(ids: Tensor, experts: int, counted: Tensor | None = None) -> Tensor:
    """How many copies of tokens each expert gets, ``[E]`` int64; ids ``[M, K]``, of tokens that are ``counted [M]``.

    ``bincount``, and an index by a mask, would make the host wait for a GPU to learn the size of their results.
    """
    if counted is not None:
        ids = ids.masked_fill(~counted.unsqueeze(1), experts)
    load = torch.zeros(experts + 1, dtype=torch.long, device=ids.device)
    flat = ids.flatten()
    return load.scatter_add_(0, flat, torch.ones_like(flat))[:experts]


# Triton.


@jit
def _router_scores_kernel(
    x, weight, scores, tokens, experts, width, BM: tl.constexpr, EXPERTS: tl.constexpr, BK: tl.constexpr
):
    """All scores of BM tokens; products of float32 with all its digits, as three of tf32."""
    row, expert, inner = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, EXPERTS), tl.arange(0, BK)
    x_at = row[:, None].to(tl.int64) * width + inner[None, :]
    w_at = inner[:, None] + expert[None, :] * width
    logits = tl.zeros((BM, EXPERTS), tl.float32)
    for start in range(0, width, BK):
        left = width - start
        a = tl.load(x + x_at + start, mask=(row < tokens)[:, None] & (inner < left)[None, :], other=0.0)
        b = tl.load(weight + w_at + start, mask=(inner < left)[:, None] & (expert < experts)[None, :], other=0.0)
        logits = numerics.dot(a.to(tl.float32), b.to(tl.float32), logits, TF32=3)
    softplus = tl.maximum(logits, 0.0) + numerics.log1p(numerics.exp(-tl.abs(logits)))
    score = tl.where(logits < -20, numerics.exp(logits / 2), tl.sqrt(softplus))
    score = tl.where(logits == logits, score, logits)
    at = row[:, None].to(tl.int64) * experts + expert[None, :]
    tl.store(scores + at, score, mask=(row < tokens)[:, None] & (expert < experts)[None, :])


@jit
def _score_slopes_kernel(scores, gradient, slopes, count, BLOCK: tl.constexpr):
    """The gradient of the logits: with s^2 = softplus(l), ds/dl = sigmoid(l) / (2 s) = (1 - exp(-s^2)) / (2 s)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(scores + at, mask=at < count, other=1.0)
    square = s * s
    # (1 - exp(-q)) / q by its series where the difference would lose digits.
    series = 1 - square * (0.5 - square * (0.16666667 - square * (0.041666668 - square * 0.008333334)))
    ratio = tl.where(square < 0.1, series, (1 - numerics.exp(-square)) / tl.where(square < 0.1, 1.0, square))
    upper = tl.load(gradient + at, mask=at < count, other=0.0)
    tl.store(slopes + at, upper * ratio * s * 0.5, mask=at < count)


@jit
def _top_kernel(scores, ids, tokens, experts, K: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """K rounds of the largest, as integers of the same order: NaN above all, both zeros the same."""
    row, expert = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, EXPERTS)
    inside = (row < tokens)[:, None] & (expert < experts)[None, :]
    score = tl.load(scores + row[:, None].to(tl.int64) * experts + expert[None, :], mask=inside, other=0.0) + 0.0
    key = tl.where(score == score, numerics.order_of(score), 0x7FFFFFFF)
    key = tl.where(inside, key, -0x80000000)
    for k in tl.static_range(K):
        best = tl.max(key, 1)
        # What was chosen has the key of what does not exist, and no expert is chosen twice.
        chosen = tl.min(tl.where((key == best[:, None]) & inside, expert[None, :], EXPERTS), 1)
        tl.store(ids + row.to(tl.int64) * K + k, chosen.to(tl.int64), mask=row < tokens)
        key = tl.where(expert[None, :] == chosen[:, None], -0x80000000, key)


@jit
def _weights_kernel(
    scores, ids, weights, tokens, experts, scale, K: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr
):
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WHOLE)
    at, inside = row[:, None].to(tl.int64) * K + k[None, :], (row < tokens)[:, None] & (k < K)[None, :]
    chosen = tl.load(ids + at, mask=inside, other=0)
    score = tl.load(scores + row[:, None].to(tl.int64) * experts + chosen, mask=inside, other=0.0)
    tl.store(weights + at, score / (tl.sum(score, 1) + 1e-20)[:, None] * scale, mask=inside)


@jit
def _weight_slopes_kernel(
    scores, ids, gradient, slopes, tokens, experts, scale,
    K: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """The gradient of all scores: with t their sum, (g - sum(g s) / t) scale / t for those chosen, 0 for others."""
    row, k, expert = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WHOLE), tl.arange(0, EXPERTS)
    at, inside = row[:, None].to(tl.int64) * K + k[None, :], (row < tokens)[:, None] & (k < K)[None, :]
    chosen = tl.load(ids + at, mask=inside, other=0)
    score = tl.load(scores + row[:, None].to(tl.int64) * experts + chosen, mask=inside, other=0.0)
    upper = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(score, 1) + 1e-20
    shift = tl.sum(upper * score, 1) / total
    slope = tl.zeros((ROWS, EXPERTS), tl.float32)
    for i in tl.static_range(K):
        one = row.to(tl.int64) * K + i
        g = (tl.load(gradient + one, mask=row < tokens, other=0.0).to(tl.float32) - shift) / total * scale
        here = tl.load(ids + one, mask=row < tokens, other=0)
        slope += tl.where(expert[None, :] == here[:, None], g[:, None], 0.0)
    to = row[:, None].to(tl.int64) * experts + expert[None, :]
    tl.store(slopes + to, slope, mask=(row < tokens)[:, None] & (expert < experts)[None, :])


def expert_tile(experts: int) -> dict[str, int]:
    """Rows of which a program of four warps holds all experts, in 32 registers a thread."""
    whole = triton.next_power_of_2(experts)
    return {"ROWS": max(4096 // whole, 1), "EXPERTS": whole}


class _Scores(torch.autograd.Function):
    """Saves the scores, from which the slope follows; the product's own gradients are torch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        (tokens, width), experts = x.shape, len(weight)
        scores = x.new_empty(tokens, experts, dtype=torch.float32)
        whole = max(triton.next_power_of_2(experts), 16)
        tall = max(16, min(32, 8192 // whole))
        _router_scores_kernel[(triton.cdiv(tokens, tall),)](
            x, weight, scores, tokens, experts, width, BM=tall, EXPERTS=whole, BK=32, num_warps=8
        )
        ctx.save_for_backward(x, weight, scores)
        return scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scores = ctx.saved_tensors
        slopes = torch.empty_like(scores)
        count = scores.numel()
        _score_slopes_kernel[(triton.cdiv(count, 1024),)](scores, gradient.contiguous(), slopes, count, BLOCK=1024)
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            to_x = (slopes @ weight.float()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            to_weight = (slopes.mT @ x.float()).to(weight.dtype)
        return to_x, to_weight


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, ids: Tensor, scale: float) -> Tensor:
        scores, ids = scores.contiguous(), ids.contiguous()
        tokens, k = ids.shape
        weights = scores.new_empty(tokens, k)
        whole = triton.next_power_of_2(k)
        tall = max(1024 // whole, 1)
        _weights_kernel[(triton.cdiv(tokens, tall),)](
            scores, ids, weights, tokens, scores.shape[1], float(scale), K=k, WHOLE=whole, ROWS=tall
        )
        ctx.save_for_backward(scores, ids)
        ctx.scale = float(scale)
        return weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scores, ids = ctx.saved_tensors
        (tokens, k), experts = ids.shape, scores.shape[1]
        slopes, tile = torch.empty_like(scores), expert_tile(experts)
        _weight_slopes_kernel[(triton.cdiv(tokens, tile["ROWS"]),)](
            scores, ids, gradient.contiguous(), slopes, tokens, experts, ctx.scale,
            K=k, WHOLE=triton.next_power_of_2(k), **tile,
        )  # fmt: skip
        return slopes, None, None


def _top_on_device(scores: Tensor, k: int) -> Tensor:
    scores = scores.detach().float().contiguous()
    tokens, experts = scores.shape
    k = min(k, experts)
    ids, tile = scores.new_empty(tokens, k, dtype=torch.long), expert_tile(experts)
    _top_kernel[(triton.cdiv(tokens, tile["ROWS"]),)](scores, ids, tokens, experts, K=k, **tile)
    return ids
