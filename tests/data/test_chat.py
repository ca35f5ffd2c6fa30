"""Cells as text or messages, and conversations as prompt and reply."""

from __future__ import annotations

import string
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.chat import ROLES, common_prefix, split_reply, to_messages, to_text
from rlhf.data.records import LeftOutError
from tests.data.helpers import assistant, user
from tests.examples import examples


def system(content):
    return {"role": "system", "content": content}


def tool(content):
    return {"role": "tool", "content": content}


def left_out(call, *args):
    with pytest.raises(LeftOutError) as caught:
        call(*args)
    return caught.value


# --- text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("Start here.", "Start here."), (" two\r\n ", " two\r\n "), ("none", "none"),
        (0, "0"), (-7, "-7"), (2.5, "2.5"), (10**30, "1" + "0" * 30), (Decimal("1.20"), "1.20"),
    ],
)  # fmt: skip
def test_texts_and_numbers_are_text(value, text):
    assert to_text(value, "chosen") == text


@pytest.mark.parametrize(
    ("value", "reason", "detail"),
    [
        (None, "chosen is missing", ""),
        (float("nan"), "chosen is missing", ""),
        (Decimal("NaN"), "chosen is missing", ""),
        ("", "chosen is empty", ""),
        (" \t\u3000\n", "chosen is empty", r"text ' \t\u3000\n'"),
        (True, "chosen is true or false", "bool True"),
        (float("-inf"), "chosen is an infinite number", ""),
        ("half \ud83d", "chosen holds half a character", r"a lone surrogate in text 'half \ud83d'"),
        ("a\0b\0", "chosen holds NUL characters", r"text 'a\x00b\x00'"),
        ([], "chosen is an empty list", ""),
        (["one", "two"], "chosen is a list", "a list of 2: ['one', 'two']"),
        ({"a": 1, "b": []}, "chosen is an object", "an object with ['a', 'b']"),
        (b"raw", "chosen is neither text nor a number", "bytes b'raw'"),
    ],
)
def test_other_values_are_left_out(value, reason, detail):
    found = left_out(to_text, value, "chosen")
    assert (found.reason, found.detail) == (reason, detail)
    assert not found.is_choice


@pytest.mark.parametrize(
    ("value", "cure"),
    [
        ({"score": 1.0, "answer": "Look."}, "data.chosen_column=pos.answer"),
        ({"id": "7", "content": "Look."}, "data.chosen_column=pos.content"),
        ({"id": " ", "messages": [{"role": "user"}]}, "data.chosen_column=pos.messages"),
        ({"a.b": "a dot is a path", 3: "x", "": "y"}, "give a column of texts"),
        ({"half \ud83d": "x"}, r"data.chosen_column=pos.half \ud83d"),
    ],
)
def test_the_cure_for_an_object_is_the_field_to_read(value, cure):
    assert left_out(to_text, value, "chosen", "pos").cure == cure
    assert left_out(to_messages, value, "chosen", "pos").cure == cure


def test_without_another_name_the_column_is_called_like_the_field():
    assert left_out(to_text, {"a": "x"}, "rejected").cure == "data.rejected_column=rejected.a"


def test_a_detail_holds_the_beginning_of_a_long_value():
    assert left_out(to_text, "x" * 500 + "\0", "prompt").detail == f"text '{'x' * 20}\\x00'"
    assert len(left_out(to_text, [["word " * 900] * 900] * 900, "prompt").detail) < 90
    assert len(left_out(to_text, dict.fromkeys(map(str, range(9000))), "prompt").detail) < 90


def test_a_number_that_python_does_not_write_out():
    found = left_out(to_text, 10**5000, "chosen")
    assert found.reason == "chosen is a number of thousands of digits"
    found = left_out(to_text, [10**5000], "chosen")
    assert found.detail == "a list of 1: a number of thousands of digits"


# --- messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "messages"),
    [
        ([user("q"), assistant("a")], [user("q"), assistant("a")]),
        (user("q"), [user("q")]),
        ([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
         [user("q"), assistant("a")]),
        ({"from": "gpt", "value": "a", "weight": 0.5}, [assistant("a")]),
        ([{"role": "prompter", "text": "q", "lang": "en"}], [user("q")]),
        ([{"speaker": "Bot", "message": "a"}], [assistant("a")]),
        ([["user", "q"], ("bot", "a")], [user("q"), assistant("a")]),
        ([{"role": " User\n", "content": " q "}], [user(" q ")]),
        ([{"role": "DEVELOPER", "content": ""}, user("q")], [system(""), user("q")]),
        ([user("q"), {"role": "ipython", "content": 12}], [user("q"), tool("12")]),
        ([user([{"type": "text", "text": "a "}, "b", {"text": "c"}])], [user("a bc")]),
        ([user({"type": "input_text", "text": "q", "image": None})], [user("q")]),
        ([{**user("q"), "from": None, "value": None, "tool_calls": None, "function_call": ""}],
         [user("q")]),
        ([{"role": None, "from": "human", "content": None, "value": "q"}], [user("q")]),
        ([{**assistant("a"), "tool_calls": []}], [assistant("a")]),
    ],
)  # fmt: skip
def test_chats_in_their_common_forms(value, messages):
    assert to_messages(value, "prompt") == messages


