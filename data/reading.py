"""Files of text as documents: which files an input names, and what each kind of file holds, read as a stream."""

import glob
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from .config import DataError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
CHAT_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")

_READ_BYTES = 1 << 22
_LINE_BYTES = 1 << 27  # a document of 30 million tokens; a compressed line of zeros may be larger than memory

_T = TypeVar("_T")


def input_files(pattern: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The files of a file's name, a folder (searched recursively) or a glob pattern, in order of their names.

    Raises:
        DataError: there is none of a kind in `suffixes`.
    """
    path = Path(pattern)
    if path.is_file():
        if not path.name.endswith(suffixes):
            raise DataError(f"input={pattern}: openv4 reads {', '.join(suffixes)}; convert it to one of these")
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    files = sorted((file for file in found if file.name.endswith(suffixes) and file.is_file()), key=Path.as_posix)
    if not files:
        reason = "no file of a known type" if path.is_dir() else "no such file or folder, or nothing matches"
        raise DataError(f"input={pattern}: {reason}; openv4 reads {', '.join(suffixes)}")
    return files


def texts(files: list[Path], text_key: str, separator: str | None) -> Iterator[str]:
    """The documents of text files, empty ones included.

    Raises:
        DataError: a file cannot be read, or is not what its name says; one line with the place.
    """
    for file in files:
        if file.suffix == ".txt":
            found = _read_txt(file, separator)
        elif file.suffix == ".parquet":
            found = _read_parquet(file, text_key)
        else:
            found = _read_jsonl(file, text_key)
        yield from _readable(file, found)


def lines(files: list[Path]) -> Iterator[tuple[str, str]]:
    """The lines of JSONL files that are not blank, each with its place (`file:line`).

    Raises:
        DataError: a file cannot be read or is not UTF-8.
    """
    for file in files:
        yield from _readable(file, _read_lines(file))


def json_object(line: str, where: str, example: str) -> dict[str, Any]:
    """A line's JSON object.

    Raises:
        DataError: it is something else; `example` says what to write.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not valid JSON ({error.msg} at column {error.colno}): mend the line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object but {type(record).__name__}: write {example}")
    return record


def _readable(file: Path, found: Iterator[_T]) -> Iterator[_T]:
    try:
        yield from found
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


def _read_lines(file: Path) -> Iterator[tuple[str, str]]:
    compression = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix)
    offset = 0
    with pa.input_stream(file, compression=compression) as stream:
        reader = io.BufferedReader(stream, _READ_BYTES)
        for number, line in enumerate(iter(lambda: reader.readline(_LINE_BYTES), b""), 1):
            if len(line) == _LINE_BYTES:
                raise DataError(f"{file}:{number} is longer than {_LINE_BYTES >> 20} MiB: split the document")
            if not line.isspace():
                yield _decode(line, file, offset).rstrip("\r\n"), f"{file}:{number}"
            offset += len(line)


def _read_jsonl(file: Path, key: str) -> Iterator[str]:
    return (_text_of(line, key, where) for line, where in _read_lines(file))


def _text_of(line: str, key: str, where: str) -> str:
    record = json_object(line, where, f'{{"{key}": ...}}')
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
