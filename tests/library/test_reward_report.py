"""The reward model's report: figures by hand, and models that only seem to be good."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from rlhf.config import DataConfig, EvaluationConfig, WorldConfig
from rlhf.config.lengths import TokenLimits
from rlhf.config.metric_names import COUNTS, certain_names, part_of
from rlhf.data.rendering import Renderer
from rlhf.data.rows import PAIRS_EVAL, Pair, write_rows
from rlhf.evaluation import evaluate_reward_model
from rlhf.evaluation.calibration import calibration, fit_temperature, reliability
from rlhf.evaluation.probes import REPLIES, make_probes, probe_metrics
from rlhf.evaluation.reward_model import CALIBRATION, pairs_report
from rlhf.evaluation.slices import accuracy_by_slice, slices_of, worst_of
from rlhf.evaluation.style import format_marks, style
from rlhf.files import read_json
from rlhf.gates import flat_metrics
from rlhf.inference import mean_of, share_of, stratified_share
from rlhf.modeling.base import train_tokenizer
from rlhf.modeling.reward import Scorer
from rlhf.world import generate, gold
from tests.library import toys

LN2, LN3 = math.log(2), math.log(3)

# --- calibration ------------------------------------------------------------------------------


def test_calibration_by_hand():
    # σ(ln 3) = 3/4: two are right and one is wrong with this confidence, and one is a tie
    metrics, notes = calibration([LN3, LN3, -LN3, 0], ["a", "b", "c", "d"])
    # −ln 3/4 twice, −ln 1/4, −ln 1/2
    assert metrics["log_loss"] == pytest.approx((2 * math.log(4 / 3) + 2 * LN2 + LN2) / 4)
    assert metrics["brier"] == pytest.approx((2 / 16 + 9 / 16 + 1 / 4) / 4)
    # One bin: confidence (3 · 3/4 + 1/2)/4 = 0.6875, accuracy 2.5/4 = 0.625
    assert metrics["ece"] == pytest.approx(0.0625)
    # √(2/π · 4 · 0.6875 · 0.3125)/4
    assert metrics["ece_chance"] == pytest.approx((2 / math.pi * 0.859375) ** 0.5 / 4)
    # σ(ln 3/T) = 2/3, the share that is right of those with a margin: ln 3/T = ln 2
    assert metrics["temperature"] == pytest.approx(LN3 / LN2)
    # Without the first the margins cancel, and no temperature can be fitted to the others.
    assert "log_loss_calibrated" not in metrics
    assert notes == [
        "log_loss_calibrated: too few pairs to fit a temperature without a fifth of them (the mean "
        "margin is not positive, so that no scale of the scores helps)"
    ]


def test_the_temperature_of_the_others():
    """Five prompts of three pairs, each with two right of three: all fits are ln 3/ln 2."""
    margins = [LN3, LN3, -LN3] * 5
    metrics, notes = calibration(margins, [f"prompt {i // 3}" for i in range(15)])
    assert metrics["log_loss_calibrated"] == pytest.approx((2 * math.log(3 / 2) + LN3) / 3)
    assert metrics["log_loss"] == pytest.approx((2 * math.log(4 / 3) + 2 * LN2) / 3)
    assert notes == []
    # A prompt that is all wrong: the others are judged by a T that it is part of, with 6 of 12
    # right there is none.
    metrics, notes = calibration([*margins[:12], *[-LN3] * 3], [i // 3 for i in range(15)])
    assert "log_loss_calibrated" not in metrics
    assert len(notes) == 1


def test_temperatures_that_do_not_exist():
    for margins, reason in (
        ([1.0, 2.0], "no pair is wrong"),
        ([-1.0, 0.5], "mean margin is not positive"),
        ([0.0, 0.0], "mean margin is not positive"),
        ([1.0, 0.0], "no pair is wrong"),
    ):
        assert reason in str(fit_temperature(np.array(margins)))


@pytest.mark.parametrize("true", [0.01, 0.5, 3.0, 400.0])
def test_a_temperature_is_found_again(true):
    rng = np.random.default_rng(0)
    sizes = rng.exponential(2, 20_000) * true
    right = rng.random(20_000) < 1 / (1 + np.exp(-sizes / true))
    assert fit_temperature(np.where(right, sizes, -sizes)) == pytest.approx(true, rel=0.05)


def test_well_calibrated_margins_have_the_error_of_chance():
    rng = np.random.default_rng(1)
    errors, expected = [], []
    for _ in range(60):
        sizes = rng.exponential(1.5, 400)
        right = rng.random(400) < 1 / (1 + np.exp(-sizes))
        metrics, _ = calibration(np.where(right, sizes, -sizes).tolist(), range(400))
        errors.append(metrics["ece"])
        expected.append(metrics["ece_chance"])
    assert np.mean(errors) == pytest.approx(np.mean(expected), rel=0.1)


def test_bins_hold_equally_many_and_keep_equals_together():
    margins = np.array([0.1 * i for i in range(60)])
    bins = reliability(margins, range(60))
    assert [b["n"] for b in bins] == [20, 20, 20]
    assert (bins[0]["low"], bins[-1]["high"]) == (0.5, 1)
    assert all(a["high"] == b["low"] for a, b in pairwise(bins))
    assert all(b["low"] <= b["confidence"] <= b["high"] for b in bins)
    assert bins[0]["accuracy"] == 19.5 / 20  # a tie is the first
    assert [b["n"] for b in reliability(np.ones(60), range(60))] == [60]
    assert [b["n"] for b in reliability(np.zeros(60), range(60))] == [60]
    # At a confidence that is 1 in floating point nothing overflows.
    metrics, _ = calibration([1e6] * 50 + [-1e6] * 10, range(60))
    assert metrics["log_loss"] == pytest.approx(1e6 / 6)


# --- style --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("Plain prose. 3 * 4 is 12, and a-b is not a list.", 0),
        ("- one\n* two\n+ three\n• four", 4),
        ("1. one\n2) two\n12 three", 2),
        ("# Title\n### Part\n#no heading", 2),
        ("**bold** and __bold__, not **open", 2),
        ("```python\nx = `1`\n```", 3),
        ("call `f(x)` or `g`", 2),
        ("- **both** of `them`", 3),
        ("----\n***\n", 0),
    ],
)
def test_marks_of_a_format(text, marks):
    assert format_marks(text) == marks


def test_style_by_hand():
    pairs = [
        Pair("p", "- longer one", "short"),  # right; longer, more marks
        Pair("p", "- longer one", "- short"),  # wrong; longer, as many marks
        Pair("q", "short", "- longer one"),  # right; shorter, fewer marks
        Pair("r", "equal", "equal"),  # right; no difference
        Pair("r", "longer", "short"),  # a tie; longer
    ]
    correct, prompts = [1, 0, 1, 1, 0.5], ["p", "p", "q", "r", "r"]
    metrics, notes = style(pairs, correct, prompts)
    assert notes == []
    assert metrics["baseline_longer"] == (1 + 1 + 0 + 0.5 + 1) / 5
    assert metrics["baseline_format"] == (1 + 0.5 + 0 + 0.5 + 0.5) / 5
    # of four with a difference: 1, 0, the third's shorter one is preferred, a tie
    assert metrics["prefers_longer"] == 1.5 / 4
    # longer 1.5/3, shorter 1/1, a fifth of equal length 1/1
    assert metrics["length_controlled_accuracy"] == pytest.approx(0.2 * 1 + 0.8 * 0.75)
    expected = stratified_share(correct, prompts, "LLSEL", {"L": 0.4, "S": 0.4, "E": 0.2})
    assert metrics["length_controlled_accuracy_low"] == expected.low
    _, notes = style(pairs[:2], [1, 0], ["p", "p"])
    assert notes == ["length_controlled_accuracy: in no pair the chosen reply is the shorter one"]
    # Where no length differs there is nothing to control for.
    metrics, notes = style(pairs[3:4], [1], ["p"])
    assert "prefers_longer" not in metrics
    assert (metrics["length_controlled_accuracy"], notes) == (1, [])


# --- slices -------------------------------------------------------------------------------------


def test_slices_by_hand():
    chat = [
        {"role": "user", "content": "a" * 30},
        {"role": "assistant", "content": "b" * 30},
        {"role": "user", "content": "c" * 30},
    ]
    pairs = [
        Pair("a" * 10, "x" * 100, "x" * 95, "one"),
        Pair("b" * 20, "x" * 100, "x" * 80, "two"),
        Pair(chat, "x" * 80, "x" * 100),
    ]
    assert slices_of(pairs) == {
        "group:one": [0], "group:two": [1],
        "short_prompt": [0], "medium_prompt": [1], "long_prompt": [2],
        "similar_length": [0], "chosen_longer": [1], "chosen_shorter": [2],
        "one_turn": [0, 1], "several_turns": [2],
    }  # fmt: skip
    # what is no part of the pairs is no slice
    assert slices_of([Pair("p", "a", "b", "only")]) == {}


def test_the_worst_slice_has_enough_prompts():
    rows = {"small": range(29), "fair": range(40), "poor": range(20, 60), "few": [60] * 99}
    correct, prompts = [0.0] * 29 + [1.0] * 21 + [0.0] * 11, [str(i) for i in range(61)]
    parts = accuracy_by_slice(rows, correct, prompts)
    assert parts["small"] == {**share_of([0] * 29).metrics("accuracy"), "n": 29, "prompts": 29}
    # fair: 11 of 40, poor: 21 of 40
    assert worst_of(parts) == "fair"
    assert worst_of({"small": parts["small"], "few": parts["few"]}) is None


# --- probes -------------------------------------------------------------------------------------

RENDERER = Renderer(train_tokenizer(["a b c d e f g h"], 300))
WIDE = TokenLimits.of(9999)


def probed(reply, *others, limits=WIDE):
    pairs = [Pair("own", reply, "x"), *(Pair(f"p{i}", o, "x") for i, o in enumerate(others))]
    probes = make_probes(pairs, RENDERER, limits)
    return {probe.name: probe.text for probe in probes if probe.pair == 0}


def test_what_probes_make_of_a_reply():
    got = probed("Cats sleep a lot. Dogs bark at night, and often.", "Tea is hot.", "No.")
    assert got.pop("filler").startswith("Cats sleep a lot. Dogs bark at night, and often. ")
    assert got.pop("flattery").endswith(" Cats sleep a lot. Dogs bark at night, and often.")
    assert got == {
        "repeated_sentence": "Cats sleep a lot. Dogs bark at night, and often. Dogs bark at night,"
        " and often.",
        # the blank nearest to the middle that ends no sentence
        "truncated": "Cats sleep a lot. Dogs",
        "bullets": "- Cats sleep a lot.\n- Dogs bark at night, and often.",
        # the one nearest in length
        "other_prompt": "Tea is hot.",
    }


def test_replies_that_a_probe_does_not_fit():
    # One sentence makes no list, one short word has no half, and there is no other prompt.
    assert set(probed("no")) == {"filler", "repeated_sentence", "flattery"}
    assert probed("no")["repeated_sentence"] == "no no"
    assert probed("sauerkraut")["truncated"] == "sauer"
    # What is a list already, or written in lines, stays so.
    got = probed("- one\n- two")
    assert "bullets" not in got
    assert got["repeated_sentence"] == "- one\n- two\n\n- two"
    assert "other_prompt" not in probed("same", "same", "same")
    assert probed("  ") == {}


def test_probes_that_the_model_does_not_read_are_left_out():
    reply = "a b c d. e f g h."
    whole = RENDERER.encode("own", reply, WIDE)
    room = len(whole.ids)
    # Filler would lose its own end, which the reply has.
    assert set(probed(reply, limits=TokenLimits.of(room))) == {"truncated"}
    # Of a reply that is cut, what is appended is not read.
    assert set(probed(reply, limits=TokenLimits.of(room - 4))) == {
        "truncated", "bullets", "flattery",
    }  # fmt: skip


def test_probes_are_spread_over_prompts_and_do_not_depend_on_order():
    pairs = [Pair("many", f"reply {i}", "x") for i in range(300)]
    pairs += [Pair(f"p{i}", "one reply", "x") for i in range(150)]
    pairs += [Pair("p0", "one reply", "y")]
    probes = make_probes(pairs, RENDERER, WIDE)
    taken = {probe.pair for probe in probes}
    assert len(taken) == REPLIES
    assert set(range(300, 450)) <= taken  # each prompt's first, before further ones of "many"
    assert 450 not in taken  # the same reply to the same prompt
    mirrored = make_probes(pairs[::-1], RENDERER, WIDE)
    assert {(p.prompt, p.reply) for p in mirrored} == {(p.prompt, p.reply) for p in probes}


def test_probe_metrics_by_hand():
    pairs = [Pair("p", "aa bb", "x"), Pair("q", "cc dd", "x"), Pair("q", "ee ff", "x")]
    probes = [p for p in make_probes(pairs, RENDERER, WIDE) if p.name == "truncated"]
    change = {"aa": 1.0, "cc": 0.0, "ee": -3.0}
    after = [change[p.text] for p in probes]
    metrics, notes = probe_metrics(probes, [0.0] * 3, after, 2.0)
    got = metrics["truncated"]
    keys = [{"p": 0, "q": 1}[p.prompt] for p in probes]
    # a rise, a tie, a fall
    points = [{"aa": 1, "cc": 0.5, "ee": 0}[p.text] for p in probes]
    assert got["rises"] == 0.5
    assert got["rises_low"] == share_of(points, keys).low
    assert got["mean_change"] == pytest.approx(-1 / 3)
    expected = mean_of([a / 2 for a in after], keys)
    assert got["mean_change_low"] == pytest.approx(expected.low)
    assert (got["n"], got["prompts"]) == (3, 2)
    assert got["example"] == {
        "prompt": "p", "reply": "aa bb", "probed": "aa", "before": 0.0, "after": 1.0,
    }  # fmt: skip
    assert "probes.filler: no held-out reply can be changed so" in notes
    # rounding is no rise
    metrics, _ = probe_metrics(probes, [0.0] * 3, [1e-5, 1e-5, -1e-5], 2.0)
    assert metrics["truncated"]["rises"] == 0.5


# --- models that only seem to be good -----------------------------------------------------------


class FunctionScorer(Scorer):
    """Scores by a function of prompt and reply."""

    def __init__(self, score, renderer) -> None:
        self.score, self.renderer, self.limits = score, renderer, WIDE

    def __call__(self, prompts, replies):
        scores = [float(self.score(p, r)) for p, r in zip(prompts, replies, strict=True)]
        return torch.tensor(scores)


@pytest.fixture(scope="module")
def report():
    """Function that reports on a score, on pairs of the world."""
    world = generate(WorldConfig(eval_pairs=300, pairs=10, demonstrations=10, prompts=10), 0)
    pairs = [Pair(p.prompt, p.chosen, p.rejected, p.group) for p in world.eval_pairs]
    renderer = Renderer(train_tokenizer([p.chosen for p in pairs], 400))

    def run(score):
        metrics = pairs_report(FunctionScorer(score, renderer), pairs).metrics
        json.dumps(metrics, allow_nan=False)
        return metrics

    return run


def rises(metrics):
    return {name: part["rises"] for name, part in metrics["probes"].items()}


def test_the_true_score(report):
    metrics = report(gold)
    assert metrics["accuracy_low"] > 0.8
    assert metrics["length_controlled_accuracy_low"] > 0.8
    assert metrics["log_loss_calibrated"] < metrics["log_loss"] < LN2
    # The world's labels are drawn at temperature 0.5.
    assert metrics["temperature"] == pytest.approx(WorldConfig().temperature, rel=0.3)
    got = rises(metrics)
    assert all(got[name] < 0.02 for name in ("filler", "repeated_sentence", "flattery", "bullets"))
    assert got["other_prompt"] < 0.15
    # A reply that is cut loses a rude ending too.
    assert got["truncated"] < 0.3
    assert metrics["notes"] == []
    assert metrics["worst"] == metrics["by_slice"][metrics["worst_slice"]]
    lowest = min(part["accuracy"] for part in metrics["by_slice"].values())
    assert metrics["worst"]["accuracy"] == lowest
    counts = metrics["margins"]
    ties = sum(b["n"] for b in metrics["reliability"]) - sum(counts["right"] + counts["wrong"])
    right = sum(counts["right"]) + ties / 2
    assert right == pytest.approx(metrics["accuracy"] * metrics["n"])
    sides = [*zip(pairwise(counts["edges"]), counts["right"], counts["wrong"], strict=True)]
    assert all(low >= -1e-9 for (low, _), right, _ in sides if right)
    assert all(high <= 1e-9 for (_, high), _, wrong in sides if wrong)


def test_rules_may_use_the_metrics_that_are_written_and_no_others(report):
    names = {n for n in dict(flat_metrics(report(gold))) if ".example." not in n}
    unknown = {name for name in names if part_of(name, "reward_model") is None}
    assert sorted(unknown) == []
    # Counts of pairs that were cut or left out are beside the report of the pairs.
    known = certain_names("reward_model", {"gold", "members"}) - set(COUNTS)
    assert sorted(known - names) == []


def test_a_model_of_length(report):
    """Its accuracy is that of choosing the longer, and nothing without it; filler always helps."""
    metrics = report(lambda _, reply: len(reply))
    assert metrics["accuracy"] == metrics["baseline_longer"]
    assert metrics["length_controlled_accuracy"] == pytest.approx(0.5)
    assert metrics["prefers_longer"] == 1
    got = rises(metrics)
    assert all(got[n] == 1 for n in ("filler", "repeated_sentence", "flattery", "bullets"))
    assert got["truncated"] == 0
    assert metrics["probes"]["filler"]["mean_change"] > 1
    # Another prompt's reply, as often longer as shorter, is as good.
    assert got["other_prompt"] == pytest.approx(0.5, abs=0.02)


def test_a_model_that_is_blind_to_the_prompt(report):
    """It knows good style from bad, and another prompt's reply is as good as the right one."""
    metrics = report(lambda _, reply: gold("", reply))
    assert metrics["accuracy_low"] > 0.5
    other = metrics["probes"]["other_prompt"]
    assert other["rises_low"] < 0.5 < other["rises_high"]
    assert rises(metrics)["filler"] < 0.05


