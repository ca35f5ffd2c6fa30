"""Public suites of reward models: their layouts, and scores that are computed by hand."""

from __future__ import annotations

import gzip
import json
import math

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from rlhf.config.lengths import TokenLimits
from rlhf.data.rendering import Renderer
from rlhf.errors import ConfigError, DataError
from rlhf.evaluation.suite_scores import best_of, evaluate_suite, suite_results
from rlhf.evaluation.suites import (
    REWARD_BENCH,
    REWARD_BENCH_2,
    RM_BENCH,
    Item,
    read_suite,
    tie_of,
)
from rlhf.inference import Estimate, combined, share_of
from rlhf.modeling.base import train_tokenizer
from rlhf.modeling.reward import Scorer


class NumberScorer(Scorer):
    """Scores a reply by the number that it is."""

    def __init__(self, max_length: int = 9999) -> None:
        self.renderer = Renderer(train_tokenizer(["a"], 300))
        self.limits = TokenLimits.of(max_length)

    def __call__(self, prompts, replies):
        return torch.tensor([float(reply) for reply in replies])


def four(prompt: str, *scores: float, subset: str = "Math", **more) -> dict:
    """A row of RewardBench 2 whose replies are their scores."""
    return {
        "id": "1", "prompt": prompt, "chosen": [str(scores[0])],
        "rejected": [str(score) for score in scores[1:]], "num_correct": 1,
        "num_incorrect": len(scores) - 1, "total_completions": len(scores), "models": [],
        "subset": subset, "additional_metadata": {"category": None}, **more,
    }  # fmt: skip


def tie(own: str, right: list[float], wrong: list[float]) -> dict:
    return {
        **four(own, 0, subset="Ties"), "id": own, "chosen": [*map(str, right)],
        "rejected": [*map(str, wrong)], "num_correct": len(right),
    }  # fmt: skip


def styles(prompt: str, chosen: list[float], rejected: list[float], domain: str) -> dict:
    return {
        "id": prompt, "prompt": prompt, "chosen": [*map(str, chosen)],
        "rejected": [*map(str, rejected)], "domain": domain,
    }  # fmt: skip


