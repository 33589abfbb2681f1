"""Processes that share rows compute what one process does: outputs, losses, gradients; over gloo."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from context_cases import LENGTH, MIXED, SPARSE, Case, changed, compute, random_case
from model_cases import random_config, random_model, relative_rms
from process_cases import run_processes
from torch import Tensor

from openv4.kernels.balance import balance_loss
from openv4.kernels.dispatch import using
from openv4.kernels.documents import find_documents
from openv4.model.config import AttentionMode
from openv4.train.planning import context_exchanges

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("context")]

MODES: tuple[AttentionMode, ...] = ("sparse", "indexer_warmup")
LEAKING = Case(6, MIXED, dtype=torch.float32)
DOCUMENT = 6  # of LEAKING's first row: 30 tokens in two parts of 40, or in three of 20
CASES = [
    Case(0, MIXED, "sparse", "none"),
    Case(1, SPARSE, "sparse", "full"),
    Case(2, MIXED, "dense", "selective"),
    Case(3, SPARSE, "indexer_warmup", "none"),
    Case(4, MIXED, "dense", "full", torch.float32),
    Case(5, MIXED, "sparse", "selective", torch.float32, indexer=False),
    LEAKING,
    changed(LEAKING, DOCUMENT),
    LEAKING,
]
BF16 = Case(7, MIXED, "sparse", "full", torch.float32, torch.bfloat16)


class Shared:
    """Results of the quick cases, by one process and by the parts that several have."""

    def __init__(self) -> None:
        self.whole = [compute(case) for case in (*CASES, BF16)]
        found = run_processes("context_cases:compute_quick", 4, [*CASES, BF16], LEAKING, DOCUMENT)
        self.touched = found[0][1]
        self.parts = collect([result for result, _ in found])


def collect(found: list[dict[tuple[int, int], Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """By size and case, what the processes that share its rows have, in their order."""
    keys = sorted({key for result in found for key in result})
    return {key: [result[key] for result in found if key in result] for key in keys}


@pytest.fixture(scope="module")
def shared() -> Shared:
    return Shared()


def assert_equal(parts: list[dict[str, Any]], whole: dict[str, Any], case: Case) -> None:
    """Rounding of sums in another order: 1e-16 in float64 and 6e-8 in float32, amplified by the normalisations of a few
    layers. The largest number of a tensor is its scale, and for gradients also a hundredth of the largest of all: small
    ones are what is left of larger ones (a router that chooses one expert has weights of 1, and pure rounding)."""
    rounding = 1e-11 if case.dtype == torch.float64 else 2e-5

    def check(name: str, ours: Tensor, theirs: Tensor, size: float = 0.0) -> None:
        scale = max(float(theirs.abs().max()), 1e-2 * size)
        assert ours.dtype == theirs.dtype and float((ours - theirs).abs().max()) <= rounding * scale, name

    for name, theirs in whole["parts"].items():
        check(name, torch.cat([part["parts"][name] for part in parts], 1), theirs)
    for name, theirs in whole["sums"].items():
        check(name, torch.stack([part["sums"][name] for part in parts]).sum(0), theirs, 1e-9)
    for name, theirs in whole["load"].items():
        assert torch.equal(torch.stack([part["load"][name] for part in parts]).sum(0), theirs), name
    largest = max(float(gradient.abs().max()) for gradient in whole["gradients"].values())
    for part in parts:
        assert part["gradients"].keys() == whole["gradients"].keys()
        assert part["statistics"].keys() == whole["statistics"].keys()
    for name, theirs in whole["gradients"].items():
        check(name, torch.stack([part["gradients"][name] for part in parts]).sum(0), theirs, largest)


@pytest.mark.parametrize("number", range(len(CASES) - 1))
@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_rows_equal_whole_rows(shared: Shared, size: int, number: int) -> None:
    """Logits, token losses and MTP streams of each position; sums of every loss; load; every parameter's gradient."""
    assert len(shared.parts[size, number]) == size
    assert_equal(shared.parts[size, number], shared.whole[number], CASES[number])


