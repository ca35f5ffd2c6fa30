"""Parquet files of a dataset artifact."""

from __future__ import annotations

import json
import math

import datasets
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from rlhf.data import rows as files
from rlhf.data.rows import Demonstration, Pair, PromptRow, SourceRow, read_rows, write_rows
from rlhf.errors import DataError
from tests.examples import examples

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
PROMPT = TEXT | st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=3)
IDS = st.lists(TEXT, max_size=3).map(tuple)
# Metadata may hold lone surrogates: they are escaped.
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
ROWS = {
    files.DEMONSTRATIONS: st.builds(Demonstration, PROMPT, TEXT, IDS),
    files.PAIRS_TRAIN: st.builds(
        Pair, PROMPT, TEXT, TEXT, st.none() | TEXT, st.none() | st.floats(0, 9), IDS
    ),
    files.PROMPTS_TRAIN: st.builds(
        PromptRow, PROMPT, st.none() | TEXT, st.none() | TEXT, st.dictionaries(TEXT, ANY_JSON), IDS
    ),
    files.ROWS: st.builds(SourceRow, TEXT, TEXT, st.integers(1, 2**40), TEXT),
}
TYPES = (Demonstration, Pair, PromptRow, SourceRow)
PAIRS = [
    Pair("text", "a", "b", None, 0.5, ("1" * 32,), 0.25),
    Pair([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "c", "d", "g"),
]


@pytest.mark.parametrize(("name", "kind"), [*zip(ROWS, TYPES, strict=True)])
@settings(max_examples=examples(40), phases=[Phase.explicit, Phase.generate], deadline=None)
@given(data=st.data())
def test_rows_of_any_content_are_read_as_they_were_written(name, kind, data, tmp_path_factory):
    rows = data.draw(st.lists(ROWS[name], max_size=4))
    path = tmp_path_factory.mktemp("rows") / name
    write_rows(path, rows)
    read = read_rows(path, kind)
    # By vars(): ids don't count for equality. As JSON: 1 and 1.0, 1 and true are different.
    one, other = ([json.dumps(vars(row), sort_keys=True) for row in side] for side in (read, rows))
    assert one == other


def test_not_a_number_in_metadata_stays(tmp_path):
    write_rows(tmp_path / files.PROMPTS_EVAL, [PromptRow("p", metadata={"x": math.nan})])
    [row] = read_rows(tmp_path / files.PROMPTS_EVAL, PromptRow)
    assert math.isnan(row.metadata["x"])


def test_more_rows_than_a_group_keep_their_order_and_equal_rows_give_equal_bytes(tmp_path):
    rows = [Pair(f"p{i}", "a", "b", row_ids=(f"{i:032x}",)) for i in range(files._GROUP + 5)]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_rows(tmp_path / folder / files.PAIRS_TRAIN, iter(rows))
    one, two = (tmp_path / folder / files.PAIRS_TRAIN for folder in ("one", "two"))
    assert [vars(row) for row in read_rows(one, Pair)] == [vars(row) for row in rows]
    assert one.read_bytes() == two.read_bytes()


def test_datasets_reads_the_splits(tmp_path):
    for name in (files.PAIRS_TRAIN, files.PAIRS_EVAL):
        write_rows(tmp_path / name, PAIRS)
    splits = {"train": str(tmp_path / files.PAIRS_TRAIN), "test": str(tmp_path / files.PAIRS_EVAL)}
    loaded = datasets.load_dataset("parquet", data_files=splits, cache_dir=str(tmp_path / "cache"))
    assert loaded["test"][0] == {
        "prompt": [{"role": "user", "content": "text"}], "prompt_is_text": True,
        "chosen": "a", "rejected": "b", "group": None, "margin": 0.5, "row_ids": ["1" * 32],
            "weight": 0.25,
    }  # fmt: skip
    assert loaded["train"][1]["prompt"] == PAIRS[1].prompt


@pytest.mark.parametrize(
    ("pair", "text"),
    [
        (Pair("fine", "a\ud800b", "b"), "lone surrogate"),
        (Pair([{"role": "user", "content": "\udfff"}], "a", "b"), "lone surrogate"),
        (Pair([{"role": "user", "text": "x"}], "a", "b"), "fields ['role', 'text']"),
    ],
)
def test_a_row_that_cannot_be_written_leaves_no_file(tmp_path, pair, text):
    with pytest.raises(DataError) as caught:
        write_rows(tmp_path / files.PAIRS_TRAIN, [*PAIRS, pair])
    assert text in str(caught.value)
    assert not [*tmp_path.iterdir()]


def test_artifacts_of_an_older_version_are_read(tmp_path):
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in PAIRS]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "pairs-train.jsonl").write_text(lines, encoding="utf-8")
    read = read_rows(tmp_path / files.PAIRS_TRAIN, Pair)
    assert [(p.prompt, p.chosen, p.row_ids) for p in read] == [
        (PAIRS[0].prompt, "a", ()),
        (PAIRS[1].prompt, "c", ()),
    ]
