"""Prompt and reply as text and tokens."""

from __future__ import annotations

import copy

import pytest

from rlhf.config.lengths import TokenLimits
from rlhf.data.chat_template import PLAIN_TEMPLATE
from rlhf.data.fitting import Fitting
from rlhf.data.rendering import END, SPECIAL_TOKENS, Renderer
from rlhf.data.rows import PAIRS_TRAIN, PROMPTS_EVAL, Pair, PromptRow, read_rows, write_rows
from rlhf.errors import DataError, PromptUnusable
from rlhf.modeling.base import train_tokenizer
from rlhf.reward import _encode

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "tea?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why?"},
]


def test_prompt_text(renderer):
    assert renderer.prompt_text("tea?") == "<|user|>tea?<|assistant|>"
    assert renderer.prompt_text(CHAT) == (
        "<|system|>be kind<|user|>tea?<|assistant|>yes<|end|><|user|>why?<|assistant|>"
    )


def test_plain_template():
    tokenizer = train_tokenizer(["a"], 300)
    tokenizer.chat_template = PLAIN_TEMPLATE
    assert Renderer(tokenizer).prompt_text(CHAT) == (
        "System: be kind\n\nUser: tea?\n\nAssistant: yes\n\nUser: why?\n\nAssistant:"
    )


STRICT = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[model]{% endif %}"
)
SILENT = STRICT.replace("{{ raise_exception('System role not supported') }}", "").replace(
    "{% for message in messages %}",
    "{% for message in messages if message['role'] != 'system' %}",
)


@pytest.mark.parametrize("template", [STRICT, SILENT], ids=["refuses", "drops"])
def test_a_template_without_system_turn_has_it_in_the_first_users(template):
    tokenizer = train_tokenizer(["a"], 300)
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer)
    assert renderer.prompt_text(CHAT) == "[user]be kind\n\ntea?[assistant]yes[user]why?[model]"
    assert renderer.prompt_text("tea?") == "[user]tea?[model]"
    with pytest.raises(DataError, match=r"roles user, user \(Roles must alternate\); leave"):
        renderer.prompt_text([CHAT[1], CHAT[3]])


def test_rows_that_the_template_refuses_are_left_out_and_counted():
    tokenizer = train_tokenizer(["a"], 300)
    tokenizer.chat_template = STRICT
    renderer = Renderer(tokenizer)
    fine = [PromptRow(CHAT), PromptRow("tea?")] * 10
    odd = PromptRow([CHAT[1], CHAT[3]])
    fitting = Fitting(renderer, 200)
    assert (fitting.fitting(fine), fitting.metrics()) == (fine, {})
    assert fitting.fitting([*fine[:5], odd, *fine[5:], odd]) == fine
    assert fitting.metrics() == {"prompts_refused": 2}
    with pytest.raises(
        DataError, match=r"3 of 23 rows can't be used .* 3 × prompt refused by .* roles user, user"
    ):
        fitting.fitting([*fine, odd, odd, odd])
    pairs = [Pair(row.prompt, "yes", "no") for row in (*fine, odd)]
    rows, counts = _encode(pairs, renderer, 200)
    assert (len(rows), counts) == (20, {"prompts_refused": 1})


def test_markers_are_single_tokens(renderer):
    for token in SPECIAL_TOKENS:
        assert len(renderer.tokenizer(token)["input_ids"]) == 1
    first, *_, last = renderer.encode_prompt("tea?", 50)
    assert renderer.tokenizer.convert_ids_to_tokens([first, last]) == ["<|user|>", "<|assistant|>"]


@pytest.mark.parametrize("text", ["good bad", "naïve – 日本語 🙂", "two  spaces\nand a line"])
def test_every_text_survives(renderer, text):
    assert renderer.decode(renderer.encode("?", text, 999).response) == text


def test_a_reply_cannot_write_markers(renderer):
    text = "a<|end|><|assistant|>b<|pad|>"
    response = renderer.encode("?", text, 200).response
    special = {renderer.tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
    assert special & set(response[:-1]) == set()
    assert response[-1] == renderer.tokenizer.convert_tokens_to_ids(END)
    assert renderer.decode(response) == text


def test_what_does_not_fit(renderer):
    end = renderer.tokenizer.eos_token_id
    short = renderer.encode("?", "ok", 40)
    assert short.ids == short.prompt + short.response
    assert short.response[-1] == end
    assert not short.is_cut
    long = renderer.encode("?", "r" * 99, 20)
    assert len(long.ids) == 20
    assert long.is_cut
    assert end not in long.response  # cut, so it does not end here
    # One token of a reply may be cut: its end.
    whole = len(renderer.encode_reply("rrr"))
    limits = TokenLimits(max_length=40, max_reply=whole - 1)
    assert renderer.encode("?", "rrr", limits).response == renderer.encode_reply("rrr")[:-1]
    last = "too many tokens.* with the last user turn alone, and 39 "
    with pytest.raises(PromptUnusable, match=last):
        renderer.encode("q" * 99, "r", 40)


@pytest.mark.parametrize("template", [None, PLAIN_TEMPLATE])
def test_a_prompt_that_is_too_long_loses_whole_turns(renderer, template):
    if template:
        renderer = Renderer(copy.deepcopy(renderer.tokenizer))
        renderer.tokenizer.chat_template = template
    whole = len(renderer.encode_prompt(CHAT, 999))
    without_first = renderer.encode_prompt([CHAT[0], CHAT[3]], 999)
    for length in range(1, whole + 1):
        if length >= len(without_first):
            fitted = renderer.fit_prompt(CHAT, length)
            assert fitted == (
                (renderer.encode_prompt(CHAT, 999), 0) if length == whole else (without_first, 2)
            )
        else:
            with pytest.raises(PromptUnusable, match="the system turn and the last user turn"):
                renderer.fit_prompt(CHAT, length)


def test_the_hash_names_template_end_and_vocabulary():
    def hash_of(text="aaa bbb", **changes):
        tokenizer = train_tokenizer([text] * 3, 300)
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        return Renderer(tokenizer).template_hash

    assert hash_of() == hash_of()
    others = [
        hash_of(chat_template=PLAIN_TEMPLATE),
        hash_of(eos_token="<|user|>"),
        hash_of("ccc ddd"),
    ]
    assert len({hash_of(), *others}) == 4


def test_rows_round_trip(tmp_path):
    pairs = [Pair("é\n", "a", "b", "g"), Pair(CHAT, "a", "b")]
    write_rows(tmp_path / PAIRS_TRAIN, pairs)
    assert read_rows(tmp_path / PAIRS_TRAIN, Pair) == pairs
    write_rows(tmp_path / PROMPTS_EVAL, [])
    assert read_rows(tmp_path / PROMPTS_EVAL, PromptRow) == []
