"""Token shards on disk: the manifest, the writer, and a memory-mapped reader that checks what it reads.

A prepared folder holds `manifest.json`, `tokenizer.json`, `token_bytes.npy` and, in `train/` and `validation/`, pairs
of `tokens-00000.npy` (all documents of the shard end to end) and `offsets-00000.npy` (int64, documents + 1). Chat data
have `trained-00000.npy` too (uint8 per token: 1 if the loss counts it). A document is never split between two shards.
"""

import functools
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from .config import DataError

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
_CHUNK = 1 << 22
_OPEN_SHARDS = 256  # three file handles each; the usual limit of a process is 1024


@dataclass(frozen=True)
class FileEntry:
    """A file of a prepared folder: its name relative to the folder, its size in bytes, its SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class ShardEntry:
    """Counts of a shard and its files; text has no `trained_file`: the loss counts all of its tokens."""

    documents: int
    tokens: int
    token_file: FileEntry
    offset_file: FileEntry
    trained_file: FileEntry | None = None


@dataclass(frozen=True)
class SplitEntry:
    """Counts of a split.

    Attributes:
        bytes: UTF-8 size of its text.
        longest: tokens of its longest document; 0 in folders prepared before this was recorded.
        trained: tokens that the loss counts; None for text, where it counts all.
    """

    documents: int
    tokens: int
    bytes: int
    shards: tuple[ShardEntry, ...]
    longest: int = 0
    trained: int | None = None


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds. `vocab_size` is the tokenizer's highest id plus one.

    `skipped` counts what was left out: empty documents of text, conversations that were too long.
    """

    format_version: int
    vocab_size: int
    bos: int
    eos: int
    fim: tuple[int, int, int] | None
    dtype: str
    skipped: int
    config: dict[str, Any]
    tokenizer: FileEntry
    token_bytes: FileEntry
    splits: dict[str, SplitEntry]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the checksums of the shards and of the tokenizer: equal when the training data are equal."""
        sums = [self.tokenizer.sha256]
        for name in SPLITS:
            sums.append(name)
            for shard in self.splits[name].shards:
                sums += [shard.token_file.sha256, shard.offset_file.sha256]
                if shard.trained_file is not None:
                    sums.append(shard.trained_file.sha256)
        return hashlib.sha256("\n".join(sums).encode()).hexdigest()

    def to_json(self) -> str:
        """The manifest as JSON text, with its fingerprint and a checksum of all the rest."""
        content = asdict(self) | {"fingerprint": self.fingerprint}
        return json.dumps(content | {"checksum": _checksum(content)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is no JSON, its checksum is wrong, or it is of another format version.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
            raise ValueError("its checksum does not match its content")
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {content['format_version']}, this openv4 reads {FORMAT_VERSION}")
        del content["fingerprint"]
        fim = content.pop("fim")
        splits = {name: _split_entry(split) for name, split in content.pop("splits").items()}
        return cls(
            **{key: value for key, value in content.items() if key not in ("tokenizer", "token_bytes")},
            tokenizer=FileEntry(**content["tokenizer"]),
            token_bytes=FileEntry(**content["token_bytes"]),
            fim=None if fim is None else (fim[0], fim[1], fim[2]),
            splits=splits,
        )


def _split_entry(split: dict[str, Any]) -> SplitEntry:
    shards = tuple(
        ShardEntry(
            shard["documents"],
            shard["tokens"],
            FileEntry(**shard["token_file"]),
            FileEntry(**shard["offset_file"]),
            FileEntry(**shard["trained_file"]) if shard.get("trained_file") else None,
        )
        for shard in split["shards"]
    )
    counts = split["documents"], split["tokens"], split["bytes"]
    return SplitEntry(*counts, shards, split.get("longest", 0), split.get("trained"))


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_file(folder: Path, name: str, pieces: Iterable[bytes]) -> FileEntry:
    """Write `pieces` end to end to `folder / name`, flushed to the disk, and return the file's entry."""
    digest, size = hashlib.sha256(), 0
    with (folder / name).open("wb") as file:
        for piece in pieces:
            digest.update(piece)
            size += file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(name, size, digest.hexdigest())


