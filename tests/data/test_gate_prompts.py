"""Frozen gate prompts without what a challenger was trained on."""

from __future__ import annotations

import pytest

from rlhf.data.gate_prompts import PromptSet, read_gate_prompts, without_known
from rlhf.data.rows import (
    DEMONSTRATIONS,
    PAIRS_EVAL,
    PAIRS_JUDGE,
    PAIRS_TRAIN,
    PROMPTS_EVAL,
    PROMPTS_GATE,
    PROMPTS_TRAIN,
    Demonstration,
    Pair,
    PromptRow,
    write_rows,
)
from rlhf.errors import DataError

ROWS = [PromptRow(f"question {i}?", group="a") for i in range(20)]


def dataset(folder, **trained):
    """A dataset that trains on these prompts, by file; a copy differs in case and spacing."""
    types = {
        DEMONSTRATIONS: lambda p: Demonstration(p, "x"), PROMPTS_TRAIN: PromptRow,
        **dict.fromkeys((PAIRS_TRAIN, PAIRS_JUDGE, PAIRS_EVAL), lambda p: Pair(p, "x", "y")),
        PROMPTS_EVAL: PromptRow,
    }  # fmt: skip
    names = {
        "sft": DEMONSTRATIONS, "pairs": PAIRS_TRAIN, "judge": PAIRS_JUDGE, "prompts": PROMPTS_TRAIN,
        "held_out": PAIRS_EVAL, "own": PROMPTS_EVAL,
    }  # fmt: skip
    for key, numbers in trained.items():
        make = types[names[key]]
        prompts = [f" Question  {i}? " for i in numbers] + ["another"]
        write_rows(folder / names[key], [make(p) for p in prompts])
    return folder


@pytest.mark.parametrize("key", ["sft", "pairs", "judge", "prompts"])
def test_what_any_stage_trains_on_is_left_out(tmp_path, key):
    found = without_known(ROWS, dataset(tmp_path, **{key: [3, 7]}))
    assert [row.prompt for row in found.fresh] == [
        row.prompt for i, row in enumerate(ROWS) if i not in (3, 7)
    ]
    assert (found.known, found.too_many_known) == (2, False)
    (name,) = found.files
    assert found.note() == (
        f"2 of the champion's 20 gate prompts are among the training data (2 in {name}) and were "
        "left out of the comparison"
    )


def test_held_out_prompts_may_be_gate_prompts(tmp_path):
    found = without_known(ROWS, dataset(tmp_path, held_out=range(20), own=range(20), pairs=[]))
    assert (found.fresh, found.known, found.note()) == (ROWS, 0, None)


def test_more_than_a_tenth_are_too_many(tmp_path):
    found = without_known(ROWS, dataset(tmp_path, sft=[1, 2], pairs=[2, 3]))
    assert (found.known, found.too_many_known) == (3, True)
    assert found.files == {DEMONSTRATIONS: 2, PAIRS_TRAIN: 2}


def test_they_are_read_from_the_evaluation(tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "data").mkdir()
    path = tmp_path / "evaluation" / PROMPTS_GATE
    with pytest.raises(DataError, match=PROMPTS_GATE):
        read_gate_prompts(path, tmp_path / "data")
    write_rows(path, [*ROWS, PromptRow("secret?", row_ids=("f" * 32,))])
    data = dataset(tmp_path / "data", pairs=[0])
    found = read_gate_prompts(path, data)
    assert found.fresh == [*ROWS[1:], PromptRow("secret?")]
    found = read_gate_prompts(path, data, {"f" * 32})
    assert (found.rows, found.fresh) == (ROWS, ROWS[1:])


def test_sets_of_prompts_are_the_same_where_half_of_one_is_in_the_other():
    whole = PromptSet.of(ROWS)
    assert len(whole.keys) == 20
    shouted = PromptSet.of([PromptRow(f"QUESTION  {i}?") for i in range(20)])
    assert shouted.digest != whole.digest
    assert shouted.keys == whole.keys
    # 10 of 20 are half, and 9 of 19 are less; those 9 are all of a smaller set.
    others = [PromptRow(f"other {i}?") for i in range(10)]
    assert PromptSet.of([*ROWS[:10], *others]).is_seen_in(whole)
    assert not PromptSet.of([*ROWS[:9], *others]).is_seen_in(whole)
    assert PromptSet.of(ROWS[:9]).is_seen_in(PromptSet.of([*ROWS[:9], *others]))
    # Of an earlier version's sets the digests alone are known.
    assert whole.is_seen_in(PromptSet(whole.digest))
    assert not whole.is_seen_in(PromptSet(shouted.digest))
    assert not PromptSet("a").is_seen_in(PromptSet("b"))
