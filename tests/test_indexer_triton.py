"""The indexer's Triton kernels: scores, and a choice that is exactly the one among those scores."""

from unittest import mock

import pytest
import torch
from attention_cases import PACKINGS, pack
from indexer_cases import after_a_cache, draw
from torch import Tensor
from triton_cases import DEVICE, poisoned, relative_error

from openv4.kernels import indexer
from openv4.kernels.dispatch import using
from openv4.kernels.documents import Blocks, find_blocks, find_documents
from openv4.kernels.entries import is_selected
from openv4.kernels.indexer import index_scores, select_entries, select_top_k

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _short_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many sections, and memory for few candidates, on rows of a few hundred entries; no row is too short for both."""
    monkeypatch.setattr(indexer, "SECTION", 64)
    monkeypatch.setattr(indexer, "CHUNK", 128)
    monkeypatch.setattr(indexer, "FEW", 0)


def top_k(scores: Tensor, first: Tensor, end: Tensor, k: int) -> Tensor:
    with using("triton"), poisoned():
        return select_top_k(scores.to(DEVICE), first.to(DEVICE), end.to(DEVICE), k).cpu()


def choose(queries: Tensor, keys: Tensor, weights: Tensor, blocks: Blocks, k: int) -> Tensor:
    there = Blocks(*(x.to(DEVICE) for x in blocks[:4]), blocks.ratio)
    with using("triton"), poisoned():
        return select_entries(queries.to(DEVICE), keys.to(DEVICE), weights.to(DEVICE), there, k).cpu()


def small_integers(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """So that every sum of products is exact, in any order, and ties abound."""
    return torch.randint(-2, 3, shape, generator=generator).to(dtype)


def integer_inputs(
    tokens: int, entries: int, heads: int, dim: int, dtype: torch.dtype, batch: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, tokens, heads, dim), (batch, entries, dim), (batch, tokens, heads)
    queries, keys, weights = (small_integers(generator, dtype, *shape) for shape in shapes)
    return queries, keys, weights


@pytest.mark.parametrize("k", [1, 7, 200])
@pytest.mark.parametrize("order", ["random", "ascending", "descending", "equal", "three values", "both zeros"])
def test_choice_among_given_scores(order: str, k: int) -> None:
    """Streams in which every entry becomes a candidate, or none after the first, and borders full of ties."""
    generator = torch.Generator().manual_seed(k)
    scores = torch.randn(1, 2, 700, generator=generator)
    if order in ("ascending", "descending"):
        scores = scores.sort(-1, descending=order == "descending").values
    elif order == "three values":
        scores = torch.randint(-1, 2, scores.shape, generator=generator).float()
    elif order != "random":
        scores = torch.where(scores > 0, 0.0, -0.0 if order == "both zeros" else 0.0)
    first, end = torch.tensor([[0, 3]]), torch.tensor([[700, 650]])
    assert torch.equal(top_k(scores, first, end, k), select_top_k(scores, first, end, k))


def test_choice_of_what_is_visible() -> None:
    """Ranges of any length at any place, and empty ones; rows of several lengths of a group."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (2, 7, 150), generator=generator).float()
    first = torch.randint(0, 80, (2, 7), generator=generator)
    end = first + torch.randint(0, 71, (2, 7), generator=generator)
    for k in (5, 150):
        assert torch.equal(top_k(scores, first, end, k), select_top_k(scores, first, end, k))


