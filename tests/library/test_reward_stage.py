"""Reward-model training on the toy task."""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pyarrow import parquet
from transformers import CohereConfig, Gemma2Config, LlamaConfig
from transformers.modeling_outputs import SequenceClassifierOutput
from trl.trainer.reward_trainer import DataCollatorForPreference

from rlhf.config import DataConfig, EvaluationConfig, LoraConfig
from rlhf.config.lengths import TokenLimits
from rlhf.data.collect import lead
from rlhf.data.negatives import make_negatives
from rlhf.data.rendering import ASSISTANT, load_renderer
from rlhf.data.rows import PAIRS_TRAIN, Pair, read_rows, write_rows
from rlhf.errors import ConfigError, DataError
from rlhf.evaluation import evaluate_reward_model
from rlhf.files import read_json
from rlhf.modeling.base import load_policy
from rlhf.modeling.reward import Scorer, reward_meta
from rlhf.reward import _ColumnCollator, _encode, _has_plain_head, _Trainer, train_reward_model
from tests.library import toys

CPU = torch.device("cpu")


@pytest.fixture
def train(data, sft, tmp_path):
    def run(name="out", seed=0, start=sft, folder=data, **changes):
        out = tmp_path / name
        out.mkdir()
        config = toys.changed(toys.REWARD, **changes)
        result = train_reward_model(config, folder, start, out, seed=seed, runtime=toys.RUNTIME)
        return out, result

    return run


def held_out_accuracy(folder, data, tmp_path):
    result = evaluate_reward_model(
        EvaluationConfig(), DataConfig(), data, folder, tmp_path, limits=48,
        runtime=toys.RUNTIME,
    )  # fmt: skip
    return result.metrics["accuracy"]


@pytest.mark.parametrize("pooling", ["last", "sum"])
def test_it_learns_an_obvious_preference(train, data, tmp_path, pooling):
    out, result = train(pooling=pooling, epochs=4)
    curve = read_json(out / "curve.json")
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert curve[-1]["loss"] < 0.3  # from ln 2 = 0.69
    assert result.metrics["pairs"] == 96
    assert result.metrics["loss"] == curve[-1]["loss"]
    assert result.metrics["train_accuracy"] == curve[-1]["accuracy"] > 0.9
    assert held_out_accuracy(out, data, tmp_path) > 0.9
    assert reward_meta(out)["pooling"] == pooling
    # The merged, saved and reloaded model gives the scores that training left.
    good, bad = Scorer(out, CPU, 48)(["tea or cup?"] * 2, ["good", "bad"])
    assert good - bad > 2


def test_seeds(train, reward_model):
    toys.assert_same_weights(reward_model, train("a")[0])
    assert toys.distance(reward_model, train("b", seed=1)[0]) > 1e-5


def test_micro_batches_change_nothing(train):
    whole, _ = train("whole", learning_rate=1e-3, epochs=1)
    parts, _ = train("parts", learning_rate=1e-3, epochs=1, micro_batch_size=4)
    assert toys.distance(whole, parts) < 1e-4


@pytest.fixture(scope="module")
def one_epoch(data, sft, tmp_path_factory):
    out = tmp_path_factory.mktemp("epoch")
    config = toys.changed(toys.REWARD, epochs=1)
    train_reward_model(config, data, sft, out, runtime=toys.RUNTIME)
    return out


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-3},
        {"lr_scheduler": "linear"},
        {"adam_beta2": 0.5},
        {"weight_decay": 0.5},
        {"max_grad_norm": 0.01},
        {"batch_size": 8},
        {"pooling": "last"},
        {"lm_loss_coef": 0.5},
        {"max_length": 8},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_parameter_arrives(train, one_epoch, change):
    out, _ = train(**{"epochs": 1, **change})
    assert toys.distance(out, one_epoch) > 1e-5


