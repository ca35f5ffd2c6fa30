"""Ids of rows, the artifacts that rows reached, and rows to go without."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows import artifacts, forget
from rlhf.config import DataConfig, load_config
from rlhf.data import rows as files
from rlhf.data.lineage import forget_rows, forgotten_ids, reach, rows_of
from rlhf.data.prepare import prepare_data
from rlhf.data.records import Record
from rlhf.data.rows import Demonstration, Pair, PromptRow, read_rows
from rlhf.errors import ConfigError, DataError
from rlhf.store import open_store
from tasks.runner import fingerprint, producer
from tasks.stages import STAGES
from tests.data.helpers import message, pair, rows


def id_of(row) -> str:
    return Record("any.jsonl", 1, row).id


def prepare(folder, data, name="pairs.jsonl", **settings):
    """Return the dataset made of these rows; `forgotten` and settings of `data` are passed on."""
    source = folder / name
    source.write_text("".join(json.dumps(row) + "\n" for row in data))
    out = folder / f"out-{len([*folder.iterdir()])}"
    out.mkdir()
    forgotten = settings.pop("forgotten", frozenset())
    config = DataConfig(source=str(source), max_bad_fraction=1, **settings)
    prepare_data(config, out, forgotten=forgotten)
    return out


def all_pairs(out):
    return [p for n in (files.PAIRS_TRAIN, files.PAIRS_EVAL) for p in read_rows(out / n, Pair)]


@given(row=st.dictionaries(st.text(), st.none() | st.integers() | st.text(), min_size=1))
def test_an_id_follows_from_the_content_alone(row):
    backwards = dict(reversed(row.items()))
    assert id_of(row) == Record("other.jsonl", 77, backwards).id
    assert len({id_of(row), *(id_of({**row, key: "another" * 9}) for key in row)}) == len(row) + 1


def test_what_json_cannot_write_has_an_id_too():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    contents = [{"a": b"x"}, {"a": {1: "x", "b": "y"}}, {"a": "\ud800"}, {"a": deep}]
    ids = {id_of(content) for content in contents} | {Record("f", 1, None, text="{").id}
    assert len(ids) == 5
    assert all(len(i) == 32 for i in ids)


def test_ids_stay_when_rows_are_added_and_the_file_is_renamed(tmp_path):
    first = {p.prompt: p.row_ids for p in all_pairs(prepare(tmp_path, rows(10)))}
    later = prepare(tmp_path, [pair("new"), *reversed(rows(10))], "later.jsonl")
    assert {p.prompt: p.row_ids for p in all_pairs(later) if p.prompt != "new"} == first
    assert first["p3"] == (id_of(rows(10)[3]),)


def test_a_merged_pair_its_demonstration_and_its_prompt_know_all_their_rows(tmp_path):
    votes = [{**pair("which one?", "yes", "no"), "who": who} for who in "abc"]
    outvoted = {**pair("which one?", "no", "yes"), "who": "d"}
    out = prepare(tmp_path, [*votes, outvoted, *rows(40)], eval_fraction=0.01)
    ids = {id_of(vote) for vote in votes}
    for name, kind in (
        (files.PAIRS_TRAIN, Pair), (files.DEMONSTRATIONS, Demonstration),
        (files.PROMPTS_TRAIN, PromptRow),
    ):  # fmt: skip
        [row] = [row for row in read_rows(out / name, kind) if row.prompt == "which one?"]
        assert set(row.row_ids) == ids
    split = {row.id: (row.line, row.split) for row in rows_of(out)}
    assert split[id_of(outvoted)] == (4, "quarantine")
    assert [split[id_of(vote)] for vote in votes] == [(n, "train") for n in (1, 2, 3)]


def test_files_of_one_name_in_source_and_eval_source_are_counted_apart(tmp_path):
    for part, first in (("train", 0), ("test", 50)):
        (tmp_path / part).mkdir()
        lines = [json.dumps(row) + "\n" for row in [*rows(1), *rows(60)[first + 1 : first + 10]]]
        (tmp_path / part / "pairs.jsonl").write_text("".join(lines))
    out = tmp_path / "out"
    out.mkdir()
    source, held_out = (str(tmp_path / part / "pairs.jsonl") for part in ("train", "test"))
    result = prepare_data(DataConfig(source=source, eval_source=held_out), out)
    assert (result.metrics["rows"], result.metrics["rows_used"]) == (20, 19)  # row 1 is in both
    assert sum(row.split == "quarantine" for row in rows_of(out)) == 1
    assert [row.split for row in rows_of(out)].count("eval") == 10


def test_a_forgotten_row_is_quarantined_without_its_text(tmp_path):
    secret = pair("secret-prompt", "secret-chosen", "secret-rejected")
    out = prepare(tmp_path, [secret, *rows(10)], forgotten=frozenset([id_of(secret)]))
    [line] = [json.loads(x) for x in (out / files.QUARANTINE).read_text().splitlines()]
    assert line == {
        "source": "pairs.jsonl", "line": 1, "id": id_of(secret), "reason": "forgotten",
        "detail": "", "row": None,
    }  # fmt: skip
    assert len(all_pairs(out)) == 10
    shutil.copytree(out, tmp_path / "copy")
    for file in (tmp_path / "copy").iterdir():
        assert b"secret-" not in file.read_bytes()


def test_forgotten_rows_that_the_source_lacks_are_counted(tmp_path):
    present, changed = id_of(rows(10)[1]), id_of({**rows(10)[2], "chosen": "before"})
    out = prepare(tmp_path, rows(10), forgotten=frozenset([present, changed]))
    notes = json.loads((out / files.SUMMARY).read_text())["notes"]
    said = "1 of 2 forgotten rows are not in the sources: they were removed, or changed"
    assert [note.partition(" (")[0] for note in notes if "forgotten" in note] == [said]
    out = prepare(tmp_path, rows(10), forgotten=frozenset([present]))
    assert "forgotten rows" not in (out / files.SUMMARY).read_text()


@pytest.fixture
def site(tmp_path):
    """A store with a dataset, models made of it, and another line; the dataset's folder."""
    store = open_store(str(tmp_path / "store"), cache_dir=tmp_path / "cache")

    def publish(folder, kind, **parents):
        return store.publish(
            folder, kind, parents=parents, metrics={}, producer=producer("push", {}, 0)
        )

    def model(name, **parents):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text(json.dumps(name))
        return publish(tmp_path / name, "policy", **parents)

    data = publish(prepare(tmp_path, rows(10)), "dataset")
    sft = model("sft", data=data)
    refs = {"data": data, "sft": sft, "policy": model("ppo", sft=sft), "other": model("other")}
    return store, refs


