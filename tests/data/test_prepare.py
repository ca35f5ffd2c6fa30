"""Data preparation: the split of prompts, and the files that are written."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import DataConfig, WorldConfig
from rlhf.data import rows as files
from rlhf.data.prepare import prepare_data
from rlhf.data.rows import Demonstration, Pair, PromptRow, read_rows
from rlhf.errors import ConfigError, DataError
from tests.data.helpers import assistant, message, pair, rows, user

PARTS = (
    (files.DEMONSTRATIONS, Demonstration),
    (files.PAIRS_TRAIN, Pair),
    (files.PAIRS_EVAL, Pair),
    (files.PROMPTS_TRAIN, PromptRow),
    (files.PROMPTS_EVAL, PromptRow),
)
TRAINING = (files.DEMONSTRATIONS, files.PAIRS_TRAIN, files.PROMPTS_TRAIN)
HELD_OUT = (files.PAIRS_EVAL, files.PROMPTS_EVAL)


def prepare(tmp_path: Path, data: Sequence[dict[str, Any]], seed: int = 0, **options: Any):
    """Prepare these rows and read back what was written."""
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in data))
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    prepare_data(DataConfig(source=str(source), **options), out, seed=seed)
    parts = {name: read_rows(out / name, kind) for name, kind in PARTS}
    return parts, json.loads((out / files.SUMMARY).read_text())


def prompts(parts: dict[str, list[Any]], names: Sequence[str]) -> set[str]:
    return {json.dumps(row.prompt) for name in names for row in parts[name]}


def test_what_is_written(tmp_path):
    data = [*rows(40), pair("p0", "better", "bad 0"), pair(""), pair("p1", "good 1", "bad 1")]
    parts, summary = prepare(tmp_path, [{**row, "id": 1} for row in data], eval_fraction=0.25)
    train, held_out = parts[files.PAIRS_TRAIN], parts[files.PAIRS_EVAL]
    prompts_train, prompts_eval = parts[files.PROMPTS_TRAIN], parts[files.PROMPTS_EVAL]
    assert 5 <= len(prompts_eval) <= 15
    assert len(prompts_train) + len(prompts_eval) == 40
    assert len(train) + len(held_out) == 41
    assert [d.prompt for d in parts[files.DEMONSTRATIONS]] == [p.prompt for p in prompts_train]
    assert summary == {
        "source": "pairs.jsonl",
        "demonstrations": len(prompts_train),
        "pairs_train": len(train),
        "pairs_eval": len(held_out),
        "prompts_train": len(prompts_train),
        "prompts_eval": len(prompts_eval),
        "chosen_longer": 1.0,
        "format": "pairs",
        "rows": 43,
        "rows_used": 42,
        "rows_merged": 1,
        "agreement": 1.0,
        "rows_left_out": "1 of 43 rows left out (1 × prompt is empty)",
        "unused_columns": "id",
        "notes": summary["notes"],
        "left_out": {"prompt is empty": 1},
        "findings": summary["findings"],
    }
    (line,) = (tmp_path / "out" / files.QUARANTINE).read_text().splitlines()
    found = json.loads(line)
    assert (found["source"], found["line"], found["reason"]) == (
        "pairs.jsonl",
        42,
        "prompt is empty",
    )
    assert found["row"] == {**pair(""), "id": 1}


def test_metrics_and_progress(tmp_path):
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows(10)))
    told: list[tuple[int, int]] = []
    result = prepare_data(
        DataConfig(source=str(source)),
        tmp_path,
        progress=lambda done, total, _: told.append((done, total)),
    )
    assert result.metrics["pairs_train"] == 8
    assert "left_out" not in result.metrics
    assert "rows_left_out" not in result.metrics
    assert told == [(1, 2), (2, 2)]


def test_alike_prompts_never_stand_on_both_sides(tmp_path):
    forms = ("Say {}", " say  {}\n", "SAY {}", "S\uff41y {}")
    data = [pair(form.format(i), f"c{n}") for i in range(30) for n, form in enumerate(forms)]
    data += [pair([user(f"Say {i}")], "chat") for i in range(30)]
    for seed in range(5):
        parts, _ = prepare(tmp_path, data, seed=seed, eval_fraction=0.5)
        sides = [
            {json.loads(p)[0]["content"] if p.startswith("[") else json.loads(p) for p in side}
            for side in (prompts(parts, TRAINING), prompts(parts, HELD_OUT))
        ]
        numbers = [{int(text.split()[-1]) for text in side} for side in sides]
        assert numbers[0].isdisjoint(numbers[1])
        assert len(numbers[0] | numbers[1]) == 30


def test_system_prompt_makes_another_prompt(tmp_path):
    chats = [[{"role": "system", "content": f"s{i}"}, user("p")] for i in range(6)]
    parts, _ = prepare(tmp_path, [pair(chat) for chat in chats])
    assert len(parts[files.PROMPTS_TRAIN]) + len(parts[files.PROMPTS_EVAL]) == 6


def test_same_seed_same_bytes_in_another_process(tmp_path):
    prepare(tmp_path, [*rows(40), *rows(40)], seed=3, max_pairs=20)
    script = (
        "import sys; from pathlib import Path\n"
        "from rlhf.config import DataConfig\n"
        "from rlhf.data.prepare import prepare_data\n"
        "config = DataConfig(source=sys.argv[1], max_pairs=20)\n"
        "prepare_data(config, Path(sys.argv[2]), seed=3)\n"
    )
    again = tmp_path / "again"
    again.mkdir()
    command = [sys.executable, "-c", script, str(tmp_path / "pairs.jsonl"), str(again)]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "7"})
    for path in sorted((tmp_path / "out").iterdir()):
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_another_seed_holds_out_and_samples_others(tmp_path):
    one, _ = prepare(tmp_path, rows(100), seed=1)
    two, _ = prepare(tmp_path, rows(100), seed=2)
    assert prompts(one, HELD_OUT) != prompts(two, HELD_OUT)
    one, _ = prepare(tmp_path, rows(100), seed=1, max_pairs=50)
    two, _ = prepare(tmp_path, rows(100), seed=2, max_pairs=50)
    everything = TRAINING + HELD_OUT
    assert prompts(one, everything) != prompts(two, everything)


def test_held_out_prompts_do_not_depend_on_the_order_and_stay_when_rows_are_added(tmp_path):
    one, _ = prepare(tmp_path, rows(100))
    two, _ = prepare(tmp_path, rows(100)[::-1])
    assert prompts(one, HELD_OUT) == prompts(two, HELD_OUT)
    more, _ = prepare(tmp_path, [*rows(100), pair("p5", "new reply")])
    assert prompts(one, HELD_OUT) == prompts(more, HELD_OUT)


@pytest.mark.parametrize(("most", "kept"), [(10, 10), (29, 29), (30, 30), (31, 30), (None, 30)])
def test_max_pairs(tmp_path, most, kept):
    parts, summary = prepare(tmp_path, rows(30), max_pairs=most)
    assert summary["pairs_train"] + summary["pairs_eval"] == kept
    names = [int(p.prompt[1:]) for p in parts[files.PAIRS_TRAIN]]
    assert names == sorted(names)  # the order of the file is kept


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"), [(4, 0.1, 2), (4, 0.9, 2), (10, 0.01, 2), (10, 0.999, 8)]
)
def test_both_sides_get_at_least_two_prompts(tmp_path, count, fraction, held_out):
    parts, _ = prepare(tmp_path, rows(count), eval_fraction=fraction)
    assert len(parts[files.PROMPTS_EVAL]) == held_out
    assert len(parts[files.PROMPTS_TRAIN]) == count - held_out


@pytest.mark.parametrize(
    ("data", "count", "left_out"),
    [
        (rows(1), 1, "none"),
        (rows(2), 2, "none"),
        (rows(3), 3, "none"),
        ([pair("p", f"reply {i}") for i in range(50)], 1, "none"),
        ([*rows(2), pair("p0", "bad 0", "good 0")], 1, "2 × votes for a pair are tied"),
    ],
)
def test_too_little_to_split(tmp_path, data, count, left_out):
    text = message(DataError, prepare, tmp_path, data)
    assert text == (
        f"data.source = {str(tmp_path / 'pairs.jsonl')!r}: {count} different prompts with usable "
        f"pairs are too few to train on 2 and hold out 2; give more rows (left out: {left_out})"
    )
    assert list((tmp_path / "out").iterdir()) == []


def test_too_many_bad_rows_stop_the_stage_with_reasons_examples_and_cures(tmp_path):
    data = [*rows(17), pair(""), pair(""), pair("x", {"text": "c"})]
    text = message(DataError, prepare, tmp_path, data)
    assert "3 of 20 rows can't be used, more than data.max_bad_fraction = 0.1 allows: " in text
    assert "2 × prompt is empty (pairs.jsonl:18" in text
    assert "data.chosen_column=chosen.text" in text
    assert "rlhf data inspect" in text
    assert list((tmp_path / "out").iterdir()) == []
    _, summary = prepare(tmp_path, data, max_bad_fraction=0.15)
    assert summary["rows_used"] == 17


def test_ties_and_lost_votes_are_not_bad_rows(tmp_path):
    data = [*rows(10), *(pair(f"p{i}", f"bad {i}", f"good {i}") for i in range(5))]
    _, summary = prepare(tmp_path, data, max_bad_fraction=0)
    assert summary["left_out"] == {"votes for a pair are tied": 10}


def test_the_sources_own_test_part_is_held_out_and_leaks_are_not_trained_on(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    own = [*(pair(f"test {i}") for i in range(3)), pair(" P1", "c1")]
    for name, data in (("train.jsonl", rows(6)), ("test.jsonl", own)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in data))
    prepare_data(DataConfig(source=str(folder)), out)
    held_out = [row.prompt for row in read_rows(out / files.PAIRS_EVAL, Pair)]
    assert held_out == ["test 0", "test 1", "test 2", " P1"]
    train = [row.prompt for row in read_rows(out / files.PAIRS_TRAIN, Pair)]
    assert train == ["p0", "p2", "p3", "p4", "p5"]
    summary = json.loads((out / files.SUMMARY).read_text())
    assert summary["left_out"] == {"prompt is held out": 1}
    assert "held out as the source's own test part: test.jsonl" in summary["notes"]
    prepare_data(DataConfig(source=str(folder), split="random", eval_fraction=0.5), out)
    assert len(read_rows(out / files.PAIRS_TRAIN, Pair)) < 8


def test_held_out_data_of_their_own(tmp_path):
    for name, data in (("a.jsonl", rows(6)), ("b.jsonl", [pair(f"q{i}") for i in range(3)])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in data))
    out = tmp_path / "out"
    out.mkdir()
    config = DataConfig(source=str(tmp_path / "a.jsonl"), eval_source=str(tmp_path / "b.jsonl"))
    prepare_data(config, out)
    assert [p.prompt for p in read_rows(out / files.PAIRS_EVAL, Pair)] == ["q0", "q1", "q2"]
    assert len(read_rows(out / files.PAIRS_TRAIN, Pair)) == 6


def test_a_conversation_stands_on_one_side(tmp_path):
    data = []
    for i in range(40):
        opening = [user(f"How do I mend a broken thing number {i}?")]
        data += [pair(opening), pair([*opening, assistant("c"), user("And then?")])]
    for seed in range(3):
        parts, _ = prepare(tmp_path, data, seed=seed, eval_fraction=0.4)
        sides = [
            {row.prompt[0]["content"] for name in names for row in parts[name]}
            for names in (TRAINING, HELD_OUT)
        ]
        assert sides[0].isdisjoint(sides[1])
        assert len(sides[0] | sides[1]) == 40


def test_missing_source(tmp_path):
    config = DataConfig(source=str(tmp_path / "none.csv"))
    assert "no such file or folder" in message(ConfigError, prepare_data, config, tmp_path)


def test_unusual_text_survives_the_files(tmp_path):
    odd = "a\u2028b\x85c\r\nd 🙂"
    parts, _ = prepare(tmp_path, [pair(f"{i}{odd}", odd, "r") for i in range(10)])
    assert {p.chosen for p in parts[files.PAIRS_TRAIN]} == {odd}


WORLD = WorldConfig(pairs=200, demonstrations=200, prompts=100, eval_pairs=60, eval_prompts=40)


def world(tmp_path: Path, seed: int = 0) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    out = tmp_path / f"world-{seed}"
    out.mkdir(exist_ok=True)
    prepare_data(DataConfig(world=WORLD), out, seed=seed)
    summary = json.loads((out / files.SUMMARY).read_text())
    return {name: read_rows(out / name, kind) for name, kind in PARTS}, summary


def test_world(tmp_path):
    parts, summary = world(tmp_path)
    assert [len(parts[name]) for name, _ in PARTS] == [200, 200, 60, 100, 40]
    assert prompts(parts, TRAINING).isdisjoint(prompts(parts, HELD_OUT))
    for name, _ in PARTS[2:]:
        assert len(prompts(parts, [name])) == len(parts[name])
    assert summary["left_out"] == {}
    assert summary["source"] == "world"
    assert 0 < summary["chosen_longer"] < 1


def test_worlds_groups_are_kept_for_evaluation_only(tmp_path):
    parts, _ = world(tmp_path)
    assert {row.group for row in parts[files.PROMPTS_EVAL]} == {"seen-template", "new-template"}
    assert {row.group for row in parts[files.PAIRS_TRAIN]} == {None}


def test_world_follows_the_seed(tmp_path):
    assert world(tmp_path, 1) == world(tmp_path, 1)
    assert world(tmp_path, 1)[0] != world(tmp_path, 2)[0]


def test_world_that_has_too_few_prompts(tmp_path, monkeypatch):
    config = DataConfig(world=WORLD)
    module = importlib.import_module("rlhf.world.generate")
    monkeypatch.setattr(module, "make_prompt", lambda *_: ("same", ("t", "i")))
    text = message(DataError, prepare_data, config, tmp_path)
    assert text == (
        "data.world: the world has too few distinct prompts for 60 eval pairs; ask for fewer"
    )


def test_references_and_metadata_reach_the_prompts_of_both_sides(tmp_path):
    data = [{**row, "answer": f"a{i}", "topic": i} for i, row in enumerate(rows(10))]
    options = {"reference_column": "answer", "metadata_columns": ("topic",)}
    parts, _ = prepare(tmp_path, data, **options)
    found = [*parts[files.PROMPTS_TRAIN], *parts[files.PROMPTS_EVAL]]
    wanted = [PromptRow(f"p{i}", None, f"a{i}", {"topic": i}) for i in range(10)]
    assert sorted(found, key=lambda row: row.prompt) == wanted


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"reference_column": "answr"}, "data.reference_column = 'answr'"),
        ({"metadata_columns": ("topic",)}, "data.metadata_columns = 'topic'"),
    ],
)
def test_a_column_that_there_is_not(tmp_path, options, field):
    text = message(ConfigError, prepare, tmp_path, rows(10), **options)
    assert text.startswith(f"{field}: not a column of the source, which has prompt, chosen,")


def test_thumbs_for_other_prompts_each_have_a_cure_that_works(tmp_path):
    """Without two replies to a prompt there are no pairs; as demonstrations the rows are of use."""
    thumbs = [
        {"prompt": f"ask {i}", "completion": f"say {i}", "label": i % 3 > 0} for i in range(30)
    ]
    path = tmp_path / "kto.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in thumbs))
    text = message(DataError, prepare_data, DataConfig(source=str(path)), tmp_path)
    assert (
        "give two replies to each prompt, one better than the other; or train SFT on those" in text
    )
    assert "30 × no other reply to this prompt has a different score" in text
    assert "give more rows" not in text
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows(20)))
    out = tmp_path / "out"
    out.mkdir()
    prepare_data(DataConfig(source=str(pairs), sft_source=str(path)), out)
    assert len(read_rows(out / files.DEMONSTRATIONS, Demonstration)) == 20
    graded = [{**row, "label": 1 + i % 5} for i, row in enumerate(thumbs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in graded))
    text = message(DataError, prepare_data, DataConfig(source=str(path)), tmp_path)
    assert "sft_source" not in text  # which would take the worst ones too


def test_too_few_prompts_because_of_one_reason_have_its_cure(tmp_path):
    tied = [row for p in "pqstu" for row in (pair(p, "x", "y"), pair(p, "y", "x"))]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*tied, pair("r")]))
    text = message(DataError, prepare_data, DataConfig(source=str(path)), tmp_path)
    assert (
        "; set data.votes=keep to train on both (left out: 10 × votes for a pair are tied)" in text
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in [*tied[:8], pair("r")]))
    assert "; give more rows (" in message(
        DataError, prepare_data, DataConfig(source=str(path)), tmp_path
    )