def test_the_language_model_loss_keeps_the_language_model(train, sft, data):
    plain, _ = train("plain", epochs=3)
    kept, _ = train("kept", epochs=3, lm_loss_coef=2.0)
    renderer = load_renderer(sft)
    rows, _ = _encode([Pair("tea or cup?", "good good", "bad bad")], renderer, 48)
    ids = torch.tensor([rows[0]["chosen_ids"]])
    n = len(renderer.encode("tea or cup?", "good good", 48).response)

    def loss(folder):
        """What the reward model's backbone says of the reply, under the language model's head."""
        model = load_policy(sft)
        state = {k.removeprefix("model."): v for k, v in toys.weights(folder).items()}
        model.model.load_state_dict({k: v for k, v in state.items() if k != "score.weight"})
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits[-n:], ids[0, 1:][-n:]).item()

    assert loss(kept) < loss(plain) - 0.3


def test_dropout_of_adapters(train):
    """TRL's trainer switches off all dropout."""
    lora = {"r": 2, "alpha": 4}
    plain, dropped = (
        train(str(rate), epochs=1, lora=LoraConfig(**lora, dropout=rate))[0] for rate in (0.0, 0.5)
    )
    assert toys.distance(plain, dropped) > 1e-5


@pytest.mark.parametrize("pooling", ["last", "sum"])
def test_the_language_model_loss_is_of_the_reply_alone(train, sft, monkeypatch, pooling):
    computed, seen = _Trainer._lm_loss, []

    def spy(self, model, inputs, outputs, reply_at):
        loss = computed(self, model, inputs, outputs, reply_at)
        seen.append((inputs, outputs.hidden_states[0].detach(), reply_at, loss.item()))
        return loss

    monkeypatch.setattr(_Trainer, "_lm_loss", spy)
    train(pooling=pooling, lm_loss_coef=0.5, epochs=1, learning_rate=1e-9)
    inputs, hidden, reply_at, loss = seen[0]
    renderer, losses = load_renderer(sft), []
    embedding = load_policy(sft).get_input_embeddings().weight.detach()
    for row, start in enumerate(reply_at):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        # The prompt ends with what begins a reply.
        assert renderer.tokenizer.decode(ids[:start]).endswith(ASSISTANT)
        assert ASSISTANT not in renderer.tokenizer.decode(ids[start:])
        for i in range(start, len(ids)):
            logits = embedding @ hidden[row, i - 1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[i]).item())
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize(
    ("config", "plain"), [(LlamaConfig, True), (CohereConfig, False), (Gemma2Config, False)]
)
def test_logits_that_are_scaled_or_capped_are_not_those_of_the_embedding(config, plain):
    assert _has_plain_head(config()) == plain


def test_it_needs_tied_embeddings(train, fresh, copy_of):
    folder = copy_of(fresh)
    model = load_policy(fresh)
    model.config.tie_word_embeddings = False
    model.config.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"lm_loss_coef = 0\.5 needs .* set it to 0"):
        train(start=folder, lm_loss_coef=0.5)


def test_sums_need_the_token_that_begins_a_reply(train, fresh, copy_of):
    """Otherwise they would score the prompt too."""
    folder = copy_of(fresh)
    for path in folder.glob("*token*"):
        path.write_text(path.read_text(encoding="utf-8").replace(ASSISTANT, "<|reply|>"))
    for path in folder.glob("chat_template*"):
        path.write_text(path.read_text(encoding="utf-8").replace(ASSISTANT, "<|reply|>"))
    with pytest.raises(ConfigError, match=r"pooling = 'sum' .* set reward_model\.pooling to last"):
        train(start=folder, pooling="sum")
    out, _ = train("last", start=folder, pooling="last", epochs=0.2)
    assert reward_meta(out)["pooling"] == "last"


def test_another_base(train, fresh, sft):
    a, _ = train("a", base=str(fresh), epochs=1)
    toys.assert_same_weights(a, train("b", start=fresh, epochs=1)[0])
    assert load_renderer(a).template_hash == load_renderer(fresh).template_hash


def test_adapters_for_modules_that_it_has_not(train):
    expected = r"^reward_model\.lora\.target_modules = 'nope': this model has no linear layer"
    with pytest.raises(ConfigError, match=expected):
        train(lora=LoraConfig(target_modules="nope"))


