"""Where tokens stand that are a part of a row, the other parts of which other processes have.

Every process knows whole rows of segments, so all of this is derived from the geometry of whole rows; nothing is asked
of other processes. Columns count from the part's first token and are negative before it. Shapes: B batch, T tokens of a
row, L = T / size tokens of a part, N entries up to the part's end, M entries that a part pools at most, ratio r.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .documents import Blocks, Documents, LaterBlocks


class Share(NamedTuple):
    """The entries that one part pools: those whose last token it holds, M = ceil(L / r) or fewer in a row."""

    blocks: Blocks  # columns count from ``reach`` tokens before the part; without those of queries
    skip: int  # entries before its own, 1 where blocks overlap: what it takes of the one before
    token: Tensor  # [B, M] int64: column in the whole row of the block's first token; 0 for entries that do not exist
    place: Tensor  # [B, N] int64: where the row's entries stand among [size, B, M], those of all parts

    @property
    def reach(self) -> int:
        """Tokens before the part that its entries may pool."""
        return (1 + self.skip) * self.blocks.ratio - 1


def part_documents(documents: Documents, start: int, stop: int) -> Documents:
    """Of the tokens ``start:stop`` of whole rows."""
    first, position, valid = (x[:, start:stop] for x in documents)
    return Documents(first - start, position, valid)


def part_blocks(blocks: Blocks, start: int, stop: int) -> Blocks:
    """What the tokens ``start:stop`` of whole rows see: entries keep their numbers, later ones are left out."""
    count = stop // blocks.ratio
    begins, chained = blocks.start[:, :count] - start, blocks.chained[:, :count]
    return LaterBlocks(begins, chained, blocks.first[:, start:stop], blocks.end[:, start:stop], blocks.ratio)


def share_blocks(blocks: Blocks, rank: int, size: int, overlap: bool) -> Share:
    """Divides the entries of whole rows among ``size`` parts, each to the one that holds its last token."""
    ratio, (rows, length) = blocks.ratio, blocks.end.shape
    part = length // size
    most, reach = -(-part // ratio), (1 + overlap) * ratio - 1
    bound = F.pad(blocks.end, (1, 0))[:, ::part].contiguous()  # [B, size + 1] entries that end before each part
    before, known = bound[:, rank, None], bound[:, rank + 1, None] - bound[:, rank, None]

    slot = torch.arange(most, device=bound.device).expand(rows, -1)
    exists, own = slot < known, (before + slot).clamp(max=blocks.start.shape[1] - 1)
    token = torch.where(exists, blocks.start.gather(1, own), 0)
    begins = torch.where(exists, token - (rank * part - reach), 0)
    chained = blocks.chained.gather(1, own) & exists
    if overlap:  # the block before the first: its own entry is another part's, or there is none and it is not chained
        begins = torch.cat(((begins[:, :1] - ratio).clamp(min=0), begins), 1)
        chained = F.pad(chained, (1, 0))
    pooled = Blocks(begins, chained, torch.zeros_like(known), known + overlap, ratio)

    entry = torch.arange((rank + 1) * part // ratio, device=bound.device).repeat(rows, 1)
    owner = torch.searchsorted(bound[:, 1:].contiguous(), entry, right=True)
    row = torch.arange(rows, device=bound.device).unsqueeze(1)
    place = (owner * rows + row) * most + entry - bound.gather(1, owner)
    return Share(pooled, int(overlap), token, torch.where(entry < bound[:, -1:], place, 0))
