"""Chats that are written out as text, and text that only looks like one."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.chat import to_messages
from rlhf.data.markup import markup_of, recognise
from rlhf.data.shared_marks import Marks
from rlhf.data.special_tokens import (
    END_TOKENS,
    MISSING_WORDS,
    break_token,
    edge_token,
    is_missing_word,
    strip_end_tokens,
    without_prompt,
)
from tests.data.helpers import assistant, user
from tests.examples import examples


def system(content):
    return {"role": "system", "content": content}


def parsed(text):
    """Return the name of a text's markup and what it says; (None, None) for other text."""
    markup = markup_of(text)
    if markup is None or markup.parse is None:
        return markup and markup.name, None
    return markup.name, markup.parse(text)


ASK, SO, WHY = user("How do I fix it?"), assistant("Look at it."), user("Why?")
CODE = "Run this:\n\n    if x:\n        y()\n"
CHAT_ML, LLAMA_3, LLAMA_2 = "ChatML", "Llama 3", "Llama 2 [INST]"
HUMAN, VICUNA, GUANACO = (
    "Human/Assistant transcript",
    "Vicuna USER: ASSISTANT:",
    "### Human ### Assistant",
)
ZEPHYR, ALPACA = "Zephyr/Phi <|user|>", "Alpaca ### Instruction"
BELOW = "Below is an instruction that describes a task. Write a response.\n\n"
EXAMPLES = [
    # transcripts
    (HUMAN, "\n\nHuman: How do I fix it?\n\nAssistant: Look at it.\n\nHuman: Why?\n\nAssistant:",
     [ASK, SO, WHY]),
    (HUMAN, "Human: How do I fix it?\nAssistant: Look at it.", [ASK, SO]),
    (HUMAN, "Human: How do I fix it?\nAssistant:", [ASK]),
    (HUMAN, "Human: How do I fix it?\r\n\r\nAssistant: Look at it.\r\n", [ASK, SO]),
    (HUMAN, "System: Be short.\nHuman: Why?\nAssistant: \n", [system("Be short."), WHY]),
    (HUMAN, "Human: Why?\nHuman: How do I fix it?\nAssistant:", [WHY, ASK]),
    (HUMAN, f"\n\nHuman:  two blanks \n\nAssistant: {CODE}\n\nHuman: Why?\n\nAssistant: ",
     [user(" two blanks "), assistant(CODE.rstrip("\n")), WHY]),
    (HUMAN, "Human: What does Human: mean?\nAssistant: A mark, as Assistant: is.",
     [user("What does Human: mean?"), assistant("A mark, as Assistant: is.")]),
    ("User/Assistant transcript", "User: Why?\n\nAssistant: Look at it.", [WHY, SO]),
    ("Human/AI transcript", "Human: Why?\nAI: Look at it.\nHuman: Why?", [WHY, SO, WHY]),
    (VICUNA, "A chat between a user and an assistant. USER: Why? ASSISTANT: Look at it.</s>"
     "USER: Why? ASSISTANT:", [system("A chat between a user and an assistant."), WHY, SO, WHY]),
    (VICUNA, "USER: Why?\nASSISTANT: Look at it.</s>", [WHY, SO]),
    (GUANACO, "### Human: Why?### Assistant: Look at it.### Human: Why?", [WHY, SO, WHY]),
    (GUANACO, "### Human: Why?\n### Assistant: Look at it.\n", [WHY, SO]),
    (ALPACA, BELOW + "### Instruction:\nWhy?\n\n### Response:\nLook at it.", [WHY, SO]),
    (ALPACA, "### Instruction:\nTranslate.\n\n### Input:\nA cat.\n\n### Response:",
     [user("Translate.\n\nA cat.")]),
    (ALPACA, "### Instruction:\nWhy?\n\n### Input:\n\n\n### Response:\n", [WHY]),
    # chat templates
    (CHAT_ML, "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
     "<|im_start|>assistant\n", [system("Be short."), WHY]),
    (CHAT_ML, "<|im_start|>user\n Why?\n<|im_end|>\n<|im_start|>assistant", [user(" Why?\n")]),
    (CHAT_ML, "<|im_start|>assistant\nLook at it.<|im_end|>", [SO]),
    (CHAT_ML, "<|im_start|>user<|im_sep|>Why?<|im_end|><|im_start|>assistant<|im_sep|>", [WHY]),
    (CHAT_ML, "<|im_start|>pirate\nArr!<|im_end|>\n", [{"role": "pirate", "content": "Arr!"}]),
    (LLAMA_3, "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\nLook at it.<|eot_id|>", [WHY, SO]),
    (LLAMA_3, "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n", [WHY]),
    (LLAMA_2, "<s>[INST] <<SYS>>\nBe short.\n<</SYS>>\n\nWhy? [/INST] Look at it. </s>"
     "<s>[INST] Why? [/INST]", [system("Be short."), WHY, SO, WHY]),
    (LLAMA_2, "[INST] Why? [/INST]Look at it.</s>[INST]  Why?[/INST]",
     [WHY, SO, user(" Why?")]),
    ("Gemma", "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n", [WHY]),
    ("Gemma", "<start_of_turn>model\nLook at it.<end_of_turn>\n<eos>", [SO]),
    (ZEPHYR, "<|system|>\n</s>\n<|user|>\nWhy?</s>\n<|assistant|>\nLook at it.</s>",
     [system(""), WHY, SO]),
    (ZEPHYR, "<|user|>\nWhy?<|end|>\n<|assistant|>\n", [WHY]),
    (ZEPHYR, "<|user|>\nWhy?\n<|assistant|>\nLook at it.", [WHY, SO]),
    ("DeepSeek", "<｜begin▁of▁sentence｜>Be short.<｜User｜>Why?<｜Assistant｜>Look at it."
     "<｜end▁of▁sentence｜><｜User｜>Why?<｜Assistant｜>", [system("Be short."), WHY, SO, WHY]),
    ("Command R", "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Why?<|END_OF_TURN_TOKEN|>"
     "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", [WHY]),
    # JSON and Python
    ("JSON", ' [{"role": "user", "content": "Why?"}]\n', [WHY]),
    ("JSON", '{"from": "gpt", "value": "Yes."}', {"from": "gpt", "value": "Yes."}),
    ("JSON", '[{"from": "human", "value": "a"}, {"from": "x", "value": "b"}]',
     [{"from": "human", "value": "a"}, {"from": "x", "value": "b"}]),
    ("JSON", '[{"role": "pirate", "content": "Arr!"}]', [{"role": "pirate", "content": "Arr!"}]),
    ("JSON", '[["user", "Why?"], ["bot", "Yes."]]', [["user", "Why?"], ["bot", "Yes."]]),
    ("JSON list", '["a", "b"]', ["a", "b"]),
    ("Python repr", "[{'role': 'user', 'content': \"it's \\\\d\"}]", [user("it's \\d")]),
    ("Python repr", "{'content': None, 'role': 'assistant', 'tool_calls': [1]}",
     {"content": None, "role": "assistant", "tool_calls": [1]}),
    ("Python repr", "[('user', 'Why?')]", [("user", "Why?")]),
    ("Python list", "['a', \"b\"]", ["a", "b"]),
    ("numpy repr", "[{'content': 'Why?', 'role': 'user'}\n {'content': 'So.', 'role': 'bot'}]",
     None),
    ("numpy repr", "array([{'content': 'Why?', 'role': 'user'}], dtype=object)", None),
    ("numpy repr", "[{'content': 'Why?', 'role': 'user', 'weight': nan}]", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "value"), EXAMPLES)
