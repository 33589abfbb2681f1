"""``openv4 generate``: continue a text, or reply to a message."""

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from ..data.chat import Templates, encode_prompt, parse_reply
from ..data.tokenizer import THINK_END, load_tokenizer
from ..model.accounting import cache_bytes, cache_bytes_per_token, v4_entry_bytes, v4_key_bytes
from ..model.cache import Cache
from ..model.config import ModelConfig
from ..model.generate import stream
from ..train.checkpoint import find_tokenizer, load_model
from ..train.config import ConfigError


@dataclass(frozen=True)
class GenerateConfig:
    """Attributes:
    checkpoint: a run, one of its checkpoints, or an exported model.
    prompt: text to continue; with chat, the user's message.
    max_new_tokens: at most so many are added.
    temperature: 0 takes the likeliest token every time.
    top_p: sample among the likeliest tokens that together have this probability.
    seed: the same seed gives the same text.
    tokenizer: a tokenizer.json, where the checkpoint has none beside it.
    chat: reply to the prompt, in DeepSeek-V4's chat format.
    effort: none replies at once, high reasons first, max reasons after the prefix for it.
    system: what a chat begins with.
    chat_templates: an encoding_dsv4.py with the prefix of effort=max, where none lies beside the tokenizer.
    """

    checkpoint: str
    prompt: str = ""
    max_new_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    tokenizer: str | None = None
    chat: bool = False
    effort: Literal["none", "high", "max"] = "none"
    system: str | None = None
    chat_templates: str | None = None

    def __post_init__(self) -> None:
        for key, good, rule in (
            ("max_new_tokens", self.max_new_tokens > 0, "must be positive"),
            ("temperature", 0 <= self.temperature < math.inf, "must be 0 or more"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0, at most 1"),
            ("effort", self.chat or self.effort == "none", "is for a chat: add chat=true"),
            ("system", self.chat or self.system is None, "is for a chat: add chat=true"),
            ("chat_templates", self.chat or self.chat_templates is None, "is for a chat: add chat=true"),
        ):
            if not good:
                raise ConfigError(f"{key}={getattr(self, key)} {rule}")


CONFIG = GenerateConfig


def run(config: GenerateConfig) -> None:
    model = load_model(config.checkpoint)
    path = Path(config.tokenizer) if config.tokenizer else find_tokenizer(config.checkpoint)
    if path is None:
        raise ConfigError(f"{config.checkpoint}: no tokenizer.json there; name one with tokenizer=")
    tokenizer = load_tokenizer(path)
    prompt = _chat(config, path, tokenizer) if config.chat else _text(config, model.config, tokenizer)
    if max(prompt) >= model.config.vocab_size:
        raise ConfigError(f"{path}: gives token id {max(prompt)}, the model's vocab_size is {model.config.vocab_size}")
    if len(prompt) >= model.config.max_position_embeddings:
        raise ConfigError(
            f"a prompt of {len(prompt)} tokens fills model.max_position_embeddings="
            f"{model.config.max_position_embeddings}; shorten it"
        )
    cache, start = Cache(model.config), time.perf_counter()
    settings = (config.max_new_tokens, config.temperature, config.top_p, config.seed, (model.config.eos_token_id,))
    ids = list(stream(model, prompt, *settings, cache=cache))
    seconds = time.perf_counter() - start
    print(_reply(ids, tokenizer, config.effort) if config.chat else config.prompt + tokenizer.decode(ids))
    print(_costs(len(ids), seconds, cache, model.config), file=sys.stderr)


def _text(config: GenerateConfig, model: ModelConfig, tokenizer: Tokenizer) -> list[int]:
    tokenizer.encode_special_tokens = False  # a prompt may hold <think> and its like
    return [model.bos_token_id, *tokenizer.encode(config.prompt, add_special_tokens=False).ids]


def _chat(config: GenerateConfig, path: Path, tokenizer: Tokenizer) -> list[int]:
    given = config.chat_templates
    templates = Templates.find(path.parent) if given is None else Templates.read(Path(given))
    messages = [{"role": "user", "content": config.prompt}]
    if config.system is not None:
        messages.insert(0, {"role": "system", "content": config.system})
    return encode_prompt(messages, tokenizer, config.effort, templates)


def _reply(ids: Sequence[int], tokenizer: Tokenizer, effort: Literal["none", "high", "max"]) -> str:
    """Reasoning between its marks, as far as it got, then the answer, and a line for each call of a tool."""
    reply = parse_reply(ids, tokenizer, effort)
    text = reply.content + "".join(
        "\n" + json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
        for call in reply.tool_calls
    )
    if effort == "none":
        return text
    ended = tokenizer.token_to_id(THINK_END) in ids
    return f"<think>{reply.reasoning}" + (f"</think>\n{text}" if ended else "")


def _costs(tokens: int, seconds: float, cache: Cache, config: ModelConfig) -> str:
    formats = v4_entry_bytes(config), v4_key_bytes(config)
    v4 = cache_bytes(config, cache.length, *formats), cache_bytes_per_token(config, *formats)
    return (
        f"{tokens} tokens, {tokens / seconds:.1f} tokens/s; the cache of {cache.length} tokens takes {cache.bytes:,} "
        f"bytes, each further one {cache.bytes_per_token:,.1f} (in V4's FP8 and FP4: {v4[0]:,.0f} and {v4[1]:,.1f})"
    )
