"""Which compressed entries some tokens of a row attend to: a range of all visible ones, or a chosen few of them.

Attention and the indexer's loss walk over the tokens in portions; for each portion, ``View`` holds the keys and what
is hidden of them, so that both cases are one batched product. Shapes: B batch, T tokens, t tokens of the portion,
N compressed entries, n keys of the portion, k chosen entries, C channels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .documents import Blocks


def additive_mask(unseen: Tensor) -> Tensor:
    """0, and -inf where ``unseen``: added to scores, it costs a third of a masked fill that broadcasts over heads."""
    return torch.zeros(unseen.shape, device=unseen.device).masked_fill_(unseen, float("-inf"))


def is_selected(selected: Tensor, count: int) -> Tensor:
    """Whether each of ``count`` entries is among a token's ``selected [B, T, k]`` (-1 for none), ``[B, T, N]`` bool."""
    slot = torch.where(selected < 0, count, selected)
    inside = torch.zeros(*selected.shape[:2], count + 1, dtype=torch.bool, device=selected.device)
    return inside.scatter_(2, slot, True)[..., :-1]


class View(NamedTuple):
    """The entries that tokens ``start:start + t`` of every row attend to."""

    low: int
    high: int  # entries low <= n < high, if none were selected
    rows: Tensor | None  # [B t k] rows of the flattened [B N, C] entries, if some were
    hidden: Tensor  # [B, t, n] float32: 0, and -inf where an entry is not attended to

    @classmethod
    def of(cls, blocks: Blocks, selected: Tensor | None, start: int, tokens: int) -> "View":
        """Tokens beyond the row's end see nothing. ``selected [B, T, k]``: the chosen entries, -1 for none."""
        stop = min(start + tokens, blocks.end.shape[1])
        beyond = start + tokens - stop
        if selected is not None:
            chosen = F.pad(selected[:, start:stop], (0, 0, 0, beyond), value=-1)
            row = torch.arange(len(chosen), device=chosen.device).view(-1, 1, 1) * blocks.start.shape[1]
            return cls(0, 0, (chosen.clamp(min=0) + row).flatten(), additive_mask(chosen < 0))
        low, high = blocks.span(start, stop)
        first, end = (F.pad(x[:, start:stop], (0, beyond)) for x in (blocks.first, blocks.end))
        return cls.range(first, end, low, high)

    @classmethod
    def range(cls, first: Tensor, end: Tensor, low: int, high: int) -> "View":
        """All that is visible: entries first <= n < end of ``low:high``, for tokens ``[B, t]``."""
        entry = torch.arange(low, high, device=first.device)
        unseen = (entry < first.unsqueeze(-1)) | (entry >= end.unsqueeze(-1))
        return cls(low, high, None, additive_mask(unseen))

    def keys(self, entries: Tensor) -> Tensor:
        """The entries ``[B, N, C]`` as keys: ``[B, n, C]``, shared by a row's tokens, or ``[B t, k, C]``, each its own.

        A product with queries ``[B, t, H, C]`` is a product with ``queries.view(len(keys), -1, C)`` in both cases.
        """
        if self.rows is None:
            return entries[:, self.low : self.high]
        own = entries.flatten(0, 1).index_select(0, self.rows)
        return own.view(-1, self.hidden.shape[2], entries.shape[2])

    def add_gradient(self, total: Tensor, gradient: Tensor) -> None:
        """Adds the gradient of ``keys(entries)`` to that of the entries ``[B, N, C]``, in place."""
        if self.rows is None:
            total[:, self.low : self.high] += gradient
        else:
            total.view(-1, total.shape[2]).index_add_(0, self.rows, gradient.view(-1, total.shape[2]))
