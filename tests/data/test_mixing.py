"""Several sources of pairs: weights, votes over sources, names, counts, settings of each."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.config import DataConfig, SourceConfig, StoreConfig, load_config
from rlhf.data import rows as files
from rlhf.data.mixing import Sources, settings_of_pairs, times_used
from rlhf.data.prepare import prepare_data
from rlhf.data.quarantine import Quarantine
from rlhf.data.rows import Pair, PromptRow, read_rows
from rlhf.data.sources import source_digest
from rlhf.errors import ConfigError, DataError
from tasks.retraining import data_digest
from tests.data.helpers import message, pair, rows
from tests.examples import examples


def write(path, data) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(path)


def numbered(name: str, count: int = 20) -> list[dict[str, Any]]:
    return [pair(f"{name} {i}", f"good {i}", f"bad {i}") for i in range(count)]


def prepare(tmp_path, source, **options):
    """Training pairs, held-out pairs, summary, and the quarantine's lines."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    prepare_data(DataConfig(source=source, **options), out)
    train, held_out = (
        read_rows(out / name, Pair) for name in (files.PAIRS_TRAIN, files.PAIRS_EVAL)
    )
    lines = [json.loads(line) for line in (out / files.QUARANTINE).read_text().splitlines()]
    return train, held_out, json.loads((out / files.SUMMARY).read_text()), lines


def names(pairs) -> Counter[str]:
    return Counter(p.prompt.split()[0] for p in pairs)


def test_a_weight_is_how_often_rows_are_used(tmp_path):
    one, two, three = (write(tmp_path / f"{n}.jsonl", numbered(n, 200)) for n in "abc")
    source = [one, {"source": two, "weight": 2}, {"source": three, "weight": 0.25}]
    train, held_out, summary, lines = prepare(tmp_path, source)
    whole, held = names(train), names(held_out)
    assert whole["a"] + held["a"] == 200
    assert whole["b"] == 2 * (200 - held["b"])
    assert set(Counter(p.prompt for p in train if p.prompt.startswith("b")).values()) == {2}
    assert 30 < whole["c"] + held["c"] < 70
    assert max(Counter(p.prompt for p in held_out).values()) == 1
    assert len(lines) == 200 - whole["c"] - held["c"]
    assert {(line["source"], line["reason"]) for line in lines} == {
        ("c.jsonl", "not in the share of its source's weight")
    }
    assert summary["source"] == "a.jsonl, b.jsonl, c.jsonl"
    found = {c["source"]: (c["rows"], c["left_out"], c["written"]) for c in summary["sources"]}
    assert found == {
        "a.jsonl": (200, 0, 200),
        "b.jsonl": (200, 0, whole["b"] + held["b"]),
        "c.jsonl": (200, len(lines), whole["c"] + held["c"]),
    }
    (note,) = [n for n in summary["notes"] if "b.jsonl with weight 2: 200 rows, 0 left out" in n]
    assert note.endswith(f"of {len(train) + len(held_out):,} written")
    # Each prompt is asked once by PPO, whatever the weight.
    prompts = [row.prompt for row in read_rows(tmp_path / "out" / files.PROMPTS_TRAIN, PromptRow)]
    assert len(prompts) == len(set(prompts)) == len({p.prompt for p in train})


@given(st.floats(0.01, 5), st.integers(0, 3))
def test_times_used_have_the_weight_as_their_mean(weight, seed):
    times = [times_used(weight, f"key {i}", seed) for i in range(2000)]
    assert set(times) <= {int(weight), int(weight) + 1}
    assert sum(times) / 2000 == pytest.approx(weight, abs=0.06)  # 5 deviations of 0.5 / √2000


def test_what_a_weight_leaves_stays_when_sources_grow(tmp_path):
    half = {"source": write(tmp_path / "a.jsonl", numbered("a", 60)), "weight": 0.5}
    other = write(tmp_path / "b.jsonl", numbered("b", 10))
    before = {p.prompt for side in prepare(tmp_path, [half, other])[:2] for p in side}
    write(tmp_path / "a.jsonl", [*numbered("new", 30), *numbered("a", 60)])
    write(tmp_path / "b.jsonl", numbered("b", 90))
    after = {p.prompt for side in prepare(tmp_path, [half, other])[:2] for p in side}
    assert {p for p in before if p.startswith("a")} == {p for p in after if p.startswith("a")}
    larger = {**half, "weight": 0.7}
    more = {p.prompt for side in prepare(tmp_path, [larger, other])[:2] for p in side}
    assert {p for p in after if p.startswith("a")} < more


