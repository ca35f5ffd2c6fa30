"""Exports of policies of many kinds: their files, and the check of them in this process.

tests/flows/test_export_command.py has the check run in a process of its own.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from rlhf import export, export_check
from rlhf.config import BaseModelConfig
from rlhf.data.rendering import load_renderer
from rlhf.errors import ConfigError, ExportFailed
from rlhf.export import Sampled, verify_export
from rlhf.export import write_model as write_export
from rlhf.files import read_json, write_json
from rlhf.gates import Check
from rlhf.model_card import _licence, _met, _origin
from rlhf.modeling.base import load_base
from rlhf.modeling.weights import save_model
from rlhf.store import Producer, open_store
from tasks.export import facts_of
from tests.library import toys
from tests.library.tiny_tokenizers import LINES, byte_level, fast, with_bos, write_model

WEIGHTS = "model.safetensors"
PROMPTS = [f"{a} or {b}?" for a in toys.ASKED for b in toys.ASKED if a != b][:6]
SAMPLED = Sampled(6, 0.7, 0, 0.9)


@pytest.fixture(autouse=True)
def _imports_allowed(monkeypatch):
    """What a check refuses in its own process stays possible in this one."""
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])


def published(base: Path, folder: Path, **config) -> Path:
    """The policy that a stage publishes which starts from this base and trains nothing."""
    model, tokenizer = load_base(BaseModelConfig(path=str(base), **config), (), 0)
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


def exported(policy: Path, folder: Path, sampled: Sampled | None = SAMPLED) -> Path:
    folder.mkdir()
    write_export(policy, folder, sampled)
    return folder


def verified(policy: Path, folder: Path, **options):
    checked, _, _ = verify_export(
        policy, folder, options.pop("prompts", PROMPTS), toys.RUNTIME, max_new_tokens=6,
        check=export_check.check, **options,
    )  # fmt: skip
    return checked


def failure(policy: Path, folder: Path, **options) -> str:
    with pytest.raises(ExportFailed) as caught:
        verify_export(
            policy, folder, PROMPTS, toys.RUNTIME, max_new_tokens=6,
            check=answered, **options,
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    return str(caught.value)


def answered(request):
    """The result that the script would write."""
    try:
        return export_check.check(request)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def base_of(tmp_path: Path, kind: str) -> Path:
    """The folder of a base of a kind."""
    special = ["<s>", "</s>", "<start>", "<end>", "<pad>"]
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    if kind == "without a template":
        tokenizer = fast(with_bos(byte_level(special), "<s>"), None, **roles)
    else:
        tokenizer = fast(byte_level(special), LINES, **roles)
    folder = tmp_path / "base"
    ends = [1, 3] if kind == "several ends" else None
    write_model(folder, tokenizer, ends=ends, tie_word_embeddings=kind == "tied")
    if kind == "bfloat16":
        change_weights(folder, lambda w: w.update({k: v.bfloat16() for k, v in w.items()}))
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", {**config, "dtype": "bfloat16"})
    return folder


@pytest.mark.parametrize(
    "kind", ["untied", "tied", "bfloat16", "without a template", "several ends"]
)
def test_kinds_of_pretrained_bases(kind, tmp_path):
    policy = published(base_of(tmp_path, kind), tmp_path / "policy")
    out = exported(policy, tmp_path / "out")
    checked = verified(policy, out)
    assert (checked.equal + checked.ties, checked.prompts) == (6, 6)
    assert checked.equal >= 5
    assert checked.dtype == ("bfloat16" if kind == "bfloat16" else "float32")
    assert (checked.own is None) == (kind != "bfloat16")
    assert checked.conversations >= 8
    assert load_file(out / WEIGHTS).keys() == load_file(policy / WEIGHTS).keys()
    assert ("lm_head.weight" in load_file(out / WEIGHTS)) == (kind != "tied")
    ends = GenerationConfig.from_pretrained(out).eos_token_id
    expected = load_renderer(policy).end_ids
    assert sorted([ends] if isinstance(ends, int) else ends) == sorted(expected)
    assert len(expected) == (1 if kind == "without a template" else 2)
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_a_policy_from_scratch_keeps_its_files_and_settings(sft, tmp_path):
    out = exported(sft, tmp_path / "out")
    checked = verified(sft, out, held_out=False)
    assert (checked.equal, checked.ties, checked.held_out) == (6, 0, False)
    assert checked.replies == "6 of 6 greedy replies are the same"
    assert {path.name for path in out.iterdir()} == {
        "chat_template.jinja", "config.json", "generation_config.json", WEIGHTS, "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    settings = read_json(out / "generation_config.json")
    wanted = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 6, "top_k": 0}
    assert wanted.items() <= settings.items()


def test_the_settings_of_a_base_that_ppo_did_not_train_with_are_left_out(sft, copy_of, tmp_path):
    policy = copy_of(sft)
    settings = read_json(policy / "generation_config.json")
    penalty = {"repetition_penalty": 1.7}
    write_json(policy / "generation_config.json", {**settings, **penalty})
    trained = exported(policy, tmp_path / "ppo")
    assert "repetition_penalty" not in read_json(trained / "generation_config.json")
    # Those of a policy that was not sampled in training stay, and the check goes without them.
    untrained = exported(policy, tmp_path / "sft", None)
    assert penalty.items() <= read_json(untrained / "generation_config.json").items()
    assert verified(policy, untrained).equal == 6


def test_a_changed_weight_names_the_first_prompt(sft, tmp_path):
    out = exported(sft, tmp_path / "out")
    change_weights(out, lambda w: w["model.embed_tokens.weight"].neg_())
    said = failure(sft, out)
    assert "its reply is another one for the prompt 'tea or cup?'" in said
    assert said.endswith("nothing was written")


def test_a_changed_template_fails(sft, tmp_path):
    out = exported(sft, tmp_path / "out")
    path = out / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|assistant|>{%", "<|assistant|> {%"))
    assert "its chat template gives other tokens for" in failure(sft, out)


def test_a_missing_weight_fails(sft, tmp_path):
    out = exported(sft, tmp_path / "out")
    change_weights(out, lambda w: w.pop("model.norm.weight"))
    assert "the files lack the weights of model.norm.weight" in failure(sft, out)


def test_another_choice_between_equals_is_a_tie(tmp_path):
    base = base_of(tmp_path, "untied")
    policy = published(base, tmp_path / "policy")
    reply = verify_export(
        policy, policy, PROMPTS[:1], toys.RUNTIME, max_new_tokens=1, check=export_check.check
    )[2][0]
    twin = reply[0] + 1 if reply[0] + 1 not in (1, 3) else reply[0] + 2

    def equal(weights):
        weights["lm_head.weight"][twin] = weights["lm_head.weight"][reply[0]]

    change_weights(policy, equal)
    out = exported(policy, tmp_path / "out")
    change_weights(out, lambda w: w["lm_head.weight"][twin].mul_(1 + 1e-4))
    request = []

    def check(asked):
        request.append(copy.deepcopy(asked))
        return export_check.check(asked)

    checked, _, _ = verify_export(
        policy, out, PROMPTS[:1], toys.RUNTIME, max_new_tokens=1, check=check
    )
    assert (checked.equal, checked.ties) in ((0, 1), (1, 0))
    change_weights(out, lambda w: w["lm_head.weight"][twin].mul_(1 - 2e-4))
    other, _, _ = verify_export(
        policy, out, PROMPTS[:1], toys.RUNTIME, max_new_tokens=1, check=check
    )
    # A little more or a little less likely: one of them takes the twin.
    assert {checked.ties, other.ties} == {0, 1}
    assert "1 after a tie of two tokens" in max(checked, other, key=lambda c: c.ties).replies


def test_an_adapter_is_checked_on_its_base(train, sft, copy_of, tmp_path):
    policy = train(total_episodes=16, lora={"r": 2}, learning_rate=0.05)
    out = exported(policy, tmp_path / "export")
    assert {path.name for path in (out / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    assert verified(policy, out, adapter_base=sft).adapter == 6
    adapter = out / "adapter" / "adapter_model.safetensors"
    save_file({k: v * 400 for k, v in load_file(adapter).items()}, adapter)
    assert "its adapter's reply is another one" in failure(policy, out, adapter_base=sft)


def test_conversations_that_training_changes_are_left_out(sft):
    renderer = load_renderer(sft)
    plain = export._conversations(renderer, ["tea?"])
    assert len(export._conversations(renderer, ["tea?", "<|end|> tea?"])) == len(plain)
    assert [messages for messages, _ in plain][-1] == [{"role": "user", "content": "tea?"}]


def test_a_check_that_gives_no_answer_is_ended(monkeypatch):
    asked = {"prompts": ["tea?"] * 4, "max_new_tokens": 10}
    assert export.check_seconds(asked) == export.LOADING_SECONDS + 1200
    assert export.check_seconds({**asked, "max_new_tokens": 10**9}) == export.MOST_SECONDS
    monkeypatch.setenv("RLHF_EXPORT_SECONDS", "0.01")
    with pytest.raises(ExportFailed, match=r"no answer in 0.01 s.*RLHF_EXPORT_SECONDS=<seconds>"):
        export.in_own_process(asked)
    for text in ("soon", "nan", "-1", "1e9"):
        monkeypatch.setenv("RLHF_EXPORT_SECONDS", text)
        with pytest.raises(ConfigError, match=f"RLHF_EXPORT_SECONDS = '{text}': is no time"):
            export.in_own_process(asked)


def test_this_project_can_not_be_imported(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [export_check.Refused(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "rlhf.plain_text")
    with pytest.raises(ImportError, match="no part of an export"):
        __import__("rlhf.plain_text")


@pytest.mark.parametrize(
    ("sft", "told"),
    [
        ({"base_model": None}, ("", False, None, True)),
        ({"base_model": "a local model of type llama"},
         ("a local model of type llama", False, None, False)),
        ({"base_model": "HuggingFaceTB/SmolLM2-135M@main"},
         ("HuggingFaceTB/SmolLM2-135M@main", True, None, False)),
        ({"base_model": "s3://models/base"}, ("s3://models/base", False, None, False)),
        ({}, ("", False, None, False)),  # of an earlier version, or pushed: nothing is claimed
    ],
)  # fmt: skip
def test_the_card_names_the_base_that_sft_noted(tmp_path, sft, told):
    """A local base was called 'from scratch', and its licence 'the owner decides'."""
    (tmp_path / "files").mkdir()
    store = open_store(str(tmp_path / "store"), cache_dir=tmp_path / "cache")

    def publish(name: str, metrics: dict, **parents):
        (tmp_path / "files" / "a.txt").write_text(name)
        producer = Producer(stage=name, code_version="1", config={}, seed=0, versions={})
        return store.publish(
            tmp_path / "files", "policy", parents=parents, producer=producer, metrics=metrics
        )

    first = publish("train-sft", sft)
    facts = facts_of(publish("train-policy", {}, sft=first), store, None)
    assert (facts.base, facts.base_is_on_hub, facts.licence, facts.from_scratch) == told
    said = "\n".join(map(str, [*_origin(facts), _licence(facts)]))
    assert ("from scratch" in said) == told[3]
    assert ("Not known here" in said) == (not told[3] and told[2] is None)
    # A policy that started from the first is named by the first one's base, if that is known.
    artifact = f"artifact:{first.digest}"
    second = publish("train-sft", {"base_model": artifact}, base=first)
    facts = facts_of(publish("train-policy", {}, sft=second), store, None)
    assert facts.base == (told[0] or artifact)
    assert not facts.from_scratch


def test_a_rule_that_was_skipped_is_not_met_in_the_card():
    for note, passed, told in (
        ("not measured", True, "not measured"), ("not measured: no slice", True, "not measured"),
        ("not judged: 3 prompts", True, "not judged"), ("", True, "yes"),
        ("not measured", False, "NO"), ("", False, "NO"),
    ):  # fmt: skip
        assert _met(Check("sampled.judge_win_rate", None, "≥ 0.5", passed, note=note)) == told