def test_markups_are_recognised_and_parsed(name, text, value):
    assert parsed(text) == (name, value)


PROSE = [
    "", " \n", "Look at it.", "Why? Look.\n\n- one\n- two",
    "In the log it says:\n\nHuman: hello\n\nAssistant: hi",
    "Human: a word for a person", "Human: hello\n\nHuman: hello?", "Assistant: Look.\nHuman: Why?",
    "Note: USER: and ASSISTANT: are marks.", "USER: admin", "The SUPERUSER: x ASSISTANT: y",
    "### Instruction:\nOnly a heading", "Notes\n### Instruction:\nx\n### Response:\ny",
    "### Input:\nx\n### Response:\ny", "### Instruction:\na\n### Response:\nb\n### Input:\nc",
    '{"city": "Oslo"}', "[1, 2, 3]", '"text"', "[]", "{}", "null", '["a", 1]', "[[1, 2], [3, 4]]",
    '[["a", "b"], ["c", "d"]]', '[["user", 1]]', '{"role": "engineer", "content": "x"}',
    '[{"from": "Oslo", "value": 3}, {"from": "Bergen", "value": 4}]',
    '[{"role": "user"}]', '[{"content": "x"}]', '{"role": "user", "content": ',
    "{'city': 'Oslo'}", "[{'city': 'Oslo'}]", "{'role': 'user', 'content': f()}",
    "print([{'role': 'user', 'content': 'x'}])", "[{'role': 'user', 'content': 'x'}] is a list",
    "Use <|im_start|>user\nhi<|im_end|>", "<|im_start|>user\nhi<|im_end|> is ChatML.",
    "<|im_start|>\nhi<|im_end|>", "<|im_start|>user\nsee <|im_start|> here<|im_end|>",
    "<|im_start|>assistant\n", "[INST] no end", "[INST] a [/INST] b [/INST] c",
    "[INST] a <<SYS>>b<</SYS>> [/INST]", "[INST] <<SYS>>b [/INST]", "[INSTALL] the package",
    "Be short.<｜User｜>Why?", "<start_of_turn> is a token", "<|user|> says</s> more",
    "<s>struck</s>", "<b>bold</b>",
]  # fmt: skip


