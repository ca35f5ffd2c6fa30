"""Cutting: one rule for the tokens of prompts and replies in every stage, and nothing lost."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import PipelineConfig, PPOConfig
from rlhf.config.lengths import TokenLimits
from rlhf.data.fitting import Fitting
from rlhf.data.model_check import ModelCheck
from rlhf.data.prepare import prepare_data
from rlhf.data.rendering import Renderer
from rlhf.data.rows import PAIRS_TRAIN, Demonstration, Pair, PromptRow, messages_of, read_rows
from rlhf.data.token_bound import TokenBound
from rlhf.errors import DataError, PromptUnusable
from rlhf.evaluation.reward_model import _fitting_pairs
from rlhf.modeling.base import train_tokenizer
from rlhf.modeling.reward import Scorer
from rlhf.modeling.source import ExternalTokenizer
from rlhf.ppo.models import ppo_limits
from rlhf.reward import _encode as encode_pairs
from rlhf.sft import _encode as encode_demonstrations
from tasks.stages import STAGES

TEXTS = ["tea or cup? good bad kind", "why? yes, the jar is of clay"] * 20
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)


def renderer_of(template=None):
    renderer = Renderer(copy.deepcopy(train_tokenizer(TEXTS, 320)))
    renderer.tokenizer.chat_template = template or renderer.tokenizer.chat_template
    return renderer


RENDERER, FOLDING = renderer_of(), renderer_of(NO_SYSTEM)

words = st.text(st.sampled_from("abc é?\n<|end|>☕"), min_size=1, max_size=30)
turns = st.lists(st.tuples(words, words), max_size=4)


@st.composite
def prompts(draw):
    """A text, or a chat that ends with a user's turn."""
    if draw(st.booleans()):
        return draw(words)
    system = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    earlier = [
        {"role": role, "content": text}
        for pair in draw(turns)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return [*system, *earlier, {"role": "user", "content": draw(words)}]


limits_of = st.builds(
    TokenLimits,
    max_length=st.integers(20, 120),
    max_prompt=st.none() | st.integers(5, 60),
    max_reply=st.none() | st.integers(2, 40),
    max_new_tokens=st.integers(1, 15),
    max_bad_fraction=st.just(1.0),
)


@given(prompts(), words, words, limits_of, st.sampled_from([RENDERER, FOLDING]))
def test_every_stage_reads_the_same_tokens(prompt, chosen, rejected, limits, renderer):
    pair = Pair(prompt, chosen, rejected + "!" + chosen)
    try:
        ids = renderer.encode_prompt(prompt, limits.prompt)
    except PromptUnusable:
        with pytest.raises(DataError):  # nothing to train on
            encode_demonstrations([Demonstration(prompt, chosen)], renderer, limits)
        assert Fitting(renderer, limits).fitting([PromptRow(prompt)]) == []
        return
    a, b = (renderer.encode(prompt, reply, limits) for reply in (chosen, pair.rejected))
    assert a.prompt == b.prompt == ids
    assert len(ids) <= limits.prompt
    # SFT.
    (row,), _ = encode_demonstrations([Demonstration(prompt, chosen)], renderer, limits)
    assert row["input_ids"] == a.ids
    # The reward model, its gate, and the scorer of PPO and evaluation.
    seen = []
    scorer = SimpleNamespace(
        renderer=renderer, limits=limits,
        score_ids=lambda rows: seen.append(rows) or torch.zeros(len(rows)),
        _with_tail=lambda ids: ids,
    )  # fmt: skip
    Scorer.__call__(scorer, [prompt], [chosen])
    assert seen == [[a.ids]]
    if a.response == b.response:
        with pytest.raises(DataError, match="equal"):
            encode_pairs([pair], renderer, limits)
        with pytest.raises(DataError, match="equal"):
            _fitting_pairs([pair], renderer, limits)
    else:
        (row,), _ = encode_pairs([pair], renderer, limits)
        assert (row["chosen_ids"], row["rejected_ids"]) == (a.ids, b.ids)
        assert _fitting_pairs([pair], renderer, limits)[0] == [pair]
    # The policy, within a context that is no shorter.
    policy = ppo_limits(PPOConfig(max_new_tokens=limits.max_new_tokens), 999, limits)
    assert renderer.encode_prompt(prompt, policy.prompt) == ids


@given(prompts(), words, limits_of, st.sampled_from([RENDERER, FOLDING]))
def test_whole_turns_are_dropped_and_replies_cut(prompt, reply, limits, renderer):
    end = renderer.tokenizer.eos_token_id
    try:
        encoded = renderer.encode(prompt, reply, limits)
    except PromptUnusable:
        last = [m for m in messages_of(prompt) if m["role"] == "system"] + messages_of(prompt)[-1:]
        shortest = renderer.tokenizer(renderer.prompt_text(last), add_special_tokens=False)
        assert len(shortest["input_ids"]) > limits.prompt
        return
    messages = messages_of(prompt)
    system = messages[:1] if messages[0]["role"] == "system" else []
    kept = [*system, *messages[len(system) + encoded.turns_dropped :]]
    assert kept[-1] == messages[-1]
    assert encoded.prompt == renderer.encode_prompt(kept, 9999)
    if encoded.turns_dropped:  # one turn of the user more would not fit
        more = [*system, *messages[len(system) + encoded.turns_dropped - 2 :]]
        assert len(renderer.encode_prompt(more, 9999)) > limits.prompt
    whole = renderer.encode_reply(reply)
    assert encoded.is_cut == (len(whole) > limits.reply_after(len(encoded.prompt)))
    assert (encoded.response[-1:] == [end]) is not encoded.is_cut
    assert encoded.response == whole[: len(encoded.response)]
    assert len(encoded.ids) <= limits.max_length
    assert len(encoded.response) >= min(len(whole), limits.max_new_tokens, limits.max_reply or 99)


@given(st.lists(prompts(), min_size=1, max_size=6), limits_of)
def test_rows_are_used_or_counted(given_prompts, limits):
    fitting = Fitting(RENDERER, limits)
    kept = fitting.fitting([PromptRow(p) for p in given_prompts])
    assert len(kept) + fitting.counts["prompts_too_long"] == len(given_prompts)
    dropped = [RENDERER.fit_prompt(row.prompt, limits.prompt)[1] for row in kept]
    assert fitting.counts["prompts_shortened"] == sum(count > 0 for count in dropped)


@given(prompts(), words, words, st.integers(1, 60))
def test_bounds_by_bytes_hold(prompt, one, other, tokens):
    for renderer in (RENDERER, FOLDING):
        bound = TokenBound(renderer)
        if bound.is_within(prompt, tokens):
            assert len(renderer.encode_prompt(prompt, 9999)) <= tokens
        if not bound.may_be_equal(one, other, tokens):
            assert renderer.encode_reply(one)[:tokens] != renderer.encode_reply(other)[:tokens]


def test_bounds_spare_short_texts():
    bound = TokenBound(RENDERER)
    assert bound.is_within("tea?", 40)  # 4 bytes, 21 of markers and 4 of the measuring turn
    assert not bound.is_within("tea?", 4)
    assert not bound.may_be_equal("tea", "cup", 9)


# --- the configuration ----------------------------------------------------------------------------


def config_of(**sections):
    tree = {"sft": {"max_length": 96}, "reward_model": {"max_length": 128},
            "ppo": {"max_new_tokens": 32}}  # fmt: skip
    return PipelineConfig.model_validate({**tree, **sections})


def test_prompts_have_one_limit_in_all_stages():
    config = config_of()
    assert (config.token_limits("sft").prompt, config.token_limits().prompt) == (64, 64)  # 96 − 32
    assert (config.token_limits("sft").max_length, config.token_limits().max_length) == (96, 128)
    assert config_of(sft={"enabled": False}, base={"path": "x"}).token_limits().prompt == 96
    assert config_of(data={"max_prompt": 50, "max_reply": 40}).token_limits().prompt == 50


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"ppo": {"max_new_tokens": 96}}, r"leaves no room for a prompt in sft.max_length = 96"),
        ({"data": {"max_prompt": 65}}, r"data.max_prompt = 65 and ppo.max_new_tokens = 32 exceed"),
        ({"data": {"max_reply": 31}}, r"data.max_reply = 31 is less than ppo.max_new_tokens = 32"),
    ],
)
def test_lengths_that_exclude_each_other_are_refused(sections, message):
    with pytest.raises(ValueError, match=message):
        config_of(**sections)


