"""Defaults of a configuration whose base is pretrained, with the sources of the values.

The fields' own defaults are for models of a few hundred thousand weights that are trained from
scratch; their learning rates ruin a pretrained model. Here a value depends on other settings (LoRA,
batch size), so that it fits them; a value that is given always wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel, TypeAdapter, ValidationError

from rlhf.config.section import Tree

Defaults = dict[str, dict[str, Any]]

#: Learning rates without and with LoRA, whose optimum is about ten times as large whatever the
#: model and the task (Schulman et al. 2025, "LoRA Without Regret"; TRL's guide of that name).
#: SFT: 2e-5 is that of Alpaca, of Zephyr (Tunstall et al. 2023) and TRL's default.
SFT_RATES = (2e-5, 2e-4)
#: 9e-6 in InstructGPT (Ouyang et al. 2022, appendix C.2), 1e-5 in Llama 2 (Touvron et al. 2023,
#: section 3.2.2), for one epoch: more of them overfit.
REWARD_RATES = (1e-5, 1e-4)
#: Policy: 3e-6 in Huang et al. 2024 ("The N+ implementation details of RLHF with PPO", table 3)
#: and in TRL's PPOConfig; the other values below are theirs too, if no other source is named.
POLICY_RATES = (3e-6, 3e-5)
#: A critic's head starts at zero: 9e-6 in OpenRLHF and 1e-5 in verl, beside 1e-6 for the policy.
CRITIC_RATES = (1e-5, 1e-4)

#: Longest prompt + reply; the default of TRL's SFTConfig and RewardConfig.
MAX_LENGTH = 1024
#: Rows per optimiser step. Stanford's Alpaca has 128 and InstructGPT's reward model 64, for some
#: ten thousand rows; LoRA tolerates large batches less ("LoRA Without Regret").
BATCH_SIZE = 32
#: Rows per forward pass: 8 rows of 1,024 tokens, for the memory of logits over a large vocabulary.
MICRO_BATCH_SIZE = 8
#: Rows per forward pass while evaluating.
EVALUATION_BATCH_SIZE = 32
#: Replies per optimiser step and passes over a chunk: with chunks of 128 replies 4 steps each, as
#: many as there (4 passes of one step).
MINI_BATCH_SIZE, PPO_EPOCHS = 64, 2
KL_COEF = 0.05
#: No discount: the score comes with the last token. InstructGPT, appendix C.4.
GAMMA = 1.0
#: Sampling from all tokens: otherwise replies come from another distribution than the one that is
#: scored and whose KL is penalised.
TOP_K = 0
#: Adam's first steps are its largest: the rates rise over 10 updates (InstructGPT, appendix C.4),
#: or a tenth of a shorter run.
WARMUP_UPDATES = 10


_WHOLE, _FLAG = TypeAdapter(int), TypeAdapter(bool)


def pretrained_defaults(tree: Mapping[str, Any]) -> Defaults:
    """Return the defaults of fields by section; empty if no model is pretrained.

    Args:
        tree: The configuration's values as far as they are given, by field names; sections are
            mappings or `Section` objects. Values may be invalid: validation comes later.
    """
    sections = {name: given_values(tree.get(name)) for name in ("base", *_SECTIONS)}
    has_base = sections["base"].get("path") is not None
    has_reward_base = has_base or sections["reward_model"].get("base") is not None
    pretrained = dict.fromkeys(_SECTIONS, has_base) | {"reward_model": has_reward_base}
    return {name: of(sections[name]) for name, of in _SECTIONS.items() if pretrained[name]}


def with_pretrained_defaults(tree: Tree) -> Tree:
    """Return a configuration tree with `pretrained_defaults` for values that are not given."""
    defaults = pretrained_defaults(tree)
    completed = {
        name: {**values, **given_values(tree.get(name))}
        for name, values in defaults.items()
        if tree.get(name) is None or isinstance(tree[name], dict | BaseModel)
    }
    return {**tree, **completed}


def given_values(section: Any) -> dict[str, Any]:
    """Return the values that a mapping or `Section` object was made with; of others, none."""
    if isinstance(section, BaseModel):
        return {name: getattr(section, name) for name in section.model_fields_set}
    return dict(cast("Tree", section)) if isinstance(section, dict) else {}


def _sft(given: Tree) -> Tree:
    return _training(given, SFT_RATES)


def _reward_model(given: Tree) -> Tree:
    return _training(given, REWARD_RATES)


def _training(given: Tree, rates: tuple[float, float]) -> Tree:
    batch, count = _whole(given, "batch_size", BATCH_SIZE), _ranks(given)
    share = max(1, batch // count)
    return {
        "learning_rate": _of_adapters(given, rates),
        "batch_size": BATCH_SIZE,
        "micro_batch_size": _largest_divisor(share, MICRO_BATCH_SIZE),
        "max_length": MAX_LENGTH,
    }


def _ranks(given: Tree) -> int:
    """Return the number of processes that share a batch, on all machines."""
    return _whole(given, "processes", 1) * _whole(given, "nodes", 1)


def _ppo(given: Tree) -> Tree:
    chunk, count = _whole(given, "chunk_size", 128), _ranks(given)
    mini = min(MINI_BATCH_SIZE, chunk)
    updates = -(-_whole(given, "total_episodes", 4608) // chunk)
    critic_updates = _whole(given, "critic_warmup_updates", 0)
    is_shared = _flag(given, "shared_base") or given.get("critic") in ("adapter", "head")
    return {
        "learning_rate": _of_adapters(given, POLICY_RATES),
        # A critic with a backbone of its own trains all of its weights, also beside adapters.
        "critic_learning_rate": _of_adapters(given, CRITIC_RATES) if is_shared else CRITIC_RATES[0],
        "lr_warmup_updates": min(WARMUP_UPDATES, round(max(0, updates - critic_updates) / 10)),
        "mini_batch_size": max(mini - mini % count, min(count, chunk)),
        "micro_batch_size": MICRO_BATCH_SIZE,
        "num_ppo_epochs": PPO_EPOCHS,
        "kl_coef": KL_COEF,
        "gamma": GAMMA,
        "top_k": TOP_K,
    }


def _evaluation(given: Tree) -> Tree:
    return {"batch_size": EVALUATION_BATCH_SIZE}


_SECTIONS = {"sft": _sft, "reward_model": _reward_model, "ppo": _ppo, "evaluation": _evaluation}


def _of_adapters(given: Tree, rates: tuple[float, float]) -> float:
    """Return the rate for adapters if the section has `lora`, else that for all weights."""
    return rates[given.get("lora") is not None]


def _whole(given: Tree, name: str, default: int) -> int:
    """Return a positive whole number as its field will read it; the default in place of others."""
    try:
        value = _WHOLE.validate_python(given.get(name))
    except ValidationError:
        return default
    # One that is too large is refused later, and must not overflow until then.
    usable = 0 < value <= 10**9 and not isinstance(given.get(name), bool)
    return value if usable else default


def _flag(given: Tree, name: str) -> bool:
    """Return a flag as its field will read it, such as True for `yes`; False in place of others."""
    try:
        return _FLAG.validate_python(given.get(name))
    except ValidationError:
        return False


def _largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)
