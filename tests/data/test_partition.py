"""Parts of a dataset share no prompts; recurring replies and contradictions; every row counted."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config import DataConfig, load_config
from rlhf.data import partition, split
from rlhf.data import rows as files
from rlhf.data.duplicates import Shingles, bare_text
from rlhf.data.prepare import prepare_data
from rlhf.data.rows import Demonstration, Pair, PromptRow, messages_of, read_rows
from rlhf.errors import ConfigError, DataError
from tests.data.helpers import assistant, message, pair, rows, sentence, user
from tests.examples import examples

TYPES = {
    files.DEMONSTRATIONS: Demonstration,
    files.PROMPTS_TRAIN: PromptRow,
    files.PROMPTS_EVAL: PromptRow,
}
CANNED = "I'm sorry, but I can't help you with that request."


def prepare(data, folder: Path | None = None, **options):
    """Prepare rows, or files of rows by name; return its files, its summary and the quarantine."""
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch, "in"), Path(scratch, "out")
        source.mkdir()
        out.mkdir()
        for name, part in (data if isinstance(data, dict) else {"a.jsonl": data}).items():
            (source / name).write_text("".join(json.dumps(row) + "\n" for row in part))
        prepare_data(DataConfig(source=str(source), **options), out, seed=0)
        summary = json.loads((out / files.SUMMARY).read_text())
        quarantine = [json.loads(x) for x in (out / files.QUARANTINE).read_text().splitlines()]
        parts = {
            path.name: read_rows(path, TYPES.get(path.name, Pair))
            for path in out.glob("*.parquet")
            if path.name != files.ROWS
        }
    assert summary["rows"] == summary["rows_used"] + len(quarantine)
    assert sum(summary["left_out"].values()) == len(quarantine)
    return parts, summary, quarantine


def questions(parts, *names):
    """The last user's turn of each prompt."""
    found = [messages_of(row.prompt)[-1]["content"] for name in names for row in parts[name]]
    return {text.split("?")[0] for text in found}


TRAINING = (files.DEMONSTRATIONS, files.PAIRS_TRAIN, files.PROMPTS_TRAIN)
GATES = (files.PAIRS_EVAL, files.PROMPTS_EVAL)


def texts(count: int, words: int = 30) -> list[str]:
    return [sentence(random.Random(i), words) for i in range(count)]


@pytest.mark.parametrize("near_duplicates", [0.8, None])
def test_a_question_under_several_system_turns_stands_on_one_side(near_duplicates):
    data = [
        pair([{"role": "system", "content": text}, user(f"What is {question}?")], f"c{question}")
        for question in texts(21, 3)
        for text in ("Be brief.", "Talk like a pirate.")
    ]
    parts, _, _ = prepare(data, eval_fraction=0.4, near_duplicates=near_duplicates)
    train, gates = questions(parts, *TRAINING), questions(parts, *GATES)
    assert train.isdisjoint(gates)
    assert len(train | gates) == 21
    assert len(gates) > 3


def test_conversations_that_open_with_a_short_chinese_question_stand_on_one_side():
    places = "法国英国德国意国美国日本印度巴西希腊瑞士挪威荷兰丹麦波兰捷克埃及土国秘鲁智利"
    openings = [f"{places[i : i + 2]}的首都是哪里?" for i in range(0, 38, 2)]
    data = []
    for text in openings:
        data += [
            pair([user(text), assistant("你猜。"), user(then)], "c" + then)
            for then in ("人口呢", "河流呢")
        ]
        data += [pair(text)]
    parts, _, _ = prepare(data, eval_fraction=0.4)
    sides = [
        {messages_of(row.prompt)[0]["content"] for name in names for row in parts[name]}
        for names in (TRAINING, GATES)
    ]
    assert sides[0].isdisjoint(sides[1])
    assert sides[0] | sides[1] == set(openings)
    assert min(map(len, sides)) > 3


