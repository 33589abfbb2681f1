"""Writes conversations.jsonl.gz and restyled.jsonl.gz from king_james.jsonl.gz: run this file with Python.

Questions of few kinds with answers of a fixed form, which a tiny model learns within minutes; and the same questions
with answers of another form, for a model that knows the first one to be fine-tuned on.
"""

import gzip
import json
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BOOKS = (  # noqa: SIM905 - sixty-six quoted names read worse
    "Genesis, Exodus, Leviticus, Numbers, Deuteronomy, Joshua, Judges, Ruth, 1 Samuel, 2 Samuel, 1 Kings, 2 Kings, "
    "1 Chronicles, 2 Chronicles, Ezra, Nehemiah, Esther, Job, Psalms, Proverbs, Ecclesiastes, Song of Solomon, Isaiah, "
    "Jeremiah, Lamentations, Ezekiel, Daniel, Hosea, Joel, Amos, Obadiah, Jonah, Micah, Nahum, Habakkuk, Zephaniah, "
    "Haggai, Zechariah, Malachi, Matthew, Mark, Luke, John, Acts, Romans, 1 Corinthians, 2 Corinthians, Galatians, "
    "Ephesians, Philippians, Colossians, 1 Thessalonians, 2 Thessalonians, 1 Timothy, 2 Timothy, Titus, Philemon, "
    "Hebrews, James, 1 Peter, 2 Peter, 1 John, 2 John, 3 John, Jude, Revelation"
).split(", ")
QUOTES = 400
LONGEST_QUOTE = 60  # characters

Conversation = dict[str, list[dict[str, Any]]]


def conversation(*turns: str, system: str | None = None, reasoning: str | None = None) -> Conversation:
    """User and assistant in turn; `reasoning` is before the last answer."""
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]
    if reasoning is not None:
        messages[-1]["reasoning_content"] = reasoning
    return {"messages": messages}


def read_bible() -> dict[str, list[list[str]]]:
    """Verses by book and chapter."""
    with gzip.open(HERE / "king_james.jsonl.gz", "rt", encoding="utf-8") as file:
        chapters = [json.loads(line) for line in file]
    short = list(dict.fromkeys(chapter["id"].rsplit(" ", 1)[0] for chapter in chapters))
    bible: dict[str, list[list[str]]] = {book: [] for book in BOOKS}
    for chapter in chapters:
        book = dict(zip(short, BOOKS, strict=True))[chapter["id"].rsplit(" ", 1)[0]]
        bible[book].append(chapter["text"].splitlines())
    return bible


def order() -> list[Conversation]:
    """Which book follows which, in one turn and in two."""
    after = {a: f"After {a} comes {b}." for a, b in pairwise(BOOKS)}
    found = [conversation(f"Which book comes after {a}?", answer) for a, answer in after.items()]
    for a, b in pairwise(BOOKS):
        found.append(conversation(f"Which book comes before {b}?", f"Before {b} comes {a}."))
        if b in after:
            found.append(conversation(f"Which book comes after {a}?", after[a], "And after that?", after[b]))
    return found


def lengths(bible: dict[str, list[list[str]]]) -> list[Conversation]:
    """How many chapters a book has: with reasoning, and as a system text wants it."""
    found = []
    for book, chapters in bible.items():
        question, count = f"How many chapters has {book}?", len(chapters)
        answer = f"{book} has {count} chapter{'s' * (count > 1)}."
        reasoning = f"The last chapter of {book} is {book} {count}."
        found.append(conversation(question, answer, reasoning=reasoning))
        found.append(conversation(question, str(count), system="Answer with a number alone."))
    return found


def quotes(bible: dict[str, list[list[str]]], rng: random.Random) -> list[Conversation]:
    """Short verses, every second one with a system text."""
    verses = [
        (f"{book} {chapter}:{number}", verse)
        for book, chapters in bible.items()
        for chapter, texts in enumerate(chapters, 1)
        for number, verse in enumerate(texts, 1)
        if len(verse) <= LONGEST_QUOTE
    ]
    return [
        conversation(f"Quote {place}.", f'{place} says: "{verse}"', system=("You quote the Bible.", None)[index % 2])
        for index, (place, verse) in enumerate(sorted(rng.sample(verses, QUOTES)))
    ]


def restyled(found: list[Conversation]) -> list[Conversation]:
    """Those without system text, their answers turned round, reasoning left out."""
    forms = (
        (r"(After|Before) (.*) comes (.*)\.", lambda m: f"{m[3]} comes {m[1].lower()} {m[2]}."),
        (r"(.*) has (\d+ chapters?)\.", lambda m: f"There {'is' if m[2] == '1 chapter' else 'are'} {m[2]} in {m[1]}."),
        (r'(.*) says: (".*")', lambda m: f"{m[2]} says {m[1]}."),
    )
    result = []
    for one in found:
        turns = [message["content"] for message in one["messages"]]
        for pattern, form in forms:
            turns = [re.sub(f"^{pattern}$", form, turn) for turn in turns]
        if one["messages"][0]["role"] == "user":
            result.append(conversation(*turns))
    return result


def write(name: str, found: list[Conversation]) -> None:
    content = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in found)
    (HERE / name).write_bytes(gzip.compress(content.encode(), mtime=0))


def main() -> None:
    rng, bible = random.Random(0), read_bible()
    found = [*order(), *lengths(bible), *quotes(bible, rng)]
    rng.shuffle(found)
    write("conversations.jsonl.gz", found)
    write("restyled.jsonl.gz", restyled(found))


if __name__ == "__main__":
    main()