@pytest.mark.parametrize("text", PROSE)
def test_other_text_stays_text(text):
    assert markup_of(text) is None


def test_a_column_has_the_markup_of_most_of_its_texts():
    chat, other = '[{"role": "user", "content": "Why?"}]', "Look at it."
    assert recognise([]) is recognise(["", " "]) is recognise([other]) is None
    assert recognise([chat] * 6 + [other] * 4 + [""] * 9).name == "JSON"
    assert recognise([chat] * 5 + [other] * 4) is None
    assert recognise([chat, "Human: Why?\nAssistant: So."]) is None
    assert recognise(["[]", chat]) is None


def test_one_message_in_numpys_text_looks_as_in_pythons():
    one = "[{'role': 'user', 'content': 'a'}]"
    two = "[{'role': 'user', 'content': 'a'}\n {'role': 'user', 'content': 'a'}]"
    assert recognise([one, one]).name == "Python repr"
    assert recognise([one, one, two]).name == "numpy repr"


def test_a_parser_returns_none_for_text_in_another_form():
    for _, text, _ in EXAMPLES:
        parse = getattr(markup_of(text), "parse", None)
        if parse is not None:
            assert parse("Look at it.") is parse("") is None


# --- rendering and parsing --------------------------------------------------------------------


def rendered_lines(messages, names, separator, is_open):
    text = separator.join(f"{names[m['role']]}: {m['content']}" for m in messages)
    return text + (f"{separator}{names['assistant']}:" if is_open else "")


def human(messages, is_open):
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return "\n\n" + rendered_lines(messages, names, "\n\n", is_open)


def langchain(messages, is_open):
    names = {"user": "Human", "assistant": "AI", "system": "System"}
    return rendered_lines(messages, names, "\n", is_open)


def guanaco(messages, is_open):
    names = {"user": "### Human", "assistant": "### Assistant", "system": "### System"}
    return rendered_lines(messages, names, " ", is_open)


def chat_ml(messages, is_open):
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + ("<|im_start|>assistant\n" if is_open else "")


def llama_3(messages, is_open):
    def header(role):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    text = "".join(f"{header(m['role'])}{m['content']}<|eot_id|>" for m in messages)
    return "<|begin_of_text|>" + text + (header("assistant") if is_open else "")


