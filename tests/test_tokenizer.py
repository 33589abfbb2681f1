import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from openv4.data.config import DataError
from openv4.data.tokenizer import (
    BOS,
    EOS,
    SPECIAL_TOKENS,
    fim_ids,
    load_tokenizer,
    special_ids,
    token_byte_lengths,
    train_tokenizer,
    vocabulary_size,
)

TEXTS = ["In the beginning was the Word, and the Word was with God.\r\n" * 3, "12345 caf\u00e9 \u4f60\u597d"] * 4
ODD = [
    "",
    "\0 NUL \x01",
    "line\r\nline\n\n  \t indented",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 emoji",
    "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f",
    "e\u0301 combining, \ufeff BOM, \u00a0 nbsp, 1234567890",
    f"literal {BOS}<think> and {EOS}",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", ODD)
def test_round_trip_and_byte_counts_of_odd_text(tokenizer, text):
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert token_byte_lengths(tokenizer)[ids].sum() == len(text.encode())
    assert not set(ids) & set(range(len(SPECIAL_TOKENS))), "a special token in a user's text is plain text"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_any_text(text):
    tokenizer = trained_once()
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert token_byte_lengths(tokenizer)[ids].sum() == len(text.encode())


def trained_once(cache: list[Tokenizer] = []) -> Tokenizer:  # noqa: B006 - hypothesis takes no module fixture
    if not cache:
        cache.append(train_tokenizer(TEXTS, 400))
    return cache[0]


def test_special_tokens_come_first_and_training_is_deterministic(tokenizer):
    assert [tokenizer.id_to_token(index) for index in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)
    assert special_ids(tokenizer) == (0, 1)
    assert fim_ids(tokenizer) == (2, 3, 4)
    assert train_tokenizer(iter(TEXTS), 400).to_str() == tokenizer.to_str()
    assert len(SPECIAL_TOKENS) + 256 < vocabulary_size(tokenizer) <= 400
    assert not token_byte_lengths(tokenizer)[: len(SPECIAL_TOKENS)].any()
    with pytest.raises(DataError, match="at least 265"):
        train_tokenizer(TEXTS, 264)


def test_digits_are_split_by_three(tokenizer):
    assert len(encode(train_tokenizer(["1234567 " * 50], 300), "1234567")) == 3


def test_load_from_file_and_folder_without_truncation(tokenizer, tmp_path):
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer.no_truncation()
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert encode(loaded, TEXTS[0] + EOS) == encode(tokenizer, TEXTS[0] + EOS)
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"bad\.json is not a Hugging Face"):
        load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(DataError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "missing")


def word_level(*tokens: str) -> Tokenizer:
    return Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=tokens[0]))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (("<unk>", "<s>", "</s>"), (1, 2)),
        (("<|begin_of_text|>", "<|end_of_text|>"), (0, 1)),
        (("a", "<|endoftext|>"), (1, 1)),
        (("[CLS]", "[SEP]", "[PAD]"), (0, 1)),
    ],
)
def test_special_ids_by_common_names(tokens, expected):
    assert special_ids(word_level(*tokens)) == expected


def test_special_ids_by_given_names_or_a_clear_error():
    tokenizer = word_level("<unk>", "begin", "end")
    assert special_ids(tokenizer, "begin", "end") == (1, 2)
    with pytest.raises(DataError, match="bos_token="):
        special_ids(tokenizer)
    with pytest.raises(DataError, match="eos_token='nothing'"):
        special_ids(tokenizer, "begin", "nothing")


def test_byte_lengths_of_other_kinds_of_tokenizer():
    metaspace = word_level("<unk>", "\u2581the", "the", "a", "<0x0A>", "\u4f60")
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    metaspace.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    metaspace.add_special_tokens(["<s>"])
    metaspace.add_tokens([AddedToken("<extra>", normalized=False)])
    assert token_byte_lengths(metaspace).tolist() == [5, 4, 3, 1, 1, 3, 0, 7]

    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##re": 2, "x": 3}, unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.Lowercase()
    wordpiece.decoder = decoders.WordPiece()
    assert token_byte_lengths(wordpiece).tolist()[1:] == [4, 2, 2]


def test_byte_lengths_leave_holes_at_zero():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 5}, unk_token="a"))
    lengths = token_byte_lengths(tokenizer)
    assert lengths.dtype == np.int32
    assert len(lengths) == 6
    assert not lengths[1:5].any()