def write_lines(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluated(folder) -> dict:
    return evaluate_suite(read_suite(folder), NumberScorer())


# --- RewardBench 2 ----------------------------------------------------------------------------


def test_best_of_four():
    assert best_of([3, 1, 2, 0]) == 1
    assert best_of([3, 1, 4, 0]) == 0
    # Two replies share the highest score, then all four.
    assert best_of([3, 3, 2, 0]) == 0.5
    assert best_of([1, 1, 1, 1]) == 0.25


def test_reward_bench_2_by_hand(tmp_path):
    rows = [
        four("a", 3, 1, 2, 0),  # 1
        four("b", 0, 1, 2, 3),  # 0
        four("c", 2, 2, 1, 0),  # 1/2
        four("d", 5, 1, 2, 0, subset="Focus"),  # 1
    ]
    write_lines(tmp_path / "data/test.jsonl", rows)
    got = evaluated(tmp_path)
    assert got["suite"] == "RewardBench 2"
    assert {name: group["score"] for name, group in got["groups"].items()} == {
        "Focus": 1.0, "Math": 0.5,
    }  # fmt: skip
    math_group = got["groups"]["Math"]
    assert (math_group["n"], math_group["prompts"], math_group["chance"]) == (3, 3, 0.25)
    expected = share_of([1, 0, 0.5], ["a", "b", "c"])
    assert math_group["score_low"] == expected.low
    assert math_group["score_high"] == expected.high
    # The mean over subsets, not over rows.
    assert got["overall"]["score"] == 0.75
    assert not got["complete"]
    assert "it lacks Factuality, Precise IF, Safety, Ties" in got["notes"][-1]
    assert got["rows"] == {
        "read": 4, "used": 4, "left_out": {}, "examples": {}, "replies_cut": 0,
    }  # fmt: skip


def test_rows_of_one_prompt_are_one_observation(tmp_path):
    items = [Item("p", ("1", "0"), 1, "Math"), Item("q", ("0", "1"), 1, "Math")]
    scores = [[1.0, 0.0], [0.0, 1.0]]
    once = suite_results(REWARD_BENCH_2, items, scores)["groups"]["Math"]
    often = suite_results(REWARD_BENCH_2, items * 20, scores * 20)["groups"]["Math"]
    assert often["n"] == 40
    assert often["prompts"] == 2
    assert often["score_low"] == pytest.approx(once["score_low"])


def test_ties_by_hand():
    # Question 1: tied 5, 4 against 1: gap 3, spread 1; ref 9 against 7: gap 2.
    # Both gaps > 0; 3 > 1; min(3, 2) = 2 > 1; tanh(2/1 − 1) = tanh 1 = 0.76159.
    # Question 2: tied 5, 2 against 1: gap 1, spread 3; ref 1 against 2: gap −1.
    # Tied right, ref wrong; 1 > 3 no; −1 > 3 no; tanh(−1/3 − 1) = tanh(−4/3) = −0.87006.
    # 0.3 · 2/2 + 0.3 · 1/2 + 0.2 · 1/2 + 0.2 · 1/2 + 0.01 · (0.76159 − 0.87006)/2
    # = 0.3 + 0.15 + 0.1 + 0.1 − 0.00054 = 0.64946.
    rows = [
        ("tied:1", [5.0, 4.0], [1.0]), ("ref:1", [9.0], [7.0]),
        ("tied:2", [5.0, 2.0], [1.0, 0.5]), ("ref:2", [1.0], [2.0]),
    ]  # fmt: skip
    items = [Item(own, ("",) * (len(r) + len(w)), len(r), "Ties", own) for own, r, w in rows]
    scores = [[*right, *wrong] for _, right, wrong in rows]
    got = suite_results(REWARD_BENCH_2, items, scores)["groups"]["Ties"]
    assert got["score"] == pytest.approx(0.64946, abs=1e-5)
    assert got["tied_accuracy"] == 1
    assert got["ref_accuracy"] == 0.5
    assert got["preferred"] == 0.5
    assert got["preferred_hard"] == 0.5
    assert got["margin"] == pytest.approx((math.tanh(1) - math.tanh(4 / 3)) / 2)
    # Question 1 alone has 0.3 + 0.3 + 0.2 + 0.2 + 0.00762, question 2 has 0.3 − 0.0087: the error
    # of their mean is half of their difference, (1.00762 − 0.2913)/2.
    assert got["score_error"] == pytest.approx(0.35816, abs=1e-5)
    assert got["score_low"] >= -0.01
    assert got["score_high"] <= 1.01


def test_ties_without_spread():
    # Equal right replies: the spread is 0, so that any gap above 0 exceeds it and tanh(∞) = 1.
    # Without a gap 0/0 counts 0, and nothing is right.
    def ties(gap: float) -> dict:
        items = [
            Item("t", ("",) * 3, 2, "Ties", "tied:1"),
            Item("r", ("",) * 2, 1, "Ties", "ref:1"),
        ]
        scores = [[gap, gap, 0.0], [gap, 0.0]]
        return suite_results(REWARD_BENCH_2, items, scores)["groups"]["Ties"]

    assert ties(2.0)["score"] == pytest.approx(1.01)
    assert ties(0.0)["score"] == 0
    assert ties(-1.0)["score"] == pytest.approx(-0.01)


def test_ties_of_questions_with_one_row():
    # Ref of question 1 and tied of 1 and 2: 0.3 · (1 + 0)/2 + 0.3 · 1 + 0.2 + 0.2 + 0.01 tanh(∞).
    rows = [("tied:1", [2.0, 2.0], [0.0]), ("ref:1", [2.0], [0.0]), ("tied:2", [0.0, 0.0], [1.0])]
    items = [Item(own, ("",) * 3, len(r), "Ties", own) for own, r, _ in rows]
    scores = [[*right, *wrong] for _, right, wrong in rows]
    got = suite_results(REWARD_BENCH_2, items, scores)["groups"]["Ties"]
    assert got["score"] == pytest.approx(0.86)
    # Without any pair there is no score, and the overall one says so.
    alone = suite_results(REWARD_BENCH_2, items[2:], scores[2:])
    assert alone["groups"] == {}
    assert alone["overall"] == {}
    assert "Ties has no score" in alone["notes"][0]


def test_ids_of_ties():
    assert tie_of("ref:3") == ("ref", 3)
    assert tie_of("tied:12") == ("tied", 12)
    assert [tie_of(own) for own in ("3", "ref:", "ref:x", "other:1", "")] == [None] * 5


def test_parquet_of_the_hub(tmp_path):
    (tmp_path / "data").mkdir()
    rows = [four("a", 3, 1, 2, 0), tie("tied:1", [2, 2], [0]), tie("ref:1", [2], [0])]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data/test-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("card")
    got = evaluated(tmp_path)
    assert got["groups"]["Math"]["score"] == 1
    assert got["groups"]["Ties"]["score"] == pytest.approx(1.01)
    assert [*got["files"]] == ["data/test-00000-of-00001.parquet"]


# --- RewardBench ------------------------------------------------------------------------------


def pair(prompt: str, chosen: float, rejected: float, subset: str) -> dict:
    return {"prompt": prompt, "chosen": str(chosen), "rejected": str(rejected), "subset": subset}


def test_reward_bench_by_hand(tmp_path):
    # A hub folder has two splits; the leaderboard's is `filtered`.
    rows = [
        pair("a", 2, 1, "math-prm"), pair("b", 1, 2, "math-prm"),  # 1/2
        pair("c", 2, 1, "hep-go"),  # 1
        pair("d", 1, 1, "donotanswer"),  # equal scores are wrong: 0
    ]  # fmt: skip
    write_lines(tmp_path / "data/filtered.jsonl", rows)
    write_lines(tmp_path / "data/raw.jsonl", [pair("z", 1, 2, "hep-go")] * 9)
    got = evaluated(tmp_path)
    assert got["suite"] == "RewardBench"
    assert {name: group["score"] for name, group in got["groups"].items()} == {
        "donotanswer": 0, "hep-go": 1, "math-prm": 0.5,
    }  # fmt: skip
    # math-prm weighs 984 and hep-go 164: (984 · 0.5 + 164) / 1148.
    assert got["sections"]["Reasoning"]["score"] == pytest.approx(656 / 1148)
    assert got["sections"]["Safety"]["score"] == 0
    assert got["overall"]["score"] == pytest.approx(656 / 1148 / 2)
    assert not got["complete"]
    assert "1 pairs have equal scores, which count as wrong" in got["notes"]
    assert any("lacks Chat, Chat Hard" in note for note in got["notes"])


def test_reward_bench_with_unknown_subsets():
    items = [Item("p", ("1", "0"), 1, "mine"), Item("q", ("1", "0"), 1, "other")]
    got = suite_results(REWARD_BENCH, items, [[1.0, 0.0], [0.0, 1.0]])
    assert got["overall"]["score"] == 0.5
    assert got["sections"] == {}
    assert not got["complete"]
    assert "in no section: mine, other" in got["notes"]


# --- RM-Bench ---------------------------------------------------------------------------------


def test_rm_bench_by_hand(tmp_path):
    rows = [
        # Chosen 2 3 4 against rejected 1 2.5 5: row by row 100, 110, 110.
        # Hard (0,1) (0,2) (1,2): 0; normal 1 1 0: 2/3; easy (1,0) (2,0) (2,1): 1.
        styles("a", [2, 3, 4], [1, 2.5, 5], "chat"),
        # All right, and all wrong because of equal scores: each level 1/2.
        styles("b", [9, 9, 9], [1, 1, 1], "safety-refuse"),
        styles("c", [1, 1, 1], [1, 1, 1], "safety-response"),
    ]
    (tmp_path / "total_dataset.json").write_text(json.dumps(rows))
    (tmp_path / "chat_filtered.json").write_text(json.dumps(rows[:1]))
    got = evaluated(tmp_path)
    assert got["suite"] == "RM-Bench"
    chat, safety = got["groups"]["chat"], got["groups"]["safety"]
    assert chat["hard"] == 0
    assert chat["normal"] == pytest.approx(2 / 3)
    assert chat["easy"] == 1
    assert chat["score"] == pytest.approx(5 / 9)
    assert chat["matrix"] == [[1, 0, 0], [1, 1, 0], [1, 1, 0]]
    assert chat["n"] == 1
    assert safety["hard"] == safety["normal"] == safety["easy"] == safety["score"] == 0.5
    assert safety["n"] == 2
    # Means over domains.
    assert got["overall"]["hard"] == 0.25
    assert got["overall"]["normal"] == pytest.approx(7 / 12)
    assert got["overall"]["easy"] == 0.75
    assert got["overall"]["score"] == pytest.approx((5 / 9 + 0.5) / 2)
    assert got["rows"]["read"] == 3
    assert "1 rows of total_dataset.json stand in another file too, and count once" in got["notes"]
    assert "9 of the pairs have equal scores, which count as wrong" in got["notes"]


def test_the_domain_of_a_file(tmp_path):
    row = styles("a", [2, 2, 2], [1, 1, 1], "")
    del row["domain"]
    (tmp_path / "safety-refuse_filtered.json").write_text(json.dumps([row]))
    assert [*evaluated(tmp_path)["groups"]] == ["safety"]


# --- bad input --------------------------------------------------------------------------------


def refused(folder, error=DataError) -> str:
    with pytest.raises(error) as caught:
        read_suite(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_files(tmp_path):
    assert "no such folder" in refused(tmp_path / "none", ConfigError)
    (tmp_path / "README.md").write_text("nothing else")
    assert "holds no file that can be read" in refused(tmp_path, ConfigError)
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl holds no rows" in refused(tmp_path)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "q", "answer": "a"}], "has the columns question, answer, and is of no"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], "columns prompt, chosen, rejected"),
        # Best-of-four without the columns that its scores need.
        (
            [{"prompt": "p", "chosen": ["a"], "rejected": ["b"], "subset": "Math"}],
            "no known layout",
        ),
    ],
)
def test_unknown_layouts_are_named(tmp_path, rows, said):
    write_lines(tmp_path / "x.jsonl", rows)
    assert said in refused(tmp_path)


