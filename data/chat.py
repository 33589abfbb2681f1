"""Conversations to tokens in DeepSeek-V4's chat format (recipe 11.1), and replies back from tokens.

`encode` gives a conversation's tokens and which of them the assistant writes; `encode_prompt` and `parse_reply` serve
generation.

A conversation is first rendered to pieces, in which special tokens stand apart from text. Only such a piece becomes a
special token's id; the spelling of one inside a text of the data stays text, so data cannot forge a turn.
"""

import ast
import hashlib
import itertools
import json
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from .config import DataError, Effort
from .conversation import (
    QUESTIONS,
    TASKS,
    Conversation,
    Message,
    ToolCall,
    check_order,
    openai_message,
    refuse_surrogates,
    to_json,
)
from .tokenizer import ASSISTANT, BOS, EOS, THINK, THINK_END, USER

DSML = "\uff5cDSML\uff5c"
REMINDER = "<\uff5clatest_reminder\uff5c>"
EXTRACTED_URL = "<\uff5cextracted_url\uff5c>"
REQUIRED_TOKENS = (BOS, EOS, USER, ASSISTANT, THINK, THINK_END)
OPTIONAL_TOKENS = (DSML, REMINDER, EXTRACTED_URL, *TASKS.values())  # a tokenizer without one spells it out

# The two texts of the release that this project does not copy.


@dataclass(frozen=True)
class Templates:
    """DeepSeek's prefix for maximal effort and its block that explains tools; None where no file gave them.

    `tool_block` holds the fields of `str.format` in `_TOOL_FIELDS`.
    """

    max_effort: str | None = None
    tool_block: str | None = None

    @classmethod
    def read(cls, path: Path) -> "Templates":
        """From a release's `encoding_dsv4.py`, which is parsed but never run, or a JSON file with the same two keys.

        Raises:
            DataError: the file is missing or of another kind, holds neither text, or a tool block without its fields.
        """
        try:
            content = path.read_text(encoding="utf-8")
            found = _json_strings(content) if path.suffix == ".json" else _python_strings(content)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(
                f"chat_templates={path} cannot be read ({_first_line(error)}): name the encoding_dsv4.py of a "
                "DeepSeek-V4 release, or a .json with max_effort and tool_block"
            ) from error
        if found == cls():
            names = "max_effort nor tool_block" if path.suffix == ".json" else "REASONING_EFFORT_MAX nor TOOLS_TEMPLATE"
            raise DataError(f"chat_templates={path} holds neither {names}: name the encoding_dsv4.py of a release")
        if found.tool_block is not None:
            _check_tool_block(found.tool_block, path)
        return found

    @classmethod
    def find(cls, folder: Path) -> "Templates":
        """Those beside the weights or the tokenizer in `folder`; empty where there are none.

        Raises:
            DataError: a file is there, but with other texts than DeepSeek-V4's.
        """
        for path in (folder / "encoding_dsv4.py", folder / "encoding" / "encoding_dsv4.py"):
            if path.is_file():
                found = cls.read(path)
                for text, (name, length, head, tail) in zip(
                    (found.max_effort, found.tool_block), _RELEASED, strict=True
                ):
                    digest = hashlib.sha256((text or "").encode()).hexdigest()
                    if text is not None and (len(text), digest[: len(head)], digest[-len(tail) :]) != (
                        length,
                        head,
                        tail,
                    ):
                        raise DataError(
                            f"{path}: {name} is not DeepSeek-V4's (SHA-256 {digest[:8]}, expected {head}), probably "
                            f"another model's; to use it all the same, set chat_templates={path}"
                        )
                return found
        return cls()

    @property
    def digest(self) -> str:
        """SHA-256 over both texts."""
        return hashlib.sha256(json.dumps([self.max_effort, self.tool_block]).encode()).hexdigest()


def find_templates(named: str | None, tokenizer: Path) -> Templates:
    """From the file `named`, else from the folder of the `tokenizer`, a file or a folder."""
    if named is not None:
        return Templates.read(Path(named))
    return Templates.find(tokenizer if tokenizer.is_dir() else tokenizer.parent)


# Name, length and the SHA-256's beginning and end of DeepSeek-V4's texts (recipe 11.1).
_RELEASED = (("REASONING_EFFORT_MAX", 476, "f7a24f3b", "50f7"), ("TOOLS_TEMPLATE", 1075, "09b7269d", "1fd8"))
_TOOL_FIELDS = {"dsml_token": DSML, "thinking_start_token": THINK, "thinking_end_token": THINK_END, "tool_schemas": ""}


def _json_strings(content: str) -> Templates:
    values = json.loads(content)
    if not isinstance(values, dict):
        raise ValueError(f"a JSON {type(values).__name__}, no object")
    for key in ("max_effort", "tool_block"):
        if not isinstance(values.get(key), str | None):
            raise ValueError(f"{key} is no string")
    return Templates(values.get("max_effort"), values.get("tool_block"))


