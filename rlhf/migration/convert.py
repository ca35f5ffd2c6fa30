"""Conversions of other tools' values to ours.

A conversion takes the case, the entry and the value, and returns (field, value) pairs; none where
there is nothing to say. It raises `Refused` for a value without an equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, cast

from rlhf.config.fields import field_types
from rlhf.config.pipeline import Tracker
from rlhf.config.section import union_members
from rlhf.limits import load_json
from rlhf.migration.case import Case, Fields, batches, is_data_file, plain, sources
from rlhf.migration.names import Entry

#: Trackers here, by the names of transformers' integrations.
TRACKERS: tuple[str, ...] = cast("tuple[str, ...]", Tracker.__args__)  # type: ignore[attr-defined]
_SCHEDULERS = {
    "linear": "linear", "cosine": "cosine", "constant": "constant",
    "constant_with_warmup": "constant",
}  # fmt: skip
#: Fields of `lora` by the names of TRL and AITraining.
LORA = {
    "lora_r": "r", "r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout",
    "lora_target_modules": "target_modules", "target_modules": "target_modules",
    "use_rslora": "use_rslora",
}  # fmt: skip
#: Words of one length that the old tool's component counted as 1.
_LENGTH_WORDS = 100.0


class Refused(Exception):
    """A value has no equal here; the text says why, or what to do."""

    def __init__(self, text: str, *, was_ignored: bool = False) -> None:
        super().__init__(text)
        self.was_ignored = was_ignored
        """True if the old tool ignored it too."""


class Partly(list[tuple[str, Any]]):
    """Fields of a value of which a part has no equal."""

    def __init__(self, fields: Fields, rest: str, why: str) -> None:
        super().__init__(fields)
        self.rest, self.why = rest, why


def convert(case: Case, entry: Entry, value: Any) -> Fields | None:
    """Return the fields that an argument becomes, or None if there is nothing to say.

    Raises:
        Refused: The value has no equal.
    """
    if entry.how:
        return _CONVERSIONS[entry.how](case, entry, value)
    return [(field := _field(case, entry), _typed(field, value))] if entry.to else []


def _field(case: Case, entry: Entry) -> str:
    return entry.to.replace("*", case.trainer)


def _typed(field: str, value: Any) -> Any:
    """Return a value as text where the field is text, else as what it says."""
    types = field_types(field) or ()
    is_text = any(member is str for t in types for member in union_members(t))
    simple = plain(value)
    return simple if simple is None or not is_text else str(value)


def _silent(case: Case, entry: Entry, value: Any) -> None:
    return None


def _model(case: Case, entry: Entry, value: Any) -> Fields:
    off: Fields = [("sft.enabled", False)] if case.is_ppo else []
    return [("base.path", str(value)), *off]


def _model_name(case: Case, entry: Entry, value: Any) -> Fields:
    if case.is_ppo and "sft_model_path" in case:
        raise Refused("ppo.py takes the tokenizer alone from it; here it is that of the policy")
    return _model(case, entry, value)


def _reward_model(case: Case, entry: Entry, value: Any) -> Fields:
    if not case.is_ppo:
        raise Refused(f"is for PPO, and these are arguments of {case.trainer}; {entry.why}")
    return [("ppo.reward_model_path", str(value))]


def _name(case: Case, entry: Entry, value: Any) -> Fields:
    name = re.sub(r"[^a-z0-9]+", "-", PurePath(str(value)).name.lower()).strip("-")[:63].strip("-")
    if not name:
        raise Refused("has no letters or digits for name; set it")
    return [("name", name)]


def _data(case: Case, entry: Entry, value: Any) -> Fields:
    if entry.name == "dataset_config" and plain(value) is not None:
        name = case.values.get("dataset_name")
        if not name or is_data_file(str(name)):
            raise Refused(f"is of a hub dataset, and {'a file' if name else 'none'} is given")
    return sources(case)


def _split(case: Case, entry: Entry, value: Any) -> Fields | None:
    return sources(case) or None


def _prompts(case: Case, entry: Entry, value: Any) -> Fields:
    return [("data.prompts_source", str(value))]


def _column(case: Case, entry: Entry, value: Any) -> Fields | None:
    if case.trainer == "reward_model":
        return [(entry.to, str(value))]
    if entry.name == "text_column":
        return sources(case) or None
    raise Refused("is of pairs; give them as data.source, and its columns in section data")


def _max_samples(case: Case, entry: Entry, value: Any) -> Fields:
    if case.trainer != "reward_model":
        raise Refused("limits pairs here (data.max_pairs), not demonstrations or prompts")
    return [(entry.to, plain(value))]


def _block_size(case: Case, entry: Entry, value: Any) -> Fields:
    size = plain(value)
    if case.is_ppo:
        raise Refused("prompts were cut to half of it, in characters; set data.max_prompt (tokens)")
    if not isinstance(size, int):
        raise Refused(f"is no single length; set {case.trainer}.max_length")
    return [(_field(case, entry), 1024 if size == -1 else size)]


def _length(case: Case, entry: Entry, value: Any) -> Fields:
    if plain(value) is None:
        raise Refused(f"lengths are limited always; set {entry.to}")
    return [(entry.to, plain(value))]


def _epochs(case: Case, entry: Entry, value: Any) -> Fields | None:
    if not case.is_ppo:
        return [(_field(case, entry), plain(value))]
    if "total_episodes" in case:
        return None
    raise Refused("made the episodes, epochs × rows, which only the data tell; "
                  "set ppo.total_episodes")  # fmt: skip


def _batch(case: Case, entry: Entry, value: Any) -> Fields:
    return batches(case)


def _optimizer(case: Case, entry: Entry, value: Any) -> Fields | None:
    if str(value).lower().startswith("adamw"):
        return None
    raise Refused("the optimiser is AdamW always")


def _beta1(case: Case, entry: Entry, value: Any) -> Fields | None:
    if plain(value) == 0.9:
        return None
    raise Refused("is 0.9 always")


def _scheduler(case: Case, entry: Entry, value: Any) -> Fields:
    name = _SCHEDULERS.get(str(value).lower())
    if name is None:
        raise Refused("is no schedule here; linear, cosine and constant are")
    # transformers' schedules end at 0.
    ends: Fields = [] if name == "constant" or not case.is_ppo else [("ppo.lr_final_fraction", 0.0)]
    if _ignores_warmup(case):
        ends.append(("ppo.lr_warmup_updates" if case.is_ppo else f"{case.trainer}.warmup_ratio", 0))
    return [(_field(case, entry), name), *ends]


def _ignores_warmup(case: Case) -> bool:
    """Whether the schedule is transformers' `constant`, which has no warm-up."""
    given = [str(case.values.get(name)).lower() for name in ("lr_scheduler_type", "scheduler")]
    return "constant" in given