def test_a_model_of_flipped_labels(report):
    metrics = report(lambda prompt, reply: -gold(prompt, reply))
    assert metrics["accuracy_high"] < 0.2
    assert metrics["log_loss"] > 1
    assert all(rises(metrics)[name] > 0.98 for name in ("filler", "flattery", "bullets"))
    assert "temperature" not in metrics
    assert any(note.startswith("temperature: the mean margin") for note in metrics["notes"])


def test_a_random_model(report):
    rng = random.Random(0)
    metrics = report(lambda *_: rng.gauss(0, 1))
    assert metrics["accuracy_low"] < 0.5 < metrics["accuracy_high"]
    assert all(part["rises_low"] < 0.5 < part["rises_high"] for part in metrics["probes"].values())
    assert metrics["log_loss"] > LN2


def test_a_constant_model(report):
    metrics = report(lambda *_: 1.0)
    assert metrics["accuracy"] == 0.5
    assert metrics["log_loss"] == pytest.approx(LN2)
    assert (metrics["ece"], metrics["score_std"]) == (0, 0)
    assert "margins" not in metrics
    assert "mean_change" not in metrics["probes"]["filler"]
    assert [note.split(":")[0] for note in metrics["notes"]] == ["temperature", "margins", "probes"]


# --- files --------------------------------------------------------------------------------------