def test_system_turns_can_be_refused():
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "tea?"}]
    rows = [PromptRow(chat), PromptRow("tea?")]
    for system, renderer, kept in (
        ("fold", FOLDING, rows), ("refuse", FOLDING, rows[1:]), ("refuse", RENDERER, rows),
    ):  # fmt: skip
        limits = TokenLimits(max_length=90, system=system, max_bad_fraction=0.5)
        fitting = Fitting(renderer, limits)
        assert fitting.fitting(rows) == kept
        assert fitting.counts["system_turns_refused"] == len(rows) - len(kept)


def test_whether_a_template_has_a_system_turn_does_not_depend_on_the_texts():
    """Also if the user or the template repeats the system turn, or it is empty."""
    silent = renderer_of(
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}user"
    )
    for text in ("tea?", "user", "", " ", "be kind"):
        chat = [{"role": "system", "content": text}, {"role": "user", "content": "tea?"}]
        assert [r.folds(chat) for r in (silent, FOLDING, RENDERER)] == [True, True, False]
        assert silent.prompt_text(chat) == f"{text}\n\ntea?user" if text.strip() else "tea?user"


# --- prepare-data ---------------------------------------------------------------------------------


def test_pairs_that_the_model_cannot_tell_apart_are_left_out():
    check = ModelCheck(RENDERER, TokenLimits(max_length=40, max_new_tokens=8))
    long = "xyz " * 40
    pairs = [
        Pair("tea?", "good", "bad"), Pair("tea?", long + "a", long + "b"),
        Pair("q" * 99, "good", "bad"), Pair("cup?", "z" + long, "w" + long),
    ]  # fmt: skip
    assert check._pair_fault(pairs[0]) is None
    assert check._pair_fault(pairs[3]) is None
    equal, long_prompt = check._pair_fault(pairs[1]), check._pair_fault(pairs[2])
    assert equal is not None
    assert equal.reason == "replies are equal where the model's input is cut"
    assert long_prompt is not None
    assert long_prompt.reason == "prompt has too many tokens"


