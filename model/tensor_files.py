"""Folders of safetensors files: headers first, tensors one at a time from mapped files, and atomic writing.

Nothing is ever unpickled, and nothing outside the folder is read.
"""

import errno
import functools
import json
import os
import re
import secrets
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import WeightsError

INDEX = "model.safetensors.index.json"

P = ParamSpec("P")

# What a file system says when it may be well again in a moment, as one of a network: it lost its server, or its grip
# on a file, or a line of its cache.
TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ETIMEDOUT, errno.EREMOTEIO}
PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds, before each further try

# Safetensors' names of what can be read.
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}


class Entry(NamedTuple):
    """What a header says about a tensor."""

    file: Path
    key: str  # its name in that file
    shape: tuple[int, ...]
    dtype: str  # in safetensors' spelling

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the data; 0 for a type that is not in ``DTYPES``."""
        return self.elements * DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 0


class TensorFolder:
    """The tensors of a folder: ``entries`` from the headers, ``read`` one at a time.

    Pages of a mapped file count as memory of this process until it is closed, so files are closed whenever as much as
    the largest tensor has been read.

    Args:
        rename: from the names in the files to those of ``entries``.

    Raises:
        WeightsError: damaged files, an index that points outside the folder or does not match the files.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str] = str) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        for file in weight_files(folder):
            with open_tensors(file) as tensors:
                _refuse_repeated_names(file)
                for key in tensors.keys():  # noqa: SIM118 (not a dict)
                    stored = tensors.get_slice(key)
                    name = rename(key)
                    if name in self.entries:
                        other = self.entries[name].file.name
                        raise WeightsError(f"{file}: tensor {key} is in {other} as well; copy the folder again")
                    self.entries[name] = Entry(file, key, tuple(stored.get_shape()), stored.get_dtype())
        _compare_with_index(folder, self.entries)
        self._largest = max((entry.bytes for entry in self.entries.values()), default=0)
        self._files: dict[Path, Any] = {}
        self._since = 0

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored: a view of the mapped file, to be copied before the next one is read."""
        entry = self.entries[name]
        if self._since >= self._largest:
            self.close()
        self._since += entry.bytes
        try:
            if entry.file not in self._files:
                self._files[entry.file] = safe_open(entry.file, framework="pt")
            tensor: Tensor = self._files[entry.file].get_tensor(entry.key)
        except (SafetensorError, OSError) as error:
            raise _damaged(entry.file, error) from None
        return tensor

    def close(self) -> None:
        """Unmaps the files; the next ``read`` maps them again."""
        self._files.clear()
        self._since = 0


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index if it has one."""
    index = folder / INDEX
    if not index.exists():
        single = inside(folder, "model.safetensors")
        if not single.exists():
            raise WeightsError(f"{folder}: neither model.safetensors nor {INDEX}; name a folder of released weights")
        return [single]
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if not (folder / name).is_file():
            raise WeightsError(f"{folder / name}: named by the index but missing; copy the file again")
    return [inside(folder, name) for name in names]


def inside(folder: Path, name: str) -> Path:
    """``folder / name``, unless that is a link which leaves the folder: what it names would be taken for a part of
    these weights, and be copied beside those that are written from them.

    Links into the ``blobs`` of a download cache are how its folders look.

    Raises:
        WeightsError: it leaves.
    """
    path, home = folder / name, folder.resolve()
    found = path.resolve()
    if not any(found.is_relative_to(root) for root in (home, home.parent / "blobs", home.parent.parent / "blobs")):
        raise WeightsError(f"{path}: a link that leaves the folder, to {found}; refused: put the file itself there")
    return path


def locate_tensors(folder: Path, stem: str) -> dict[str, Path]:
    """Where each tensor of ``<stem>*.safetensors`` lies: by the index if there is one, else by the file's header."""
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.exists():
        return {name: folder / file for name, file in _weight_map(index).items()}
    with open_tensors(single) as file:
        return dict.fromkeys(file.keys(), single)