def _python_strings(content: str) -> Templates:
    values: dict[str, str] = {}
    for node in ast.parse(content).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name) and target.id in ("REASONING_EFFORT_MAX", "TOOLS_TEMPLATE"):
                if not (isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)):
                    raise ValueError(f"line {node.lineno}: {target.id} is no plain string")
                values[target.id] = node.value.value
    return Templates(values.get("REASONING_EFFORT_MAX"), values.get("TOOLS_TEMPLATE"))


def _check_tool_block(block: str, path: Path) -> None:
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(block) if name is not None}
    except ValueError as error:
        raise DataError(f"chat_templates={path}: the tool block's braces do not match ({error})") from error
    if not {"tool_schemas"} <= fields <= set(_TOOL_FIELDS):
        raise DataError(
            f"chat_templates={path}: the tool block has the fields {sorted(fields)}; it needs tool_schemas, and none "
            f"but {', '.join(sorted(_TOOL_FIELDS))}"
        )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


# From messages to pieces of text and special tokens.


class Piece(NamedTuple):
    """A stretch of text, or the spelling of one special token.

    `weight` is None in what the assistant is given; in what it writes, whether that counts for the loss.
    """

    text: str
    special: bool = False
    weight: int | None = None


def chosen_effort(conversation: Conversation, effort: Effort | None) -> Effort:
    """`effort`, else the record's own, else "high" if the assistant reasons after the last question, else "none"."""
    if effort is not None or conversation.effort is not None:
        return effort or conversation.effort or "none"
    after = itertools.takewhile(lambda message: message.role not in QUESTIONS, reversed(conversation.messages))
    return "high" if any(message.reasoning.strip() for message in after) else "none"


def render(conversation: Conversation, effort: Effort, templates: Templates) -> list[Piece]:
    """The whole conversation in order. Where its last message is no assistant's, it ends as a prompt does.

    Raises:
        DataError: the conversation needs a text that `templates` lacks.
    """
    thinking = effort != "none"
    turns = _turns(conversation.messages)
    keeps = any(turn.tools for turn in turns)
    last = _last_question(turns)
    if thinking and not keeps:  # earlier developer messages go; earlier reasoning is passed over below
        turns = [turn for index, turn in enumerate(turns) if turn.role != "developer" or index >= last]
        last = _last_question(turns)

    pieces = [Piece(BOS, special=True)]
    if effort == "max":
        pieces += _trusted(_need(templates.max_effort, "effort=max needs the max-effort prefix", conversation.where))
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            answers_task = index > 0 and turns[index - 1].task is not None
            pieces += _reply(turn, thinking and not answers_task and (keeps or index > last))
        else:
            pieces += _given(turn, templates, conversation.where)
        if index + 1 == len(turns) or turns[index + 1].role in ("assistant", "latest_reminder"):
            pieces += _opening(turn, thinking, keeps or index >= last)
    return pieces


def _last_question(turns: Sequence[Message]) -> int:
    return max((index for index, turn in enumerate(turns) if turn.role in QUESTIONS), default=-1)


def _turns(messages: Iterable[Message]) -> list[Message]:
    """Messages with tool results and user texts that follow each other joined to one user turn.

    Results come in the order of the calls, at the places that results have in the turn.
    """
    turns: list[Message] = []
    order: dict[str | None, int] = {}
    blocks: list[tuple[int | None, str]] = []  # of the turn at hand: a result's rank, or None for a user's text
    for message in messages:
        if message.role not in ("user", "tool"):
            if message.tool_calls:
                order = {call.id: index for index, call in enumerate(message.tool_calls) if call.id is not None}
            turns.append(message)
            continue
        if not (turns and turns[-1].role == "user" and (message.role == "tool" or turns[-1].task is None)):
            turns.append(replace(message, role="user"))
            blocks = []
        if message.role == "tool":
            blocks.append((order.get(message.call_id, 0), f"<tool_result>{message.content}</tool_result>"))
        else:
            blocks.append((None, message.content))
        results = iter(sorted((block for block in blocks if block[0] is not None), key=lambda block: block[0] or 0))
        content = "\n\n".join(text if rank is None else next(results)[1] for rank, text in blocks)
        turns[-1] = replace(turns[-1], content=content)
    return turns


