"""Supervised fine-tuning on the toy task."""

from __future__ import annotations

import shutil

import pytest
import torch
from trl.trainer.sft_trainer import SFTTrainer

import rlhf.sft
from rlhf.config import LoraConfig
from rlhf.data.rendering import Renderer, load_renderer
from rlhf.data.rows import (
    DEMONSTRATIONS,
    PAIRS_EVAL,
    PAIRS_TRAIN,
    Demonstration,
    Pair,
    read_rows,
    write_rows,
)
from rlhf.errors import ConfigError, DataError, TrainingError
from rlhf.files import read_json
from rlhf.modeling.base import load_base, load_policy
from rlhf.sft import _encode, _texts, train_sft
from rlhf.store import ArtifactRef
from tasks.runner import Outcome
from tests.library import toys

LORA = LoraConfig(r=4, alpha=16.0)


@pytest.fixture
def train(data, tmp_path):
    def run(name="out", base=toys.BASE, seed=0, progress=None, folder=data, **changes):
        out = tmp_path / name
        out.mkdir()
        # A rate beyond the field's bounds makes what a wrong weight or row would.
        rate = changes.get("learning_rate", 0)
        checked = {k: v for k, v in changes.items() if k != "learning_rate" or v <= 100}
        config = toys.changed(toys.SFT, **checked)
        config = config.model_copy(update={"learning_rate": rate}) if rate > 100 else config
        options = {"progress": progress} if progress else {}
        result = train_sft(config, base, folder, out, seed=seed, runtime=toys.RUNTIME, **options)
        return out, result

    return run


def based_on(folder):
    return toys.changed(toys.BASE, path=str(folder))


def test_it_learns(train, data):
    out, result = train(epochs=6)
    curve = read_json(out / "curve.json")
    # a reply is one of two, of one or two words: random tokens cost ln 285 = 5.6 nats each
    assert curve[0]["loss"] > 3
    assert curve[-1]["loss"] < 1.2
    assert result.metrics["loss"] == curve[-1]["loss"]
    assert result.metrics["demonstrations"] == 96
    model = load_policy(out)
    assert result.metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert result.metrics["vocabulary"] == len(load_renderer(out).tokenizer)


def test_the_published_weights_are_the_trained_ones(sft):
    model, renderer = load_policy(sft), load_renderer(sft)
    encoded = renderer.encode("tea or cup?", "good good", 48)
    with torch.no_grad():
        log_p = model(torch.tensor([encoded.ids])).logits[0].log_softmax(-1)
    at = len(encoded.prompt)
    mean = sum(log_p[at - 1 + i, t].item() for i, t in enumerate(encoded.response))
    assert mean / len(encoded.response) > -2.5


