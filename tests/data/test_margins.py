"""Margins of pairs: from scores, strengths, votes and columns, and their scale."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import DataConfig, StoreConfig
from rlhf.data import rows as files
from rlhf.data.prepare import prepare_data, read_pairs
from rlhf.data.prompt_fields import PromptFields
from rlhf.data.quarantine import Quarantine
from rlhf.data.rows import Pair, read_rows
from rlhf.errors import ConfigError
from tests.data.helpers import message, pair


def margins(tmp_path, rows: list[dict[str, Any]], **options: Any):
    """{chosen and rejected: margin} of the rows' pairs, and the reasons for those left out."""
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, quarantine = DataConfig(source=str(path), **options), Quarantine()
    reading = read_pairs(config, StoreConfig(), quarantine, PromptFields(config))
    pairs = [item.pair for item in reading.pairs]
    found = {f"{p.prompt}: {p.chosen} {p.rejected}": p.margin for p in pairs}
    return found, dict(quarantine.reasons)


def graded(**columns: Any) -> list[dict[str, Any]]:
    """Rows of pairs with these columns, the n-th value in the n-th row."""
    names = list(columns)
    return [
        {**pair(f"p{i}"), **dict(zip(names, values, strict=True))}
        for i, values in enumerate(zip(*columns.values(), strict=True))
    ]


SCORED = [
    {"prompt": "p", "completion": text, "score": score}
    for text, score in (("a", 4), ("b", 1.5), ("b", 2.5), ("c", 0))
]


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        (graded(margin=[0.5, 2, None]), {}, [0.5, 2, None]),
        (graded(Margin=["0.5", "2", ""]), {}, [0.5, 2, None]),
        (graded(margin=[0.5, 2]), {"margin_scale": 3}, [1.5, 6]),
        (graded(score_chosen=[5, 4], score_rejected=[1, 3]), {}, [4, 1]),
        (graded(score_chosen=[5, 4], score_rejected=[1, 3], margin=[9, None]), {}, [9, 1]),
        (graded(how=[1, 0]), {"margin_column": "how"}, [1, 0]),
        (graded(how=[{"far": 3}]), {"margin_column": "how.far"}, [3]),
        (graded(margin=["small", "large"]), {}, [None, None]),
        (graded(margin=[-1, 1]), {}, [None, None]),
        (SCORED, {}, [4, 2, 2]),  # a 4, b (1.5 + 2.5) / 2 = 2, c 0: a-c 4, a-b 2, b-c 2
        (SCORED, {"margin_scale": 0.5}, [2, 1, 1]),
        ([{"prompt": "p", "completions": ["a", "b"], "scores": [1, 4]}], {}, [3]),
        ([{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 4]}], {}, [None]),
        ([{"prompt": "p", "ranking": ["a", "b"]}], {}, [None]),
        ([{"prompt": "p", "completions": [{"text": "a", "rank": 1}, {"text": "b", "rank": 3}]}],
         {}, [None]),
        ([{"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": -3}], {},
         [3]),
        ([{"prompt": "p", "response_a": "a", "response_b": "b", "winner": ["a", "a", "b"]}], {},
         [1 / 3]),
        ([{"prompt": "p", "response_a": "a", "response_b": "b", "winner": ["a"]}], {}, [1]),
        ([{"prompt": "p", "response_a": "a", "response_b": "b", "winner": "a"}], {}, [None]),
        ([{"prompt": "p", "response_a": "a", "response_b": "b", "winner": "b", "margin": 2}], {},
         [2]),
    ],
)  # fmt: skip
def test_sources_of_a_margin(tmp_path, rows, options, expected):
    reading = margins(tmp_path, rows, **options)
    values = sorted(reading[0].values(), key=lambda m: -(m or 0))
    assert reading[1] == {}
    assert values == pytest.approx(sorted(expected, key=lambda m: -(m or 0)))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (-1, "how is negative: it contradicts the label"),
        ("much", "how is no finite number"),
        (True, "how is no finite number"),
        (10**400, "how is no finite number"),
        ([1], "how is no finite number"),
    ],
)
def test_a_margin_that_can_not_be_used(tmp_path, value, reason):
    found, left_out = margins(tmp_path, graded(how=[1, value]), margin_column="how")
    assert found == {"p0: c r": 1}
    assert left_out == {reason: 1}


def test_one_margin_is_not_that_of_several_pairs(tmp_path):
    rows = [{**pair("p", rejected=["r", "q"]), "margin": 1}, *graded(margin=[1])]
    _, left_out = margins(tmp_path, rows)
    assert left_out == {"margin is one margin for several pairs": 1}


@pytest.mark.parametrize(
    ("rows", "column", "text"),
    [
        (graded(margin=[1]), "marge", "data.margin_column = 'marge': not a column of the source"),
        (SCORED, "score", "taken for rated, whose margins are the differences of the scores"),
    ],
)
def test_a_column_that_has_no_meaning(tmp_path, rows, column, text):
    assert text in message(ConfigError, margins, tmp_path, rows, margin_column=column)


VOTES = st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=1, max_size=6)


@given(VOTES, st.sampled_from(["majority", "keep"]))
def test_margins_of_votes_are_their_mean_and_never_negative(tmp_path_factory, votes, mode):
    rows = [
        {**(pair("p", "a", "b") if is_a else pair("p", "b", "a")), "margin": margin}
        for is_a, margin in votes
    ]
    path = tmp_path_factory.mktemp("votes") / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source=str(path), votes=mode)
    reading = read_pairs(config, StoreConfig(), Quarantine(), PromptFields(config))
    found = [(item.pair.chosen == "a", item.pair.margin) for item in reading.pairs]
    if mode == "keep":
        assert sorted(found) == sorted(votes)
        return
    for_a = sum(is_a for is_a, _ in votes)
    if 2 * for_a == len(votes):
        assert found == []
        return
    wins = 2 * for_a > len(votes)
    mean = sum(m if is_a == wins else -m for is_a, m in votes) / len(votes)
    assert found == [(wins, pytest.approx(max(mean, 0)))]


def test_the_artifact_holds_margins(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in graded(margin=[*range(20)])))
    prepare_data(DataConfig(source=str(path), metadata_columns=("margin",)), tmp_path)
    found = [
        read.margin
        for name in (files.PAIRS_TRAIN, files.PAIRS_EVAL)
        for read in read_rows(tmp_path / name, Pair)
    ]
    assert sorted(found) == [*range(20)]
    assert repr(Pair("p", "a", "b", margin=1)) == repr(Pair("p", "a", "b"))
