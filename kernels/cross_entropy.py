"""Cross-entropy of an output head, computed from hidden states without ever holding all logits.

Shapes: M tokens (leading dimensions flattened), m tokens of a chunk, D hidden, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import at_least_fp32

IGNORED = -100

# Logits that are alive at once: 2**23 float32 are 32 MB, 64 tokens of V4's vocabulary. A GPU wants larger products.
CPU_ELEMENTS, GPU_ELEMENTS = 2**23, 2**28


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

    Args:
        hidden: ``[..., D]``; weight: ``[V, D]``; targets: ``[...]`` int64.
    """
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)
    return total


@torch.no_grad()
def token_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The terms of ``linear_cross_entropy``, ``[...]``, 0 where the target is ``IGNORED``; no gradient."""
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