def test_the_loss_on_held_out_replies_is_told_before_and_after(train, data, tmp_path):
    out, result = train(epochs=6)
    told = result.metrics
    assert told["heldout_loss"] < 1.5 < 3 < told["heldout_loss_before"]
    # By hand, of the policy that was written: 96 rows in 6 epochs, a twentieth of it are 28 pairs.
    pairs = read_rows(data / PAIRS_EVAL, Pair)
    count = min(28, len(pairs))
    model, renderer = load_policy(out), load_renderer(out)
    losses = []
    for number in range(count):
        pair = pairs[number * len(pairs) // count]
        encoded = renderer.encode(pair.prompt, pair.chosen, toys.SFT.max_length)
        ids = torch.tensor([encoded.ids])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        losses.append(-log_p[len(encoded.prompt) - 1 :, 0])
    assert told["heldout_loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
    # Rows that are held out change nothing of the training, and need not be there.
    folder = shutil.copytree(data, tmp_path / "without")
    (folder / PAIRS_EVAL).unlink()
    without, result = train("b", epochs=6, folder=folder)
    toys.assert_same_weights(out, without)
    assert "heldout_loss" not in result.metrics


def test_only_the_reply_is_learnt(renderer):
    row = Demonstration("tea?", "good")
    (encoded,), counts = _encode([row], renderer, 40)
    assert counts == {}
    both = renderer.encode("tea?", "good", 40)
    assert encoded["input_ids"] == both.prompt + both.response
    assert encoded["completion_mask"] == [0] * len(both.prompt) + [1] * len(both.response)


def test_seeds(train, sft):
    again, _ = train("a")
    toys.assert_same_weights(sft, again)
    assert read_json(sft / "curve.json") == read_json(again / "curve.json")
    assert toys.distance(sft, train("b", seed=1)[0]) > 1e-3


def test_shuffling_is_seeded_apart_from_the_weights(train, sft):
    a, _ = train("a", base=based_on(sft), seed=1, epochs=1)
    b, _ = train("b", base=based_on(sft), seed=2, epochs=1)
    assert toys.distance(a, b) > 1e-5


def test_micro_batches_change_nothing(train):
    whole, _ = train("whole", learning_rate=1e-3, epochs=1)
    parts, _ = train("parts", learning_rate=1e-3, epochs=1, micro_batch_size=4)
    # Adam divides by tiny second moments, so rounding shows; a wrong scale would show in each step
    assert toys.distance(whole, parts) < 1e-4


def test_the_loss_from_all_logits_is_trls_fused_one(train, monkeypatch):
    """The former is faster with a small vocabulary, the latter smaller with a large one."""
    fused: list[bool] = []
    compute = SFTTrainer.compute_loss
    monkeypatch.setattr(
        SFTTrainer, "compute_loss", lambda *args: fused.append(True) or compute(*args)
    )
    plain, _ = train("plain", learning_rate=1e-3, epochs=1)
    assert not fused
    # A micro batch of 16 rows of at most 48 tokens, and 285 tokens in the vocabulary.
    monkeypatch.setattr(rlhf.sft, "PLAIN_LOGITS", 1000)
    out, _ = train("fused", learning_rate=1e-3, epochs=1)
    assert len(fused) == 6  # 96 rows / 16
    assert toys.distance(plain, out) < 1e-4


@pytest.fixture(scope="module")
def one_epoch(data, sft, tmp_path_factory):
    """One epoch more, from trained weights: nothing but the parameters can make a difference."""
    out = tmp_path_factory.mktemp("epoch")
    config = toys.changed(toys.SFT, epochs=1)
    train_sft(config, based_on(sft), data, out, runtime=toys.RUNTIME)
    return out


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-3},
        {"lr_scheduler": "constant"},
        {"warmup_ratio": 0.5},
        {"adam_beta2": 0.5},
        {"weight_decay": 0.5},
        {"max_grad_norm": 0.01},
        {"epochs": 2},
        {"batch_size": 8},
        {"max_length": 8},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_parameter_arrives(train, sft, one_epoch, change):
    out, _ = train(base=based_on(sft), **{"epochs": 1, **change})
    assert toys.distance(out, one_epoch) > 1e-5


def test_disabled_publishes_the_base(train, sft):
    out, result = train(base=based_on(sft), enabled=False)
    toys.assert_same_weights(out, sft)
    assert load_renderer(out).template_hash == load_renderer(sft).template_hash
    assert "loss" not in result.metrics
    assert not (out / "curve.json").exists()
    ref = ArtifactRef(kind="policy", digest="0" * 64, size=1, uri="x")
    shown = Outcome("train-sft", ref, False, 1.0, result.metrics).headline
    assert shown.startswith("the base as it is: sft.enabled = false · ")


def test_lora_trains_adapters_and_publishes_a_plain_model(train, sft):
    steps = []
    out, result = train(
        base=based_on(sft), lora=LORA, progress=lambda step, total, m: steps.append((step, total))
    )
    assert steps[-1] == (18, 18)  # 96 rows / 16, three times
    assert not list(out.glob("adapter*"))
    before, after = toys.weights(sft), toys.weights(out)
    assert before.keys() == after.keys()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved
    # all-linear: projections, never embeddings or norms
    assert all(k.endswith("_proj.weight") for k in moved)
    assert result.metrics["loss"] < read_json(sft / "curve.json")[-1]["loss"] + 0.05


def test_adapters_for_modules_that_it_has_not(train):
    with pytest.raises(
        ConfigError, match=r"^sft\.lora\.target_modules = 'nope': this model has no"
    ):
        train(lora=LoraConfig(target_modules="nope"))


def test_progress(train, monkeypatch):
    monkeypatch.setattr("rlhf.trl_adapter.FEW_STEPS", 0)  # as in a long training
    seen = []
    out, _ = train(progress=lambda *a: seen.append(a), epochs=1)
    # Step 5 and the last are logged after they have ended, so they are told again with metrics.
    assert [(s, t) for s, t, _ in seen] == [(i, 6) for i in (1, 2, 3, 4, 5, 5, 6, 6)]
    logged = [{k: v for k, v in r.items() if k != "step"} for r in read_json(out / "curve.json")]
    assert [m for *_, m in seen] == [*[{}] * 5, logged[0], {}, logged[1]]


def test_training_that_diverges_is_an_error(train):
    with pytest.raises(
        TrainingError, match=r"diverged by step 2 .*lower this stage's learning_rate"
    ):
        train(learning_rate=1e30)


@pytest.mark.parametrize("batch_size", [96, 24])
def test_the_last_steps_are_watched_too(train, batch_size):
    """A single step, whose loss is still finite, and four."""
    with pytest.raises(TrainingError, match=r"diverged.*lower this stage's learning_rate"):
        train(epochs=1, learning_rate=1e38, batch_size=batch_size)


def test_a_short_training_has_a_loss_and_a_curve(train):
    out, result = train(epochs=1, batch_size=48)
    curve = read_json(out / "curve.json")
    assert [row["step"] for row in curve] == [1, 2]
    assert result.metrics["loss"] == curve[-1]["loss"]


def test_a_constant_rate_warms_up(train):
    options = {"epochs": 1, "batch_size": 16, "lr_scheduler": "constant"}
    cold, warm = (train(str(r), **options, warmup_ratio=r)[0] for r in (0.0, 0.5))
    rates = [read_json(out / "curve.json")[-1]["learning_rate"] for out in (cold, warm)]
    assert rates[0] == rates[1]
    assert toys.distance(cold, warm) > 1e-5


def test_no_demonstrations(train, data, tmp_path):
    folder = tmp_path / "empty"
    shutil.copytree(data, folder)
    write_rows(folder / DEMONSTRATIONS, [])
    with pytest.raises(DataError, match=r"no demonstrations.*sft\.enabled=false"):
        train(folder=folder)


def test_the_tokenizer_learns_from_every_text(tmp_path):
    chat = [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "beta"}]
    write_rows(tmp_path / PAIRS_TRAIN, [Pair("unseen", "delta", "gamma")])
    rows = [Demonstration(chat, "one"), Demonstration("two", "three")]
    texts = ["alpha", "beta", "one", "two", "three", "delta", "gamma"]
    assert list(_texts(rows, tmp_path)) == texts


def test_foreign_template_is_kept(train, fresh, tmp_path):
    renderer = load_renderer(fresh)
    renderer.tokenizer.chat_template = "{{ messages[0]['content'] }} =>"
    folder = tmp_path / "base"
    load_policy(fresh).save_pretrained(folder)
    renderer.tokenizer.save_pretrained(folder)
    out, _ = train(base=based_on(folder), epochs=1)
    assert load_renderer(out).prompt_text("hi") == "hi =>"
    model, tokenizer = load_base(based_on(folder), [], 0)
    assert Renderer(tokenizer).template_hash == load_renderer(out).template_hash
    assert model.config.vocab_size == load_policy(out).config.vocab_size


def test_a_base_that_guesses_is_named(train, sft, tmp_path, caplog):
    train("same", base=based_on(sft), epochs=0.1)
    assert "better than by guessing" not in caplog.text
    folder = tmp_path / "base"
    model = load_policy(sft)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight.copy_(weight.roll(7, 0))  # as with another tokenizer of the same size
    model.save_pretrained(folder)
    load_renderer(sft).tokenizer.save_pretrained(folder)
    train("other", base=based_on(folder), epochs=0.1)
    assert "its tokenizer or config.json is another model's" in caplog.text
