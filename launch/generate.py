"""``openv4 generate``: continue a text."""

import math
from dataclasses import dataclass
from pathlib import Path

from ..data.tokenizer import load_tokenizer
from ..model.generate import generate
from ..train.checkpoint import find_tokenizer, load_model
from ..train.config import ConfigError


@dataclass(frozen=True)
class GenerateConfig:
    """Attributes:
    checkpoint: a run, one of its checkpoints, or an exported model.
    prompt: text to continue.
    max_new_tokens: at most so many are added.
    temperature: 0 takes the likeliest token every time.
    top_p: sample among the likeliest tokens that together have this probability.
    seed: the same seed gives the same text.
    tokenizer: a tokenizer.json, where the checkpoint has none beside it.
    """

    checkpoint: str
    prompt: str = ""
    max_new_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for key, good, rule in (
            ("max_new_tokens", self.max_new_tokens > 0, "positive"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
        ):
            if not good:
                raise ConfigError(f"{key}={getattr(self, key)} must be {rule}")


CONFIG = GenerateConfig


def run(config: GenerateConfig) -> None:
    model = load_model(config.checkpoint)
    path = Path(config.tokenizer) if config.tokenizer else find_tokenizer(config.checkpoint)
    if path is None:
        raise ConfigError(f"{config.checkpoint}: no tokenizer.json there; name one with tokenizer=")
    tokenizer = load_tokenizer(path)
    tokenizer.encode_special_tokens = False  # a prompt may hold <think> and its like
    prompt = [model.config.bos_token_id, *tokenizer.encode(config.prompt, add_special_tokens=False).ids]
    if max(prompt) >= model.config.vocab_size:
        raise ConfigError(f"{path}: gives token id {max(prompt)}, the model's vocab_size is {model.config.vocab_size}")
    ids = generate(
        model,
        prompt,
        config.max_new_tokens,
        config.temperature,
        config.top_p,
        config.seed,
        stop=(model.config.eos_token_id,),
    )
    print(config.prompt + tokenizer.decode(ids))
