"""Best-fit packing of documents into rows of one length: Ding et al. 2024, "Fewer Truncations", arXiv:2404.10830."""

import bisect
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_Ints = npt.NDArray[np.int64]


class Packing(NamedTuple):
    """Rows of pieces. Row r holds the pieces `offsets[r]` to `offsets[r + 1]`; a piece is a slice of a document."""

    document: _Ints  # [P] index into the lengths that were packed
    start: _Ints  # [P]
    length: _Ints  # [P]
    offsets: _Ints  # [R + 1]

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1


def pack(lengths: npt.ArrayLike, row_length: int) -> Packing:
    """Pack documents of `lengths` `[N]` into rows of `row_length` tokens; every token once, no row overfull.

    A document is cut only where it is longer than a row: into full rows and one remainder. Remainders are placed by
    best-fit decreasing. Rows, and the pieces in them, come in the order of their first document, which does not depend
    on the lengths' order; empty documents are left out. O(N log N), deterministic.

    Raises:
        ValueError: `row_length` is below 1, or a length is negative.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if row_length < 1 or np.any(lengths < 0):
        raise ValueError(f"row_length={row_length} must be at least 1 and lengths must not be negative")
    full = lengths // row_length
    cut = np.repeat(np.arange(len(lengths)), full)  # one entry per full row
    nth = np.arange(len(cut)) - np.repeat(np.cumsum(full) - full, full)
    rest = np.flatnonzero(lengths % row_length)
    bins = _best_fit_decreasing(lengths[rest] % row_length, row_length)

    document = np.concatenate([cut, rest])
    start = np.concatenate([nth, full[rest]]) * row_length
    length = np.concatenate([np.full(len(cut), row_length), lengths[rest] % row_length])
    row = np.concatenate([np.arange(len(cut)), len(cut) + bins])

    order = np.lexsort((document, row))
    counts = np.bincount(row)
    first = order[np.cumsum(counts) - counts]  # the piece of the smallest document in each row
    by_first = np.lexsort((start[first], document[first]))
    rank = np.empty_like(by_first)
    rank[by_first] = np.arange(len(by_first))
    order = np.lexsort((document, rank[row])) if len(row) else order
    return Packing(
        document[order],
        start[order],
        length[order],
        np.concatenate([[0], np.cumsum(counts[by_first])]).astype(np.int64),
    )


def _best_fit_decreasing(sizes: _Ints, capacity: int) -> _Ints:
    """The bin of each of `sizes` `[N]`, all in 1 to capacity: each, longest first, goes where it leaves least room."""
    bins = np.empty(len(sizes), dtype=np.int64)
    by_room: dict[int, list[int]] = {}  # room left -> the bins that have it
    rooms: list[int] = []  # the keys of by_room, ascending: at most `capacity` of them, however many bins there are
    opened = 0
    order = np.argsort(-sizes, kind="stable")
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        at = bisect.bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        else:
            room, chosen = capacity, opened
            opened += 1
        bins[index] = chosen
        room -= size
        if room in by_room:
            by_room[room].append(chosen)
        elif room:
            by_room[room] = [chosen]
            bisect.insort(rooms, room)
    return bins
