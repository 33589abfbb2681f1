"""Memory, by counting allocations: nothing quadratic is ever made, and a step's peak is linear in the length."""

import weakref
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from model_cases import CSA, HCA, SWA, random_config, random_model, relative_rms
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openv4.kernels import attention, cross_entropy, indexer
from openv4.kernels.attention import hybrid_attention, hybrid_attention_reference
from openv4.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from openv4.kernels.documents import find_blocks, find_documents
from openv4.kernels.indexer import select_entries
from openv4.kernels.indexer_loss import Attended, indexer_loss, indexer_loss_reference, selection_recall
from openv4.model import Transformer
from openv4.model.config import Recompute
from openv4.model.loss import Counts, training_losses

pytestmark = pytest.mark.usefixtures("one_thread")


class Meter(TorchDispatchMode):
    """Counts the storages that operations return, until they are freed. Peaks are the same on every run and machine;
    what an operation allocates and frees inside itself is not seen."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
    scoring: tuple[Tensor, Tensor, Tensor]  # queries, keys, weights
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


def attended_by(inputs: Inputs) -> Attended:
    q, entries = (inputs.attention[name].detach() for name in ("q", "entries"))
    return Attended(q, entries, torch.ones(q.shape[:3]))


def choose(length: int) -> Callable[[], Tensor]:
    inputs = draw(length)
    return lambda: select_entries(*inputs.scoring, inputs.attention["blocks"], TOP_K)


def learn(function: Any, sparse: bool, length: int) -> Callable[[], Tensor]:
    inputs = draw(length)
    blocks, selected = inputs.attention["blocks"], inputs.selected if sparse else None
    attended = attended_by(inputs)
    return lambda: function(*inputs.scoring, attended, blocks, inputs.valid, selected).kl


def recall(sparse: bool, length: int) -> Callable[[], Tensor]:
    inputs = draw(length)
    blocks, selected = inputs.attention["blocks"], inputs.selected if sparse else None
    attended = attended_by(inputs)
    return lambda: selection_recall(*inputs.scoring, attended, blocks, inputs.valid, TOP_K // 4, selected)[0]


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


def make_portions_small(monkeypatch: pytest.MonkeyPatch, elements: int = 2**15) -> None:
    for module in (attention, indexer, cross_entropy):
        monkeypatch.setattr(module, "CPU_ELEMENTS", elements)


@cache
def cost_of_four_thousand_tokens(name: str) -> Cost:
    return measure(KERNELS[name](4096))


def forbidden(name: str) -> int:
    """Elements of the smallest thing that must never exist at once: T V, T N = T T / 4, or H T k."""
    if name == "cross-entropy":
        return 4096 * VOCABULARY
    return 4096 * min(4096 // RATIO, HEADS * TOP_K if "sparse" in name else 4096)


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_quadratic_is_made(name: str) -> None:
    assert cost_of_four_thousand_tokens(name).largest <= forbidden(name) / 2


@pytest.mark.parametrize("name", KERNELS)
def test_no_tensor_exceeds_the_budget_of_a_portion(name: str) -> None:
    """Twice the budget: in attention's backward pass queries and their outputs' gradients meet the keys in one product,
    and of the keys that sparse attention gathers there are C / H = 2 times as many elements as of scores."""
    budget = 2 * (indexer if name == "choice" or name.startswith(("indexer", "recall")) else attention).CPU_ELEMENTS
    if name == "cross-entropy":
        budget = cross_entropy.CPU_ELEMENTS
    assert cost_of_four_thousand_tokens(name).largest <= budget


@pytest.mark.parametrize("name", KERNELS)
def test_memory_is_linear_in_the_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak, and what is kept for the backward pass. Portions are made small, so that they do not hide what grows."""
    make_portions_small(monkeypatch)
    short, long = (measure(KERNELS[name](length)) for length in (1024, 4096))
    assert long.peak <= 4**1.05 * short.peak
    assert long.kept <= 4 * short.kept


def test_attention_keeps_its_result_alone() -> None:
    """The output and the softmax's denominator; all else that the backward pass needs are inputs."""
    for kind in ("window", "dense", "sparse"):
        assert measure(attend(hybrid_attention, kind, 512)).kept == 4 * 512 * HEADS * (DIM + 1)