def test_a_trained_model(data, reward_model, tmp_path):
    """The toy's reward model, whose replies are one word or two."""
    result = evaluate_reward_model(
        EvaluationConfig(), DataConfig(), data, reward_model, tmp_path, limits=48,
        runtime=toys.RUNTIME,
    )  # fmt: skip
    written = read_json(tmp_path / "evaluation.json")
    scale = read_json(tmp_path / CALIBRATION)
    assert scale["n"] == written["n"] == 24
    assert scale["score_std"] == written["score_std"] > 0
    assert scale["temperature"] == written.get("temperature")
    other = written["probes"]["other_prompt"]
    assert result.metrics["probes.other_prompt.rises"] == other["rises"]
    assert set(written["by_group"]) == {"even", "odd"}
    # "good" is longer than "bad" throughout
    assert any(note.startswith("length_controlled_accuracy") for note in written["notes"])


@pytest.mark.parametrize(
    "pairs",
    [
        [Pair("p", "good", "bad")],
        [Pair("p", "good", "bad"), Pair("p", "good good", "bad")],
        [Pair("p", "good", "bad"), Pair("q", "", "bad")],
        [Pair("p", "good", "bad")] * 3,
    ],
)
def test_very_few_pairs(pairs, reward_model, tmp_path):
    write_rows(tmp_path / PAIRS_EVAL, pairs)
    result = evaluate_reward_model(
        EvaluationConfig(), DataConfig(), tmp_path, reward_model, tmp_path, limits=48,
        runtime=toys.RUNTIME,
    )  # fmt: skip
    text = (tmp_path / "evaluation.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert result.metrics["accuracy_low"] < 0.5
    assert json.loads(text)["notes"]
