"""Sampling: the prompt runs through the model once, then each new token alone, with a cache of what came before."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .cache import Cache
from .config import AttentionMode
from .transformer import Transformer


def generate(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 0.95,
    seed: int = 0,
    stop: Sequence[int] = (),
) -> list[int]:
    """Continues ``prompt``; returns the new token ids, a stop token left out. All that ``stream`` yields."""
    return list(stream(model, prompt, max_new_tokens, temperature, top_p, seed, stop))


def stream(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 0.95,
    seed: int = 0,
    stop: Sequence[int] = (),
    cache: Cache | None = None,
    attention: AttentionMode = "sparse",
) -> Iterator[int]:
    """Yields the tokens that continue ``prompt``, each as soon as it is drawn.

    A text ends, like at a stop token, when it fills the model's ``max_position_embeddings``.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: of the draws; the same seed gives the same text.
        stop: token ids that end the text; they are not yielded.
        cache: of one row; the prompt follows the tokens in it. Afterwards it holds all but the last token drawn.
        attention: what CSA layers attend to, as in ``Transformer.forward``.

    Raises:
        ValueError: the prompt is empty, or leaves no position for a new token.
    """
    if not prompt:
        raise ValueError("the prompt holds no token; begin with the model's begin token")
    cache = Cache(model.config) if cache is None else cache
    limit = model.config.max_position_embeddings
    length = cache.length + len(prompt)
    if length >= limit:
        raise ValueError(f"a prompt of {length} tokens fills max_position_embeddings={limit}; shorten it")
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(min(max_new_tokens, limit - length)):
        logits = model.decode(torch.tensor([tokens], device=model.embed.weight.device), cache, attention)
        token = sample(logits[0, -1].float().cpu(), temperature, top_p, generator)
        if token in stop:
            return
        yield token
        tokens = [token]


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draws a token id from ``logits [V]``."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits.double() - logits.max()) / temperature  # finite at any temperature
    probability, order = scaled.softmax(-1).sort(descending=True, stable=True)
    if top_p < 1:  # at 1, rounding of the sum must not drop the tail
        probability = probability * (probability.cumsum(0) - probability < top_p)  # always keeps the likeliest one
    return int(order[torch.multinomial(probability, 1, generator=generator)])