def llama_2(messages, is_open):
    text, first = "", ""
    for m in messages:
        if m["role"] == "system":
            first = f"<<SYS>>\n{m['content']}\n<</SYS>>\n\n"
        elif m["role"] == "user":
            text += f"<s>[INST] {first}{m['content']} [/INST]"
            first = ""
        else:
            text += f" {m['content']} </s>"
    return text


def gemma(messages, is_open):
    names = {"user": "user", "assistant": "model", "system": "system"}
    text = "".join(
        f"<start_of_turn>{names[m['role']]}\n{m['content']}<end_of_turn>\n" for m in messages
    )
    return "<bos>" + text + ("<start_of_turn>model\n" if is_open else "")


def zephyr(messages, is_open):
    text = "".join(f"<|{m['role']}|>\n{m['content']}</s>\n" for m in messages)
    return text + ("<|assistant|>\n" if is_open else "")


def deep_seek(messages, is_open):
    forms = {
        "system": "{}",
        "user": "<｜User｜>{}",
        "assistant": "<｜Assistant｜>{}<｜end▁of▁sentence｜>",
    }
    text = "".join(forms[m["role"]].format(m["content"]) for m in messages)
    return "<｜begin▁of▁sentence｜>" + text + ("<｜Assistant｜>" if is_open else "")


def as_json(messages, is_open):
    return json.dumps(messages)


def as_python(messages, is_open):
    return repr(messages)


MARKS = re.compile(r"(Human|Assistant|System|AI):|</?s>|<[|｜]|\[/?INST\]|<</?SYS|_of_turn>")
PIECES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6),
    st.sampled_from(
        ["Human", "Assistant", ":", " ", "\n", "\n\n", "\n    x = [1]", "<b>", "[", "# ", "'", '"']
    ),
)
TEXTS = (
    st.lists(PIECES, min_size=1, max_size=5)
    .map(lambda pieces: "".join(pieces).strip("\r\n"))
    .filter(lambda text: text.strip() and not MARKS.search(text))
)


@st.composite
def conversations(draw):
    """Return messages, and whether the reply to them is to follow."""
    start = draw(st.booleans())
    turns = draw(st.integers(1, 4))
    roles = ["system"] * start + ["user", "assistant", "user", "assistant"][: max(turns, 1)]
    return [{"role": role, "content": draw(TEXTS)} for role in roles], roles[-1] == "user"


RENDERERS = [
    (human, HUMAN), (langchain, "Human/AI transcript"), (guanaco, GUANACO), (chat_ml, CHAT_ML),
    (llama_3, LLAMA_3), (llama_2, LLAMA_2), (gemma, "Gemma"), (zephyr, ZEPHYR),
    (deep_seek, "DeepSeek"), (as_json, "JSON"), (as_python, "Python repr"),
]  # fmt: skip


@pytest.mark.parametrize(("render", "name"), RENDERERS)
@given(conversation=conversations())
@settings(max_examples=examples(40), deadline=None)
def test_a_rendered_conversation_is_parsed_exactly(render, name, conversation):
    messages, is_open = conversation
    text = render(messages, is_open)
    assert parsed(text) == (name, messages)
    assert recognise([text, ""]).name == name


@given(conversation=conversations())
@settings(max_examples=examples(40), deadline=None)
def test_what_is_parsed_is_a_chat(conversation):
    messages, is_open = conversation
    _, found = parsed(chat_ml(messages, is_open))
    assert to_messages(found, "prompt") == messages


# --- tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        *((f"Look. {token}", ("Look.", True)) for token in END_TOKENS),
        ("Look.<|im_end|>\n<|endoftext|> \n", ("Look.", True)),
        ("<s> Look.</s>", ("Look.", True)),
        ("<|begin_of_text|>Look.\n", ("Look.\n", True)),
        ("</s>", ("", True)),
        (" Look.\n", (" Look.\n", False)),
        ("Look.</s> More.", ("Look.</s> More.", False)),
        ("It cost <s>10</s>", ("It cost <s>10</s>", False)),
        ("It cost <s>10</s></s>", ("It cost <s>10</s>", True)),
        ("<s>10</s> 8 now", ("<s>10</s> 8 now", False)),
        ("<s>10</s> 8 now<|im_end|>", ("<s>10</s> 8 now", True)),
        ("", ("", False)),
    ],
)
def test_end_tokens(reply, expected):
    assert strip_end_tokens(reply) == expected


