"""Texts in a file give the same datasets as texts in memory; a full disk ends in one line."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from rlhf.config import DataConfig
from rlhf.data import spill
from rlhf.data.prepare import prepare_data
from rlhf.data.spill import Scratch, Spill, number_digests, runs
from rlhf.errors import DataError
from tests.data.helpers import assistant, message, user
from tests.examples import examples

VALUES = st.one_of(
    st.text(st.characters(), max_size=40),
    st.lists(st.builds(user, st.text(st.characters(), max_size=9)), min_size=1, max_size=3),
)


@given(st.lists(VALUES, max_size=30), st.integers(1, 200), st.data())
def test_what_is_read_is_what_was_added_in_any_order(values, memory, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill, "MEMORY", memory)
        patch.setattr(spill, "_WRITE", 20)
        patch.setattr(spill, "_READ", data.draw(st.sampled_from([8, 50, 16 << 10])))
        store = Spill()
        places = [store.add(value) for value in values]
        for index in data.draw(st.permutations([*range(len(values))] * 2)):
            assert store.read(places[index]) == values[index]


@given(st.lists(st.sampled_from("abcd"), max_size=20))
def test_digests_are_numbered_in_the_order_of_their_first_ones(texts):
    numbers, firsts = number_digests(b"".join(spill.digest(text) for text in texts))
    known = [*dict.fromkeys(texts)]
    assert numbers.tolist() == [known.index(text) for text in texts]
    assert firsts.tolist() == [texts.index(text) for text in known]


def test_runs():
    starts, ends = runs(np.array([3, 3, 1, 3]))
    assert (starts.tolist(), ends.tolist()) == ([0, 2, 3], [2, 3, 4])
    assert [part.tolist() for part in runs(np.array([]))] == [[], []]


WORDS = ["kettle", "lamp", "sofa", "violin", "garden", "passport", "bicycle", "vaccine"]
SENTENCE = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join)
PROMPT = st.one_of(
    SENTENCE.map(lambda text: [user(text)]),
    st.tuples(SENTENCE, SENTENCE).map(lambda t: [user(t[0]), assistant("Yes"), user(t[1])]),
)
PAIRS = st.builds(
    lambda prompt, chosen, rejected, margin: {
        "prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin,
    },
    PROMPT, SENTENCE, SENTENCE, st.one_of(st.none(), st.integers(0, 3)),
)  # fmt: skip
RATED = st.builds(
    lambda prompt, reply, score: {"prompt": prompt, "response": reply, "score": score},
    st.sampled_from(WORDS), SENTENCE, st.integers(1, 3),
)  # fmt: skip
OPTIONS = st.fixed_dictionaries(
    {
        "near_duplicates": st.sampled_from([None, 0.7]),
        "votes": st.sampled_from(["majority", "keep"]),
        "contradictions": st.sampled_from(["keep", "majority"]),
        "judge_fraction": st.sampled_from([0.0, 0.2]),
        "max_pairs": st.sampled_from([None, 20]),
    }
)


def outcome(rows, options, memory):
    """Bytes of a dataset's files by name, or the error, with so much memory for texts."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill, "MEMORY", memory)
        source, out = Path(folder, "data.jsonl"), Path(folder, "out")
        out.mkdir()
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(source=str(source), max_bad_fraction=1, eval_fraction=0.3, **options)
        try:
            prepare_data(config, out)
        except DataError as error:
            return str(error).replace(folder, "")
        return {
            path.name: path.read_bytes().replace(folder.encode(), b"") for path in out.iterdir()
        }


@settings(max_examples=examples(8), phases=[Phase.explicit, Phase.generate])
@given(
    st.one_of(st.lists(PAIRS, min_size=20, max_size=60), st.lists(RATED, min_size=20, max_size=60)),
    OPTIONS,
)
def test_a_dataset_is_the_same_from_memory_and_from_files(rows, options):
    small = outcome(rows, options, memory=100)
    assert small == outcome(rows, options, memory=spill.MEMORY)


def test_no_file_is_left_behind_and_small_data_make_none(tmp_path, monkeypatch):
    made = []
    make = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **k: (made.append(k), make(**k))[1])
    monkeypatch.setattr(spill, "_WRITE", 100)
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(40)
    ]
    source = tmp_path / "data.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = set()
    for memory, files in ((spill.MEMORY, False), (100, True)):
        monkeypatch.setattr(spill, "MEMORY", memory)
        out = tmp_path / str(memory)
        out.mkdir()
        made.clear()
        prepare_data(DataConfig(source=str(source)), out)
        assert bool(made) is files
        assert all(arguments["dir"] == out for arguments in made)
        names.add(frozenset(path.name for path in out.iterdir()))
    assert len(names) == 1


@pytest.mark.parametrize("memory", [100, 1000])
def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path, monkeypatch, memory):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(spill, "MEMORY", memory)
    monkeypatch.setattr(os, "pwrite", full)
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(40)
    ]
    source, out = tmp_path / "data.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out.mkdir()
    text = message(DataError, prepare_data, DataConfig(source=str(source)), out)
    assert text.startswith(f"{out}: no space left for temporary files")
    assert list(out.iterdir()) == []


def test_a_folder_that_is_gone_is_named(tmp_path):
    text = message(DataError, Scratch(tmp_path / "gone").write, b"x", 0)
    assert text == (
        f"{tmp_path / 'gone'}: temporary files can't be written (No such file or directory); make "
        "the folder writable"
    )
