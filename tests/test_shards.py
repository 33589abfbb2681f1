import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from openv4.data.prepare import PrepareConfig, prepare
from openv4.data.shards import DataError, Manifest, PreparedData, ShardStore, ShardWriter


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    lines = [json.dumps({"text": f"document {index} " * (index % 7 + 1)}) for index in range(60)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    prepare(PrepareConfig(str(folder / "a.jsonl"), str(folder / "out"), vocab_size=300, shard_tokens=200))
    return folder / "out"


@pytest.fixture
def copied(prepared, tmp_path) -> Path:
    return shutil.copytree(prepared, tmp_path / "copy")


def every_file(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_flipped_bit_is_found_in_every_file(copied):
    assert len(every_file(copied)) > 8
    for path in every_file(copied):
        content = path.read_bytes()
        for at in (0, len(content) // 2, len(content) - 2):
            flipped = bytearray(content)
            flipped[at] ^= 1
            path.write_bytes(flipped)
            with pytest.raises(DataError, match=path.name) as error:
                PreparedData(copied)
            assert "\n" not in str(error.value)
        path.write_bytes(content)
    PreparedData(copied)


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_grown_and_missing_files_are_found(copied, verify):
    for path in every_file(copied):
        content = path.read_bytes()
        for changed in (content[:-1], content + b"x", b""):
            path.write_bytes(changed)
            with pytest.raises(DataError, match=path.name):
                PreparedData(copied, verify=verify)
        path.unlink()
        with pytest.raises(DataError, match=path.name):
            PreparedData(copied, verify=verify)
        path.write_bytes(content)


def test_message_of_a_damaged_file_has_both_checksums(copied):
    path = copied / "train" / "tokens-00001.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    expected = json.loads((copied / "manifest.json").read_text())["splits"]["train"]["shards"][1]["token_file"][
        "sha256"
    ]
    with pytest.raises(
        DataError, match=rf"SHA-256 \w{{12}}, the manifest says {expected[:12]}: prepare the data again"
    ):
        PreparedData(copied)


def rewrite(folder: Path, **changes) -> None:
    manifest = Manifest.from_json((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(replace(manifest, **changes).to_json())


def test_token_id_beyond_the_vocabulary_is_refused(copied):
    data = PreparedData(copied)
    highest = max(
        int(data.split("train").read(index, 0, int(data.split("train").length(np.array([index]))[0])).max())
        for index in range(data.split("train").documents)
    )
    rewrite(copied, vocab_size=highest)
    with pytest.raises(DataError, match=rf"holds token id {highest}, the vocabulary has {highest}"):
        PreparedData(copied)


def test_offsets_that_do_not_match_are_refused(copied, tmp_path):
    manifest = PreparedData(copied).manifest
    train = manifest.splits["train"]
    first = replace(train.shards[0], tokens=train.shards[0].tokens + 1)
    rewrite(copied, splits=manifest.splits | {"train": replace(train, shards=(first, *train.shards[1:]))})
    with pytest.raises(DataError, match=r"offsets-00000\.npy does not match its tokens"):
        PreparedData(copied)


def test_other_format_version_and_raw_text_are_refused(copied, tmp_path):
    rewrite(copied, format_version=99)
    with pytest.raises(DataError, match="format version 99"):
        PreparedData(copied)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"run `openv4 prepare input=.*raw output=<folder>`"):
        PreparedData(tmp_path / "raw")
    with pytest.raises(DataError, match="openv4 prepare input="):
        PreparedData(tmp_path / "raw" / "a.txt")
    with pytest.raises(DataError, match="does not exist"):
        PreparedData(tmp_path / "missing")


def test_unknown_split(prepared):
    with pytest.raises(DataError, match="no split 'test': it has train and validation"):
        PreparedData(prepared).split("test")


def test_fingerprint_follows_the_data(prepared, copied):
    assert PreparedData(prepared).fingerprint == PreparedData(copied).fingerprint
    manifest = PreparedData(copied).manifest
    swapped = manifest.splits | {"validation": manifest.splits["train"]}
    assert replace(manifest, splits=swapped).fingerprint != manifest.fingerprint
    assert replace(manifest, skipped=7).fingerprint == manifest.fingerprint


@pytest.mark.parametrize("open_shards", [256, 1])
def test_store_reads_across_shards(tmp_path, monkeypatch, open_shards):
    monkeypatch.setattr("openv4.data.shards._OPEN_SHARDS", open_shards)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 1000, rng.integers(0, 60)) for _ in range(200)]
    documents[50] = rng.integers(0, 1000, 5000)
    writer = ShardWriter(tmp_path, "train", np.uint16, 300)
    for document in documents:
        writer.add(document)
    split = writer.finish(0)
    assert max(shard.tokens for shard in split.shards if shard.documents > 1) <= 300
    store = ShardStore(tmp_path, split)
    assert store.documents == 200
    assert store.tokens == sum(map(len, documents))
    picked = rng.permutation(200)
    assert store.length(picked).tolist() == [len(documents[index]) for index in picked]
    for index in picked.tolist():
        start = int(rng.integers(0, len(documents[index]) + 1))
        length = len(documents[index]) - start
        assert (store.read(index, start, length) == documents[index][start:]).all()
        with pytest.raises(IndexError):
            store.read(index, start, length + 1)
    assert store.length(np.zeros(0, dtype=np.int64)).tolist() == []
    for document in (-1, 200):
        with pytest.raises(IndexError):
            store.read(document, 0, 0)
    with pytest.raises(ValueError, match="read-only"):
        store.read(50, 0, 1)[0] = 1
