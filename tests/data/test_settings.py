"""Messages for rows of no known format name every setting, and following them ends well."""

from __future__ import annotations

import re

import pytest

from rlhf.config import DataConfig, load_config
from rlhf.data.formats import detect
from rlhf.data.records import LeftOutError
from rlhf.errors import ConfigError
from tests.data.helpers import message


def found(rows, **settings):
    """The layout of rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return detect(columns, rows, DataConfig(source="x.jsonl", **settings))


def rated(ratings, column="rating"):
    return [
        {"prompt": f"what is p{i // 2}", "response": f"it is r{i}", column: rating}
        for i, rating in enumerate(ratings)
    ]


def scores(rows, **settings):
    layout = found(rows, **settings)
    return [layout.convert(row).rated[0].score for row in rows]


@pytest.mark.parametrize(
    "ratings", [["4,5", "2,0", "10"], ["4,5 stars", "2 stars", "10 stars"], ["4,5", 2, "10,0"]]
)
def test_decimal_commas_are_read_where_all_values_are_numbers(ratings):
    assert scores(rated(ratings)) == [4.5, 2.0, 10.0]


def test_a_later_value_of_another_form_is_left_out():
    layout = found(rated(["4,5", "2,0"]))
    with pytest.raises(LeftOutError, match="decimal comma"):
        layout.convert(rated(["4.5"])[0])


@pytest.mark.parametrize("ratings", [["4,5", "2,0", "5 stars", "1 star"], ["1,000", "2,500"]])
def test_ratings_that_are_not_read_are_named(ratings):
    text = message(ConfigError, found, rated(ratings))
    assert f"rating holds {ratings[0]!r}, {ratings[1]!r}" in text
    assert "write all its values as numbers" in text


@pytest.mark.parametrize("settings", [{}, {"label_column": "grade"}])
def test_letters_are_no_numbers_and_the_cure_can_be_followed(settings):
    rows = rated("ADAC", "grade")
    text = message(ConfigError, found, rows, **settings)
    assert "grade rates with letters ('A', 'D', 'C'), which are no numbers" in text
    assert "such as A by 3 and D by 0, in a column named score" in text
    assert scores(rated([3, 0, 3, 1], "score")) == [3, 0, 3, 1]


@pytest.mark.parametrize(
    ("row", "values"),
    [
        (
            {"user_message": "how are you", "assistant_message": "fine I am", "feedback": "up"},
            {"prompt": "user_message", "chosen": "assistant_message", "label": "feedback"},
        ),
        (
            {"frage": "wie geht es", "besser": "gut ist es", "schlechter": "geht dich nichts an"},
            {"prompt": "frage", "chosen": "besser", "rejected": "schlechter", "label": None},
        ),
        (
            {"prompt": "how are you", "response": "fine I am", "error_count": 3},
            {"label": "error_count"},
        ),
    ],
)
def test_the_cure_names_all_settings_and_with_them_the_rows_are_read(row, values):
    text = message(ConfigError, found, [row])
    ways = [re.findall(r"data\.(\w+)_column", way) for way in text.split("; or for ")]
    assert [*values] in ways
    layout = found([row], **{f"{name}_column": values[name] for name in values})
    converted = layout.convert(row)
    assert converted.comparisons or converted.rated


def test_candidates_for_the_prompt_are_named():
    row = {"Date": "2026", "Customer": "How do I do that", "Answer A": "so and so",
           "Answer B": "I do not know", "Winner": "a"}  # fmt: skip
    assert "set data.prompt_column to one of Customer" in message(ConfigError, found, [row])


def test_a_reply_without_a_rating_is_a_choice():
    layout = found(rated(["up", "down"], "feedback"))
    for value in (None, "", float("nan"), [None]):
        with pytest.raises(LeftOutError, match="not rated") as caught:
            layout.convert(rated([value], "feedback")[0])
        assert caught.value.is_choice
    with pytest.raises(LeftOutError) as caught:
        layout.convert(rated(["sideways"], "feedback")[0])
    assert not caught.value.is_choice


def task(type, value):
    return {
        "data": {"prompt": "how are you", "response": "fine"},
        "annotations": [{"result": [{"type": type, "from_name": "control", "value": value}]}],
    }


def test_label_studios_ratings_are_read_and_other_controls_named():
    rows = [task("rating", {"rating": n}) for n in (5, 1)]
    assert scores(rows) == [5, 1]
    text = message(ConfigError, found, [task("ranker", {"ranker": {"rank": ["b", "a"]}})])
    assert "it has ranker (control)" in text
    assert "no annotation" not in text


def test_a_field_inside_a_list_is_explained():
    rows = [{"prompt": "p", "answers": [{"t": "x"}]}]
    text = message(ConfigError, found, rows, chosen_column="none_such")
    assert "items of lists are named as answers.0.text" in text


def test_the_score_that_decides_is_said():
    replies = [{"response": "a", "rank": 1}, {"response": "b", "rank": 2}]
    row = {"prompt": "p", "completions": replies}
    assert found([row]).notes[0].endswith("by their rank, the lowest is best")
    row["completions"] = [{**reply, "score": 3 - reply["rank"]} for reply in replies]
    assert found([row]).notes[0].endswith("by their score, the highest is best")


@pytest.mark.parametrize(("word", "quoted"), [("yes", "'yes'"), ("off", "'no'")])
def test_a_word_that_yaml_takes_for_a_boolean_must_be_quoted(tmp_path, word, quoted):
    (tmp_path / "x.yaml").write_text(f"data: {{source: x.csv, labels: {{first: {word}}}}}")
    text = message(ConfigError, load_config, tmp_path / "x.yaml", [])
    assert "data.labels.first" in text
    assert f"quote it as it stands in the data, such as {quoted}" in text