def test_rows_of_two_sources_that_compare_the_same_are_votes(tmp_path):
    one = write(tmp_path / "a.jsonl", [*numbered("a"), pair("p", "x", "y"), pair("p", "x", "y")])
    other = [{"q": "p", "better": "y", "worse": "x"}, {"q": "a 1", "better": "good 1",
                                                      "worse": "bad 1"}]  # fmt: skip
    two = {"source": write(tmp_path / "b.jsonl", other), "prompt_column": "q", "weight": 3}
    train, held_out, summary, lines = prepare(tmp_path, [one, two])
    found = {(p.chosen, p.rejected) for p in (*train, *held_out) if p.prompt == "p"}
    assert found == {("x", "y")}
    assert [(n["source"], n["line"], n["reason"]) for n in lines] == [
        ("b.jsonl", 1, "outvoted by other rows of the pair")
    ]
    assert summary["rows_merged"] == 2
    # The pair that both sources hold is used as often as the larger weight says.
    times = Counter(p.prompt for p in train)
    assert times["a 1"] == (3 if "a 1" in times else 0)


def test_files_of_one_name_keep_their_rows_apart(tmp_path):
    bad = pair("")
    one = write(tmp_path / "one/train.jsonl", [*numbered("a"), bad])
    two = write(tmp_path / "two/train.jsonl", [bad, *numbered("b")])
    for source in ([one, two], [str(tmp_path / "one"), str(tmp_path / "two")]):
        _, _, summary, lines = prepare(tmp_path, source)
        assert len({line["source"] for line in lines}) == 2
        assert sorted(line["line"] for line in lines) == [1, 21]
        assert (summary["rows"], summary["rows_used"]) == (42, 40)


def test_a_small_broken_source_is_no_small_share_of_all(tmp_path):
    good = write(tmp_path / "a.jsonl", numbered("a", 200))
    broken = write(tmp_path / "b.jsonl", [*numbered("b", 2), pair(""), pair("")])
    text = message(DataError, prepare, tmp_path, [good, broken])
    assert text.startswith("data.source[1] = ")
    assert "2 of 4 rows can't be used" in text
    assert "2 × prompt is empty (b.jsonl:3)" in text
    assert not (tmp_path / "out" / files.QUARANTINE).exists()


def test_settings_of_a_source_are_its_own(tmp_path):
    log = [
        {"prompt": f"b {i}", "response_a": "x", "response_b": "y", "label": i % 2}
        for i in range(20)
    ]
    right = [{"prompt": f"a {i}", "response_a": "x", "response_b": "y", "label": 1 - i % 2}
             for i in range(20)]  # fmt: skip
    source = [
        {"source": write(tmp_path / "a.jsonl", right), "labels": {"first": 1, "second": 0}},
        write(tmp_path / "b.jsonl", log),
    ]
    train, held_out, _, _ = prepare(tmp_path, source, labels={"first": 0, "second": 1})
    for found in (*train, *held_out):
        assert found.chosen == ("x" if int(found.prompt.split()[1]) % 2 == 0 else "y")


def test_references_of_each_source(tmp_path):
    one = [{**row, "right": "A"} for row in numbered("a")]
    two = [{**row, "truth": "B"} for row in numbered("b")]
    source = [
        {"source": write(tmp_path / "a.jsonl", one), "reference_column": "right"},
        {"source": write(tmp_path / "b.jsonl", two), "reference_column": "truth"},
    ]
    prepare(tmp_path, source)
    prompts = read_rows(tmp_path / "out" / files.PROMPTS_TRAIN, PromptRow)
    assert {(row.prompt[0], row.reference) for row in prompts} == {("a", "A"), ("b", "B")}
    assert DataConfig(source=source).has_references
    assert not DataConfig(source=[source[0]["source"]]).has_references


