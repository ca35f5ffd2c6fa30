"""Drift of two datasets: distances by hand, properties, noise, real shifts, old artifacts."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config import DataConfig
from rlhf.config.drift import DriftLimits, DriftWarnings
from rlhf.data.drift import compare, jensen_shannon, kolmogorov_smirnov, total_variation
from rlhf.data.prepare import prepare_data
from rlhf.data.rows import Pair
from rlhf.data.sketch import SKETCH, make_sketch, read_sketch, tokens_of
from rlhf.errors import DataError
from tests.examples import examples

ENGLISH = [
    "how",
    "do",
    "i",
    "clean",
    "the",
    "old",
    "kettle",
    "with",
    "lemon",
    "or",
    "warm",
    "water",
    "after",
    "tea",
]
GERMAN = [
    "wie",
    "kann",
    "ich",
    "den",
    "alten",
    "kessel",
    "mit",
    "zitrone",
    "oder",
    "wasser",
    "nach",
    "dem",
    "tee",
    "reinigen",
]


def pairs(n, seed, words=ENGLISH, longest=30, flipped=0.0, prefix=""):
    """Pairs whose longer reply, which is friendly too, is preferred in 80 %."""
    rng = random.Random(seed)
    made = []
    for i in range(n):
        text = [" ".join(rng.choices(words, k=rng.randint(5, longest))) for _ in range(3)]
        replies = sorted(text[1:], key=len)
        replies[1] += " gladly !"
        replies.sort(key=len, reverse=rng.random() < 0.8)
        if rng.random() < flipped:
            replies.reverse()
        made.append(Pair(f"{prefix}{seed} {i} {text[0]}", replies[0], replies[1]))
    return made


def sketch(rows, **card):
    return make_sketch(rows, [row.prompt for row in rows], [], card)


def warned(old, new):
    return {shift.measure for shift in compare(old, new).reached(DriftWarnings())}


def test_distances_by_hand():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.5, 0.0, 0.5])
    # The mixture is (1/2, 1/4, 1/4): H = 1.5 bits; each side has 1 bit.
    assert jensen_shannon(p, q) == pytest.approx(0.5)
    # Cumulative 0.5, 1, 1 and 0.5, 0.5, 1.
    assert kolmogorov_smirnov(p, q) == pytest.approx(0.5)
    assert total_variation(p, q) == pytest.approx(0.5)
    apart = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert [f(*apart) for f in (jensen_shannon, kolmogorov_smirnov, total_variation)] == [1, 1, 1]


def test_tokens_of_any_script():
    assert tokens_of("Call 555-0199, now_!") == ["call", "0", "-", "0", ",", "now", "_", "!"]
    assert tokens_of("茶です") == ["茶", "で", "す"]
    assert tokens_of("Чай") == ["чай"]


sides = st.builds(
    lambda n, seed, longest, flipped, shares: sketch(
        pairs(n, seed, longest=longest, flipped=flipped),
        slices={"task": {k: {"n": v} for k, v in shares.items()}},
        position={"share": flipped, "n": n},
    ),
    st.integers(90, 160),
    st.integers(0, 3),
    st.integers(6, 20),
    st.floats(0, 1),
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 50), min_size=1),
)


@settings(max_examples=examples(15), deadline=None)
@given(sides, sides)
def test_symmetric_bounded_and_zero_for_equal(old, new):
    there, back = compare(old, new), compare(new, old)
    for one, other in zip(
        sorted(there.shifts, key=lambda s: s.of + s.measure),
        sorted(back.shifts, key=lambda s: s.of + s.measure),
        strict=True,
    ):
        if one.of != "pairs of both labelled the other way":
            assert (one.measure, one.of) == (other.measure, other.of)
        assert one.value == pytest.approx(other.value, abs=1e-9)
        assert one.noise == pytest.approx(other.noise, abs=1e-9)
        assert 0 <= one.value <= 1
        assert one.noise >= 0
    assert all(shift.value == 0 for shift in compare(old, old).shifts)
    assert not compare(old, old).reached(DriftWarnings(tokens=0.0))


def test_equal_draws_do_not_warn():
    quiet = [warned(sketch(pairs(n, 2 * n)), sketch(pairs(n, 2 * n + 1))) for n in (120, 200, 800)]
    assert quiet == [set(), set(), set()]


def test_growth_does_not_warn():
    old = pairs(500, 1)
    assert warned(sketch(old), sketch([*old, *pairs(60, 2)])) == set()


def test_another_language_warns():
    assert "tokens" in warned(sketch(pairs(200, 1)), sketch(pairs(200, 2, GERMAN)))


def test_longer_replies_warn():
    assert "lengths" in warned(sketch(pairs(200, 1)), sketch(pairs(200, 2, longest=60)))


def test_flipped_labels_warn_in_fresh_and_in_known_pairs():
    old, fresh = pairs(1500, 1), pairs(1500, 2, flipped=0.3)
    assert "labels" in warned(sketch(old), sketch(fresh))
    rng = random.Random(0)
    known = [Pair(p.prompt, p.rejected, p.chosen) if rng.random() < 0.2 else p for p in old]
    (shift,) = [
        s
        for s in compare(sketch(old), sketch(known)).reached(DriftLimits(labels=0.1))
        if s.of == "pairs of both labelled the other way"
    ]
    assert shift.value == pytest.approx(0.2, abs=0.03)


def test_a_new_slice_warns_with_its_share():
    def slices(**counts):
        return {"task": {name: {"n": n} for name, n in counts.items()}}

    old = sketch(pairs(500, 1), slices=slices(chat=250, facts=250))
    new = sketch(pairs(500, 2), slices=slices(chat=200, facts=200, code=100))
    (shift,) = [s for s in compare(old, new).shifts if s.measure == "shares"]
    # A fifth of the rows would have to move; what chance adds to equal data (0.03) is taken off.
    assert shift.value == pytest.approx(0.17, abs=0.02)
    assert shift in compare(old, new).reached(DriftWarnings())


def test_few_prompts_are_not_measured_and_it_says_so():
    drift = compare(sketch(pairs(500, 1)), sketch(pairs(30, 2)))
    assert drift.shifts == ()
    assert drift.notes == ("the new data have 30 different prompts; drift is measured from 100 on",)


def test_own_demonstrations_are_compared_with_the_chosen_replies():
    from rlhf.data.rows import Demonstration

    old, rows = sketch(pairs(200, 1)), pairs(200, 2)
    own = [Demonstration(f"p {i}", f"{' '.join(GERMAN)} {i}") for i in range(200)]
    drift = compare(old, make_sketch(rows, [row.prompt for row in rows], own, {}))
    assert ("tokens", "demonstrations") in {
        (s.measure, s.of) for s in drift.reached(DriftWarnings())
    }


def test_texts_to_a_few_prompts_are_not_measured():
    from rlhf.data.rows import Demonstration

    old, rows = sketch(pairs(200, 1)), pairs(200, 2)
    for own in (
        [Demonstration("p 0", " ".join(GERMAN))],
        [Demonstration("p 0", f"{' '.join(GERMAN)} {i}") for i in range(64)],
    ):
        drift = compare(old, make_sketch(rows, [row.prompt for row in rows], own, {}))
        assert "demonstrations" not in {shift.of for shift in drift.shifts}


def write(path, rows):
    path.write_text("".join(
        json.dumps({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}) + "\n"
        for p in rows
    ))  # fmt: skip
    return str(path)


def test_the_shares_of_lengths_are_those_of_both_datasets():
    drift = compare(sketch(pairs(200, 1)), sketch(pairs(200, 2, longest=60)))
    assert set(drift.lengths) == {"prompts", "chosen replies", "rejected replies"}
    for sides in drift.lengths.values():
        assert sum(sides["before"]) == pytest.approx(1, abs=1e-4)
        assert sum(sides["after"]) == pytest.approx(1, abs=1e-4)
    means = [np.average(range(len(shares)), weights=shares)
             for shares in drift.lengths["chosen replies"].values()]  # fmt: skip
    assert means[1] > means[0] + 0.5
    assert compare(sketch(pairs(200, 1)), sketch(pairs(30, 2))).lengths == {}


def test_prepared_data_have_a_sketch_and_older_ones_get_the_same(tmp_path):
    source = write(tmp_path / "a.jsonl", pairs(80, 1))
    out = tmp_path / "out"
    out.mkdir()
    prepare_data(DataConfig(source=source), out)
    saved = read_sketch(out)
    text = (out / SKETCH).read_text()
    assert "kettle" not in text
    assert len(text) < 400_000
    (out / SKETCH).unlink()
    assert read_sketch(out) == saved


JUNK = st.sampled_from([None, -1, 0.5, "x", [], {}, [1], 10**30, float("nan"), True, [[1]]])


def nodes(value, path=()):
    """Paths to a value and to all that is in it; of long lists to the first three items."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(
        value, list
    ) else ()  # fmt: skip
    for key, inner in items:
        yield from nodes(inner, (*path, key))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    made = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected, "task": "ab"[i % 2]}
            for i, p in enumerate(pairs(120, 0))]  # fmt: skip
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    prepare_data(DataConfig(source=str(folder / "x.jsonl")), folder)
    return json.loads((folder / SKETCH).read_text())


@settings(max_examples=examples(150), deadline=None)
@given(st.data())
def test_an_edited_sketch_is_compared_or_refused_in_one_line(tmp_path_factory, saved, data):
    folder = tmp_path_factory.mktemp("edited")
    edited = json.loads(json.dumps(saved))
    path = data.draw(st.sampled_from([p for p in nodes(saved) if p and p != ("version",)]))
    parent = edited
    for key in path[:-1]:
        parent = parent[key]
    if data.draw(st.booleans()):
        del parent[path[-1]]
    else:
        parent[path[-1]] = data.draw(JUNK)
    (folder / SKETCH).write_text(json.dumps(edited))
    fault = ""
    try:
        found = read_sketch(folder)
    except DataError as error:
        fault = str(error)
    if fault:
        assert "\n" not in fault
        assert "set data.drift.enabled=false" in fault
        return
    new = sketch(pairs(120, 1), slices={"task": {"a": {"n": 5}}}, position={"share": 0.5, "n": 9})
    assert compare(found, new).shifts


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 1}', "\xff", "[" * 100_000])
def test_a_damaged_sketch_is_refused(tmp_path, text):
    (tmp_path / SKETCH).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"sketch\.json is damaged"):
        read_sketch(tmp_path)
