"""Arguments of other tools from a file or a command line, as text alone: nothing is run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from rlhf.config import text as yaml_text
from rlhf.errors import ConfigError
from rlhf.files import is_file
from rlhf.limits import read_text
from rlhf.migration.names import (
    AITRAINING,
    LAUNCHER,
    OLD_PPO,
    ORDERS,
    Tool,
    Trainer,
    find,
    is_old_ppo,
    trainers_of,
)
from rlhf.migration.python_source import CLASSES, read_calls
from rlhf.migration.secrets import holds_secret
from rlhf.migration.words import find_commands, is_command, parse_command
from rlhf.plain_text import one_line, shortened

#: Trainers by AITraining's names of them.
_TRAINERS: Mapping[str, Trainer] = {
    "default": "sft", "generic": "sft", "sft": "sft", "reward": "reward_model", "ppo": "ppo",
}  # fmt: skip
#: Sections of AITraining's older YAML form, and the names of what they hold.
_SECTIONS: Mapping[str, Mapping[str, str]] = {
    "data": {"path": "data_path"}, "params": {}, "hub": {},
}  # fmt: skip
#: Arguments of a file that AITraining wrote itself, with all defaults.
_DUMP = 100
_HELP = "give --trainer sft, reward or ppo"


@dataclass(frozen=True)
class Given:
    """Arguments of one training."""

    tool: Tool
    trainer: Trainer
    kind: str
    """Trainer, or `OLD_PPO`."""
    order: tuple[str, ...]
    """Classes that may have a name, the first wins."""
    values: Mapping[str, Any]
    computed: Sequence[str] = ()
    """Arguments whose values only running a program would tell."""
    origin: str = ""
    """Name of the file, or empty."""
    is_dump: bool = False
    """True if the file holds all defaults too."""
    calls_lora: bool = False
    """True if peft's `LoraConfig` is called."""
    by_accelerate: bool = False
    """True if `accelerate launch` started it, by default on all devices of the machine."""
    notes: Sequence[str] = ()
    """What else the file holds, and is left out."""


def read_arguments(words: Sequence[str], trainer: Trainer | None = None) -> list[Given]:
    """Read a command line, or files with arguments.

    Args:
        words: Words of the command line, or paths.
        trainer: What the arguments are for, if they don't tell it.

    Raises:
        ConfigError: A file can't be read, or it is not clear what it is for.
    """
    if is_command(words) and len(words) > 1 and any(w.startswith("-") for w in words):
        return [_from_command(words, trainer, "command line")]
    return [given for word in words for given in _read_file(Path(word), trainer)]


def _read_file(path: Path, trainer: Trainer | None) -> list[Given]:
    setting = f"file = {str(path)!r}"
    if str(path).startswith("--"):
        raise ConfigError(one_line(f"{path} is no option here; a command line stands behind `--`"))
    if not is_file(path):
        raise ConfigError(
            one_line(f"{setting}: no such file; give one with arguments, or a command after `--`")
        )
    try:
        text = read_text(path)
        return _from_text(text, path, trainer)
    except ConfigError as error:
        raise ConfigError(one_line(f"{setting}: {error}")) from None
    except UnicodeDecodeError:
        raise ConfigError(one_line(f"{setting}: is no text in UTF-8; give YAML, JSON, a command "
                                   "line or Python")) from None  # fmt: skip
    except OSError as error:
        raise ConfigError(one_line(f"{setting}: can't be read ({error.strerror})")) from None
    except yaml_text.BROKEN as error:
        reason = yaml_text.reason(error)
        raise ConfigError(one_line(f"{setting}: can't be read ({reason})")) from None


def _from_text(text: str, path: Path, trainer: Trainer | None) -> list[Given]:
    if path.suffix == ".py":
        return _from_python(text, trainer, path.name)
    if path.suffix not in (".yaml", ".yml", ".json") and not text.lstrip().startswith("{"):
        commands = find_commands(text)
        if commands:
            return _from_commands(commands, trainer, path.name)
    tree = yaml_text.parse(text)
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(
            "holds no arguments; give `name: value` lines, a command line, or Python that calls "
            f"{', '.join(name for name, told in CLASSES.items() if told)}"
        )
    return [_from_mapping(cast("dict[Any, Any]", tree), trainer, path.name)]


def _from_mapping(tree: Mapping[Any, Any], trainer: Trainer | None, origin: str) -> Given:
    values = {str(key): value for key, value in tree.items()}
    has_sections = isinstance(values.get("data"), dict)
    if has_sections or isinstance(values.get("params"), dict):
        values = _flattened(values)
    ours = sum(find("aitraining", AITRAINING, name) is not None for name in values)
    everything = tuple(dict.fromkeys(group for order in ORDERS.values() for group in order))
    theirs = sum(find("trl", everything, name) is not None for name in values)
    if ours + theirs == 0:
        raise ConfigError("holds no argument of AITraining or TRL; is it the right file?")
    if ours > theirs or (ours == theirs and "trainer" in values):
        return _aitraining(values, trainer, origin)
    return _trl(values, (), trainer, origin)


