"""Conversion of real argument sets of AITraining and TRL, and of hostile ones."""

from __future__ import annotations

import json
import random
import shlex
from datetime import date
from pathlib import Path

import pytest
import yaml

from rlhf.config import load_config
from rlhf.errors import ConfigError
from rlhf.migration.migrate import TOOLS, Migration, described, migrate
from rlhf.migration.names import AITRAINING, ORDERS, tables
from rlhf.migration.read import read_arguments
from rlhf.migration.secrets import is_secret_name

#: The command of TRL's examples/scripts/ppo/ppo.py, as its docstring has it, with a launcher's
#: number of processes.
TRL_PPO = """
accelerate launch --config_file examples/accelerate_configs/deepspeed_zero3.yaml \\
    --num_processes 4 \\
    examples/scripts/ppo/ppo.py \\
    --dataset_name trl-internal-testing/descriptiveness-sentiment-trl-style \\
    --dataset_train_split descriptiveness \\
    --output_dir pythia-1b-deduped-descriptiveness-sentiment-trl-style-ppo \\
    --num_ppo_epochs 1 \\
    --num_mini_batches 2 \\
    --learning_rate 3e-6 \\
    --per_device_train_batch_size 1 \\
    --gradient_accumulation_steps 16 \\
    --total_episodes 10000 \\
    --model_name_or_path EleutherAI/pythia-1b-deduped \\
    --sft_model_path EleutherAI/pythia-1b-deduped \\
    --reward_model_path EleutherAI/pythia-1b-deduped \\
    --local_rollout_forward_batch_size 1 \\
    --missing_eos_penalty 1.0
"""
AITRAINING_PPO = (
    "aitraining llm --train --trainer ppo --model google/gemma-3-270m --project-name ppo_run "
    "--data-path prompts.jsonl --text-column question --rl-reward-model-path ./my-reward "
    "--rl-kl-coef 0.2 --rl-max-new-tokens 64 --rl-temperature 0.8 --lr 1e-6 --batch-size 4"
)
#: The form of the older configuration files (`autotrain --config`).
AITRAINING_REWARD = {
    "task": "llm-reward",
    "base_model": "acme/base",
    "project_name": "my_reward",
    "log": "tensorboard",
    "backend": "local",
    "data": {
        "path": "acme/pairs", "train_split": "train", "valid_split": None,
        "chat_template": "chatml",
        "column_mapping": {"text_column": "good", "rejected_text_column": "bad"},
    },
    "params": {
        "lr": "2e-5", "epochs": 2, "batch_size": 4, "gradient_accumulation": 8, "peft": True,
        "lora_r": 8, "quantization": "int4", "block_size": 512,
    },
    "hub": {"username": "${HF_USERNAME}", "token": "${HF_TOKEN}", "push_to_hub": True},
}  # fmt: skip


def of_words(command: str, **options) -> Migration:
    return migrate(read_arguments(command.replace("\\\n", " ").split(), **options))


def of_file(folder: Path, name: str, content: object, **options) -> Migration:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return migrate(read_arguments([str(path)], **options))


def loaded(result: Migration, folder: Path):
    """Load what is written as `rlhf config show` does."""
    path = folder / "ours.yaml"
    path.write_text(result.text("old.yaml"), encoding="utf-8")
    config = load_config(path).config
    assert config == result.config
    return config


def fates(result: Migration) -> dict[str, str]:
    return {finding.name: finding.fate for finding in result.findings}


def test_trls_own_ppo_command(tmp_path):
    result = of_words(TRL_PPO)
    config = loaded(result, tmp_path)
    ppo = config.ppo
    # 4 processes × 16 × 1 replies; two mini-batches of them.
    assert (ppo.chunk_size, ppo.mini_batch_size, ppo.micro_batch_size) == (64, 32, 1)
    assert (ppo.total_episodes, ppo.processes, ppo.rollout_batch_size) == (10_000, 4, 1)
    assert (ppo.learning_rate, ppo.num_ppo_epochs, ppo.missing_eos_penalty) == (3e-6, 1, 1.0)
    # What TRL does unless it is told otherwise.
    assert (ppo.compat, ppo.temperature, ppo.max_new_tokens, ppo.kl_coef) == ("trl", 0.7, 53, 0.05)
    assert (ppo.score_position, ppo.critic_learning_rate, ppo.top_k) == ("past_end", None, 0)
    assert config.base.path == ppo.reward_model_path == "EleutherAI/pythia-1b-deduped"
    assert not config.sft.enabled
    [prompts] = config.data.prompts_source
    assert prompts.source == "trl-internal-testing/descriptiveness-sentiment-trl-style"
    assert prompts.hub_split == "descriptiveness"
    told = fates(result)
    assert told["num_mini_batches"] == "broken"
    assert told["per_device_train_batch_size"] == "changed"
    assert told["learning_rate"] == "same"
    assert told["output_dir"] == told["config_file"] == told["model_name_or_path"] == "none"
    assert any("placeholder" in note for note in result.notes)


