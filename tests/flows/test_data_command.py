"""The command `rlhf data inspect`, called as from a terminal."""

from __future__ import annotations

import json
import shlex

import pytest

from flows import data
from rlhf.config import DataConfig
from rlhf.data.prepare import prepare_data
from rlhf.errors import ConfigError, DataError, NoPreferences
from tests.data.helpers import assistant, pair, rows, user


@pytest.fixture
def inspect(tmp_path, monkeypatch, capsys):
    """Runs the command on these rows; what it prints."""
    monkeypatch.setattr(data.console, "_width", 200)

    def run(lines, *words: str, source: str | None = None) -> str:
        path = tmp_path / "pairs.jsonl"
        if lines is not None:
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        command = ["inspect", source or str(path), *words]
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


def test_it_says_when_too_little_is_left(inspect):
    same = [{**row, "chosen": "x", "rejected": "x"} for row in rows(10)]
    shown = " ".join(inspect(same).split())
    assert "a run would stop: data.source = " in shown
    assert "remove the row (left out: 10 × both replies are the same)" in shown
    assert "would stop" not in inspect(rows(9))
    assert "would stop" not in inspect(rows(9), "--rows", "2")  # of the beginning nothing follows


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


CHATS = [
    {"messages": [user(f"ask {i}"), assistant(f"say {i}"), user("and?"), assistant("more")]}
    for i in range(5)
]
PROMPTS = [{"prompt": f"ask {i}", "truth": f"t{i}", "topic": "tea"} for i in range(4)]


def test_demonstrations_as_the_model_sees_them(inspect):
    shown = inspect([*CHATS, {"messages": [user("x")], "id": 1}], "--as", "sft")
    assert "data.sft_source = pairs.jsonl: 6 rows, format conversations" in shown
    assert "10 demonstrations for SFT, from 5 rows" in shown
    assert "every reply of the assistant is a demonstration" in shown
    assert "columns not used: id" in shown
    assert "1 of 6 rows are left out" in shown
    assert "sft_source/pairs.jsonl:6" in shown
    assert "give conversations with a turn of the assistant after one of a user" in shown
    assert "1 of them have something wrong, more than data.max_bad_fraction = 0.1 allows" in shown
    assert "  prompt  <|user|>ask 0<|assistant|>\n   reply  say 0<|end|>" in shown
    later = "<|user|>ask 0<|assistant|>say 0<|end|><|user|>and?<|assistant|>\n   reply  more<|end|>"
    assert later in shown
    last = inspect(CHATS, "--as", "sft", "--data.sft_turns=last", "--rows", "3")
    assert "3 rows (the first 3 of each file)" in last
    assert "3 demonstrations for SFT, from 3 rows" in last
    assert "would stop" not in last


def test_prompts_with_their_references_and_metadata(inspect):
    overrides = ("--data.reference_column=truth", "--data.metadata_columns=[topic]")
    shown = inspect([*PROMPTS, {"prompt": ""}], "--as", "prompts", *overrides)
    assert "data.prompts_source = pairs.jsonl: 5 rows, format prompts" in shown
    assert "4 prompts for PPO, from 4 rows" in shown
    assert "  prompt  <|user|>ask 0<|assistant|>\nreference  t0\nmetadata  topic = 'tea'" in shown
    assert "prompt is empty" in shown
    assert "would stop" in shown


@pytest.mark.parametrize(
    ("lines", "use"),
    [
        (CHATS, "sft"),
        ([{"question": "How?", "answer": "So."}], "sft"),
        (PROMPTS, "prompts"),
        ([{"text": "How?"}], "prompts"),
    ],
)
def test_rows_without_preferences_are_shown_as_what_they_are(inspect, lines, use):
    shown = inspect(lines)
    assert shown.startswith("data.source: ")
    assert f"(--as {use}); a run reads it by data." in shown
    assert shown.endswith(inspect(lines, "--as", use))
    with pytest.raises(NoPreferences):
        inspect(lines, "--as", "pairs")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "p", "answer_a": "x", "answer_b": "y", "label": 1}, "data.labels.first"),
        ({"prompt": "p", "completions": ["x", "y"]}, "have neither scores nor ranks"),
        ({"x1": "p"}, "no format fits these columns"),
    ],
)
def test_other_faults_of_pairs_are_not_hidden_by_another_reading(inspect, line, words):
    with pytest.raises(ConfigError, match=words):
        inspect([line] * 5)


