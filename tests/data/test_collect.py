"""Votes and scores become pairs, and every row is accounted for."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import DataConfig
from rlhf.data.collect import Collector, Ledger, Origin, Totals, demonstrations
from rlhf.data.records import Comparison, Converted, LeftOutError, Rated
from rlhf.data.rows import Demonstration, Pair
from tests.data.helpers import user


def resolve(*rows, **options):
    """Pairs, {reason: lines} of the rows left out, and the totals; each argument is a row."""
    ledger, totals = Ledger(), Totals()
    collector = Collector(DataConfig(source="x.csv", **options), ledger, totals)
    left_out: dict[str, list[int]] = {}

    def lose(origin, reason, _row=None):
        left_out.setdefault(reason.reason, []).append(origin.line)

    for line, row in enumerate(rows, start=1):
        items = row if isinstance(row, list) else [row]
        converted = Converted(
            comparisons=[item for item in items if isinstance(item, Comparison)],
            rated=[item for item in items if isinstance(item, Rated)],
        )
        try:
            collector.add(converted, Origin("x.csv", line))
        except LeftOutError as reason:
            lose(Origin("x.csv", line), reason)
    resolved = collector.resolve()
    resolved.use()
    used = ledger.close(lose)
    assert used + sum(map(len, left_out.values())) == len(rows)
    return [item.pair for item in resolved], left_out, totals


def vote(chosen="good", rejected="bad", prompt="p"):
    return Comparison(prompt, chosen, rejected)


def test_majority_of_the_votes_is_one_pair_and_lost_votes_are_named():
    pairs, left_out, totals = resolve(vote(), vote(), vote("bad", "good"), vote(), vote("x", "y"))
    assert pairs == [Pair("p", "good", "bad"), Pair("p", "x", "y")]
    assert left_out == {"outvoted by other rows of the pair": [3]}
    assert (totals.merged, totals.repeated, totals.agreement) == (2, 1, 0.75)


def test_tied_votes_are_left_out():
    pairs, left_out, totals = resolve(vote(), vote("bad", "good"))
    assert pairs == []
    assert left_out == {"votes for a pair are tied": [1, 2]}
    assert totals.agreement == 0.5


def test_all_votes_are_kept_if_asked():
    pairs, left_out, totals = resolve(vote(), vote(), vote("bad", "good"), votes="keep")
    assert sorted(p.chosen for p in pairs) == ["bad", "good", "good"]
    assert left_out == {}
    assert totals.merged == 0


def test_votes_are_weights_if_asked():
    rows = [vote(), vote(), vote("bad", "good"), vote(), vote("x", "y"), vote("x", "y"),
            vote("u", "v"), vote("v", "u")]  # fmt: skip
    pairs, left_out, _ = resolve(*rows, votes="weight")
    # 3 : 1 votes lead by a half of them, 2 : 0 by all, and 1 : 1 by none.
    assert [(p.chosen, p.rejected, p.weight) for p in pairs] == [
        ("good", "bad", 0.5), ("x", "y", None),
    ]  # fmt: skip
    assert left_out == {
        "outvoted by other rows of the pair": [3], "votes for a pair are tied": [7, 8],
    }  # fmt: skip
    without, same, _ = resolve(*rows)
    assert [(p.chosen, p.rejected, p.weight) for p in without] == [
        ("good", "bad", None), ("x", "y", None),
    ]  # fmt: skip
    assert same == left_out
    assert repr(pairs) == repr(without)  # by which data.max_pairs samples


@given(st.integers(0, 9), st.integers(0, 9))
def test_a_weight_is_the_lead_of_the_votes(a, b):
    pairs, _, _ = resolve(*[vote()] * a, *[vote("bad", "good")] * b, votes="weight")
    expected = [] if a == b else [None if not a or not b else abs(a - b) / (a + b)]
    assert [p.weight for p in pairs] == expected
    assert all(p.chosen == ("good" if a > b else "bad") for p in pairs)


def test_a_prompt_as_text_and_as_chat_is_one_and_case_makes_another():
    pairs, _, _ = resolve(vote(), vote(prompt=[user("p")]), vote(prompt="P"))
    assert [p.prompt for p in pairs] == ["p", "P"]


def test_scores_are_means_of_their_votes_and_give_all_pairs():
    rows = [
        Rated("p", reply, score)
        for reply, score in (("a", 3), ("b", 1), ("c", 1), ("a", 1), ("d", 2.5))
    ]
    pairs, left_out, _ = resolve(*rows)
    assert {(p.chosen, p.rejected) for p in pairs} == {
        ("d", "b"), ("d", "c"), ("d", "a"), ("a", "b"), ("a", "c"),
    }  # fmt: skip
    assert left_out == {}


def test_a_score_without_another_is_left_out_but_is_no_fault():
    _, left_out, _ = resolve(Rated("p", "a", 1), Rated("q", "a", 1), Rated("q", "b", 1))
    assert left_out == {"no other reply to this prompt has a different score": [1, 2, 3]}


def test_many_scored_replies_give_a_bounded_number_of_pairs_the_clearest_first():
    ledger = Ledger()
    collector = Collector(DataConfig(source="x.csv"), ledger, Totals())
    for i in range(40):
        collector.add(Converted(rated=[Rated("p", f"r{i}", i)]), Origin("x.csv", i))
    resolved = collector.resolve()
    resolved.use()
    left_out = []
    ledger.close(lambda origin, reason, _row: left_out.append(reason.reason))
    pairs = [item.pair for item in resolved]
    assert len(pairs) == 64
    beyond = {"beyond 64 pairs of the prompt's rated replies": (40 * 39 // 2 - 64, "")}
    assert ledger.pairs_left_out() == beyond
    assert (pairs[0].chosen, pairs[0].rejected) == ("r39", "r0")
    assert set(left_out) == {"no other reply to this prompt has a different score"} or not left_out


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (vote(prompt="x" * 101), "prompt too long"),
        (vote(prompt=[user("x" * 51), user("y" * 50)]), "prompt too long"),
        (vote(chosen="x" * 201), "reply too long"),
        (vote(rejected="x" * 201), "reply too long"),
        (vote("same", " same\n"), "both replies are the same"),
        ([], "the row compares nothing"),
    ],
)
def test_reasons(row, reason):
    _, left_out, _ = resolve(row, vote("y" * 200), max_prompt_chars=100, max_reply_chars=200)
    assert left_out == {reason: [1]}


def test_a_row_of_which_something_is_used_is_used():
    ranking = [vote("a", "b"), vote("a", "a"), vote("b", "x" * 300)]
    pairs, left_out, _ = resolve(ranking, max_reply_chars=200)
    assert pairs == [Pair("p", "a", "b")]
    assert left_out == {}


@given(
    replies=st.lists(st.integers(1, 5).flatmap(lambda n: st.permutations("abcde"[:n])), max_size=9),
    lost=st.sets(st.sampled_from("abcde")),
)
def test_each_pair_of_used_rows_is_made_or_counted_by_reason(replies, lost):
    ledger = Ledger()
    collector = Collector(DataConfig(source="x.csv", votes="keep"), ledger, Totals())
    total = 0
    for line, ranked in enumerate(replies):
        comparisons = [vote(a, b, f"p{line}") for a, b in itertools.combinations(ranked, 2)]
        if comparisons:
            collector.add(Converted(comparisons), Origin("x.csv", line))
            total += len(comparisons)
    resolved = collector.resolve()
    are_lost = [bool({*item.pair.chosen, *item.pair.rejected} & lost) for item in resolved]
    reason = LeftOutError("recurs", cure="keep it", is_choice=True)
    resolved.lose(reason, [i for i, is_lost in enumerate(are_lost) if is_lost])
    kept = resolved.select(~np.array(are_lost, dtype=bool))
    kept.use()
    of_rows_left_out = []
    ledger.close(lambda origin, *_: of_rows_left_out.append(origin.line))
    ways = [math.comb(len(replies[line]), 2) for line in of_rows_left_out]
    counted = sum(count for count, _ in ledger.pairs_left_out().values())
    assert len(kept) + counted + sum(ways) == total
    assert ledger.pairs_left_out() == ({"recurs": (counted, "keep it")} if counted else {})


def test_the_default_reason_of_a_rated_reply_gives_way_to_that_of_its_pair():
    ledger = Ledger()
    collector = Collector(DataConfig(source="x.csv"), ledger, Totals())
    for line, (prompt, reply, score) in enumerate([("p", "a", 1), ("p", "b", 0), ("q", "c", 1)]):
        collector.add(Converted(rated=[Rated(prompt, reply, score)]), Origin("x.csv", line))
    collector.resolve().lose(LeftOutError("recurs", is_choice=True))
    reasons = {}
    ledger.close(lambda origin, reason, _row: reasons.update({origin.line: reason.reason}))
    assert reasons == {
        0: "recurs", 1: "recurs", 2: "no other reply to this prompt has a different score",
    }  # fmt: skip
    assert ledger.pairs_left_out() == {}  # the rows tell


def test_a_demonstration_is_the_best_reply_of_its_prompt_once():
    ranking = [Pair("p", a, b) for a, b in ("12", "13", "14", "23", "24", "34")]
    assert demonstrations(ranking) == [Demonstration("p", "1")]
    several = [Pair("p", "c", "a"), Pair("p", "d", "a"), Pair("p", "d", "b"), Pair("q", "a", "d")]
    assert demonstrations(several) == [Demonstration("p", "d"), Demonstration("q", "a")]
    circle = [Pair("p", a, b) for a, b in ("ab", "bc", "ca")]
    assert demonstrations(circle) == []


REPLY = st.sampled_from(["a", "b", "c", " a", ""])
ROW = st.lists(
    st.one_of(
        st.builds(Comparison, st.sampled_from(["p", "q", "P"]), REPLY, REPLY),
        st.builds(Rated, st.sampled_from(["p", "q"]), REPLY, st.integers(0, 2).map(float)),
    ),
    max_size=4,
)


@given(st.lists(ROW, max_size=12), st.sampled_from(["majority", "keep", "weight"]))
def test_every_row_is_used_or_left_out_for_a_reason(rows, votes):
    pairs, _, _ = resolve(*rows, votes=votes)  # checks the sum
    if votes != "keep":
        compared = [
            item for row in rows if not any(isinstance(i, Rated) for i in row) for item in row
        ]
        if len(compared) == sum(map(len, rows)):
            keys = [(p.prompt, frozenset((p.chosen, p.rejected))) for p in pairs]
            assert len(set(keys)) == len(keys)
    for demonstration in demonstrations(pairs):
        same = [p for p in pairs if p.prompt == demonstration.prompt]
        assert demonstration.response not in {p.rejected for p in same}