def _refuse_warmup(case: Case, value: Any) -> None:
    if value and _ignores_warmup(case):
        text = "transformers' schedule constant ignores it; with constant_with_warmup it is written"
        raise Refused(text, was_ignored=True)


def _warmup_ratio(case: Case, entry: Entry, value: Any) -> Fields:
    ratio = plain(value)
    _refuse_warmup(case, ratio)
    if not case.is_ppo:
        return [(_field(case, entry), ratio)]
    if ratio == 0:
        return [("ppo.lr_warmup_updates", 0)]
    episodes = case.value("total_episodes")
    chunk = dict(batches(case)).get("ppo.chunk_size")
    if not (isinstance(episodes, int) and chunk and isinstance(ratio, int | float)):
        raise Refused("is lr_warmup_updates of PPO: this share of total_episodes / chunk_size; "
                      "set ppo.lr_warmup_updates")  # fmt: skip
    return [("ppo.lr_warmup_updates", math.ceil(ratio * math.ceil(episodes / chunk)))]


def _warmup_steps(case: Case, entry: Entry, value: Any) -> Fields:
    steps = plain(value)
    _refuse_warmup(case, steps)
    if isinstance(steps, float) and 0 < steps < 1:  # of transformers 5: a share of the steps
        return _warmup_ratio(case, entry, steps)
    if case.is_ppo:
        return [("ppo.lr_warmup_updates", steps)]
    if steps == 0:
        return [(_field(case, entry), 0.0)]
    raise Refused(f"is a share of the steps here, which only the data tell; set "
                  f"{case.trainer}.warmup_ratio")  # fmt: skip


def _precision(case: Case, entry: Entry, value: Any) -> Fields | None:
    name = str(value).lower()
    if plain(value) is None or name == "no":
        return None
    if not case.is_ppo:
        raise Refused("SFT and the reward model are trained in float32; ppo.precision is PPO's")
    if name != "bf16":
        raise Refused("there is no float16 here; ppo.precision: bf16 is the nearest")
    return [("ppo.precision", "bf16")]


def _bf16(case: Case, entry: Entry, value: Any) -> Fields | None:
    flag = plain(value)
    if not case.is_ppo and flag:
        raise Refused("SFT and the reward model are trained in float32; ppo.precision is PPO's")
    return [("ppo.precision", "bf16" if flag else "fp32")] if case.is_ppo else None