def test_columns_of_such_sources_are_set_beside_them(inspect, tmp_path):
    lines = [{"ask": "How?", "tell": "So."}]
    with pytest.raises(ConfigError, match=r"'\{source: …, prompt_column: …\}' --as sft"):
        inspect(lines, "--as", "sft", "--data.prompt_column=ask")
    with pytest.raises(ConfigError) as caught:
        inspect(lines, "--as", "sft")
    assert f"rlhf data inspect {tmp_path}/pairs.jsonl --as sft shows more" in str(caught.value)
    # With a column of pairs that is set, the rows are meant as pairs.
    with pytest.raises(NoPreferences):
        inspect([{"prompt": "How?", "answer": "So."}], "--data.prompt_column=prompt")
    source = {"source": f"{tmp_path}/pairs.jsonl", "prompt_column": "ask", "chosen_column": "tell"}
    assert "How?" in inspect(lines, "--as", "sft", source=json.dumps(source))


def test_all_sources_of_a_run_without_what_the_pairs_forbid(inspect, tmp_path):
    pairs = [pair(f"ask {i}", "say", "mumble") for i in range(30)]
    sft = [{"prompt": f"ask {i}", "completion": f"own {i}"} for i in range(30)]
    path, own = tmp_path / "own.jsonl", tmp_path / "p.jsonl"
    sft.append({"prompt": "ask 1", "completion": "mumble"})
    path.write_text("".join(json.dumps(line) + "\n" for line in sft))
    own.write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    shown = inspect(pairs, f"--data.sft_source={path}", f"--data.prompts_source={own}")
    assert "30 pairs of 30 prompts" in shown
    assert "data.sft_source = own.jsonl: 31 rows" in shown
    assert "prompt is held out" in shown
    assert "reply lost to another in the pairs" in shown
    assert "data.prompts_source = p.jsonl: 4 rows" in shown
    preset = tmp_path / "run.yaml"
    sources = {"source": str(tmp_path / "pairs.jsonl"), "sft_source": str(path),
               "prompts_source": str(own)}  # fmt: skip
    preset.write_text(json.dumps({"data": sources}))
    assert inspect(pairs, source=str(preset)).partition(": ")[2] == shown.partition(": ")[2]


def test_lists_are_told_apart(inspect, tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text("".join(json.dumps(line) + "\n" for line in rows(30)))
    bad.write_text(json.dumps(pair("")) + "\n" + json.dumps(pair("own")) + "\n")
    shown = inspect([], source=f"[{good}, {bad}]")
    assert "1 of those of bad.jsonl have something wrong" in shown
    assert "good.jsonl have" not in shown


def test_the_command_in_a_message_shows_the_source_as_the_run_read_it(inspect, tmp_path):
    """Each error about a source names a command that reads it with the same settings."""
    path = tmp_path / "it's own.jsonl"
    path.write_text("".join(json.dumps({"ask": "", "tell": "x"}) + "\n" for _ in range(5)))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows(30)))
    own = {"source": str(path), "prompt_column": "ask"}
    for setting, use in (("sft_source", "sft"), ("prompts_source", "prompts"), ("source", None)):
        more = {"chosen_column": "tell"} if use != "prompts" else {}
        more |= {"rejected_column": "tell2"} if use is None else {}
        if use is None:
            rows_of_pairs = [{"ask": "", "tell": "x", "tell2": "y"}] * 5
            path.write_text("".join(json.dumps(line) + "\n" for line in rows_of_pairs))
        sources: dict = {"source": str(tmp_path / "p.jsonl"), setting: [{**own, **more}]}
        with pytest.raises(DataError) as caught:
            prepare_data(DataConfig(**sources), tmp_path)
        command = str(caught.value).partition("all reasons: ")[2]
        words = shlex.split(command)
        assert words[:3] == ["rlhf", "data", "inspect"]
        shown = inspect(None, *words[4:], source=words[3])
        assert "5 of 5 rows are left out" in shown
        assert "prompt is empty" in shown
