"""Text or chat files to token shards: `openv4 prepare input=<text> output=<folder>`.

Text takes three passes over the input, each streaming: measure (which split each document falls into), train the
tokenizer on the training documents unless one is given, encode. The same text, in the same order, gives byte-identical
shards, whatever its file format and the number of workers. Chat (`kind=chat`) takes two, measure and encode, and stores
beside the tokens which of them the loss counts.
"""

import contextlib
import functools
import hashlib
import itertools
import multiprocessing
import os
import random
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from .chat import encode_batch, find_templates, special_token_ids
from .config import DataError, Effort
from .conversation import Conversation, parse_record
from .reading import CHAT_SUFFIXES, input_files, json_object, lines, texts
from .shards import FORMAT_VERSION, SPLITS, Manifest, PreparedData, ShardWriter, sync_folder, write_array, write_file
from .tokenizer import (
    BOS,
    EOS,
    MIN_VOCAB_SIZE,
    fim_ids,
    load_tokenizer,
    special_ids,
    token_byte_lengths,
    train_tokenizer,
    vocabulary_size,
)

KING_JAMES = Path(__file__).parent / "corpus" / "king_james.jsonl.gz"
CONVERSATIONS = Path(__file__).parent / "corpus" / "conversations.jsonl.gz"
Progress = Callable[[int, int], None]  # bytes of text encoded so far, and in all

_BATCH_CHARACTERS = 1 << 21
_BATCH_DOCUMENTS = 1024
_PROGRESS_BYTES = 1 << 20


_TEXT_ONLY = ("separator", "join_bytes", "fim_rate", "bos_token", "eos_token", "workers")
_CHAT_ONLY = ("effort", "chat_templates", "max_tokens", "too_long")


@dataclass(frozen=True)
class PrepareConfig:
    """How text becomes shards.

    Args:
        input: a file, a folder (searched recursively) or a glob pattern; `reading.SUFFIXES` are read.
        output: the folder to write; it must not exist, or be empty.
        tokenizer: a Hugging Face tokenizer.json or its folder; None trains a byte-level BPE on the training documents.
        vocab_size: size of the BPE to train.
        text_key: key of a JSON line, or column of a Parquet file, that holds the text.
        separator: splits `.txt` files into documents; None takes a file as one document.
        join_bytes: join consecutive documents, a blank line between them, until they hold so many bytes; 0 takes them
            as they are. Long documents from a text that is cut into chapters.
        validation_fraction: share of the documents that is held out.
        seed: of the split and of fill-in-the-middle.
        fim_rate: share of the training documents rearranged as prefix, suffix, middle (DeepSeek-V3 and V4: 0.1).
        shard_tokens: a shard holds at most so many tokens, or one document.
        bos_token: name of the begin token, where it is an unusual one.
        eos_token: name of the end token, where it is an unusual one.
        workers: processes that encode; None encodes in this process, in one thread per core.
        kind: "text", or "chat": each line of `.jsonl` files is a conversation (`data.chat.parse_record`), encoded in
            DeepSeek-V4's format; needs `tokenizer`.
        effort: of chat: how all assistants reason; None takes each record's own, or else what its messages show.
        chat_templates: of chat: the release's `encoding_dsv4.py`, where it is not beside the tokenizer.
        max_tokens: of chat: the longest conversation allowed.
        too_long: what happens to longer ones: "error", or "drop", which counts them as skipped.
    """

    input: str
    output: str
    tokenizer: str | None = None
    vocab_size: int = 4096
    text_key: str = "text"
    separator: str | None = None
    join_bytes: int = 0
    validation_fraction: float = 0.05
    seed: int = 0
    fim_rate: float = 0.0
    shard_tokens: int = 100_000_000
    bos_token: str | None = None
    eos_token: str | None = None
    workers: int | None = None
    kind: Literal["text", "chat"] = "text"
    effort: Effort | None = None
    chat_templates: str | None = None
    max_tokens: int | None = None
    too_long: Literal["error", "drop"] = "error"

    def __post_init__(self) -> None:
        def check(key: str, good: bool, rule: str) -> None:
            if not good:
                raise DataError(f"{key}={getattr(self, key)!r}: {rule}")

        check("input", bool(self.input), "name a file, a folder or a glob pattern")
        check("output", bool(self.output), "name a folder to write")
        rule = f"at least {MIN_VOCAB_SIZE} (256 bytes and the special tokens)"
        check("vocab_size", self.tokenizer is not None or self.vocab_size >= MIN_VOCAB_SIZE, rule)
        check("separator", self.separator != "", "give a text, or null for one document per file")
        check("join_bytes", self.join_bytes >= 0, "must be at least 0")
        check("validation_fraction", 0 <= self.validation_fraction < 1, "must be at least 0 and below 1")
        check("fim_rate", 0 <= self.fim_rate <= 1, "must be between 0 and 1")
        check("shard_tokens", self.shard_tokens >= 1, "must be at least 1")
        check("workers", self.workers is None or self.workers >= 1, "must be at least 1, or null for threads")
        check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "must be at least 1, or null for any")
        chat = self.kind == "chat"
        rule = "kind=chat needs the tokenizer of the model to fine-tune: name its tokenizer.json or folder"
        check("tokenizer", self.tokenizer is not None or not chat, rule)
        for key in _TEXT_ONLY if chat else _CHAT_ONLY:
            default = type(self).__dataclass_fields__[key].default
            check(key, getattr(self, key) == default, f"means nothing for kind={self.kind}; leave it out")


