import gzip
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_cases import chat_tokenizer
from tokenizers import Tokenizer, models

from openv4.data.chat import encode
from openv4.data.config import DataError
from openv4.data.conversation import parse_record
from openv4.data.prepare import KING_JAMES, PrepareConfig, ensure_prepared, ensure_prepared_chat, prepare
from openv4.data.shards import PreparedData
from openv4.data.tokenizer import FIM_BEGIN, load_tokenizer, train_tokenizer

DOCUMENTS = [f"Document {index}: " + "the word \u4f60\u597d was with God\r\n" * (index % 5 + 1) for index in range(40)]


def write_jsonl(path: Path, documents: list[str] = DOCUMENTS, key: str = "text") -> Path:
    lines = "".join(json.dumps({"id": index, key: text}) + "\n" for index, text in enumerate(documents)).encode()
    if path.suffix == ".gz":
        lines = gzip.compress(lines[:100]) + gzip.compress(lines[100:])
    elif path.suffix == ".zst":
        lines = pa.Codec("zstd").compress(lines, asbytes=True)
    path.write_bytes(lines)
    return path


def config(source: Path, output: Path, **changes) -> PrepareConfig:
    return PrepareConfig(input=str(source), output=str(output), vocab_size=300, **changes)


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("text") / "a.jsonl")


def test_all_formats_give_the_same_folder(jsonl, tmp_path):
    sources = [jsonl, write_jsonl(tmp_path / "a.jsonl.gz"), write_jsonl(tmp_path / "a.jsonl.zst")]
    pq.write_table(pa.table({"id": range(40), "text": DOCUMENTS}), tmp_path / "a.parquet", row_group_size=7)
    large = pa.table({"text": pa.array(DOCUMENTS, pa.large_string())})
    pq.write_table(large, tmp_path / "large.parquet")
    (tmp_path / "a.txt").write_bytes("\n===\n".join(DOCUMENTS).encode())
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for index, text in enumerate(DOCUMENTS):
        (folder / "deep" / f"{index:03d}.txt").write_bytes(text.encode())
    (folder / "ignored.pdf").write_bytes(b"\xff")
    sources += [tmp_path / "a.parquet", tmp_path / "large.parquet", tmp_path / "a.txt", folder, folder / "**" / "*.txt"]
    outputs = []
    for index, source in enumerate(sources):
        separator = "\n===\n" if source.name == "a.txt" else None
        manifest = prepare(config(source, tmp_path / f"out{index}", separator=separator))
        outputs.append((manifest.fingerprint, contents(tmp_path / f"out{index}")))
    assert all(output == outputs[0] for output in outputs)


def test_long_text_is_split_across_reads(tmp_path, monkeypatch):
    monkeypatch.setattr("openv4.data.reading._READ_BYTES", 7)
    (tmp_path / "a.txt").write_bytes("<sep>".join(DOCUMENTS).encode())
    write_jsonl(tmp_path / "a.jsonl")
    first = prepare(config(tmp_path / "a.txt", tmp_path / "one", separator="<sep>"))
    assert first.fingerprint == prepare(config(tmp_path / "a.jsonl", tmp_path / "two")).fingerprint


def test_documents_come_back_and_counts_are_right(jsonl, tmp_path):
    seen = []
    manifest = prepare(config(jsonl, tmp_path / "out", shard_tokens=100), lambda *done: seen.append(done))
    data = PreparedData(tmp_path / "out")
    texts = {name: list(data.texts(name)) for name in ("train", "validation")}
    assert sorted(texts["train"] + texts["validation"]) == sorted(DOCUMENTS)
    assert texts["train"] == [text for text in DOCUMENTS if text in texts["train"]], "the order is kept"
    for name, split in manifest.splits.items():
        store = data.split(name)
        assert split.bytes == sum(len(text.encode()) for text in texts[name])
        assert store.documents == split.documents == len(texts[name])
        lengths = store.length(np.arange(store.documents))
        assert lengths.sum() == store.tokens == split.tokens
        for index, length in enumerate(lengths.tolist()):
            ids = store.read(index, 0, length)
            assert ids.dtype == np.uint16
            assert (ids[0], ids[-1]) == (data.bos, data.eos)
            assert data.token_bytes[ids].sum() == len(texts[name][index].encode())
    assert len(manifest.splits["train"].shards) > 3
    assert seen[-1] == (sum(split.bytes for split in manifest.splits.values()),) * 2
    assert data.manifest == manifest


