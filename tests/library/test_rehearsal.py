"""Rehearsals: miniatures, comparison with plain transformers, refusals, and when a run does one."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig

from flows import preflight
from rlhf.config import LoraConfig, load_config
from rlhf.data.rows import Pair
from rlhf.errors import ConfigError
from rlhf.files import read_json
from rlhf.modeling.base import load_policy
from rlhf.modeling.exactness import NotExact, check_adapter, check_policy, check_scorer
from rlhf.modeling.frozen import store_frozen
from rlhf.modeling.headers import SINGLE, look_untrained
from rlhf.modeling.miniature import MAX_PARAMETERS, miniature
from rlhf.modeling.reward import Scorer
from rlhf.modeling.source import ExternalModel
from rlhf.rehearsal import RehearsalFailed, _changes, rehearse
from rlhf.rehearsal_rows import Sample
from rlhf.store.manifest import Producer
from tasks.rehearsal import _key, _local_bases
from tasks.runner import producer, run_stage
from tasks.stage import store_of
from tasks.stages import TRAIN_REWARD_MODEL, TRAIN_SFT
from tests.library import toys

#: Real sizes of families whose layers differ from one another.
REAL = {
    "llama": {"hidden_size": 4096, "num_hidden_layers": 32, "num_key_value_heads": 8},
    "gemma3_text": {},
    "gemma4_text": {},
    "deepseek_v3": {},
    "qwen3_5_text": {},
    "jamba": {},
    "zamba": {},
    "gpt_oss": {},
    "bloom": {"hidden_size": 4096, "n_layer": 30, "n_head": 32},
    "phi3": {
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0 + i / 48 for i in range(48)],
            "long_factor": [1.0 + i for i in range(48)],
        },
    },
}


@pytest.mark.parametrize("family", REAL)
def test_a_miniature_is_small_and_has_every_type_of_layer(family):
    config = AutoConfig.for_model(family, **REAL[family])
    before = config.to_dict()
    model = miniature(config, AutoModelForCausalLM)
    assert config.to_dict() == before
    assert model.num_parameters() < MAX_PARAMETERS
    text = model.config.get_text_config()
    assert text.vocab_size == config.get_text_config().vocab_size
    assert type(model).__name__ == AutoModelForCausalLM._model_mapping[type(config)].__name__
    types = getattr(config.get_text_config(), "layer_types", None)
    if types:
        assert set(text.layer_types) == set(types)
        # Blocks that share weights: with one alone nothing would be shared.
        assert text.layer_types.count("hybrid") >= min(2, types.count("hybrid"))
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.std() > 0:
            assert parameter.std() > 0.5 * parameter.shape[-1] ** -0.5  # attention is not uniform


@pytest.fixture
def configured(tmp_path):
    """Makes a configuration that starts from a folder."""

    def make(base: Path, *overrides: str):
        return load_config(
            None,
            [
                f"--base.path={base}", "--data.source=none.jsonl", "--sft.max_length=48",
                "--reward_model.max_length=48", "--ppo.max_new_tokens=6", "--ppo.top_k=0",
                f"--store={tmp_path / 'store'}", f"--runtime.work_dir={tmp_path / 'work'}",
                "--runtime.threads=1", *overrides,
            ],
        ).config  # fmt: skip

    return make


@pytest.fixture
def run(tmp_path, configured):
    """Rehearses a configuration with a few rows."""

    def go(base: Path, *overrides: str):
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        pairs = [Pair("tea or cup?", "good", "bad"), Pair("x" * 1000, "good", "bad")]
        return rehearse(configured(base, *overrides), base, Sample([], pairs, []), scratch)

    return go


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("--sft.lora.r=2", "--reward_model.lora.r=2", "--ppo.lora.r=2", "--ppo.shared_base=true",
         "--ppo.critic=adapter"),
        ("--sft.lora.r=2", "--reward_model.lora.r=2", "--ppo.lora.r=2", "--ppo.shared_base=true",
         "--sft.frozen_dtype=nf4", "--reward_model.frozen_dtype=nf4", "--ppo.frozen_dtype=nf4",
         "--runtime.device=cpu", "--reward_model.members=2"),
        ("--ppo.critic=head", "--ppo.env_type=preference_comparison", "--reward_model.pooling=sum",
         "--reward_model.members=3"),
        ("--ppo.reward_fn=custom", "--ppo.custom.function=nowhere:nothing"),
    ],
    ids=["full", "lora", "qlora", "comparison", "custom"],
)  # fmt: skip
def test_it_rehearses_what_is_configured(toy, run, overrides):
    if "--ppo.frozen_dtype=nf4" in overrides:
        pytest.importorskip("bitsandbytes")
    assert run(toy("fresh"), *overrides) == []


def test_it_logs_nothing_not_even_to_loggers_with_a_level(toy, run):
    """A run's display listens to PPO's samples; those of a miniature are noise."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(f"{record.name}: {record.getMessage()}")
    names = ("rlhf", "rlhf.samples", "rlhf.ppo", "rlhf.sft")
    for name in names:
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.DEBUG)
    try:
        run(toy("fresh"))
        assert heard == []
        assert {logging.getLogger(name).level for name in names} == {logging.DEBUG}
        logging.getLogger("rlhf.samples").info("one")
        assert heard[0] == "rlhf.samples: one"
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)
            logging.getLogger(name).setLevel(logging.NOTSET)


