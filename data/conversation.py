"""Conversations as JSON records, in OpenAI's form or ShareGPT's, read strictly: one line says what is wrong."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from .config import DataError, Effort

TASKS = {name: f"<\uff5c{name}\uff5c>" for name in ("action", "query", "authority", "domain", "title", "read_url")}

_ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
QUESTIONS = ("user", "developer")
_OWNERS = {  # keys that only messages of these roles may have
    "reasoning_content": ("assistant",),
    "tool_calls": ("assistant",),
    "wo_eos": ("assistant",),
    "tool_call_id": ("tool",),
    "tools": ("system", "developer"),
    "response_format": ("system", "developer"),
    "task": ("system", "developer", "user", "assistant", "latest_reminder"),
    "urls": ("user",),
}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool; `id` is what its result refers to."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """A message.

    Attributes:
        role: system, developer, user, assistant, tool (a result) or latest_reminder.
        reasoning: what an assistant thinks before it answers.
        tools: schemas of the functions that system and developer messages offer.
        response_format: a JSON schema that replies must follow.
        task: a quick instruction after this message, one of `TASKS`; the next assistant message is its result.
        urls: of the task read_url, found in the message: each is followed by the task's token.
        call_id: the call that a tool's result answers.
        ends: an end token follows an assistant's message.
        weight: 0 leaves an assistant's message out of the loss.
    """

    role: str
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    response_format: Any = None
    task: str | None = None
    urls: tuple[str, ...] = ()
    call_id: str | None = None
    ends: bool = True
    weight: int = 1


@dataclass(frozen=True)
class Conversation:
    """Messages in order, the effort that the record asks for, and where it stands (`file:line`)."""

    messages: tuple[Message, ...]
    effort: Effort | None = None
    where: str = "conversation"


def parse_record(record: Any, where: str) -> Conversation:
    """A conversation from a JSON object: OpenAI's `messages` or ShareGPT's `conversations`.

    Beside them the object may hold `tools`, `effort` and, in ShareGPT's form, `system`; other keys are passed over.

    Raises:
        DataError: one line with `where`, the number of the message (from 1) and what is wrong with it.
    """
    if not isinstance(record, dict):
        _refuse(where, f"not a JSON object but {type(record).__name__}; a line is one conversation")
    refuse_surrogates(record, where)
    forms = {"messages": openai_message, "conversations": _sharegpt_message}
    given = [key for key in forms if key in record]
    if len(given) != 1:
        _refuse(where, f"needs either 'messages' or 'conversations', it has {sorted(record)}")
    entries = record[given[0]]
    if not isinstance(entries, list):
        _refuse(where, f"{given[0]!r} is not a list but {type(entries).__name__}")
    if not entries:
        _refuse(where, f"{given[0]!r} is empty")
    messages = [forms[given[0]](entry, f"{where}: message {number}") for number, entry in enumerate(entries, 1)]
    check_order(messages, where)
    if given[0] == "conversations" and record.get("system"):
        messages.insert(0, openai_message({"role": "system", "content": record["system"]}, where))
    if tools := _tools(record.get("tools"), where):
        if messages[0].role != "system":
            messages.insert(0, Message("system"))
        if messages[0].tools:
            _refuse(where, "the tools are given twice, beside the messages and in the system message")
        messages[0] = replace(messages[0], tools=tools)
    effort = record.get("effort")
    if effort not in (None, "none", "high", "max"):
        _refuse(where, f"effort={effort!r}: must be none, high or max")
    weights = [message.weight for message in messages if message.role == "assistant"]
    if not any(weights):
        _refuse(where, "every assistant message has weight 0" if weights else "no assistant message: nothing to learn")
    return Conversation(tuple(messages), effort, where)


def _refuse(where: str, problem: str) -> NoReturn:
    raise DataError(f"{where}: {problem}")


def refuse_surrogates(record: dict[str, Any], where: str) -> None:
    if _has_surrogates(record):
        entries = record.get("messages", record.get("conversations"))
        numbers = [n for n, e in enumerate(entries, 1) if _has_surrogates(e)] if isinstance(entries, list) else []
        at = f"{where}: message {numbers[0]}" if numbers else where
        _refuse(at, "holds half a surrogate pair, which is no text")


def _has_surrogates(value: Any) -> bool:
    try:
        to_json(value).encode()
    except UnicodeEncodeError:
        return True
    return False


def openai_message(entry: Any, at: str) -> Message:
    if not isinstance(entry, dict):
        _refuse(at, f"not a JSON object but {type(entry).__name__}")
    role = entry.get("role")
    if role not in _ROLES:
        _refuse(at, f"unknown role {role!r}; known are {', '.join(_ROLES)}")
    if entry.get("function_call"):
        _refuse(at, "'function_call' is OpenAI's old form; write it as 'tool_calls'")
    for key, owners in _OWNERS.items():
        if entry.get(key) and role not in owners:
            _refuse(at, f"{key!r} in a message of role {role}; it belongs to {' or '.join(owners)}")
    weight, ends, task = entry.get("weight", 1), not entry.get("wo_eos"), entry.get("task")
    if weight is None or role != "assistant":
        weight = 1
    if weight not in (0, 1):
        _refuse(at, f"weight={weight!r}: must be 0 or 1")
    if task is not None and task not in tuple(TASKS):
        _refuse(at, f"unknown task {task!r}; known are {', '.join(TASKS)}")
    call_id = entry.get("tool_call_id")
    if not isinstance(call_id, str | None):
        _refuse(at, f"'tool_call_id' is not a string but {type(call_id).__name__}")
    message = Message(
        role,
        _text(entry.get("content"), at, "content"),
        _text(entry.get("reasoning_content"), at, "reasoning_content"),
        _tool_calls(entry.get("tool_calls"), at),
        _tools(entry.get("tools"), at),
        entry.get("response_format"),
        task,
        _urls(entry.get("urls"), task, at),
        call_id,
        ends,
        int(weight),
    )
    if role not in ("system", "tool") and not message.content.strip() and not message.tool_calls:
        _refuse(at, f"the {role}'s content is empty")
    return message


def _sharegpt_message(entry: Any, at: str) -> Message:
    if not isinstance(entry, dict):
        _refuse(at, f"not a JSON object but {type(entry).__name__}")
    source, value = entry.get("from"), entry.get("value")
    if source not in tuple(_SHAREGPT_ROLES):
        _refuse(at, f"unknown sender {source!r}; known are {', '.join(_SHAREGPT_ROLES)}")
    rest = {key: content for key, content in entry.items() if key not in ("from", "value", "role", "content")}
    if source != "function_call":
        return openai_message({**rest, "role": _SHAREGPT_ROLES[source], "content": value}, at)
    calls = _json(value, at, "the function call") if isinstance(value, str) else value
    calls = [{"function": call} for call in (calls if isinstance(calls, list) else [calls])]
    return openai_message({**rest, "role": "assistant", "tool_calls": calls}, at)


def _text(value: Any, at: str, key: str) -> str:
    """A string, or OpenAI's list of text blocks, which a blank line separates; null is empty."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        _refuse(at, f"{key!r} is not a string but {type(value).__name__}")
    for block in value:
        if not (isinstance(block, dict) and block.get("type") == "text" and isinstance(block.get("text"), str)):
            _refuse(at, f"{key!r} holds a block that is no text: {json.dumps(block, ensure_ascii=False)[:60]}")
    return "\n\n".join(block["text"] for block in value)