def row_of(site, split):
    """A row of a split of the site's dataset."""
    store, refs = site
    return next(row for row in rows_of(store.fetch(refs["data"])) if row.split == split)


def test_the_reach_of_a_row_goes_through_all_generations(site):
    store, refs = site
    row, unknown = row_of(site, "train"), "0" * 32
    known = row.id
    found = reach(store, [known, unknown])
    assert [(ref, each.line) for ref, each in found.rows[known]] == [(refs["data"], row.line)]
    assert found.derived[known] == [refs["sft"], refs["policy"]]
    assert not found.rows[unknown]
    assert not found.derived[unknown]


def test_a_held_out_row_reaches_evaluations_but_no_model(site, tmp_path, capsys):
    store, refs = site
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "x.json").write_text("1")
    evaluation = store.publish(
        folder, "evaluation", parents={"data": refs["data"], "policy": refs["policy"]},
        metrics={}, producer=producer("push", {}, 0),
    )  # fmt: skip
    trained, held_out = row_of(site, "train").id, row_of(site, "eval").id
    found = reach(store, [trained, held_out])
    assert {*found.derived[trained]} == {refs["sft"], refs["policy"], evaluation}
    assert found.derived[held_out] == []
    assert found.tested == {trained: [], held_out: [evaluation]}
    forget.forget(ids=[held_out], store=str(tmp_path / "store"))
    shown = capsys.readouterr().out
    assert f"held out for evaluation {evaluation.digest[:12]}" in shown
    assert "reached" not in shown
    assert "2 artifacts that exist stay as they are" in shown