def write_array(folder: Path, name: str, parts: list[npt.NDArray[Any]], dtype: npt.DTypeLike) -> FileEntry:
    """Write the 1-D `parts` end to end as one `.npy` file without joining them in memory."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": descr, "fortran_order": False, "shape": (sum(map(len, parts)),)}
    )
    content = (np.ascontiguousarray(part, dtype).tobytes() for part in parts)
    return write_file(folder, name, itertools.chain([header.getvalue()], content))


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class ShardWriter:
    """Writes the documents of one split; holds at most one shard in memory."""

    def __init__(self, folder: Path, split: str, dtype: npt.DTypeLike, shard_tokens: int) -> None:
        self.shards: list[ShardEntry] = []
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._parts: list[npt.NDArray[Any]] = []
        self._masks: list[npt.NDArray[Any]] = []
        self._tokens = self._longest = 0
        self._trained: int | None = None
        (folder / split).mkdir()

    def add(self, tokens: npt.NDArray[Any], trained: npt.NDArray[np.bool_] | None = None) -> None:
        """Append one document (1-D, integer); a shard that is full is written out.

        `trained` says which tokens the loss counts, of the same length; given for all documents of a split or for none.
        """
        if self._parts and self._tokens + len(tokens) > self._shard_tokens:
            self._flush()
        self._parts.append(tokens)
        self._tokens += len(tokens)
        self._longest = max(self._longest, len(tokens))
        if trained is not None:
            self._masks.append(trained)
            self._trained = (self._trained or 0) + int(trained.sum())

    def finish(self, text_bytes: int) -> SplitEntry:
        """Write the last shard and return the split's entry."""
        if self._parts:
            self._flush()
        sync_folder(self._folder / self._split)
        return SplitEntry(
            documents=sum(shard.documents for shard in self.shards),
            tokens=sum(shard.tokens for shard in self.shards),
            bytes=text_bytes,
            shards=tuple(self.shards),
            longest=self._longest,
            trained=self._trained,
        )

    def _flush(self) -> None:
        index = f"{len(self.shards):05d}.npy"
        offsets = np.cumsum([0, *map(len, self._parts)], dtype=np.int64)
        token_file = write_array(self._folder, f"{self._split}/tokens-{index}", self._parts, self._dtype)
        offset_file = write_array(self._folder, f"{self._split}/offsets-{index}", [offsets], np.int64)
        trained_file = None
        if self._masks:
            trained_file = write_array(self._folder, f"{self._split}/trained-{index}", self._masks, np.uint8)
        self.shards.append(ShardEntry(len(self._parts), self._tokens, token_file, offset_file, trained_file))
        self._parts, self._masks, self._tokens = [], [], 0