def test_a_command_of_aitraining(tmp_path):
    result = of_words(AITRAINING_PPO)
    config = loaded(result, tmp_path)
    assert (config.name, config.base.path, config.sft.enabled) == (
        "ppo-run", "google/gemma-3-270m", False,
    )  # fmt: skip
    assert config.data.prompts_source[0].prompt_column == "question"
    ppo = config.ppo
    # Four rows, accumulated four times: the real size of an update there.
    assert (ppo.chunk_size, ppo.mini_batch_size, ppo.micro_batch_size) == (16, 16, 4)
    assert (ppo.kl_coef, ppo.max_new_tokens, ppo.temperature) == (0.2, 64, 0.8)
    assert (ppo.critic, ppo.gamma) == ("policy", 0.99)
    told = fates(result)
    assert told["rl_kl_coef"] == told["lr"] == "same"
    assert told["rl_max_new_tokens"] == told["rl_temperature"] == "broken"
    text = next(f.text for f in result.findings if f.name == "rl_temperature")
    assert "generation_kwargs" in text
    assert "0.7" in text


def test_the_older_form_of_aitrainings_files(tmp_path):
    result = of_file(tmp_path, "reward.yaml", AITRAINING_REWARD)
    config = loaded(result, tmp_path)
    assert (config.base.path, config.data.source) == ("acme/base", "acme/pairs")
    assert (config.data.chosen_column, config.data.rejected_column) == ("good", "bad")
    section = config.reward_model
    assert (section.batch_size, section.micro_batch_size, section.epochs) == (32, 4, 2.0)
    assert (section.learning_rate, section.max_length, section.frozen_dtype) == (2e-5, 512, "nf4")
    assert section.lora is not None
    assert (section.lora.r, section.lora.alpha, section.lora.dropout) == (8, 32.0, 0.05)
    # The old tool's defaults, which were not touched.
    assert (section.warmup_ratio, section.lr_scheduler) == (0.1, "linear")
    assert config.tracking.trackers == ("tensorboard",)


def test_three_trainings_are_one_configuration(tmp_path):
    sft = {"model_name_or_path": "acme/base", "dataset_name": "acme/demos", "packing": True,
           "num_train_epochs": 2}  # fmt: skip
    reward = {"model_name_or_path": "acme/base", "dataset_name": "acme/pairs",
              "center_rewards_coefficient": 0.01}  # fmt: skip
    ppo = {"sft_model_path": "./sft-out", "reward_model_path": "./reward-out", "kl_coef": 0.1}
    files = {"sft": sft, "reward": reward, "ppo": ppo}
    for name, tree in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    result = migrate(read_arguments([str(tmp_path / f"{name}.yaml") for name in files]))
    config = loaded(result, tmp_path)
    assert (config.base.path, config.sft.enabled, config.sft.epochs) == ("acme/base", True, 2.0)
    assert config.ppo.reward_model_path is None
    assert config.ppo.kl_coef == 0.1
    assert config.data.source == "acme/pairs"
    assert config.data.sft_source[0].source == "acme/demos"
    assert fates(result)["reward_model_path"] == "none"


def test_a_reward_model_of_another_base_keeps_it(tmp_path):
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump(AITRAINING_REWARD))
    (tmp_path / "ppo.sh").write_text(AITRAINING_PPO)
    found = read_arguments([str(tmp_path / "reward.yaml"), str(tmp_path / "ppo.sh")])
    config = loaded(migrate(found), tmp_path)
    assert config.base.path == "google/gemma-3-270m"
    assert config.reward_model.base == "acme/base"


