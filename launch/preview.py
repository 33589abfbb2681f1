"""``openv4 preview``: one conversation as the model sees it, and what it would be trained on."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

from ..data.chat import Encoded, chosen_effort, encode, find_templates, special_token_ids
from ..data.config import Effort
from ..data.conversation import parse_record
from ..data.reading import CHAT_SUFFIXES, input_files, json_object, lines
from ..data.tokenizer import load_tokenizer
from ..train.config import ConfigError

PROMPT, TRAINED, SPECIAL = "dim", "green underline", "bold"
OPEN, CLOSE = "{+", "+}"  # where there is no colour


@dataclass(frozen=True)
class PreviewConfig:
    """Attributes:
    input: a .jsonl file of conversations (also .gz, .zst), a folder of them or a glob pattern.
    tokenizer: a tokenizer.json or its folder.
    index: of the conversation, from 0.
    effort: null takes the record's own, or else what its messages show.
    chat_templates: the release's encoding_dsv4.py, where it is not beside the tokenizer.
    """

    input: str
    tokenizer: str
    index: int = 0
    effort: Effort | None = None
    chat_templates: str | None = None

    def __post_init__(self) -> None:
        if self.index < 0:
            raise ConfigError(f"index={self.index} must be at least 0")


CONFIG = PreviewConfig


def run(config: PreviewConfig) -> None:
    tokenizer = load_tokenizer(Path(config.tokenizer))
    templates = find_templates(config.chat_templates, Path(config.tokenizer))
    found = list(itertools.islice(lines(input_files(config.input, CHAT_SUFFIXES)), config.index + 1))
    if len(found) <= config.index:
        raise ConfigError(f"index={config.index}: {config.input} holds {len(found)} conversations, counted from 0")
    line, where = found[-1]
    conversation = parse_record(json_object(line, where, '{"messages": [...]}'), where)
    encoded = encode(conversation, tokenizer, config.effort, templates)

    console = Console(highlight=False, markup=False, soft_wrap=True)
    plain = not console.is_terminal or console.no_color
    legend = f"{OPEN}trained{CLOSE}" if plain else "trained"
    console.print(Text.assemble((legend, TRAINED), "  ", ("prompt", PROMPT), "  ", ("special token", SPECIAL)))
    console.print(colored(encoded, tokenizer, plain))
    count, trained = len(encoded.ids), sum(encoded.trained)
    console.print(
        f"{where}: {len(conversation.messages)} messages, effort {chosen_effort(conversation, config.effort)}, "
        f"{count:,} tokens, {trained:,} trained ({trained / count:.0%})"
    )


def colored(encoded: Encoded, tokenizer: Tokenizer, plain: bool) -> Text:
    """The conversation's text, special tokens in sight, what is trained underlined; `plain`: between marks instead."""
    special = {id_: name for name, id_ in special_token_ids(tokenizer).items()}
    text = Text()
    for trained, stretch in itertools.groupby(zip(encoded.ids, encoded.trained, strict=True), lambda pair: pair[1]):
        style = TRAINED if trained else PROMPT
        text.append(OPEN if trained and plain else "", style)
        for token, run_ in itertools.groupby((id_ for id_, _ in stretch), special.get):
            ids: Sequence[int] = list(run_)
            if token is None:
                text.append(tokenizer.decode(ids, skip_special_tokens=False), style)
            else:
                text.append(token * len(ids), f"{SPECIAL} {style}")
        text.append(CLOSE if trained and plain else "", style)
    return text
