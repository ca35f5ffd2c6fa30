"""A ready reward model in place of a trained one: publication and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from rlhf.config import PipelineConfig
from rlhf.data.chat_template import PLAIN_TEMPLATE
from rlhf.data.rendering import load_renderer
from rlhf.errors import ConfigError, PromptUnusable
from rlhf.modeling.base import train_tokenizer
from rlhf.modeling.reward import Scorer, reward_meta
from rlhf.modeling.source import ExternalModel
from rlhf.ppo.train import train_policy
from rlhf.ready_reward_model import publish_ready_reward_model
from tasks.preflight import preflight
from tasks.runner import find_inputs, run_stage, store_of
from tasks.stages import STAGES
from tests.library import toys
from tests.library.tiny_tokenizers import LINES

CPU = torch.device("cpu")
TRAIN = STAGES["train-reward-model"]
#: Settings for a reward model that reads 64 tokens.
FITTING = {"critic": "policy", "max_new_tokens": 16}
MUST = "must be a sequence-classification model with one label"


@pytest.fixture
def adopt(tmp_path):
    def run(folder: Path, name: str = "out") -> Path:
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        model = ExternalModel("ppo.reward_model_path", str(folder), ready=True)
        result = publish_ready_reward_model(model, folder, out, runtime=toys.RUNTIME)
        assert result.metrics["parameters"] > 1000
        return out

    return run


def scores(folder: Path) -> list[float]:
    replies = ["good", "bad", "good good", "tea"]
    return Scorer(folder, CPU, 48)(["tea or cup?"] * 4, replies).tolist()


def save_foreign(folder: Path, *, labels: int = 1, **changes: Any) -> Path:
    """A classifier with a tokenizer of its own: other vocabulary, no template, no padding."""
    tokenizer = train_tokenizer(["a wholly different text about rivers and stones"] * 9, 310)
    tokenizer.chat_template = None
    tokenizer.pad_token = None
    torch.manual_seed(5)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {**sizes, "vocab_size": 310, "intermediate_size": 16, "num_labels": labels, **changes}
    LlamaForSequenceClassification(LlamaConfig(**config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_of_ours_is_published_as_it_is(adopt, reward_model):
    out = adopt(reward_model)
    toys.assert_same_weights(out, reward_model)
    assert reward_meta(out) == reward_meta(reward_model)
    assert load_renderer(out).template_hash == load_renderer(reward_model).template_hash
    assert scores(out) == scores(reward_model)


def test_only_safetensors_and_json_are_published(adopt, copy_of, reward_model):
    folder = copy_of(reward_model)
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    names = {path.suffix for path in adopt(folder).iterdir()}
    assert names <= {".json", ".safetensors", ".jinja"}


def test_a_foreign_model_keeps_its_tokenizer_which_is_completed(adopt, tmp_path):
    folder = save_foreign(tmp_path / "foreign")
    out = adopt(folder)
    renderer = load_renderer(out)
    assert renderer.tokenizer.chat_template == PLAIN_TEMPLATE
    assert renderer.tokenizer.pad_token_id != renderer.tokenizer.eos_token_id
    assert renderer.encode("river?", "stones", 48).ids == [
        *renderer.tokenizer("User: river?\n\nAssistant: stones")["input_ids"],
        renderer.tokenizer.eos_token_id,
    ]
    assert reward_meta(out) == {"pooling": "last"}
    before, after = toys.weights(folder), toys.weights(out)
    rows = len(before["model.embed_tokens.weight"])
    assert torch.equal(
        after["model.embed_tokens.weight"][:rows], before["model.embed_tokens.weight"]
    )
    assert torch.equal(after["score.weight"], before["score.weight"])
    assert len(set(scores(out))) == 4


@pytest.mark.parametrize("takes_blanks_along", [False, True])
def test_a_foreign_model_reads_the_whole_text_of_its_template(adopt, tmp_path, takes_blanks_along):
    """Qwen's kind writes a line break behind the end of a turn, on which a score may stand."""
    folder = save_foreign(tmp_path / "foreign")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = AddedToken("<end>", rstrip=takes_blanks_along, special=True, normalized=False)
    tokenizer.add_tokens(["<start>", end], special_tokens=True)
    tokenizer.chat_template = LINES
    tokenizer.save_pretrained(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    out = adopt(folder)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "good"}]
    ids = torch.tensor([tokenizer.apply_chat_template(chat, return_dict=False)])
    assert tokenizer.decode(ids[0]).endswith("<end>" if takes_blanks_along else "<end>\n")
    adopted: Any = LlamaForSequenceClassification.from_pretrained(out)
    with torch.no_grad():
        hidden = adopted.model(ids).last_hidden_state
        whole, end = (adopted.score(hidden[0, i]).item() for i in (-1, -2))
    scorer = Scorer(out, CPU, 48)
    assert scorer(["a"], ["good"]).item() == pytest.approx(whole, abs=1e-6)
    assert takes_blanks_along or abs(whole - end) > 1e-4
    # Where a reply is cut, its end is missing anyway.
    assert scorer(["a"], ["good " * 90]).isfinite()