def test_prepare_data_quarantines_what_the_model_cannot_read(tmp_path):
    rows = [
        {"prompt": f"question {i} of {i * 7}", "chosen": f"good {i}", "rejected": f"bad {i}"}
        for i in range(40)
    ]
    rows[5]["prompt"] += " word" * 60
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PipelineConfig.model_validate({"data": {"source": str(source)}}).data
    out = tmp_path / "out"
    out.mkdir()
    check = ModelCheck(RENDERER, TokenLimits(max_length=90, max_new_tokens=16))
    result = prepare_data(config, out, model=check)
    (line,) = (out / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "prompt has too many tokens"
    assert json.loads(line)["line"] == 6
    assert "1 of 40 rows left out" in result.metrics["rows_left_out"]
    assert all("word" not in str(p.prompt) for p in read_rows(out / PAIRS_TRAIN, Pair))
    short = ModelCheck(RENDERER, TokenLimits(max_length=20, max_new_tokens=16))
    with pytest.raises(DataError, match=r"40 of 40 rows .*prompt has too many tokens .*raise"):
        prepare_data(config, out, model=short)


def test_the_base_that_data_are_checked_against(tmp_path):
    base = {"path": str(tmp_path)}
    prepare = STAGES["prepare-data"]

    def checked(**sections):
        data = {"source": "pairs.jsonl"}
        return prepare.external_model(config_of(data=data, store="/s", **sections))

    found = checked(base=base)
    assert isinstance(found, ExternalTokenizer)
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert found.select(names) == ["config.json", "tokenizer.json"]
    assert checked() is None  # the tokenizer is trained on the data
    assert checked(base={"path": "artifact:" + "a" * 64}) is None
    assert checked(base=base, placement={"train-sft": "gpu"}) is None
    assert checked(base=base, placement={"train-sft": "gpu", "prepare-data": "gpu"}) is not None
    assert checked(base={"path": "s3://bucket/model"}, placement={"train-sft": "gpu"}) is not None

    def depends_on(**sections):
        data = {"source": "pairs.jsonl", **sections.pop("data", {})}
        return prepare.depends_on(config_of(data=data, **sections))

    # Limits are part of what a dataset depends on only if it is checked.
    assert depends_on(data={"max_prompt": 50}) == depends_on()
    assert depends_on(data={"max_prompt": 50}, base=base) != depends_on(base=base)