def test_the_reach_of_a_row_in_several_datasets_and_in_quarantine(site, tmp_path):
    """Older datasets are named, wherever they stand; a row that is left out reaches nothing."""
    store, refs = site

    def publish(folder, kind, **parents):
        return store.publish(
            folder, kind, parents=parents, metrics={}, producer=producer("push", {}, 0)
        )

    (tmp_path / "old").mkdir()
    old = []
    for name in "abc":
        (tmp_path / "old" / "summary.json").write_text(json.dumps(name))
        old.append(publish(tmp_path / "old", "dataset"))
    number = row_of(site, "train").line - 1
    used = rows(10)[number]
    second = publish(prepare(tmp_path, [used, *rows(30)[10:]], "second.jsonl"), "dataset")
    lost = [pair(f"p{number}", f"bad {number}", f"good {number}")] * 2
    third = publish(prepare(tmp_path, [used, *lost, *rows(30)[10:]], "third.jsonl"), "dataset")
    models = []
    for name, data in (("of-second", second), ("of-third", third)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text(json.dumps(name))
        models.append(publish(tmp_path / name, "policy", data=data))
    found = reach(store, [id_of(used)])
    places = {(ref, row.source, row.split == "quarantine") for ref, row in found.rows[id_of(used)]}
    assert places == {
        (refs["data"], "pairs.jsonl", False), (second, "second.jsonl", False),
        (third, "third.jsonl", True),
    }  # fmt: skip
    derived = found.derived[id_of(used)]
    assert {*derived} == {refs["sft"], refs["policy"], models[0]}
    assert len(derived) == 3
    assert {ref for ref, _ in found.unknown} == {*old}


def test_forget_looks_first_then_records_and_the_fingerprint_changes(site, tmp_path, capsys):
    store, refs = site
    monkey = row_of(site, "train").id
    options = [f"--data.source={tmp_path / 'pairs.jsonl'}", f"--store={tmp_path / 'store'}",
               "--evaluation.judge=none", f"--runtime.work_dir={tmp_path / 'work'}"]  # fmt: skip
    config = load_config(None, options).config
    before = fingerprint(STAGES["prepare-data"], config, {})
    forget.forget(ids=[monkey], store=str(tmp_path / "store"))
    shown = capsys.readouterr().out
    assert f"reached policy {refs['policy'].digest[:12]}" in shown
    assert "nothing was recorded" in shown
    assert not forgotten_ids(store)
    assert fingerprint(STAGES["prepare-data"], config, {}) == before
    (tmp_path / "ids.txt").write_text(f"{monkey}\n")
    forget.forget(file=tmp_path / "ids.txt", record=True, store=str(tmp_path / "store"))
    assert forgotten_ids(store) == {monkey}
    assert forget_rows(store, [monkey]) == 0
    assert forget_rows(store, [monkey, "0" * 32]) == 1
    # The name of the history is that of stores which exist.
    entries = [entry["ids"] for entry in store.history.entries("forgotten-rows")]
    assert entries == [[monkey], ["0" * 32]]
    assert fingerprint(STAGES["prepare-data"], config, {}) != before


def test_wrong_ids_are_refused(tmp_path):
    assert "'12' is no id" in message(ConfigError, forget.forget, ids=["12"])
    assert "--ids or --file" in message(ConfigError, forget.forget)
    assert "no.txt" in message(ConfigError, forget.forget, file=tmp_path / "no.txt")


def test_lineage_lists_rows_and_rm_keeps_what_is_pinned(site, tmp_path, capsys):
    store, refs = site
    uri = str(tmp_path / "store")
    artifacts.lineage(refs["policy"].digest, rows=True, store=uri)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(x["id"], x["line"]) for x in lines} == {
        (id_of(row), n) for n, row in enumerate(rows(10), start=1)
    }
    store.pins.add("best", refs["policy"])
    assert "is pinned" in message(ConfigError, artifacts.rm, refs["data"].digest, store=uri)
    store.pins.remove("best")
    artifacts.rm(refs["data"].digest, store=uri)
    assert not store.exists(refs["data"])
    assert store.exists(refs["sft"])


def test_a_dataset_of_an_older_version_says_so(tmp_path):
    assert "older version" in message(DataError, rows_of, tmp_path)