def prepare(config: PrepareConfig, progress: Progress | None = None) -> Manifest:
    """Turn the text or the conversations of `config.input` into the prepared folder `config.output`.

    The folder appears complete or not at all. Empty documents (nothing but white space) are skipped and counted.

    Raises:
        DataError: the input cannot be read or is not what `kind` says, a conversation is too long, the tokenizer does
            not serve, or the output is in the way.
    """
    output = Path(config.output)
    _refuse_existing(output)
    source: _Source = _ChatSource(config) if config.kind == "chat" else _TextSource(config)

    output.parent.mkdir(parents=True, exist_ok=True)
    building = output.parent / f".{output.name}.{os.getpid()}.partial"
    shutil.rmtree(building, ignore_errors=True)  # left by a killed process of the same number
    building.mkdir()
    try:
        manifest = _write(building, source, config, progress)
        _refuse_existing(output)
        building.rename(output)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    sync_folder(output.parent)
    return manifest


def ensure_prepared(
    corpus: Path, output: Path, vocab_size: int = 4096, join_bytes: int = 0, progress: Progress | None = None
) -> Path:
    """Prepare `corpus` into `output` unless that has been done, and return `output`.

    Safe to call from several processes at once: the first to finish publishes.

    Raises:
        DataError: `output` is something else, or was prepared with another `vocab_size` or `join_bytes`.
    """
    _prepare_once(PrepareConfig(str(corpus), str(output), vocab_size=vocab_size, join_bytes=join_bytes), progress)
    _check_settings(output, {"vocab_size": vocab_size, "join_bytes": join_bytes})
    return output