def test_a_weight_of_every_source_counts(tmp_path):
    one, two = (write(tmp_path / f"{n}.jsonl", numbered(n)) for n in "ab")
    source = [{"source": one, "weight": 2}, {"source": two, "weight": 3}]
    train, held_out, _, _ = prepare(tmp_path, source)
    assert names(train) == {
        "a": 2 * (20 - names(held_out)["a"]),
        "b": 3 * (20 - names(held_out)["b"]),
    }


def test_names_of_files(tmp_path):
    """Of one source as in its folder; of several with the source's name in front."""
    bad = [*numbered("a"), pair("")]
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    for name in ("one/x.jsonl", "one/sub/y.jsonl", "two/x.jsonl", "z.jsonl"):
        write(tmp_path / name, bad)

    def found(source: Any) -> list[str]:
        return sorted({n["source"] for n in prepare(tmp_path, source, max_bad_fraction=1)[3]})

    assert found(one) == ["sub/y.jsonl", "x.jsonl"]
    assert found(str(tmp_path / "z.jsonl")) == ["z.jsonl"]
    assert found([one, two, str(tmp_path / "z.jsonl")]) == [
        "one/sub/y.jsonl", "one/x.jsonl", "two/x.jsonl", "z.jsonl",
    ]  # fmt: skip
    replies = [{"prompt": "ask", "completion": "say"}, {"prompt": "", "completion": "say"}]
    write(tmp_path / "sft/x.jsonl", replies)
    own = prepare(tmp_path, one, max_bad_fraction=1, sft_source=[str(tmp_path / "sft")])
    assert "sft_source/sft/x.jsonl" in {n["source"] for n in own[3]}


def test_the_command_that_shows_a_source():
    config = DataConfig(
        source=["a.jsonl", {"source": "b c.jsonl", "weight": 2}, {"source": "d", "delimiter": "|"}],
        sft_source="e.jsonl",
        prompts_source=[{"source": "f.jsonl", "metadata_columns": ["x"], "weight": 0.5}],
        eval_source="g.jsonl",
    )
    commands = [
        source.inspect.removeprefix("rlhf data inspect ")
        for name in ("source", "sft_source", "prompts_source")
        for source in Sources(config, name, Quarantine()).all
    ]
    assert commands == [
        "a.jsonl", "'b c.jsonl'", """'{"source": "d", "delimiter": "|"}'""", "g.jsonl",
        "e.jsonl --as sft",
        """'{"source": "f.jsonl", "metadata_columns": ["x"]}' --as prompts""",
    ]  # fmt: skip


@pytest.mark.parametrize("setting", ["sft_source", "prompts_source"])
def test_settings_of_pairs_are_no_other_sources(setting):
    """All that a source of its own does not take from the section, and no more, is one of pairs."""
    values: dict[str, Any] = {
        "format": "rated", "prompt_column": "p", "chosen_column": "c", "rejected_column": "r",
        "system_column": "s", "label_column": "l", "labels": {"first": "1"}, "margin_scale": 2.0,
        "score_weights": {"a": 1.0}, "margin_column": "m", "reference_column": "x",
        "metadata_columns": ("y",), "encoding": "cp1252", "delimiter": "|", "hub_split": "own",
        "text_columns": ("t",), "ignore_columns": ("z",),
    }  # fmt: skip
    assert {*values} == {*SourceConfig.model_fields} - {"source", "weight"}
    shared = {"encoding", "delimiter", "hub_split"}
    if setting == "prompts_source":
        shared |= {"reference_column", "metadata_columns"}
    for name, value in values.items():
        config = DataConfig(source="x.jsonl", **{name: value}, **{setting: "y.jsonl"})
        (own,) = Sources(config, setting, Quarantine()).all
        is_taken = getattr(own.config, name) == getattr(config, name)
        assert is_taken == (name in shared)
        assert settings_of_pairs(config, setting) == ([] if is_taken else [name])


