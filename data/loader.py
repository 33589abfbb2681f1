"""Batches of packed documents from several sources, at a position of a few integers.

An epoch of a source is a pseudo-random permutation of its documents, computed by index arithmetic. It is taken in
blocks; the documents of a block are packed by themselves and the rows shuffled. So a position is the epoch, the block's
first and last document, and how many rows of it are used: any position is reached without replaying what came before,
and every token of a source comes exactly once in each of its epochs.
"""

import copy
import hashlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .config import DataError
from .packing import pack
from .shards import TokenStore

# A block holds so many documents and rows or more: the fewer, the more of its last row is padding; the more, the longer
# a restart takes (2 us a document).
BLOCK_DOCUMENTS = 512
BLOCK_ROWS = 128

_Ints = npt.NDArray[np.int64]
Piece = tuple[int, int, int, int, int]  # source, epoch, document, start, length
Row = tuple[Piece, ...]


class Batch(NamedTuple):
    tokens: Tensor  # [B, T] int64
    segments: Tensor  # [B, T] int32: 0, 1, 2 ... per row, -1 is padding
    pieces: tuple[Row, ...]  # per row what it holds, for tracing
    trained: Tensor | None = None  # [B, T] bool: the tokens that the loss counts when they are predicted; None: all
    experts: Tensor | None = None  # [B, G, T, K]: ids chosen before (`Transformer.choose_experts`); None: not yet


class Loader:
    """An endless stream of packed batches, the same for any number of workers, ranks and micro-batches.

    Rows are dealt to the sources in proportion to their weights. With `workers` the next batches are made ahead in
    threads; the position is always that of what was delivered. A batch that fails leaves the position as it was.

    Args:
        stores: one per source.
        weights: shares of the rows, relative to each other.
        seed: of the order of the documents and rows.
        workers: threads that make batches ahead; 0 makes them when asked.
        pad_id: token in the padding.

    Raises:
        DataError: a source is empty, or a weight is not positive.
    """

    def __init__(
        self, stores: Sequence[TokenStore], weights: Sequence[float], seed: int, workers: int = 0, pad_id: int = 1
    ) -> None:
        if len(stores) != len(weights) or not stores:
            raise DataError(
                f"{len(stores)} sources and {len(weights)} weights: give at least one source, each a weight"
            )
        for index, (store, weight) in enumerate(zip(stores, weights, strict=True)):
            if store.tokens == 0:
                raise DataError(f"source {index} has no documents in this split: remove it or prepare more text")
            if not (weight > 0 and math.isfinite(weight)):
                raise DataError(f"source {index} has weight {weight}: must be positive; leave the source out instead")
        self._stores, self._weights, self._seed, self._pad_id = tuple(stores), tuple(weights), seed, pad_id
        self._streams = [_Stream(store, index, seed) for index, store in enumerate(stores)]
        self._delivered = [stream.position for stream in self._streams]
        self._ahead: deque[Future[tuple[Batch, list[_Position]]]] = deque()
        self._request = (0, 0, 0, 0)  # what the batches in _ahead were made for
        self._workers = workers
        if workers:
            # One planner: rows are taken in order. The tokens are then read by all workers.
            self._planner = ThreadPoolExecutor(1, thread_name_prefix="openv4-plan")
            self._readers = ThreadPoolExecutor(workers, thread_name_prefix="openv4-read")

    def next_batch(self, rows: int, row_length: int, rank: int = 0, world: int = 1) -> Batch:
        """The next `rows` rows of the stream, of which this rank gets `rows[rank::world]`.

        The position moves on by all `rows`, so ranks that ask for the same stay in step.

        Raises:
            ValueError: `rows`, `row_length`, `rank` or `world` is out of range.
        """
        if rows < 1 or row_length < 1 or not 0 <= rank < world:
            raise ValueError(f"rows={rows} and row_length={row_length} must be at least 1, rank={rank} below {world=}")
        request = (rows, row_length, rank, world)
        try:
            if self._workers:
                if request != self._request:
                    self._rewind()
                    self._request = request
                while len(self._ahead) <= self._workers:
                    self._make_ahead()
                batch, position = self._ahead[0].result()
                self._ahead.popleft()
            else:
                taken, position = self._take(rows, row_length)
                batch = _assemble(taken[rank::world], self._stores, row_length, self._pad_id)
        except BaseException:
            self._rewind()
            raise
        self._delivered = position
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch delivered, as JSON: a few integers per source."""
        return {
            "seed": self._seed,
            "weights": list(self._weights),
            "sources": [position.to_json() for position in self._delivered],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called. The caller checks that the data are the same.

        Raises:
            DataError: the state is of another seed or mixture.
        """
        for key, mine in (("seed", self._seed), ("weights", list(self._weights))):
            if state[key] != mine:
                raise DataError(
                    f"the saved position is of data with {key}={state[key]}, this run has {mine}: "
                    "set it back, or start a new run"
                )
        self._delivered = [_Position.from_json(position) for position in state["sources"]]
        self._rewind()

    def _take(self, rows: int, row_length: int) -> tuple[list[Row], list["_Position"]]:
        taken = []
        for _ in range(rows):
            # The source that is furthest behind its share: counts stay within one row of the exact proportions.
            turn = min(
                range(len(self._streams)), key=lambda index: (self._streams[index].taken + 0.5) / self._weights[index]
            )
            taken.append(self._streams[turn].next(row_length))
        return taken, [stream.position for stream in self._streams]

    def _make_ahead(self) -> None:
        rows, row_length, rank, world = self._request
        plan = self._planner.submit(self._take, rows, row_length)

        def read() -> tuple[Batch, list[_Position]]:
            taken, position = plan.result()
            return _assemble(taken[rank::world], self._stores, row_length, self._pad_id), position

        self._ahead.append(self._readers.submit(read))

    def _rewind(self) -> None:
        """Drop what was made ahead and go back to what was delivered."""
        wait(self._ahead)
        self._ahead.clear()
        for stream, position in zip(self._streams, self._delivered, strict=True):
            stream.seek(position)