@pytest.mark.parametrize("size", [2, 4])
def test_a_second_run_has_the_same_bits(shared: Shared, size: int) -> None:
    first, second = (shared.parts[size, number] for number, case in enumerate(CASES) if case == LEAKING)
    for one, other in zip(first, second, strict=True):
        for kind in ("parts", "sums", "gradients"):
            assert all(torch.equal(one[kind][name], other[kind][name]) for name in one[kind])


@pytest.mark.parametrize("size", [2, 4])
def test_bfloat16(shared: Shared, size: int) -> None:
    """Halos, entries and their gradients travel as they are, and each process rounds its own sums. From float32's the
    gradient is as far as that of one process: other roundings, a tenth of it at most."""
    whole, parts = shared.whole[len(CASES)], shared.parts[size, len(CASES)]
    for name, theirs in whole["sums"].items():
        assert relative_rms(torch.stack([part["sums"][name] for part in parts]).sum(0), theirs) < 1e-2, name

    def flat(results: list[dict[str, Any]]) -> Tensor:
        return sum(torch.cat([g.flatten() for g in result["gradients"].values()]) for result in results)  # type: ignore

    exact = flat([compute(replace(BF16, streams=None))])
    assert relative_rms(flat(parts), exact) < 1.1 * relative_rms(flat([whole]), exact)


@pytest.mark.parametrize("size", [2, 4])
def test_nothing_crosses_a_document_border(shared: Shared, size: int) -> None:
    """Other tokens in one document change no other document's logits, losses or MTP streams, in any process: bit for
    bit. (Row 1 is one document, and loses or wins nothing by what happens in row 0.)"""
    before, after = (shared.parts[size, CASES.index(case)] for case in (LEAKING, changed(LEAKING, DOCUMENT)))
    _, segments, _ = LEAKING.batch()
    others = segments != DOCUMENT
    for name in ("logits", "token losses", "mtp streams"):
        one, other = (torch.cat([part["parts"][name] for part in parts], 1) for parts in (before, after))
        assert torch.equal(one[others], other[others]), name
        assert not torch.equal(one[~others], other[~others]), name


def test_gradients_stay_within_a_document(shared: Shared) -> None:
    """Streams of a document in three parts have gradients to the embeddings of its own tokens alone."""
    tokens, segments, _ = LEAKING.batch()
    assert shared.touched == sorted(set(tokens[0, segments[0] == DOCUMENT].tolist()))


