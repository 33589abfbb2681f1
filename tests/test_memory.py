"""Memory, by counting allocations: nothing quadratic is ever made, and what a step needs grows with the length alone."""

import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from model_cases import CSA, HCA, SWA, random_config, random_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openv4.kernels import attention, cross_entropy, indexer
from openv4.kernels.attention import hybrid_attention, hybrid_attention_reference
from openv4.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from openv4.kernels.documents import find_blocks, find_documents
from openv4.kernels.indexer import (
    Attended,
    index_scores,
    indexer_loss,
    indexer_loss_reference,
    select_entries,
    selection_recall,
)
from openv4.model import Transformer
from openv4.model.loss import Counts, training_losses
from openv4.model.recompute import Recompute

pytestmark = pytest.mark.usefixtures("one_thread")


class Meter(TorchDispatchMode):
    """Counts the storages that operations return, until they are freed. Peaks are the same on every run and machine;
    what an operation allocates and frees inside itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0  # bytes; elements of the largest tensor
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size // tensor.element_size())
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Cost(NamedTuple):
    largest: int  # elements of the largest tensor that was ever made
    kept: int  # bytes that outlive the forward pass: its result and what the backward pass needs, without the inputs
    peak: int  # bytes alive at once, without the inputs


def measure(function: Callable[[], Tensor]) -> Cost:
    """Runs ``function`` and, if its result has a gradient, the backward pass of its sum."""
    with Meter() as meter:
        result = function()
        kept = meter.live
        if result.requires_grad:
            result.sum().backward()
    return Cost(meter.largest, kept, meter.peak)


HEADS, DIM, INDEX_HEADS, TOP_K, VOCABULARY, WINDOW, RATIO = 2, 4, 4, 256, 8192, 64, 4


class Inputs(NamedTuple):
    """One row of random documents; float32, all with gradients."""

    attention: dict[str, Any]
    index: tuple[Tensor, Tensor, Tensor]
    valid: Tensor
    selected: Tensor


def draw(length: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    documents = find_documents((torch.rand(1, length, generator=generator) < 2 / length).long().cumsum(1))
    blocks, count = find_blocks(documents, RATIO), length // RATIO
    inputs: dict[str, Any] = {"q": normal(1, length, HEADS, DIM), "kv": normal(1, length, DIM), "sink": normal(HEADS)}
    inputs |= {"first": documents.first, "window": WINDOW, "entries": normal(1, count, DIM), "blocks": blocks}
    index = normal(1, length, INDEX_HEADS, DIM), normal(1, count, DIM), normal(1, length, INDEX_HEADS)
    return Inputs(inputs, index, documents.valid, select_entries(*index, blocks, TOP_K))


def attend(function: Callable[..., tuple[Tensor, Tensor]], kind: str, length: int) -> Callable[[], Tensor]:
    arguments, _, _, selected = draw(length)
    if kind == "window":
        arguments = arguments | {"entries": None, "blocks": None}
    if kind == "sparse":
        arguments = arguments | {"selected": selected}
    if kind == "dense, ratio 128":
        entries = arguments["entries"][:, : length // 128].detach().requires_grad_()
        blocks = find_blocks(find_documents(torch.zeros(1, length, dtype=torch.long)), 128)
        arguments = arguments | {"first": torch.zeros_like(arguments["first"]), "entries": entries, "blocks": blocks}
    return lambda: function(**arguments)[0]


def choose(length: int) -> Callable[[], Tensor]:
    inputs = draw(length)
    return lambda: select_entries(*inputs.index, inputs.attention["blocks"], TOP_K)


def learn(function: Any, sparse: bool, length: int) -> Callable[[], Tensor]:
    inputs = draw(length)
    attended = Attended(inputs.attention["q"].detach(), inputs.attention["entries"].detach(), torch.ones(1, length, HEADS))
    blocks, selected = inputs.attention["blocks"], inputs.selected if sparse else None
    return lambda: function(*inputs.index, attended, blocks, inputs.valid, selected).kl


def recall(sparse: bool, length: int) -> Callable[[], Tensor]:
    inputs = draw(length)
    attended = Attended(inputs.attention["q"].detach(), inputs.attention["entries"].detach(), torch.ones(1, length, HEADS))
    blocks, selected = inputs.attention["blocks"], inputs.selected if sparse else None
    return lambda: selection_recall(*inputs.index, attended, blocks, inputs.valid, TOP_K, selected)[0]


def lose(function: Callable[[Tensor, Tensor, Tensor], Tensor], length: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 2, generator=generator).requires_grad_() for n in (length, VOCABULARY))
    targets = torch.randint(VOCABULARY, (length,), generator=generator)
    return lambda: function(hidden, weight, targets)


KERNELS: dict[str, Callable[[int], Callable[[], Tensor]]] = {
    "attention, window": partial(attend, hybrid_attention, "window"),
    "attention, dense": partial(attend, hybrid_attention, "dense"),
    "attention, dense, ratio 128": partial(attend, hybrid_attention, "dense, ratio 128"),
    "attention, sparse": partial(attend, hybrid_attention, "sparse"),
    "choice": choose,
    "indexer, dense": partial(learn, indexer_loss, False),
    "indexer, sparse": partial(learn, indexer_loss, True),
    "recall, dense": partial(recall, False),
    "recall, sparse": partial(recall, True),
    "cross-entropy": partial(lose, linear_cross_entropy),
}