def test_the_loss_of_a_head_keeps_its_gradients_alone() -> None:
    """Those of hidden states and weight, and the loss."""
    assert measure(lose(linear_cross_entropy, 512)).kept == 4 * (2 * 512 + 2 * VOCABULARY + 1)


def test_logits_of_one_chunk_are_alive_at_once() -> None:
    """Four chunks; beside the logits only gradients of the size of the inputs, and numbers per token."""
    cost = cost_of_four_thousand_tokens("cross-entropy")
    assert cost.peak < 4 * (cross_entropy.CPU_ELEMENTS + 2 * (4096 * 2 + VOCABULARY * 2) + 20 * 4096)


@pytest.mark.parametrize(
    ("reference", "elements"),
    [
        (attend(hybrid_attention_reference, "dense", 512), HEADS * 512 * (512 + 512 // RATIO)),
        (learn(indexer_loss_reference, False, 512), INDEX_HEADS * 512 * (512 // RATIO)),
        (lose(lambda *x: linear_cross_entropy_reference(*x).sum(), 512), 512 * VOCABULARY),
    ],
    ids=["attention", "indexer", "cross-entropy"],
)
def test_the_meter_sees_what_the_references_make(reference: Callable[[], Tensor], elements: int) -> None:
    """All scores at once, forward and kept: a meter that saw less would prove nothing above."""
    cost = measure(reference)
    assert cost.largest >= elements
    assert cost.peak >= 4 * elements


def test_the_meter_forgets_what_is_freed() -> None:
    with Meter() as meter:
        x = torch.zeros(1000)
        view = x.view(10, 100)
        del x
        assert meter.live == 4000
        y = view.add_(1).exp()
        assert meter.live == 8000
        del y, view
        assert meter.live == 0
    assert (meter.peak, meter.largest) == (8000, 1000)


def tiny_model(recompute: Recompute) -> Transformer:
    """Every kind of layer, and the MTP block; widths small, so that what grows with the length is most of it all."""
    config = random_config(
        0,
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        head_dim=8,
        qk_rope_head_dim=4,
        q_lora_rank=8,
        o_groups=1,
        o_lora_rank=8,
        compress_ratios=(0, 4, 64, 0),
        layer_types=(SWA, CSA, HCA),
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        index_n_heads=2,
        index_head_dim=4,
        index_topk=16,
        sliding_window=32,
        num_hash_layers=1,
        hc_mult=2,
    )
    model = random_model(config, 0)
    model.recompute = recompute
    return model


def train_once(model: Transformer, length: int) -> Callable[[], Tensor]:
    """One step's forward and backward pass over a row of a few documents and padding."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (1, length), generator=generator)
    segments = (torch.rand(1, length, generator=generator) < 4 / length).long().cumsum(1)
    segments[:, -length // 16 :] = -1
    counts = Counts.of([segments])

    def loss() -> Tensor:
        return training_losses(model, tokens, segments, indexer=True).total(counts, 0.3, 0.01, 0.1)

    return loss


def test_a_training_step_s_peak_is_linear_in_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times the tokens, and a tenth on top for what is not proportional. Indexer and MTP train as well."""
    make_portions_small(monkeypatch, 2**17)
    model = tiny_model("full")
    short, long = (measure(train_once(model, length)) for length in (1024, 8192))
    assert long.peak <= 8**1.05 * short.peak
    assert long.kept <= 8 * short.kept


def test_recomputation_saves_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order that the modes promise, both what is kept for the backward pass and the peak."""
    make_portions_small(monkeypatch)
    modes: tuple[Recompute, ...] = ("none", "selective", "full")
    costs = [measure(train_once(tiny_model(mode), 1024)) for mode in modes]
    for more, less in pairwise(costs):
        assert more.kept >= less.kept
        assert more.peak >= less.peak


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_runs_under_every_part_of_the_loss(mode: Recompute) -> None:
    """The same gradients as without, at the widths of this file."""
    gradients = []
    for recompute in ("none", mode):
        model = tiny_model(recompute)
        train_once(model, 96)().backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert relative_rms(theirs, ours) < 1e-5
