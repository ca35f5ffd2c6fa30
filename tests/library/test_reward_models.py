"""Reward models of any family: encoders, families without a classifier, heads of other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CTRLConfig,
    CTRLForSequenceClassification,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from rlhf.config import DataConfig, EvaluationConfig, LoraConfig, PipelineConfig
from rlhf.config.lengths import TokenLimits
from rlhf.data.rendering import load_renderer
from rlhf.data.text_pairs import PairRenderer
from rlhf.errors import ConfigError, PromptUnusable
from rlhf.evaluation import evaluate_reward_model
from rlhf.modeling.classifier import Pooled, Whole, is_causal, load_classifier, pads_exactly
from rlhf.modeling.lora import ADAPTER_FOLDER
from rlhf.modeling.reward import Scorer, load_unpublished, reward_meta, save_reward_model
from rlhf.modeling.reward_source import check_reward_source, context_in, is_encoder
from rlhf.modeling.source import ExternalModel
from rlhf.ppo.train import train_policy
from rlhf.ready_reward_model import publish_ready_reward_model
from rlhf.reward import train_reward_model
from tests.library import toys
from tests.library.encoders import ENCODERS, save_encoder

CPU = torch.device("cpu")
TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "tea?"},
    {"role": "assistant", "content": "cup"},
    {"role": "user", "content": "jar [SEP] </s>?"},
]
PROMPTS = ["tea or cup?", "why or why or why?", TURNS, "pot?"]
REPLIES = ["good", "bad bad bad tea", "good tea bad", "why or tea or cup or why or jar"]


def adopt(folder: Path, out: Path) -> Path:
    """Publish a ready reward model."""
    out.mkdir()
    model = ExternalModel("ppo.reward_model_path", str(folder), ready=True)
    publish_ready_reward_model(model, folder, out, runtime=toys.RUNTIME)
    return out


def trained(base: Path, out: Path, data: Path, **changes: Any) -> Path:
    """Train a reward model from a base of its own."""
    out.mkdir()
    values = {"base": str(base), "pooling": "last", "learning_rate": 1e-2, "epochs": 3, **changes}
    config: Any = toys.changed(toys.REWARD, **values)
    train_reward_model(config, data, "no SFT policy", out, runtime=toys.RUNTIME)
    return out


# --- encoders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ENCODERS)
def test_a_ready_encoder_scores_as_plain_transformers(family, tmp_path):
    model, tokenizer = save_encoder(family, tmp_path / "ready", ready=True)
    scorer = Scorer(adopt(tmp_path / "ready", tmp_path / "out"), CPU, 96)
    assert isinstance(scorer.model, Whole)
    assert not is_causal(scorer.model)
    assert scorer.limits.max_length == 96  # RoBERTa's 98 positions begin at 2
    texts = [
        PROMPTS[0], PROMPTS[1],
        "System: be kind\n\nUser: tea?\n\nAssistant: cup\n\nUser: " + escaped(tokenizer),
        PROMPTS[3],
    ]  # fmt: skip
    expected = []
    for text, reply in zip(texts, REPLIES, strict=True):
        # Plain transformers on a single row, without padding.
        row = tokenizer(text, reply, return_tensors="pt", split_special_tokens=True)
        expected.append(model(**row).logits.item())
    assert scorer(PROMPTS, REPLIES).tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.05


def escaped(tokenizer: Any) -> str:
    """The last turn, in which no special token is spelled any more."""
    return PairRenderer(tokenizer).control.escape(TURNS[-1]["content"])


def test_tokens_of_a_pair_are_those_of_the_tokenizer(tmp_path):
    _, tokenizer = save_encoder("bert", tmp_path / "bert", ready=True)
    renderer = PairRenderer(tokenizer)
    whole = tokenizer("tea or cup?", "good")
    one = renderer.encode("tea or cup?", "good", 60)
    assert (one.ids, one.types) == (whole["input_ids"], tuple(whole["token_type_ids"]))
    assert not one.is_cut
    # A reply that is cut keeps its [SEP], within the limit.
    cut = renderer.encode("tea or cup?", "good " * 50, 20)
    assert cut.is_cut
    assert len(cut.ids) == len(cut.types or ()) == 20
    assert cut.ids[-1] == tokenizer.sep_token_id
    # No text of a reply ends the sequence.
    special = renderer.encode("tea?", "good [SEP] bad", 60).response
    assert special.count(tokenizer.sep_token_id) == 1


def test_prompts_of_a_pair_lose_whole_turns_and_fit_the_limit(tmp_path):
    _, tokenizer = save_encoder("bert", tmp_path / "bert", ready=True)
    renderer = PairRenderer(tokenizer)
    limits = TokenLimits(max_length=40, max_prompt=24, max_new_tokens=4)
    one = renderer.encode(TURNS, "good", limits)
    assert one.turns_dropped == 2
    assert one.prompt == renderer.encode([TURNS[0], TURNS[3]], "good", 60).prompt
    assert len(one.prompt) + 1 <= 24  # with the [SEP] behind the reply
    with pytest.raises(PromptUnusable, match="23 fit"):
        renderer.encode("tea or cup? " * 20, "good", limits)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, alpha=16)], ids=["full", "lora"])
def test_an_encoder_learns_a_preference(family, lora, tmp_path, data):
    if lora and family in ("bert", "modernbert"):
        pytest.skip("one pooler inside the backbone and one head outside of it are enough")
    save_encoder(family, tmp_path / "base", ready=False)
    out = trained(tmp_path / "base", tmp_path / "out", data, lora=lora)
    scorer = Scorer(out, CPU, 48)
    good, bad = scorer(["tea or cup?"] * 2, ["good", "bad"])
    assert good - bad > 1
    assert reward_meta(out)["pooling"] == "own"
    # Plain transformers loads it whole, head included.
    auto: Any = AutoModelForSequenceClassification
    plain, info = auto.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    row = AutoTokenizer.from_pretrained(out)("tea or cup?", "good", return_tensors="pt")
    assert plain.eval()(**row).logits.item() == pytest.approx(good.item(), abs=1e-5)


def test_ppo_with_a_trained_encoder(tmp_path, data, sft):
    save_encoder("bert", tmp_path / "base", ready=False)
    reward = trained(tmp_path / "base", tmp_path / "reward", data)
    (tmp_path / "gate").mkdir()
    gate = evaluate_reward_model(
        EvaluationConfig(), DataConfig(), data, reward, tmp_path / "gate", limits=48,
        runtime=toys.RUNTIME,
    )  # fmt: skip
    assert gate.metrics["accuracy"] > 0.9
    config = toys.changed(toys.PPO, total_episodes=16, num_ppo_epochs=1)
    arguments = (data, sft, toys.approve(reward), tmp_path / "policy")
    with pytest.raises(ConfigError, match=r"reads both ways.*set ppo.critic to policy"):
        train_policy(config, *arguments, runtime=toys.RUNTIME)
    config = toys.changed(config, critic="policy")
    assert train_policy(config, *arguments, runtime=toys.RUNTIME).metrics["updates"] == 1


@pytest.mark.parametrize("change", [{"pooling": "sum"}, {"lm_loss_coef": 0.5}])
def test_options_of_decoders_are_refused(change, tmp_path, data):
    save_encoder("bert", tmp_path / "base", ready=False)
    (field,) = change
    with pytest.raises(ConfigError, match=rf"^reward_model\.{field} = .* set it to "):
        trained(tmp_path / "base", tmp_path / "out", data, **change)


def test_a_model_that_padding_changes(tmp_path, data):
    """XLNet scores its last token: rows of one length are scored together, and none trained."""
    _, tokenizer = save_encoder("bert", tmp_path / "xlnet", ready=True)
    config = XLNetConfig(
        vocab_size=340, d_model=16, n_layer=1, n_head=2, d_inner=16, num_labels=1, pad_token_id=0
    )
    model = XLNetForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.logits_proj.weight)
    model.save_pretrained(tmp_path / "xlnet")
    assert not pads_exactly(load_classifier(tmp_path / "xlnet"))
    scores = Scorer(adopt(tmp_path / "xlnet", tmp_path / "out"), CPU, 96)(PROMPTS[:2], REPLIES[:2])
    expected = [
        model(**tokenizer(prompt, reply, return_tensors="pt")).logits.item()
        for prompt, reply in zip(PROMPTS[:2], REPLIES[:2], strict=True)
    ]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ConfigError, match="padding changes the scores of XLNetForSequence"):
        trained(tmp_path / "xlnet", tmp_path / "trained", data)


# --- decoders ---------------------------------------------------------------------------------


@pytest.fixture
def granite(tmp_path, fresh):
    """A base of a family for which transformers has no sequence classifier."""
    folder = tmp_path / "granite"
    tokenizer = AutoTokenizer.from_pretrained(fresh)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GraniteConfig(
        **sizes, num_key_value_heads=2, intermediate_size=32, vocab_size=len(tokenizer),
        max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        logits_scaling=4.0,
    )  # fmt: skip
    torch.manual_seed(0)
    GraniteForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_family_without_a_classifier_gets_a_head(granite, tmp_path, data):
    out = trained(granite, tmp_path / "out", data)
    scorer = Scorer(out, CPU, 48)
    assert isinstance(scorer.model, Pooled)
    good, bad = scorer(["tea or cup?"] * 2, ["good", "bad"])
    assert good - bad > 1
    # The lines of docs/models.md.
    folder = out
    tokenizer, backbone = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    files = [load_file(path) for path in folder.glob("*.safetensors")]
    head = next(weights["score.weight"] for weights in files if "score.weight" in weights)
    text = load_renderer(out).prompt_text("tea or cup?") + "good" + tokenizer.eos_token
    row = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    score = backbone(**row).last_hidden_state[0, -1] @ head[0]
    assert score.item() == pytest.approx(good.item(), abs=1e-5)
    # As a ready model it is the same again, and a critic for a policy with its tokenizer.
    again = Scorer(adopt(out, tmp_path / "ready"), CPU, 48)
    assert again(["tea or cup?"] * 2, ["good", "bad"]).tolist() == [good.item(), bad.item()]
    assert is_causal(again.model)


def test_a_head_of_another_name(tmp_path, data, fresh):
    """CTRL's is `classifier`: trained in full beside adapters, which are merged."""
    tokenizer = AutoTokenizer.from_pretrained(fresh)
    config = CTRLConfig(
        vocab_size=len(tokenizer), n_embd=16, dff=32, n_layer=1, n_head=2, n_positions=64,
        num_labels=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CTRLForSequenceClassification(config)
    (tmp_path / "ctrl").mkdir()
    model.save_pretrained(tmp_path / "ctrl")
    tokenizer.save_pretrained(tmp_path / "ctrl")
    ready = Scorer(adopt(tmp_path / "ctrl", tmp_path / "ready"), CPU, 48)
    assert isinstance(ready.model, Pooled)
    rows = [ready.renderer.encode(p, r, 48).ids for p, r in (("a?", "good"), ("b?", "bad " * 5))]
    expected = [model.eval()(torch.tensor([row])).logits.item() for row in rows]
    assert ready.score_ids(rows).tolist() == pytest.approx(expected, abs=1e-5)
    lora = LoraConfig(r=4, alpha=16, target_modules=".*(Wq|Wv)")
    out = trained(tmp_path / "ctrl", tmp_path / "trained", data, lora=lora, epochs=8)
    assert not torch.equal(
        toys.weights(out)["classifier.weight"], toys.weights(tmp_path / "ctrl")["classifier.weight"]
    )
    assert not (out / ADAPTER_FOLDER).exists()
    good, bad = Scorer(out, CPU, 48)(["tea or cup?"] * 2, ["good", "bad"])
    assert good > bad


def llama(folder: Path, tokenizer: Any, **changes: Any) -> Path:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {**sizes, "vocab_size": len(tokenizer), "intermediate_size": 16, "num_labels": 1}
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(**{**config, **changes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_decoder_whose_configuration_names_several_ends(tmp_path, fresh):
    tokenizer = AutoTokenizer.from_pretrained(fresh)
    folder = llama(tmp_path / "llama", tokenizer, eos_token_id=[1, 2])  # as Llama 3.1
    assert isinstance(load_classifier(folder), Pooled)


def test_pad_tokens_that_end_replies_are_scored_by_position(tmp_path, fresh):
    tokenizer = AutoTokenizer.from_pretrained(fresh)
    tokenizer.pad_token = tokenizer.eos_token
    folder = llama(tmp_path / "ready", tokenizer, pad_token_id=tokenizer.eos_token_id)
    model: Any = LlamaForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = None  # of a single row, the last token
    scorer = Scorer(adopt(folder, tmp_path / "out"), CPU, 60)
    rows = [scorer.renderer.encode(p, r, 60).ids for p, r in (("a?", "good"), ("b?", "bad " * 9))]
    assert rows[0][-1] == tokenizer.eos_token_id
    expected = [model(torch.tensor([row])).logits.item() for row in rows]
    assert scorer.score_ids(rows).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["v_head.weight", "rm_head.weight", "regression_layer.weight"])
def test_a_head_that_the_class_does_not_know_is_refused(name, tmp_path, fresh):
    folder = llama(tmp_path / "ready", AutoTokenizer.from_pretrained(fresh))
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights["score.weight"].clone()
    for also in (False, True):  # beside the head, and in its place
        if also:
            del weights["score.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ConfigError, match=r"score\.weight|" + name):
            adopt(folder, tmp_path / f"out{also}")


def test_a_pooler_that_no_head_reads_is_left_out(tmp_path):
    """As in files of RoBERTa from older versions; of the head itself nothing may lack."""
    save_encoder("roberta", tmp_path / "ready", ready=True)
    path = tmp_path / "ready" / "model.safetensors"
    weights = load_file(path)
    weights["roberta.pooler.dense.weight"] = torch.ones(16, 16)
    save_file(weights, path, {"format": "pt"})
    adopt(tmp_path / "ready", tmp_path / "out")
    del weights["classifier.dense.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"classifier\.dense\.weight"):
        adopt(tmp_path / "ready", tmp_path / "again")


def test_a_critic_with_fewer_positions_than_the_policy(tmp_path, data, sft):
    """The policy reads 64 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(sft)
    folder = llama(tmp_path / "short", tokenizer, max_position_embeddings=32)
    approved = toys.approve(adopt(folder, tmp_path / "out"))
    config = toys.changed(toys.PPO, total_episodes=16, num_ppo_epochs=1)
    arguments = (data, sft, approved, tmp_path / "policy")
    expected = "reads at most 32 tokens, and a prompt with its reply has up to 64; set ppo.critic"
    with pytest.raises(ConfigError, match=expected):
        train_policy(config, *arguments, runtime=toys.RUNTIME)
    config = toys.changed(config, critic="policy")
    assert train_policy(config, *arguments, runtime=toys.RUNTIME).metrics["updates"] == 1


def test_saving_keeps_the_form(granite, tmp_path):
    model, renderer = load_unpublished(granite)
    (tmp_path / "out").mkdir()
    save_reward_model(model, renderer, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["architectures"] == ["GraniteForSequenceClassification"]
    assert saved["id2label"] == {"0": "LABEL_0"}


# --- settings ---------------------------------------------------------------------------------


def checked(data: dict[str, Any], ready: bool = True, **sections: Any) -> None:
    config = PipelineConfig.model_validate(sections)
    field = "ppo.reward_model_path" if ready else "reward_model.base"
    check_reward_source(config, ExternalModel(field, "some/model", ready=ready), data)


def test_settings_that_do_not_fit_a_reward_model():
    deberta = {"model_type": "deberta-v2", "max_position_embeddings": 512}
    llama_data = {"model_type": "llama", "text_config": {"max_position_embeddings": 200}}
    other = {"critic": "policy"}
    checked(deberta, ppo=other)
    checked({"model_type": "llama"}, base={"path": "some/base"})
    with pytest.raises(ConfigError, match=r"another tokenizer than a policy .* from scratch; set"):
        checked({"model_type": "llama"})
    with pytest.raises(ConfigError, match=r"'reward_model', but .*encoder .*set ppo.critic to po"):
        checked(deberta)
    with pytest.raises(ConfigError, match="reads at most 200 tokens, and a prompt with its reply"):
        checked(llama_data)
    checked(llama_data, ppo=other)
    short = {"model_type": "llama", "n_positions": 64}
    with pytest.raises(ConfigError, match=r"reads at most 64 tokens, and ppo.max_new_tokens = 64"):
        checked(short, ppo={**other, "max_new_tokens": 64})
    for field, value in (("pooling", "sum"), ("lm_loss_coef", 0.5)):
        with pytest.raises(ConfigError, match=rf"reward_model\.{field} = .* is for decoders"):
            checked(deberta, False, ppo=other, reward_model={field: value})
    assert context_in({"max_position_embeddings": -1}) is None
    assert not is_encoder({"model_type": "bert", "is_decoder": True})