def test_lora_trains_adapters_and_the_head(train, sft, data, tmp_path):
    out, _ = train(lora=LoraConfig(r=4, alpha=16.0), epochs=4)
    assert not list(out.glob("adapter_*"))  # merged; the adapter alone is in a folder
    before, after = toys.weights(sft), toys.weights(out)
    moved = {k for k in after if k not in before or not torch.equal(before[k], after[k])}
    assert "score.weight" in moved
    assert len(moved) > 1
    assert all(k.endswith("_proj.weight") for k in moved - {"score.weight"})
    assert reward_meta(out)["pooling"] == "sum"
    assert held_out_accuracy(out, data, tmp_path) > 0.9


def test_no_pairs(train, data, tmp_path):
    folder = tmp_path / "empty"
    shutil.copytree(data, folder)
    write_rows(folder / PAIRS_TRAIN, [])
    with pytest.raises(DataError, match="no preference pairs"):
        train(folder=folder)


def test_pairs_that_are_cut_are_counted_and_equal_ones_left_out(renderer):
    long = "good " * 30
    pairs = [
        Pair("tea?", "good", "bad bad"), Pair("tea?", long + "end", long + "other"),
        Pair("tea?", "bad", long), Pair("tea? " * 40, "good", long),
    ]  # fmt: skip
    rows, counts = _encode(pairs, renderer, TokenLimits(max_length=24, max_bad_fraction=0.5))
    assert counts == {"pairs_cut": 2, "pairs_equal_when_cut": 1, "prompts_too_long": 1}
    assert len(rows) == 2
    with pytest.raises(DataError, match=r"reward_model.max_length = 24: all 1 pairs are equal"):
        _encode(pairs[1:2], renderer, 24)


def test_rows_are_rendered_with_their_prompt(renderer):
    (row,), counts = _encode([Pair("tea?", "good", "bad bad")], renderer, 48)
    assert counts == {}
    assert row["chosen_ids"] == renderer.encode("tea?", "good", 48).ids
    assert row["rejected_ids"] == renderer.encode("tea?", "bad bad", 48).ids
    assert row["length"] == max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def graded(folder, margins):
    """Write a dataset of pairs with these margins, and return it."""
    folder.mkdir()
    pairs = [Pair("tea or cup?", "good", "bad", margin=m) for m in margins]
    write_rows(folder / PAIRS_TRAIN, pairs)
    return folder


def first_loss(train, folder, **changes):
    """Loss while the new head makes all rewards 0: the learning rate is next to nothing."""
    out, result = train(folder=folder, epochs=10, learning_rate=1e-9, **changes)
    return read_json(out / "curve.json")[0]["loss"], out, result


def test_the_margin_is_subtracted_from_the_difference_of_rewards(train, tmp_path):
    folder = graded(tmp_path / "data", [2.0, 2.0, 0.0, None])
    changes = {"batch_size": 4, "micro_batch_size": None, "lm_loss_coef": 0}
    plain, without, _ = first_loss(train, folder, name="a", **changes)
    # r_chosen = r_rejected = 0, so that the loss is −log σ(−c·m): ln(1 + exp(c·m)).
    assert plain == pytest.approx(math.log(2), abs=1e-5)
    loss, out, result = first_loss(train, folder, name="b", margin_coef=1.5, **changes)
    assert loss == pytest.approx((2 * math.log1p(math.exp(3)) + 2 * math.log(2)) / 4, abs=1e-4)
    assert result.metrics["pairs_without_margin"] == 1
    assert toys.distance(without, out) > 0


def loss_of(batch, rewards):
    """The trainer's loss for a batch, were these the rewards of its replies."""

    class Model(torch.nn.Module):
        def forward(self, *, input_ids, attention_mask, margin=None, use_cache=False):
            return SequenceClassifierOutput(logits=rewards[:, None])

    trainer = _Trainer.__new__(_Trainer)
    trainer.model = Model().eval()
    trainer.args = SimpleNamespace(center_rewards_coefficient=None)
    trainer.accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer._metrics = {"eval": defaultdict(list)}
    trainer._total_train_tokens = 0
    return trainer.compute_loss(trainer.model, batch)