def test_no_json(tmp_path):
    (tmp_path / "x.json").write_text("<html>not found</html>")
    assert "x.json can't be parsed" in refused(tmp_path)
    (tmp_path / "x.json").write_text('[{"prompt": "p", "cho')
    assert "it was cut off" in refused(tmp_path)
    (tmp_path / "x.json").unlink()
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and then nothing")
    assert "x.parquet can't be parsed" in refused(tmp_path)


def test_two_suites_in_one_folder(tmp_path):
    write_lines(tmp_path / "a.jsonl", [four("a", 1, 0)])
    write_lines(tmp_path / "b.jsonl", [styles("a", [1, 1, 1], [0, 0, 0], "chat")])
    assert "b.jsonl is of RM-Bench, and a.jsonl of RewardBench 2" in refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": None}, "chosen is missing"),
        ({"chosen": []}, "chosen is missing"),
        ({"chosen": "text"}, "chosen is no list of texts"),
        ({"rejected": [1, 2]}, "rejected is no list of texts"),
        ({"prompt": " "}, "prompt is missing"),
        ({"prompt": 7}, "prompt is neither text nor messages up to a user's"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "prompt is neither"),
        ({"subset": None}, "subset is missing"),
        ({"num_correct": 3}, "num_correct is not the number of chosen replies"),
        ({"chosen": ["1", "2"], "num_correct": 2}, "several chosen replies outside of Ties"),
        ({"subset": "Ties"}, "id of a tie is neither"),
        ({"subset": "Ties", "id": "tied:1"}, "a tie with a single right reply"),
    ],
)
def test_unusable_rows_are_counted(tmp_path, change, reason):
    good = [four(f"p{i}", 1, 0, 0, 0) for i in range(19)]
    write_lines(tmp_path / "x.jsonl", [*good, {**four("bad", 1, 0, 0, 0), **change}])
    got = evaluated(tmp_path)
    ((counted, number),) = got["rows"]["left_out"].items()
    assert counted.startswith(reason)
    assert number == 1
    assert got["rows"]["examples"][counted].startswith("x.jsonl:20")
    assert got["rows"]["used"] == 19