def _urls(value: Any, task: str | None, at: str) -> tuple[str, ...]:
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(url, str) and url for url in value):
        _refuse(at, "'urls' is not a list of strings")
    if task != "read_url":
        _refuse(at, f"'urls' without the task read_url (task={task!r})")
    return tuple(value)


def _tool_calls(value: Any, at: str) -> tuple[ToolCall, ...]:
    if value is not None and not isinstance(value, list):
        _refuse(at, f"'tool_calls' is not a list but {type(value).__name__}")
    calls = []
    for call in value or ():
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            _refuse(at, "a tool call needs {'function': {'name': ..., 'arguments': ...}}")
        what = f"the arguments of tool {name!r}"
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments, at, what)
        if not isinstance(arguments, dict):
            _refuse(at, f"{what} are not a JSON object but {type(arguments).__name__}")
        if not isinstance(call.get("id"), str | None):
            _refuse(at, f"the id of a call of {name!r} is not a string")
        calls.append(ToolCall(name, arguments, call.get("id")))
    return tuple(calls)


def _tools(value: Any, at: str) -> tuple[dict[str, Any], ...]:
    """The functions of OpenAI's list of tools, which may also be its JSON text, or a list of bare functions."""
    if isinstance(value, str) and value:
        value = _json(value, at, "'tools'")
    if value and not isinstance(value, list):
        _refuse(at, f"'tools' is not a list but {type(value).__name__}")
    functions = []
    for number, tool in enumerate(value or (), 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            _refuse(at, f"tool {number} needs {{'type': 'function', 'function': {{'name': ..., 'parameters': ...}}}}")
        functions.append(function)
    return tuple(functions)


def _json(content: str, at: str, what: str) -> Any:
    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(content, parse_constant=refuse_constant)
    except ValueError as error:
        raise DataError(f"{at}: {what}: not valid JSON ({error})") from error
    if _has_surrogates(value):  # escaped within the string, hence not seen in the record
        _refuse(at, f"{what}: half a surrogate pair, which is no text")
    return value


def check_order(messages: Sequence[Message], where: str) -> None:
    """Whether each message has its place.

    Raises:
        DataError: an answer without a question, two answers in a row, a result that no call asked for.
    """
    question: Message | None = None  # what the next assistant message answers; a reminder may stand between
    turn: Message | None = None  # the first message of the user turn at hand
    calls: set[str | None] = set()
    for number, message in enumerate(messages, 1):
        at = f"{where}: message {number}"
        if message.role == "assistant":
            if question is None or (question.role == "system" and question.task is None):
                _refuse(at, "an assistant message with nothing before it to answer; begin with a user message")
            if question.role == "assistant" and question.task is None:
                _refuse(at, "two assistant messages in a row; join them, or give the first a task")
            calls = {call.id for call in message.tool_calls}
        if message.role == "tool" and message.call_id is not None and not calls & {None, message.call_id}:
            _refuse(at, f"tool_call_id={message.call_id!r} is the id of no call of the assistant message before it")
        if message.role not in ("user", "tool"):
            turn = None
        elif turn is None or (message.role == "user" and turn.task is not None):
            turn = message
        elif message.task is not None:
            _refuse(
                at, "this user message joins the one before it, and its task would be lost; give the first the task"
            )
        if message.role != "latest_reminder":
            question = message


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
