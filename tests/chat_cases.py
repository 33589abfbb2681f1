"""What the tests of chat data share: a small tokenizer with the whole set of special tokens, and sequences by hand."""

import functools
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer

from openv4.data.chat import DSML, OPTIONAL_TOKENS, REQUIRED_TOKENS, Templates
from openv4.data.tokenizer import train_tokenizer

TEXTS = ["In the beginning was the Word, and the Word was with God. <tool_result> invoke name= parameter\r\n"] * 6
SPECIAL = (*REQUIRED_TOKENS, *OPTIONAL_TOKENS)
TEMPLATES = Templates(
    max_effort="Think twice.\n\n",
    tool_block="# Tools\nWrite <{dsml_token}calls> after {thinking_end_token}, {{so}}:\n{tool_schemas}\nIn JSON.",
)


@functools.cache
def chat_tokenizer(complete: bool = True) -> Tokenizer:
    """`complete`: with DSML, reminder and tasks as special tokens, as DeepSeek's."""
    tokenizer = train_tokenizer(TEXTS, 320)
    if complete:
        tokenizer.add_special_tokens(list(OPTIONAL_TOKENS))
    tokenizer.encode_special_tokens = True
    return tokenizer


def by_hand(tokenizer: Tokenizer, parts: Iterable[Any]) -> tuple[list[int], list[bool]]:
    """Ids and mask of parts: a special token's spelling, a text, or a list of these, which is what is trained."""
    ids: list[int] = []
    trained: list[bool] = []
    for part in parts:
        if isinstance(part, list):
            new = by_hand(tokenizer, part)[0]
        elif part in SPECIAL:
            new = [tokenizer.token_to_id(part)]
        else:
            new = tokenizer.encode(part, add_special_tokens=False).ids
        ids += new
        trained += [isinstance(part, list)] * len(new)
    return ids, trained


def tag(content: str, bracket: str = "<") -> list[str]:
    return [bracket, DSML, f"{content}>"]
