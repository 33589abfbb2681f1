"""The chat format, against token sequences written by hand; what may be trained on; and every bad input."""

import gzip
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chat_cases import SPECIAL, TEMPLATES, by_hand, chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from openv4.data import chat
from openv4.data.chat import (
    DSML,
    EXTRACTED_URL,
    OPTIONAL_TOKENS,
    REMINDER,
    Templates,
    encode,
    encode_batch,
    encode_prompt,
    parse_reply,
    render,
)
from openv4.data.config import DataError
from openv4.data.conversation import TASKS, Conversation, Message, ToolCall, parse_record
from openv4.data.prepare import CONVERSATIONS
from openv4.data.tokenizer import ASSISTANT, BOS, EOS, THINK, THINK_END, USER, load_tokenizer

FUNCTION = {"name": "f", "description": "caf\u00e9 {x}"}
TOOLS = [{"type": "function", "function": FUNCTION}, {"type": "function", "function": {"name": "g"}}]
SCHEMAS = '{"name": "f", "description": "caf\u00e9 {x}"}\n{"name": "g"}'
TOOL_BLOCK = ["# Tools\nWrite <", DSML, "calls> after ", THINK_END, f", {{so}}:\n{SCHEMAS}\nIn JSON."]


def system(content="Be brief.", **keys):
    return {"role": "system", "content": content, **keys}


def developer(content="Search.", **keys):
    return {"role": "developer", "content": content, **keys}


def user(content="Hi", **keys):
    return {"role": "user", "content": content, **keys}


def reply(content="Hello", **keys):
    return {"role": "assistant", "content": content, **keys}


def reminder(content="Monday"):
    return {"role": "latest_reminder", "content": content}


def call(name="f", arguments="{}", id=None):
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | ({"id": id} if id else {})


def result(content="42", id=None):
    return {"role": "tool", "content": content} | ({"tool_call_id": id} if id else {})


ASK = [USER, "Hi", ASSISTANT]
HELLO = ["Hello", EOS]
THOUGHT = {"reasoning_content": "Hmm."}

