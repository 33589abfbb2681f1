"""What a model keeps of the tokens it has read, so that a new one costs one token's work (recipe 10, inference caches).

Per layer: the last W - 1 keys/values, the compressed entries of the document so far, in CSA layers the indexer's keys,
and what the compressors need of tokens whose block is not complete. A cache holds one document per row, all of the
same length.

Shapes: B batch, T new tokens, C channels, W window, r compression ratio.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import ModelConfig


class Recent:
    """The last rows of ``[B, T, C]``."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None

    def extend(self, rows: Tensor, keep: int) -> Tensor:
        """What was kept, followed by ``rows``; the last ``keep`` of it stay for the next time."""
        joined = rows if self.rows is None else torch.cat((self.rows, rows), 1)
        self.rows = joined[:, max(joined.shape[1] - keep, 0) :].clone()  # a view would hold on to all of a prompt
        return joined


class Growing:
    """Rows that only become more, in a buffer that doubles: an appended row costs O(1) on average."""

    def __init__(self) -> None:
        self.count = 0
        self.buffer: Tensor | None = None

    def append(self, rows: Tensor) -> Tensor:
        """All rows ``[B, n, C]`` with the new ones last; a view, good until the next call."""
        before, self.count = self.count, self.count + rows.shape[1]
        room = 0 if self.buffer is None else self.buffer.shape[1]
        if self.buffer is None or self.count > room:
            larger = rows.new_empty(len(rows), max(self.count, 2 * room), rows.shape[2])
            if self.buffer is not None:
                larger[:, :before] = self.buffer[:, :before]
            self.buffer = larger
        self.buffer[:, before : self.count] = rows
        return self.buffer[:, : self.count]


class CompressorCache:
    """Of one compressor: its entries, and the projections of the tokens that it has yet to compress."""

    def __init__(self, ratio: int) -> None:
        self.ratio = ratio
        self.kv, self.gate, self.entries = Recent(), Recent(), Growing()


@dataclass
class LayerCache:
    """Of one attention layer."""

    window: Recent = field(default_factory=Recent)  # after norm and rotation
    entries: CompressorCache | None = None
    index: CompressorCache | None = None  # CSA: the indexer's keys

    @property
    def compressors(self) -> list[CompressorCache]:
        return [cache for cache in (self.entries, self.index) if cache is not None]


class Cache:
    """An empty cache for ``Transformer.decode``, which fills it; takes the batch, dtype and device of what it is given.

    Attributes:
        rows: documents that it holds, None as long as it is empty; length: tokens of each.
        layers: one cache per main layer (generation does not run the MTP block).
    """

    def __init__(self, config: ModelConfig) -> None:
        self.rows: int | None = None
        self.length = 0
        self.layers: list[LayerCache] = []
        for kind, ratio in zip(config.kinds[: config.num_hidden_layers], config.compress_ratios, strict=False):
            entries = CompressorCache(ratio) if ratio else None
            self.layers.append(LayerCache(Recent(), entries, CompressorCache(ratio) if kind == "csa" else None))

    @property
    def bytes(self) -> int:
        """Size of what is held; spare room of the growing buffers, at most as much again, is not counted."""
        held = sum(rows.numel() * rows.element_size() for rows in self._recent())
        for buffer, count, _ in self._growing():
            held += buffer[:, :count].numel() * buffer.element_size()
        return held

    @property
    def bytes_per_token(self) -> float:
        """What each further token of the batch's rows adds on average, once the windows are full."""
        return sum(len(b) * b.shape[2] * b.element_size() / ratio for b, _, ratio in self._growing())

    def _recent(self) -> Iterator[Tensor]:
        for layer in self.layers:
            for recent in (layer.window, *(r for c in layer.compressors for r in (c.kv, c.gate))):
                if recent.rows is not None:
                    yield recent.rows

    def _growing(self) -> Iterator[tuple[Tensor, int, int]]:
        for layer in self.layers:
            for cache in layer.compressors:
                if cache.entries.buffer is not None:
                    yield cache.entries.buffer, cache.entries.count, cache.ratio


def pending(length: int, ratio: int, overlap: bool) -> tuple[int, int]:
    """Of a document of ``length`` tokens so far, what a compressor still needs (recipe 2.2).

    Returns:
        the number of tokens at its end: those of the incomplete block and, where blocks overlap, those of the block
        before; and how many of these blocks, 0 or 1, were compressed already.
    """
    complete = length // ratio
    again = int(overlap and complete > 0)
    return length - (complete - again) * ratio, again
