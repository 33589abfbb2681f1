import json
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openv4.data import loader as loader_module
from openv4.data.config import DataError, SourceConfig
from openv4.data.loader import Loader, permute, validation_batches


class ListStore:
    """Documents of given lengths; the token at a place tells the document and the place."""

    def __init__(self, lengths, base=0):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.documents, self.tokens, self.base = len(self.lengths), int(self.lengths.sum()), base

    def length(self, documents):
        return self.lengths[documents]

    def read(self, document, start, length):
        assert 0 <= start <= start + length <= self.lengths[document]
        return self.base + document * 1000 + np.arange(start, start + length)

    def read_trained(self, document, start, length):
        return None


class HugeStore:
    """Two million documents, a thousand million tokens, none of them stored."""

    documents = 2_000_000
    tokens = documents * 500

    def length(self, documents):
        return (documents * 7919) % 997 + 2

    def read(self, document, start, length):
        return np.full(length, document % 50_000)

    def read_trained(self, document, start, length):
        return None


def random_lengths(count=300, seed=0):
    return np.random.default_rng(seed).integers(2, 120, count)


def equal(left, right):
    return (
        torch.equal(left.tokens, right.tokens)
        and torch.equal(left.segments, right.segments)
        and left.pieces == right.pieces
    )


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(loader_module, "BLOCK_DOCUMENTS", 16)
    monkeypatch.setattr(loader_module, "BLOCK_ROWS", 4)


# The permutation.


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation_and_a_pure_function(count, key):
    whole = permute(np.arange(count), count, key)
    assert sorted(whole.tolist()) == list(range(count))
    assert permute(np.array([count - 1, 0]), count, key).tolist() == [whole[-1], whole[0]]


def test_permute_is_even_and_changes_with_the_key():
    orders = Counter(tuple(permute(np.arange(3), 3, key).tolist()) for key in range(3000))
    assert len(orders) == 6
    assert min(orders.values()) > 400
    first = np.array([permute(np.arange(1), 1000, key)[0] for key in range(2000)])
    assert abs(first.mean() - 499.5) < 5 * 289 / 2000**0.5
    order = permute(np.arange(100_000), 100_000, 5)
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.02


# Every token once in an epoch.


def drain(loader, stores, rows, row_length):
    """Check a batch and give back (source, epoch, document, place) of each of its tokens."""
    batch = loader.next_batch(rows, row_length)
    assert batch.tokens.shape == batch.segments.shape == (rows, row_length)
    assert (batch.tokens.dtype, batch.segments.dtype) == (torch.int64, torch.int32)
    for tokens, segments, row in zip(batch.tokens, batch.segments, batch.pieces, strict=True):
        at = 0
        for segment, (source, _, document, start, length) in enumerate(row):
            assert tokens[at : at + length].tolist() == stores[source].read(document, start, length).tolist()
            assert (segments[at : at + length] == segment).all()
            at += length
        assert (segments[at:] == -1).all()
        assert (tokens[at:] == 1).all()
    return [piece for row in batch.pieces for piece in row]


def check_epochs(pieces, store, source=0):
    """All epochs but the last are whole: every place of every document once."""
    mine = [piece for piece in pieces if piece[0] == source]
    last = max(epoch for _, epoch, *_ in mine)
    for epoch in range(last + 1):
        seen = [np.zeros(length, dtype=int) for length in store.lengths]
        for _, at, document, start, length in mine:
            if at == epoch:
                seen[document][start : start + length] += 1
        counts = np.concatenate(seen)
        assert (counts == 1).all() if epoch < last else (counts <= 1).all()
    return last


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.just(2), st.integers(0, 30), st.integers(30, 200)), min_size=1, max_size=80),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 64)), min_size=1, max_size=6),
    st.integers(0, 3),
)
def test_every_token_once_per_epoch_whatever_the_row_lengths(lengths, calls, seed):
    store = ListStore(lengths)
    if store.tokens == 0:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "BLOCK_DOCUMENTS", 8)
        patch.setattr(loader_module, "BLOCK_ROWS", 2)
        loader = Loader([store], [1.0], seed)
        pieces = []
        while not pieces or max(piece[1] for piece in pieces) < 2:
            for rows, row_length in calls:
                pieces += drain(loader, [store], rows, row_length)
        assert check_epochs(pieces, store) >= 2


def test_one_document_longer_than_the_row_comes_back_every_epoch():
    store = ListStore([25])
    loader = Loader([store], [1.0], 0)
    pieces = [piece for _ in range(9) for piece in drain(loader, [store], 1, 10)]
    assert check_epochs(pieces, store) == 2
    assert sorted(piece[3:] for piece in pieces[:3]) == [(0, 10), (10, 10), (20, 5)]


def test_order_changes_with_epoch_and_seed(small_blocks):
    def order(seed):
        loader = Loader([ListStore([8] * 64)], [1.0], seed)
        return [[row[0][2] for row in loader.next_batch(64, 8).pieces] for _ in range(2)]

    first, second = order(0)
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second
    assert order(1)[0] != first
    assert order(0) == [first, second]


