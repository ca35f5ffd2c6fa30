"""Loads a configuration: defaults, then a YAML preset, then dotted command-line overrides."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import ConfigError

DEFAULT = "default"
COMMAND_LINE = "command line"
Tree = dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A configuration and where each of its values came from."""

    config: PipelineConfig
    sources: Mapping[str, str]

    def rows(self) -> list[tuple[str, str, str]]:
        """(dotted key, value, source) of every value, in the order of the sections."""
        return [
            (key, _shown(value), self.sources.get(key, DEFAULT))
            for key, value in flatten(self.config.model_dump(mode="json"))
        ]


class _CommandLine(PipelineConfig, BaseSettings):
    """The same fields, as pydantic-settings wants them to parse a command line."""

    model_config = SettingsConfigDict(cli_exit_on_error=False, extra="forbid")


def load_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> Loaded:
    """Read a preset and apply overrides such as `--ppo.kl_coef=0.05`.

    Raises:
        ConfigError: One line naming the field, the value and the cure.
    """
    preset = read_preset(Path(path)) if path is not None else {}
    command_line = parse_overrides(overrides)
    sources = {key: Path(path).name for key, _ in flatten(preset)} if path is not None else {}
    sources |= {key: COMMAND_LINE for key, _ in flatten(command_line)}
    return Loaded(validate(_merge(preset, command_line), sources), sources)


def validate(tree: Tree, sources: Mapping[str, str] | None = None) -> PipelineConfig:
    """Turn a nested mapping into a configuration, with our error for the first bad value."""
    try:
        return PipelineConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, sources or {})) from None


def read_preset(path: Path) -> Tree:
    """Read a YAML preset into a nested mapping."""
    if not path.is_file():
        raise ConfigError(
            f"config = {str(path)!r}: no such file; give the path of a YAML preset, for example "
            "configs/quickstart.yaml"
        )
    try:
        tree: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise ConfigError(f"config = {str(path)!r}: not valid YAML ({where}); mend it") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config = {str(path)!r}: must hold `key: value` lines at the top")
    return cast("Tree", tree)


def parse_overrides(overrides: Sequence[str]) -> Tree:
    """Parse `--section.field=value` (or `--section.field value`) into a nested mapping."""
    tokens = [_normalised(token) for token in overrides]
    for token in tokens:
        _check_known(token)
    try:
        source = CliSettingsSource[Any](_CommandLine, cli_parse_args=tokens)
        return _nulls(source())
    except SettingsError as error:
        reason = str(error).removeprefix("error parsing CLI: ")
        raise ConfigError(
            f"command line: {reason}; write overrides as --section.field=value"
        ) from None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, leaf) pairs of a nested mapping; lists are leaves."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(cast("Tree", value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _normalised(token: str) -> str:
    """`--ppo.kl-coef=x` as `--ppo.kl_coef=x`; `none` as the parser's null."""
    if not token.startswith("--"):
        return "null" if token.lower() == "none" else token
    name, equals, value = token[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{'null' if value.lower() == 'none' else value}"


def _check_known(token: str) -> None:
    """Name the nearest field for an unknown one; argparse would only say `unrecognized`."""
    if not token.startswith("--"):
        return
    name = token[2:].partition("=")[0]
    known = list(_fields(PipelineConfig))
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    cure = f"did you mean {near[0]}?" if near else "see `rlhf config show` for the fields"
    raise ConfigError(f"command line: {name} is not a field of the configuration; {cure}")


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _fields(kind, f"{prefix}{name}.")


def _merge(base: Tree, top: Tree) -> Tree:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merge(cast("Tree", below), cast("Tree", value)) if both else value
    return merged


def _nulls(tree: Any) -> Any:
    """The parser leaves `null` as text where a field is not nullable by itself."""
    if isinstance(tree, dict):
        return {k: _nulls(v) for k, v in cast("Tree", tree).items()}
    return None if tree == "null" else tree


def _explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    """The first problem in one line: field, value, what is wrong, the cure, where it stands."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "configuration"
    origin = next((s for key, s in sources.items() if key.startswith(field)), None)
    where = f" (from {origin})" if origin else ""
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = list(_fields(PipelineConfig))
        near = difflib.get_close_matches(field, known, n=1, cutoff=0.5)
        cure = f"did you mean {near[0]}?" if near else "remove it"
        return f"{field} = {first['input']!r}: no such field; {cure}{where}"
    if first["type"] == "value_error":
        return f"{field}: {message}{where}"
    value = repr(first["input"])
    return f"{field} = {value[:80]}: {message[0].lower()}{message[1:]}; change it{where}"


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
