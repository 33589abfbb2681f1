"""A loss that counts chosen tokens only, against sums by hand; and the way from conversations to a training step."""

import math

import numpy as np
import pytest
import torch
from chat_cases import chat_tokenizer
from model_cases import random_config, random_model
from run_cases import optimizers_of, packed_batch, plan

from openv4.data.loader import Batch, Loader, validation_batches
from openv4.data.prepare import CONVERSATIONS, PrepareConfig, prepare
from openv4.data.shards import PreparedData
from openv4.model import Transformer
from openv4.model.loss import Counts, shifted_targets, token_losses, training_losses
from openv4.train.evaluation import evaluate
from openv4.train.loop import split_batch, training_step

pytestmark = pytest.mark.usefixtures("one_thread")


def masked_batch(vocab: int, seed: int = 0) -> Batch:
    batch = packed_batch(vocab, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    return batch._replace(trained=torch.rand(batch.tokens.shape, generator=generator) < 0.4)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(random_config(0), 0)


def predicted(batch: Batch, distance: int) -> list[tuple[int, int]]:
    """Places whose token at `distance` is in their document and trained on, one by one."""
    assert batch.trained is not None
    rows, width = batch.tokens.shape
    return [
        (row, place)
        for row in range(rows)
        for place in range(width - distance)
        if batch.segments[row, place] >= 0
        and batch.segments[row, place] == batch.segments[row, place + distance]
        and batch.trained[row, place + distance]
    ]


def test_targets_and_counts() -> None:
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15, 16]])
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, -1]])
    trained = torch.tensor([[1, 0, 1, 1, 1, 1, 1]]).bool()
    assert shifted_targets(tokens, segments, 1, trained).tolist() == [[-100, 12, 13, -100, 15, -100, -100]]
    assert shifted_targets(tokens, segments, 2, trained).tolist() == [[12, 13, -100, -100, -100, -100, -100]]
    counts = Counts.of([segments, segments], [trained, None])
    assert (int(counts.main), int(counts.mtp), int(counts.valid)) == (3 + 4, 2 + 2, 6 + 6)
    assert int(Counts.of([segments]).main) == int(Counts.of([segments], [None]).main) == 4
    nothing = torch.zeros_like(trained)
    assert shifted_targets(tokens, segments, 1, nothing).tolist() == [[-100] * 7]
    with pytest.raises(ValueError, match="zip"):
        Counts.of([segments, segments], [trained])


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_the_sum_over_chosen_tokens(seed: int, model: Transformer) -> None:
    """Main loss from the model's logits in float64, token by token; float32 sums of some thirty terms agree to 1e-5."""
    batch = masked_batch(model.config.vocab_size, seed)
    losses = training_losses(model, batch.tokens, batch.segments, trained=batch.trained)
    chances = model(batch.tokens, batch.segments).double().log_softmax(-1)
    chosen = predicted(batch, 1)
    by_hand = -sum(chances[row, place, batch.tokens[row, place + 1]] for row, place in chosen)
    assert losses.main.item() == pytest.approx(by_hand.item(), rel=1e-5)
    counts = Counts.of([batch.segments], [batch.trained])
    assert int(counts.main) == len(chosen) > 10
    assert int(counts.mtp) == len(predicted(batch, 2)) > 10
    each, targets = token_losses(model, batch.tokens, batch.segments, "sparse", batch.trained)
    assert float(each.sum()) == pytest.approx(by_hand.item(), rel=1e-5)
    assert [tuple(place) for place in (targets >= 0).nonzero().tolist()] == chosen


def test_masks_that_complement_each_other_make_up_the_whole(model: Transformer) -> None:
    """Main and MTP losses split; what the router is told does not depend on the mask."""
    batch = masked_batch(model.config.vocab_size)
    assert batch.trained is not None
    runs = [
        training_losses(model, batch.tokens, batch.segments, trained=mask)
        for mask in (None, batch.trained, ~batch.trained, torch.ones_like(batch.trained))
    ]
    whole, ours, rest, ones = runs
    for name in ("main", "mtp"):
        parts = getattr(ours, name) + getattr(rest, name)
        assert parts.item() == pytest.approx(getattr(whole, name).item(), rel=1e-5)
        assert 0 < getattr(ours, name).item() < getattr(whole, name).item()
        assert torch.equal(getattr(ones, name), getattr(whole, name))
    for losses in (ours, rest):
        assert torch.equal(losses.balance, whole.balance)
        assert all(torch.equal(losses.load[name], load) for name, load in whole.load.items())