def _given(turn: Message, templates: Templates, where: str) -> list[Piece]:
    """What the assistant is given: a turn of any role but its own."""
    token = {"user": USER, "developer": USER, "latest_reminder": REMINDER}.get(turn.role)
    pieces = [] if token is None else [Piece(token, special=True)]
    pieces.append(Piece(turn.content))
    if turn.tools:
        block = _need(templates.tool_block, "the conversation offers tools, which need the tool block", where)
        schemas = "\n".join(to_json(tool) for tool in turn.tools)
        pieces.append(Piece("\n\n"))
        for text, name, _, _ in string.Formatter().parse(block):
            pieces += _trusted(text)
            if name is not None:
                pieces.append(Piece(schemas) if name == "tool_schemas" else Piece(_TOOL_FIELDS[name], special=True))
    if turn.response_format:
        # The sentence is part of the format: another one would be other tokens.
        rule = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        pieces.append(Piece(f"\n\n{rule}{to_json(turn.response_format)}"))
    return pieces


def _reply(turn: Message, reasons: bool) -> list[Piece]:
    """What the assistant writes."""
    pieces = [Piece(turn.reasoning), Piece(THINK_END, special=True)] if reasons else []
    pieces.append(Piece(turn.content))
    if turn.tool_calls:
        pieces += [Piece("\n\n"), *_tag("tool_calls"), Piece("\n")]
        for call in turn.tool_calls:
            pieces += [*_tag(f'invoke name="{call.name}"'), Piece("\n")]
            for index, (key, value) in enumerate(call.arguments.items()):
                spelled = value if isinstance(value, str) else to_json(value)
                kind = "true" if isinstance(value, str) else "false"
                pieces.append(Piece("\n" if index else ""))
                pieces += [*_tag(f'parameter name="{key}" string="{kind}"'), Piece(spelled), *_tag("parameter", "</")]
            pieces += [Piece("\n"), *_tag("invoke", "</"), Piece("\n")]
        pieces += _tag("tool_calls", "</")
    if turn.ends:
        pieces.append(Piece(EOS, special=True))
    return [piece._replace(weight=turn.weight) for piece in pieces]


def _tag(content: str, bracket: str = "<") -> list[Piece]:
    return [Piece(bracket), Piece(DSML, special=True), Piece(f"{content}>")]


def _opening(turn: Message, thinking: bool, reasons: bool) -> list[Piece]:
    """What stands between a turn and the reply to it."""
    if turn.task == "action":
        names = [ASSISTANT, THINK if thinking else THINK_END, TASKS["action"]]
    elif turn.urls:
        pairs = (
            (Piece(EXTRACTED_URL, special=True), Piece(url), Piece(TASKS["read_url"], special=True))
            for url in turn.urls
        )
        return [piece for pair in pairs for piece in pair]
    elif turn.task is not None:
        names = [TASKS[turn.task]]
    elif turn.role in QUESTIONS:
        names = [ASSISTANT, THINK if thinking and reasons else THINK_END]
    else:
        names = []
    return [Piece(name, special=True) for name in names]


def _trusted(text: str) -> list[Piece]:
    """A template's text, in which special tokens may be spelled out."""
    names = (*REQUIRED_TOKENS, *OPTIONAL_TOKENS)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
    return [Piece(part, part in names) for part in parts]


def _need(text: str | None, what: str, where: str) -> str:
    if text is None:
        raise DataError(
            f"{where}: {what} of DeepSeek-V4's release: set chat_templates=<its encoding_dsv4.py>, or keep that file "
            "beside the tokenizer"
        )
    return text


# From pieces to tokens.


class Encoded(NamedTuple):
    """A conversation's token ids, and for each whether the loss counts it: what the assistant wrote with weight 1."""

    ids: list[int]
    trained: list[bool]


def encode(
    conversation: Conversation, tokenizer: Tokenizer, effort: Effort | None = None, templates: Templates | None = None
) -> Encoded:
    """A conversation as tokens, from the begin token on.

    Args:
        tokenizer: as `load_tokenizer` gives it.
        effort: for all conversations alike; None takes each record's own, or what `chosen_effort` finds.

    Raises:
        DataError: the tokenizer lacks one of `REQUIRED_TOKENS`, or the conversation needs a missing template.
    """
    return encode_batch([conversation], tokenizer, effort, templates)[0]


def encode_batch(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    effort: Effort | None = None,
    templates: Templates | None = None,
) -> list[Encoded]:
    """`encode` of each, with the tokenizer's threads."""
    templates = templates or Templates()
    rendered = [render(c, chosen_effort(c, effort), templates) for c in conversations]
    return _tokenize(rendered, tokenizer)