class TokenStore(Protocol):
    """Documents of tokens, by index. Read from several threads at once."""

    @property
    def documents(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    def length(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of each of `documents` `[N]`."""
        ...

    def read(self, document: int, start: int, length: int) -> npt.NDArray[Any]:
        """Tokens `start` to `start + length` of a document `[length]`, read-only."""
        ...

    def read_trained(self, document: int, start: int, length: int) -> npt.NDArray[Any] | None:
        """Which of these tokens the loss counts `[length]`, 0 or 1; None: all."""
        ...


class _Shard(NamedTuple):
    tokens: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]
    trained: npt.NDArray[np.uint8] | None


class ShardStore:
    """One split of a prepared folder, memory-mapped. A document is found in O(log shards)."""

    def __init__(self, folder: Path, split: SplitEntry) -> None:
        self.documents = split.documents
        self.tokens = split.tokens
        self._folder, self._shards = folder, split.shards
        self._first = np.cumsum([0, *(shard.documents for shard in split.shards)], dtype=np.int64)
        self._open = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._map)

    def length(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of each of `documents` `[N]` -> `[N]` int64."""
        shard_of = np.searchsorted(self._first, documents, side="right") - 1
        lengths = np.empty(len(documents), dtype=np.int64)
        for shard in np.unique(shard_of).tolist():
            here = shard_of == shard
            offsets = self._open(shard).offsets
            local = documents[here] - self._first[shard]
            lengths[here] = offsets[local + 1] - offsets[local]
        return lengths

    def read(self, document: int, start: int, length: int) -> npt.NDArray[Any]:
        """Tokens `start` to `start + length` of a document, a read-only view `[length]`.

        Raises:
            IndexError: the document or the range does not exist.
        """
        files, begin = self._locate(document, start, length)
        return files.tokens[begin : begin + length]

    def read_trained(self, document: int, start: int, length: int) -> npt.NDArray[np.uint8] | None:
        """Which of these tokens the loss counts, a read-only view `[length]` of 0 and 1; None for text: all.

        Raises:
            IndexError: the document or the range does not exist.
        """
        files, begin = self._locate(document, start, length)
        return None if files.trained is None else files.trained[begin : begin + length]

    def _locate(self, document: int, start: int, length: int) -> tuple["_Shard", int]:
        """The document's shard, and where in it the range begins."""
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.documents} in {self._folder}")
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        files = self._open(shard)
        local = document - int(self._first[shard])
        begin, end = int(files.offsets[local]) + start, int(files.offsets[local + 1])
        if start < 0 or length < 0 or begin + length > end:
            raise IndexError(f"tokens {start} to {start + length} of document {document} in {self._folder}")
        return files, begin

    def _map(self, shard: int) -> "_Shard":
        entry = self._shards[shard]
        trained = None if entry.trained_file is None else _map(self._folder / entry.trained_file.name)
        return _Shard(_map(self._folder / entry.token_file.name), _map(self._folder / entry.offset_file.name), trained)


class PreparedData:
    """A folder written by `openv4 prepare`.

    Args:
        folder: the prepared folder.
        verify: read every file once, compare its SHA-256, and check offsets and token ids; else check sizes only.

    Raises:
        DataError: the folder is not prepared data, or a file is missing, of the wrong size or damaged.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        for entry in (self.manifest.tokenizer, self.manifest.token_bytes):
            _check_file(folder, entry, verify)
        for split in self.manifest.splits.values():
            for shard in split.shards:
                _check_file(folder, shard.offset_file, verify)
                _check_file(folder, shard.token_file, verify)
                if shard.trained_file is not None:
                    _check_file(folder, shard.trained_file, verify)
                if verify:
                    _check_shard(folder, shard, self.manifest.vocab_size)
        self._stores = {name: ShardStore(folder, split) for name, split in self.manifest.splits.items()}

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def bos(self) -> int:
        return self.manifest.bos

    @property
    def eos(self) -> int:
        return self.manifest.eos

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / self.manifest.tokenizer.name

    @functools.cached_property
    def token_bytes(self) -> npt.NDArray[np.int32]:
        """UTF-8 bytes behind each token id `[V]` int32, for bits per byte."""
        return _map(self.folder / self.manifest.token_bytes.name)

    def split(self, name: str) -> ShardStore:
        """The documents of a split.

        Raises:
            DataError: there is no such split.
        """
        if name not in self._stores:
            raise DataError(f"{self.folder} has no split {name!r}: it has {' and '.join(self._stores)}")
        return self._stores[name]

    def texts(self, split: str) -> Iterator[str]:
        """The documents of a split as text again, in order: special tokens dropped, fill-in-the-middle undone."""
        tokenizer = Tokenizer.from_file(str(self.tokenizer_path))
        store = self.split(split)
        for document in range(store.documents):
            length = int(store.length(np.array([document]))[0])
            ids = store.read(document, 1, length - 2)
            if self.manifest.fim is not None and length > 2 and ids[0] == self.manifest.fim[0]:
                hole, end = (int(np.flatnonzero(ids == id_)[0]) for id_ in self.manifest.fim[1:])
                parts = [ids[1:hole], ids[end + 1 :], ids[hole + 1 : end]]
            else:
                parts = [ids]
            yield "".join(tokenizer.decode(part.tolist()) for part in parts)


def _map(path: Path) -> npt.NDArray[Any]:
    """An array on disk. It is plain numbers: `np.load` would also open archives and, told to, pickles.

    Raises:
        DataError: it is something else.
    """
    try:
        array: npt.NDArray[Any] = np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except ValueError as error:
        raise DataError(f"{path} is no array of numbers ({error}): prepare the data again") from error
    return array


def _read_manifest(folder: Path) -> Manifest:
    path = folder / "manifest.json"
    if not path.is_file():
        if not folder.exists():
            raise DataError(f"{folder} does not exist: make it with `openv4 prepare input=<text> output={folder}`")
        raise DataError(
            f"{folder} is not a prepared folder (no manifest.json): if it holds text, run "
            f"`openv4 prepare input={folder} output=<folder>` and use that folder"
        )
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged or foreign ({error}): prepare the data again") from error


def _check_file(folder: Path, entry: FileEntry, verify: bool) -> None:
    path = folder / entry.name
    if Path(entry.name).is_absolute() or ".." in Path(entry.name).parts:
        raise DataError(f"{folder}: {entry.name!r} of its manifest leaves the folder; refused: prepare the data again")
    if not path.is_file():
        raise DataError(f"{path} is missing: prepare the data again or restore the file")
    size = path.stat().st_size
    if size != entry.size:
        raise DataError(
            f"{path} has {size} bytes, the manifest says {entry.size}: prepare the data again or restore the file"
        )
    if verify:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry.sha256:
            raise DataError(
                f"{path} is damaged: SHA-256 {digest[:12]}, the manifest says {entry.sha256[:12]}: "
                "prepare the data again or restore the file"
            )


def _check_shard(folder: Path, shard: ShardEntry, vocab_size: int) -> None:
    offsets, tokens = _map(folder / shard.offset_file.name), _map(folder / shard.token_file.name)
    if (
        len(offsets) != shard.documents + 1
        or len(tokens) != shard.tokens
        or offsets[0] != 0
        or offsets[-1] != shard.tokens
        or np.any(offsets[1:] < offsets[:-1])
    ):
        raise DataError(f"{folder / shard.offset_file.name} does not match its tokens: prepare the data again")
    if shard.trained_file is not None:
        trained = _map(folder / shard.trained_file.name)
        if len(trained) != shard.tokens or np.any(trained > 1):
            raise DataError(f"{folder / shard.trained_file.name} does not match its tokens: prepare the data again")
    highest = max((int(tokens[at : at + _CHUNK].max()) for at in range(0, len(tokens), _CHUNK)), default=0)
    if highest >= vocab_size:
        raise DataError(
            f"{folder / shard.token_file.name} holds token id {highest}, the vocabulary has {vocab_size}: "
            "prepare the data again with this tokenizer"
        )
