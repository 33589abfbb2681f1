"""Where tokens stand that go on with a document, the beginning of which lies in a cache.

A row holds new tokens alone: what it says of earlier ones, it says by row indices below 0. Shapes: B batch, T new
tokens of each row, P tokens before them, N compressed entries of the document so far.
"""

import torch
from torch import Tensor

from .documents import Blocks, Documents, LaterBlocks


def continue_documents(tokens: Tensor, past: int) -> Documents:
    """Each row of ``tokens [B, T]`` goes on with a document that has ``past`` tokens already."""
    index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return Documents(torch.full_like(index, -past), index + past, torch.ones_like(index, dtype=torch.bool))


def continue_blocks(documents: Documents, past: int, ratio: int) -> Blocks:
    """``find_blocks`` for ``continue_documents``: all entries of the documents, those in the cache first.

    Returns:
        N = (P + T) // ratio entries; ``start`` is negative where a block begins before the row.
    """
    position = documents.position
    rows, length = position.shape
    entry = torch.arange((past + length) // ratio, device=position.device).expand(rows, -1)
    return LaterBlocks(entry * ratio - past, entry > 0, torch.zeros_like(position), (position + 1) // ratio, ratio)