def encode_prompt(
    messages: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    effort: Effort | None = None,
    templates: Templates | None = None,
) -> list[int]:
    """Tokens of OpenAI messages, up to where the assistant begins to write; `effort` None is "none".

    Raises:
        DataError: as `parse_record` and `encode`, or the last message leaves nothing to answer.
    """
    refuse_surrogates({"messages": list(messages)}, "prompt")
    parsed = [openai_message(message, f"prompt: message {number}") for number, message in enumerate(messages, 1)]
    check_order(parsed, "prompt")
    if not parsed or (parsed[-1].role not in (*QUESTIONS, "tool") and parsed[-1].task is None):
        last = f"it is by {parsed[-1].role}" if parsed else "there is none"
        raise DataError(f"prompt: the last message must be a user's or a tool's result; {last}")
    pieces = render(Conversation(tuple(parsed), where="prompt"), effort or "none", templates or Templates())
    return _tokenize([pieces], tokenizer)[0].ids


def special_token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the chat format's special tokens, those of `OPTIONAL_TOKENS` where the tokenizer has them.

    Raises:
        DataError: one of `REQUIRED_TOKENS` is missing.
        ValueError: the tokenizer would turn a special token's spelling in a text into the token.
    """
    ids = {name: tokenizer.token_to_id(name) for name in (*REQUIRED_TOKENS, *OPTIONAL_TOKENS)}
    missing = [name for name in REQUIRED_TOKENS if ids[name] is None]
    if missing:
        raise DataError(
            f"the tokenizer has no token {' '.join(missing)}: chat needs DeepSeek's, or one that openv4 trained"
        )
    found = {name: id_ for name, id_ in ids.items() if id_ is not None}
    if not set(tokenizer.encode(" ".join(found), add_special_tokens=False).ids).isdisjoint(found.values()):
        raise ValueError("the tokenizer takes special tokens from text: load it with load_tokenizer")
    return found


def _tokenize(rendered: Sequence[Sequence[Piece]], tokenizer: Tokenizer) -> list[Encoded]:
    """Each text between two special tokens is encoded in one go, but never across the border of what is written.

    A tokenizer given the whole string would do the same, except for the border: a prompt ends there, so that no token
    of the reply may depend on what stands before it.
    """
    special = special_token_ids(tokenizer)
    texts: list[str] = []
    plans: list[list[tuple[int | None, int | None]]] = []  # per run its special token's id or None for text, its weight
    for pieces in rendered:
        plan = []
        keyed = (((special.get(p.text) if p.special else None, p.weight), p.text) for p in pieces if p.text)
        for (id_, weight), run in itertools.groupby(keyed, lambda pair: pair[0]):
            joined = [text for _, text in run]
            if id_ is None:
                texts.append("".join(joined))
            plan += [(id_, weight)] * (1 if id_ is None else len(joined))
        plans.append(plan)
    encoded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    result = []
    for plan in plans:
        ids: list[int] = []
        trained: list[bool] = []
        for id_, weight in plan:
            new = next(encoded).ids if id_ is None else [id_]
            ids += new
            trained += [bool(weight)] * len(new)
        result.append(Encoded(ids, trained))
    return result


# Replies.


@dataclass(frozen=True)
class Reply:
    """What a model wrote; `finished` if it wrote the end token. Calls cut short are left out."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finished: bool = False


def parse_reply(ids: Sequence[int], tokenizer: Tokenizer, effort: Effort = "none") -> Reply:
    """The tokens that followed a prompt of this `effort`, taken apart. A reply that ends anywhere is no error."""
    special = special_token_ids(tokenizer)
    ids = list(ids)
    finished = special[EOS] in ids
    if finished:
        ids = ids[: ids.index(special[EOS])]
    reasoning: list[int] = []
    if effort != "none":
        end = ids.index(special[THINK_END]) if special[THINK_END] in ids else len(ids)
        reasoning, ids = ids[:end], ids[end + 1 :]
    # A mark that no text holds, so that only the token itself opens a call.
    mark = "\0" if DSML in special else DSML
    parts = [list(group) for _, group in itertools.groupby(ids, lambda id_: id_ == special.get(DSML))]
    text = "".join(
        mark * len(part) if part[0] == special.get(DSML) else tokenizer.decode(part, skip_special_tokens=False)
        for part in parts
    )
    content, calls, block = text.partition(f"\n\n<{mark}tool_calls>\n")
    return Reply(
        tokenizer.decode(reasoning, skip_special_tokens=False),
        content.replace(mark, DSML),
        tuple(_calls(block, mark)) if calls else (),
        finished,
    )


def _calls(block: str, mark: str) -> Iterable[ToolCall]:
    m = re.escape(mark)
    parameter = re.compile(rf'<{m}parameter name="(.*?)" string="(true|false)">(.*?)</{m}parameter>', re.DOTALL)
    for name, content in re.findall(rf'<{m}invoke name="(.*?)">\n(.*?)\n</{m}invoke>', block, re.DOTALL):
        yield ToolCall(name, {key: _value(text, kind) for key, kind, text in parameter.findall(content)})


def _value(text: str, kind: str) -> Any:
    if kind == "true":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
