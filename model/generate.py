"""Sampling by plain recomputation: every new token runs the model over all tokens before it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 0.95,
    seed: int = 0,
    stop: Sequence[int] = (),
) -> list[int]:
    """Continues ``prompt``; returns the new token ids, a stop token left out.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: of the draws; the same seed gives the same text.
        stop: token ids that end the text.
    """
    if not prompt:
        raise ValueError("the prompt holds no token; begin with the model's begin token")
    device = model.embed.weight.device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        context = torch.tensor([tokens[-model.config.max_position_embeddings :]], device=device)
        token = sample(model(context)[0, -1].float().cpu(), temperature, top_p, generator)
        if token in stop:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draws a token id from ``logits [V]``."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits.double() - logits.max()) / temperature  # finite at any temperature
    probability, order = scaled.softmax(-1).sort(descending=True, stable=True)
    if top_p < 1:  # at 1, rounding of the sum must not drop the tail
        probability = probability * (probability.cumsum(0) - probability < top_p)  # always keeps the likeliest one
    return int(order[torch.multinomial(probability, 1, generator=generator)])