def test_near_duplicates_stand_on_one_side():
    data = [pair(f"{text} {end}") for text in texts(60) for end in ("a", "b")]
    parts, _, _ = prepare(data, eval_fraction=0.3)
    shingles = Shingles()
    for train in {bare_text(row.prompt) for row in parts[files.PAIRS_TRAIN]}:
        for other in {bare_text(row.prompt) for row in parts[files.PAIRS_EVAL]}:
            assert shingles.jaccard(train, other) < 0.8
    exact, _, _ = prepare(data, eval_fraction=0.3, near_duplicates=None)
    stems = [{row.prompt[:-2] for row in exact[name]} for name in (TRAINING[1], GATES[0])]
    assert stems[0] & stems[1]


def test_the_leak_check_finds_what_the_clusters_overlook(monkeypatch):
    data = [pair(f"{text} {end}") for text in texts(60) for end in ("a", "b")]
    monkeypatch.setattr(split, "group_texts", lambda texts, *_, **__: np.arange(len(texts)))
    parts, summary, quarantine = prepare(data, eval_fraction=0.3)
    sides = [{row.prompt[:-2] for row in parts[name]} for name in (TRAINING[1], GATES[0])]
    assert sides[0].isdisjoint(sides[1])
    assert summary["leaks_left_out"] == len(quarantine) > 5
    assert summary["left_out"] == {"prompt is held out": len(quarantine)}


def test_near_duplicates_of_the_sources_own_test_part_are_not_trained_on():
    one = texts(20)
    train = [pair(text) for text in one]
    own = [pair(f"{text} now") for text in one[:3]]
    parts, summary, _ = prepare({"prefs.jsonl": train, "prefs_test.jsonl": own})
    assert [row.prompt for row in parts[files.PAIRS_EVAL]] == [row["prompt"] for row in own]
    assert [row.prompt for row in parts[files.PAIRS_TRAIN]] == one[3:]
    assert summary["left_out"] == {"prompt is held out": 3}
    assert "leaks_left_out" not in summary


def test_a_judge_gets_pairs_that_no_stage_and_no_gate_sees():
    data = [pair(f"{text} {end}", text) for text in texts(120) for end in ("a", "b")]
    parts, summary, _ = prepare(data, judge_fraction=0.2, eval_fraction=0.2)
    judge = {row.prompt[:-2] for row in parts[files.PAIRS_JUDGE]}
    others = [
        {row.prompt[:-2] for name in names for row in parts[name]} for names in (TRAINING, GATES)
    ]
    assert judge.isdisjoint(others[0] | others[1])
    assert others[0].isdisjoint(others[1])
    assert len(judge | others[0] | others[1]) == 120
    # About a fifth of 240. A choice that followed that of the held-out part would leave a tenth.
    assert summary["pairs_judge"] == len(parts[files.PAIRS_JUDGE]) > 36
    assert "leaks_left_out" not in summary
    without, summary, _ = prepare(data, eval_fraction=0.2)
    assert files.PAIRS_JUDGE not in without
    assert "pairs_judge" not in summary
    # The judge's pairs come from the training side: what is held out stays held out.
    assert without[files.PAIRS_EVAL] == parts[files.PAIRS_EVAL]


def test_a_tenth_of_many_prompts_goes_to_the_judge(monkeypatch):
    # 80 prompts, two of each near duplicates.
    data = [pair(f"{text} {end}", text) for text in texts(40) for end in ("a", "b")]
    without, summary, _ = prepare(data)
    said = "no pairs for a judge of the policy: 40 different prompts are fewer than 1,000; set "
    assert [note for note in summary["notes"] if note.startswith(said)]
    assert files.PAIRS_JUDGE not in without
    monkeypatch.setattr(partition, "JUDGE_MIN_PROMPTS", 40)
    parts, summary, _ = prepare(data)
    explicit, said, _ = prepare(data, judge_fraction=0.1)
    assert parts == explicit
    assert parts[files.PAIRS_JUDGE]
    assert "10% of the 40 different prompts are for the judge" in " ".join(summary["notes"])
    assert "judge" not in " ".join(said["notes"])
    # Prompts of the source's own test part are not divided.
    own = {"train.jsonl": data[:-2], "test.jsonl": [pair("quite another"), pair("a question")]}
    assert files.PAIRS_JUDGE not in prepare(own)[0]
    assert files.PAIRS_JUDGE in prepare({**own, "train.jsonl": data})[0]
    assert files.PAIRS_JUDGE not in prepare(data, judge_fraction=0)[0]
    notes = prepare(data, eval_fraction=0.9)[1]["notes"]
    assert "data.eval_fraction = 0.9 leaves too few prompts; lower it" in " ".join(notes)