CALL = [{"id": "c1", "function": {"name": "weather", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "prompt is missing"),
        ("", "prompt is empty"),
        ("text", "prompt is no list of messages"),
        (5, "prompt is no list of messages"),
        (False, "prompt is true or false"),
        ([], "prompt is an empty list"),
        ({}, "prompt is an object"),
        ({"text": "without a role"}, "prompt is an object"),
        (["a", "b"], "prompt is a list of texts"),
        ([user("q"), "a"], "prompt has an item that is no message"),
        ([user("q"), None], "prompt has an item that is no message"),
        ([["user", "q", "more"]], "prompt has an item that is no message"),
        ([{"content": "q"}], "prompt has a message without a role"),
        ([{"role": "manager", "content": "q"}], "prompt has an unknown role"),
        ([{"role": 1, "content": "q"}], "prompt has an unknown role"),
        ([["Hi", "Hello"]], "prompt has an unknown role"),
        ([user(None)], "prompt has a message without content"),
        ([user(float("nan"))], "prompt has a message without content"),
        ([{"role": "user"}], "prompt has a message without content"),
        ([user(True)], "prompt has a message that is no text"),
        ([user(float("inf"))], "prompt is an infinite number"),
        ([user(" ")], "prompt is empty"),
        ([user([])], "prompt is empty"),
        ([user("q"), assistant("\n")], "prompt has an empty message"),
        ([user("q"), tool("")], "prompt has an empty message"),
        ([user("half \ud83d")], "prompt holds half a character"),
        ([user("a\0")], "prompt holds NUL characters"),
        ([user("q"), {**assistant(None), "tool_calls": CALL}], "prompt holds tool calls"),
        ([user("q"), {**assistant("I look."), "tool_calls": CALL}], "prompt holds tool calls"),
        ({**assistant(""), "function_call": {"name": "f"}}, "prompt holds tool calls"),
        ([{"from": "function_call", "value": "{}"}], "prompt holds tool calls"),
        ([assistant([{"type": "tool_use", "name": "f"}])], "prompt holds tool calls"),
        ([user([{"type": "image_url", "image_url": {"url": "x"}}])], "prompt holds an image"),
        ([user([{"type": "text", "text": "q"}, {"type": "image"}])], "prompt holds an image"),
        ([user([{"image": b"png"}])], "prompt holds an image"),
        ([user([{"type": "input_audio"}])], "prompt holds audio"),
        ([user([{"type": "video"}])], "prompt holds a video"),
        ([user([{"type": "thinking", "text": "t"}])],
         "prompt has a message with a part that is no text"),
        ([user([None])], "prompt has a message with a part that is no text"),
        ([user([{"type": ["text"]}])], "prompt has a message with a part that is no text"),
    ],
)  # fmt: skip
def test_other_chats_are_left_out(value, reason):
    assert left_out(to_messages, value, "prompt").reason == reason


def test_details_name_the_role_and_the_turn():
    found = left_out(to_messages, [{"role": "manager", "content": "q"}], "prompt")
    assert found.detail == "the role is text 'manager'"
    found = left_out(to_messages, [user("q"), assistant(""), user("q")], "prompt")
    assert found.detail == "message 2 of 3, of the assistant"


# --- conversations ----------------------------------------------------------------------------

P, C = user("How?"), assistant("So.")
S = system("Be short.")


@pytest.mark.parametrize(
    ("messages", "prompt", "expected"),
    [
        ([C], "How?", "How?"),
        ([C], [S, P], [S, P]),
        ([P, C], "How?", "How?"),
        ([user(" how? \n"), C], "How?", "How?"),
        ([user("Ｈow?"), C], [P], [P]),
        ([S, P, C], [S, P], [S, P]),
        ([P, C], [S, P], [S, P]),
        ([P, C, P, C], [P, C, P], [P, C, P]),
        ([C], None, None),
        ([P, C], None, [P]),
        ([S, P, C, P, C], None, [S, P, C, P]),
        ([P, C, tool("12"), C], None, [P, C, tool("12")]),
    ],
)
def test_a_conversation_is_split_before_its_reply(messages, prompt, expected):
    assert split_reply(messages, prompt, "chosen") == (expected, "So.")