def test_arguments_of_trl_up_to_0_11(tmp_path):
    result = of_file(
        tmp_path,
        "old.py",
        "from trl import PPOConfig\n"
        "BATCH = 32\n"
        "config = PPOConfig(model_name='gpt2', learning_rate=1.41e-5, batch_size=BATCH,\n"
        "    mini_batch_size=4, gradient_accumulation_steps=2, ppo_epochs=3, adap_kl_ctrl=True,\n"
        "    init_kl_coef=0.3, target=5, kl_penalty='mse', use_score_scaling=True,\n"
        "    early_stopping=True, target_kl=0.2, log_with='wandb')\n",
    )
    ppo = loaded(result, tmp_path).ppo
    assert (ppo.chunk_size, ppo.mini_batch_size, ppo.micro_batch_size) == (32, 8, 4)
    assert (ppo.kl_controller, ppo.kl_coef, ppo.kl_target, ppo.kl_estimator) == (
        "adaptive", 0.3, 5.0, "k2",
    )  # fmt: skip
    assert (ppo.num_ppo_epochs, ppo.critic, ppo.reward_normalization) == (3, "head", "running")
    assert (ppo.compat, ppo.max_grad_norm, ppo.target_kl) == (None, None, None)
    assert fates(result)["target_kl"] == "none"


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("LoraConfig()", (8, 8, 0.0)),
        ("LoraConfig(lora_alpha=16)", (8, 16, 0.0)),
        ("LoraConfig(r=16)", (16, 8, 0.0)),
        ("LoraConfig(r=RANK, lora_dropout=0.1)", (8, 8, 0.1)),
    ],
)
def test_adapters_of_peft_have_its_defaults(tmp_path, call, expected):
    source = f"args = SFTConfig(learning_rate=1e-4)\npeft_config = {call}\n"
    result = of_file(tmp_path, "sft.py", source)
    lora = loaded(result, tmp_path).sft.lora
    assert lora is not None
    assert (lora.r, lora.alpha, lora.dropout) == expected
    assert fates(result)["target_modules"] == "changed"
    if call == "LoraConfig()":
        named = source.replace(call, "LoraConfig(target_modules='all-linear')")
        assert fates(of_file(tmp_path, "named.py", named))["target_modules"] == "same"


@pytest.mark.parametrize("task", ["llm:reward", "llm-reward", "lm_training:reward"])
def test_a_task_names_the_trainer(tmp_path, task):
    tree = {"task": task, "base_model": "a/b", "params": {"lr": 1e-5}, "data": {"path": "d"}}
    config = loaded(of_file(tmp_path, "old.yaml", tree), tmp_path)
    assert (config.reward_model.learning_rate, config.data.source) == (1e-5, "d")


@pytest.mark.parametrize(
    ("tree", "expected", "fate"),
    [
        ({"penalty_reward_value": -2}, None, "broken"),
        ({"penalty_reward_value": -2, "non_eos_penalty": False}, None, "broken"),
        ({"penalty_reward_value": -2, "non_eos_penalty": True}, 2.0, "changed"),
        ({"non_eos_penalty": True}, 1.0, None),
    ],
)
def test_the_penalty_of_old_replies_needs_its_switch(tmp_path, tree, expected, fate):
    result = of_file(tmp_path, "ppo.yaml", {"kl_coef": 0.1, **tree})
    ppo = loaded(result, tmp_path).ppo
    assert fates(result).get("penalty_reward_value") == fate
    if expected is None:
        assert "ppo.missing_eos_penalty" not in result.choices
    else:
        assert (ppo.missing_eos, ppo.missing_eos_penalty) == ("replace", expected)


