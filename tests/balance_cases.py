"""Arguments of the balance loss, for its tests and for compiling its kernels."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from openv4.kernels.balance import balance_loss
from openv4.kernels.documents import find_documents


def documents(rows: Sequence[Sequence[int]], padding: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``first`` and ``valid`` of rows of documents of these lengths, each row followed by that much padding."""
    segments = [
        torch.cat([torch.full((n,), i) for i, n in enumerate(row)] + [torch.full((more,), -1)])
        for row, more in zip(rows, padding, strict=True)
    ]
    found = find_documents(torch.stack(segments))
    return found.first, found.valid


def flash_calls() -> dict[str, Callable[[], None]]:
    """V4-Flash's experts, Pro's, and numbers that fill no tile."""

    def call(experts: int, k: int, length: int) -> None:
        scores = torch.zeros(1, length, experts, requires_grad=True)
        best = torch.zeros(1, length, k, dtype=torch.long)
        first, valid = documents([[length]], [0])
        balance_loss(scores, best, first, valid).backward()

    sizes = ((256, 6, 256), (384, 6, 4096), (13, 3, 40), (1, 1, 1), (512, 8, 16))
    return {f"{e} experts, top {k}, {t} tokens": partial(call, e, k, t) for e, k, t in sizes}