def test_a_judge_beside_the_sources_own_test_part():
    train = [pair(text) for text in texts(40)]
    own = [pair(f"{text} now") for text in texts(3)]
    parts, _, _ = prepare({"train.jsonl": train, "test.jsonl": own}, judge_fraction=0.5)
    sizes = [len(parts[n]) for n in (files.PAIRS_TRAIN, files.PAIRS_EVAL, files.PAIRS_JUDGE)]
    assert sizes[1] == 3
    assert sizes[0] + sizes[2] == 37
    assert min(sizes[0], sizes[2]) > 8


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_reply_that_recurs_under_many_prompts_is_quarantined(side):
    data = [pair(text, f"c {text}", f"r {text}") for text in texts(100, 12)]
    forms = (CANNED, CANNED.upper(), "I’m sorry — but I can't help you with that request!")
    for i in range(14):
        data[i * 7][side] = forms[i % 3]
    parts, summary, quarantine = prepare(data)
    assert summary["left_out"] == {"reply recurs under many prompts": 14}
    assert [line["line"] for line in quarantine] == [i * 7 + 1 for i in range(14)]
    assert {line["detail"][:17] for line in quarantine} == {"under 14 of 100: "}
    kept = [row for name in (files.PAIRS_TRAIN, files.PAIRS_EVAL) for row in parts[name]]
    assert len(kept) == 86
    for options in ({"max_reply_share": None}, {"max_reply_share": 0.14}):
        assert prepare(data, **options)[1]["rows_used"] == 100
    # Letters and numbers are equal, which needs no search.
    assert prepare(data, near_duplicates=None)[1]["rows_used"] == 86


def test_lost_pairs_of_rows_that_are_used_are_counted_and_said():
    data = [
        {"prompt": text, "completions": [
            {"response": f"{word} {text}", "score": score}
            for word, score in (("c", 9), ("d", 7), ("r", 5))
        ] + [{"response": CANNED, "score": 1}]}
        for text in texts(40, 12)
    ]  # fmt: skip
    parts, summary, quarantine = prepare(data)
    kept = [row for name in (files.PAIRS_TRAIN, files.PAIRS_EVAL) for row in parts[name]]
    assert not any(row.rejected == CANNED for row in kept)
    assert (summary["left_out"], quarantine, summary["rows_used"]) == ({}, [], 40)
    assert summary["pairs_left_out"] == {"reply recurs under many prompts": 120}
    said = (
        "pairs left out of rows that are used otherwise: 120 (120 × reply recurs under many "
        "prompts (raise data.max_reply_share to train on it, or set it to none))"
    )
    assert said in summary["notes"]


def test_a_rated_reply_that_recurs_is_left_out_for_that():
    data = [
        {"prompt": text, "response": reply, "score": score}
        for text in texts(40, 12)
        for reply, score in ((f"c {text}", 3), (f"r {text}", 2), (CANNED, 1))
    ]
    _, summary, quarantine = prepare(data[:45] + [row for row in data[45:] if row["score"] > 1])
    assert summary["left_out"] == {"reply recurs under many prompts": 15}
    assert {line["row"]["rejected"] for line in quarantine} == {CANNED}
    assert summary["pairs_left_out"] == {"reply recurs under many prompts": 30}