def read_tensors(places: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, a view of the mapped file, of ``locate_tensors`` or a part of it, file by file."""
    names: dict[Path, list[str]] = {}
    for name, path in places.items():
        names.setdefault(path, []).append(name)
    for path in names:
        with open_tensors(path) as file:
            for name in names[path]:
                yield name, file.get_tensor(name)


def listed(problems: Mapping[str, list[str]], most: int = 4) -> str:
    """Names by what is wrong with them, the first few of each: "2 missing: a, b; 1 unexpected: c"."""
    shown = {kind: ", ".join(names[:most]) + _rest(names, most) for kind, names in problems.items() if names}
    return "; ".join(f"{len(problems[kind])} {kind}: {names}" for kind, names in shown.items())


def _rest(names: list[str], most: int) -> str:
    return f" and {len(names) - most} more" if len(names) > most else ""


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """``safe_open`` on the CPU, whose errors name the file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from None


def persistent(write: Callable[P, None]) -> Callable[P, None]:
    """``write``, which makes a file anew, tried again where the file system failed for the moment; all of it, for after
    a sync that failed the system takes for written what is not."""

    @functools.wraps(write)
    def tried(*args: P.args, **kwargs: P.kwargs) -> None:
        for pause in PAUSES:
            try:
                return write(*args, **kwargs)
            except OSError as error:
                if error.errno not in TRANSIENT:
                    raise
                print(f"{args[0]}: {error}; writing it again in {pause:g} s", file=sys.stderr, flush=True)
                time.sleep(pause)
        return write(*args, **kwargs)

    return tried


@persistent
def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, on disk when this returns; OSError where the disk refuses."""
    try:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else None, str(error)) from None
    sync(path)


def write_index(folder: Path, stem: str, weight_map: Mapping[str, str], total: int) -> Path:
    """The index of tensors that lie in several files: which file has which, and the bytes of all."""
    path = folder / f"{stem}.safetensors.index.json"
    write_json(path, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return path


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON file, on disk when this returns."""
    write_text(path, json.dumps(values, indent=2) + "\n")


@persistent
def write_text(path: Path, text: str) -> None:
    """A text file, on disk when this returns."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Waits until a file or the entries of a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``folder`` when the block ends well, and vanishes when it does not."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder}: already there and not empty; remove it or choose another folder")
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unnamed = folder.parent / f".{folder.name}-{secrets.token_hex(8)}"
        unnamed.mkdir()  # fails where somebody has foreseen its name; for others to read if the umask says so
        temporary = unnamed
        yield temporary
        sync(temporary)
        temporary.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise WeightsError(f"{folder}: cannot write ({error}); free some space or choose another folder") from None
    finally:
        if temporary is not None and temporary.exists():
            with suppress(OSError):
                shutil.rmtree(temporary)


def _refuse_repeated_names(file: Path) -> None:
    """Of a file whose header is otherwise sound. Readers differ in which tensor of a name they take."""

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise WeightsError(f"{file}: its header has {max(names, key=names.count)} twice; copy or export it again")
        return found

    with file.open("rb") as content:
        (length,) = struct.unpack("<Q", content.read(8))
        json.loads(content.read(length), object_pairs_hook=checked)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not set(weight_map.values()):
            raise ValueError("it names no tensor")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index}: not a safetensors index ({error!r})") from None
    for name in sorted(set(weight_map.values()), key=str):
        if not isinstance(name, str) or name != Path(name).name or name.startswith("."):
            raise WeightsError(f"{index}: weight_map entry {name!r} leaves the folder; refused")
    return weight_map


def _compare_with_index(folder: Path, entries: Mapping[str, Entry]) -> None:
    if not (folder / INDEX).exists():
        return
    weight_map = _weight_map(folder / INDEX)
    found = {entry.key: entry.file.name for entry in entries.values()}
    for key, file in weight_map.items():
        if found.get(key) != file:
            where = f"it is in {found[key]}" if key in found else "it is in none of the files"
            raise WeightsError(
                f"{folder / file}: the index says that tensor {key} is here, but {where}; "
                "were files swapped or mixed? copy the folder again"
            )
    for key, file in found.items():
        if key not in weight_map:
            raise WeightsError(f"{folder / file}: holds tensor {key}, which the index lacks; copy the folder again")


def _damaged(file: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{file}: damaged or unreadable ({error}); copy or export it again")