def test_first_rows_of_one_prompt_are_no_reason_to_refuse_members(toy, configured, tmp_path):
    """Data are often ordered by prompt; members need two."""
    base, pairs = toy("fresh"), [Pair("tea or cup?", "good", f"bad {i}") for i in range(9)]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    config = configured(base, "--reward_model.members=2", "--judge.enabled=false")
    assert rehearse(config, base, Sample([], pairs, []), scratch) == []


def test_what_the_base_says_of_generation_is_rehearsed(toy, tmp_path, run):
    base = Path(shutil.copytree(toy("fresh"), tmp_path / "base"))
    path = base / "generation_config.json"
    values = json.loads(path.read_text()) | {"cache_implementation": "quantized"}
    path.write_text(json.dumps(values))
    with pytest.raises(
        RehearsalFailed, match=r"generate fails: ImportError: .*quanto.*; remove what it names"
    ):
        run(base)


def test_only_fields_that_training_may_change_may_differ_at_any_depth():
    before = {"a": 1, "text_config": {"eos_token_id": 1, "pad_token_id": 0, "layers": 2}}
    after = {"a": 1, "text_config": {"eos_token_id": 106, "pad_token_id": 3, "layers": 2}}
    assert [*_changes(before, after)] == []
    after["text_config"]["layers"] = 3
    assert [*_changes(before, after)] == [("text_config.layers", 2, 3)]


def test_another_reward_base_under_the_same_path_is_another_rehearsal(toy, tmp_path, configured):
    base = Path(shutil.copytree(toy("fresh"), tmp_path / "reward-base"))
    config = configured(toy("fresh"), f"--reward_model.base={base}")
    producer = Producer(stage="train-sft", code_version="1", config={}, seed=0, versions={})
    keys = [_key(config, producer, _local_bases(config))]
    path = base / "config.json"
    path.write_text(path.read_text() + "\n")
    keys.append(_key(config, producer, _local_bases(config)))
    assert keys[0] != keys[1]


def test_a_base_of_few_positions_is_named(toy, tmp_path, run):
    base = Path(shutil.copytree(toy("fresh"), tmp_path / "base"))
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 8}))
    message = r"base\.path = .*: it reads at most 8 tokens, and beside ppo\.max_new_tokens = 6 no"
    with pytest.raises(ConfigError, match=message):
        run(base)


def test_it_refuses_a_model_that_sees_the_future(toy, tmp_path, run):
    base = tmp_path / "bert"
    tokenizer = AutoTokenizer.from_pretrained(toy("fresh"))
    tokenizer.save_pretrained(base)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    with pytest.raises(RehearsalFailed, match="no causal language model") as refused:
        run(base)
    assert str(refused.value).startswith(f"base.path = {str(base)!r}: rehearsed in small, ")
    assert "\n" not in str(refused.value)


