"""What the tests of the commands share: small texts, and ways to run a command in this process."""

import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_cases import OVERRIDES, contents

from openv4.data.prepare import PrepareConfig, prepare
from openv4.launch import cli

WORDS = ["light", "day", "night", "waters", "heaven", "earth", "grass", "herb", "seed", "fruit", "\u5149", "\u591c"]
VOCAB = 300
# With enough indexer heads that no score is an exact zero, a tie, which transformers breaks in another way than we.
SMALL_RUN = [*OVERRIDES, f"model.vocab_size={VOCAB}", "model.index_n_heads=32"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def console(*arguments: object) -> int:
    """Runs a command as the console script would; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["openv4", *map(str, arguments)])
        patch.setenv("PYTHONSAFEPATH", "1")  # which main sets
        patch.setattr(sys, "excepthook", sys.excepthook)
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 1
    return 0


@contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """Fails if the block changes, adds or removes a file below one of the folders."""
    before = [contents(folder) for folder in folders]
    yield
    for folder, files in zip(folders, before, strict=True):
        now = contents(folder)
        assert sorted(now) == sorted(files)
        assert all(now[name] == files[name] for name in now), folder


def spoil(file: Path, how: str) -> None:
    """Damages a file: a bit "flipped", the end "cut", or all of it "gone"."""
    content = bytearray(file.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    elif how == "cut":
        content = content[:-3]
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(content)


def documents(count: int, seed: int = 0) -> list[str]:
    """Short made-up texts, all different, with letters of several alphabets."""
    rng = random.Random(seed)
    return [
        f"{index}. " + " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 40))) + " \U0001f331\n"
        for index in range(count)
    ]


TEXTS = documents(40)


def write_texts(folder: Path, texts: Sequence[str]) -> Path:
    """The texts in files of every kind that `openv4 prepare` reads."""
    (folder / "deep").mkdir(parents=True)
    third = len(texts) // 3
    for index, text in enumerate(texts[:third]):
        (folder / f"{index:03}.txt").write_text(text, encoding="utf-8")
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts[third : 2 * third])
    (folder / "more.jsonl").write_text(lines, encoding="utf-8")
    pq.write_table(pa.table({"text": pa.array(texts[2 * third :], pa.string())}), folder / "deep" / "rest.parquet")
    return folder


def prepared(folder: Path, texts: Sequence[str], **changes: Any) -> Path:
    """A prepared folder of the texts, with a tokenizer of ``VOCAB`` entries."""
    source = write_texts(folder.with_name(f"{folder.name}_text"), texts)
    values: dict[str, Any] = {"input": str(source), "output": str(folder), "vocab_size": VOCAB}
    prepare(PrepareConfig(**(values | changes)))
    return folder