# Per rule of recipe 11.1: messages, effort, and the tokens by hand; what is trained stands in lists.
GOLDEN: dict[str, tuple[list[dict[str, Any]], str | None, list[Any]]] = {
    "chat": ([user(), reply()], "none", [BOS, *ASK, THINK_END, HELLO]),
    "system": ([system(), user(), reply()], "none", [BOS, "Be brief.", *ASK, THINK_END, HELLO]),
    "empty system": ([system(""), user(), reply()], "none", [BOS, *ASK, THINK_END, HELLO]),
    "chat shows no reasoning": ([user(), reply(**THOUGHT)], "none", [BOS, *ASK, THINK_END, HELLO]),
    "thinking": ([user(), reply(**THOUGHT)], "high", [BOS, *ASK, THINK, ["Hmm.", THINK_END, *HELLO]]),
    "thinking without a thought": ([user(), reply()], "high", [BOS, *ASK, THINK, [THINK_END, *HELLO]]),
    "max": (
        [system(), user(), reply(**THOUGHT)],
        "max",
        [BOS, "Think twice.\n\nBe brief.", *ASK, THINK, ["Hmm.", THINK_END, *HELLO]],
    ),
    "max without system": ([user(), reply()], "max", [BOS, "Think twice.\n\n", *ASK, THINK, [THINK_END, *HELLO]]),
    "auto with reasoning": ([user(), reply(**THOUGHT)], None, [BOS, *ASK, THINK, ["Hmm.", THINK_END, *HELLO]]),
    "auto without": ([user(), reply()], None, [BOS, *ASK, THINK_END, HELLO]),
    "auto looks after the last question": (
        [user(), reply(**THOUGHT), user("Bye"), reply("Ok")],
        None,
        [BOS, *ASK, THINK_END, HELLO, USER, "Bye", ASSISTANT, THINK_END, ["Ok", EOS]],
    ),
    "auto takes a result for no question": (
        [user(), reply(tool_calls=[call()], **THOUGHT), result(), reply("Ok")],
        None,
        # No message has `tools`: the turn with the result is a user turn, so that what was thought before is dropped.
        [
            *[BOS, *ASK, THINK_END],
            [
                *["Hello\n\n<", DSML, "tool_calls>\n<", DSML, 'invoke name="f">\n\n</', DSML, "invoke>\n</", DSML],
                *["tool_calls>", EOS],
            ],
            *[USER, "<tool_result>42</tool_result>", ASSISTANT, THINK],
            [THINK_END, "Ok", EOS],
        ],
    ),
    "earlier reasoning is dropped": (
        [user(), reply(**THOUGHT), user("Bye"), reply("Ok", reasoning_content="Well.")],
        "high",
        [BOS, *ASK, THINK_END, HELLO, USER, "Bye", ASSISTANT, THINK, ["Well.", THINK_END, "Ok", EOS]],
    ),
    "tools keep earlier reasoning": (
        [system(tools=TOOLS), user(), reply(**THOUGHT), user("Bye"), reply("Ok")],
        "high",
        [
            *[BOS, "Be brief.\n\n# Tools\nWrite <", *TOOL_BLOCK[1:], *ASK, THINK],
            ["Hmm.", THINK_END, *HELLO],
            *[USER, "Bye", ASSISTANT, THINK],
            [THINK_END, "Ok", EOS],
        ],
    ),
    "earlier developer messages are dropped": (
        [system(), developer(), user(), reply(**THOUGHT), developer("Again."), reply("Ok")],
        "high",
        [
            *[BOS, "Be brief.", USER, "Hi", ASSISTANT, THINK_END],
            HELLO,
            *[USER, "Again.", ASSISTANT, THINK],
            [THINK_END, "Ok", EOS],
        ],
    ),
    "chat keeps developer messages": (
        [developer(), user(), reply()],
        "none",
        [BOS, USER, "Search.", USER, "Hi", ASSISTANT, THINK_END, HELLO],
    ),
    "developer with tools and format": (
        [developer(tools=TOOLS, response_format={"type": "\u00e9"}), reply()],
        "high",
        [
            *[BOS, USER, "Search.\n\n# Tools\nWrite <", *TOOL_BLOCK[1:-1]],
            TOOL_BLOCK[-1] + "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
            '{"type": "\u00e9"}',
            *[ASSISTANT, THINK],
            [THINK_END, *HELLO],
        ],
    ),
    "response format": (
        [system(response_format={"a": 1}), user(), reply()],
        "none",
        [
            BOS,
            'Be brief.\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{"a": 1}',
            *ASK,
            THINK_END,
            HELLO,
        ],
    ),
    "tool calls": (
        [
            user(),
            reply(
                "",
                tool_calls=[
                    call("f", '{"a": "x\\ny", "b": [1, null, "\u00e9"], "c": true, "d": {"e": 2.5}}'),
                    call("g", {"a": "1"}),
                ],
            ),
        ],
        "none",
        [
            *[BOS, *ASK, THINK_END],
            [
                *["\n\n<", DSML, "tool_calls>\n<", DSML, 'invoke name="f">\n<', DSML],
                *['parameter name="a" string="true">x\ny</', DSML, "parameter>\n<", DSML],
                *['parameter name="b" string="false">[1, null, "\u00e9"]</', DSML, "parameter>\n<", DSML],
                *['parameter name="c" string="false">true</', DSML, "parameter>\n<", DSML],
                *['parameter name="d" string="false">{"e": 2.5}</', DSML, "parameter>\n</", DSML, "invoke>\n<", DSML],
                *['invoke name="g">\n<', DSML, 'parameter name="a" string="true">1</', DSML, "parameter>\n</", DSML],
                *["invoke>\n</", DSML, "tool_calls>", EOS],
            ],
        ],
    ),
    "results come in the order of the calls, texts stay in place": (
        [
            user(),
            reply(tool_calls=[call(id="c1"), call(id="c2"), call(id="c3")]),
            *[result("three", "c3"), user("and"), result("one", "c1"), result("two", "c2"), user("so?")],
            reply("Ok"),
        ],
        "none",
        [
            *[BOS, *ASK, THINK_END],
            [
                *["Hello\n\n<", DSML, "tool_calls>\n<"],
                *[DSML, 'invoke name="f">\n\n</', DSML, "invoke>\n<"] * 2,
                *[DSML, 'invoke name="f">\n\n</', DSML, "invoke>\n</", DSML, "tool_calls>", EOS],
            ],
            USER,
            "<tool_result>one</tool_result>\n\nand\n\n<tool_result>two</tool_result>\n\n"
            "<tool_result>three</tool_result>\n\nso?",
            *[ASSISTANT, THINK_END],
            ["Ok", EOS],
        ],
    ),
    "a result's text blocks": (
        [user(), reply(), result([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), reply("Ok")],
        "none",
        [BOS, *ASK, THINK_END, HELLO, USER, "<tool_result>a\n\nb</tool_result>", ASSISTANT, THINK_END, ["Ok", EOS]],
    ),
    "user messages in a row are one turn": (
        [user(), user("there"), reply()],
        "none",
        [BOS, USER, "Hi\n\nthere", ASSISTANT, THINK_END, HELLO],
    ),
    "but a task ends its turn": (
        [user(task="query"), user("there"), reply()],
        "none",
        [BOS, USER, "Hi", USER, "there", ASSISTANT, THINK_END, HELLO],
    ),
    "a result joins even then": (
        [user(task="query"), result(), reply()],
        "none",
        [BOS, USER, "Hi\n\n<tool_result>42</tool_result>", TASKS["query"], HELLO],
    ),
    "reminder": ([reminder(), user(), reply()], "none", [BOS, REMINDER, "Monday", *ASK, THINK_END, HELLO]),
    "reminder between turns": (
        [user(), reply(), reminder(), user("Bye"), reply("Ok", **THOUGHT)],
        "high",
        [
            *[BOS, *ASK, THINK_END, HELLO, REMINDER, "Monday", USER, "Bye", ASSISTANT, THINK],
            ["Hmm.", THINK_END, "Ok", EOS],
        ],
    ),
    "a reminder after the question finds the reply opened": (
        [user(), reminder(), reply()],
        "high",
        [BOS, *ASK, THINK, REMINDER, "Monday", [THINK_END, *HELLO]],
    ),
    "no end token": ([user(), reply(wo_eos=True)], "none", [BOS, *ASK, THINK_END, ["Hello"]]),
    "weight 0": (
        [user(), reply(weight=0), user("Bye"), reply("Ok", weight=1)],
        "none",
        [BOS, *ASK, THINK_END, *HELLO, USER, "Bye", ASSISTANT, THINK_END, ["Ok", EOS]],
    ),
    "action in chat": ([user(task="action"), reply()], "none", [BOS, *ASK, THINK_END, TASKS["action"], HELLO]),
    "action in thinking": ([user(task="action"), reply()], "high", [BOS, *ASK, THINK, TASKS["action"], HELLO]),
    **{
        name: ([user(task=name), reply(**THOUGHT)], effort, [BOS, USER, "Hi", TASKS[name], HELLO])
        for name, effort in (("query", "none"), ("authority", "high"), ("domain", "high"), ("read_url", "none"))
    },
    "read_url of the URLs found": (
        [user(task="read_url", urls=["http://a", "http://b"]), reply("yes")],
        "none",
        [
            *[
                BOS,
                USER,
                "Hi",
                EXTRACTED_URL,
                "http://a",
                TASKS["read_url"],
                EXTRACTED_URL,
                "http://b",
                TASKS["read_url"],
            ],
            ["yes", EOS],
        ],
    ),
    "title": (
        [user(), reply(task="title", **THOUGHT), reply("Greeting")],
        "high",
        [BOS, *ASK, THINK, ["Hmm.", THINK_END, *HELLO], TASKS["title"], ["Greeting", EOS]],
    ),
    "a task that nothing follows at once is not shown": (
        [user(), reply(task="title"), user("Bye"), reply("Ok")],
        "none",
        [BOS, *ASK, THINK_END, HELLO, USER, "Bye", ASSISTANT, THINK_END, ["Ok", EOS]],
    ),
    "a last question opens a reply": (
        [user(), reply(), user("Bye")],
        "high",
        [BOS, *ASK, THINK_END, HELLO, USER, "Bye", ASSISTANT, THINK],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_tokens_and_mask_are_those_written_by_hand(name):
    messages, effort, parts = GOLDEN[name]
    got = encode(parse_record({"messages": messages}, "f:1"), chat_tokenizer(), effort, TEMPLATES)
    assert got == by_hand(chat_tokenizer(), parts)


def test_a_batch_is_its_conversations():
    conversations = [parse_record({"messages": messages}, "f:1") for messages, _, _ in GOLDEN.values()]
    batch = encode_batch(conversations, chat_tokenizer(), None, TEMPLATES)
    assert batch == [encode(one, chat_tokenizer(), None, TEMPLATES) for one in conversations]


def test_a_tokenizer_without_the_newer_tokens_spells_them():
    """Within a text, as a tokenizer would; what the assistant writes begins with a token of its own."""
    messages = [reminder(), user("Hi", task="query"), reply("Hello", tool_calls=[call()])]
    expected = [
        *[BOS, f"{REMINDER}Monday", USER, f"Hi{TASKS['query']}"],
        [
            f'Hello\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n\n</{DSML}invoke>\n</{DSML}tool_calls>',
            EOS,
        ],
    ]
    bare = chat_tokenizer(complete=False)
    assert [name for name in OPTIONAL_TOKENS if bare.token_to_id(name) is not None] == []
    ids: list[int] = []
    trained: list[bool] = []
    for part in expected:  # `by_hand` would take the spelled names for tokens
        new = []
        for piece in part if isinstance(part, list) else [part]:
            id_ = bare.token_to_id(piece)
            new += bare.encode(piece, add_special_tokens=False).ids if id_ is None else [id_]
        ids, trained = ids + new, trained + [isinstance(part, list)] * len(new)
    got = encode(parse_record({"messages": messages}, "f:1"), bare, "none")
    assert got == (ids, trained)
    assert parse_reply(got.ids[trained.index(True) :], bare) == chat.Reply("", "Hello", (ToolCall("f", {}),), True)


def test_efforts_of_argument_record_and_messages():
    record = {"messages": [user(), reply(**THOUGHT)], "effort": "none"}
    conversation = parse_record(record, "f:1")
    assert THINK_END in [p.text for p in render(conversation, chat.chosen_effort(conversation, None), Templates())]
    efforts = [chat.chosen_effort(conversation, effort) for effort in (None, "none", "high", "max")]
    assert efforts == ["none", "none", "high", "max"]
    assert chat.chosen_effort(replace(conversation, effort=None), None) == "high"
    blank = parse_record({"messages": [user(), reply(reasoning_content=" \n")]}, "f:1")
    assert chat.chosen_effort(blank, None) == "none"


# Other forms of a record.


def test_tools_beside_the_messages_go_to_the_system_message():
    for tools in (TOOLS, json.dumps(TOOLS), [tool["function"] for tool in TOOLS]):
        with_system = parse_record({"messages": [system(), user(), reply()], "tools": tools}, "f:1")
        assert with_system == parse_record({"messages": [system(tools=TOOLS), user(), reply()]}, "f:1")
        without = parse_record({"messages": [user(), reply()], "tools": tools}, "f:1")
        assert without == parse_record({"messages": [system("", tools=TOOLS), user(), reply()]}, "f:1")


def test_sharegpt():
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": "{}"}]
    record = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": json.dumps(calls)},
            {"from": "observation", "value": "42"},
            {"from": "tool", "value": "43"},
            {"from": "gpt", "value": "Hello", "weight": 0},
            {"from": "human", "value": "Bye"},
            {"from": "gpt", "value": "Ok", "reasoning_content": "Hmm."},
        ],
        "tools": json.dumps(TOOLS),
    }
    messages = [
        *[system(tools=TOOLS), user(), reply(None, tool_calls=[call("f", {"x": 1}), call("g")])],
        *[result("42"), result("43"), reply(weight=0), user("Bye"), reply("Ok", **THOUGHT)],
    ]
    assert parse_record(record, "f:1") == parse_record({"messages": messages}, "f:1")
    record["conversations"][1]["value"] = json.dumps(calls[0])
    assert parse_record(record, "f:1").messages[2].tool_calls == (ToolCall("f", {"x": 1}),)


def test_null_is_absence():
    """Arrow writes every key of any message into all of them."""
    nothing = dict.fromkeys(["reasoning_content", "tool_calls", "tool_call_id", "tools", "task", "weight", "wo_eos"])
    padded = [{**nothing, **message} for message in (system(), user(), reply())]
    plain = parse_record({"messages": [system(), user(), reply()]}, "f:1")
    assert parse_record({"messages": padded, "tools": None, "effort": None}, "f:1") == plain
    assert plain == Conversation(
        (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello")), None, "f:1"
    )


BAD: list[tuple[Any, str]] = [
    ([1], "f:1: not a JSON object but list"),
    ({"text": "a"}, r"f:1: needs either 'messages' or 'conversations', it has \['text'\]"),
    ({"messages": [user()], "conversations": []}, "needs either"),
    ({"messages": "Hi"}, "f:1: 'messages' is not a list but str"),
    ({"messages": []}, "f:1: 'messages' is empty"),
    ({"messages": [user()]}, "f:1: no assistant message"),
    ({"messages": [user(), reply(weight=0)]}, "f:1: every assistant message has weight 0"),
    ({"messages": [user(), reply(weight=2)]}, "f:1: message 2: weight=2: must be 0 or 1"),
    ({"messages": [user(), reply()], "effort": "low"}, "f:1: effort='low': must be none, high or max"),
    ({"messages": [user(), "Hello"]}, "f:1: message 2: not a JSON object but str"),
    ({"messages": [user(), {"role": "bot", "content": "x"}]}, "f:1: message 2: unknown role 'bot'; known are system, "),
    ({"messages": [{"content": "x"}]}, "f:1: message 1: unknown role None"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "f:1: message 1: unknown role"),
    ({"messages": [user(5), reply()]}, "f:1: message 1: 'content' is not a string but int"),
    ({"messages": [user({"a": 1}), reply()]}, "f:1: message 1: 'content' is not a string but dict"),
    ({"messages": [user([{"type": "image_url"}]), reply()]}, "message 1: 'content' holds a block that is no text"),
    ({"messages": [user(["Hi"]), reply()]}, "message 1: 'content' holds a block that is no text"),
    ({"messages": [user(""), reply()]}, "f:1: message 1: the user's content is empty"),
    ({"messages": [user(None), reply()]}, "f:1: message 1: the user's content is empty"),
    ({"messages": [user(), reply(" \n", reasoning_content="x")]}, "message 2: the assistant's content is empty"),
    ({"messages": [user(), reply(reasoning_content=5)]}, "message 2: 'reasoning_content' is not a string but int"),
    ({"messages": [user(reasoning_content="x"), reply()]}, "message 1: 'reasoning_content' in a message of role user"),
    ({"messages": [user(tools=TOOLS), reply()]}, "message 1: 'tools' in a message of role user; it belongs to system"),
    ({"messages": [user(task="poem"), reply()]}, "message 1: unknown task 'poem'; known are action, query"),
    ({"messages": [user(task=["title"]), reply()]}, "message 1: unknown task"),
    ({"messages": [user(urls=["http://a"]), reply()]}, "message 1: 'urls' without the task read_url"),
    ({"messages": [user(task="read_url", urls="http://a"), reply()]}, "message 1: 'urls' is not a list of strings"),
    ({"messages": [user(), user(task="query"), reply()]}, "message 2: this user message joins the one before it"),
    ({"messages": [reply()]}, "f:1: message 1: an assistant message with nothing before it to answer"),
    ({"messages": [system(), reminder(), reply()]}, "message 3: an assistant message with nothing before it"),
    ({"messages": [user(), reply(), reply()]}, "f:1: message 3: two assistant messages in a row"),
    ({"messages": [user(), reply(), reminder(), reply()]}, "f:1: message 4: two assistant messages in a row"),
    ({"messages": [user(), {"role": "assistant", "function_call": {}}]}, "message 2: the assistant's content is empty"),
    ({"messages": [user(), {"role": "assistant", "function_call": {"name": "f"}}]}, "message 2: 'function_call' is Op"),
    ({"messages": [user(), reply(tool_calls={})]}, "message 2: 'tool_calls' is not a list but dict"),
    ({"messages": [user(), reply(tool_calls=["f"])]}, "message 2: a tool call needs {'function'"),
    ({"messages": [user(), reply(tool_calls=[{"name": "f"}])]}, "message 2: a tool call needs {'function'"),
    (
        {"messages": [user(), reply(tool_calls=[call("f", '{"a": ')])]},
        r"f:1: message 2: the arguments of tool 'f': not valid JSON \(Expecting value: line 1 column 7",
    ),
    ({"messages": [user(), reply(tool_calls=[call("f", '{"a": NaN}')])]}, r"tool 'f': not valid JSON \(NaN is no JSON"),
    (
        {"messages": [user(), reply(tool_calls=[call("f", "[1]")])]},
        "the arguments of tool 'f' are not a JSON object but",
    ),
    (
        {"messages": [user(), reply(tool_calls=[call("f", None)])]},
        "arguments of tool 'f' are not a JSON object but None",
    ),
    ({"messages": [user(), reply(tool_calls=[call(id=5)])]}, "message 2: the id of a call of 'f' is not a string"),
    (
        {"messages": [user(), reply(tool_calls=[call(id="a")]), result(id="b"), reply()]},
        "f:1: message 3: tool_call_id='b' is the id of no call of the assistant message before it",
    ),
    ({"messages": [user(), result(id="b"), reply()]}, "message 2: tool_call_id='b' is the id of no call"),
    (
        {"messages": [user(), reply(tool_calls=[call(id="a")]), result(id="a"), reply(), result(id="a"), reply()]},
        "message 5: tool_call_id='a' is the id of no call",
    ),
    ({"messages": [user(), result(id=5), reply()]}, "message 2: 'tool_call_id' is not a string but int"),
    ({"messages": [user(), reply()], "tools": {}, "effort": "low"}, "effort='low'"),
    ({"messages": [user(), reply()], "tools": {"name": "f"}}, "f:1: 'tools' is not a list but dict"),
    ({"messages": [user(), reply()], "tools": "[1"}, r"f:1: 'tools': not valid JSON"),
    ({"messages": [user(), reply()], "tools": ["f"]}, r"f:1: tool 1 needs \{'type': 'function'"),
    ({"messages": [user(), reply()], "tools": [*TOOLS, {"function": {}}]}, "f:1: tool 3 needs"),
    ({"messages": [system(tools=TOOLS), user(), reply()], "tools": TOOLS}, "f:1: the tools are given twice"),
    ({"messages": [user(), reply("\ud800")]}, "f:1: message 2: holds half a surrogate pair"),
    (
        {"messages": [user(), reply(tool_calls=[call("f", {"a": ["\udfff"]})])]},
        "f:1: message 2: holds half a surrogate pair",
    ),
    ({"messages": [user(), reply()], "tools": [{"name": "\ud800"}]}, "f:1: holds half a surrogate pair"),
    (
        {"messages": [user(), reply(tool_calls=[call("f", '{"a": "\\ud800"}')])]},
        "f:1: message 2: the arguments of tool 'f': half a surrogate pair",
    ),
    ({"messages": [user(), reply()], "tools": '[{"name": "\\ud800"}]'}, "f:1: 'tools': half a surrogate pair"),
    ({"conversations": [{"from": "bot", "value": "x"}]}, "f:1: message 1: unknown sender 'bot'; known are human"),
    ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "f:1: message 1: unknown sender"),
    ({"conversations": ["x"]}, "f:1: message 1: not a JSON object but str"),
    ({"conversations": [{"from": "human", "value": 5}]}, "f:1: message 1: 'content' is not a string but int"),
    ({"conversations": [{"from": "gpt", "value": "x"}]}, "f:1: message 1: an assistant message with nothing before"),
    (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "f(x)"}]},
        "f:1: message 2: the function call: not valid JSON",
    ),
    (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "[1]"}]},
        "f:1: message 2: a tool call needs",
    ),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_bad_record_is_refused_in_one_line(record, message):
    with pytest.raises(DataError, match=message) as error:
        parse_record(record, "f:1")
    assert str(error.value).startswith("f:1: ") and "\n" not in str(error.value)