def validation_batches(store: TokenStore, rows: int, row_length: int, pad_id: int = 1) -> Iterator[Batch]:
    """All documents once, in their order, packed; `rows` rows a batch, fewer in the last."""
    packing = pack(store.length(np.arange(store.documents)), row_length)
    pieces = _tuples(0, 0, packing.document, packing.start, packing.length)
    cuts = packing.offsets.tolist()
    for first in range(0, packing.rows, rows):
        last = min(first + rows, packing.rows)
        taken = [tuple(pieces[cuts[row] : cuts[row + 1]]) for row in range(first, last)]
        yield _assemble(taken, (store,), row_length, pad_id)


def _assemble(rows: Sequence[Row], stores: Sequence[TokenStore], row_length: int, pad_id: int) -> Batch:
    tokens = np.full((len(rows), row_length), pad_id, dtype=np.int64)
    segments = np.full((len(rows), row_length), -1, dtype=np.int32)
    trained: npt.NDArray[np.bool_] | None = None
    for index, row in enumerate(rows):
        at = 0
        for segment, (source, _, document, start, length) in enumerate(row):
            tokens[index, at : at + length] = stores[source].read(document, start, length)
            segments[index, at : at + length] = segment
            mask = stores[source].read_trained(document, start, length)
            if mask is not None:
                if trained is None:
                    trained = np.ones(tokens.shape, dtype=np.bool_)
                trained[index, at : at + length] = mask
            at += length
    counted = None if trained is None else torch.from_numpy(trained & (segments >= 0))
    return Batch(torch.from_numpy(tokens), torch.from_numpy(segments), tuple(rows), counted)


def _tuples(source: int, epoch: int, document: _Ints, start: _Ints, length: _Ints) -> list[Piece]:
    triples = zip(document.tolist(), start.tolist(), length.tolist(), strict=True)
    return [(source, epoch, *triple) for triple in triples]


# The order of one source.


@dataclass
class _Position:
    """Where a source stands. `cuts` are the row lengths at which the block was packed and the rows used of each."""

    epoch: int = 0
    start: int = 0  # the block is the documents start to stop of the epoch's order
    stop: int = 0
    cuts: tuple[tuple[int, int], ...] = ()
    taken: int = 0  # rows since the beginning, for the mixture

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "cuts": [list(cut) for cut in self.cuts]}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "_Position":
        return cls(**{**state, "cuts": tuple((length, used) for length, used in state["cuts"])})