@pytest.mark.parametrize(
    ("reply", "token"),
    [
        ("Look. <|im_end|>\n<|im_start|>user\nWhy?", "<|im_end|>"),
        ("Look.</s>More", "</s>"), ("Look.</s><|user|>\nWhy?", "</s>"),
        ("<s>a</s>b.</s>c", "</s>"), ("Look <|eot_id|><|start_header_id|>user", "<|eot_id|>"),
        ("<s>old</s> new", None), ('<s class="x">old</s> new', None), ("<b>bold</b>", None),
        ("a < b > c [INSTALL] <|x|>", None), ("", None), ("GPT-2 emits <|endoftext|> there.", None),
        ("Use [INST] and [/INST].", None), ("It is `</s>`.", None), ("A `.</s>` B", None),
        ("ChatML:\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>", None),
        ("```\nHi.<|im_end|>\n<|im_start|>user\n```", None),
    ],
)  # fmt: skip
def test_tokens_at_which_another_text_begins(reply, token):
    assert break_token(reply) == token


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("Why?</s>", "</s>"), ("Why?\n<|assistant|>\n", "<|assistant|>"), ("so<|end|>", "<|end|>"),
        ("Why?<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>"), ("Why? </s> ", "</s>"),
        ("[INST] Why? [/INST]", "[/INST]"),
        ("What is <|im_end|>", None), ("What is </s>?", None), ("Is it `</s>`", None),
        ("Why?", None),
        ("Why <s>so</s>", None), ("<|im_end|> is a token", None), ("the token [INST]", None),
    ],
)  # fmt: skip
def test_tokens_at_the_end_of_a_prompt(text, token):
    assert edge_token(text) == token


@pytest.mark.parametrize(
    ("reply", "asked", "expected"),
    [
        ("Look.</s>", "", "Look."), ("Look. </s>", "", "Look."), ("Look\n<|im_end|>", "", "Look"),
        ("word<|im_end|>", "", "word"), ("Look.<|im_end|>\n<|endoftext|>", "", "Look."),
        ("The token is </s>", "", None), ("It is `<|im_end|>", "", None),
        ("Look.</s>", "What ends it, </s>?", None),
    ],
)  # fmt: skip
def test_end_tokens_that_a_sentence_names_stay(reply, asked, expected):
    assert strip_end_tokens(reply, is_habit=False, asked=asked)[0] == (expected or reply)


@pytest.mark.parametrize(
    ("prompt", "reply", "rest"),
    [
        ("How do I fix it?", "How do I fix it?\nLook at it.", "Look at it."),
        ("How do I fix it?", "How do I fix it? Look at it.", "Look at it."),
        ("How do I fix it?", " How do I\n fix it?Look at it.", "Look at it."),
        ("How do I fix it?\n\n", "How do I fix it?\n \n\nLook at it.\n", "Look at it.\n"),
        ("def double(x):\n", "def double(x):\n    return 2 * x", "    return 2 * x"),
        ("def double(x):", "def double(x):\n x\n", " x\n"),
        ("Once upon a time", "Once upon a time, there", ", there"),
        ("How do I fix it?", "How do I fix it?", None),
        ("How do I fix it?", "How do I fix it? \n", None),
        ("How do I fix it?", "Look: How do I fix it?", None),
        ("How do I fix it?", "HowdoIfixit? Look.", None),
        ("How do I fix it?", "How do I", None),
        ("How much is 2 + 2", "How much is 2 + 23", None),
        ("How much is 2 + 2 ", "How much is 2 + 23", None),
        ("Hello  \n    ", "Hello, friend", None),
        ("Hello", "Hello friend", None),
        ("", "Look at it.", None),
    ],
)
def test_a_repeated_prompt_is_cut(prompt, reply, rest):
    assert without_prompt(prompt, reply) == rest