def test_pieces_of_a_cut_document_are_joined_when_the_rows_grow(small_blocks):
    store = ListStore([64] * 4)
    loader = Loader([store], [1.0], 0)
    drain(loader, [store], 1, 8)
    whole = [piece for piece in drain(loader, [store], 4, 64) if piece[4] == 64]
    assert len(whole) == 3


def test_rows_are_not_in_the_order_of_length():
    loader = Loader([ListStore(np.random.default_rng(1).integers(100, 512, 4000))], [1.0], 0)
    longest = np.array([max(piece[4] for piece in row) for row in loader.next_batch(2400, 512).pieces])
    halves = [longest[longest_half].mean() for longest_half in (slice(0, 1200), slice(1200, None))]
    assert abs(halves[0] - halves[1]) < 5 * longest.std() * (2 / 1200) ** 0.5
    assert abs(np.corrcoef(longest[1:], longest[:-1])[0, 1]) < 0.1


def test_little_padding():
    store = ListStore(np.random.default_rng(0).lognormal(5, 1, 20_000).astype(int) + 2)
    loader = Loader([store], [1.0], 0)
    for row_length in (512, 4096):
        filled = (loader.next_batch(500, row_length).segments >= 0).float().mean()
        assert filled > 0.985


# The position.

CALLS = [(3, 32), (5, 32), (2, 128), (4, 16), (7, 16), (1, 200), (6, 32), (1, 32), (30, 32), (9, 64)]


def two_sources():
    return [ListStore(random_lengths(90, 1)), ListStore(random_lengths(40, 2), base=500_000)]


def test_restored_anywhere_it_continues_as_if_nothing_had_happened(small_blocks):
    loader = Loader(two_sources(), [2.0, 1.0], 7)
    states, batches = [], []
    for rows, row_length in CALLS:
        states.append(json.dumps(loader.state_dict()))
        batches.append(loader.next_batch(rows, row_length))
    assert max(map(len, states)) < 500
    for at, state in enumerate(states):
        for workers in (0, 2):
            again = Loader(two_sources(), [2.0, 1.0], 7, workers=workers)
            again.load_state_dict(json.loads(state))
            assert json.dumps(again.state_dict()) == state
            for index in range(at, len(CALLS)):
                assert equal(again.next_batch(*CALLS[index]), batches[index])


def test_workers_give_the_same_batches_and_states(small_blocks):
    plain, ahead = (Loader(two_sources(), [2.0, 1.0], 3, workers=workers) for workers in (0, 2))
    for rows, row_length in [(4, 32)] * 20 + CALLS + [(4, 32)] * 5:
        assert equal(plain.next_batch(rows, row_length), ahead.next_batch(rows, row_length))
        assert plain.state_dict() == ahead.state_dict()


def test_shares_of_the_ranks_make_up_the_stream(small_blocks):
    whole = Loader(two_sources(), [1.0, 1.0], 0)
    ranks = [Loader(two_sources(), [1.0, 1.0], 0) for _ in range(3)]
    for _ in range(10):
        expected = whole.next_batch(12, 48)
        shares = [loader.next_batch(12, 48, rank, 3) for rank, loader in enumerate(ranks)]
        for rank, share in enumerate(shares):
            assert torch.equal(share.tokens, expected.tokens[rank::3])
            assert torch.equal(share.segments, expected.segments[rank::3])
            assert share.pieces == expected.pieces[rank::3]
            assert ranks[rank].state_dict() == whole.state_dict()


def test_micro_batches_make_up_the_batch(small_blocks):
    whole, parts = (Loader(two_sources(), [1.0, 3.0], 0) for _ in range(2))
    for _ in range(10):
        expected = whole.next_batch(8, 48)
        micro = [parts.next_batch(2, 48) for _ in range(4)]
        assert torch.equal(torch.cat([batch.tokens for batch in micro]), expected.tokens)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, 0.2, 0.1], [5.0, 1.0, 0.5]])
def test_mixture_stays_within_a_row_of_its_proportions(weights):
    stores = [ListStore([16] * 50) for _ in weights]
    loader = Loader(stores, weights, 0)
    counts = Counter()
    for at in range(1, 200):
        counts.update(piece[0] for row in loader.next_batch(3, 16).pieces for piece in row)
        for source, weight in enumerate(weights):
            assert abs(counts[source] - 3 * at * weight / sum(weights)) <= 1


def test_state_of_another_seed_or_mixture_is_refused():
    state = Loader(two_sources(), [1.0, 1.0], 0).state_dict()
    with pytest.raises(DataError, match="seed=0, this run has 1"):
        Loader(two_sources(), [1.0, 1.0], 1).load_state_dict(state)
    with pytest.raises(DataError, match=r"weights=\[1.0, 1.0\], this run has \[1.0, 2.0\]"):
        Loader(two_sources(), [1.0, 2.0], 0).load_state_dict(state)


