"""Small texts that the tests of the commands share."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from openv4.data.prepare import PrepareConfig, prepare

WORDS = ["light", "day", "night", "waters", "heaven", "earth", "grass", "herb", "seed", "fruit", "\u5149", "\u591c"]
VOCAB = 300


def documents(count: int, seed: int = 0) -> list[str]:
    """Short made-up texts, all different, with letters of several alphabets."""
    rng = random.Random(seed)
    return [
        f"{index}. " + " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 40))) + " \U0001f331\n"
        for index in range(count)
    ]


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