def test_it_refuses_a_later_stage_that_will_fail_before_any_training(toy, run):
    with pytest.raises(RehearsalFailed, match=r"PPO fails: ppo.lora.target_modules = 'w_q'"):
        run(toy("fresh"), "--ppo.lora.target_modules=w_q")


def test_it_refuses_4_bits_where_there_is_no_gpu(toy, run):
    with pytest.raises(RehearsalFailed, match=r"SFT fails: sft\.frozen_dtype = 'nf4' needs a GPU"):
        run(toy("fresh"), "--sft.lora.r=2", "--sft.frozen_dtype=nf4")


def test_it_refuses_a_class_that_is_no_language_model(toy, tmp_path, run):
    base = tmp_path / "vision"
    AutoTokenizer.from_pretrained(toy("fresh")).save_pretrained(base)
    (base / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(RehearsalFailed, match="no language model for 'vit'; give a text model"):
        run(base)


def test_a_decoder_that_forgets_and_scores_that_mix_rows_are_found(toy):
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [6, 5]]
    tokenizer = AutoTokenizer.from_pretrained(toy("sft"))
    policy = load_policy(toy("sft")).eval()
    check_policy(policy, prompts, tokenizer)
    scorer = Scorer(toy("reward"), torch.device("cpu"), 48)
    check_scorer(scorer, prompts)
    # A part of the model that looks at the whole batch.
    for model in (policy, scorer.model):
        norm = model.model.norm
        norm.register_forward_hook(lambda _m, _i, out: out - out.mean((0, 1)))
    with pytest.raises(NotExact, match="apart"):
        check_policy(policy, prompts, tokenizer)
    with pytest.raises(NotExact, match=r"rewards: .* apart"):
        check_scorer(scorer, prompts)


@pytest.mark.parametrize("dtype", ["float32", "nf4"])
def test_an_adapter_that_a_layer_does_not_see_is_found(toy, dtype):
    """In 4 bits it is compared with what these stand for, not with what was rounded to them."""
    if dtype == "nf4":
        pytest.importorskip("bitsandbytes")
    rows = [[5, 6, 7], [8, 9, 10, 11]]
    lora = LoraConfig(r=2)

    def loaded():
        policy = load_policy(toy("sft")).eval()
        store_frozen(policy, dtype, torch.device("cpu"), "ppo")
        return policy

    check_adapter(loaded(), lora, "ppo", rows)
    policy = loaded()
    # As kernels do: the weights are read past the layer, and so past its adapter.
    projection = policy.model.layers[0].mlp.down_proj
    policy.model.layers[0].mlp.forward = lambda x: torch.nn.functional.linear(
        x[..., :1].expand(*x.shape[:-1], projection.in_features), projection.weight
    )
    with pytest.raises(NotExact, match=r"ppo\.lora: logits: .* merged; choose") as found:
        check_adapter(policy, lora, "ppo", rows)
    assert str(found.value).endswith("target_modules without down_proj, gate_proj, up_proj")


@pytest.fixture
def command(toy, tmp_path, capsys):
    """Runs `rlhf preflight` on a small preset."""

    def go(*overrides: str) -> str:
        rows = [{"prompt": f"tea {i}?", "chosen": "good", "rejected": "bad"} for i in range(8)]
        source = tmp_path / "pairs.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree = {
            "store": str(tmp_path / "store"), "base": {"path": str(toy("fresh"))},
            "data": {"source": str(source)}, "tracking": {"trackers": []},
            "sft": {"max_length": 48}, "reward_model": {"max_length": 48},
            "ppo": {"max_new_tokens": 6, "top_k": 0},
            "runtime": {"work_dir": str(tmp_path / "work"),
                        "report_dir": str(tmp_path / "reports"), "threads": 1},
        }  # fmt: skip
        preset = tmp_path / "preset.yaml"
        preset.write_text(json.dumps(tree))
        preflight.preflight(preset, *overrides)
        return capsys.readouterr().out

    return go