def test_near_duplicates_of_a_recurring_reply_are_repeats_of_it():
    long = sentence(random.Random(1), 40)
    data = [pair(text, f"c {text}", f"r {text}") for text in texts(120)]
    for i in range(30):
        data[i]["chosen"] = f"{long} {i}"
    assert prepare(data)[1]["left_out"] == {"reply recurs under many prompts": 30}
    assert prepare(data, near_duplicates=None)[1]["left_out"] == {}


def test_replies_that_may_recur():
    data = [pair(text, f"c {text}", f"r {text}") for text in texts(100)]
    short = [{**row, "chosen": "Yes.", "rejected": "I don't know."} for row in data]
    assert prepare(short)[1]["rows_used"] == 100
    few = [*({**row, "chosen": CANNED} for row in data[:10]), *data[10:]]
    assert prepare(few)[1]["rows_used"] == 100
    # Under one prompt and its near duplicates a reply stands once.
    one = [pair(f"{data[0]['prompt']} {i}", CANNED, f"r{i}") for i in range(30)]
    assert prepare([*data, *one])[1]["rows_used"] == 130


def test_a_file_of_labels_is_kept_and_named():
    labels = ("The review is positive.", "The review is negative.")
    many = [pair(text, labels[i % 2], labels[1 - i % 2]) for i, text in enumerate(texts(60))]
    free = [pair(f"{text} x y z", f"c {text}", "r") for text in texts(200)[60:]]
    _, summary, _ = prepare({"free.jsonl": free, "labels.jsonl": many})
    assert summary["left_out"] == {}
    assert (
        "labels.jsonl: 60 of 60 pairs have a reply that recurs under many prompts, as labels do; "
        "they are trained on"
    ) in summary["notes"]
    free += [pair(f"{text} canned", CANNED) for text in texts(230)[200:]]
    _, summary, _ = prepare({"free.jsonl": free, "labels.jsonl": many})
    assert summary["left_out"] == {"reply recurs under many prompts": 30}


def contradicting():
    """60 pairs, and three near duplicates of the first that prefer the other reply."""
    good, bad = texts(2, 20)
    data = [pair(text, f"c {text}", f"r {text}") for text in texts(62)[2:]]
    data[0] = pair(data[0]["prompt"], good, bad)
    data += [pair(f"{data[0]['prompt']} {i}", f"{bad} x", f"{good} y") for i in range(3)]
    return data


def test_pairs_that_a_near_duplicate_contradicts():
    data = contradicting()
    _, summary, _ = prepare(data)
    assert (summary["contradictions"], summary["rows_used"]) == (4, 63)
    _, summary, quarantine = prepare(data, contradictions="majority")
    assert summary["contradictions"] == 4
    assert [(line["line"], line["reason"]) for line in quarantine] == [
        (1, "a near duplicate prefers the other reply")
    ]
    _, summary, quarantine = prepare(data[:-2], contradictions="majority")
    assert [line["line"] for line in quarantine] == [1, 61]  # a tie
    assert "contradictions" not in prepare(data, near_duplicates=None)[1]


@pytest.mark.parametrize("share", [0.01, None])
def test_contradictions_without_the_search_are_those_of_equal_letters_and_numbers(share):
    prompt, good, bad = contradicting()[0].values()
    loose = [pair(f"{prompt.upper()} {'!' * i}", f"- {bad}", f"{good}.") for i in range(3)]
    data = [*contradicting()[:60], *loose]
    options = {"near_duplicates": None, "max_reply_share": share}
    assert prepare(data, **options)[1]["contradictions"] == 4
    _, _, quarantine = prepare(data, contradictions="majority", **options)
    assert [line["line"] for line in quarantine] == [1]
    parts, _, _ = prepare(data, contradictions="downweight", **options)
    pairs = [*parts[files.PAIRS_TRAIN], *parts[files.PAIRS_EVAL]]
    # Three rows against one: (3 − 1) / (3 + 1).
    assert [p.weight for p in pairs if p.weight is not None] == [0.5] * 3
    _, _, quarantine = prepare(
        [*data[:60], *[pair(prompt, bad, good)] * 2], contradictions="majority", votes="keep",
        **options,
    )  # fmt: skip
    assert [line["line"] for line in quarantine] == [1]