# What may be trained on, over random conversations.

GIVEN, WRITTEN = "ZJX", "zjx"  # letters that no special token and no markup has


def words(alphabet):
    return st.text([*alphabet, " ", "\n", "\u00e9"], min_size=0, max_size=6).map(lambda text: alphabet[0] + text)


@st.composite
def conversations(draw):
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append(system(draw(words(GIVEN))))
        if draw(st.booleans()):
            messages[0]["tools"] = [{"function": {"name": "f", "description": draw(words(GIVEN))}}]
        if draw(st.booleans()):
            messages[0]["response_format"] = {draw(words(GIVEN)): 1}
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            messages.append(reminder(draw(words(GIVEN))))
        question = draw(st.sampled_from([user, developer]))(draw(words(GIVEN)))
        question["task"] = draw(st.sampled_from([None, None, None, *TASKS]))
        messages.append(question)
        while True:
            answer = reply(draw(words(WRITTEN)), weight=draw(st.integers(0, 1)))
            answer["reasoning_content"] = draw(st.one_of(st.none(), words(WRITTEN)))
            answer["wo_eos"] = draw(st.sampled_from([False, False, True]))
            calls = draw(
                st.lists(st.dictionaries(words(WRITTEN), st.one_of(words(WRITTEN), st.integers()), max_size=2))
            )
            answer["tool_calls"] = [call("f", arguments, f"c{i}") for i, arguments in enumerate(calls[:3])]
            messages.append(answer)
            if not calls:
                break
            for index in draw(st.permutations(range(len(calls[:3])))):
                messages.append(result(draw(words(GIVEN)), f"c{index}"))
    messages[-1]["weight"] = 1
    return messages