def _checkpointing(case: Case, entry: Entry, value: Any) -> Fields | None:
    flag = plain(value) is True
    if case.is_ppo:
        return [("ppo.gradient_checkpointing", flag)]
    return None


def _no_checkpointing(case: Case, entry: Entry, value: Any) -> Fields | None:
    return _checkpointing(case, entry, plain(value) is not True)


def _trackers(case: Case, entry: Entry, value: Any) -> Fields:
    listed = value if isinstance(value, list | tuple) else str(value).split(",")
    names = [str(name).strip() for name in cast("Sequence[Any]", listed)]
    if not [name for name in names if name not in ("none", "None", "[]", "")]:
        return [("tracking.trackers", [])]
    known = [name for name in names if name in TRACKERS]
    if not known:
        raise Refused(f"is no tracker here; {', '.join(TRACKERS)} are")
    rest = [name for name in names if name not in (*TRACKERS, "none", "")]
    why = f"no tracker here; {', '.join(TRACKERS)} are"
    fields: Fields = [("tracking.trackers", known)]
    return Partly(fields, ", ".join(rest), why) if rest else fields


def _lora(case: Case, entry: Entry, value: Any) -> Fields | None:
    section = f"{case.trainer}.lora"
    if not case.has_adapters:
        return None
    if entry.name in ("peft", "use_peft"):
        given = {LORA[name] for name in case.values if name in LORA}
        rest: Fields = [(f"{section}.r", 16)] if "r" not in given else []
        if "dropout" not in given and not case.is_ppo:
            rest.append((f"{section}.dropout", 0.05))
        return rest or None
    name = LORA[entry.name]
    if name == "dropout" and case.is_ppo:
        if plain(value) in (0, None):
            return None
        raise Refused("PPO's adapters have no dropout: what samples must be what is trained")
    if name == "target_modules":
        if plain(value) is None:
            return None
        text = value.split(",") if isinstance(value, str) and "," in value else value
        return [(f"{section}.{name}", text)]
    return [(f"{section}.{name}", plain(value))]


def _quantization(case: Case, entry: Entry, value: Any) -> Fields | None:
    if plain(value) in (None, False):
        return None
    if plain(value) is not True and str(value) != "int4":
        raise Refused("has no equal; frozen_dtype: nf4 is 4 bits, bfloat16 16, below adapters")
    if not case.has_adapters:
        raise Refused("is for adapters alone, and there are none")
    return [(f"{case.trainer}.frozen_dtype", "nf4")]


def _reward_weights(case: Case, entry: Entry, value: Any) -> Fields:
    return [(entry.to, _weights(value))]


def _multi_objective(case: Case, entry: Entry, value: Any) -> Fields | None:
    if plain(value) is not True:
        return None
    if "rl_env_config" not in case and "rl_reward_weights" not in case:
        raise Refused("has no components; name them in ppo.env_config.components")
    return [("ppo.multi_objective", True)]


def _environment(case: Case, entry: Entry, value: Any) -> Fields:
    tree = _mapping(value)
    if str(case.value("rl_env_type")) == "text_generation":
        return [("ppo.env_config.stop_sequences", list(tree.get("stop_sequences") or []))]
    if str(case.value("rl_env_type")) != "multi_objective":
        raise Refused("its keys are others here; see env_config in docs/rewards.md")
    parts = tree.get("reward_components")
    if not isinstance(parts, dict) or not parts:
        raise Refused("has no reward_components; name them in ppo.env_config.components")
    fields: Fields = [
        (f"ppo.env_config.components.{_name_of(name)}", _component(str(name), options))
        for name, options in cast("dict[Any, Any]", parts).items()
    ]
    weights = tree.get("reward_weights")
    return [*fields, *([("ppo.reward_weights", _weights(weights))] if weights else [])]