def test_result_does_not_depend_on_workers_or_batches(jsonl, tmp_path, monkeypatch):
    prepare(config(jsonl, tmp_path / "threads", fim_rate=0.5))
    monkeypatch.setattr("openv4.data.prepare._BATCH_DOCUMENTS", 3)
    prepare(config(jsonl, tmp_path / "processes", fim_rate=0.5, workers=2))
    assert contents(tmp_path / "threads") == contents(tmp_path / "processes")
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("threads", "processes")]
    assert manifests[0] == manifests[1]


def test_split_depends_on_seed_and_content_only(tmp_path):
    doubled = write_jsonl(tmp_path / "double.jsonl", DOCUMENTS[::-1] + DOCUMENTS)
    single = write_jsonl(tmp_path / "single.jsonl")
    held = {}
    for source in (single, doubled):
        prepare(config(source, tmp_path / source.stem, validation_fraction=0.3))
        held[source.stem] = list(PreparedData(tmp_path / source.stem).texts("validation"))
    assert set(held["single"]) == set(held["double"])
    assert len(held["double"]) == 2 * len(held["single"])
    assert 4 <= len(held["single"]) <= 20
    prepare(config(single, tmp_path / "seed", validation_fraction=0.3, seed=1))
    assert set(PreparedData(tmp_path / "seed").texts("validation")) != set(held["single"])


@pytest.mark.parametrize(
    ("documents", "fraction", "held_out"),
    [(["a", "b"], 1e-9, 1), (["a", "b"], 0.999999, 1), (["a"], 0.5, 0), (["a", "a"], 0.999, 0), (["a", "b"], 0.0, 0)],
)
def test_both_splits_get_a_document_where_that_is_possible(tmp_path, documents, fraction, held_out):
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    manifest = prepare(config(source, tmp_path / "out", validation_fraction=fraction))
    assert manifest.splits["validation"].documents == held_out
    assert manifest.splits["train"].documents == len(documents) - held_out
    assert PreparedData(tmp_path / "out").split("validation").documents == held_out


def test_tokenizer_is_trained_on_training_documents_only(jsonl, tmp_path):
    prepare(config(jsonl, tmp_path / "out", validation_fraction=0.3))
    data = PreparedData(tmp_path / "out")
    expected = train_tokenizer(data.texts("train"), 300)
    assert load_tokenizer(data.tokenizer_path).to_str() == expected.to_str()


def test_fill_in_the_middle_rearranges_training_documents_only(jsonl, tmp_path):
    manifest = prepare(config(jsonl, tmp_path / "out", fim_rate=1.0, validation_fraction=0.2))
    data = PreparedData(tmp_path / "out")
    begin, hole, end = manifest.fim
    for name, expected in (("train", 1), ("validation", 0)):
        store = data.split(name)
        for index, length in enumerate(store.length(np.arange(store.documents)).tolist()):
            ids = store.read(index, 0, length).tolist()
            assert [ids.count(token) for token in (begin, hole, end)] == [expected] * 3
            if expected:
                assert ids[:2] == [data.bos, begin]
                assert ids.index(hole) < ids.index(end)
            assert data.token_bytes[ids].sum() == len(list(data.texts(name))[index].encode())
    assert sorted([*data.texts("train"), *data.texts("validation")]) == sorted(DOCUMENTS)
    some = prepare(config(jsonl, tmp_path / "some", fim_rate=0.5, validation_fraction=0.0))
    extra = (
        some.splits["train"].tokens
        - prepare(config(jsonl, tmp_path / "none", validation_fraction=0.0)).splits["train"].tokens
    )
    assert extra >= 3 * 8, "about half of the documents have three more tokens"