def test_the_command_rehearses_once(command, tmp_path):
    assert "rehearsed in small" in command()
    records = {p: p.stat().st_mtime_ns for p in (tmp_path / "work" / "rehearsals").iterdir()}
    assert len(records) == 2
    assert "rehearsed in small" in command("--runtime.threads=2", "--gates.policy=none")
    assert set(records) == {*(tmp_path / "work" / "rehearsals").iterdir()}
    with pytest.raises(RehearsalFailed):  # another configuration is rehearsed anew
        command("--sft.lora.target_modules=nothing")
    assert not [*(tmp_path / "work").glob("rehearsal-*")]
    assert "not rehearsed" in command("--base.path=none")


def test_an_untrained_base_is_named_each_time_and_one_changed_norm_is_trust(
    toy, tmp_path, command, caplog
):
    base = Path(shutil.copytree(toy("fresh"), tmp_path / "base"))
    for _ in range(2):  # the second time nothing is rehearsed
        caplog.clear()
        command(f"--base.path={base}")
        assert f"base.path = {str(base)!r}: its weights look untrained" in caplog.text
    assert look_untrained(base)
    weights = load_file(base / SINGLE)
    weights["model.norm.weight"][0] += 0.01
    save_file(weights, base / SINGLE, {"format": "pt"})
    assert not look_untrained(base)
    # Nothing is known of a model without a vector.
    save_file({"w": torch.ones(2, 2), "scale": torch.ones(1)}, base / SINGLE, {"format": "pt"})
    assert not look_untrained(base)


def test_a_run_rehearses_before_its_first_training_stage(toy, tmp_path, configured):
    config = configured(toy("fresh"), "--ppo.lora.target_modules=w_q")
    folder = toys.write_data(tmp_path / "data")
    made = producer("prepare-data", {}, 0)
    data = store_of(config).publish(folder, "dataset", parents={}, producer=made, metrics={})
    with pytest.raises(RehearsalFailed, match=r"ppo\.lora\.target_modules"):
        run_stage(TRAIN_SFT, config, {"data": data})
    steps: list[int] = []
    config = configured(toy("fresh"))
    sft = run_stage(TRAIN_SFT, config, {"data": data}, lambda step, *_: steps.append(step))
    assert steps[0] == 1  # no step of the rehearsal is reported
    records = {*(tmp_path / "work" / "rehearsals").iterdir()}
    run_stage(TRAIN_REWARD_MODEL, config, {"data": data, "sft": sft.ref})
    assert records == {*(tmp_path / "work" / "rehearsals").iterdir()}


def test_the_judges_base_is_rehearsed_too(toy, tmp_path, configured):
    base, other = toy("fresh"), Path(shutil.copytree(toy("sft"), tmp_path / "other"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    external = ExternalModel("judge.base", str(other))
    sample = Sample([], [Pair("tea or cup?", "good", "bad")], [])
    config = configured(base, f"--judge.base={other}")
    assert rehearse(config, base, sample, scratch, judge_base=(external, other)) == []
    assert read_json(scratch / "judge" / "judge.json")["usable"]
    assert "judge_win_rate" in read_json(scratch / "evaluation" / "evaluation.json")["sampled"]


def test_a_judge_that_fails_is_named(toy, tmp_path, configured):
    base, other = toy("fresh"), Path(shutil.copytree(toy("sft"), tmp_path / "other"))
    tokenizer = other / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"chat_template": "{{ x("}))
    (other / "chat_template.jinja").unlink(missing_ok=True)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    external = ExternalModel("judge.base", str(other))
    sample = Sample([], [Pair("tea or cup?", "good", "bad")], [])
    config = configured(base, f"--judge.base={other}")
    with pytest.raises(RehearsalFailed, match=r"^judge\.base = .*the judge fails: "):
        rehearse(config, base, sample, scratch, judge_base=(external, other))


def test_without_a_judge_none_is_rehearsed(toy, tmp_path, configured):
    base, scratch = toy("fresh"), tmp_path / "scratch"
    scratch.mkdir()
    sample = Sample([], [Pair("tea or cup?", "good", "bad")], [])
    assert rehearse(configured(base, "--judge.enabled=false"), base, sample, scratch) == []
    assert not (scratch / "judge").exists()