def test_restore_at_a_thousand_million_tokens_is_fast():
    loader = Loader([HugeStore()], [1.0], 0)
    state = loader.state_dict()
    state["sources"][0] |= {"epoch": 3, "start": 1_900_000, "stop": 1_901_049, "cuts": [[4096, 100]], "taken": 900_000}
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        loader.load_state_dict(state)
        batch = loader.next_batch(8, 4096)
        seconds.append(time.perf_counter() - began)
    assert {piece[1] for row in batch.pieces for piece in row} == {3}
    assert min(seconds) < 0.05


# Failures.


class BrokenStore(ListStore):
    broken = False

    def read(self, document, start, length):
        if self.broken:
            raise OSError("the disk is gone")
        return super().read(document, start, length)


@pytest.mark.parametrize("workers", [0, 2])
def test_failure_surfaces_and_leaves_the_position(small_blocks, workers):
    store = BrokenStore(random_lengths())
    loader = Loader([store], [1.0], 0, workers=workers)
    loader.next_batch(4, 64)
    state = loader.state_dict()
    loader.load_state_dict(state)  # nothing is made ahead any more
    store.broken = True
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            loader.next_batch(4, 64)
    assert loader.state_dict() == state
    store.broken = False
    expected = Loader([ListStore(random_lengths())], [1.0], 0)
    expected.next_batch(4, 64)
    assert equal(loader.next_batch(4, 64), expected.next_batch(4, 64))


def test_threads_end_with_the_loader():
    before = threading.active_count()
    loader = Loader([ListStore([8] * 50)], [1.0], 0, workers=2)
    loader.next_batch(2, 8)
    del loader
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_bad_arguments_are_named():
    with pytest.raises(DataError, match=r"weight=0\.0 of x: must be positive"):
        SourceConfig("x", 0.0)
    with pytest.raises(DataError, match="source 1 has no documents"):
        Loader([ListStore([1]), ListStore([])], [1.0, 1.0], 0)
    with pytest.raises(DataError, match="source 0 has weight -1"):
        Loader([ListStore([1])], [-1], 0)
    with pytest.raises(DataError, match="0 sources"):
        Loader([], [], 0)
    with pytest.raises(ValueError, match="rows=0"):
        Loader([ListStore([1])], [1.0], 0).next_batch(0, 8)
    with pytest.raises(ValueError, match="rank=2"):
        Loader([ListStore([1])], [1.0], 0).next_batch(1, 8, 2, 2)


# Validation.


def test_validation_is_one_pass_in_the_documents_order():
    store = ListStore(random_lengths())
    batches = list(validation_batches(store, 8, 64, pad_id=9))
    assert [len(batch.tokens) for batch in batches[:-1]] == [8] * (len(batches) - 1)
    assert 1 <= len(batches[-1].tokens) <= 8
    pieces = [piece for batch in batches for row in batch.pieces for piece in row]
    assert check_epochs(pieces, store) == 0
    assert sum(piece[4] for piece in pieces) == store.tokens
    first = [row[0][2] for batch in batches for row in batch.pieces]
    assert first == sorted(first)
    assert all((batch.tokens[batch.segments == -1] == 9).all() for batch in batches)
    assert list(validation_batches(ListStore([]), 8, 64)) == []


# What the loss counts.


class MaskedStore(ListStore):
    """Counts the tokens whose place is divisible by three."""

    def read_trained(self, document, start, length):
        return (np.arange(start, start + length) % 3 == 0).astype(np.uint8)


def expected_mask(batch, masked_sources):
    mask = torch.zeros(batch.tokens.shape, dtype=torch.bool)
    for index, row in enumerate(batch.pieces):
        at = 0
        for source, _, _, start, length in row:
            for place in range(length):
                mask[index, at + place] = source not in masked_sources or (start + place) % 3 == 0
            at += length
    return mask


@pytest.mark.parametrize("workers", [0, 2])
def test_masks_follow_their_tokens(workers):
    loader = Loader([MaskedStore(random_lengths())], [1.0], 0, workers=workers)
    for rows, row_length in ((3, 40), (2, 97)):
        batch = loader.next_batch(rows, row_length)
        assert batch.trained.dtype == torch.bool
        assert torch.equal(batch.trained, expected_mask(batch, {0}))
    (last,) = list(validation_batches(MaskedStore([5, 4]), 8, 16))
    assert torch.equal(last.trained, expected_mask(last, {0}))
    assert not last.trained[last.segments < 0].any(), "padding is nothing to learn"


def test_text_in_a_mixture_is_all_trained():
    loader = Loader([ListStore(random_lengths()), MaskedStore(random_lengths(seed=1))], [1.0, 1.0], 0)
    batch = loader.next_batch(6, 64)
    assert {source for row in batch.pieces for source, *_ in row} == {0, 1}
    assert torch.equal(batch.trained, expected_mask(batch, {1}))
    assert Loader([ListStore(random_lengths())], [1.0], 0).next_batch(2, 64).trained is None
