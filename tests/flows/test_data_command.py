"""The command `rlhf data inspect`, called as from a terminal."""

from __future__ import annotations

import json

import pytest

from flows import data
from rlhf.errors import ConfigError
from tests.data.helpers import pair, rows


@pytest.fixture
def inspect(tmp_path, monkeypatch, capsys):
    """Runs the command on these rows; what it prints."""
    monkeypatch.setattr(data.console, "_width", 200)

    def run(lines, *words: str) -> str:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        command = ["inspect", str(path), *words]
        code = data.app(
            command, exit_on_error=False, print_error=False, result_action="return_value"
        )
        shown = capsys.readouterr().out
        assert code == (2 if "a run would stop" in shown or "\n0 pairs of" in shown else 0)
        return shown

    return run


def test_it_prints_format_pairs_as_the_model_sees_them_and_lengths(inspect):
    shown = inspect([{**row, "id": i} for i, row in enumerate(rows(20))])
    assert "20 rows, format pairs" in shown
    assert "20 pairs of 20 prompts, from 20 rows" in shown
    assert "columns not used: id" in shown
    assert "prompt  <|user|>p0<|assistant|>" in shown
    assert "chosen  good 0<|end|>" in shown
    assert "The longer reply is preferred in 100 % (84–100) of the pairs" in shown
    assert "Languages" not in shown
    assert "left out" not in shown


def test_it_prints_reasons_with_an_example_and_a_cure_and_whether_a_run_would_stop(inspect):
    bad = [pair(""), pair("x", {"text": "c"}), pair("y", "same", "same")]
    shown = inspect([*rows(5), *bad, *rows(2)])
    assert "3 of 10 rows are left out" in shown
    assert "pairs.jsonl:6" in shown
    assert "data.chosen_column=chosen.text" in shown
    assert "2 rows repeat the pair of another row" in shown
    assert "2 of them have something wrong, more than data.max_bad_fraction = 0.1 allows" in shown
    assert "would stop" in shown
    assert "nothing is wrong with such rows" not in shown
    assert "would stop" not in inspect([*rows(5), *bad], "--data.max_bad_fraction=0.5")


def test_overrides_and_a_part_of_the_rows(inspect):
    log = [{"prompt": f"p{i}", "answer_a": "x", "answer_b": "y", "label": i % 2} for i in range(9)]
    with pytest.raises(ConfigError, match=r"data\.labels\.first"):
        inspect(log)
    shown = inspect(log, "--data.labels.first=1", "--data.labels.second=0", "--rows", "4")
    assert "4 rows (the first 4 of each file), format comparison" in shown
    assert "<|user|>p0<|assistant|>\n  chosen  y" in shown


def test_it_prints_what_the_rows_tell_beside_the_pairs(inspect):
    log = [
        {"prompt": f"p{i}", "response_a": f"x{i}", "response_b": f"y{i}", "winner": "a",
         "annotator": f"\x1b[31mann{i % 4 // 3}"}
        for i in range(40)
    ]  # fmt: skip
    shown = inspect(log)
    assert "The first of the two replies is preferred in 100 %" in shown
    assert r"One of 2 annotators, \x1b[31mann0, gave 75 % of the votes" in shown
    assert "\x1b[31m" not in shown


def test_control_characters_do_not_reach_the_terminal(inspect):
    assert "\x1b" not in inspect([pair(f"a\x1b[31m{i}", "\x1b]0;title\x07") for i in range(9)])
