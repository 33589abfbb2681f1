"""`openv4 preview` and `openv4 prepare kind=chat` as users type them."""

import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from chat_cases import chat_tokenizer

from openv4.launch import cli

MESSAGES = [
    {"role": "system", "content": "Be [bold]brief[/bold]."},
    {"role": "user", "content": "Say <think>."},
    {"role": "assistant", "content": "caf\u00e9 [red]", "reasoning_content": "Hm."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ok", "weight": 0},
]
BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    chat_tokenizer().save(str(tmp_path / "tokenizer.json"))
    lines = [json.dumps({"messages": MESSAGES}), "", json.dumps({"messages": MESSAGES[1:3]})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def preview(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str, fails: bool = False, command: str = "preview") -> tuple[str, str]:
        given = [f"input={folder}/a.jsonl", f"tokenizer={folder}", *arguments]
        monkeypatch.setattr(sys, "argv", ["openv4", command, *given])
        with pytest.raises(SystemExit, match="2") if fails else nullcontext():
            cli.main()
        result = capsys.readouterr()
        return result.out, result.err

    return run


def test_without_colour_marks_show_what_is_trained(preview, folder):
    out, _ = preview()
    legend, text, counts = out.splitlines()
    assert legend == "{+trained+}  prompt  special token"
    prompt = f"{BOS}Be [bold]brief[/bold].{USER}Say <think>.{ASSISTANT}</think>"
    assert text == f"{prompt}{{+caf\u00e9 [red]{EOS}+}}{USER}Bye{ASSISTANT}</think>Ok{EOS}"
    assert re.fullmatch(
        rf"{re.escape(str(folder))}/a\.jsonl:1: 5 messages, effort none, \d+ tokens, (\d+) trained \(\d+%\)", counts
    )
    trained = len(chat_tokenizer().encode("caf\u00e9 [red]").ids) + 1
    assert f", {trained} trained" in counts


def test_index_counts_conversations_and_effort_is_taken(preview):
    out, _ = preview("index=1")
    assert f"{ASSISTANT}<think>{{+Hm.</think>caf\u00e9 [red]{EOS}+}}" in out
    assert "a.jsonl:3: 2 messages, effort high" in out
    out, _ = preview("index=1", "effort=none")
    assert f"{ASSISTANT}</think>{{+caf\u00e9" in out and "effort none" in out


def test_with_colour_what_is_trained_is_underlined(preview, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out, _ = preview()
    assert "{+" not in out
    underlined = "".join(re.findall(r"\x1b\[(?:\d+;)*4(?:;\d+)*m([^\x1b]*)\x1b\[0m", out.split("\n", 1)[1]))
    assert underlined == f"caf\u00e9 [red]{EOS}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index=2"], "index=2: .*a.jsonl holds 2 conversations, counted from 0"),
        (["index=-1"], "index=-1 must be at least 0"),
        (["effort=low"], "effort"),
        (["effort=max"], r"a\.jsonl:1: effort=max needs the max-effort prefix"),
        (["chat_templates=nowhere.py"], r"chat_templates=nowhere\.py cannot be read"),
        (["tokenizer=nowhere"], "no tokenizer at nowhere"),
    ],
)
def test_mistakes_are_one_line(preview, arguments, message):
    _, err = preview(*arguments, fails=True)
    assert re.search(message, err) and err.startswith("error: ") and err.count("\n") == 1


def test_prepare_says_what_there_is_to_train_on(preview, folder):
    out, _ = preview("kind=chat", f"output={folder}/out", command="prepare")
    counts = re.findall(
        r"(train|validation): (\d+) tokens \((\d+) trained\), 1 conversations, .* longest (\d+) tok", out
    )
    assert sorted(name for name, *_ in counts) == ["train", "validation"]
    for _, tokens, trained, longest in counts:
        assert 0 < int(trained) < int(tokens) == int(longest)
    limit = min(int(tokens) for _, tokens, _, _ in counts)
    some = [f"max_tokens={limit}", "too_long=drop", "validation_fraction=0"]
    out, _ = preview("kind=chat", f"output={folder}/short", *some, command="prepare")
    assert f"skipped: 1 conversations of more than {limit} tokens" in out
    _, err = preview("kind=chat", f"output={folder}/no", f"max_tokens={limit}", command="prepare", fails=True)
    assert "a.jsonl:1: the conversation has" in err and not (folder / "no").exists()
