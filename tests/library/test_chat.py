"""Conversations: streams of text, the evaluation's replies, contexts that are full, preferences."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from rlhf.chat import (
    Candidate,
    Conversation,
    Reply,
    ReplySettings,
    Speaker,
    TextStream,
    score_reply,
)
from rlhf.config.lengths import TokenLimits
from rlhf.data.rendering import TOO_LONG, Renderer
from rlhf.data.rows import PromptRow
from rlhf.environments.stop import StopSequences
from rlhf.errors import ConfigError, PromptUnusable
from rlhf.evaluation.replies import Policy, SamplingPlan
from rlhf.modeling.generate import generate
from rlhf.modeling.reward import Scorer
from rlhf.modeling.sampling import Sampling
from tests.library.tiny_tokenizers import byte_level, fast
from tests.library.toys import DEVICE
from tests.parrot import HOSTILE, write_parrot

GREEDY = ReplySettings(24, 0.0)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def speaker(fresh):
    return Speaker(fresh, DEVICE)


def streamed(ids, ending):
    """The parts of a reply, given token by token."""
    stream = TextStream(ending)
    parts = [stream.add(ids[: n + 1]) for n in range(len(ids))]
    return [*parts, stream.finish(ids)]


# --- streams ----------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.text(max_size=24))
def test_parts_add_up_and_hold_no_half_character(text):
    renderer = _byte_renderer()
    ids = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    ending = StopSequences(renderer)
    parts = streamed(ids, ending)
    assert "".join(parts) == ending.text(ids) == text.strip()
    assert ("\ufffd" in text) or not any("\ufffd" in part for part in parts)


_RENDERERS = []


def _byte_renderer() -> Renderer:
    if not _RENDERERS:
        _RENDERERS.append(Renderer(fast(byte_level(["<pad>", "</s>"]), eos_token="</s>")))
    return _RENDERERS[0]


def test_bytes_that_decode_together_are_shown_once_they_are_whole():
    """Where single bytes fall back, a run of them is undecodable until all of it is whole."""

    vocabulary = {"<unk>": 0, "</s>": 1} | {f"<0x{i:02X}>": i + 2 for i in range(256)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    renderer = Renderer(fast(tokenizer, eos_token="</s>", pad_token="</s>"))
    ids = [byte + 2 for byte in "aé日!".encode()]
    assert renderer.texts([ids[:4]]) == ["\ufffd" * 4]  # takes back the é
    parts = streamed(ids, StopSequences(renderer))
    assert "".join(parts) == "aé日!"
    assert not any("\ufffd" in part for part in parts)
    # A reply that ends in the midst of a character: what was given is not taken back.
    assert "".join(streamed(ids[:-2], StopSequences(renderer))) == "aé"


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("tea\n\nUser: cup", ["\n\nUser:"], "tea"),
        ("tea\n\nUse of cups", ["\n\nUser:"], "tea\n\nUse of cups"),
        ("a cup of tea", ["of te", "tea"], "a cup"),
        ("a STO", ["STOP"], "a STO"),
    ],
)
def test_a_stop_sequence_is_never_shown(text, stops, shown):
    renderer = _byte_renderer()
    ids = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    ending = StopSequences(renderer, stops)
    # As `generate` does, at most up to the token that completes it.
    known = next((n for n in range(len(ids)) if ending([ids[: n + 1]])[0]), len(ids) - 1)
    stream, given_parts = TextStream(ending), []
    for n in range(known + 1):
        given_parts.append(stream.add(ids[: n + 1]))
        assert shown.startswith("".join(given_parts))
    given_parts.append(stream.finish(ids[: known + 1]))
    assert "".join(given_parts) == shown


# --- replies ----------------------------------------------------------------------------------


def test_a_greedy_reply_is_the_evaluations(sft):
    speaker = Speaker(sft, DEVICE)
    plan = SamplingPlan(max_new_tokens=24, temperature=0.0)
    rows = [PromptRow("tea?"), PromptRow([user("a cup"), assistant("good"), user("and a jar?")])]
    answers = Policy(sft, DEVICE, plan).answer(rows, 5)
    for row, (expected,) in zip(rows, answers.texts, strict=True):
        messages = [user(row.prompt)] if isinstance(row.prompt, str) else row.prompt
        parts = []
        reply = speaker.reply(messages, GREEDY, 0, parts.append)
        assert reply.text == "".join(parts) == expected
        assert expected


def test_a_sampled_reply_is_that_of_its_settings(speaker):
    renderer = speaker.renderer
    ids = renderer.encode_prompt("tea?", 40)
    reply = speaker.reply([user("tea?")], ReplySettings(12, 0.7, 5, 0.9), 11)
    drawn = generate(
        speaker.model, [ids], renderer.tokenizer, Sampling(12, 0.7, 5, 0.9), 11,
        ends=renderer.end_ids,
    )  # fmt: skip
    assert reply.text == renderer.decode(drawn.rows()[0])
    assert (reply.prompt_tokens, reply.tokens) == (len(ids), len(drawn.rows()[0]))
    assert reply.text != speaker.reply([user("tea?")], ReplySettings(12, 0.7, 5, 0.9), 12).text


def test_a_reply_of_several_tokens_a_character(tmp_path):
    parrot = Speaker(write_parrot(tmp_path / "parrot"), torch.device("cpu"))
    parts = []
    reply = parrot.reply([user("tea?")], ReplySettings(200, 0.0), 0, parts.append)
    assert (reply.text, reply.ending, reply.notes) == (HOSTILE, "stop", ())
    assert "".join(parts) == HOSTILE
    assert len(parts) > 8
    assert not any("\ufffd" in part for part in parts)
    # A stop sequence ends it; the text before it is whole.
    cut = parrot.reply([user("tea?")], ReplySettings(200, 0.0, stop_sequences=("onerror",)), 0)
    assert (cut.text, cut.ending) == ("<img src=x", "stop")
    # So does the caller, and then the reply is no whole one.
    seen = []
    cut = parrot.reply([user("x")], ReplySettings(200, 0.0), 0, seen.append, lambda: len(seen) > 3)
    assert (cut.ending, cut.notes) == ("cancelled", ("cancelled",))
    assert HOSTILE.startswith("".join(seen))
    assert cut.tokens < reply.tokens


def test_the_context_is_said_to_be_full(fresh, speaker):
    assert speaker.context == 64
    turns = [user("tea"), assistant("good"), user("cup")]
    room = 64 - len(speaker.prompt_ids(turns))
    whole = speaker.reply(turns, ReplySettings(room, 0.0, stop_sequences=()), 0)
    longer = speaker.reply(turns, ReplySettings(room + 1, 0.0), 0)
    assert whole.text == longer.text
    assert (whole.ending, longer.ending) == ("length", "context")
    assert whole.notes == (f"cut off after {room} tokens, the most that a reply may have",)
    assert longer.notes == (f"cut off after {room} tokens: the context is full (64 tokens)",)
    with pytest.raises(PromptUnusable, match=r"the context is full: the conversation has .* 64"):
        speaker.reply([*turns, assistant("jar " * 30), user("pot")], GREEDY, 0)
    with pytest.raises(PromptUnusable) as caught:
        speaker.prompt_ids([user("jar " * 99)])
    assert caught.value.reason == TOO_LONG
    # Longer than in training: nothing is left out, and it is said.
    trained = Speaker(fresh, DEVICE, TokenLimits(max_length=16, max_prompt=8))
    reply = trained.reply(turns, GREEDY, 0)
    assert reply.prompt_tokens == 64 - room > 8
    assert "prompts of the policy's training had at most 8" in reply.notes[0]
    assert reply.text == speaker.reply(turns, GREEDY, 0).text


def test_scores_are_the_reward_models(reward_model):
    scorer = Scorer(reward_model, DEVICE, TokenLimits(max_length=30, max_prompt=24))
    turns = [user("tea?"), assistant("good"), user("cup?")]
    score = score_reply("reward", scorer, turns, "good good")
    assert score.value == pytest.approx(float(scorer([turns], ["good good"])[0]))
    assert score.note == ""
    long = [*turns, assistant("tea " * 20), user("jar?")]
    assert score_reply("reward", scorer, long, "good").note.startswith("without the first ")
    assert "of the first " in score_reply("reward", scorer, turns, "good " * 40).note
    none = score_reply("reward", scorer, [user("jar " * 60)], "good")
    assert none.value is None
    assert "too many tokens" in none.note


# --- conversations ----------------------------------------------------------------------------


def candidate(text, policy="p", ending="stop"):
    return Candidate(policy, policy, Reply(text, 1, 1, ending))


def answered(*texts, **options):
    talk = Conversation(**options)
    talk.say("tea?")
    talk.begin_attempt()
    talk.candidates += [candidate(text, f"p{n}") for n, text in enumerate(texts, 1)]
    return talk


def test_a_conversation_goes_on_with_the_preferred_reply():
    talk = answered("one", "two", system="be kind")
    rows = talk.prefer(2)
    assert talk.current.reply.text == "one"  # until the rows are written
    talk.accept(2)
    assert rows == [
        {
            "prompt": [{"role": "system", "content": "be kind"}, user("tea?")],
            "chosen": "two", "rejected": "one", "chosen_policy": "p2", "rejected_policy": "p1",
        }
    ]  # fmt: skip
    talk.say("and?")
    assert talk.messages[1:] == [user("tea?"), assistant("two"), user("and?")]
    assert json.loads(json.dumps(rows)) == rows
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "be kind"}]


def test_retries_are_further_candidates():
    talk = answered("one", "two")
    first = talk.begin_attempt()
    talk.candidates += [candidate("three"), candidate("one")]
    assert talk.current.reply.text == "three"  # the newest reply of the first policy
    rows = talk.prefer(3)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [
        ("three", "one"),
        ("three", "two"),
    ]
    assert first != talk.begin_attempt()
    same = answered()
    other = Conversation(seed=1)
    other.say("tea?")
    assert same.begin_attempt() == first  # the second attempt of the same seed
    assert other.begin_attempt() not in (first, same.begin_attempt())


def test_what_can_not_be_preferred():
    empty = Conversation()
    for talk, number, said in (
        (empty, 1, "there is no reply to prefer yet"),
        (answered("one"), 1, "there is one reply alone"),
        (answered("one", "two"), 3, "there is no such reply; those to choose from are 1 to 2"),
        (answered("one", "two"), 0, "there is no such reply"),
        (answered("one", "one"), 1, "no other reply differs"),
        (answered("", "two"), 1, "empty or was cancelled"),
        (answered("one", ""), 1, "no other reply differs"),
    ):
        with pytest.raises(ConfigError, match=said):
            talk.prefer(number)
    talk = answered("one", "two")
    talk.prefer(1)
    talk.accept(1)
    with pytest.raises(ConfigError, match="reply 1 is preferred already"):
        talk.prefer(2)
    talk = answered("one")
    talk.candidates.append(candidate("tw", ending="cancelled"))
    with pytest.raises(ConfigError, match="no other reply differs"):
        talk.prefer(1)


def test_messages_that_are_refused():
    talk = Conversation()
    with pytest.raises(ConfigError, match="nothing to reply to"):
        talk.begin_attempt()
    for text, said in (("  ", "is empty"), ("a\udcff", "bytes that are not UTF-8")):
        with pytest.raises(ConfigError, match=said):
            talk.say(text)
    assert talk.messages == []
    talk.say("first")  # to which there was no reply
    talk.say("second")
    assert talk.messages == [user("second")]
