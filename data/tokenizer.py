"""Byte-level BPE: train one, load any Hugging Face `tokenizer.json`, and count the bytes behind each token."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .config import DataError

# DeepSeek's spellings: fullwidth bars (U+FF5C) and a lower block for the space (U+2581).
BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
FIM_BEGIN, FIM_HOLE, FIM_END = (f"<\uff5cfim\u2581{part}\uff5c>" for part in ("begin", "hole", "end"))
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
THINK, THINK_END = "<think>", "</think>"
SPECIAL_TOKENS = (BOS, EOS, FIM_BEGIN, FIM_HOLE, FIM_END, USER, ASSISTANT, THINK, THINK_END)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# Numbers by up to three digits; words with the one character before them; punctuation with its newlines; white space,
# whose last blank stays with the next word.
_PATTERN = (
    r"\p{N}{1,3}"
    r"|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

_BOS_NAMES = (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "[BOS]", "[CLS]")
_EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<eos>", "[EOS]", "[SEP]")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` ids, `SPECIAL_TOKENS` first.

    All 256 bytes are in the alphabet and nothing is normalised, so every text survives encode and decode. The same
    texts give the same tokenizer. A small corpus may have too few pairs to fill `vocab_size`.

    Raises:
        DataError: `vocab_size` is too small for the bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens need at least "
            f"{MIN_VOCAB_SIZE}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.json`, or the one in the folder `path`, without its truncation and padding.

    Special tokens spelled out in a text are encoded as plain text, never as their ids. That holds for all added tokens
    in angle brackets or with DeepSeek's bars: its release declares `<think>` and the token of a user's turn as ordinary
    ones, which any text could spell.

    Raises:
        DataError: there is no such file, or it is no Hugging Face tokenizer.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"no tokenizer at {file}: give the path of a Hugging Face tokenizer.json or of its folder")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises plain Exception
        reason = str(error).splitlines()[0]
        raise DataError(f"{file} is not a Hugging Face tokenizer.json ({reason}): give one that is") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    added = (token.content for token in tokenizer.get_added_tokens_decoder().values())
    tokenizer.add_special_tokens([name for name in added if name.startswith("<") or "\uff5c" in name])
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows that an embedding needs: the highest id plus one (ids may have holes)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def special_ids(tokenizer: Tokenizer, bos_token: str | None = None, eos_token: str | None = None) -> tuple[int, int]:
    """Ids of the begin and the end of a document, by the names given or else by the common ones.

    A tokenizer that has only one of the two uses it for both.

    Raises:
        DataError: a given name is not in the vocabulary, or neither common name is.
    """
    for key, name in (("bos_token", bos_token), ("eos_token", eos_token)):
        if name is not None and tokenizer.token_to_id(name) is None:
            raise DataError(f"{key}={name!r} is not in the tokenizer's vocabulary: name one of its tokens")

    def find(names: tuple[str, ...]) -> int | None:
        return next((id_ for id_ in map(tokenizer.token_to_id, names) if id_ is not None), None)

    bos = find((bos_token,) if bos_token is not None else _BOS_NAMES)
    eos = find((eos_token,) if eos_token is not None else _EOS_NAMES)
    if eos is None:
        eos = bos
    if bos is None:
        bos = eos
    if bos is None or eos is None:
        raise DataError(
            "the tokenizer has no begin or end token of a common name: name its own with bos_token=... eos_token=..."
        )
    return bos, eos


def fim_ids(tokenizer: Tokenizer) -> tuple[int, int, int] | None:
    """Ids of the fill-in-the-middle tokens (begin, hole, end), or None where the tokenizer lacks one."""
    begin, hole, end = map(tokenizer.token_to_id, (FIM_BEGIN, FIM_HOLE, FIM_END))
    return None if begin is None or hole is None or end is None else (begin, hole, end)


def token_byte_lengths(tokenizer: Tokenizer) -> npt.NDArray[np.int32]:
    """UTF-8 bytes that each id stands for: `[V]` int32, 0 for special tokens and for ids without a token.

    Exact for a byte-level BPE. Elsewhere it is what the token adds to a decoded text when it follows a letter, which
    counts the blank of a Metaspace or WordPiece word, and one byte for a byte-fallback token such as `<0x0A>`.
    """
    lengths = np.zeros(vocabulary_size(tokenizer), dtype=np.int32)
    added = tokenizer.get_added_tokens_decoder()
    plain = {token: id_ for token, id_ in tokenizer.get_vocab(with_added_tokens=True).items() if id_ not in added}
    if _is_byte_level(json.loads(tokenizer.to_str())["decoder"]):
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        for token, id_ in plain.items():
            # The decoder falls back to the token's own spelling when one of its characters stands for no byte.
            lengths[id_] = len(token) if alphabet.issuperset(token) else len(token.encode())
    else:
        anchor = _letter(tokenizer, plain)
        before = len(tokenizer.decode(anchor).encode())
        for token, id_ in plain.items():
            if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
                lengths[id_] = 1
            else:
                lengths[id_] = max(0, len(tokenizer.decode([*anchor, id_]).encode()) - before)
    for id_, extra in added.items():
        lengths[id_] = 0 if extra.special else len(extra.content.encode())
    return lengths


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    return decoder["type"] == "ByteLevel" or any(map(_is_byte_level, decoder.get("decoders", [])))


def _letter(tokenizer: Tokenizer, plain: dict[str, int]) -> list[int]:
    """A token that decodes to one ASCII letter, as a text to append others to; nothing where there is none."""
    short = sorted((token for token in plain if len(token) <= 2), key=lambda token: (len(token), token))
    for token in short:
        text = tokenizer.decode([plain[token]])
        if len(text) == 1 and text.isascii() and text.isalpha():
            return [plain[token]]
    return []