def test_a_pair_of_rated_replies_is_one_statement_however_many_rows_rate_them():
    prompt, good, bad = contradicting()[0].values()
    rated = [
        {"prompt": f"{prompt} 1", "response": text, "score": score}
        for text, score in ((good, 5), (good, 4), (bad, 1), (bad, 2))
    ]
    data = {"a.jsonl": [*contradicting()[1:60], pair(f"{prompt} 2", bad, good)], "b.jsonl": rated}
    _, _, quarantine = prepare(data, contradictions="majority")
    lost = [(line["source"], line["line"]) for line in quarantine]
    assert lost == [("a.jsonl", 60), *(("b.jsonl", i) for i in (1, 2, 3, 4))]  # a tie
    data["a.jsonl"].append(pair(f"{prompt} 3", bad, good))
    _, _, quarantine = prepare(data, contradictions="majority")
    assert {line["source"] for line in quarantine} == {"b.jsonl"}
    parts, _, _ = prepare(data, contradictions="downweight")
    pairs = [*parts[files.PAIRS_TRAIN], *parts[files.PAIRS_EVAL]]
    # Two rows against one statement: (2 − 1) / (2 + 1).
    assert [p.weight for p in pairs if p.weight is not None] == [pytest.approx(1 / 3)] * 2


def test_contradicted_pairs_count_by_the_lead_of_their_rows():
    data = contradicting()
    parts, summary, quarantine = prepare(data, contradictions="downweight")
    assert [line["line"] for line in quarantine] == [1]
    pairs = [*parts[files.PAIRS_TRAIN], *parts[files.PAIRS_EVAL]]
    weighted = {p.prompt: p.weight for p in pairs if p.weight is not None}
    # Three rows against one: (3 − 1) / (3 + 1).
    assert weighted == {row["prompt"]: 0.5 for row in data[-3:]}
    trained = sum(p.weight is not None for p in parts[files.PAIRS_TRAIN])
    assert summary.get("pairs_weighted", 0) == trained
    parts, _, quarantine = prepare(data[:-2], contradictions="downweight")
    assert [line["line"] for line in quarantine] == [1, 61]  # a tie
    for votes, own in (("weight", 0.5), ("majority", 1)):
        # The last row has 3 : 1 votes of its own, and the first two.
        last = data[-1]
        swapped = {**last, "chosen": last["rejected"], "rejected": last["chosen"]}
        more = [data[0], *data, last, last, swapped]
        parts, _, _ = prepare(more, contradictions="downweight", votes=votes)
        found = [
            p.weight
            for p in (*parts[files.PAIRS_TRAIN], *parts[files.PAIRS_EVAL])
            if p.prompt == last["prompt"]
        ]
        # Two rows of the others and three of its own against two: (5 − 2) / (5 + 2), times its own.
        assert found == [pytest.approx(3 / 7 * own)]
    plain, summary, _ = prepare(data, contradictions="majority")
    assert {p.weight for p in (*plain[files.PAIRS_TRAIN], *plain[files.PAIRS_EVAL])} == {None}
    assert "pairs_weighted" not in summary


def test_no_contradictions():
    data = contradicting()[:60]
    prompt, good, bad = data[0].values()
    others = (
        pair(f"{prompt} 1", f"{good} x", f"{bad} y"),  # the same preference
        pair(sentence(random.Random(99)), bad, good),  # another prompt
        pair([{"role": "system", "content": bad}, user(prompt)], bad, good),  # another task
        pair(f"{prompt} 2", f"{good} x", f"{good} y"),  # its replies are alike
    )
    assert "contradictions" not in prepare([*data, *others])[1]


POOL = [*texts(6), *(f"{text} x" for text in texts(6)), "p", "q", ""]
REPLIES = [CANNED, "yes", "no", *texts(4), *(f"{text} now" for text in texts(4)), " "]


