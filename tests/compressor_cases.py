"""Arguments of the compressors, for their tests and for compiling their kernels."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from openv4.kernels.compressor import compress, compress_entries
from openv4.kernels.documents import Blocks, find_blocks, find_documents
from openv4.kernels.rope import rope_frequencies, rope_table

# Lengths of the documents of the first row; a negative one is padding. Some documents are too short for a block, some
# rows begin or end with such, and with a gap between blocks that is longer than a block.
PACKINGS = {
    "short": [5, 3, 9, 1, 1, 2, 2, 1, 4, 2],
    "padded": [2, 2, 1, 8, -5, 4, -3],
    "whole": [8, 4],
    "none": [2],
}


def pack(lengths: Sequence[int]) -> Tensor:
    """Segments ``[3, T]``: those documents, one followed by padding, and padding alone."""
    parts = [torch.full((abs(length),), i if length > 0 else -1) for i, length in enumerate(lengths)]
    first = torch.cat(parts)
    second = torch.where(torch.arange(len(first)) < len(first) // 2, 7, -1)
    return torch.stack((first, second, torch.full_like(first, -1)))


def existing(blocks: Blocks) -> Tensor:
    """Which entries there are, ``[B, N, 1]``."""
    count = blocks.end[:, -1:]
    return (torch.arange(blocks.start.shape[1], device=count.device) < count).unsqueeze(-1)


def draw(
    lengths: Sequence[int], ratio: int, channels: int, overlap: bool, dtype: torch.dtype, pairs: int = 2, seed: int = 1
) -> dict[str, Any]:
    """Arguments of ``compress_entries``; kv and gate have that dtype."""
    generator = torch.Generator().manual_seed(seed)
    documents = find_documents(pack(lengths))
    blocks = find_blocks(documents, ratio)
    width = channels * (1 + overlap)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "kv": normal(*documents.first.shape, width).to(dtype),
        "gate": 2 * normal(*documents.first.shape, width).to(dtype),
        "position_bias": normal(ratio, width),
        "blocks": blocks,
        "overlap": overlap,
        "weight": normal(channels),
        "eps": 1e-6,
        "table": rope_table(documents.position.gather(1, blocks.start), rope_frequencies(2 * pairs, 100.0)),
    }


def flash_calls() -> dict[str, Callable[[], None]]:
    """The three compressors of V4-Flash; and sizes that fill no tile."""

    def call(ratio: int, channels: int, overlap: bool, pairs: int, dtype: torch.dtype) -> None:
        documents = find_documents(torch.zeros(1, 256))
        blocks = find_blocks(documents, ratio)
        width = channels * (1 + overlap)
        kv, gate = (torch.zeros(1, 256, width, dtype=dtype, requires_grad=True) for _ in range(2))
        bias, weight = torch.zeros(ratio, width, requires_grad=True), torch.zeros(channels, requires_grad=True)
        table = rope_table(documents.position.gather(1, blocks.start), rope_frequencies(2 * pairs, 100.0))
        compress(kv, gate, bias, blocks, overlap).sum().backward()
        compress_entries(kv, gate, bias, blocks, overlap, weight, 1e-6, table).sum().backward()

    sizes = {
        "CSA": (4, 512, True, 32),
        "indexer": (4, 128, True, 32),
        "HCA": (128, 512, False, 32),
        "odd": (3, 9, True, 1),
        "one": (1, 2, False, 1),
    }
    return {
        f"{name}, {dtype}": partial(call, *size, dtype)
        for name, size in sizes.items()
        for dtype in (torch.float32, torch.bfloat16)
    }
