"""Calls of the indexer's loss that compile its kernels; its tests' arguments are in indexer_cases.py."""

from collections.abc import Callable
from functools import partial

import torch
from indexer_cases import after_a_cache

from openv4.kernels.indexer_loss import Attended, indexer_loss


def learn(dtype: torch.dtype, k: int | None, learns: bool) -> None:
    """At the dims of V4-Flash."""
    blocks = after_a_cache(256, 2048)
    queries, weights = torch.zeros(1, 256, 64, 128, dtype=dtype), torch.zeros(1, 256, 64, dtype=dtype)
    keys, entries = torch.zeros(1, 2048, 128, dtype=dtype), torch.zeros(1, 2048, 512, dtype=dtype)
    attention = Attended(torch.zeros(1, 256, 64, 512, dtype=dtype), entries, torch.zeros(1, 256, 64))
    valid = torch.ones(1, 256, dtype=torch.bool)
    selected = None if k is None else torch.full((1, 256, k), -1)
    leaves = [x.requires_grad_(learns) for x in (queries, keys, weights)]
    loss = indexer_loss(*leaves, attention, blocks, valid, selected)
    if learns:
        loss.kl.backward()


def flash_calls() -> dict[str, Callable[[], None]]:
    """Sparse training and warm-up, and the loss alone, of a forward pass that will be repeated."""
    return {
        f"{'all' if k is None else k} entries, {dtype}, {'learning' if learns else 'loss alone'}": partial(
            learn, dtype, k, learns
        )
        for dtype in (torch.bfloat16, torch.float32)
        for k in (512, None)
        for learns in (True, False)
    }
