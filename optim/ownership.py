"""Who owns which parameter among many processes: the float32 weights and optimizer state of each are at one of them.

Muon needs whole matrices, so no matrix is cut (the paper's hybrid ZeRO, recipe 10). What every process holds (dense
parameters) goes to the process with the least to do, the heaviest first; of routed experts, which only some processes
hold, each of them owns a run of consecutive ones. Pure arithmetic: torch is not imported, so a cluster's balance is
known before it runs.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import NamedTuple

# Bytes of an element at its owner: the float32 weight, and Muon's momentum or AdamW's two moments.
MUON_BYTES, ADAMW_BYTES = 8, 12

# Routed experts are dealt out in this order (recipe 10): neighbours have one shape, and are updated as one batch.
_EXPERT_ORDER = ("w2", "w3", "w1")


class Item(NamedTuple):
    """A parameter as a process holds it.

    Attributes:
        name: its own; shape: of routed experts ``[E, out, in]``, those that the process holds.
        rows: rows of the logical matrices of which it consists (or each expert does), if Muon trains it; else nothing.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def expert(self) -> bool:
        """Whether it is a stack of routed experts, or of their adapters."""
        return ".experts." in self.name

    @property
    def work(self) -> float:
        """Operations of its update."""
        each = sum(newton_schulz_flops(rows, self.shape[-1]) for rows in self.rows)
        return each * prod(self.shape[:-2])

    @property
    def bytes(self) -> int:
        """Of its weights and state at the owner."""
        return prod(self.shape) * (MUON_BYTES if self.rows else ADAMW_BYTES)


class Piece(NamedTuple):
    """What one owner has of a parameter: all of it, or some consecutive experts."""

    owner: int  # index among the processes that hold the parameter
    first: int
    last: int  # one past the last expert; 0 of a dense parameter, which is whole


@dataclass(frozen=True)
class Ownership:
    """Attributes:
    pieces: by parameter, in the order of their owners; of a dense parameter one.
    work, bytes: of each process, operations of an update and bytes of weights and state.
    """

    pieces: Mapping[str, tuple[Piece, ...]]
    work: tuple[float, ...]
    bytes: tuple[int, ...]

    def balance(self) -> str:
        """Largest over mean, to print at start."""
        worst = [max(loads) / max(sum(loads) / len(loads), 1) for loads in (self.work, self.bytes)]
        return f"largest share over mean: work {worst[0]:.3f}, memory {worst[1]:.3f}"


def assign(items: Iterable[Item], world: int, expert: int = 1) -> Ownership:
    """Deals parameters out.

    Args:
        items: every trained parameter, in an order that is the same in all processes.
        world: number of processes; expert: over how many of them the experts of a layer are spread. Consecutive
            processes hold different experts, so process r is number r // expert of those with the same ones.
    """
    items = list(items)
    holders = world // expert
    work, size = [0.0] * world, [0] * world
    pieces = _runs([item for item in items if item.expert], holders)
    for item in items:
        for owner, first, last in pieces.get(item.name, ()):
            share = (last - first) / item.shape[0]
            for rank in range(owner * expert, (owner + 1) * expert):
                work[rank] += item.work * share
                size[rank] += round(item.bytes * share)
    dense = [item for item in items if not item.expert]
    by_work = sorted((item for item in dense if item.rows), key=lambda item: item.work, reverse=True)
    by_size = sorted((item for item in dense if not item.rows), key=lambda item: item.bytes, reverse=True)
    for group, loads, others in ((by_work, work, size), (by_size, size, work)):
        heap = [(load, other, rank) for rank, (load, other) in enumerate(zip(loads, others, strict=True))]
        heapq.heapify(heap)
        for item in group:
            rank = heap[0][2]
            pieces[item.name] = (Piece(rank, 0, 0),)
            work[rank] += item.work
            size[rank] += item.bytes
            heapq.heapreplace(heap, (loads[rank], others[rank], rank))
    return Ownership(pieces, tuple(work), tuple(size))


def _runs(stacks: Sequence[Item], owners: int) -> dict[str, tuple[Piece, ...]]:
    """All experts of all layers in a row, cut into runs of equal length to one."""
    kinds = {kind: place for place, kind in enumerate(_EXPERT_ORDER)}
    ordered = sorted(stacks, key=lambda item: kinds.get(item.name.rpartition(".")[2], len(kinds)))
    total = sum(item.shape[0] for item in ordered)
    cuts = [total * owner // owners for owner in range(owners + 1)]
    pieces: dict[str, tuple[Piece, ...]] = {}
    start = 0
    for item in ordered:
        count = item.shape[0]
        bounds = [min(max(cut - start, 0), count) for cut in cuts]
        found = (Piece(owner, *pair) for owner, pair in enumerate(pairwise(bounds)))
        pieces[item.name] = tuple(piece for piece in found if piece.first < piece.last)
        start += count
    return pieces


def newton_schulz_flops(rows: int, columns: int) -> float:
    """Operations of ten Newton-Schulz iterations on a matrix, in the form that `newton_schulz` takes: plain or Gram."""
    n, m = sorted((rows, columns))
    return 2.0 * (10 * n**3 + 20 * n * n * m if 2 * m < 3 * n else 34 * n**3 + 4 * n * n * m)