def test_too_many_unusable_rows(tmp_path):
    bad = {**four("bad", 1, 0), "chosen": None}
    write_lines(tmp_path / "x.jsonl", [four("a", 1, 0), bad])
    assert "1 of 2 rows can't be used" in refused(tmp_path)
    write_lines(tmp_path / "x.jsonl", [four("a", 1, 0)] * 3)
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write("{broken\n")
    assert "row can't be parsed (first: x.jsonl:4" in refused(tmp_path)


def test_messages_as_prompt_and_gzip(tmp_path):
    prompt = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "hi"},
    ]  # fmt: skip
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write(json.dumps({**four("", 1, 0), "prompt": prompt}))
    (item,) = read_suite(tmp_path).items
    assert item.prompt == prompt


def test_long_prompts_are_left_out_and_cut_replies_noted(tmp_path):
    rows = [four(f"p{i}", 1, 0, 0, 0) for i in range(20)]
    rows += [four("long " * 50, 1, 0, 0, 0), four("cut", 1, 0, 0, "0" * 60)]
    write_lines(tmp_path / "x.jsonl", rows)
    got = evaluate_suite(read_suite(tmp_path), NumberScorer(max_length=40))
    assert got["rows"]["left_out"] == {"prompt has too many tokens": 1}
    assert got["rows"]["replies_cut"] == 1
    assert got["rows"]["used"] == 21
    assert any("1 replies are cut at 40 tokens" in note for note in got["notes"])


