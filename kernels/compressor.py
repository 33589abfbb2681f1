"""Compression of token blocks into single entries, by a softmax over the block, per channel."""

import torch
from torch import Tensor

from .documents import Blocks


def compress(kv: Tensor, gate: Tensor, position_bias: Tensor, blocks: Blocks, overlap: bool) -> Tensor:
    """Pools every complete block of tokens into one entry, ``[B, N, C]`` (recipe 2.2; paper eq. 9-12 and 20-23).

    Args:
        kv: ``[B, T, C]``, or ``[B, T, 2C]`` with ``overlap``: the first half is what a token gives to the *next* block,
            the second half what it gives to its own.
        gate: of the same shape.
        position_bias: ``[ratio, C or 2C]``, added to the gate by place within the block.
        overlap: CSA pools 2 * ratio slots (previous block and own), HCA only its own.

    Entries that do not exist (see ``Blocks``) hold arbitrary finite numbers.
    """
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
