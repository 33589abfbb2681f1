"""Validation: mean next-token loss, and bits per byte, which does not depend on the tokenizer."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ..data.loader import Batch, validation_batches
from ..data.shards import TokenStore
from ..model.config import AttentionMode
from ..model.loss import token_losses
from ..model.transformer import Transformer
from .parallel import ALONE, Alone


@dataclass(frozen=True)
class Evaluation:
    loss: float  # nats per predicted token
    bits_per_byte: float  # over the bytes of the predicted text; tokens that stand for no text are left out
    tokens: int  # predicted


@contextmanager
def without_dropout(model: Transformer) -> Iterator[None]:
    """The adapters' dropout rests while the block lasts."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def evaluate(
    model: Transformer,
    stores: Sequence[TokenStore],
    token_bytes: Tensor,
    row_length: int,
    attention: AttentionMode = "sparse",
    tokens: int | None = None,
    batch_tokens: int = 4096,
    pad_id: int = 1,
    processes: Alone = ALONE,
) -> Evaluation:
    """One pass over the documents of ``stores``, packed in rows of ``row_length``; many processes share the batches.

    Args:
        token_bytes: ``[V]`` int64 UTF-8 bytes of each token id, on the model's device.
        tokens: stop once so many have been read; None reads all.
    """
    device = token_bytes.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # nats, tokens, nats of text, bytes of text
    with without_dropout(model):
        batches = _batches(stores, max(1, batch_tokens // row_length), row_length, tokens, pad_id)
        while turn := list(islice(batches, processes.replicas)):
            batch = turn[min(processes.replica, len(turn) - 1)]
            trained = None if batch.trained is None else batch.trained.to(device)
            losses, targets = token_losses(
                model, batch.tokens.to(device), batch.segments.to(device), attention, trained
            )
            if processes.replica >= len(turn):  # nothing is left, but others need this process's experts
                continue
            predicted = targets >= 0
            size = token_bytes[targets.clamp(min=0)] * predicted
            text = losses[size > 0].double().sum()
            sums += torch.stack((losses.double().sum(), predicted.sum().double(), text, size.sum().double()))
    nats, count, text_nats, text_bytes = processes.total(sums).tolist()
    return Evaluation(nats / max(count, 1), text_nats / math.log(2) / max(text_bytes, 1), int(count))


def _batches(
    stores: Sequence[TokenStore], rows: int, row_length: int, tokens: int | None, pad_id: int
) -> Iterator[Batch]:
    read = 0
    for store in stores:
        for batch in validation_batches(store, rows, row_length, pad_id):
            if tokens is not None and read >= tokens:
                return
            read += batch.tokens.numel()
            yield batch