@settings(max_examples=60, deadline=None)
@given(conversations(), st.sampled_from([None, "none", "high", "max"]))
def test_what_is_given_is_never_trained_on(messages, effort):
    tokenizer = chat_tokenizer()
    encoded = encode(parse_record({"messages": messages}, "f:1"), tokenizer, effort, TEMPLATES)
    pairs = list(zip(encoded.ids, encoded.trained, strict=True))
    trained = tokenizer.decode([id_ for id_, mask in pairs if mask], skip_special_tokens=False)
    rest = tokenizer.decode([id_ for id_, mask in pairs if not mask], skip_special_tokens=False)
    assert not set(GIVEN) & set(trained)
    assert not {USER, ASSISTANT, THINK, BOS, REMINDER, *TASKS.values()} & {
        tokenizer.id_to_token(id_) for id_, mask in pairs if mask
    }
    answers = [message for message in messages if message["role"] == "assistant"]
    for count, where in ((1, trained), (0, rest)):
        spoken = [m for m in answers if m["weight"] == count]
        ends = sum(not m["wo_eos"] for m in spoken)
        assert where.count(EOS) == ends, "every end token is trained as its message is"
        for message in spoken:
            assert message["content"] in where, "the content of every turn, earlier ones too"
    if all(message["weight"] for message in answers):
        assert not set(WRITTEN) & set(rest)