def test_held_out_data_beside_a_list(tmp_path):
    one, two = (write(tmp_path / f"{n}.jsonl", numbered(n)) for n in "ab")
    write(tmp_path / "c/train.jsonl", numbered("c"))
    write(tmp_path / "c/test.jsonl", numbered("d"))
    folder = str(tmp_path / "c")
    _, held_out, _, _ = prepare(tmp_path, [one, {"source": folder, "weight": 2}])
    assert names(held_out) == {"d": 20}
    own = write(tmp_path / "e.jsonl", numbered("e"))
    train, held_out, _, _ = prepare(tmp_path, [one, two, folder], eval_source=own)
    assert names(held_out) == {"e": 20}
    assert names(train) == dict.fromkeys("abcd", 20)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("[]", "data.source: is an empty list"),
        ("[a.jsonl, world]", "data.source.1.source: 'world' can't be mixed"),
        ("[{source: a, weight: 0}]", "data.source.0.weight = 0: must be more than 0"),
        ("[{source: a, wait: 1}]", "data.source.0.wait is not a field"),
        ("[{weight: 1}]", "data.source.0.source: is missing"),
        ("[a.jsonl, 5]", "data.source.1"),
        ("[{source: 'https://h/x'}]", "data.source.0.source: scheme 'https' is not supported"),
        ("[{source: 's3://key:secret@h/x'}]", "data.source.0.source: holds user info"),
        ("[a.jsonl", "data.source: begins like a list of sources, and is none"),
    ],
)
def test_a_list_that_is_wrong(source, text):
    found = message(ConfigError, load_config, None, [f"--data.source={source}"])
    assert found.startswith(text)
    assert "secret" not in found


def test_lists_in_files_and_on_the_command_line(tmp_path):
    preset = tmp_path / "x.yaml"
    preset.write_text(
        "data:\n  source:\n  - a.jsonl\n  - {source: b.jsonl, weight: 0.5, format: rated}\n"
    )
    loaded = load_config(preset).config
    assert [(s.source, s.weight, s.format) for s in loaded.data.source] == [
        ("a.jsonl", 1, None), ("b.jsonl", 0.5, "rated"),
    ]  # fmt: skip
    assert type(loaded).model_validate(loaded.model_dump(mode="json")) == loaded
    assert load_config(preset, ["--data.source=c.jsonl"]).config.data.source == "c.jsonl"
    text = "[a.jsonl, {source: b.jsonl, weight: 0.5, format: rated}]"
    assert load_config(None, [f"--data.source={text}"]).config.data == loaded.data
    one = load_config(None, ["--data.source={source: a.jsonl, weight: 2}"]).config.data.source
    assert [(s.source, s.weight) for s in one] == [("a.jsonl", 2)]


def test_identity_is_that_of_contents_and_settings_without_locations(tmp_path):
    def digests(place, weight):
        source = [{"source": write(tmp_path / place / "a.jsonl", rows()), "weight": weight},
                  write(tmp_path / place / "b.jsonl", rows(5))]  # fmt: skip
        config = load_config(None).config
        data = DataConfig(source=source, sft_source=source[1], prompts_source=source[1])
        config = config.model_copy(update={"data": data})
        return data_digest(config), source_digest(data, StoreConfig())

    assert digests("x", 1) == digests("y", 1)
    assert digests("x", 1)[0] != digests("x", 2)[0]
    assert digests("x", 1)[1] != digests("x", 2)[1]


NAMES = st.sampled_from(["p1", "p2", "p3", "p4", "p5", "p6", "p7", ""])
ROWS = st.lists(st.tuples(NAMES, st.sampled_from("abc"), st.sampled_from("abc")), max_size=12)


@settings(
    max_examples=examples(30),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.tuples(ROWS, st.sampled_from([0.3, 1, 1.5, 2])), min_size=1, max_size=3))
def test_every_row_of_every_source_ends_in_one_place(tmp_path, sources):
    always = write(tmp_path / "base.jsonl", numbered("base", 8))
    listed: list[Any] = [always]
    total = 8
    for index, (drawn, weight) in enumerate(sources):
        data = [*drawn, (f"own {index}", "x", "y")]
        path = write(tmp_path / f"{index}.jsonl", [pair(*row) for row in data])
        listed.append({"source": path, "weight": weight})
        total += len(data)
    train, held_out, summary, lines = prepare(tmp_path, listed, max_bad_fraction=1)
    assert summary["rows"] == total
    assert summary["rows_used"] + len(lines) == total
    assert len({(line["source"], line["line"]) for line in lines}) == len(lines)
    counts = summary["sources"]
    assert sum(c["rows"] for c in counts) == total
    assert sum(c["left_out"] for c in counts) == len(lines)
    assert sum(c["written"] for c in counts) == len(train) + len(held_out)
    assert {p.prompt for p in train}.isdisjoint(p.prompt for p in held_out)