def test_given_tokenizer_is_used_and_copied(jsonl, tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    tokenizer = train_tokenizer(DOCUMENTS, 280)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(source / "tokenizer.json"))
    prepare(config(jsonl, tmp_path / "out", tokenizer=str(source)))
    data = PreparedData(tmp_path / "out")
    assert data.vocab_size == 280
    assert data.tokenizer_path.read_bytes() == (source / "tokenizer.json").read_bytes()
    assert sorted([*data.texts("train"), *data.texts("validation")]) == sorted(DOCUMENTS), "nothing is truncated"


def test_wide_vocabulary_takes_four_bytes(tmp_path):
    vocabulary = {"<s>": 0, "</s>": 1, "a": 70_000}
    Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(tmp_path / "wide.json"))
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    manifest = prepare(config(source, tmp_path / "out", tokenizer=str(tmp_path / "wide.json")))
    assert (manifest.dtype, manifest.vocab_size) == ("uint32", 70_001)
    assert PreparedData(tmp_path / "out").split("train").read(0, 0, 3).tolist() == [0, 70_000, 1]


def test_empty_documents_are_skipped_and_counted(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["", "a", " \n", "b"])
    source.write_bytes(source.read_bytes() + b"\n\n")
    manifest = prepare(config(source, tmp_path / "out"))
    assert manifest.skipped == 2
    assert sum(split.documents for split in manifest.splits.values()) == 2


