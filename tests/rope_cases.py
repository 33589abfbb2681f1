"""Arguments of the rotary embedding, for its tests and for compiling its kernels."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from openv4.kernels.rope import apply_rope, norm_rope, rope_frequencies, rope_table

# [B, T, ..., C], and how many pairs turn; some rows have an odd length, in some everything turns.
CASES = [
    ((1, 1, 2), 1),
    ((2, 3, 9), 3),
    ((2, 0, 8), 2),
    ((2, 63, 6), 3),
    ((1, 5, 3, 2, 7), 1),
    ((2, 31, 3, 40), 8),
    ((1, 7, 431), 32),
]


def table_of(shape: tuple[int, ...], pairs: int) -> tuple[Tensor, Tensor]:
    """Of positions that differ from row to row."""
    positions = 3 * torch.arange(shape[1]) + 1000 * torch.arange(shape[0]).unsqueeze(1)
    return rope_table(positions, rope_frequencies(2 * pairs, 100.0))


def flash_calls() -> dict[str, Callable[[], None]]:
    """Query heads, the window's keys, the output of attention, the indexer's queries; and a size that fills no tile."""

    def call(heads: tuple[int, ...], channels: int, pairs: int, weighted: bool, dtype: torch.dtype) -> None:
        x = torch.zeros(1, 256, *heads, channels, dtype=dtype, requires_grad=True)
        weight = torch.zeros(channels, requires_grad=True) if weighted else None
        table = table_of((1, 256), pairs)
        for inverse in (False, True):
            apply_rope(x, table, inverse).sum().backward()
        norm_rope(x, weight, 1e-6, table).sum().backward()

    sizes = {
        "queries": ((64,), 512, 32, False),
        "keys": ((), 512, 32, True),
        "index queries": ((64,), 128, 32, False),
        "odd": ((3,), 9, 1, True),
    }
    return {
        f"{name}, {dtype}": partial(call, *size, dtype)
        for name, size in sizes.items()
        for dtype in (torch.bfloat16, torch.float32)
    }
