"""The synthetic world: generation, its gold judge, and its command."""

import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rlhf
from benchmarks.world import main
from rlhf.config.data import WorldConfig
from rlhf.world import WorldPair, best_reply, ceiling, generate, gold, gold_parts, text
from rlhf.world.generate import NEW, SEEN
from rlhf.world.gold import BEST, WORST, _known_sentences, read_question, read_reply
from tasks.runner import code_version

SMALL = WorldConfig(pairs=400, demonstrations=400, prompts=300, eval_pairs=200, eval_prompts=101)
PROMPT = "Hello, this is Anna from Bath. When will my router arrive?"
HI = "Thank you for your message."
FACT = "The router arrives in four days."
STEP = "Email us a photo of the receipt."
BYE = "Have a lovely day."
LINES = sorted(_known_sentences())


@pytest.fixture(scope="module")
def world():
    return generate(SMALL, seed=3)


def training_prompts(world):
    rows = [row.prompt for row in world.demonstrations] + [row.prompt for row in world.pairs]
    return rows + world.prompts + [row.prompt for row in world.judge_pairs]


def held_out(world):
    return [*world.eval_pairs, *world.eval_prompts]


# Best: intent 1.5 + fact 1.5 + opening 0.5 + closing 0.5 + step 0.8 + concise 0.5 = 5.3.
@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (f"{HI} {FACT} {STEP} {BYE}", 5.3),
        (f"{HI}\n the ROUTER  arrives in four days. {STEP} {BYE}", 5.3),  # case, spaces
        (f"{FACT} {STEP} {BYE}", 4.8),  # no opening: 0.5 not earned
        (f"{FACT} {HI} {STEP} {BYE}", 4.8),  # an opening in the middle earns nothing
        (f"You really should know this. {FACT} {STEP} {BYE}", 4.3),  # rude: 0.5 → -0.5
        (f"{HI} {FACT} {STEP}", 4.8),  # no closing
        (f"{HI} {FACT} {STEP} Now leave us alone.", 4.3),  # rude closing
        (f"{HI} {FACT} {BYE}", 4.1),  # no step: 0.8 → -0.4
        (f"{HI} {FACT} Maybe just wait and see what comes up. {BYE}", 3.7),  # vague: 0.8 → -0.8
        (f"{HI} The router arrives later today. {STEP} {BYE}", 2.8),  # fact 1.5 → -1
        (f"{HI} The router is refunded by bank transfer. {STEP} {BYE}", 1.8),  # 3 → -0.5
        (f"{HI} The kettle arrives on Friday evening. {STEP} {BYE}", 1.3),  # 3 → -1
        (f"{HI} I cannot say anything about the router. {STEP} {BYE}", 0.3),  # -1.5, concise 0
        (f"{HI} {FACT} The router arrives later today. {STEP} {BYE}", 1.3),  # fact -1, extra -1.5
        (f"{HI} {FACT} The router is refunded by bank transfer. {STEP} {BYE}", 3.8),  # extra -1.5
        (f"{HI} {FACT} {FACT} {STEP} {BYE}", 4.8),  # said twice
        (
            f"{HI} {FACT} Your router will reach you in four days. {STEP} {BYE}",
            4.8,
        ),  # in other words
        (f"{HI} {FACT} {STEP} {text.STEPS[1]} {BYE}", 4.8),  # two next steps
        (f"{HI} {FACT} {text.FILLERS[0]} {STEP} {BYE}", 4.4),  # concise 0.5 → -0.4
        (f"{HI} {FACT} Banana. {STEP} {BYE}", 5.0),  # unknown -0.3
        (f"{HI} {FACT} {STEP} Have a lovely", 4.5),  # cut off: no closing, unknown -0.3
        (f"{HI} router arrives in four days. {STEP} {BYE}", 0.0),  # broken: 0.3 and unknown -0.3
        (f"{HI} {FACT} {'so ' * 19}so. {STEP} {BYE}", 4.4),  # 22 + 20 words: -0.1; unknown -0.3
        ("", -1.9),  # no answer -1.5, no step -0.4
    ],
)
def test_gold_by_hand(reply, expected):
    assert gold(PROMPT, reply) == pytest.approx(expected)
    assert sum(gold_parts(PROMPT, reply).values()) == pytest.approx(expected)


def test_the_answer_counts_only_when_the_prompt_asks_a_known_question():
    parts = gold_parts("Is there life on Mars?", f"{HI} {FACT} {STEP} {BYE}")
    assert (parts["intent"], parts["fact"]) == (0, 0)
    assert read_question("nonsense") is None