def _flattened(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of AITraining's older YAML form by the names of its fields."""
    flat = {key: value for key, value in values.items() if key not in _SECTIONS}
    for section, names in _SECTIONS.items():
        part = values.get(section)
        inner = cast("dict[Any, Any]", part) if isinstance(part, dict) else {}
        for key, value in inner.items():
            if key == "column_mapping" and isinstance(value, dict):
                flat |= {str(k): v for k, v in cast("dict[Any, Any]", value).items()}
            else:
                flat[names.get(str(key), str(key))] = value
    return flat


def _from_commands(
    commands: Sequence[Sequence[str]], trainer: Trainer | None, origin: str
) -> list[Given]:
    """Read the commands of a script; those of no training are told and left out.

    Raises:
        ConfigError: None of them is of a training that has an equal here.
    """
    found: list[Given] = []
    errors: list[ConfigError] = []
    for words in commands:
        try:
            found.append(_from_command(words, trainer, origin))
        except ConfigError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    notes = [f"{origin}: another command was left out: {error}" for error in errors]
    return [replace(found[0], notes=notes), *found[1:]]


def _from_command(words: Sequence[str], trainer: Trainer | None, origin: str) -> Given:
    line = parse_command(words)
    values = dict(line.options)
    if line.tool == "aitraining":
        if line.other:
            what = "that command" if holds_secret(line.other) else one_line(line.other)
            raise ConfigError(f"{what} has no equal here; aitraining llm has one")
        if "config" in values:
            raise ConfigError("--config: give the file that it names to rlhf migrate")
        return _aitraining(values, trainer, origin)
    if line.other:
        raise ConfigError(f"{line.other} has no equal here; SFT, reward models and PPO have one")
    found = _trl(values, line.launcher, trainer or line.trainer, origin)
    return replace(found, by_accelerate=line.by_accelerate)


def _from_python(text: str, trainer: Trainer | None, origin: str) -> list[Given]:
    calls = read_calls(text)
    groups = calls.classes
    if not groups:
        # A shell command may stand in a comment or docstring; only calls are read.
        raise ConfigError(f"calls none of {', '.join(CLASSES)}; give the file that does")
    trainers: dict[Trainer, None] = dict.fromkeys(
        told for name in sorted(groups) if (told := CLASSES.get(name))
    )
    if "LLMTrainingParams" in groups:
        values = {name: value for group, name, value in calls.values if group in CLASSES}
        names = [name for _, name in calls.computed]
        return [_aitraining(values, trainer, origin, names)]
    chosen: list[Trainer] = [trainer] if trainer else list(trainers)
    if not chosen:
        raise ConfigError(f"calls {', '.join(sorted(groups))} alone; {_HELP}")
    found: list[Given] = []
    for each in chosen:
        own = {group for group in groups if CLASSES.get(group) in (None, each)}
        values = {name: value for group, name, value in calls.values if group in own}
        names = [name for group, name in calls.computed if group in own]
        one = _trl(values, (), each, origin, names)
        found.append(replace(one, calls_lora="LoraConfig" in groups))
    return found


def _aitraining(
    values: Mapping[str, Any], trainer: Trainer | None, origin: str, computed: Sequence[str] = ()
) -> Given:
    # `task: llm-sft` of the older form; `task: llm` tells nothing.
    whole = str(values.get("task") or "llm").strip().lower()
    kind, *rest = re.split("[-:]", whole, maxsplit=1)
    task = rest[0] if rest else ""
    if kind not in ("llm", "lm_training") or (task and task not in _TRAINERS):
        raise ConfigError(
            f"task = {one_line(shortened(whole, 80))!r} has no equal here; SFT, reward models and "
            "PPO (llm:sft, llm:reward, llm:ppo) have one"
        )
    name = str(values.get("trainer") or task or "default").strip().lower()
    if trainer is None and name not in _TRAINERS:
        raise ConfigError(
            f"trainer = {one_line(name)!r} has no equal here; SFT, reward models and PPO have one"
        )
    chosen: Trainer = trainer or _TRAINERS[name]
    is_dump = len(values) > _DUMP
    return Given("aitraining", chosen, chosen, AITRAINING, values, computed, origin, is_dump)


def _trl(
    values: Mapping[str, Any], launcher: Sequence[tuple[str, Any]], trainer: Trainer | None,
    origin: str, computed: Sequence[str] = (),
) -> Given:  # fmt: skip
    names = {*values, *computed}
    told: list[Trainer] = [*trainers_of(names)]
    if trainer is None and len(told) != 1:
        what = "arguments of several trainers" if told else "arguments that every trainer has"
        raise ConfigError(f"holds {what}; {_HELP}")
    chosen: Trainer = trainer or told[0]
    kind = OLD_PPO if chosen == "ppo" and is_old_ppo(names) else chosen
    order = (*ORDERS[kind], LAUNCHER)
    return Given("trl", chosen, kind, order, {**dict(launcher), **values}, computed, origin)
