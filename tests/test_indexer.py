"""The lightning indexer: scores, choice, loss and recall against plain references, portion by portion or at once."""

from typing import Any

import pytest
import torch
from attention_cases import PACKINGS, pack
from indexer_cases import Case, draw
from model_cases import relative_rms
from test_attention import TOLERANCE
from torch import Tensor

from openv4.kernels import indexer
from openv4.kernels.documents import Blocks, find_blocks, find_documents
from openv4.kernels.indexer import index_scores, select_entries, select_top_k
from openv4.kernels.indexer_loss import Attended, IndexerLoss, indexer_loss, indexer_loss_reference, selection_recall

pytestmark = pytest.mark.usefixtures("one_thread")


def run(function: Any, case: Case, dtype: torch.dtype) -> tuple[IndexerLoss, tuple[Tensor, ...]]:
    """The sums and the gradients of queries, keys and weights. What attention did stays at least float32."""
    inputs = [t.detach().to(dtype).requires_grad_() for t in case[:3]]
    q, entries, lse = (t.to(dtype) for t in case.attention)
    if dtype == torch.bfloat16:
        lse = case.attention.lse.float()
    loss = function(*inputs, Attended(q, entries, lse), case.blocks, case.valid, case.selected)
    return loss, torch.autograd.grad(loss.kl, inputs)


def evaluate(case: Case, queries: Tensor, keys: Tensor, weights: Tensor) -> IndexerLoss:
    return indexer_loss(queries, keys, weights, case.attention, case.blocks, case.valid, case.selected)


def check(case: Case, *dtypes: torch.dtype) -> None:
    """Where every token has one entry at most, KL and gradients are zero up to rounding: what is compared with is
    then the size of the terms that cancel, a number or so a token. ``uniform`` is float32 at best, in both: it sums
    logarithms of integers, which torch takes in float32."""
    floor = max(int(case.valid.sum()), 1) ** 0.5
    for dtype in dtypes or TOLERANCE:
        ours, our_gradients = run(indexer_loss, case, dtype)
        theirs, their_gradients = run(indexer_loss_reference, case, dtype)
        assert torch.equal(ours.tokens, theirs.tokens)
        names = ["kl", "uniform", "queries", "keys", "weights"]
        for name, a, b in zip(names, (*ours[:2], *our_gradients), (*theirs[:2], *their_gradients), strict=True):
            assert a.shape == b.shape, name
            assert a.dtype == b.dtype, name
            tolerance = TOLERANCE[torch.float32 if name == "uniform" else dtype]
            assert (a - b).detach().norm() <= tolerance * max(float(b.detach().norm()), floor), (name, dtype)


def plain_scores(case: Case) -> Tensor:
    """Equation 16, one head after the other."""
    scores = torch.zeros(*case.queries.shape[:2], case.keys.shape[1], dtype=torch.float64)
    for head in range(case.queries.shape[2]):
        scores += case.weights[..., head, None] * (case.queries[:, :, head] @ case.keys.mT).clamp(min=0)
    return scores


def plain_choice(scores: Tensor, blocks: Blocks, k: int) -> Tensor:
    """The k best visible entries by Python's stable sort, one token after the other."""
    batch, length, count = scores.shape
    chosen = torch.full((batch, length, min(k, count)), -1)
    for row in range(batch):
        for token in range(length):
            visible = range(int(blocks.first[row, token]), int(blocks.end[row, token]))
            value = scores[row, token].tolist()
            best = sorted(sorted(visible, key=lambda n: -value[n])[:k])
            chosen[row, token, : len(best)] = torch.tensor(best, dtype=torch.long)
    return chosen


def test_scores() -> None:
    case = draw(37)
    assert relative_rms(index_scores(*case[:3]), plain_scores(case)) < 1e-14


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("k", [1, 3, 8, 1000])
def test_choice_with_ties(packing: str, k: int) -> None:
    """Scores of three values: nearly every border is a tie, which the lowest entries win."""
    generator = torch.Generator().manual_seed(k)
    blocks = find_blocks(find_documents(pack(packing, 2, 61, generator)), 2)
    scores = torch.randint(0, 3, (2, 61, 30), generator=generator).float()
    chosen = select_top_k(scores, blocks.first, blocks.end, k)
    assert chosen.dtype == torch.long
    assert torch.equal(chosen, plain_choice(scores, blocks, k))