@pytest.mark.parametrize(
    ("messages", "prompt", "reason"),
    [
        ([], "How?", "chosen is an empty list"),
        ([P], "How?", "chosen does not end with an assistant message"),
        ([P, C, tool("12")], None, "chosen does not end with an assistant message"),
        ([user("Who?"), C], "How?", "chosen belongs to another prompt"),
        ([user("How so?"), C], "Howso?", "chosen belongs to another prompt"),
        ([user("Who?"), C, P, C], "How?", "chosen belongs to another prompt"),
        ([assistant("How?"), P, C], "How?", "chosen belongs to another prompt"),
        ([system("Be long."), P, C], [S, P], "chosen belongs to another prompt"),
        ([S, C], [S, P], "chosen belongs to another prompt"),
        ([S, P, C], [P], "chosen has a system turn that the prompt lacks"),
        ([C, tool("12"), C], [P], "chosen is a reply of several messages"),
        ([P, C, tool("12"), C], [S, P], "chosen is a reply of several messages"),
        ([S, P, C, C], [S, P], "chosen is a reply of several messages"),
        ([P, C, C], None, "chosen is a reply of several messages"),
        ([P, C, P, C], "How?", "chosen goes on after the prompt with more turns than a reply"),
    ],
)
def test_conversations_that_are_no_reply_to_the_prompt(messages, prompt, reason):
    assert left_out(split_reply, messages, prompt, "chosen").reason == reason


def test_the_detail_counts_the_messages_of_a_long_reply():
    found = left_out(split_reply, [P, C, tool("12"), C], [S, P], "chosen")
    assert found.detail == "3 messages after the prompt"
    found = left_out(split_reply, [S, P, C, P, C], [S, P], "chosen")
    assert found.detail == "3 messages after the prompt"


@pytest.mark.parametrize(
    ("a", "b", "count"),
    [
        ([], [P], 0),
        ([P, C], [P, assistant("No.")], 1),
        ([S, P, C], [S, user(" How?\n"), assistant("so.")], 2),
        ([P, C], [P, C], 2),
        ([user("So.")], [C], 0),
    ],
)
def test_common_prefix(a, b, count):
    assert common_prefix(a, b) == common_prefix(b, a) == count


# --- any value --------------------------------------------------------------------------------


def result(call, *args):
    try:
        return call(*args)
    except LeftOutError as error:
        return error


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(),
    st.text(st.characters(), max_size=5),  # with surrogates
    st.sampled_from(["user", "gpt", "System", "text", "image", "function_call"]),
)  # fmt: skip
KEYS = st.sampled_from(
    [
        *("role", "from", "speaker", "content", "value", "text", "type", "image", "tool_calls"),
        *("message", ""),
    ]
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4)
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(sorted(ROLES)) | SCALARS, "content": st.text(max_size=4) | JSON}
)


@given(JSON | MESSAGES | st.lists(MESSAGES, min_size=1, max_size=3))
@settings(max_examples=examples(150), deadline=None)
def test_any_value_is_used_or_has_a_reason(value):
    for call in (to_text, to_messages):
        found = result(call, value, "prompt")
        if isinstance(found, LeftOutError):
            assert found.reason.startswith("prompt ")
            assert found.reason.isprintable()
            f"{found.reason}{found.detail}{found.cure}".encode()
            continue
        if call is to_text:
            assert found.strip()
            found.encode()
        else:
            assert found
            assert {m["role"] for m in found} <= {"user", "assistant", "system", "tool"}
            assert all(m["content"].strip() or m["role"] == "system" for m in found)
            "".join(m["content"] for m in found).encode()


@given(
    st.lists(st.sampled_from([P, C, S, tool("12")]), max_size=4),
    st.none() | st.just("How?") | st.lists(st.sampled_from([P, C, S]), min_size=1, max_size=3),
)
@settings(max_examples=examples(200), deadline=None)
def test_a_split_returns_the_last_message_and_keeps_a_given_prompt(messages, prompt):
    split = result(split_reply, messages, prompt, "chosen")
    if isinstance(split, LeftOutError):
        assert split.reason.startswith("chosen ")
        return
    found, reply = split
    assert reply == messages[-1]["content"]
    if prompt is None:
        assert (found or []) == messages[:-1]
    else:
        assert found == prompt


def test_role_names_are_in_the_form_in_which_they_are_looked_up():
    assert all(name == name.strip().lower() and set(name) <= set(string.ascii_lowercase)
               for name in ROLES)  # fmt: skip
    assert all(ROLES[role] == role for role in ROLES.values())
