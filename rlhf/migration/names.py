"""Names of other tools' arguments: what each becomes here, with the reason.

The tables are data: `aitraining.yaml` and `trl.yaml`, which `docs/migrating.md` shows too.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

#: Stages that arguments can be for: the names of their sections here.
Trainer = Literal["sft", "reward_model", "ppo"]
Tool = Literal["aitraining", "trl"]
Outcome = Literal["same", "changed", "broken", "none"]
TRAINERS: tuple[Trainer, ...] = get_args(Trainer)

#: Classes of PPO's own arguments in TRL; the second for scripts up to TRL 0.11.
PPO, OLD_PPO = "PPOConfig", "PPOConfig up to 0.11"
LAUNCHER = "accelerate and torchrun"
#: Classes in whose order a name of TRL is looked for, by trainer.
ORDERS: Mapping[str, tuple[str, ...]] = {
    "ppo": (PPO, "ScriptArguments", "ModelConfig", "LoraConfig", "TrainingArguments"),
    "reward_model": (
        "RewardConfig", "ScriptArguments", "ModelConfig", "LoraConfig", "TrainingArguments",
    ),
    "sft": ("SFTConfig", "ScriptArguments", "ModelConfig", "LoraConfig", "TrainingArguments"),
    OLD_PPO: (OLD_PPO, "ScriptArguments", "ModelConfig", "LoraConfig", "TrainingArguments"),
}  # fmt: skip
#: Of AITraining.
AITRAINING = ("LLMTrainingParams", "command")


@dataclass(frozen=True)
class Entry:
    """An argument of another tool."""

    name: str
    group: str
    """Class that has it."""
    was: Any
    """Default there."""
    outcome: Outcome
    why: str
    to: str = ""
    """Dotted field here, `*` for the section of the trainer; empty without an equal."""
    how: str = ""
    """Conversion in `convert.py`; empty copies the value."""
    secret: bool = False
    """True if it holds credentials, which are neither copied nor shown."""


@functools.cache
def tables(tool: Tool) -> dict[str, dict[str, Entry]]:
    """Return the entries of a tool by class and name."""
    tree = _data(tool)
    shared = tree.get("none of", {})
    groups = {
        group: {name: Entry(name=name, group=group, **values) for name, values in names.items()}
        for group, names in tree.items()
        if group not in ("none of", "defaults")
    }
    for group, reasons in shared.items():
        groups[group] |= {
            name: Entry(name=name, group=group, was=None, outcome="none", why=why)
            for why, names in reasons.items()
            for name in names
        }
    return groups


def defaults(tool: Tool, kind: str) -> dict[str, Any]:
    """Return the values that held in a tool by default and differ from ours, by our fields.

    Args:
        tool: The other tool.
        kind: A trainer, or `OLD_PPO`.
    """
    return dict(_data(tool)["defaults"].get(kind, {}))


@functools.cache
def _data(tool: Tool) -> dict[str, Any]:
    path = Path(__file__).with_name(f"{tool}.yaml")
    return cast("dict[str, Any]", yaml.safe_load(path.read_text(encoding="utf-8")))


def find(tool: Tool, order: tuple[str, ...], name: str) -> Entry | None:
    """Return the entry of a name in the first of some classes that has it."""
    groups = tables(tool)
    return next((groups[group][name] for group in order if name in groups[group]), None)


def nearest(tool: Tool, order: tuple[str, ...], name: str) -> str | None:
    """Return the most similar name of some classes, or None."""
    known = [known for group in order for known in tables(tool)[group]]
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.7)), None)


def trainers_of(names: set[str]) -> Iterator[Trainer]:
    """Yield the trainers of which some names are that no other trainer of TRL has."""
    groups = tables("trl")
    own = {
        "sft": groups["SFTConfig"].keys(),
        "reward_model": groups["RewardConfig"].keys(),
        "ppo": groups[PPO].keys() | groups[OLD_PPO].keys(),
    }
    common = set[str]().union(*(groups[g].keys() for g in ORDERS["ppo"][1:]))
    for trainer in TRAINERS:
        others = common.union(*(own[t] for t in TRAINERS if t != trainer))
        if names & (own[trainer] - others):
            yield trainer


def is_old_ppo(names: set[str]) -> bool:
    """Return whether names are of the PPOConfig of TRL up to 0.11."""
    groups = tables("trl")
    newer = set[str]().union(*(groups[group].keys() for group in ORDERS["ppo"]))
    return bool(names & (groups[OLD_PPO].keys() - newer))