@settings(max_examples=40, deadline=None)
@given(conversations(), st.sampled_from(["none", "high", "max"]))
def test_ids_are_those_of_the_whole_string(messages, effort):
    """Any tokenizer given the rendered string, with its special tokens taken from text, finds the same ids; but where a
    given and a written text touch, which a reminder before the answer or a missing end token brings about."""
    tokenizer, whole = chat_tokenizer(), Tokenizer.from_str(chat_tokenizer().to_str())
    conversation = parse_record({"messages": messages}, "f:1")
    pieces = [piece for piece in render(conversation, effort, TEMPLATES) if piece.text]
    if any((a.weight is None) != (b.weight is None) and not (a.special or b.special) for a, b in pairwise(pieces)):
        return
    ids = whole.encode("".join(piece.text for piece in pieces), add_special_tokens=False).ids
    assert encode(conversation, tokenizer, effort, TEMPLATES).ids == ids


@settings(max_examples=40, deadline=None)
@given(conversations(), st.sampled_from(["none", "high", "max"]))
def test_a_prompt_is_the_beginning_and_the_reply_comes_back(messages, effort):
    """For the last answer: generation sees exactly what training showed, and reads back what the assistant meant."""
    tokenizer = chat_tokenizer()
    *history, answer = messages
    encoded = encode(parse_record({"messages": messages}, "f:1"), tokenizer, effort, TEMPLATES).ids
    prompt = encode_prompt(history, tokenizer, effort, TEMPLATES)
    assert encoded[: len(prompt)] == prompt
    if history[-1].get("task") is None:
        assert tokenizer.id_to_token(prompt[-1]) == (THINK_END if effort == "none" else THINK)
        back = parse_reply(encoded[len(prompt) :], tokenizer, effort)
        assert back.reasoning == ("" if effort == "none" else answer["reasoning_content"] or "")
        assert (back.content, back.tool_calls, back.finished) == (answer["content"], (), not answer["wo_eos"])