def test_gradients_with_a_margin(renderer, sft):
    """d loss / d (r_chosen − r_rejected) = −σ(m − (r_chosen − r_rejected)), by hand."""
    rows, _ = _encode(
        [Pair("tea?", "good", "bad", margin=2), Pair("tea?", "bad", "good", margin=0.5)],
        renderer, 48, margin_coef=0.5,
    )  # fmt: skip
    assert [row["margin"] for row in rows] == [1, 0.25]
    rewards = torch.tensor([0.75, -0.5, 0.25, 0.5], requires_grad=True)
    loss = loss_of(DataCollatorForPreference(pad_token_id=0)(rows), rewards)
    # Differences 0.75 − 0.25 = 0.5 and −0.5 − 0.5 = −1, less the margins 1 and 0.25.
    behind = [0.5 - 1, -1 - 0.25]
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-d)) for d in behind) / 2)
    loss.backward()
    slopes = [-1 / (1 + math.exp(d)) / 2 for d in behind]
    assert rewards.grad.tolist() == pytest.approx([*slopes, *(-s for s in slopes)])


@pytest.mark.parametrize("margin_coef", [0, 0.5])
def test_gradients_with_weights(renderer, margin_coef):
    """Σ w ℓ / Σ w, by hand: also of pairs one by one, as weights are those of all pairs."""
    pairs = [Pair("tea?", "good", "bad", margin=2, weight=0.5), Pair("tea?", "bad", "good")]
    rows, counts = _encode(pairs, renderer, 48, margin_coef)
    assert counts["pairs_weighted"] == 1
    # 0.5 and 1 by their mean 0.75.
    assert [row["weight"] for row in rows] == pytest.approx([2 / 3, 4 / 3])
    behind = [0.5 - 2 * margin_coef, -1.0]
    losses = [math.log1p(math.exp(-d)) for d in behind]
    rewards = torch.tensor([0.75, -0.5, 0.25, 0.5], requires_grad=True)
    collate = _ColumnCollator(DataCollatorForPreference(pad_token_id=0), "weight")
    loss = loss_of(collate(rows), rewards)
    assert loss.item() == pytest.approx((0.5 * losses[0] + losses[1]) / 1.5)
    loss.backward()
    slopes = [-w / (1 + math.exp(d)) / 1.5 for w, d in zip((0.5, 1), behind, strict=True)]
    assert rewards.grad.tolist() == pytest.approx([*slopes, *(-s for s in slopes)])
    single = [loss_of(collate(rows[i : i + 1]), rewards[i::2]).item() for i in range(2)]
    assert sum(single) / 2 == pytest.approx(loss.item())


@pytest.mark.parametrize(("a", "b"), [(3, 1), (1, 5), (2, 2), (4, 0)])
def test_the_lead_of_votes_has_the_slope_of_their_shares_as_soft_label(a, b):
    """At equal rewards, as the docstring of `lead` says."""
    difference = torch.zeros((), requires_grad=True)
    p = a / (a + b)
    log_sigmoid = torch.nn.functional.logsigmoid
    (-p * log_sigmoid(difference) - (1 - p) * log_sigmoid(-difference)).backward()
    soft = difference.grad.item()
    sign = 1 if a > b else -1
    assert lead(a, b) * sign * (0.5 - 1) == pytest.approx(soft)