def test_words_for_missing_values():
    assert all(map(is_missing_word, [*MISSING_WORDS, " nan\n"]))
    others = ["none", "NONE", "Nan", "n/a", "", "None of them", "nan nan"]
    assert not any(map(is_missing_word, others))


# --- hostile text -----------------------------------------------------------------------------

LENGTH = 400_000
LIMIT = 4  # seconds of CPU; linear scans take up to 0.75, copying the rest at each token over 10
HOSTILE = [
    ("", "["),
    ("", "{"),
    ("", "[{'role':"),
    ("[{'role': 'user', 'content': ", "-"),
    ("[{'role': 'user', 'content': ", "1+"),
    ("[", "['user', 'a'],"),
    ("", "\n"),
    ("", "\t \n"),
    ("", " "),
    ("<|im_start|>user\n", "\n"),
    ("<|im_start|>user\n", " "),
    ("", "</s>"),
    ("<s>", "</s> "),
    ("", "<s>"),
    ("", "<s x"),
    ("<s", " "),
    ("", "<|im_start|>a\n"),
    ("", "<|im_start|>"),
    ("", "<|start_header_id|>a"),
    ("<|im_start|>user\n", "<|im_end|>"),
    ("<|user|>\n", "</s>x"),
    ("", "[INST]"),
    ("", "[INST][/INST]"),
    ("[INST][/INST]", "</s> "),
    ("", "[INST]<<SYS>>"),
    ("", "<｜User｜>"),
    ("", "Human:\nAssistant:\n"),
    ("", "USER: ASSISTANT: "),
    ("", "### Human:"),
    ("", "### Instruction:\n### Input:\n"),
    ("", "word "),
]


@pytest.mark.parametrize(("beginning", "piece"), HOSTILE)
def test_long_hostile_text_is_read_in_linear_time(beginning, piece):
    text = beginning + piece * (LENGTH // len(piece))
    start = time.process_time()
    markup_of(text)
    strip_end_tokens(text)
    break_token(text)
    edge_token(text)
    Marks("prompt", is_reply=True).add(text)
    strip_end_tokens(text, is_habit=False)
    without_prompt(text, f"\n{text}\nLook.")
    assert without_prompt("Why so?", f"Why so?{text}x") is None
    assert without_prompt("Why is it so?", f"Why is it so?{text}x") is not None
    assert time.process_time() - start < LIMIT


# --- edges ------------------------------------------------------------------------------------

OPEN_REPR = "[{'role': 'user', 'content': "


@pytest.mark.parametrize("depth", [5_000, 100_000])
def test_a_repr_too_deep_for_a_syntax_tree_is_not_parsed(depth):
    assert parsed(f"{OPEN_REPR}{'-' * depth}1}}]")[1] is None


def test_a_repr_of_more_than_a_million_characters_is_not_parsed():
    room = 1_000_000 - len(f"{OPEN_REPR}''}}]")
    assert parsed(f"{OPEN_REPR}'{'x' * room}'}}]") == ("Python repr", [user("x" * room)])
    longer = f"{OPEN_REPR}'{'x' * (room + 1)}'}}]"
    assert parsed(longer)[1] is None


def test_an_escape_that_python_warns_of_stays():
    assert parsed(OPEN_REPR + r"'\d+'}]") == ("Python repr", [user(r"\d+")])


def test_a_message_with_tool_calls_alone_is_a_chat():
    messages = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "tool_calls": [{"id": 1}]},
    ]
    assert parsed(json.dumps(messages)) == ("JSON", messages)


def test_a_later_system_turn_is_not_llama_2():
    first = "[INST] <<SYS>>\nBe short.\n<</SYS>>\n\nWhy? [/INST] So. </s>"
    assert parsed(f"{first}<s>[INST] How? [/INST]")[0] == LLAMA_2
    assert markup_of(f"{first}<s>[INST] <<SYS>>\nx\n<</SYS>>\n\nHow? [/INST]") is None


def test_an_empty_last_turn_of_a_user_is_no_beginning_of_a_reply():
    text = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>user\n"
    assert parsed(text) == (CHAT_ML, [WHY, user("")])