BAD_FILES = [
    ("a.txt", b"good \xff bad", r"a\.txt: byte 5 \(0xff\) is not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"a\.jsonl: byte 24 \(0xe9\) is not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2 is not valid JSON"),
    ("a.jsonl", b"[1]\n", r"a\.jsonl:1 is not a JSON object but list"),
    ("a.jsonl", b'{"body": "a", "id": 1}\n', r"a\.jsonl:1 has no key 'text', only \['body', 'id'\]: set text_key"),
    ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: 'text' is not a string but int"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: 'text' holds half a surrogate pair"),
    ("a.jsonl", b'{"text": " "}\n', r"holds no text \(1 empty documents in 1 files\)"),
    ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz cannot be read"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 9, mtime=0)[:-9], r"a\.jsonl\.gz cannot be read"),
    ("a.parquet", b"not parquet", r"a\.parquet cannot be read"),
    ("a.pdf", b"x", r"openv4 reads \.txt, \.jsonl"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        prepare(config(tmp_path / name, tmp_path / "new" / "out"))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_bad_parquet_columns(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'words', only \['body', 'text'\]"):
        prepare(config(tmp_path / "a.parquet", tmp_path / "out", text_key="words"))
    with pytest.raises(DataError, match="column 'text' is not text but int64"):
        prepare(config(tmp_path / "a.parquet", tmp_path / "out"))
    assert prepare(config(tmp_path / "a.parquet", tmp_path / "out", text_key="body")).splits["train"].documents == 1


def test_missing_input_and_unknown_folder(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        prepare(config(tmp_path / "missing", tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file of a known type"):
        prepare(config(tmp_path / "empty", tmp_path / "out"))


def test_output_in_the_way_is_left_alone(jsonl, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    prepare(config(jsonl, output))  # an empty folder is no obstacle
    before = contents(output)
    with pytest.raises(DataError, match="is a prepared folder already: remove it or choose another"):
        prepare(config(jsonl, output))
    assert contents(output) == before
    with pytest.raises(DataError, match="exists and is not empty"):
        prepare(config(jsonl, jsonl))


def test_failure_while_writing_leaves_nothing(jsonl, tmp_path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config(jsonl, tmp_path / "out"), interrupt)
    assert not list(tmp_path.iterdir())


def test_tokenizer_that_does_not_serve(jsonl, tmp_path):
    bare = tmp_path / "bare.json"
    Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="a")).save(str(bare))
    with pytest.raises(DataError, match=r"fim_rate=0\.1 needs the tokens"):
        prepare(config(jsonl, tmp_path / "out", tokenizer=str(bare), fim_rate=0.1))
    with pytest.raises(DataError, match="eos_token='<end>'"):
        prepare(config(jsonl, tmp_path / "out", tokenizer=str(bare), eos_token="<end>"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input", ""),
        ("output", ""),
        ("vocab_size", 264),
        ("separator", ""),
        ("validation_fraction", 1.0),
        ("fim_rate", -0.1),
        ("shard_tokens", 0),
        ("workers", 0),
    ],
)
def test_config_names_the_key_that_is_out_of_range(key, value):
    with pytest.raises(DataError, match=f"^{key}="):
        replace(PrepareConfig(input="a", output="b"), **{key: value})


def test_special_token_spelled_in_a_document_stays_text(tmp_path):
    text = f"a {FIM_BEGIN} <think> b"
    source = write_jsonl(tmp_path / "a.jsonl", [text])
    prepare(config(source, tmp_path / "out", fim_rate=1.0))
    assert list(PreparedData(tmp_path / "out").texts("train")) == [text]


def test_shipped_corpus_is_prepared_once(tmp_path):
    output = ensure_prepared(KING_JAMES, tmp_path / "kj", vocab_size=300)
    data = PreparedData(output)
    assert sum(split.documents for split in data.manifest.splits.values()) == 1189
    assert sum(split.bytes for split in data.manifest.splits.values()) == 4_137_849
    assert ensure_prepared(tmp_path / "missing", output, vocab_size=300) == output
    with pytest.raises(DataError, match="vocab_size=300, not 400"):
        ensure_prepared(KING_JAMES, output, vocab_size=400)
    with pytest.raises(DataError, match="join_bytes=0, not 9000"):
        ensure_prepared(KING_JAMES, output, vocab_size=300, join_bytes=9000)
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "file").touch()
    with pytest.raises(DataError, match="exists and is not empty"):
        ensure_prepared(KING_JAMES, tmp_path / "busy", vocab_size=300)


def test_consecutive_documents_join_into_long_ones(tmp_path):
    texts = ["one", " ", "two \u00e9", "three", "four", "5"]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = prepare(config(source, tmp_path / "out", join_bytes=9, validation_fraction=0.0))
    assert list(PreparedData(tmp_path / "out").texts("train")) == ["one\n\ntwo \u00e9", "three\n\nfour", "5"]
    assert manifest.skipped == 1
    with pytest.raises(DataError, match="join_bytes=-1"):
        config(source, tmp_path / "other", join_bytes=-1)


# Chat.

RECORDS = [
    {
        "messages": [
            {"role": "user", "content": f"Number {index}?"},
            {"role": "assistant", "content": "One. " * (index % 7 + 1)},
        ]
    }
    for index in range(40)
]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    chat_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_chat(path: Path, records=RECORDS) -> Path:
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".gz":
        lines = gzip.compress(lines)
    elif path.suffix == ".zst":
        lines = pa.Codec("zstd").compress(lines, asbytes=True)
    path.write_bytes(lines)
    return path


def chat_config(source: Path, output: Path, tokenizer: Path, **changes) -> PrepareConfig:
    return PrepareConfig(str(source), str(output), tokenizer=str(tokenizer), kind="chat", **changes)


def stored(folder: Path, split: str) -> list[tuple[list[int], list[bool]]]:
    store = PreparedData(folder).split(split)
    lengths = store.length(np.arange(store.documents)).tolist()
    return [
        (store.read(i, 0, n).tolist(), store.read_trained(i, 0, n).astype(bool).tolist()) for i, n in enumerate(lengths)
    ]


def test_conversations_become_shards_with_masks(tokenizer_folder, tmp_path):
    source = write_chat(tmp_path / "a.jsonl")
    seen = []
    config_ = chat_config(source, tmp_path / "out", tokenizer_folder, shard_tokens=100, validation_fraction=0.2)
    manifest = prepare(config_, lambda *done: seen.append(done))
    encoded = [tuple(encode(parse_record(record, ""), chat_tokenizer())) for record in RECORDS]
    train, validation = (stored(tmp_path / "out", split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(encoded)
    assert train == [one for one in encoded if one in train], "the order is kept"
    assert 2 <= len(validation) <= 20 and len(manifest.splits["train"].shards) > 3
    sizes = PreparedData(tmp_path / "out").token_bytes
    for name, documents in (("train", train), ("validation", validation)):
        split = manifest.splits[name]
        assert split.longest == max(len(ids) for ids, _ in documents)
        assert split.trained == sum(sum(mask) for _, mask in documents)
        assert split.bytes == sum(int(sizes[ids].sum()) for ids, _ in documents)
    assert (manifest.skipped, manifest.fim) == (0, None)
    assert seen[-1][0] == seen[-1][1] == sum(len(json.dumps(record)) for record in RECORDS)
    (tmp_path / "b.jsonl").write_bytes(source.read_bytes().rstrip().replace(b"\n", b"\r\n\r\n"))
    assert prepare(replace(config_, input=str(tmp_path / "b.jsonl"), output=str(tmp_path / "crlf"))).fingerprint == (
        manifest.fingerprint
    )
    for name in ("b.jsonl.gz", "b.jsonl.zst"):
        again = replace(config_, input=str(write_chat(tmp_path / name)), output=str(tmp_path / f"out_{name}"))
        assert prepare(again).fingerprint == manifest.fingerprint


def test_effort_changes_tokens_but_not_the_split(tokenizer_folder, tmp_path):
    source = write_chat(tmp_path / "a.jsonl")
    counts = {}
    for effort in (None, "high"):
        prepare(chat_config(source, tmp_path / f"{effort}", tokenizer_folder, effort=effort, validation_fraction=0.3))
        counts[effort] = [len(stored(tmp_path / f"{effort}", split)) for split in ("train", "validation")]
        first = chat_tokenizer().decode(stored(tmp_path / f"{effort}", "train")[0][0], skip_special_tokens=False)
        assert ("<think>" in first) == (effort == "high")
    assert counts[None] == counts["high"]


def test_a_conversation_too_long_is_an_error_or_dropped_and_counted(tokenizer_folder, tmp_path):
    source = write_chat(tmp_path / "a.jsonl")
    lengths = [len(encode(parse_record(record, ""), chat_tokenizer()).ids) for record in RECORDS]
    limit = sorted(lengths)[25]
    number = next(n for n, length in enumerate(lengths, 1) if length > limit)
    with pytest.raises(DataError, match=rf"a\.jsonl:{number}: .* has {lengths[number - 1]} tokens, max_tokens={limit}"):
        prepare(chat_config(source, tmp_path / "out", tokenizer_folder, max_tokens=limit))
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1
    manifest = prepare(chat_config(source, tmp_path / "out", tokenizer_folder, max_tokens=limit, too_long="drop"))
    assert manifest.skipped == sum(length > limit for length in lengths) > 0
    assert max(split.longest for split in manifest.splits.values()) == limit
    assert sum(split.documents for split in manifest.splits.values()) == 40 - manifest.skipped
    with pytest.raises(DataError, match="none is left to train on: raise max_tokens"):
        prepare(chat_config(source, tmp_path / "none", tokenizer_folder, max_tokens=1, too_long="drop"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"messages": []}\n', r"a\.jsonl:1: 'messages' is empty"),
        ("a.jsonl", b"\n[1]\n", r"a\.jsonl:2 is not a JSON object but list: write \{\"messages\""),
        ("a.jsonl", b'{"messages": \n', r"a\.jsonl:1 is not valid JSON"),
        ("a.jsonl", b"\n \n", "holds no conversation in 1 files"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl: byte 10 \(0xff\) is not UTF-8"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz cannot be read"),
        ("a.txt", b"text", r"a\.txt: openv4 reads \.jsonl, \.jsonl\.gz, \.jsonl\.zst; convert"),
    ],
)
def test_bad_chat_is_refused_in_one_line_and_leaves_nothing(tokenizer_folder, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        prepare(chat_config(tmp_path / name, tmp_path / "out", tokenizer_folder))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_last_line_is_checked_before_the_first_is_encoded(tokenizer_folder, tmp_path, monkeypatch):
    source = write_chat(tmp_path / "a.jsonl", [*RECORDS, {"messages": [{"role": "bot"}]}])
    monkeypatch.setattr("openv4.data.prepare.encode_batch", None)
    with pytest.raises(DataError, match=r"a\.jsonl:41: message 1: unknown role 'bot'"):
        prepare(chat_config(source, tmp_path / "out", tokenizer_folder))


def test_settings_of_the_other_kind_are_refused():
    chat = {"input": "a", "output": "b", "kind": "chat", "tokenizer": "t"}
    PrepareConfig(**chat)
    with pytest.raises(DataError, match=r"^tokenizer=None: kind=chat needs the tokenizer"):
        PrepareConfig(**{**chat, "tokenizer": None})
    for key, value in (("fim_rate", 0.1), ("join_bytes", 9), ("separator", "x"), ("eos_token", "x"), ("workers", 2)):
        with pytest.raises(DataError, match=f"^{key}={value!r}: means nothing for kind=chat"):
            PrepareConfig(**chat, **{key: value})
    for key, value in (("effort", "high"), ("chat_templates", "x"), ("max_tokens", 9), ("too_long", "drop")):
        with pytest.raises(DataError, match=f"^{key}={value!r}: means nothing for kind=text"):
            PrepareConfig("a", "b", **{key: value})
    with pytest.raises(DataError, match=r"^max_tokens=0"):
        PrepareConfig(**chat, max_tokens=0)


def test_chat_is_prepared_once_and_only_from_the_same(tokenizer_folder, tmp_path):
    source, output = write_chat(tmp_path / "a.jsonl"), tmp_path / "out"

    def ensure(**changes):
        return ensure_prepared_chat(source, output, changes.pop("tokenizer", tokenizer_folder), **changes)

    assert ensure() == output
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert ensure(tokenizer=tokenizer_folder / "tokenizer.json") == output, "the same file by another name"
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    for changes, message in (
        ({"effort": "high"}, "was prepared with effort=None, not high: remove it or name another"),
        ({"max_tokens": 99}, "max_tokens=None, not 99"),
    ):
        with pytest.raises(DataError, match=message):
            ensure(**changes)
    templates = tmp_path / "a.json"
    templates.write_text('{"max_effort": "x"}')
    with pytest.raises(DataError, match=r"was prepared with chat_templates_sha256=\w{12}\.\.\., not \w{12}\.\.\.: "):
        ensure(chat_templates=str(templates))
    other = tmp_path / "tokenizer.json"
    train_tokenizer(DOCUMENTS, 280).save(str(other))
    with pytest.raises(DataError, match="tokenizer_sha256"):
        ensure(tokenizer=other)
    write_chat(source, RECORDS[1:])
    with pytest.raises(DataError, match="input_sha256"):
        ensure()
    prepare(config(write_jsonl(tmp_path / "text.jsonl"), tmp_path / "text"))
    with pytest.raises(DataError, match="was prepared with kind=text, not chat"):
        ensure_prepared_chat(source, tmp_path / "text", tokenizer_folder)
