"""Rows that several processes share, each with a consecutive part of their tokens (recipe 10, context parallel).

Every process is given whole rows of tokens and segments, which are small, and computes its part of them. What it needs
of the others goes through ``Neighbours``; ``train/context.py`` has the one that communicates. Shapes: B batch, T tokens
of a row, L of a part, C channels, E experts, K experts per token.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.documents import Blocks, Documents
from ..kernels.parts import Share, share_blocks
from .config import ModelConfig


class Neighbours(Protocol):
    """The processes that share a row. All call the same methods in the same order, forward and backward."""

    rank: int  # which part this process has
    size: int  # parts of a row

    def before(self, rows: Tensor, count: int) -> Tensor:
        """The last ``count`` tokens of the part before, ``[B, count, C]``, zeros before the first part. ``rows`` are
        this process's part, ``[B, L, C]``. Their gradient goes back to where they are from."""

    def gather(self, rows: Tensor) -> Tensor:
        """``rows`` of all parts, in order, ``[size, *rows.shape]``. The gradients that they get in all processes are
        summed, in at least float32 and in the order of parts."""


@dataclass(frozen=True)
class Part:
    """The part of a batch's rows that this process has: the tokens ``start:stop``."""

    neighbours: Neighbours
    start: int
    stop: int
    shares: dict[tuple[int, bool], Share]  # by ratio and whether blocks overlap: what its compressors pool
    ends: Tensor  # [size, B, 2] int64: first tokens of the documents of each part's first and last token

    @classmethod
    def of(cls, config: ModelConfig, neighbours: Neighbours, documents: Documents, blocks: dict[int, Blocks]) -> "Part":
        """From the geometry of whole rows.

        Raises:
            ValueError: the rows cannot be shared so.
        """
        length, rank, size = documents.first.shape[1], neighbours.rank, neighbours.size
        start, stop = part_bounds(config, length, neighbours)
        kinds = {(r, kind == "csa") for r, kind in zip(config.compress_ratios, config.kinds, strict=True) if r}
        shares = {(r, overlap): share_blocks(blocks[r], rank, size, overlap) for r, overlap in kinds}
        ends = documents.first.unflatten(1, (size, -1))[:, :, [0, -1]].transpose(0, 1)
        return cls(neighbours, start, stop, shares, ends)

    @torch.no_grad()
    def count_elsewhere(self, best: Tensor, first: Tensor, valid: Tensor, experts: int) -> Tensor:
        """Of the documents of the part's first and last token, what the other parts have: how often each expert is
        among the best, and tokens, ``[B, 2, E + 1]`` int64; 0 for the second if it is the first.

        Args:
            best: ``[B, L, K]``; first, valid: ``[B, L]``; all of the part.
        """
        rank = self.neighbours.rank
        ends = first[:, [0, -1]]
        inside = (first.unsqueeze(1) == ends.unsqueeze(2)) & valid.unsqueeze(1)  # [B, 2, L]
        two = (ends[:, :1] != ends[:, 1:]).unsqueeze(2)
        inside = torch.cat((inside[:, :1], inside[:, 1:] & two), 1)
        counts = torch.zeros(len(best), 2, experts + 1, dtype=torch.long, device=best.device)
        chosen = best.flatten(1).unsqueeze(1).expand(-1, 2, -1)
        counts.scatter_add_(2, chosen, inside.repeat_interleave(best.shape[2], 2).long())
        counts[..., experts] = inside.sum(2)
        everywhere = self.neighbours.gather(counts)  # [size, B, 2, E + 1]
        everywhere[rank] = 0
        same = self.ends[rank].unsqueeze(2) == self.ends.unsqueeze(2)  # [size, B, 2, 2]
        found = (everywhere.unsqueeze(2) * same.unsqueeze(-1)).sum((0, 3))
        return torch.cat((found[:, :1], found[:, 1:] * two), 1)


def part_bounds(config: ModelConfig, length: int, neighbours: Neighbours | None) -> tuple[int, int]:
    """Columns ``start, stop`` of this process in rows of ``length`` tokens; all of them without neighbours.

    Raises:
        ValueError: the rows cannot be shared so.
    """
    if neighbours is None:
        return 0, length
    size, least = neighbours.size, config.shortest_part
    if length % size:
        raise ValueError(f"context={size} does not divide rows of {length} tokens; choose a size that does")
    part = length // size
    if part < least:
        raise ValueError(
            f"context={size} leaves {part} tokens of a row to each process, a window or block reaches over {least}; "
            f"use rows of at least {size * least} tokens or fewer processes for each"
        )
    return neighbours.rank * part, (neighbours.rank + 1) * part