def test_nothing_to_train_on_is_no_division_by_zero(model: Transformer) -> None:
    batch = masked_batch(model.config.vocab_size)
    nothing = torch.zeros_like(batch.segments, dtype=torch.bool)
    losses = training_losses(model, batch.tokens, batch.segments, trained=nothing)
    assert losses.total(Counts.of([batch.segments], [nothing]), 0.3, 0.0).item() == 0.0


def test_a_step_does_not_depend_on_how_it_is_cut(model: Transformer) -> None:
    """Rows hold different numbers of trained tokens, so a mean of means would show; and the mask makes a difference."""
    batch = masked_batch(model.config.vocab_size)
    micro = split_batch(batch, batch.tokens.shape[1], torch.device("cpu"))
    assert len(micro) == len(batch.tokens)
    assert batch.trained is not None
    assert torch.equal(torch.cat([b.trained for b in micro if b.trained is not None]), batch.trained)
    report = [
        training_step(m, optimizers_of(m), batches, plan(), 1.0)
        for m, batches in ((random_model(model.config, 0), batches) for batches in ([batch], micro))
    ]
    assert int(report[0].counts.main) == int(report[1].counts.main) == len(predicted(batch, 1))
    for name in ("main", "mtp", "grad_norm"):
        assert float(getattr(report[1], name)) == pytest.approx(float(getattr(report[0], name)), rel=1e-4)
    unmasked = training_step(
        random_model(model.config, 0), optimizers_of(model), [batch._replace(trained=None)], plan(), 1.0
    )
    assert float(unmasked.main) > 1.5 * float(report[0].main)


@pytest.fixture(scope="module")
def chat_data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """The shipped conversations in a tokenizer of our own."""
    folder = tmp_path_factory.mktemp("chat")
    chat_tokenizer().save(str(folder / "tokenizer.json"))
    prepare(PrepareConfig(str(CONVERSATIONS), str(folder / "out"), tokenizer=str(folder), kind="chat"))
    return PreparedData(folder / "out")


def test_batches_of_the_shipped_conversations(chat_data: PreparedData) -> None:
    splits = chat_data.manifest.splits
    assert sum(split.documents for split in splits.values()) == 726
    length = max(split.longest for split in splits.values())
    batch = Loader([chat_data.split("train")], [1.0], 0).next_batch(8, length)
    assert batch.trained is not None
    tokenizer = chat_tokenizer()
    for tokens, segments, trained in zip(batch.tokens, batch.segments, batch.trained, strict=True):
        for segment in range(int(segments.max()) + 1):
            ids = tokens[segments == segment].tolist()
            mask = trained[segments == segment].tolist()
            text = tokenizer.decode([id_ for id_, m in zip(ids, mask, strict=True) if not m])
            assert "?" in text or "Quote" in text, "a question, whole, since no row cuts a document"
            assert "comes" not in text.replace("Which book comes", "") and "says" not in text
            assert mask[-1] and ids[-1] == chat_data.eos


def test_evaluation_counts_what_is_trained(chat_data: PreparedData) -> None:
    """Against the definition, conversation by conversation."""
    config = random_config(0, vocab_size=chat_data.vocab_size, bos_token_id=chat_data.bos, eos_token_id=chat_data.eos)
    model = random_model(config, 0)
    store = chat_data.split("validation")
    sizes = torch.tensor(chat_data.token_bytes, dtype=torch.long)
    nats = text_nats = 0.0
    count = text_bytes = 0
    for document in range(store.documents):
        length = int(store.length(np.array([document]))[0])
        ids, mask = store.read(document, 0, length).tolist(), store.read_trained(document, 0, length)
        assert mask is not None
        chances = model(torch.tensor([ids]))[0].detach().double().log_softmax(-1)
        for place in range(1, length):
            if mask[place]:
                loss = -float(chances[place - 1, ids[place]])
                nats, count = nats + loss, count + 1
                if sizes[ids[place]]:
                    text_nats, text_bytes = text_nats + loss, text_bytes + int(sizes[ids[place]])
    longest = chat_data.manifest.splits["validation"].longest
    result = evaluate(model, [store], sizes, longest + 3)
    assert result.tokens == count == chat_data.manifest.splits["validation"].trained
    assert result.loss == pytest.approx(nats / count, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(text_nats / math.log(2) / text_bytes, rel=1e-5)
    assert sum(batch.tokens.numel() for batch in validation_batches(store, 4, longest)) > count