def test_a_reward_model_with_less_room_than_the_policy(adopt, tmp_path):
    out = adopt(save_foreign(tmp_path / "foreign", max_position_embeddings=24))
    scorer = Scorer(out, CPU, 48)
    assert scorer.limits.max_length == 24
    assert Scorer(out, CPU, 8).limits.max_length == 8
    assert torch.isfinite(scorer(["a"], ["good " * 50])).all()
    with pytest.raises(PromptUnusable, match="and 23 fit"):
        scorer(["word " * 50], ["good"])


def test_ppo_learns_from_it_with_another_critic(adopt, tmp_path, data, sft):
    approved = toys.approve(adopt(save_foreign(tmp_path / "foreign")))
    config = toys.changed(toys.PPO, total_episodes=16, num_ppo_epochs=1)
    arguments = {"runtime": toys.RUNTIME}
    with pytest.raises(ConfigError, match="another tokenizer than the policy; set ppo"):
        train_policy(config, data, sft, approved, tmp_path / "policy", **arguments)
    config = toys.changed(config, critic="policy")
    result = train_policy(config, data, sft, approved, tmp_path / "policy", **arguments)
    assert result.metrics["updates"] == 1


def refusal(adopt: Any, folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        adopt(folder, folder.name + "-out")
    text = str(caught.value)
    assert text.startswith(f"ppo.reward_model_path = {str(folder)!r}: ")
    assert "\n" not in text
    return text


def test_refused_as_no_reward_model(adopt, sft, tmp_path, copy_of, reward_model):
    assert MUST in refusal(adopt, sft)
    assert "with 2 labels" in refusal(adopt, save_foreign(tmp_path / "two", labels=2))
    # Says that it is a classifier, but is the language model: the head would be drawn at random.
    folder = copy_of(reward_model)
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "score.weight" in refusal(adopt, folder)
    (folder / "model.safetensors").write_bytes(b"\x80\x04pickle")
    refusal(adopt, folder)
    (folder / "model.safetensors").rename(folder / "model.bin")
    assert "its weights are a pickle (model.bin)" in refusal(adopt, folder)


def test_refused_for_its_tokenizer(adopt, copy_of, reward_model):
    folder = copy_of(reward_model)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", "<|end|>\n"))
    assert "its tokenizer or chat template changed since it was trained" in refusal(adopt, folder)
    (folder / "tokenizer.json").unlink()
    assert "can't be loaded" in refusal(adopt, folder)


@pytest.fixture
def config(tmp_path):
    def make(place: object, **changes: Any) -> PipelineConfig:
        runtime = {"work_dir": str(tmp_path / "work"), "report_dir": str(tmp_path / "reports")}
        here = {"runtime": {**runtime, "threads": 1}, "tracking": {"trackers": []}}
        tree = {"store": str(tmp_path / "store"), **here}
        return PipelineConfig.model_validate(
            {**tree, "ppo": {"reward_model_path": str(place), **FITTING}, **changes}
        )

    return make


def test_the_stage_runs_once_for_the_same_content_wherever_it_lies(config, copy_of, reward_model):
    first = run_stage(TRAIN, config(reward_model), {})
    assert not first.cached
    assert first.headline.startswith("ready model, ")
    folder = copy_of(reward_model)
    settings = {"reward_model": {"epochs": 9}}
    assert run_stage(TRAIN, config(folder, **settings), {}).ref == first.ref
    assert run_stage(TRAIN, config(folder), {}).cached
    manifest = store_of(config(folder)).manifest(first.ref)
    assert str(folder.parent) not in manifest.model_dump_json()
    assert manifest.parents == {}
    # One bit of one weight.
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    changed = run_stage(TRAIN, config(folder), {})
    assert not changed.cached
    assert changed.ref.digest != first.ref.digest


def test_an_artifact_is_a_parent(config, reward_model):
    first = run_stage(TRAIN, config(reward_model), {}).ref
    by_digest = config(f"artifact:{first.digest[:12]}")
    preflight(by_digest)
    second = run_stage(TRAIN, by_digest, {})
    store = store_of(by_digest)
    assert store.manifest(second.ref).parents == {"base": first.digest}
    toys.assert_same_weights(store.fetch(second.ref), reward_model)
    # Later stages find it, so that they can be run alone.
    evaluate = STAGES["evaluate-reward-model"]
    data = first.model_copy(update={"kind": "dataset"})
    found = find_inputs(evaluate, by_digest, {"data": data})
    assert found["reward-model"] == second.ref


def test_no_inputs_are_taken_for_a_ready_model(config, reward_model):
    chosen = config(reward_model)
    assert find_inputs(TRAIN, chosen, {}) == {}
    some = run_stage(TRAIN, chosen, {}).ref
    with pytest.raises(ConfigError, match="--input sft: no input of train-reward-model, which tak"):
        find_inputs(TRAIN, chosen, {"sft": some})
    evaluate = STAGES["evaluate-policy"]
    wrong = "--input policy: .* is of kind reward-model; give one of kind policy, as train-policy"
    with pytest.raises(ConfigError, match=wrong):
        find_inputs(evaluate, chosen, {"policy": some})
    assert run_stage(TRAIN, chosen, {"sft": some, "data": some}).cached


def test_preflight_refuses_before_any_work(config, sft, reward_model, copy_of, tmp_path):
    preflight(config(reward_model))
    cases = [(sft, MUST), (tmp_path / "none", "no model there"), ("artifact:abcdef", "abcdef")]
    pickled = copy_of(reward_model)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for place, words in [*cases, (pickled, "its weights are a pickle")]:
        with pytest.raises((ConfigError, OSError), match=words):
            preflight(config(place))
    both = {"reward_model": {"base": "x/y"}}
    with pytest.raises(ValueError, match=r"path and reward_model\.base are both"):
        config(reward_model, **both)


def test_preflight_refuses_artifacts_that_are_no_reward_model(config, sft, tmp_path):
    store = store_of(config(sft))
    published = run_stage(
        STAGES["train-sft"],
        config(sft, ppo=FITTING, base={"path": str(sft)}, sft={"enabled": False}),
        {"data": _dataset(store, tmp_path)},
    ).ref
    with pytest.raises(ConfigError, match=f"'artifact:{published.digest}': {MUST}"):
        preflight(config(f"artifact:{published.digest}"))
    data = store.manifest(published).parents["data"]
    with pytest.raises(ConfigError, match="this artifact is a dataset, no model"):
        preflight(config(f"artifact:{data}"))
    # A base that is an artifact: the stage after it finds what was made from it.
    base = {"path": f"artifact:{published.digest}"}
    chosen = config(sft, ppo=FITTING, base=base, sft={"enabled": False})
    again = run_stage(STAGES["train-sft"], chosen, {"data": store.resolve(data)}).ref
    assert find_inputs(TRAIN, chosen, {"data": store.resolve(data)})["sft"] == again


def _dataset(store: Any, tmp_path: Path) -> Any:
    from rlhf.store import Producer

    producer = Producer(stage="x", code_version="1", config={}, seed=0, versions={})
    folder = toys.write_data(tmp_path / "dataset")
    return store.publish(folder, "dataset", parents={}, producer=producer, metrics={})
