"""Where the documents of a packed row lie, and which compressed entries they yield.

A row holds documents one after another; ``segments`` names them. Everything positional in the model (window,
compression blocks, rotary positions) is derived here, once a forward pass, so that no operation can
look across a border.

Shapes: B batch, T tokens, N compressed entries (T // ratio, the most a row can hold).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Document geometry of a batch of rows, all ``[B, T]``."""

    first: Tensor  # int64: row index of the first token of this token's document
    position: Tensor  # int64: index of the token within its document
    valid: Tensor  # bool: False for padding


class Blocks(NamedTuple):
    """Compression blocks of one ratio. Entry n of a row is its n-th complete block, counted over all documents."""

    start: Tensor  # [B, N] int64: row index of the block's first token; 0 for entries that do not exist
    chained: Tensor  # [B, N] bool: the previous entry belongs to the same document
    first: Tensor  # [B, T] int64: first entry of this token's document
    end: Tensor  # [B, T] int64: one past the last entry that this token may see
    ratio: int  # tokens in a block

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Bounds of the entries that any of the tokens ``start:stop`` of any row sees.

        Exact on a CPU. Elsewhere reading them would make the host wait, and causality alone bounds them.
        """
        count = self.start.shape[1]
        if self.end.device.type != "cpu":
            return 0, min(count, stop // self.ratio)
        low, high = int(self.first[:, start:stop].min()), int(self.end[:, start:stop].max())
        return min(low, high), high


class LaterBlocks(Blocks):
    """Blocks of which some lie before the row, so that its length does not bound them."""

    __slots__ = ()

    def span(self, start: int, stop: int) -> tuple[int, int]:
        # The row's last token may see all entries; what earlier ones see follows without asking the device.
        return 0, self.start.shape[1] - (self.end.shape[1] - stop) // self.ratio


def find_documents(segments: Tensor) -> Documents:
    """A new document begins wherever ``segments [B, T]`` changes; -1 marks padding."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = torch.where(begins, index, 0).cummax(1).values
    return Documents(first, index - first, segments >= 0)


def find_blocks(documents: Documents, ratio: int) -> Blocks:
    """Cuts each document into blocks of ``ratio`` tokens, counted from its own first token; a tail yields no entry.

    A token sees the entries of its document that end at or before it: its own block counts once the token is its last
    (the official code's s < floor((t + 1) / ratio), recipe 2.4).
    """
    first, position, valid = documents
    rows, length = position.shape
    count = length // ratio
    index = torch.arange(length, device=position.device).expand_as(position)
    completes = (position % ratio == ratio - 1) & valid
    end = completes.cumsum(1)
    before = end - completes.long()  # entries that end before this token
    slot = torch.where(completes, before, count)
    start = torch.zeros(rows, count + 1, dtype=torch.long, device=position.device)
    start.scatter_(1, slot, index - (ratio - 1))  # tokens that complete nothing write to the slot that is cut off
    start = start[:, :count]
    chained = position.gather(1, start) > 0
    return Blocks(start, chained, before.gather(1, first), end, ratio)