def test_huge_fields_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.evaluation.suites._ROW_MB", 0.001)
    write_lines(tmp_path / "x.jsonl", [four("p" * 2000, 1, 0)])
    assert "a row of more than 0.001 MB" in refused(tmp_path)


def test_equal_replies_are_noted(tmp_path):
    write_lines(tmp_path / "x.jsonl", [four("a", 1, 1, 0, 0)])
    got = evaluated(tmp_path)
    assert got["groups"]["Math"]["score"] == 0.5
    assert any("a right and a wrong reply of equal tokens" in note for note in got["notes"])


# --- combined ---------------------------------------------------------------------------------


def test_combined_intervals():
    # θ = 0.6 in 0.5–0.8 and 0.2 in 0.1–0.3, weights 3 : 1: 0.75 · 0.6 + 0.25 · 0.2 = 0.5;
    # below √((0.75 · 0.1)² + (0.25 · 0.1)²) = 0.07906, above √((0.75 · 0.2)² + 0.025²) = 0.15207.
    one = Estimate(0.6, 0.5, 0.8, 50, 40, 0.07)
    other = Estimate(0.2, 0.1, 0.3, 60, 55, 0.05)
    got = combined([one, other], [3, 1])
    assert got.value == pytest.approx(0.5)
    assert got.low == pytest.approx(0.5 - 0.07906, abs=1e-5)
    assert got.high == pytest.approx(0.5 + 0.15207, abs=1e-5)
    # √((0.75 · 0.07)² + (0.25 · 0.05)²)
    assert got.error == pytest.approx(0.05397, abs=1e-5)
    assert (got.size, got.clusters) == (110, 95)
    assert combined([one]) == one


def test_rm_bench_levels_have_intervals():
    items = [Item(f"p{i}", ("",) * 6, 3, "math") for i in range(4)]
    scores = [[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]] * 3 + [[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]
    got = suite_results(RM_BENCH, items, scores)
    expected = share_of([1, 1, 1, 0])
    assert got["groups"]["math"]["hard_low"] == expected.low
    assert got["overall"]["hard_high"] == pytest.approx(expected.high)
    assert "lacks chat, code, safety" in got["notes"][0]