@settings(max_examples=examples(25), deadline=None)
@given(
    st.lists(
        st.builds(pair, st.sampled_from(POOL), st.sampled_from(REPLIES), st.sampled_from(REPLIES)),
        max_size=60,
    ),
    st.sampled_from(["keep", "majority", "weight"]),
    st.sampled_from(["keep", "majority", "downweight"]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([0.5, 0.8, None]),
    st.sampled_from([None, 30]),
)
def test_every_row_ends_in_one_place(data, votes, contradictions, judge, threshold, most):
    base = [pair(sentence(random.Random(500 + i)), f"c {i}", "r") for i in range(20)]
    base += [pair(sentence(random.Random(600 + i)), CANNED, "r") for i in range(12)]
    parts, _, quarantine = prepare(
        [*base, *data], votes=votes, contradictions=contradictions, judge_fraction=judge,
        near_duplicates=threshold, max_pairs=most, max_bad_fraction=1,
    )  # fmt: skip
    assert len({(line["source"], line["line"]) for line in quarantine}) == len(quarantine)
    lines = {i + 1 for i in range(len(base) + len(data))}
    used = lines - {line["line"] for line in quarantine}
    pairs = [
        (row.prompt, row.chosen, row.rejected)
        for name, part in parts.items()
        if name.startswith("pairs")
        for row in part
    ]
    everything = [*base, *data]
    assert {tuple(everything[line - 1].values()) for line in used} == set(pairs)


def test_prompts_that_are_all_near_each_other_are_refused_with_a_cure():
    text = sentence(random.Random(0))
    data = [pair([{"role": "system", "content": f"s{i}"}, user(f"{text} {i}")]) for i in range(5)]
    found = message(DataError, prepare, data)
    assert "5 different prompts with usable pairs in 1 groups of near duplicates or turns" in found
    assert "set data.near_duplicates=none (left out: none)" in found
    found = message(DataError, prepare, rows(5), judge_fraction=0.4)
    assert "hold out 2, and give a judge 2; give more rows" in found


def test_a_large_group_and_a_common_beginning_are_reported():
    base = sentence(random.Random(0), 60)
    data = [pair(f"{base} {i}") for i in range(15)] + [pair(text) for text in texts(50)]
    _, summary, _ = prepare(data)
    assert (
        "15 of 65 prompts are near duplicates or turns of one conversation and stand on one side "
        "of the split"
    ) in summary["notes"]
    data = [pair([user("Hi"), assistant("Hello!"), user(text)]) for text in texts(30)]
    _, summary, _ = prepare(data)
    assert (
        "30 of 30 prompts begin with 'hi'; they are not kept on one side of the split for that"
    ) in summary["notes"]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (
            ["source=x.jsonl", "judge_fraction=0.95"],
            "leave nothing to train on; together they must be below 1",
        ),
        (
            ["judge_fraction=0.1", "source=world"],
            "makes the pairs of its judge; set world.judge_pairs instead",
        ),
        (["source=x.jsonl", "near_duplicates=0.3"], "data.near_duplicates"),
        (["source=x.jsonl", "contradictions=weight"], "data.contradictions"),
    ],
)
def test_settings_that_can_not_be(overrides, part):
    arguments = [f"--data.{text}" for text in overrides]
    assert part in message(ConfigError, load_config, None, arguments)


def test_a_rotation_holds_out_others_and_none_changes_nothing():
    data = [pair(text) for text in texts(120)]

    def held_out(**options):
        parts, _, _ = prepare(data, eval_fraction=0.2, **options)
        return {row.prompt for row in parts[files.PAIRS_EVAL]}

    first = held_out()
    assert held_out(rotation=0) == first
    others = [held_out(rotation=number) for number in (1, 2)]
    # A fifth of 120 each, independent: about 5 in common.
    assert all(10 < len(other) < 40 and len(other & first) < 15 for other in others)
    assert others[0] != others[1]
