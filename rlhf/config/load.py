"""Loads a configuration: defaults, then a YAML preset, then dotted command-line overrides."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from rlhf.config.command_line import parse_overrides
from rlhf.config.explain import explain
from rlhf.config.fields import Tree, flatten, resolve_none, without_aliases
from rlhf.config.pipeline import PipelineConfig
from rlhf.config.wording import one_line
from rlhf.errors import ConfigError

DEFAULT = "default"
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Loaded:
    """A configuration and where each of its values came from."""

    config: PipelineConfig
    sources: Mapping[str, str]

    def rows(self) -> list[tuple[str, str, str]]:
        """(dotted key, value, source) of every value, in the order of the sections."""
        return [
            (key, "none" if value is None else str(value), self.sources.get(key, DEFAULT))
            for key, value in flatten(self.config.model_dump(mode="json"))
        ]


def load_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> Loaded:
    """Read a preset and apply overrides such as `--ppo.kl_coef=0.05`.

    Raises:
        ConfigError: One line naming the field, the value and the cure.
    """
    preset = read_preset(Path(path)) if path is not None else {}
    command_line = parse_overrides(overrides)
    merged = _merge(preset, command_line)
    name = Path(path).name if path is not None else ""
    overridden = {key for key, _ in flatten(resolve_none(command_line))}
    sources = {
        key: COMMAND_LINE if key in overridden else name for key, _ in flatten(resolve_none(merged))
    }
    return Loaded(validate(merged, sources), sources)


def validate(tree: Tree, sources: Mapping[str, str] | None = None) -> PipelineConfig:
    """Turn a nested mapping into a configuration, with our error for the first bad value."""
    try:
        return PipelineConfig.model_validate(resolve_none(tree))
    except ValidationError as error:
        raise ConfigError(explain(error, sources or {})) from None


def read_preset(path: Path) -> Tree:
    """Read a YAML preset into a nested mapping, with every field under its own name."""
    where = f"config = {str(path)!r}"
    if not path.is_file():
        raise ConfigError(
            one_line(
                f"{where}: no such file; give the path of a YAML preset, for example "
                "configs/quickstart.yaml"
            )
        )
    try:
        tree: Any = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(
            one_line(f"{where}: can't be read ({error.strerror}); check the file and its rights")
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            one_line(f"{where}: not valid YAML ({_reason(error)}); mend it there")
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(one_line(f"{where}: must hold `key: value` lines at the top"))
    try:
        return without_aliases(cast("Tree", tree))
    except ConfigError as error:
        raise ConfigError(one_line(f"{error} (from {path.name})")) from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, and a value that holds itself."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping, built at once, so that an alias to an outer value is an error."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} stands there twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=True)


def _reason(error: Exception) -> str:
    """What YAML's parser found, without the excerpt of the file that its own text repeats."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error)
    return f"line {mark.line + 1}: {getattr(error, 'problem', None) or 'unexpected text'}"


def _merge(base: Tree, top: Tree) -> Tree:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merge(cast("Tree", below), cast("Tree", value)) if both else value
    return merged