@pytest.mark.parametrize("elements", [1, 2000, 2**19])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("length", "ratio"), [(1, 1), (3, 4), (4, 4), (127, 1), (129, 4), (300, 128)])
def test_select_entries(length: int, ratio: int, packing: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly the choice among all scores at once, and the plain one.

    Small integers make every sum exact in any order, in float32 as well, and ties and zeros frequent.
    """
    monkeypatch.setattr(indexer, "CPU_ELEMENTS", elements)
    case = draw(length, packing, ratio)
    queries, keys, weights = (t.round().float() for t in case[:3])
    scores = index_scores(queries, keys, weights)
    for k in (1, 5, 10000):
        selected = select_entries(queries, keys, weights, case.blocks, k)
        assert selected.shape == (2, length, min(k, length // ratio))
        assert torch.equal(selected, select_top_k(scores, case.blocks.first, case.blocks.end, k))
        if elements == 2000:
            assert torch.equal(selected, plain_choice(scores, case.blocks, k))


@pytest.mark.parametrize("length", [1000, 4097])
def test_select_entries_of_long_rows(length: int) -> None:
    """Random float64 scores, where no two are nearer to each other than a rounding."""
    case = draw(length, "random", batch=1)
    scores = index_scores(*case[:3])
    for k in (7, 64):
        selected = select_entries(*case[:3], case.blocks, k)
        assert torch.equal(selected, select_top_k(scores, case.blocks.first, case.blocks.end, k))


def test_chosen_entries_ascend_and_then_end() -> None:
    case = draw(200, "padded")
    selected = select_entries(*case[:3], case.blocks, 9)
    there = selected >= 0
    assert torch.equal(there, there.long().cummin(-1).values.bool())
    assert ((selected.diff(dim=-1) > 0) | ~there[..., 1:]).all()
    visible = case.blocks.end - case.blocks.first
    assert torch.equal(there.sum(-1), visible.clamp(max=9))


@pytest.mark.parametrize("length", [1, 3, 4, 127, 128, 129])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("k", [None, 5])
def test_loss_equals_the_reference(length: int, packing: str, k: int | None) -> None:
    check(draw(length, packing, k=k, seed=length))


@pytest.mark.parametrize(("ratio", "k"), [(1, None), (1, 6), (3, 1), (4, 10000), (128, None), (128, 1), (1000, 2)])
def test_loss_equals_the_reference_for_every_ratio(ratio: int, k: int | None) -> None:
    check(draw(150, "one document", ratio, k))
    check(draw(150, "padded", ratio, k))


@pytest.mark.parametrize(("ratio", "k"), [(4, None), (4, 24)])
def test_loss_equals_the_reference_on_a_thousand_tokens(ratio: int, k: int | None) -> None:
    check(draw(1000, "random", ratio, k))


@pytest.mark.parametrize(("ratio", "k"), [(16, None), (16, 20)])
def test_loss_equals_the_reference_on_four_thousand_tokens(ratio: int, k: int | None) -> None:
    check(draw(4097, "one document", ratio, k, batch=1, heads=2), torch.float32)


@pytest.mark.parametrize("elements", [1, 5000])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("k", [None, 7])
def test_borders_of_portions_do_not_show(
    packing: str, k: int | None, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer, "CPU_ELEMENTS", elements)
    check(draw(203, packing, 2, k))


@pytest.mark.parametrize("k", [None, 2])
def test_gradcheck(k: int | None) -> None:
    """With few heads a ReLU's kink within 1e-6 of a random point would be a rare accident; the seed has none."""
    case = draw(11, "random", 2, k, heads=3)

    def sums(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        loss = evaluate(case, *inputs)
        return loss.kl, loss.uniform

    assert torch.autograd.gradcheck(sums, [t.requires_grad_() for t in (case.queries, case.keys, case.weights)])


@pytest.mark.parametrize("name", ["queries", "keys", "weights"])
@pytest.mark.parametrize("k", [None, 5])
def test_strides_do_not_matter(k: int | None, name: str) -> None:
    case = draw(45, k=k)
    results = []
    for strided in (False, True):
        leaf = getattr(case, name).detach().clone().requires_grad_()
        changed = case._replace(**{name: leaf.mT.contiguous().mT if strided else leaf})
        loss = evaluate(changed, changed.queries, changed.keys, changed.weights)
        results.append((loss.kl, *torch.autograd.grad(loss.kl, leaf)))
    for ours, theirs in zip(*results, strict=True):
        assert relative_rms(ours, theirs) < 1e-12


@pytest.mark.parametrize("k", [None, 5])
def test_a_factor_on_the_loss_scales_its_gradient(k: int | None) -> None:
    case = draw(60, k=k)
    _, plain = run(indexer_loss, case, torch.float64)
    inputs = [t.detach().requires_grad_() for t in (case.queries, case.keys, case.weights)]
    loss = evaluate(case, *inputs)
    scaled = torch.autograd.grad(0.25 * loss.kl + 7 * loss.uniform, inputs)
    assert all(torch.equal(a, 0.25 * b) for a, b in zip(scaled, plain, strict=True))


@pytest.mark.parametrize("k", [None, 5])
def test_attention_gets_no_gradient(k: int | None) -> None:
    case = draw(40, k=k)
    attended = Attended(*(t.detach().clone().requires_grad_() for t in case.attention))
    queries = case.queries.detach().requires_grad_()
    loss = evaluate(case._replace(attention=attended), queries, case.keys, case.weights)
    own, *others = torch.autograd.grad(loss.kl, [queries, *attended], allow_unused=True)
    assert own.any()
    assert all(gradient is None for gradient in others)


@pytest.mark.parametrize("k", [None, 5])
def test_equal_scores_are_the_uniform_indexer(k: int | None) -> None:
    case = draw(90, "padded", k=k)
    loss = evaluate(case, case.queries, case.keys, torch.zeros_like(case.weights))
    assert relative_rms(loss.kl, loss.uniform) < 1e-6  # ``uniform`` takes its logarithms in float32
    assert loss.kl > 1


def test_scores_that_are_the_target_s_logarithm_leave_no_loss() -> None:
    """One attention head and one index head over the same vectors, all logits positive: the softmaxes are the same."""
    case = draw(50, heads=1, dim=4)
    entries = case.attention.entries.abs()
    q = case.attention.q[:, :, :1].abs()
    lse = torch.zeros(q.shape[:3], dtype=torch.float64)
    half = torch.full_like(case.weights, 4**-0.5)
    inputs = [t.requires_grad_() for t in (q.clone(), entries.clone(), half)]
    loss = evaluate(case._replace(attention=Attended(q, entries, lse)), *inputs)
    assert loss.tokens > 10
    assert loss.kl.abs() < 1e-12 * loss.tokens
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(loss.kl, inputs))


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize(("length", "packing"), [(1, "one document"), (3, "one document"), (20, "single tokens")])
def test_nothing_to_choose_from(length: int, packing: str, k: int | None) -> None:
    """N = 0, and rows whose documents are all shorter than a block: no token counts, and every gradient is zero."""
    loss, gradients = run(indexer_loss, draw(length, packing, k=k), torch.float32)
    assert [x.item() for x in loss] == [0, 0, 0]
    assert not any(g.any() for g in gradients)
    case = draw(length, packing)
    assert [float(x) for x in selection_recall(*case[:6], 2)] == [0.0, 0.0]


def test_padding_counts_nothing() -> None:
    """A row of padding beside another changes no sum, and its tokens get no gradient."""
    case = draw(70, "padded", k=4)
    assert case.selected is not None
    loss, gradients = run(indexer_loss, case, torch.float64)
    start, chained, first, end, ratio = case.blocks
    row = case._replace(
        **{name: getattr(case, name)[:1] for name in ("queries", "keys", "weights", "valid", "selected")},
        attention=Attended(*(t[:1] for t in case.attention)),
        blocks=Blocks(start[:1], chained[:1], first[:1], end[:1], ratio),
    )
    alone, _ = run(indexer_loss, row, torch.float64)
    assert not case.valid[1].any()
    for ours, theirs in zip(loss, alone, strict=True):
        assert relative_rms(ours, theirs) < 1e-13
    assert not gradients[0][~case.valid].any()
    assert not gradients[2][~case.valid].any()


@pytest.mark.parametrize("k", [None, 8])
def test_bfloat16(k: int | None) -> None:
    """Inputs that are bfloat16 numbers, so that float32 sees the same. The indexer computes in float32; attention's
    logits, a few units in size, are rounded by up to 2^-9 each, and so is every gradient at the end."""
    case = draw(150, "random", k=k)
    q, entries, lse = case.attention
    case = case._replace(
        **{name: getattr(case, name).bfloat16().double() for name in ("queries", "keys", "weights")},
        attention=Attended(q.bfloat16().double(), entries.bfloat16().double(), lse),
    )
    ours, our_gradients = run(indexer_loss, case, torch.bfloat16)
    exact, gradients = run(indexer_loss, case, torch.float32)
    assert ours.tokens == exact.tokens
    assert ours.kl.dtype == torch.float32
    for a, b in zip((*ours[:2], *our_gradients), (*exact[:2], *gradients), strict=True):
        assert relative_rms(a, b) < 10 * 2**-9
    assert all(g.dtype == torch.bfloat16 for g in our_gradients)


def plain_recall(case: Case, k: int, tokens: range) -> tuple[float, int]:
    """From the masses under dense attention, token by token."""
    q, entries, _ = case.attention
    logits = torch.einsum("bthc,bnc->bthn", q, entries) * q.shape[-1] ** -0.5
    mass = (logits - case.dense_lse.unsqueeze(-1)).exp().sum(2)
    chosen, total, counted = plain_choice(plain_scores(case), case.blocks, k), 0.0, 0
    for row in range(len(q)):
        for token in tokens:
            low, high = int(case.blocks.first[row, token]), int(case.blocks.end[row, token])
            if case.valid[row, token] and high - low > k:
                caught, most = mass[row, token, chosen[row, token]], mass[row, token, low:high].topk(k).values
                total += float(caught.sum() / most.sum())
                counted += 1
    return total, counted


@pytest.mark.parametrize("elements", [1, 2**19])
@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("sparse", [False, True])
def test_recall(sparse: bool, k: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under sparse attention the heads are weighed as dense attention would weigh them: the same recall."""
    monkeypatch.setattr(indexer, "CPU_ELEMENTS", elements)
    case = draw(90, "one document", 2, k if sparse else None)
    recall, tokens = selection_recall(*case[:6], k, case.selected)
    expected, counted = plain_recall(case, k, range(90))
    assert int(tokens) == counted > 0
    assert abs(float(recall) - expected) < 1e-11 * counted
    assert 0 < recall < tokens


@pytest.mark.parametrize("samples", [1, 7, 40, 1000])
@pytest.mark.parametrize("sparse", [False, True])
def test_recall_of_a_sample(sparse: bool, samples: int) -> None:
    case = draw(120, "padded", 2, 3 if sparse else None)
    recall, tokens = selection_recall(*case[:6], 3, case.selected, samples=samples)
    sampled = range(0, 120, -(-120 // samples))
    expected, counted = plain_recall(case, 3, sampled)
    assert len(sampled) <= samples
    assert int(tokens) == counted
    assert abs(float(recall) - expected) < 1e-11 * max(counted, 1)


def test_recall_is_one_for_a_perfect_indexer() -> None:
    """Index scores that order the entries as attention does; with k at least N nobody has a choice."""
    case = draw(80, "one document", 2, heads=1, dim=4)
    entries, q = case.attention.entries.abs(), case.attention.q[:, :, :1].abs()
    attended = Attended(q, entries, torch.zeros(q.shape[:3], dtype=torch.float64))
    ones = torch.ones_like(case.weights)
    recall, tokens = selection_recall(q, entries, ones, attended, case.blocks, case.valid, 5)
    assert tokens > 0
    assert relative_rms(recall, tokens) < 1e-12
    assert selection_recall(q, entries, ones, attended, case.blocks, case.valid, 40)[1] == 0