@settings(deadline=None)
@given(st.text(), st.text(alphabet="ab .!?\n\0é", max_size=500))
def test_gold_of_any_text_is_finite_and_bounded(prompt, reply):
    for asked in (prompt, PROMPT):
        for said in (prompt, reply, reply * 50):
            assert math.isfinite(gold(asked, said))
            assert WORST <= gold(asked, said) <= BEST


@settings(deadline=None)
@given(st.lists(st.sampled_from(LINES), max_size=30))
def test_no_known_sentences_improve_the_best_reply(lines):
    stuffed = " ".join([HI, FACT, *lines, STEP, BYE])
    assert WORST <= gold(PROMPT, stuffed) <= BEST + 1e-9


@settings(deadline=None)
@given(st.lists(st.sampled_from(LINES), min_size=1, max_size=5))
def test_saying_everything_twice_lowers_gold(lines):
    reply = " ".join(lines)
    assert gold(PROMPT, f"{reply} {reply}") < gold(PROMPT, reply)


def test_the_floor_is_reachable_but_not_passed():
    # intent 1.5 + fact -1 (two details), extra -3, manners -1, step -0.8, and concise, repetition
    # and readable -3 each: 0.5 - 3 - 1 - 0.8 - 9 = -13.3.
    awful = " ".join(
        [text.RUDE_OPENINGS[0], FACT, "The router arrives later today."]
        + ["The kettle arrives later today.", text.VAGUE_STEPS[0], text.RUDE_CLOSINGS[0]]
        + ["Banana."] * 90
    )
    assert gold(PROMPT, awful) == pytest.approx(-13.3)


@pytest.mark.parametrize("intent", text.INTENTS)
@pytest.mark.parametrize("topic", text.TOPICS)
def test_every_question_is_read_back_and_has_a_best_reply(topic, intent):
    for template in text.QUESTIONS[intent] + text.NEW_QUESTIONS[intent]:
        assert read_question(template.format(topic=topic)) == (topic, intent)
    reply = best_reply(Random(0), (topic, intent))
    prompt = text.QUESTIONS[intent][0].format(topic=topic)
    assert gold(prompt, reply) == pytest.approx(BEST)


def test_all_sentences_are_distinct():
    lists = (text.OPENINGS, text.RUDE_OPENINGS, text.CLOSINGS, text.RUDE_CLOSINGS)
    lists += (text.STEPS, text.VAGUE_STEPS, text.FILLERS)
    # 8 topics, each with its evasions and 4 intents × 8 details × 3 phrasings.
    assert len(LINES) == sum(map(len, lists)) + 8 * (len(text.EVASIONS) + 4 * 8 * 3)
    assert all(len(set(text.DETAILS[intent])) == len(text.TOPICS) for intent in text.INTENTS)


def test_generated_text_is_understood(world):
    for row in (*world.pairs, *world.eval_pairs):
        assert read_question(row.prompt) is not None
        for reply in (row.chosen, row.rejected):
            assert all(sentence.role != "unknown" for sentence in read_reply(reply))


def test_sizes_and_groups(world):
    assert [len(rows) for rows in astuple(world)] == [400, 400, 200, 300, 101, 100]
    assert {pair.group for pair in world.pairs} == {SEEN}
    assert [row.group for row in world.eval_prompts].count(SEEN) == 51
    assert [row.group for row in world.eval_pairs].count(NEW) == 100


def test_no_prompt_occurs_twice(world):
    prompts = training_prompts(world) + [row.prompt for row in held_out(world)]
    assert len(set(prompts)) == len(prompts) == 400 + 400 + 300 + 200 + 101 + 100


def test_two_replies_differ(world):
    assert all(row.chosen != row.rejected for row in (*world.pairs, *world.eval_pairs))


def test_reserved_templates_are_held_out(world):
    def pattern(templates):
        return re.compile(
            "|".join(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(line)) for line in templates)
        )

    reserved = [pattern(text.NEW_GREETINGS), pattern(text.templates(new=True))]
    usual = [pattern(text.GREETINGS), pattern(text.templates(new=False))]
    assert all(len(text.NEW_QUESTIONS[intent]) >= 2 for intent in text.INTENTS)
    seen = [row.prompt for row in held_out(world) if row.group == SEEN]
    for prompt in training_prompts(world) + seen:
        assert all(template.search(prompt) for template in usual)
        assert not any(template.search(prompt) for template in reserved)
    for row in held_out(world):
        if row.group == NEW:
            assert all(template.search(row.prompt) for template in reserved)
            assert not any(template.search(row.prompt) for template in usual)