def test_extreme_scores() -> None:
    """Infinities, subnormals and the largest numbers keep their order; what is no number breaks nothing."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(1, 3, 300, generator=generator) * torch.exp2(torch.arange(300) % 254 - 127)
    scores[0, 0, :7] = torch.tensor([torch.inf, 1e-45, -1e-45, 3.4e38, -3.4e38, torch.inf, -3.4e38])
    scores[0, 1, 20:290] = torch.inf
    scores[0, 2, :] = torch.nan
    first, end = torch.zeros(1, 3, dtype=torch.long), torch.full((1, 3), 300)
    found = top_k(scores, first, end, 50)
    assert torch.equal(found[:, :1], select_top_k(scores[:, :1], first[:, :1], end[:, :1], 50))
    assert torch.equal(found[0, 1], torch.arange(20, 70))
    assert torch.equal(found[0, 2], torch.arange(50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packing", PACKINGS)
def test_select_entries(packing: str, dtype: torch.dtype) -> None:
    """Packed documents, padding, tokens that see fewer entries than are wanted; bit for bit as torch chooses."""
    generator = torch.Generator().manual_seed(3)
    blocks = find_blocks(find_documents(pack(packing, 2, 17, generator)), 1)
    inputs = integer_inputs(17, 17, 3, 20, dtype, batch=2)
    found = choose(*inputs, blocks, 4)
    assert found.dtype == torch.long
    assert torch.equal(found, select_entries(*inputs, blocks, 4))


@pytest.mark.parametrize(
    ("heads", "dim", "k", "dtype"),
    [(1, 1, 1, torch.bfloat16), (16, 128, 30, torch.bfloat16), (65, 16, 3, torch.bfloat16), (5, 48, 9, torch.float32)],
)
def test_select_entries_of_long_rows(heads: int, dim: int, k: int, dtype: torch.dtype) -> None:
    """Several sections, tokens that share a program and see different numbers of entries; odd dims."""
    inputs, blocks = integer_inputs(3, 333, heads, dim, dtype), after_a_cache(3, 333)
    found = choose(*inputs, blocks, k)
    assert torch.equal(found, select_entries(*inputs, blocks, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_are_chosen(dtype: torch.dtype) -> None:
    """Random numbers, against float64: sums of 8 x 40 products in float32 are off by less than 1e-5 of their size."""
    generator = torch.Generator().manual_seed(5)
    queries, keys = (torch.randn(*s, generator=generator).to(dtype) for s in ((1, 3, 8, 40), (1, 400, 40)))
    weights, blocks, k = torch.randn(1, 3, 8, generator=generator), after_a_cache(3, 400), 40
    found = choose(queries, keys, weights, blocks, k)
    exact = index_scores(queries.double(), keys.double(), weights.double())
    exact = exact.masked_fill(torch.arange(400) >= blocks.end.unsqueeze(-1), -torch.inf)
    assert (found.diff(dim=-1) > 0).all() and (found >= 0).all()
    slack = 1e-5 * exact[exact.isfinite()].abs().max()
    border = exact.topk(k).values[..., -1:]
    assert (exact.gather(-1, found) >= border - slack).all()
    assert is_selected(found, 400)[exact > border + slack].all()


@pytest.mark.parametrize("programs", [1, 5, 100])
def test_the_number_of_programs_does_not_show(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, blocks = integer_inputs(5, 130, 2, 16, torch.bfloat16, batch=2), after_a_cache(5, 130, batch=2)
    monkeypatch.setattr(indexer, "_programs", lambda _: programs)
    assert torch.equal(choose(*inputs, blocks, 6), select_entries(*inputs, blocks, 6))


def test_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their scores come first, and the choice is the same."""
    monkeypatch.setattr(indexer, "FEW", 2)
    scored = mock.Mock(side_effect=indexer._triton_scores)
    monkeypatch.setattr(indexer, "_triton_scores", scored)
    for tokens in (2, 3):
        inputs, blocks = integer_inputs(tokens, 200, 4, 16, torch.bfloat16), after_a_cache(tokens, 200)
        assert torch.equal(choose(*inputs, blocks, 9), select_entries(*inputs, blocks, 9))
    assert scored.call_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "entries", "heads", "dim"), [(1, 1, 1, 1), (3, 63, 5, 24), (2, 431, 2, 16), (5, 65, 64, 128)]
)
def test_scores(tokens: int, entries: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    """Sums in float32 of products that are exact in float64; weights of another dtype, strided inputs."""
    generator = torch.Generator().manual_seed(6)
    queries = torch.randn(tokens, 2, dim, heads, generator=generator).to(dtype).permute(1, 0, 3, 2).to(DEVICE)
    keys = torch.randn(2, dim, entries, generator=generator).to(dtype).mT.to(DEVICE)
    weights = torch.randn(2, tokens, heads, generator=generator).to(DEVICE)
    with using("triton"), poisoned():
        scores = index_scores(queries, keys, weights)
    assert scores.dtype == torch.float32
    assert relative_error(scores, index_scores(queries.double(), keys.double(), weights.double())) < 1e-6


def test_scores_with_a_gradient_are_torchs() -> None:
    queries, keys, weights = (x.to(DEVICE).requires_grad_() for x in integer_inputs(2, 20, 3, 16, torch.float32))
    with using("triton"):
        scores = index_scores(queries, keys, weights)
    assert scores.requires_grad
    scores.sum().backward()
    assert keys.grad is not None and keys.grad.any()


def test_strides_do_not_matter() -> None:
    queries, keys, weights = integer_inputs(4, 150, 3, 16, torch.bfloat16, batch=2)
    blocks = after_a_cache(4, 150, batch=2)
    strided = queries.mT.contiguous().mT, keys.mT.contiguous().mT, weights.mT.contiguous().mT
    views = blocks._replace(first=blocks.first.mT.contiguous().mT, end=blocks.end.mT.contiguous().mT)
    assert torch.equal(choose(*strided, views, 5), select_entries(queries, keys, weights, blocks, 5))


def test_two_runs_have_the_same_bits() -> None:
    case = draw(15, "one document", 1, heads=3, dim=16)
    inputs = [x.bfloat16() for x in case[:3]]
    assert torch.equal(choose(*inputs, case.blocks, 4), choose(*inputs, case.blocks, 4))


def test_nothing() -> None:
    """No tokens, rows, or entries, none wanted; and more wanted than a program could hold, which torch chooses."""
    queries, keys, weights = integer_inputs(3, 10, 2, 16, torch.float32)
    blocks = after_a_cache(3, 10)
    none = blocks._replace(first=blocks.first[:, :0], end=blocks.end[:, :0])
    assert choose(queries[:, :0], keys, weights[:, :0], none, 4).shape == (1, 0, 4)
    none = blocks._replace(first=blocks.first[:0], end=blocks.end[:0])
    assert choose(queries[:0], keys[:0], weights[:0], none, 4).shape == (0, 3, 4)
    none = find_blocks(find_documents(torch.zeros(1, 3, dtype=torch.long)), 4)
    assert choose(queries, keys[:, :0], weights, none, 4).shape == (1, 3, 0)
    assert choose(queries, keys, weights, blocks, 0).shape == (1, 3, 0)
    with using("triton"):
        assert index_scores(queries, keys[:, :0], weights).shape == (1, 3, 0)
        assert index_scores(queries[:, :0], keys, weights[:, :0]).shape == (1, 0, 10)


def test_more_than_a_program_could_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer, "MOST", 8)
    inputs, blocks = integer_inputs(2, 40, 2, 16, torch.float32), after_a_cache(2, 40)
    monkeypatch.setattr(indexer, "_triton_select", None)
    assert torch.equal(choose(*inputs, blocks, 9), select_entries(*inputs, blocks, 9))
    with pytest.raises(TypeError):
        choose(*inputs, blocks, 8)