def _name_of(name: Any) -> str:
    """Return the name of a component, which becomes a key of YAML."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,62}", str(name)):
        raise Refused("has a component whose name is not of letters, digits, _ and -; rename it")
    return str(name)


def _weights(value: Any) -> dict[str, Any]:
    return {_name_of(name): plain(weight) for name, weight in _mapping(value).items()}


def _component(name: str, options: Any) -> dict[str, Any]:
    tree = cast("dict[str, Any]", options) if isinstance(options, dict) else {}
    kind = tree.get("type")
    if kind == "length":
        return {"type": "length", "points": [[0, 0.0], [_LENGTH_WORDS, 1.0]]}
    if kind == "keyword":
        words = [str(word) for word in tree.get("keywords") or []]
        return {"type": "keyword", "words": words, "match": "fraction"}
    return {"type": str(kind or name)}


def _mapping(value: Any) -> dict[str, Any]:
    try:
        tree = load_json(value) if isinstance(value, str) else value
    except ValueError as error:
        raise Refused(f"is no JSON ({error})") from None
    if not isinstance(tree, dict):
        raise Refused("is no mapping")
    return cast("dict[str, Any]", tree)


def _stop_token(case: Case, entry: Entry, value: Any) -> Fields | None:
    if str(value) == "eos":
        return None
    raise Refused(entry.why)


def _penalty(case: Case, entry: Entry, value: Any) -> Fields | None:
    if case.value("non_eos_penalty") is not True:
        if entry.name == "non_eos_penalty":
            return None
        raise Refused("was read with non_eos_penalty: true alone", was_ignored=True)
    size = case.value("penalty_reward_value")
    if not isinstance(size, int | float) or size > 0:
        raise Refused("rewards a reply that does not end; penalties alone are possible here")
    return [("ppo.missing_eos", "replace"), ("ppo.missing_eos_penalty", abs(float(size)))]


def _adaptive(case: Case, entry: Entry, value: Any) -> Fields:
    return [("ppo.kl_controller", "adaptive" if plain(value) else "fixed")]


def _kl_penalty(case: Case, entry: Entry, value: Any) -> Fields:
    estimators = {"kl": "k1", "mse": "k2"}
    if str(value) not in estimators:
        raise Refused(entry.why)
    return [("ppo.kl_estimator", estimators[str(value)])]


def _early_stopping(case: Case, entry: Entry, value: Any) -> Fields | None:
    if plain(case.values.get("early_stopping")) is not True:
        return None
    raise Refused("was a KL of whole replies; ppo.target_kl is one per token: set it, or leave "
                  "the stopping to ppo.watchdog.max_kl")  # fmt: skip


def _score_scaling(case: Case, entry: Entry, value: Any) -> Fields | None:
    return [("ppo.reward_normalization", "running")] if plain(value) is True else None


def _dtype(case: Case, entry: Entry, value: Any) -> Fields | None:
    return [("base.save_dtype", str(value))] if plain(value) is not None else None


def _cpu(case: Case, entry: Entry, value: Any) -> Fields | None:
    return [("runtime.device", "cpu")] if plain(value) is True else None


def _fsdp(case: Case, entry: Entry, value: Any) -> Fields | None:
    if not value or plain(value) in (None, False):
        return None
    if case.is_ppo:
        raise Refused("is not for PPO; to save memory set ppo.lora, ppo.shared_base or "
                      "ppo.gradient_checkpointing")  # fmt: skip
    return [(f"{case.trainer}.sharding", "fsdp")]


def _processes(case: Case, entry: Entry, value: Any) -> Fields | None:
    count = plain(value)
    if count in (1, None):
        return None
    if not isinstance(count, int):
        raise Refused(f"is no number; set {case.trainer}.processes")
    if entry.name == "num_processes" and isinstance(count, int):  # of all machines
        count = max(1, count // case.number("num_machines"))
    return [(_field(case, entry), count)]


def _nodes(case: Case, entry: Entry, value: Any) -> Fields | None:
    return [(_field(case, entry), plain(value))] if plain(value) not in (1, None) else None


_CONVERSIONS: Mapping[str, Callable[[Case, Entry, Any], Fields | None]] = {
    "silent": _silent, "model": _model, "policy": _model, "model_name": _model_name,
    "reward_model": _reward_model, "name": _name, "data": _data, "split": _split,
    "prompts": _prompts, "column": _column, "max_samples": _max_samples,
    "block_size": _block_size, "length": _length, "epochs": _epochs, "batch": _batch,
    "batch_old": _batch, "optimizer": _optimizer, "beta1": _beta1, "scheduler": _scheduler,
    "warmup_ratio": _warmup_ratio, "warmup_steps": _warmup_steps, "precision": _precision,
    "bf16": _bf16, "checkpointing": _checkpointing, "no_checkpointing": _no_checkpointing,
    "trackers": _trackers, "lora": _lora, "quantization": _quantization, "json": _reward_weights,
    "multi_objective": _multi_objective, "environment": _environment, "stop_token": _stop_token,
    "penalty": _penalty, "adaptive": _adaptive, "kl_penalty": _kl_penalty,
    "early_stopping": _early_stopping, "score_scaling": _score_scaling, "dtype": _dtype,
    "cpu": _cpu, "fsdp": _fsdp, "processes": _processes, "nodes": _nodes,
}  # fmt: skip