class _Stream:
    """The rows of one source, epoch after epoch."""

    def __init__(self, store: TokenStore, source: int, seed: int) -> None:
        self._store, self._source, self._seed = store, source, seed
        self._at = _Position()
        self._length = 0  # of the rows in _rows
        self._rows: list[Row] = []
        self._used = 0

    @property
    def taken(self) -> int:
        return self._at.taken

    @property
    def position(self) -> _Position:
        position = copy.copy(self._at)
        if self._length:
            position.cuts = (*position.cuts, (self._length, self._used))
        return position

    def seek(self, position: _Position) -> None:
        """Go to a position; its block is packed when the next row is asked for."""
        self._at = copy.copy(position)
        self._length, self._rows, self._used = 0, [], 0

    def next(self, row_length: int) -> Row:
        if row_length != self._length:
            self._turn(row_length)
        while self._used == len(self._rows):
            self._next_block(row_length)
        row = self._rows[self._used]
        self._used += 1
        self._at.taken += 1
        return row

    def _turn(self, row_length: int) -> None:
        """Pack what is left of the block at another row length."""
        cuts = self.position.cuts
        used = 0
        if cuts and cuts[-1][0] == row_length:  # after seek
            used = cuts[-1][1]
            cuts = cuts[:-1]
        elif cuts and cuts[-1][1] == 0:
            cuts = cuts[:-1]
        self._at.cuts, self._length, self._used = cuts, row_length, used
        self._pack()

    def _next_block(self, row_length: int) -> None:
        at, documents = self._at, self._store.documents
        at.start = at.stop
        if at.start == documents:
            at.epoch, at.start = at.epoch + 1, 0
        mean = self._store.tokens / documents
        size = max(BLOCK_DOCUMENTS, math.ceil(BLOCK_ROWS * row_length / mean))
        at.stop = at.start + size
        if documents - at.stop < size // 2:  # no small block at the end of an epoch
            at.stop = documents
        at.cuts, self._length, self._used = (), row_length, 0
        self._pack()

    def _pack(self) -> None:
        at = self._at
        order = permute(np.arange(at.start, at.stop), self._store.documents, self._key("documents", at.epoch))
        place, start = np.arange(len(order)), np.zeros(len(order), dtype=np.int64)
        length = self._store.length(order)
        for turn, (row_length, used) in enumerate((*at.cuts, (self._length, None))):
            packing = pack(length, row_length)
            place, start, length = place[packing.document], start[packing.document] + packing.start, packing.length
            row = np.repeat(np.arange(packing.rows), np.diff(packing.offsets))
            shuffled = permute(np.arange(packing.rows), packing.rows, self._key("rows", at.epoch, at.start, turn))
            if used is not None:
                left = np.isin(row, shuffled[used:])
                place, start, length = _merge(place[left], start[left], length[left])
        pieces = _tuples(self._source, at.epoch, order[place], start, length)
        cuts = packing.offsets.tolist()
        self._rows = [tuple(pieces[cuts[index] : cuts[index + 1]]) for index in shuffled.tolist()]

    def _key(self, *purpose: str | int) -> int:
        text = "/".join(map(str, (self._seed, self._source, *purpose)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _merge(place: _Ints, start: _Ints, length: _Ints) -> tuple[_Ints, _Ints, _Ints]:
    """Sort pieces by document and join those that touch."""
    order = np.lexsort((start, place))
    place, start, length = place[order], start[order], length[order]
    new = np.ones(len(place), dtype=bool)
    new[1:] = (place[1:] != place[:-1]) | (start[1:] != start[:-1] + length[:-1])
    first = np.flatnonzero(new)
    return place[first], start[first], np.add.reduceat(length, first) if len(first) else length


def permute(index: _Ints, count: int, key: int) -> _Ints:
    """Where a pseudo-random permutation of `range(count)` sends `index` `[N]`: a Feistel network with cycle walking.

    A pure function of its arguments: no table, O(1) per index. Eight rounds of splitmix64's finaliser on half the bits.
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = _mix(np.arange(1, 9, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key))

    def rounds(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = value >> bits, value & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        return (left << bits) | right

    result = rounds(index.astype(np.uint64))
    outside = np.flatnonzero(result >= count)
    while len(outside):  # the domain is below 4 * count: four tries on average at worst
        result[outside] = rounds(result[outside])
        outside = outside[result[outside] >= count]
    return result.astype(np.int64)


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
