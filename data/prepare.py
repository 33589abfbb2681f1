"""Text files to token shards: `openv4 prepare input=<text> output=<folder>`.

Three passes over the input, each streaming: measure (which split each document falls into), train the tokenizer on the
training documents unless one is given, encode. The same text, in the same order, gives byte-identical shards, whatever
its file format and the number of workers.
"""

import glob
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from .shards import (
    FORMAT_VERSION,
    SPLITS,
    DataError,
    Manifest,
    PreparedData,
    ShardWriter,
    sync_folder,
    write_array,
    write_file,
)
from .tokenizer import (
    MIN_VOCAB_SIZE,
    fim_ids,
    load_tokenizer,
    special_ids,
    token_byte_lengths,
    train_tokenizer,
    vocabulary_size,
)

KING_JAMES = Path(__file__).parent / "corpus" / "king_james.jsonl.gz"
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
Progress = Callable[[int, int], None]  # bytes of text encoded so far, and in all

_READ_BYTES = 1 << 22
_BATCH_CHARACTERS = 1 << 21
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class PrepareConfig:
    """How text becomes shards.

    Args:
        input: a file, a folder (searched recursively) or a glob pattern; `SUFFIXES` are read.
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


def prepare(config: PrepareConfig, progress: Progress | None = None) -> Manifest:
    """Turn the text of `config.input` into the prepared folder `config.output`.

    The folder appears complete or not at all. Empty documents (nothing but white space) are skipped and counted.

    Raises:
        DataError: the input cannot be read, the tokenizer does not serve, or the output is in the way.
    """
    output = Path(config.output)
    _refuse_existing(output)
    files = _input_files(config.input)
    tokenizer = None if config.tokenizer is None else load_tokenizer(Path(config.tokenizer))
    if tokenizer is not None:
        _special_tokens(tokenizer, config)  # before the long passes

    corpus = _measure(files, config)
    if tokenizer is None:
        training = (text for text in _documents(files, config) if _draw(config, text, "split") >= corpus.threshold)
        tokenizer = train_tokenizer(training, config.vocab_size)

    output.parent.mkdir(parents=True, exist_ok=True)
    building = output.parent / f".{output.name}.{os.getpid()}.partial"
    shutil.rmtree(building, ignore_errors=True)  # left by a killed process of the same number
    building.mkdir()
    try:
        manifest = _write(building, files, corpus, tokenizer, config, progress)
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
    if not _is_prepared(output):
        try:
            config = PrepareConfig(str(corpus), str(output), vocab_size=vocab_size, join_bytes=join_bytes)
            prepare(config, progress)
        except (DataError, OSError):
            if not _is_prepared(output):
                raise
    before = PreparedData(output, verify=False).manifest.config
    for key, now in (("vocab_size", vocab_size), ("join_bytes", join_bytes)):
        was = before.get(key, 0)
        if was != now:
            raise DataError(f"{output} was prepared with {key}={was}, not {now}: remove it or name another")
    return output


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


def _measure(files: list[Path], config: PrepareConfig) -> _Corpus:
    lowest, highest = 1 << 64, -1
    text_bytes = skipped = 0
    for text in _documents(files, config, keep_empty=True):
        if not text.strip():
            skipped += 1
            continue
        text_bytes += len(text.encode())
        draw = _draw(config, text, "split")
        lowest, highest = min(lowest, draw), max(highest, draw)
    if highest < 0:
        raise DataError(f"input={config.input} holds no text ({skipped} empty documents in {len(files)} files)")
    threshold = int(config.validation_fraction * 2**64)
    if threshold == 0 or lowest == highest:
        return _Corpus(0, text_bytes, skipped)
    # Two documents differ: each split gets one, however unlucky the draws.
    return _Corpus(min(max(threshold, lowest + 1), highest), text_bytes, skipped)


# What a document becomes.


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


def _write(
    folder: Path,
    files: list[Path],
    corpus: _Corpus,
    tokenizer: Tokenizer,
    config: PrepareConfig,
    progress: Progress | None,
) -> Manifest:
    special = _special_tokens(tokenizer, config)
    vocab_size = vocabulary_size(tokenizer)
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    writers = {name: ShardWriter(folder, name, dtype, config.shard_tokens) for name in SPLITS}
    text_bytes = dict.fromkeys(SPLITS, 0)
    for batch, encoded in _encoded(_batches(files, corpus, config), tokenizer, special, dtype, config.workers):
        for tokens, held_out, size in zip(encoded, batch.held_out, batch.text_bytes, strict=True):
            name = SPLITS[held_out]
            writers[name].add(tokens)
            text_bytes[name] += size
        if progress is not None:
            progress(sum(text_bytes.values()), corpus.text_bytes)

    given = None if config.tokenizer is None else Path(config.tokenizer)
    if given is not None and given.is_dir():
        given = given / "tokenizer.json"
    content = tokenizer.to_str(pretty=True).encode() if given is None else given.read_bytes()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        vocab_size=vocab_size,
        bos=special.bos,
        eos=special.eos,
        fim=special.fim if config.fim_rate > 0 else None,
        dtype=dtype,
        skipped=corpus.skipped,
        config={key: value for key, value in asdict(config).items() if key not in ("output", "workers")},
        tokenizer=write_file(folder, "tokenizer.json", [content]),
        token_bytes=write_array(folder, "token_bytes.npy", [token_byte_lengths(tokenizer)], np.int32),
        splits={name: writer.finish(text_bytes[name]) for name, writer in writers.items()},
    )
    write_file(folder, "manifest.json", [manifest.to_json().encode()])
    sync_folder(folder)
    return manifest


# Reading the input.


def _input_files(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"input={pattern}: openv4 reads {', '.join(SUFFIXES)}; convert it to one of these")
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    files = sorted((file for file in found if file.name.endswith(SUFFIXES) and file.is_file()), key=Path.as_posix)
    if not files:
        reason = "no file of a known type" if path.is_dir() else "no such file or folder, or nothing matches"
        raise DataError(f"input={pattern}: {reason}; openv4 reads {', '.join(SUFFIXES)}")
    return files


def _documents(files: list[Path], config: PrepareConfig, keep_empty: bool = False) -> Iterator[str]:
    joined: list[str] = []
    size = 0
    for text in _pieces(files, config, keep_empty):
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


def _pieces(files: list[Path], config: PrepareConfig, keep_empty: bool) -> Iterator[str]:
    for file in files:
        if file.suffix == ".txt":
            texts = _read_txt(file, config.separator)
        elif file.suffix == ".parquet":
            texts = _read_parquet(file, config.text_key)
        else:
            texts = _read_jsonl(file, config.text_key)
        try:
            for text in texts:
                if keep_empty or text.strip():
                    yield text
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file} cannot be read ({str(error).splitlines()[0]}): restore or remove it") from error


def _decode(content: bytes, file: Path, offset: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        where = f"{file}: byte {offset + error.start} (0x{content[error.start]:02x})"
        raise DataError(f"{where} is not UTF-8: convert the file to UTF-8") from error


def _read_txt(file: Path, separator: str | None) -> Iterator[str]:
    with file.open("rb") as stream:
        if separator is None:
            yield _decode(stream.read(), file, 0)
            return
        cut = separator.encode()
        offset, rest = 0, b""
        while chunk := stream.read(_READ_BYTES):
            *whole, rest = (rest + chunk).split(cut)
            for document in whole:
                yield _decode(document, file, offset)
                offset += len(document) + len(cut)
        yield _decode(rest, file, offset)


def _read_jsonl(file: Path, key: str) -> Iterator[str]:
    compression = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix)
    offset = 0
    with pa.input_stream(file, compression=compression) as stream:
        for number, line in enumerate(io.BufferedReader(stream, _READ_BYTES), 1):
            if not line.isspace():
                yield _text_of(_decode(line, file, offset), key, f"{file}:{number}")
            offset += len(line)


def _text_of(line: str, key: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not valid JSON ({error.msg} at column {error.colno}): mend the line") from error
    if not isinstance(record, dict):
        raise DataError(f'{where} is not a JSON object but {type(record).__name__}: write {{"{key}": ...}}')
    if key not in record:
        raise DataError(
            f"{where} has no key {key!r}, only {sorted(record)}: set text_key to the one that holds the text"
        )
    text = record[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} is not a string but {type(text).__name__}: set text_key to the text's key")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}: {key!r} holds half a surrogate pair, which is no text: mend the line")
    return text


def _read_parquet(file: Path, key: str) -> Iterator[str]:
    with pq.ParquetFile(file) as table:
        schema = table.schema_arrow
        if key not in schema.names:
            raise DataError(
                f"{file} has no column {key!r}, only {sorted(schema.names)}: set text_key to the text's column"
            )
        kind = schema.field(key).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{file}: column {key!r} is not text but {kind}: set text_key to the text's column")
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[key]):
            for content in batch.column(0).cast(pa.large_binary()).to_pylist():
                yield "" if content is None else _decode(content, Path(f"{file} (row {row})"), 0)
                row += 1