def weighted(folder, weights):
    """Write a dataset of contradictory pairs with these weights."""
    folder.mkdir()
    pairs = [
        Pair("tea or cup?", *(("good", "bad") if i % 2 else ("bad", "good")), weight=w)
        for i, w in enumerate(weights)
    ]
    write_rows(folder / PAIRS_TRAIN, pairs)
    return folder


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_weights_decide_between_contradictory_pairs(train, tmp_path, micro_batch_size):
    """Five parts of good against one of bad, with batches of one pair too."""
    folder = weighted(tmp_path / "data", [0.2, None] * 4)
    out, result = train(folder=folder, epochs=20, batch_size=8, micro_batch_size=micro_batch_size)
    assert result.metrics["pairs_weighted"] == 4
    good, bad = Scorer(out, CPU, 48)(["tea or cup?"] * 2, ["good", "bad"])
    # Weighted maximum likelihood: σ(good − bad) = 5 / 6.
    assert good - bad == pytest.approx(math.log(5), abs=0.5)


def test_without_weights_nothing_changes(train, data, tmp_path):
    """Pairs without a weight, and those of a file that was written before there were any."""
    older = tmp_path / "older"
    older.mkdir()
    table = parquet.read_table(data / PAIRS_TRAIN)
    parquet.write_table(table.drop_columns(["weight"]), older / PAIRS_TRAIN)
    one, result = train("a", epochs=1)
    two, _ = train("b", folder=older, epochs=1)
    toys.assert_same_weights(one, two)
    assert "pairs_weighted" not in result.metrics
    # A file in which all weights are the same gives the same loss as one without.
    pairs = [replace(pair, weight=0.25) for pair in read_rows(data / PAIRS_TRAIN, Pair)]
    same = tmp_path / "same"
    same.mkdir()
    write_rows(same / PAIRS_TRAIN, pairs)
    assert toys.distance(train("c", folder=same, epochs=1)[0], one) < 1e-6


def test_without_the_setting_margins_change_nothing(train, tmp_path):
    margins = graded(tmp_path / "margins", [3.0, 1.0, 0.5, 2.0])
    none = graded(tmp_path / "none", [None] * 4)
    one, _ = train("a", folder=margins, epochs=1)
    two, _ = train("b", folder=none, epochs=1)
    toys.assert_same_weights(one, two)


def test_margins_that_are_asked_for_and_missing(train, tmp_path):
    folder = graded(tmp_path / "data", [None] * 4)
    with pytest.raises(DataError, match=r"reward_model.margin_coef = 1: no pair has a margin"):
        train(folder=folder, margin_coef=1)


def test_negatives_train_beside_the_pairs_and_are_counted_apart(data, sft, tmp_path):
    pairs = read_rows(data / PAIRS_TRAIN, Pair)
    config = toys.changed(toys.REWARD, negatives=0.5)
    result = train_reward_model(config, data, sft, tmp_path / "model", seed=2)
    made = make_negatives(pairs, 0.5, 2)
    plain = train_reward_model(toys.REWARD, data, sft, tmp_path / "plain", seed=2)
    assert result.metrics["pairs"] == plain.metrics["pairs"]
    assert result.metrics["negatives"] == len(made) > 0
    assert "negatives" not in plain.metrics
    assert toys.distance(tmp_path / "model", tmp_path / "plain") > 0


def test_negatives_have_the_weight_of_their_pair_and_count_for_nothing_else(renderer):
    pairs = [Pair("tea?", "good", "bad bad", weight=3.0), Pair("cup?", "good good", "bad")]
    negative = Pair("tea?", "good", "good good good", weight=3.0)
    rows, counts = _encode(pairs, renderer, 48, negatives=[negative])
    # (3 + 1 + 3) / 3 is the mean.
    assert [row["weight"] for row in rows] == pytest.approx([9 / 7, 3 / 7, 9 / 7])
    assert counts == {"pairs_weighted": 1, "negatives": 1}


def test_a_chosen_reply_that_lost_its_end_has_no_negatives(renderer):
    """Its negatives have an end, so that the model would learn to like replies without one."""
    whole, long = Pair("tea?", "good", "bad"), Pair("tea?", "good " * 40, "bad")
    rows, counts = _encode([whole, long], renderer, 24, negatives=[
        Pair("tea?", "good", "good good"), Pair("tea?", "good " * 40, "bad bad"),
    ])  # fmt: skip
    assert len(rows) == 3
    assert counts["negatives"] == 1