ARGUMENTS = {"a": 'x\n"</parameter>', "b": [1, None], "c": "12", "d": f"<{DSML}invoke", "e": ""}


def test_calls_come_back_and_half_a_reply_is_no_error():
    tokenizer = chat_tokenizer()
    calls = (ToolCall("f", ARGUMENTS), ToolCall("g", {}), ToolCall("h", {"x": 1.5}))
    tricky = f"See \n\n<{DSML}tool_calls>\n{THINK_END}{EOS}."
    answer = Message("assistant", tricky, "Hm</think>m", calls)
    encoded = encode(Conversation((Message("user", "Hi"), answer)), tokenizer, "high")
    written = [id_ for id_, trained in zip(*encoded, strict=True) if trained]
    whole = parse_reply(written, tokenizer, "high")
    assert whole == chat.Reply("Hm</think>m", tricky, calls, True), "spelled tokens in a text stay text"
    counts = []
    for end in range(len(written)):
        part = parse_reply(written[:end], tokenizer, "high")
        assert not part.finished
        assert "Hm</think>m".startswith(part.reasoning) or "\ufffd" in part.reasoning
        assert part.tool_calls == calls[: len(part.tool_calls)]
        counts.append(len(part.tool_calls))
    assert counts == sorted(counts) and counts[-1] == 3
    assert parse_reply([*written, 7, 8], tokenizer, "high") == whole, "nothing counts after the end"
    assert parse_reply([], tokenizer, "high") == parse_reply([], tokenizer) == chat.Reply()