@pytest.mark.parametrize("number", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_sent_are_those_that_a_plan_expects(shared: Shared, size: int, number: int) -> None:
    """A part sends its halos to the next one and their gradients to the one before; entries, and what they get as
    gradients, go to all others."""
    case = CASES[number]
    config, warmup = case.model().config, case.attention == "indexer_warmup"
    blocks, width, replay = config.num_hidden_layers + (not warmup), case.dtype.itemsize, case.recompute != "none"
    shape = blocks, len(case.rows), LENGTH // size, width
    exchanges = list(context_exchanges(config, *shape, case.attention, case.indexer, replay))
    for rank, part in enumerate(shared.parts[size, number]):
        halos = sum(e.halo * (e.forward * (rank + 1 < size) + e.backward * (rank > 0)) for e in exchanges)
        entries = sum(e.entries * (size - 1) * (e.forward + e.backward) for e in exchanges)
        assert part["sent"] == halos + entries, rank


class Alone:
    """What the first of two processes has of the other one where nothing is to be seen of it: for errors."""

    rank, size = 0, 3

    def before(self, rows: Tensor, count: int) -> Tensor:
        raise AssertionError

    def gather(self, rows: Tensor) -> Tensor:
        raise AssertionError


def test_rows_that_cannot_be_shared_are_refused() -> None:
    config = random_config(3, sliding_window=8, compress_ratios=(5, 16, 0), num_hidden_layers=2, layer_types=())
    model = random_model(config, 0)
    model.context = Alone()
    with pytest.raises(ValueError, match="context=3 does not divide rows of 50 tokens; choose"):
        model(torch.zeros(1, 50, dtype=torch.long))
    with pytest.raises(ValueError, match=r"context=3 leaves 15 tokens .* over 16; use rows of at least 48 tokens"):
        model(torch.zeros(1, 45, dtype=torch.long))


def test_a_part_holds_all_that_the_next_one_looks_back_to() -> None:
    assert random_config(0, compress_ratios=(0,) * 9, num_hidden_layers=8, layer_types=()).shortest_part in (
        1,
        3,
        8,
        17,
    )
    kinds = {"num_hidden_layers": 2, "layer_types": (), "sliding_window": 3}
    assert random_config(0, compress_ratios=(4, 0, 0), **kinds).shortest_part == 7
    assert random_config(0, compress_ratios=(4, 16, 0), **kinds).shortest_part == 16


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_balance_loss_of_parts(kernels: Any) -> None:
    """Parts of rows that know what is elsewhere of the documents at their ends add up to the loss and its gradient."""
    generator = torch.Generator().manual_seed(0)
    segments = torch.tensor([[0] * 130 + [1] * 30 + [2] * 60 + [-1] * 60, [0] * 280])
    documents = find_documents(segments)
    scores = torch.rand(2, 280, 7, generator=generator, requires_grad=True)
    best = scores.detach().topk(2).indices
    whole = balance_loss(scores, best, documents.first, documents.valid)
    (expected,) = torch.autograd.grad(whole, scores)

    total, gradients = torch.zeros(()), []
    for start in (0, 140):
        part = slice(start, start + 140)
        elsewhere = torch.zeros(2, 2, 8, dtype=torch.long)
        ends = documents.first[:, [start, start + 139]]
        for row in range(2):
            for end in range(1 if ends[row, 0] == ends[row, 1] else 2):
                others = (documents.first[row] == ends[row, end]) & documents.valid[row]
                others[part] = False
                elsewhere[row, end, :-1] = torch.bincount(best[row, others].flatten(), minlength=7)
                elsewhere[row, end, -1] = others.sum()
        own = scores.detach()[:, part].clone().requires_grad_()
        with using(kernels):
            first, valid = documents.first[:, part] - start, documents.valid[:, part]
            loss = balance_loss(own, best[:, part], first, valid, elsewhere)
            gradients += torch.autograd.grad(loss, own)
        total = total + loss
    torch.testing.assert_close(total, whole.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.cat(gradients, 1), expected, rtol=1e-4, atol=1e-7)


# The widest.


@pytest.mark.slow
def test_random_models_and_rows() -> None:
    cases = [random_case(seed) for seed in range(100, 130)]
    parts = collect(run_processes("context_cases:compute_shared", 4, cases, [2, 4], timeout=600))
    for (_, number), found in parts.items():
        assert_equal(found, compute(cases[number]), cases[number])
    assert len(parts) == 2 * len(cases)


@pytest.mark.slow
def test_triton() -> None:
    """Kernels in the interpreter, in two processes, against torch in one."""
    fixed: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": (), "sliding_window": 3, "hc_sinkhorn_iters": 2}
    fixed |= {"compress_ratios": (4, 8, 0), "n_routed_experts": 4, "num_experts_per_tok": 2, "hidden_size": 24}
    fixed |= {"num_attention_heads": 2, "o_groups": 1}
    rows = ((1, 3, 18, 1, 5),)
    cases = [Case(9, rows, a, "none", torch.float32, kernels="triton", length=32, fixed=fixed) for a in MODES]
    parts = collect(run_processes("context_cases:compute_shared", 2, cases, [2], timeout=600))
    for (_, number), found in parts.items():
        assert_equal(found, compute(replace(cases[number], kernels="torch")), cases[number])
