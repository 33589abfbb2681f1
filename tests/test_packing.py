import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openv4.data.packing import pack


def check(lengths, row_length):
    packing = pack(lengths, row_length)
    covered = [np.zeros(length, dtype=int) for length in lengths]
    for document, start, length in zip(packing.document, packing.start, packing.length, strict=True):
        assert length > 0
        covered[document][start : start + length] += 1
        assert start + length <= lengths[document]
    assert all((count == 1).all() for count in covered)
    rows = np.split(packing.length, packing.offsets[1:-1]) if packing.rows else []
    assert all(0 < row.sum() <= row_length for row in rows)
    assert packing.offsets[0] == 0
    assert packing.offsets[-1] == len(packing.length)
    first = packing.document[packing.offsets[:-1]]
    assert (np.diff(first) >= 0).all(), "rows come in the order of their first document"
    return packing


def first_fit_rows(lengths, row_length):
    room = []
    rows = 0
    for length in lengths:
        rows += length // row_length
        rest = length % row_length
        if rest:
            at = next((index for index, left in enumerate(room) if left >= rest), None)
            if at is None:
                room.append(row_length - rest)
            else:
                room[at] -= rest
    return rows + len(room)


@given(st.lists(st.integers(0, 70), max_size=60), st.integers(1, 32))
def test_every_token_once_and_no_row_overfull(lengths, row_length):
    packing = check(lengths, row_length)
    # Best-fit decreasing needs at most 11/9 of the optimum and 4 rows more (Johnson 1974; the optimum >= the volume
    # and >= the number of remainders above half a row).
    large = sum(length // row_length + (length % row_length * 2 > row_length) for length in lengths)
    bound = max(-(-sum(lengths) // row_length), large)
    assert bound <= packing.rows <= np.floor(first_fit_rows(lengths, row_length) * 11 / 9 + 4)


def test_large_packing_is_tight_and_no_worse_than_first_fit():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5, 1.2, 3000).astype(int) + 2
    for row_length in (256, 1024, 4096):
        packing = pack(lengths, row_length)
        assert packing.rows <= first_fit_rows(lengths.tolist(), row_length)
        assert lengths.sum() / (packing.rows * row_length) > 0.99


def test_long_documents_are_cut_into_full_rows_and_a_remainder():
    packing = check([10, 25, 3], 8)
    assert packing.document.tolist() == [0, 0, 1, 2, 1, 1, 1]
    assert packing.start.tolist() == [0, 8, 24, 0, 0, 8, 16]
    assert packing.length.tolist() == [8, 2, 1, 3, 8, 8, 8]
    assert packing.offsets.tolist() == [0, 1, 4, 5, 6, 7]


def test_edges():
    assert pack([], 8).rows == 0
    assert pack([0, 0], 8).rows == 0
    assert pack([8], 8).rows == 1
    with pytest.raises(ValueError, match="row_length=0"):
        pack([1], 0)
    with pytest.raises(ValueError, match="negative"):
        pack([-1], 4)