def test_held_out_rows_do_not_change_with_the_size_of_training_data(world):
    # With 20,000 demonstrations some would take a held-out prompt, were they drawn first.
    other = generate(SMALL.model_copy(update={"pairs": 50, "demonstrations": 20_000}), seed=3)
    assert other.eval_pairs == world.eval_pairs
    assert other.eval_prompts == world.eval_prompts


def test_no_other_dataset_changes_with_the_judges(world):
    # 20,000 prompts for the judge would take those of others, were they drawn earlier.
    for count in (0, 20_000):
        other = generate(SMALL.model_copy(update={"judge_pairs": count}), seed=3)
        assert len(other.judge_pairs) == count
        assert astuple(other)[:-1] == astuple(world)[:-1]


def test_another_seed_is_another_world(world):
    other = {row.prompt for row in generate(SMALL, seed=4).eval_pairs}
    # 200 of some 10^5 prompts each time: a handful may coincide.
    assert len(other & {row.prompt for row in world.eval_pairs}) < 10


def test_processes_agree(world):
    code = (
        "from rlhf.config.data import WorldConfig; from rlhf.world import generate; import hashlib;"
        f"world = generate(WorldConfig(**{SMALL.model_dump()}), 3);"
        "print(hashlib.sha256(repr(world).encode()).hexdigest())"
    )
    digests = {
        subprocess.check_output(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_sentences_are_part_of_the_code_version(tmp_path, monkeypatch):
    shutil.copytree(Path(rlhf.__file__).parent, tmp_path / "rlhf")
    monkeypatch.setattr(rlhf, "__file__", str(tmp_path / "rlhf" / "__init__.py"))
    before = code_version.__wrapped__()
    with (tmp_path / "rlhf" / "world" / "sentences.yaml").open("a") as file:
        file.write("# another\n")
    assert code_version.__wrapped__() != before


def test_too_few_distinct_prompts(monkeypatch):
    monkeypatch.setattr(text, "NAMES", ("Anna",))
    monkeypatch.setattr(text, "CITIES", ("Bath",))
    with pytest.raises(ValueError, match="too few distinct prompts for 2000 eval prompts"):
        generate(SMALL.model_copy(update={"eval_prompts": 2000}), seed=0)


def test_ceiling_by_hand():
    best, rude = f"{HI} {FACT} {STEP} {BYE}", f"{HI} {FACT} {STEP} Now leave us alone."
    plain = f"{FACT} {STEP} {BYE}"
    # Gaps 5.3 - 4.3 = 1, 0 and 4.8 - 4.3 = 0.5 at temperature 0.5: the mean of σ(2), σ(0) and σ(1),
    # whichever reply was chosen: (0.880797 + 0.5 + 0.731059) / 3 = 0.703952.
    pairs = [
        WorldPair(PROMPT, rude, best),
        WorldPair(PROMPT, best, best),
        WorldPair(PROMPT, plain, rude),
    ]
    assert ceiling(pairs, 0.5) == pytest.approx(0.703952, abs=1e-6)
    with pytest.raises(ValueError, match="no pairs"):
        ceiling([], 0.5)


def test_label_noise_is_bradley_terry():
    pairs = generate(SMALL.model_copy(update={"pairs": 5000}), seed=0).pairs
    gaps = [gold(row.prompt, row.chosen) - gold(row.prompt, row.rejected) for row in pairs]
    for low, high in ((0.05, 0.35), (0.35, 0.75), (0.75, 1.25), (1.25, 2.5)):
        signs = [gap > 0 for gap in gaps if low < abs(gap) < high]
        expected = [1 / (1 + math.exp(-abs(gap) / 0.5)) for gap in gaps if low < abs(gap) < high]
        deviation = math.sqrt(sum(p * (1 - p) for p in expected))
        assert len(signs) > 200
        assert abs(sum(signs) - sum(expected)) < 4 * deviation


def test_default_world_is_as_hard_as_intended():
    config = WorldConfig(pairs=2000, demonstrations=2000, prompts=100)
    world = generate(config, seed=1)
    scores = [gold(row.prompt, row.response) for row in world.demonstrations]
    mean = sum(scores) / len(scores)
    assert 1.0 < mean < 1.6
    assert 1.7 < math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores)) < 2.3
    assert 0.89 < ceiling(world.eval_pairs, config.temperature) < 0.93
    longer = sum(len(row.chosen) > len(row.rejected) for row in world.pairs) / len(world.pairs)
    assert 0.44 < longer < 0.6


def test_command_prints_samples_and_statistics(capsys):
    main(["--seed", "1", "--show", "2"])
    printed = capsys.readouterr().out
    assert printed.count("-template]") == 2
    assert re.search(r"best possible gold +5\.300", printed)