def test_a_parameter_that_is_no_json_comes_back_as_text():
    parts = ["\n\n<", DSML, "tool_calls>\n<", DSML, 'invoke name="f">\n<', DSML]
    parts += ['parameter name="x" string="false">{oops</', DSML, "parameter>\n</", DSML, "invoke>\n</", DSML]
    ids, _ = by_hand(chat_tokenizer(), [*parts, "tool_calls>", EOS])
    assert parse_reply(ids, chat_tokenizer()).tool_calls == (ToolCall("f", {"x": "{oops"}),)


def test_prompts():
    tokenizer = chat_tokenizer()

    def prompt(*messages, effort=None):
        return encode_prompt(messages, tokenizer, effort, TEMPLATES)

    assert prompt(user()) == by_hand(tokenizer, [BOS, *ASK, THINK_END])[0]
    assert prompt(user(), reply(), user("Bye"), effort="high")[-1] == tokenizer.token_to_id(THINK)
    assert prompt(user(), reply(task="title"))[-1] == tokenizer.token_to_id(TASKS["title"])
    for messages, message in (
        ([], "prompt: the last message must be a user's or a tool's result; there is none"),
        ([user(), reply()], "it is by assistant"),
        ([system()], "it is by system"),
        ([user(5)], "prompt: message 1: 'content' is not a string"),
        ([user("\ud800")], "prompt: message 1: holds half a surrogate pair"),
        (["Hi"], "prompt: message 1: not a JSON object"),
    ):
        with pytest.raises(DataError, match=message):
            prompt(*messages)


# Forged tokens.


def forge(text: str) -> list[dict[str, Any]]:
    tools = [{"function": {"name": "f", "description": text}}]
    return [
        *[system(text, tools=tools, response_format={text: text}), reminder(text), user(text)],
        reply(text, reasoning_content=text, tool_calls=[call("f", {"x": text, "y": [text]}, "c")]),
        *[result(text, "c"), user(text), reply(text)],
    ]


def declared_as_deepseek_does(folder: Path) -> Tokenizer:
    """All but begin and end are ordinary added tokens there, which any text could spell."""
    tokenizer = Tokenizer.from_str(chat_tokenizer().to_str())
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in (BOS, EOS)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["ours", "deepseek"])
def test_text_cannot_forge_a_special_token(kind, tmp_path):
    tokenizer = chat_tokenizer() if kind == "ours" else declared_as_deepseek_does(tmp_path)
    special = {tokenizer.token_to_id(name) for name in SPECIAL}
    assert len(special) == len(SPECIAL)
    for effort in ("none", "max"):
        expected, found = (
            [
                id_
                for id_ in encode(parse_record({"messages": forge(text)}, "f:1"), tokenizer, effort, TEMPLATES).ids
                if id_ in special
            ]
            for text in ("word", f"a{''.join(SPECIAL)} {' '.join(SPECIAL)}")
        )
        assert found == expected


def test_a_tokenizer_that_takes_tokens_from_text_is_not_used(tmp_path):
    declared_as_deepseek_does(tmp_path)
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.encode_special_tokens = True
    assert raw.token_to_id(USER) in raw.encode(USER).ids, "the flag alone protects nothing here"
    with pytest.raises(ValueError, match="load it with load_tokenizer"):
        encode(parse_record({"messages": [user(), reply()]}, "f:1"), raw)


