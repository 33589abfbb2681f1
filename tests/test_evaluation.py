"""Validation loss and bits per byte, against what their definitions give."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from model_cases import random_config, random_model
from torch import Tensor

from openv4.model import Transformer
from openv4.model.config import LoRAConfig
from openv4.model.lora import add_lora, lora_parameters
from openv4.train.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


class Documents:
    """A store in memory."""

    def __init__(self, documents: Sequence[Sequence[int]]) -> None:
        self._documents = [np.array(document) for document in documents]

    @property
    def documents(self) -> int:
        return len(self._documents)

    @property
    def tokens(self) -> int:
        return sum(map(len, self._documents))

    def length(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.array([len(self._documents[index]) for index in documents], dtype=np.int64)

    def read(self, document: int, start: int, length: int) -> npt.NDArray[Any]:
        return self._documents[document][start : start + length]

    def read_trained(self, document: int, start: int, length: int) -> None:
        return None


BOS, EOS, MARK = 3, 4, 5  # stand for no text; 0 does, as it may where nothing is predicted


def drawn(lengths: Sequence[int], vocab: int, seed: int = 0) -> list[list[int]]:
    """Begin, tokens with a special one among them, end."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(6, vocab, (length,), generator=generator).tolist() for length in lengths]
    return [[BOS, *ids[: len(ids) // 2], MARK, *ids[len(ids) // 2 :], EOS] for ids in documents]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(random_config(0), 0)


@pytest.fixture(scope="module")
def token_bytes(model: Transformer) -> Tensor:
    sizes = torch.arange(model.config.vocab_size) % 7 + 1
    sizes[[BOS, EOS, MARK]] = 0
    return sizes


def expected(model: Transformer, documents: list[list[int]], token_bytes: Tensor) -> tuple[float, float, int]:
    """Loss, bits per byte and count by the definition: each document alone, token after token, in float64."""
    nats = text_nats = 0.0
    count = text_bytes = 0
    for document in documents:
        chances = model(torch.tensor([document]))[0].detach().double().log_softmax(-1)
        for place, token in enumerate(document[1:]):
            nats -= float(chances[place, token])
            count += 1
            if token_bytes[token]:
                text_nats -= float(chances[place, token])
                text_bytes += int(token_bytes[token])
    return nats / count, text_nats / math.log(2) / text_bytes, count


@pytest.mark.parametrize("batch_tokens", [1, 64, 100, 10_000])
def test_equals_the_definition_for_any_batch(batch_tokens: int, model: Transformer, token_bytes: Tensor) -> None:
    """Documents that fit a row are predicted as if alone; float32 rounding over a hundred tokens: 1e-6."""
    documents = drawn([3, 17, 0, 9, 26, 1, 12], model.config.vocab_size)
    loss, bits, count = expected(model, documents, token_bytes)
    result = evaluate(model, [Documents(documents)], token_bytes, 32, batch_tokens=batch_tokens)
    assert result.tokens == count == sum(map(len, documents)) - len(documents)
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-6)


def test_a_document_longer_than_a_row_goes_on_without_context(model: Transformer, token_bytes: Tensor) -> None:
    (document,) = drawn([40], model.config.vocab_size)
    pieces = [document[start : start + 16] for start in range(0, len(document), 16)]
    loss, bits, count = expected(model, pieces, token_bytes)
    result = evaluate(model, [Documents([document])], token_bytes, 16)
    assert (result.tokens, result.loss) == (count, pytest.approx(loss, rel=1e-6))
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-6)


def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary(model: Transformer) -> None:
    """By hand: four text tokens of 1, 2, 3 and 4 bytes, each of log2(V) bits, over 10 bytes; loss counts all six."""
    uniform = random_model(model.config, 1)
    uniform.head.weight.data.zero_()
    sizes = torch.zeros(model.config.vocab_size, dtype=torch.long)
    sizes[10:14] = torch.arange(1, 5)
    result = evaluate(uniform, [Documents([[BOS, 10, 11, MARK, 12, 13, EOS]])], sizes, 8)
    assert result.tokens == 6
    assert result.loss == pytest.approx(math.log(model.config.vocab_size), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(4 * math.log2(model.config.vocab_size) / 10, rel=1e-6)


def test_several_stores_are_one(model: Transformer, token_bytes: Tensor) -> None:
    first, second = drawn([9, 4], model.config.vocab_size), drawn([20, 1], model.config.vocab_size, seed=1)
    loss, bits, count = expected(model, first + second, token_bytes)
    result = evaluate(model, [Documents(first), Documents(second)], token_bytes, 32)
    assert (result.tokens, result.loss) == (count, pytest.approx(loss, rel=1e-6))
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-6)


@pytest.mark.parametrize(("cap", "rows"), [(1, 1), (16, 1), (17, 2), (32, 2), (33, 3), (1000, 4), (None, 4)])
def test_the_cap_counts_tokens_read(cap: int | None, rows: int, model: Transformer, token_bytes: Tensor) -> None:
    """Batches of one row of 16 are read until the cap is reached; over two stores of two full rows each."""
    documents = drawn([13, 13], model.config.vocab_size)
    assert [len(document) for document in documents] == [16, 16]
    stores = [Documents(documents), Documents(documents)]
    result = evaluate(model, stores, token_bytes, 16, tokens=cap, batch_tokens=16)
    assert result.tokens == 15 * rows


def test_the_attention_mode_is_passed_on(model: Transformer, token_bytes: Tensor) -> None:
    documents = drawn([60], model.config.vocab_size)
    dense = evaluate(model, [Documents(documents)], token_bytes, 64, "dense")
    sparse = evaluate(model, [Documents(documents)], token_bytes, 64, "sparse")
    assert dense.loss != sparse.loss


def test_nothing_to_predict_is_no_division_by_zero(model: Transformer, token_bytes: Tensor) -> None:
    for stores in ([], [Documents([[BOS], [BOS]])]):
        result = evaluate(model, stores, token_bytes, 8)
        assert (result.loss, result.bits_per_byte, result.tokens) == (0.0, 0.0, 0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_rests_while_evaluating(token_bytes: Tensor) -> None:
    """The loss is that of the adapters without dropout, and training goes on with it."""
    model = random_model(random_config(0), 0)
    documents = [Documents(drawn((30, 50), model.config.vocab_size))]
    add_lora(model, LoRAConfig(rank=2, dropout=0.5, targets=("wq_a", "shared_experts")))
    for parameter in lora_parameters(model).values():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    losses = [evaluate(model, documents, token_bytes, 40).loss for _ in range(2)]
    assert model.training and losses[0] == losses[1]
    model.eval()
    assert evaluate(model, documents, token_bytes, 40).loss == losses[0] and not model.training