@pytest.mark.parametrize("warmup", [{"warmup_ratio": 0.1}, {"warmup_steps": 100}])
@pytest.mark.parametrize("trainer", ["sft", "ppo"])
def test_a_constant_schedule_had_no_warm_up(tmp_path, trainer, warmup):
    tree = {"lr_scheduler_type": "constant", "total_episodes": 1000, **warmup}
    if trainer == "sft":
        del tree["total_episodes"]
    result = of_file(tmp_path, "old.yaml", tree, trainer=trainer)
    config = loaded(result, tmp_path)
    assert (config.sft.warmup_ratio if trainer == "sft" else config.ppo.lr_warmup_updates) == 0
    assert fates(result)[next(iter(warmup))] == "broken"
    kept = {"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.1}
    assert (
        loaded(of_file(tmp_path, "k.yaml", kept, trainer="sft"), tmp_path).sft.warmup_ratio == 0.1
    )


def test_a_hub_dataset_whose_name_has_a_dot_keeps_its_config(tmp_path):
    tree = {"dataset_name": "org/data-v1.1", "dataset_config": "harmless", "packing": True}
    config = loaded(of_file(tmp_path, "hub.yaml", tree), tmp_path)
    assert config.data.sft_source[0].source == "org/data-v1.1:harmless"
    for name in ({"dataset_name": "talks.jsonl"}, {"dataset_name": None}):
        assert fates(of_file(tmp_path, "x.yaml", {**tree, **name}))["dataset_config"] == "none"


def test_trackers_that_are_unknown_are_told(tmp_path):
    result = of_file(tmp_path, "t.yaml", {"kl_coef": 0.1, "report_to": ["wandb", "comet_ml"]})
    assert loaded(result, tmp_path).tracking.trackers == ("wandb",)
    assert any(described(f).startswith("report_to = comet_ml: no tracker") for f in result.findings)


@pytest.mark.parametrize(
    "launcher",
    ["accelerate launch --config_file a.yaml", "torchrun --nproc_per_node gpu",
     "torchrun --nproc_per_node $N", "accelerate launch"],
)  # fmt: skip
def test_an_unknown_number_of_processes_is_told(launcher):
    result = of_words(f"{launcher} sft.py --packing --per_device_train_batch_size 4")
    assert any("counted for one process" in note for note in result.notes)
    for launch in ("torchrun --nproc_per_node 2", "accelerate launch --num_processes 2", "python"):
        known = of_words(f"{launch} sft.py --packing")
        assert not any("one process" in note for note in known.notes)


def test_environments_of_aitraining(tmp_path):
    env = {
        "reward_components": {
            "short": {"type": "length"},
            "polite": {"type": "keyword", "keywords": ["please", "thanks"]},
            "repetition": {},
        },
        "reward_weights": {"short": 0.1, "polite": 2, "repetition": 1},
    }
    result = of_file(
        tmp_path,
        "ppo.json",
        json.dumps({"trainer": "ppo", "rl_env_type": "multi_objective", "model": "gpt2",
                    "rl_env_config": json.dumps(env)}),
    )  # fmt: skip
    components = loaded(result, tmp_path).ppo.components
    assert {name: c.weight for name, c in components.items()} == env["reward_weights"]
    # There the number of words over 100.
    assert components["short"].points == ((0.0, 0.0), (100.0, 1.0))
    assert fates(result)["rl_env_type"] == "broken"


def test_a_file_with_all_defaults_says_only_what_differs(tmp_path):
    params = {name: entry.was for name, entry in tables("aitraining")["LLMTrainingParams"].items()}
    params |= {"trainer": "sft", "model": "gpt2", "lr": 1e-4, "data_path": "talks.jsonl"}
    result = of_file(tmp_path, "training_params.json", json.dumps(params))
    assert [f.name for f in result.findings] == ["model", "data_path", "lr"]
    assert result.silent == len(params) - 3
    assert loaded(result, tmp_path).sft.learning_rate == 1e-4


def test_defaults_in_a_file_with_all_of_them_count_as_not_given(tmp_path):
    params = {name: entry.was for name, entry in tables("aitraining")["LLMTrainingParams"].items()}
    params |= {"trainer": "sft", "model": "gpt2", "data_path": "talks.jsonl", "peft": True}
    config = loaded(of_file(tmp_path, "all.json", json.dumps(params)), tmp_path)
    assert config.sft.lora is not None
    assert (config.sft.lora.r, config.sft.lora.alpha, config.sft.lora.dropout) == (16, 32, 0.05)
    # Two rows, accumulated four times.
    assert (config.sft.batch_size, config.sft.micro_batch_size) == (8, 2)
    params |= {"trainer": "ppo", "rl_reward_model_path": "reward"}
    ppo = loaded(of_file(tmp_path, "ppo.json", json.dumps(params)), tmp_path).ppo
    assert ppo.lora is not None
    assert ppo.lr_final_fraction == 0.0
    params |= {"trainer": "sft", "lora_r": 64, "model": "google/gemma-3-270m"}
    config = loaded(of_file(tmp_path, "r.json", json.dumps(params)), tmp_path)
    assert config.base.path == "google/gemma-3-270m"
    assert config.sft.lora is not None
    assert (config.sft.lora.r, config.sft.lora.dropout) == (64, 0.05)
    # A rank that is refused doesn't make a training of all weights.
    refused = of_file(tmp_path, "zero.yaml", {"trainer": "sft", "peft": True, "lora_r": 0,
                                              "lora_dropout": 3, "lr": 1e-5})  # fmt: skip
    assert loaded(refused, tmp_path).sft.lora is not None


@pytest.mark.parametrize(
    ("tree", "refused"),
    [
        ({"kl_coef": -1, "total_episodes": 100}, "kl_coef = -1: must be at least 0"),
        ({"kl_coef": 0.1, "num_mini_batches": 2, "cliprange": 3}, "cliprange = 3: ppo.clip_range"),
        ({"kl_coef": "much"}, "must be a number"),
        ({"kl_coef": 0.1, "gamma": "nan"}, "must be"),
    ],
)
def test_a_value_out_of_bounds_is_left_out_and_named(tmp_path, tree, refused):
    result = of_file(tmp_path, "ppo.yaml", {"sft_model_path": "gpt2", **tree})
    loaded(result, tmp_path)
    [line] = [described(finding) for finding in result.findings if finding.fate == "refused"]
    assert refused.partition(": ")[2] in line
    assert line.startswith(refused.partition(" ")[0] if " = " in refused else "")


def test_no_argument_is_dropped_without_a_word(tmp_path):
    """Any arguments of either tool, with any values: each is told, and the file loads."""
    values = [0, 1, 2.5, -1, True, False, "text", "8", "none", [1], {"a": 1}, "", "x,y", "bf16",
              10**300, date(2026, 1, 1), [date(2026, 1, 1)], {1: [2]}]  # fmt: skip
    for seed in range(30):
        rng = random.Random(seed)
        kind = rng.choice(["ppo", "reward_model", "sft", "aitraining"])
        groups = AITRAINING if kind == "aitraining" else ORDERS[kind]
        tool = "aitraining" if kind == "aitraining" else "trl"
        names = [name for group in groups for name in tables(tool)[group]]
        tree = {name: rng.choice(values) for name in rng.sample(names, 25)}
        if kind == "aitraining":
            tree |= {"trainer": rng.choice(["sft", "reward", "ppo"]), "lr": 1e-5}
            tree.pop("task", None)
        trainer = {"aitraining": None}.get(kind, kind)
        result = of_file(tmp_path, "any.yaml", tree, trainer=trainer)
        loaded(result, tmp_path)
        named = {finding.name for finding in result.findings}
        assert named <= {*tree, *result.choices, *named - {*tree}}
        assert len(named & {*tree}) + result.silent >= len(tree), (seed, tree)


def test_a_misspelt_argument_is_told_with_its_neighbour(tmp_path):
    result = of_words(f"{TRL_PPO} --cliprang 0.3 --zzz 1")
    assert fates(result)["cliprang"] == fates(result)["zzz"] == "unknown"
    lines = [described(finding) for finding in result.findings]
    assert "cliprang = 0.3: did you mean cliprange?" in lines
    assert "# not carried over: zzz = 1: no argument of TRL" in result.text("x")


SECRET, PASSWORD = "hf_abcdefghijklmnop", "open sesame"


@pytest.mark.parametrize(
    "tree",
    [
        {"trainer": "ppo", "token": SECRET, "wandb_token": SECRET, "username": SECRET},
        {"trainer": "ppo", "rl_reward_model_path": SECRET, "my_api_key": SECRET},
        {"kl_coef": 0.1, "hub_token": SECRET, "tracker_kwargs": {"wandb": {"key": SECRET}}},
        {"kl_coef": 0.1, "reward_model_path": f"https://me:{SECRET}@host/x", "run_name": SECRET},
        {"kl_coef": 0.1, "model_init_kwargs": {"token": SECRET}, "dataset_name": ["x", SECRET]},
        {"kl_coef": 0.1, SECRET: 1},
        {
            "kl_coef": 0.1,
            "dataset_name": f"https://me:{PASSWORD[:4]}{SECRET}@host/x.jsonl",
            "dataset_train_split": "train",
            "dataset_config": "x",
        },
        {"kl_coef": 0.1, "dataset_name": "https://host/x.jsonl?sig=open sesame&X-Amz-Date=1"},
        {"kl_coef": 0.1, "sft_model_path": "s3://b/m?X-Amz-Signature=open sesame"},
        {"kl_coef": 0.1, "dataset_name": "https://host/x.jsonl?v=1&token=open sesame"},
        *(
            {"kl_coef": 0.1, name: PASSWORD}
            for name in (
                "new_token",
                "access_tokens",
                "hftoken",
                "db_pwd",
                "bearer",
                "Authorization",
                "access_token",
                "hf-tokens",
                "accessToken",
                "eos_token_secret",
            )
        ),
        *(
            {"kl_coef": 0.1, "run_name": f"{start}{PASSWORD[:4]}1234abcd5678efgh open sesame"}
            for start in ("glpat-", "xoxb-", "sk_live_", "AIza", "wandb_v1_", "ghp_", "hf_")
        ),
        {"kl_coef": 0.1, "zzz": '{"hub": {"token": "open sesame"}}'},
        {"kl_coef": 0.1, "my_api_key": PASSWORD, "db_password": PASSWORD, "token": PASSWORD},
    ],
)
def test_credentials_are_neither_copied_nor_shown(tmp_path, tree):
    result = of_file(tmp_path, "old.yaml", tree)
    shown = [result.text("old.yaml"), *map(described, result.findings), *result.notes]
    shown.append(json.dumps([vars(finding) for finding in result.findings]))
    assert not any(secret in line for line in shown for secret in (SECRET, PASSWORD)), shown


def test_an_option_that_begins_a_line_is_named_without_its_value(tmp_path):
    (tmp_path / "t.sh").write_text(f"python sft.py --seed 1\n\n  --hub_token={SECRET}\n")
    with pytest.raises(ConfigError, match="'--hub_token' begins a line") as raised:
        read_arguments([str(tmp_path / "t.sh")])
    assert SECRET not in str(raised.value)


def test_names_of_tokens_of_texts_are_no_credentials():
    entries = [e for tool in TOOLS for group in tables(tool).values() for e in group.values()]
    marked = {entry.name for entry in entries if is_secret_name(entry.name)}
    assert marked == {entry.name for entry in entries if entry.secret and "token" in entry.name}
    for name in ("eos_token", "pad_token_id", "min_new_tokens", "num_tokens", "tokens_per_second",
                 "dataset_key", "keyword", "author"):  # fmt: skip
        assert not is_secret_name(name), name


def test_a_shell_script_is_read_for_its_command(tmp_path):
    script = f"#!/bin/sh\nexport HF_TOKEN={SECRET}\ncd /x --hard\nHF_HOME=/y {TRL_PPO.strip()}\n"
    result = of_file(tmp_path, "train.sh", script)
    assert result.config.ppo.total_episodes == 10_000
    assert SECRET not in result.text("train.sh")
    several = (
        "pip install --upgrade trl\ntrl sft --packing true --num_train_epochs 2\n"
        "python prepare.py --seed 1\npython ppo.py --kl_coef 0.3\n"
    )
    both = of_file(tmp_path, "both.sh", several)
    assert (both.config.sft.epochs, both.config.ppo.kl_coef) == (2.0, 0.3)
    assert any("another command was left out" in note for note in both.notes)
    variables = of_file(tmp_path, "v.sh", "python ppo.py --kl_coef $KL --total_episodes 64\n")
    assert fates(variables) == {"kl_coef": "computed", "total_episodes": "changed"}


@pytest.mark.parametrize("between", ["&&", ";", "||", "|", "&", "2>&1 | tee log &&", "> log ;"])
def test_commands_of_one_line_are_read_apart(tmp_path, between):
    line = (
        "python sft.py --packing --num_train_epochs 2 --learning_rate 2e-5 "
        f"{between} python reward_modeling.py --learning_rate 3e-5 2>err\n"
    )
    config = loaded(of_file(tmp_path, "two.sh", line), tmp_path)
    assert (config.sft.learning_rate, config.sft.epochs) == (2e-5, 2.0)
    assert (config.reward_model.learning_rate, config.reward_model.epochs) == (3e-5, 3.0)


@pytest.mark.parametrize("text", ['"|"', "'&&'", "\\;", '">"', '"a\\"|b"', "'2>x'"])
def test_a_quoted_operator_is_text(tmp_path, text):
    result = of_file(tmp_path, "q.sh", f"python ppo.py --kl_coef 0.3 --sep {text} --seed 7 | tee\n")
    assert (result.config.ppo.kl_coef, result.config.seed) == (0.3, 7)
    (sep,) = [finding for finding in result.findings if finding.name == "sep"]
    assert sep.value == shlex.split(text)[0]


def test_aitrainings_own_ppo_values_hold_where_none_are_given(tmp_path):
    """train_clm_ppo.py: 2 × 4 rows, and what TRL's PPOConfig has by default."""
    plain = {"trainer": "ppo", "model": "gpt2", "data_path": "d"}
    ppo = of_file(tmp_path, "a.json", json.dumps(plain)).config.ppo
    assert (ppo.chunk_size, ppo.mini_batch_size, ppo.max_new_tokens) == (8, 8, 53)
    assert ppo.temperature == 0.7
    given = {**plain, "rl_max_new_tokens": 64, "rl_temperature": 1.0, "rl_chunk_size": 32}
    ppo = of_file(tmp_path, "b.json", json.dumps(given)).config.ppo
    assert (ppo.chunk_size, ppo.max_new_tokens, ppo.temperature) == (32, 64, 1.0)


def test_redirections_are_no_values(tmp_path):
    quoted = "python ppo.py --kl_coef 0.3 --run_name 'a > b; c' --total_episodes 64 2>&1 | tee x\n"
    result = of_file(tmp_path, "pipe.sh", f"nohup {quoted}")
    assert (result.config.name, result.config.ppo.total_episodes) == ("a-b-c", 64)


def test_an_option_whose_name_begins_with_no_is_not_switched_off(tmp_path):
    result = of_words("python sft.py --packing --no_cuda")
    assert loaded(result, tmp_path).runtime.device == "cpu"
    other = of_words("python ppo.py --kl_coef 0.1 --no_whiten_rewards --no-gradient-checkpointing")
    assert loaded(other, tmp_path).ppo.gradient_checkpointing is False


def test_python_is_read_and_never_run(tmp_path):
    marker = tmp_path / "ran"
    source = (
        f"import os\nopen({str(marker)!r}, 'w')\nN = 3\nfor M in range(2): pass\nLAM = 1\nLAM = 2\n"
        "import trl\nRate = 1e-6\n"
        f"a = trl.PPOConfig(learning_rate=Rate, kl_coef=__import__('os').system('touch "
        f"{marker}') or 0.1, num_ppo_epochs=N, total_episodes=M, lam=LAM, **more)\n"
        "b = RewardConfig(num_train_epochs=1)\n"
    )
    result = of_file(tmp_path, "train.py", source)
    assert not marker.exists()
    assert (result.config.ppo.num_ppo_epochs, result.config.ppo.learning_rate) == (3, 1e-6)
    assert result.config.reward_model.epochs == 1
    told = fates(result)
    assert told["kl_coef"] == told["**"] == told["total_episodes"] == told["lam"] == "computed"


@pytest.mark.parametrize(
    ("source", "unknown"),
    [
        ("if big:\n  a = SFTConfig(learning_rate=1e-3, seed=1, num_train_epochs=9)\n"
         "else:\n  a = SFTConfig(learning_rate=1e-5, seed=1)\n",
         {"learning_rate", "num_train_epochs"}),
        ("a = SFTConfig(learning_rate=1e-3, seed=1)\na.learning_rate = 1e-6\n", {"learning_rate"}),
        ("a = SFTConfig(learning_rate=1e-3, seed=1)\na.learning_rate *= 2\na.weight_decay = 1\n",
         {"learning_rate", "weight_decay"}),
        ("self.a = SFTConfig(learning_rate=1e-3, seed=1)\nsetattr(self.a, 'learning_rate', 1)\n",
         {"learning_rate"}),
        ("a = SFTConfig(learning_rate=1e-3, seed=1)\nb = replace(a, learning_rate=1)\n",
         {"learning_rate"}),
        ("a = SFTConfig(learning_rate=1e-3, seed=1)\nt.args.learning_rate = 2\nt.seed = 3\n",
         {"learning_rate"}),
    ],
)  # fmt: skip
def test_what_python_changes_later_has_no_value(tmp_path, source, unknown):
    result = of_file(tmp_path, "train.py", source)
    told = fates(result)
    assert {name for name, fate in told.items() if fate == "computed"} == unknown
    assert told["seed"] == "same"
    assert loaded(result, tmp_path).sft.learning_rate == 2e-5  # TRL's default


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.yaml", "kl_coef: 1\nkl_coef: 2\n", "stands there twice"),
        ("a.yaml", "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefg", "bcdefgh",
                                                                       strict=True)
        ), "values"),
        ("a.yaml", "kl_coef: &x [*x]\n", "itself"),
        ("a.yaml", "[" * 300 + "]" * 300, "nested"),
        ("a.yaml", "kl_coef: !!python/object/apply:os.system ['touch ran']\n", "can't be read"),
        ("a.yaml", "x" * 300_000, "bytes"),
        ("a.yaml", "- 1\n- 2\n", "holds no arguments"),
        ("a.yaml", "colour: red\n", "no argument of AITraining or TRL"),
        ("a.yaml", "learning_rate: 1\n", "--trainer"),
        ("a.yaml", "kl_coef: 1\npacking: true\n", "several trainers"),
        *(("a.yaml", f"task: {task}\nbase_model: a/b\nparams: {{lr: 1e-5}}\n", f"task = '{task}'")
          for task in ("llm:dpo", "llm-dpo", "seq2seq", "dreambooth")),
        ("a.sh", "aitraining seq2seq --train --lr 1e-5\n", "aitraining seq2seq has no equal"),
        ("a.yaml", "trainer: dpo\ndpo_beta: 0.1\n", "trainer = 'dpo' has no equal"),
        ("a.json", "{", "can't be read"),
        ("a.sh", "python dpo.py --beta 1\n", "dpo has no equal"),
        ("a.sh", "python ppo.py --kl_coef 'x\n", "can't be read"),
        ("a.sh", "python ppo.py\n  --kl_coef 1\n", "with a backslash"),
        ("a.py", "def f(:\n", "is no Python"),
        ("a.py", "(" * 5000 + ")" * 5000, "is no Python"),
        ("a.py", "-" * 100_000 + "1", "nested"),
        ("a.py", "x = 1\n", "calls none of"),
        ("a.py", "PPOConfig(a\0)", "is no Python"),
    ],
)  # fmt: skip
def test_what_can_not_be_read_is_one_line(tmp_path, name, content, error):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError) as raised:
        migrate(read_arguments([str(path)]))
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)
    assert not Path("ran").exists()


def test_binary_and_missing_files_are_one_line(tmp_path):
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)))
    for path, error in [("weights.bin", "UTF-8"), ("nothing.yaml", "no such file"), (".", "file")]:
        with pytest.raises(ConfigError, match=error):
            read_arguments([str(tmp_path / path)])


def test_markup_and_names_can_not_break_out_of_the_file(tmp_path):
    evil = "x\n# [/red]\nstore: s3://evil/bucket\n\x1b[31m"
    weights = {"a: {b": 1, "repetition": 1, "x\nstore: s3://evil/b\ny": 2}
    tree = {
        "trainer": "ppo", "model": evil, "data_path": evil, evil: evil, "rl_kl_coef": 0.1,
        "rl_env_type": "multi_objective", "rl_reward_weights": json.dumps(weights),
        "rl_env_config": json.dumps({"reward_components": {evil: {"type": "length"}}}),
    }  # fmt: skip
    result = of_file(tmp_path, "evil.yaml", tree)
    config = loaded(result, tmp_path)
    assert config.store == ".rlhf/store"
    assert config.base.path in (None, evil)
    assert "\x1b" not in result.text(evil)
    assert not any("\n" in described(finding) for finding in result.findings)
