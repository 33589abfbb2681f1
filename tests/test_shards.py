import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from openv4.data.config import DataError
from openv4.data.prepare import PrepareConfig, prepare
from openv4.data.shards import Manifest, PreparedData, ShardStore, ShardWriter, write_array


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


# Masks of chat data.


def masked_split(folder: Path, count: int = 90, seed: int = 0):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, 300, rng.integers(1, 60)) for _ in range(count)]
    masks = [rng.integers(0, 2, len(document)).astype(bool) for document in documents]
    writer = ShardWriter(folder, "train", np.uint16, 300)
    for document, mask in zip(documents, masks, strict=True):
        writer.add(document, mask)
    return writer.finish(0), documents, masks


def test_masks_are_read_beside_the_tokens_across_shards(tmp_path):
    split, documents, masks = masked_split(tmp_path)
    assert len(split.shards) > 5
    assert split.longest == max(map(len, documents))
    assert split.trained == sum(map(np.sum, masks))
    store = ShardStore(tmp_path, split)
    for index in np.random.default_rng(1).permutation(len(documents)).tolist():
        length = len(documents[index])
        for start in (0, length // 2, length):
            mask = store.read_trained(index, start, length - start)
            assert mask is not None and mask.dtype == np.uint8
            assert mask.tolist() == masks[index][start:].tolist()
            assert (store.read(index, start, length - start) == documents[index][start:]).all()
        with pytest.raises(IndexError):
            store.read_trained(index, 1, length)
    with pytest.raises(IndexError):
        store.read_trained(len(documents), 0, 0)


def test_text_has_no_mask_and_old_manifests_are_read(prepared):
    data = PreparedData(prepared)
    assert data.split("train").read_trained(0, 0, 1) is None
    train = data.manifest.splits["train"]
    lengths = data.split("train").length(np.arange(train.documents))
    assert (train.trained, train.longest) == (None, lengths.max())
    content = json.loads(data.manifest.to_json())
    for split in content["splits"].values():
        del split["longest"], split["trained"]
        for shard in split["shards"]:
            del shard["trained_file"]
    del content["checksum"]
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    old = Manifest.from_json(json.dumps(content | {"checksum": checksum}))
    assert old.splits["train"].longest == 0 and old.splits["train"].trained is None
    assert old.fingerprint == data.fingerprint == content["fingerprint"]


def test_the_fingerprint_of_text_is_as_it_ever_was(prepared):
    """By its definition before there were masks: runs that were started then can go on."""
    manifest = PreparedData(prepared).manifest
    sums = [manifest.tokenizer.sha256]
    for name in ("train", "validation"):
        sums += [name]
        for shard in manifest.splits[name].shards:
            sums += [shard.token_file.sha256, shard.offset_file.sha256]
    assert manifest.fingerprint == hashlib.sha256("\n".join(sums).encode()).hexdigest()


@pytest.fixture
def masked(copied) -> Path:
    """A prepared folder whose training split has masks."""
    shutil.rmtree(copied / "train")
    split, _, _ = masked_split(copied)
    manifest = Manifest.from_json((copied / "manifest.json").read_text())
    rewrite(copied, splits=manifest.splits | {"train": split}, vocab_size=300)
    return copied


def test_masks_are_verified_and_decide_the_fingerprint(masked, tmp_path):
    manifest = PreparedData(masked).manifest
    path = masked / "train" / "trained-00001.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=r"trained-00001\.npy is damaged"):
        PreparedData(masked)
    PreparedData(masked, verify=False)
    path.write_bytes(content + b"x")
    with pytest.raises(DataError, match=r"trained-00001\.npy has \d+ bytes"):
        PreparedData(masked, verify=False)
    path.unlink()
    with pytest.raises(DataError, match=r"trained-00001\.npy is missing"):
        PreparedData(masked, verify=False)
    train = manifest.splits["train"]
    other = replace(train.shards[0].trained_file, sha256="0" * 64)
    shards = (replace(train.shards[0], trained_file=other), *train.shards[1:])
    assert replace(manifest, splits=manifest.splits | {"train": replace(train, shards=shards)}).fingerprint != (
        manifest.fingerprint
    )


@pytest.mark.parametrize("fault", ["short", "two"])
def test_a_mask_that_does_not_match_is_refused(masked, fault):
    """As written, with the right checksum: the fault lies in what was recorded."""
    manifest = PreparedData(masked).manifest
    train = manifest.splits["train"]
    tokens = train.shards[0].tokens
    mask = np.zeros(tokens - 1, np.uint8) if fault == "short" else np.full(tokens, 2, np.uint8)
    entry = write_array(masked, train.shards[0].trained_file.name, [mask], np.uint8)
    shards = (replace(train.shards[0], trained_file=entry), *train.shards[1:])
    rewrite(masked, splits=manifest.splits | {"train": replace(train, shards=shards)})
    with pytest.raises(DataError, match=r"trained-00000\.npy does not match its tokens"):
        PreparedData(masked)
