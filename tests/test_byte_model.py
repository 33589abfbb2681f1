import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openv4.data.byte_model import ByteModel
from openv4.data.prepare import KING_JAMES


@pytest.fixture(scope="module")
def king_james() -> tuple[bytes, bytes]:
    with gzip.open(KING_JAMES) as file:
        text = "\n".join(json.loads(line)["text"] for line in file).encode()
    return text[: len(text) * 19 // 20], text[len(text) * 19 // 20 :]


def test_king_james_gets_cheaper_with_every_order(king_james):
    train, test = king_james
    bits = [ByteModel.fit([train], order).bits_per_byte([test]) for order in range(5)]
    # A Witten-Bell model written with plain dictionaries gives 3.320 2.636 2.117 1.862 for orders 1 to 4.
    assert bits == pytest.approx([4.340, 3.320, 2.633, 2.107, 1.827], abs=0.005)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_probabilities_sum_to_one_after_any_context(king_james, order):
    model = ByteModel.fit([king_james[0][:50_000]], order)
    for context in (b"", b"t", b"the ", b"qqq", b"\xff\xfe\xfd", king_james[1][:3]):
        probabilities = model.probabilities(context)
        assert probabilities.sum() == pytest.approx(1, abs=1e-12)
        assert (probabilities > 0).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=5), st.integers(0, 6))
def test_small_data_give_a_proper_distribution_and_a_consistent_score(texts, order):
    model = ByteModel.fit(texts, order)
    text = texts[0]
    one_by_one = [model.probabilities(text[:at])[byte] for at, byte in enumerate(text)]
    assert model.probabilities(text).sum() == pytest.approx(1, abs=1e-12)
    assert model.bits_per_byte([text]) == pytest.approx(float(-np.mean(np.log2(one_by_one))))


def test_texts_do_not_see_each_other():
    model = ByteModel.fit([b"abcabcabc", b"xyz"], 2)
    both = (3 * model.bits_per_byte([b"abc"]) + 3 * model.bits_per_byte([b"xyz"])) / 6
    assert model.bits_per_byte([b"abc", b"xyz"]) == pytest.approx(both)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="order=7"):
        ByteModel.fit([b"a"], 7)
    with pytest.raises(ValueError, match="no text"):
        ByteModel.fit([b""], 2)
    assert np.isnan(ByteModel.fit([b"a"]).bits_per_byte([]))