def ensure_prepared_chat(
    path: Path,
    output: Path,
    tokenizer: Path,
    effort: Effort | None = None,
    chat_templates: str | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Prepare the conversations of `path` into `output` unless that has been done, and return `output`.

    Safe to call from several processes at once: the first to finish publishes.

    Raises:
        DataError: the input is unusable, or `output` is something else, or was prepared from other files or settings.
    """
    config = PrepareConfig(
        str(path),
        str(output),
        tokenizer=str(tokenizer),
        kind="chat",
        effort=effort,
        chat_templates=chat_templates,
        max_tokens=max_tokens,
    )
    _prepare_once(config, progress)
    _check_settings(output, {"kind": "chat", "effort": effort, "max_tokens": max_tokens} | _ChatSource(config).sums)
    return output


def _prepare_once(config: PrepareConfig, progress: Progress | None) -> None:
    if not _is_prepared(Path(config.output)):
        try:
            prepare(config, progress)
        except (DataError, OSError):
            if not _is_prepared(Path(config.output)):
                raise


def _check_settings(output: Path, settings: dict[str, Any]) -> None:
    before = PreparedData(output, verify=False).manifest.config
    for key, now in settings.items():
        was = before.get(key, 0 if key == "join_bytes" else None)  # older folders know no join_bytes
        if was != now:
            raise DataError(
                f"{output} was prepared with {key}={_short(was)}, not {_short(now)}: remove it or name another"
            )


def _short(value: Any) -> Any:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else value


def _is_prepared(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def _refuse_existing(output: Path) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    what = "is a prepared folder already" if _is_prepared(output) else "exists and is not empty"
    raise DataError(f"output={output} {what}: remove it or choose another")


# Which documents there are.


class _Corpus(NamedTuple):
    threshold: int  # a document whose draw lies below is held out
    text_bytes: int
    skipped: int


def _draw(config: PrepareConfig, text: str, purpose: str) -> int:
    """64 random bits that depend on the seed and the content alone."""
    key = f"{config.seed}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key).digest())


def _measure(documents: Iterable[str], config: PrepareConfig) -> _Corpus:
    """Where the border between the splits lies. Empty documents are counted and passed over."""
    lowest, highest = 1 << 64, -1
    text_bytes = skipped = 0
    for text in documents:
        if not text.strip():
            skipped += 1
            continue
        text_bytes += len(text.encode())
        draw = _draw(config, text, "split")
        lowest, highest = min(lowest, draw), max(highest, draw)
    threshold = int(config.validation_fraction * 2**64)
    if threshold == 0 or lowest >= highest:
        return _Corpus(0, text_bytes, skipped)
    # Two documents differ: each split gets one, however unlucky the draws.
    return _Corpus(min(max(threshold, lowest + 1), highest), text_bytes, skipped)


class _Document(NamedTuple):
    tokens: npt.NDArray[Any]
    trained: npt.NDArray[np.bool_] | None
    held_out: bool
    text_bytes: int
    read_bytes: int  # of the input, for the progress


class _Source(Protocol):
    """What `_write` needs to know of an input."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def special(self) -> "_SpecialTokens": ...

    @property
    def corpus(self) -> _Corpus: ...

    @property
    def skipped(self) -> int:
        """Final once `documents` is exhausted."""
        ...

    @property
    def sums(self) -> dict[str, str]:
        """Checksums to keep in the manifest."""
        ...

    def documents(self, dtype: str) -> Iterator[_Document]: ...


# Text: what a document becomes.


class _SpecialTokens(NamedTuple):
    bos: int
    eos: int
    fim: tuple[int, int, int] | None


def _special_tokens(tokenizer: Tokenizer, config: PrepareConfig) -> _SpecialTokens:
    fim = fim_ids(tokenizer)
    if config.fim_rate > 0 and fim is None:
        raise DataError(
            f"fim_rate={config.fim_rate} needs the tokens <\\uff5cfim\\u2581begin\\uff5c>, hole and end, which the "
            f"tokenizer {config.tokenizer} lacks: set fim_rate=0 or train a tokenizer (tokenizer=null)"
        )
    return _SpecialTokens(*special_ids(tokenizer, config.bos_token, config.eos_token), fim)


def _parts(text: str, config: PrepareConfig) -> tuple[str, ...]:
    """A training document as it is, or, at `fim_rate`, as prefix, suffix and middle (PSM, cut between characters)."""
    rng = random.Random(_draw(config, text, "fim"))
    if rng.random() >= config.fim_rate:
        return (text,)
    low, high = sorted(int(rng.random() * (len(text) + 1)) for _ in range(2))
    return text[:low], text[high:], text[low:high]


class _Encoder:
    """Documents, each of one or three parts, to token ids with the special tokens around and between the parts."""

    def __init__(self, tokenizer: Tokenizer, special: _SpecialTokens, dtype: str) -> None:
        self._tokenizer, self._special, self._dtype = tokenizer, special, dtype

    def __call__(self, documents: list[tuple[str, ...]]) -> list[npt.NDArray[Any]]:
        flat = [part for document in documents for part in document]
        encoded = iter(self._tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        bos, eos, fim = self._special
        result = []
        for document in documents:
            ids = [bos]
            for index in range(len(document)):
                if len(document) == 3 and fim is not None:
                    ids.append(fim[index])
                ids += next(encoded).ids
            result.append(np.array([*ids, eos], dtype=self._dtype))
        return result


# In a worker process: what `_start_worker` made of its arguments.
_worker: _Encoder | None = None


def _start_worker(tokenizer: str, special: _SpecialTokens, dtype: str) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    loaded = Tokenizer.from_str(tokenizer)
    loaded.encode_special_tokens = True  # not part of the JSON
    _worker = _Encoder(loaded, special, dtype)


def _encode_in_worker(documents: list[tuple[str, ...]]) -> list[npt.NDArray[Any]]:
    assert _worker is not None
    return _worker(documents)


class _Batch(NamedTuple):
    documents: list[tuple[str, ...]]
    held_out: list[bool]
    text_bytes: list[int]


def _batches(files: list[Path], corpus: _Corpus, config: PrepareConfig) -> Iterator[_Batch]:
    batch, size = _Batch([], [], []), 0
    for text in _documents(files, config):
        held_out = _draw(config, text, "split") < corpus.threshold
        batch.documents.append((text,) if held_out else _parts(text, config))
        batch.held_out.append(held_out)
        batch.text_bytes.append(len(text.encode()))
        size += len(text)
        if size >= _BATCH_CHARACTERS or len(batch.documents) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = _Batch([], [], []), 0
    yield batch


def _encoded(
    batches: Iterator[_Batch], tokenizer: Tokenizer, special: _SpecialTokens, dtype: str, workers: int | None
) -> Iterator[tuple[_Batch, list[npt.NDArray[Any]]]]:
    if workers is None:
        encode = _Encoder(tokenizer, special, dtype)
        yield from ((batch, encode(batch.documents)) for batch in batches)
        return
    arguments = (tokenizer.to_str(), special, dtype)
    # spawn: a fork would inherit the tokenizer's thread pool without its threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, arguments) as pool:
        waiting: deque[tuple[_Batch, Future[list[npt.NDArray[Any]]]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(_encode_in_worker, batch.documents)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for batch, future in waiting:
            yield batch, future.result()


def _documents(files: list[Path], config: PrepareConfig, keep_empty: bool = False) -> Iterator[str]:
    joined: list[str] = []
    size = 0
    for text in texts(files, config.text_key, config.separator):
        if not (keep_empty or text.strip()):
            continue
        if not config.join_bytes or not text.strip():
            yield text
            continue
        joined.append(text)
        size += len(text.encode())
        if size >= config.join_bytes:
            yield "\n\n".join(joined)
            joined, size = [], 0
    if joined:
        yield "\n\n".join(joined)


class _TextSource:
    """Documents of text files, and the tokenizer given or trained on them."""

    def __init__(self, config: PrepareConfig) -> None:
        self.sums: dict[str, str] = {}
        self._config, self._files = config, input_files(config.input)
        given = None if config.tokenizer is None else load_tokenizer(Path(config.tokenizer))
        if given is not None:
            _special_tokens(given, config)  # before the long passes
        self.corpus = _measure(_documents(self._files, config, keep_empty=True), config)
        self.skipped = self.corpus.skipped
        if self.corpus.text_bytes == 0:
            raise DataError(
                f"input={config.input} holds no text ({self.skipped} empty documents in {len(self._files)} files)"
            )
        if given is None:
            training = (text for text in _documents(self._files, config) if not self._held_out(text))
            given = train_tokenizer(training, config.vocab_size)
        self.tokenizer, self.special = given, _special_tokens(given, config)

    def _held_out(self, text: str) -> bool:
        return _draw(self._config, text, "split") < self.corpus.threshold

    def documents(self, dtype: str) -> Iterator[_Document]:
        batches = _batches(self._files, self.corpus, self._config)
        for batch, encoded in _encoded(batches, self.tokenizer, self.special, dtype, self._config.workers):
            for tokens, held_out, size in zip(encoded, batch.held_out, batch.text_bytes, strict=True):
                yield _Document(tokens, None, held_out, size, size)


# Chat.


class _ChatSource:
    """Conversations, one a line. What a line says decides its split, not how it is encoded."""

    def __init__(self, config: PrepareConfig) -> None:
        assert config.tokenizer is not None  # PrepareConfig sees to it
        self._config, self._files = config, input_files(config.input, CHAT_SUFFIXES)
        self.tokenizer = load_tokenizer(Path(config.tokenizer))
        self._templates = find_templates(config.chat_templates, Path(config.tokenizer))
        ids = special_token_ids(self.tokenizer)
        self.special = _SpecialTokens(ids[BOS], ids[EOS], None)
        self.skipped = 0

    @functools.cached_property
    def sums(self) -> dict[str, str]:
        """SHA-256 of what decides the tokens besides the settings."""
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(file.open("rb")) for file in self._files]
            files = [hashlib.file_digest(file, "sha256").hexdigest() for file in opened]
        return {
            "input_sha256": hashlib.sha256("\n".join(files).encode()).hexdigest() if len(files) > 1 else files[0],
            "tokenizer_sha256": hashlib.sha256(_tokenizer_bytes(self._config, self.tokenizer)).hexdigest(),
            "chat_templates_sha256": self._templates.digest,
        }

    @functools.cached_property
    def corpus(self) -> _Corpus:
        def checked() -> Iterator[str]:
            for line, where in lines(self._files):
                _conversation(line, where)
                yield line

        corpus = _measure(checked(), self._config)
        if corpus.text_bytes == 0:
            raise DataError(f"input={self._config.input} holds no conversation in {len(self._files)} files")
        return corpus

    def documents(self, dtype: str) -> Iterator[_Document]:
        config, sizes = self._config, token_byte_lengths(self.tokenizer)
        found = lines(self._files)
        while batch := list(itertools.islice(found, _BATCH_DOCUMENTS)):
            conversations = [_conversation(line, where) for line, where in batch]
            encoded = encode_batch(conversations, self.tokenizer, config.effort, self._templates)
            for (line, where), (ids, trained) in zip(batch, encoded, strict=True):
                if config.max_tokens is not None and len(ids) > config.max_tokens:
                    if config.too_long == "error":
                        raise DataError(
                            f"{where}: the conversation has {len(ids)} tokens, max_tokens={config.max_tokens} (in "
                            "training: the shortest stages.N.sequence_length): shorten it, raise that, or leave such "
                            "ones out with openv4 prepare kind=chat too_long=drop"
                        )
                    self.skipped += 1
                    continue
                tokens = np.array(ids, dtype=dtype)
                held_out = _draw(config, line, "split") < self.corpus.threshold
                yield _Document(tokens, np.array(trained), held_out, int(sizes[ids].sum()), len(line.encode()))


def _conversation(line: str, where: str) -> Conversation:
    return parse_record(json_object(line, where, '{"messages": [...]}'), where)


def _tokenizer_bytes(config: PrepareConfig, tokenizer: Tokenizer) -> bytes:
    """Content of the prepared folder's `tokenizer.json`: the given file as it is."""
    if config.tokenizer is None:
        return tokenizer.to_str(pretty=True).encode()
    given = Path(config.tokenizer)
    return (given / "tokenizer.json" if given.is_dir() else given).read_bytes()


def _write(folder: Path, source: _Source, config: PrepareConfig, progress: Progress | None) -> Manifest:
    vocab_size = vocabulary_size(source.tokenizer)
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    writers = {name: ShardWriter(folder, name, dtype, config.shard_tokens) for name in SPLITS}
    text_bytes = dict.fromkeys(SPLITS, 0)
    total, done, shown = source.corpus.text_bytes, 0, 0
    for document in source.documents(dtype):
        name = SPLITS[document.held_out]
        writers[name].add(document.tokens, document.trained)
        text_bytes[name] += document.text_bytes
        done += document.read_bytes
        if progress is not None and done - shown >= _PROGRESS_BYTES:
            shown = done
            progress(done, total)
    if progress is not None:
        progress(total, total)
    splits = {name: writer.finish(text_bytes[name]) for name, writer in writers.items()}
    if splits["train"].documents == 0:
        raise DataError(
            f"input={config.input}: all conversations but {splits['validation'].documents} are longer than "
            f"max_tokens={config.max_tokens} ({source.skipped}), and none is left to train on: raise max_tokens"
        )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        vocab_size=vocab_size,
        bos=source.special.bos,
        eos=source.special.eos,
        fim=source.special.fim if config.fim_rate > 0 else None,
        dtype=dtype,
        skipped=source.skipped,
        config={key: value for key, value in asdict(config).items() if key not in ("output", "workers")} | source.sums,
        tokenizer=write_file(folder, "tokenizer.json", [_tokenizer_bytes(config, source.tokenizer)]),
        token_bytes=write_array(folder, "token_bytes.npy", [token_byte_lengths(source.tokenizer)], np.int32),
        splits=splits,
    )
    write_file(folder, "manifest.json", [manifest.to_json().encode()])
    sync_folder(folder)
    return manifest