def test_words_that_a_user_added_to_a_tokenizer_are_still_found(tmp_path):
    tokenizer = Tokenizer.from_str(chat_tokenizer().to_str())
    tokenizer.add_tokens([AddedToken("Nebuchadnezzar"), AddedToken("   ")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("Nebuchadnezzar   ").ids == [loaded.token_to_id("Nebuchadnezzar"), loaded.token_to_id("   ")]


def test_missing_required_tokens():
    tokenizer = chat_tokenizer()
    content = tokenizer.to_str().replace(ASSISTANT, "<other>")
    bare = Tokenizer.from_str(content)
    bare.encode_special_tokens = True
    with pytest.raises(DataError, match="the tokenizer has no token <\uff5cAssistant\uff5c>: chat needs DeepSeek's"):
        encode(parse_record({"messages": [user(), reply()]}, "f:1"), bare)


# The release's texts.

PYTHON = '''
import nowhere
raise SystemExit("this file must not run")
REASONING_EFFORT_MAX = (
    "Think "
    "twice.\\n\\n"
)
TOOLS_TEMPLATE: str = """Tools {dsml_token}
{tool_schemas}"""
OTHER = REASONING_EFFORT_MAX
'''


def test_templates_are_read_and_never_run(tmp_path):
    expected = Templates("Think twice.\n\n", "Tools {dsml_token}\n{tool_schemas}")
    (tmp_path / "encoding_dsv4.py").write_text(PYTHON)
    assert Templates.read(tmp_path / "encoding_dsv4.py") == expected
    keys = {"max_effort": expected.max_effort, "tool_block": expected.tool_block}
    (tmp_path / "a.json").write_text(json.dumps(keys))
    assert Templates.read(tmp_path / "a.json") == expected
    (tmp_path / "b.json").write_text(json.dumps({"max_effort": "x"}))
    assert Templates.read(tmp_path / "b.json") == Templates("x", None)
    assert Templates("x", None).digest != Templates(None, "x").digest


def test_templates_beside_the_weights_must_be_the_released_ones(tmp_path, monkeypatch):
    assert Templates.find(tmp_path) == Templates()
    (tmp_path / "encoding").mkdir()
    file = tmp_path / "encoding" / "encoding_dsv4.py"
    file.write_text(PYTHON)
    with pytest.raises(DataError, match=r"encoding_dsv4\.py: REASONING_EFFORT_MAX is not DeepSeek-V4's") as error:
        Templates.find(tmp_path)
    assert f"chat_templates={file}" in str(error.value) and "\n" not in str(error.value)
    named = Templates.read(file)
    released = []
    for name, text in (("REASONING_EFFORT_MAX", named.max_effort), ("TOOLS_TEMPLATE", named.tool_block)):
        digest = hashlib.sha256(text.encode()).hexdigest()
        released.append((name, len(text), digest[:8], digest[-4:]))
    monkeypatch.setattr(chat, "_RELEASED", tuple(released))
    assert Templates.find(tmp_path) == named
    file.rename(tmp_path / "encoding_dsv4.py")
    assert Templates.find(tmp_path) == named
    assert chat.find_templates(None, tmp_path / "tokenizer.json") == named
    monkeypatch.setattr(chat, "_RELEASED", (released[0], ("TOOLS_TEMPLATE", 1, *released[1][2:])))
    with pytest.raises(DataError, match="TOOLS_TEMPLATE is not DeepSeek-V4's"):
        Templates.find(tmp_path)
    assert chat.find_templates(str(tmp_path / "encoding_dsv4.py"), tmp_path) == named, "a file named is taken as it is"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.py", None, "cannot be read"),
        ("a.py", "x = (", "cannot be read"),
        ("a.py", "x = 1", "holds neither REASONING_EFFORT_MAX nor TOOLS_TEMPLATE"),
        ("a.py", "def f():\n    TOOLS_TEMPLATE = 'x'", "holds neither"),
        ("a.py", "\nTOOLS_TEMPLATE = 'a' + b", "line 2: TOOLS_TEMPLATE is no plain string"),
        ("a.py", "TOOLS_TEMPLATE = 'a'", r"has the fields \[\]; it needs tool_schemas"),
        ("a.py", "TOOLS_TEMPLATE = '{tool_schemas}{tools}'", r"the fields \['tool_schemas', 'tools'\]"),
        ("a.py", "TOOLS_TEMPLATE = '{tool_schemas'", "braces do not match"),
        ("a.json", "{", "cannot be read"),
        ("a.json", "[]", "a JSON list, no object"),
        ("a.json", "{}", "holds neither max_effort nor tool_block"),
        ("a.json", '{"max_effort": 5}', "max_effort is no string"),
    ],
)
def test_template_files_that_do_not_serve(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        Templates.read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_what_needs_a_missing_template_says_so():
    offers = parse_record({"messages": [system(tools=TOOLS), user(), reply()]}, "f:7")
    with pytest.raises(DataError, match=r"^f:7: the conversation offers tools.*set chat_templates="):
        encode(offers, chat_tokenizer())
    with pytest.raises(DataError, match=r"^f:7: effort=max needs the max-effort prefix.*set chat_templates="):
        encode(replace(offers, messages=offers.messages[1:]), chat_tokenizer(), "max")


# The shipped conversations.


def test_the_shipped_conversations_are_what_the_script_writes(tmp_path):
    folder = CONVERSATIONS.parent
    copy = tmp_path / "make_conversations.py"
    copy.write_text((folder / "make_conversations.py").read_text())
    (tmp_path / "king_james.jsonl.gz").symlink_to(folder / "king_james.jsonl.gz")
    subprocess.run([sys.executable, str(copy)], check=True, timeout=60)
    shipped = gzip.decompress(CONVERSATIONS.read_bytes())
    assert gzip.decompress((tmp_path / "conversations.jsonl.gz").read_bytes()) == shipped
    assert len(CONVERSATIONS.read_bytes()) < 150_000
    records = [json.loads(line) for line in shipped.splitlines()]
    parsed = [parse_record(record, f"line {number}") for number, record in enumerate(records, 1)]
    assert len(parsed) == 726
    assert f"{len(parsed)} short conversations" in (folder / "README.md").read_text()
    efforts = {chat.chosen_effort(one, None) for one in parsed}
    assert efforts == {"none", "high"}
    contents = {message.content for one in parsed for message in one.messages}
    assert {"After Genesis comes Exodus.", "Ruth has 4 chapters."} <= contents
    with gzip.open(folder / "king_james.jsonl.gz") as file:
        verses = json.loads(file.readline())["text"].splitlines()
    quoted = {text for text in contents if text.startswith("Genesis 1:") and " says: " in text}
    assert quoted <= {f'Genesis 1:{number} says: "{verse}"' for number, verse in enumerate(verses, 1)}
