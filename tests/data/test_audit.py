"""The audit of preference pairs: figures derived by hand, and what they are said to mean."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from rlhf.config import DataConfig, StoreConfig
from rlhf.data.audit import (
    Evidence,
    Rate,
    audit_pairs,
    has_code,
    has_list,
    has_markdown,
    label_noise,
)
from rlhf.data.findings import find
from rlhf.data.languages import UNDETERMINED, count_languages
from rlhf.data.prepare import read_pairs
from rlhf.data.prompt_fields import PromptFields
from rlhf.data.quarantine import Quarantine
from rlhf.data.rows import Pair
from rlhf.data.tallies import MAX_SLICES
from rlhf.statistics import wilson_interval
from tests.data.helpers import assistant, user

LONG, SHORT = "a long reply", "short"


def audit(pairs, evidence=None, with_languages=False):
    return audit_pairs(pairs, evidence, with_languages=with_languages)


def audit_rows(tmp_path, rows, **options):
    """The audit of a source with these rows."""
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source=str(source), **options)
    reading = read_pairs(config, StoreConfig(), Quarantine(), PromptFields(config))
    evidence = Evidence(reading.tallies, reading.totals, reading.rows)
    return audit([item.pair for item in reading.pairs], evidence), reading


def texts(audit, level):
    return [finding.text for finding in find(audit) if finding.level == level]


def pairs_of(count, chosen, rejected):
    return [Pair(f"prompt {i}", chosen, rejected) for i in range(count)]


def vote(i, winner, **more):
    replies = {"response_a": f"first {i}", "response_b": f"other {i}"}
    return {"prompt": f"prompt {i}", **replies, "winner": winner, **more}


@given(st.integers(1, 400), st.data())
def test_intervals_are_those_of_scipy(n, data):
    successes = data.draw(st.integers(0, n))
    expected = binomtest(successes, n).proportion_ci(0.95, "wilson")
    assert wilson_interval(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_choosing_the_longer_reply_counts_a_tie_as_a_half():
    pairs = [*pairs_of(6, LONG, SHORT), *pairs_of(2, SHORT, LONG), *pairs_of(2, "abc", "xyz")]
    # (6 + 2 · ½) / 10
    assert audit(pairs).longer == Rate(0.7, *wilson_interval(7, 10), 10)
    assert audit(pairs).same_length == 2


@pytest.mark.parametrize(
    ("longer", "shorter", "level", "side"),
    [
        (71, 29, "warning", "longer"),
        (29, 71, "warning", "shorter"),
        (50, 50, "note", "longer"),
        # 60 % of 100 may be 50 %: the interval's near end decides, not the share.
        (60, 40, "note", "longer"),
    ],
)
def test_length_is_a_warning_where_its_whole_interval_is_far_from_a_coin(
    longer, shorter, level, side
):
    found = audit([*pairs_of(longer, LONG, SHORT), *pairs_of(shorter, SHORT, LONG)])
    (text,) = [text for text in texts(found, level) if "reply is preferred" in text]
    assert text.startswith(f"The {side} reply is preferred in {max(longer, shorter)} % (")
    other = "note" if level == "warning" else "warning"
    assert not any("reply is preferred" in text for text in texts(found, other))


@pytest.mark.parametrize(
    ("has", "yes", "no"),
    [
        (
            has_list,
            ["- a\n- b", "Such:\n  1. a\n  2) b", "* a\n\ntext\n* b", "• a\n• b"],
            ["- a", "a - b\n- c", "-a\n-b", "1.5 kg\n2.5 kg", "**a**\n**b**", ""],
        ),
        (
            has_markdown,
            ["# Title", "text\n### Part\n", "this is **bold** text", "**a**"],
            ["#tag", "2 ** 3 ** 4", "a * b", "C#", "**", "#", "** a **"],
        ),
        (has_code, ["```python\nx\n```", "text\n~~~\nx"], ["`x`", "a ``` b", "~5", ""]),
    ],
)
def test_formats(has, yes, no):
    assert [text for text in yes if not has(text)] == []
    assert [text for text in no if has(text)] == []


@given(st.text(alphabet="-*# \n\t`~1.)ab", max_size=3000))
def test_formats_of_any_text_are_found_in_one_pass(text):
    for has in (has_list, has_markdown, has_code):
        assert isinstance(has(text * 3), bool)


def test_format_bias_is_split_by_length():
    listed, plain = "- a\n- b", "no list in this reply, but it is long"
    pairs = [
        *pairs_of(30, listed + " " * 99 + ".", plain),  # the list wins, and is longer
        *pairs_of(4, listed, plain),  # it wins though shorter
        *pairs_of(6, plain, listed),  # it loses, and is shorter
        *pairs_of(10, listed, listed + " c"),  # both have it
    ]
    bias = audit(pairs).formats["lists"]
    assert (bias.chosen, bias.rejected) == (44 / 50, 16 / 50)
    assert bias.wins == Rate(34 / 40, *wilson_interval(34, 40), 40)
    assert bias.wins_not_longer == Rate(4 / 10, *wilson_interval(4, 10), 10)
    (text,) = [text for text in texts(audit(pairs), "warning") if "lists" in text]
    assert "the one with is preferred in 85 %" in text
    assert "where it is not the longer one, in 40 %" in text


def test_a_format_in_few_pairs_is_no_warning():
    rare = [*pairs_of(19, "- a\n- b", "plain text"), *pairs_of(981, "plain text", "other text")]
    assert audit(rare).formats["lists"].wins.share == 1
    assert not any("lists" in text for text in texts(audit(rare), "warning"))
    enough = [*pairs_of(20, "- a\n- b", "plain text"), *rare[20:]]
    assert any("lists" in text for text in texts(audit(enough), "warning"))


@pytest.mark.parametrize(("first", "side"), [(80, "first"), (20, "second")])
def test_position_of_the_winner(tmp_path, first, side):
    rows = [vote(i, "a" if i < first else "b") for i in range(100)]
    found, _ = audit_rows(tmp_path, [*rows, vote(100, "tie")])
    assert found.position == Rate(first / 100, *wilson_interval(first, 100), 100)
    assert any(
        t.startswith(f"The {side} of the two replies is preferred in 80 %")
        for t in texts(found, "warning")
    )


def test_pairs_have_no_position(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(5)]
    assert audit_rows(tmp_path, rows)[0].position is None


@pytest.mark.parametrize(
    ("agreement", "noise"),
    # (1 − e)² + e² = 0.82 for e = 0.1, 0.625 for e = 0.25; no more than a coin: a half.
    [(1, 0), (0.82, 0.1), (0.625, 0.25), (0.5, 0.5), (0.2, 0.5)],
)
def test_label_noise(agreement, noise):
    assert label_noise(agreement) == pytest.approx(noise)


def test_noise_from_repeated_votes(tmp_path):
    rows = [vote(i, "a") for i in range(20)]
    rows += [vote(i, "a" if i < 15 else "b") for i in range(20)]
    rows += [vote(0, "b"), vote(0, "b"), vote(99, "a")]
    repeats = audit_rows(tmp_path, rows)[0].repeats
    # 14 pairs with both votes alike, one with 2 : 2, where 2 of 6 pairs of votes agree, 5 split.
    share = (14 + 1 / 3) / 20
    low, high = wilson_interval(share * 20, 20)
    assert repeats.pairwise.share == pytest.approx(share)
    assert (repeats.votes, repeats.pairwise.n) == (42, 20)
    assert repeats.majority == pytest.approx((14 * 2 + 2 + 5) / 42)
    assert repeats.noise == pytest.approx(label_noise(share))
    assert (repeats.noise_low, repeats.noise_high) == pytest.approx(
        (label_noise(high), label_noise(low))
    )


def test_noise_is_recovered_from_votes_with_known_errors(tmp_path):
    # Of 25 pairs two voters err independently with 0.2: 16 agree rightly, 1 wrongly, 8 differ.
    winners = [("a", "a")] * 16 + [("b", "b")] + [("a", "b")] * 4 + [("b", "a")] * 4
    rows = [vote(i, w) for i, both in enumerate(winners * 4) for w in both]
    found, _ = audit_rows(tmp_path, rows)
    assert found.repeats.noise == pytest.approx(0.2)
    (text,) = [t for t in texts(found, "note") if t.startswith("Two votes")]
    assert "an estimated 20 %" in text
    assert "more than 80 % of such votes" in text


def test_copies_of_rows_are_no_evidence_of_clean_labels(tmp_path):
    found, _ = audit_rows(tmp_path, [vote(i % 12, "a") for i in range(24)])
    assert any("may be copies of rows" in text for text in texts(found, "note"))
    few, _ = audit_rows(tmp_path, [vote(i % 9, "a") for i in range(18)])
    assert not any("several" in finding.text for finding in find(few))


def test_agreement_below_that_of_any_known_data_is_a_warning(tmp_path):
    rows = [vote(i, w) for i in range(100) for w in ("a", "a" if i < 50 else "b")]
    found, _ = audit_rows(tmp_path, rows)
    # 50 % of 100, at most 60 %.
    assert any(text.startswith("Two votes for one pair agree in 50 %")
               for text in texts(found, "warning"))  # fmt: skip


def test_annotators(tmp_path):
    rows = [vote(i, "a", annotator=name) for i in range(30) for name in ("ann", "ben")]
    rows += [vote(i, "a" if i % 10 else "b", annotator="cid") for i in range(30)]
    rows += [vote(i, "b", annotator="dot") for i in range(30)]
    rows += [vote(100, "a", annotator="ann")]
    found, reading = audit_rows(tmp_path, rows)
    people = found.annotators
    assert (people.column, people.count, people.votes) == ("annotator", 4, 121)
    assert people.effective == pytest.approx(121**2 / (31**2 + 3 * 30**2))
    by_name = {row.name: row for row in people.rows}
    assert people.rows[0] == by_name["ann"]
    # Of three others ben agrees always, cid in 27 of 30, dot never.
    assert by_name["ann"].agreement.share == pytest.approx((1 + 0.9 + 0) / 3)
    assert by_name["ann"].agreement.n == 30
    # dot agrees with cid alone, in 3 of 30.
    assert by_name["dot"].agreement.share == pytest.approx(0.1 / 3)
    # 27 pairs with 3 : 1, 3 of 6 pairs of votes alike; 3 pairs with 2 : 2, 2 of 6.
    assert people.agreement.share == pytest.approx((27 * 3 / 6 + 3 * 2 / 6) / 30)
    assert people.agreement.n == 30
    assert [t[:13] for t in texts(found, "warning") if "Annotator" in t] == ["Annotator dot"]
    assert "annotator" not in reading.unused_columns


def test_one_annotator_with_most_votes_is_a_warning(tmp_path):
    rows = [vote(i, "a", worker_id=7 if i < 60 else i % 3) for i in range(100)]
    found, _ = audit_rows(tmp_path, rows)
    assert any("One of 4 annotators, 7, gave 60 %" in text for text in texts(found, "warning"))


def test_one_of_two_annotators_with_about_a_half_is_no_warning(tmp_path):
    rows = [vote(i, "a", worker_id=7 if i < 53 else 8) for i in range(100)]
    found, _ = audit_rows(tmp_path, rows)
    assert not any("annotators, 7, gave" in text for text in texts(found, "warning"))


def test_a_name_for_every_row_is_no_annotator(tmp_path):
    rows = [vote(i, "a", user_id=f"u{i}") for i in range(20)]
    assert audit_rows(tmp_path, rows)[0].annotators is None


def test_slices(tmp_path):
    rows = [
        {"prompt": f"p{i}", "chosen": LONG if i % 4 else SHORT, "rejected": "medium",
         "category": "x" if i < 8 else "y", "source": f"url {i}", "topic": "same"}
        for i in range(MAX_SLICES + 1)
    ]  # fmt: skip
    rows += [{"prompt": "left out", "chosen": "", "rejected": "b", "category": "z"}]
    found, reading = audit_rows(tmp_path, rows)
    # source has too many values, topic one.
    assert [*found.slices] == ["category"]
    assert [*found.slices["category"]] == ["y", "x"]
    assert found.slices["category"]["x"] == Rate(6 / 8, *wilson_interval(6, 8), 8)
    assert reading.unused_columns == []


def test_groups_of_pairs_are_slices():
    pairs = [Pair("p", LONG, SHORT, "seen"), Pair("q", SHORT, LONG, "new"), Pair("r", "a", "b")]
    groups = audit(pairs).slices["group"]
    assert {name: (rate.share, rate.n) for name, rate in groups.items()} == {
        "seen": (1, 1), "new": (0, 1),
    }  # fmt: skip


def test_columns_that_are_read_divide_nothing(tmp_path):
    rows = [
        {"prompt": f"p{i}", "response_a": "x", "response_b": "y", "judge": "ab"[i % 2]}
        for i in range(20)
    ]
    found, _ = audit_rows(tmp_path, rows, label_column="judge")
    assert found.annotators is None
    assert found.position.n == 20


def test_languages():
    prompts = [
        "How do I clean an old kettle?",
        "Wie reinige ich einen alten Wasserkocher?",
        "Comment nettoyer une vieille bouilloire ?",
        "怎么清洁水壶？",
        "2 + 2?",
        [
            user("How do I clean an old kettle?"),
            assistant("So."),
            user("¿Y cómo limpio una taza vieja?"),
        ],
        [assistant("A beginning without a question")],
    ]
    counts = count_languages(prompts)
    assert counts == {"en": 1, "de": 1, "fr": 1, "zh": 1, "es": 1, UNDETERMINED: 2}
    pairs = [Pair(prompt, "a", "b") for prompt in prompts]
    # Two pairs of one prompt are one prompt.
    found = audit([*pairs, pairs[0]], with_languages=True)
    assert found.languages["en"] == Rate(1 / 7, *wilson_interval(1, 7), 7)


def test_lengths():
    pairs = [Pair("p" * 10, "c" * n, "r" * 4) for n in range(1, 101)]
    lengths = audit(pairs).lengths
    # Positions 0.05 · 99, 0.5 · 99 and 0.95 · 99 of the sorted lengths, rounded, from 0.
    assert lengths["chosen"].quantiles == {"p5": 6, "median": 51, "p95": 95, "longest": 100}
    assert lengths["chosen"].histogram == {2: 1, 4: 2, 8: 4, 16: 8, 32: 16, 64: 32, 128: 37}
    assert lengths["rejected"].histogram == {8: 100}


def test_nothing_to_audit():
    found = audit([])
    assert (found.longer, found.position, found.repeats, found.annotators) == (None,) * 4
    assert find(found) == []


reply = st.text(alphabet="ab-*#`\n ", max_size=40)


@given(st.lists(st.tuples(reply, reply), max_size=30))
def test_rates_mirror_when_labels_are_inverted(replies):
    there = audit([Pair("p", one, other) for one, other in replies])
    back = audit([Pair("p", other, one) for one, other in replies])
    if there.longer and back.longer:
        assert there.longer.share + back.longer.share == pytest.approx(1)
        assert there.longer.share_low + back.longer.share_high == pytest.approx(1)
    for name, bias in there.formats.items():
        mirrored = back.formats[name]
        assert (bias.chosen, bias.rejected) == (mirrored.rejected, mirrored.chosen)
        if bias.wins and mirrored.wins:
            assert bias.wins.share + mirrored.wins.share == pytest.approx(1)
        assert (bias.wins is None) == (mirrored.wins is None)
