"""Loading a configuration: defaults, then a YAML preset, then overrides.

Defaults depend on whether the base is pretrained (`rlhf/config/pretrained.py`), and a preset's
section `from_scratch` holds only without one. The source of each value is kept for messages,
reports and `rlhf config show`. A machine's `RLHF_*` variables are applied last, by each process
that uses the configuration.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ValidationError, model_serializer

from rlhf.config.fields import field_types, flatten, resolve_none
from rlhf.config.messages import cure, explain, unusual_values
from rlhf.config.overrides import Replacement, parse_overrides
from rlhf.config.pipeline import PipelineConfig
from rlhf.config.ppo import COMPAT, by_field_names
from rlhf.config.pretrained import given_values, pretrained_defaults
from rlhf.config.rewards import read_mapping
from rlhf.config.section import Section, Tree
from rlhf.config.text import BROKEN, as_written, one_line, parse, reason
from rlhf.errors import ConfigError
from rlhf.files import expand_home, is_file
from rlhf.limits import check_tree, read_text

#: Sources of values; the other sources are files and `compat`.
DEFAULT = "default"
PRETRAINED = "pretrained default"
COMMAND_LINE = "command line"
OVERRIDE = "override"

#: Section of a preset, of any fields: values for a model that is trained from scratch.
FROM_SCRATCH = "from_scratch"

#: Folder of the presets in this checkout.
PRESETS = Path(__file__).parents[2] / "configs"
#: Variable that names a folder with presets of the user's own, for deployments.
OWN_PRESETS = "RLHF_PRESETS"

#: Fields that an environment variable overrides, by section.
MACHINE_FIELDS = {
    "runtime": ("work_dir", "report_dir", "cache_gb", "device", "threads"),
    "tracking": ("log_dir",),
    "costs": ("price_per_hour",),
}


class LoadedConfig(Section):
    """A configuration with the source of each value; as JSON without these."""

    config: PipelineConfig
    """The configuration."""
    sources: Mapping[str, str]
    """Source of each value by its dotted name; a value without one is a default."""
    shipped_preset: str | None = None
    """Name of the file among the sources that is one of this checkout's presets, if one is."""

    @model_serializer
    def _as_configuration(self) -> Tree:
        # The form that Prefect stores and shows among a run's parameters.
        return self.config.model_dump(mode="json")

    def rows(self) -> list[tuple[str, str, str]]:
        """Return (dotted name, value, source) of every value, in the sections' order."""
        return [
            (key, as_written(value), self._source(key))
            for key, value in flatten(self.config.model_dump(mode="json"))
        ]

    def advice(self) -> list[str]:
        """Return one line for each unusual value of the user's own.

        Values of the project's own presets are chosen with care, and defaults are as advised.
        """
        return [
            line for keys, line in unusual_values(self.config) if any(map(self._is_users_own, keys))
        ]

    def _is_users_own(self, key: str) -> bool:
        source = self._source(key)
        is_default = source in (DEFAULT, PRETRAINED) or self._is_pretrained_default(key)
        return source != self.shipped_preset and not is_default

    def _source(self, key: str) -> str:
        """Return the source of a value, or of the text or file that it was a part of."""
        parent = key
        while parent and parent not in self.sources:
            parent = parent.rpartition(".")[0]
        peer = self.config.ppo.compat
        from_peer = peer and key.removeprefix("ppo.") in COMPAT[peer]
        default = PRETRAINED if self._is_pretrained_default(key) else DEFAULT
        return self.sources.get(parent, f"compat={peer}" if from_peer else default)

    def _is_pretrained_default(self, key: str) -> bool:
        """Return whether a value is the default that a pretrained base gives its field."""
        section, _, field = key.partition(".")
        defaults = pretrained_defaults(given_values(self.config)).get(section, {})
        return (
            field in defaults and getattr(getattr(self.config, section), field) == defaults[field]
        )


def load_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Load a preset file with overrides such as `--ppo.kl_coef=0.05`.

    Raises:
        ConfigError: One line naming the field, the value and the cure.
    """
    command_line = parse_overrides(overrides)
    return _load(Path(path) if path is not None else None, command_line, COMMAND_LINE)


def load_preset(name: str | None, overrides: Tree) -> LoadedConfig:
    """Load a preset by its name in `presets()`, with a tree of overrides.

    Raises:
        ConfigError: One line naming the field, the value and the cure.
    """
    files = _preset_files()
    if name is not None and name not in files:
        known = ", ".join(sorted(files))
        raise ConfigError(
            one_line(
                f"preset = {name!r} is not known here; choose one of {known}, or put its file into "
                f"the folder of {OWN_PRESETS}"
            )
        )
    path = files[name] if name is not None else None
    return _load(path, _checked(overrides), OVERRIDE)


def load_source(
    source: str | Path | Mapping[str, Any] | PipelineConfig | LoadedConfig | None,
    overrides: Mapping[str, Any],
) -> LoadedConfig:
    """Load what a Python caller gives as a configuration, with values that differ from it.

    Args:
        source: Name of a preset, path of a YAML file, values by section, or a configuration; None
            has the defaults alone.
        overrides: Sections as mappings of their fields, or as section objects, of which the fields
            that were set count.

    Raises:
        ConfigError: One line naming the field, the value and the cure.
    """
    if isinstance(source, LoadedConfig) and not overrides:
        return source
    changes = cast("Tree", _plain(_checked(overrides)))
    if isinstance(source, LoadedConfig | PipelineConfig):
        config = source.config if isinstance(source, LoadedConfig) else source
        return load_preset(None, _merge(config.model_dump(mode="json"), changes))
    if isinstance(source, Mapping):
        return load_preset(None, _merge(cast("Tree", _plain(_checked(source))), changes))
    if not isinstance(source, str | Path | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            f"config = {as_written(source)}: is of type {type(source).__name__}; give the name of "
            "a preset, the path of a YAML file, a mapping, or a configuration"
        )
    is_path = isinstance(source, Path) or (
        source is not None and source not in presets() and _is_like_path(source)
    )
    if is_path:
        return _load(expand_home(str(source)), changes, OVERRIDE)
    return load_preset(cast("str | None", source), changes)


def presets() -> list[str]:
    """Return the names of the presets in this checkout's folder `configs`, and of the user's own.

    The variable RLHF_PRESETS names a folder of these: `<name>.yaml`, or `<name>/config.yaml` as
    `rlhf init` writes it.
    """
    return sorted(_preset_files())


def apply_machine_settings(config: PipelineConfig) -> PipelineConfig:
    """Apply this machine's environment to `runtime`, `tracking` and `costs`.

    `RLHF_WORK_DIR`, `RLHF_REPORT_DIR`, `RLHF_CACHE_GB`, `RLHF_DEVICE`, `RLHF_THREADS`,
    `RLHF_LOG_DIR` and `RLHF_PRICE_PER_HOUR` win over the configuration, because one run may cross
    machines with different disks, devices and prices.

    Raises:
        ConfigError: A variable holds a value that its field refuses.
    """
    sections = {
        name: _with_variables(getattr(config, name), fields)
        for name, fields in MACHINE_FIELDS.items()
    }
    return config.model_copy(update=sections)


def environment_variable(field: str) -> str:
    """Return the environment variable of a field of `runtime`, `tracking` or `costs`."""
    return f"RLHF_{field.upper()}"


def _preset_files() -> dict[str, Path]:
    """Return the presets' files by name; a name of this checkout's own can't be taken."""
    folder = os.environ.get(OWN_PRESETS)
    own = expand_home(folder) if folder else PRESETS
    return {
        **{path.parent.name: path for path in own.glob("*/config.yaml")},
        **{path.stem: path for path in (*own.glob("*.yaml"), *PRESETS.glob("*.yaml"))},
    }


def _checked(overrides: Mapping[str, Any]) -> Tree:
    """Return overrides by their fields' names.

    Raises:
        ConfigError: They are nested too deeply, or give a field two values.
    """
    try:
        check_tree(overrides)
    except ValueError as error:
        raise ConfigError(f"overrides: {error}") from None
    return by_field_names(overrides)


def _is_like_path(text: str) -> bool:
    return "/" in text or text.endswith((".yaml", ".yml")) or is_file(Path(text))


def _plain(value: Any) -> Any:
    """Return Python values as those that YAML can hold: paths as text, objects as mappings."""
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json", exclude_unset=True))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    return str(value) if isinstance(value, Path) else value


def _load(path: Path | None, overrides: Tree, override_source: str) -> LoadedConfig:
    """Merge defaults, preset and overrides, and validate the result."""
    name = path.name if path is not None else ""
    preset = _for_base(_read_preset(path), overrides, name) if path is not None else {}
    merged = _merge(_with_env_config_read(preset, overrides, name), overrides)
    overridden = {key for key, _ in flatten(resolve_none(overrides))}
    tree = resolve_none(merged)
    sources = {key: override_source if key in overridden else name for key, _ in flatten(tree)}
    try:
        config = PipelineConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, sources)) from None
    is_shipped = path is not None and path.resolve().parent == PRESETS
    return LoadedConfig(config=config, sources=sources, shipped_preset=name if is_shipped else None)


def _read_preset(path: Path) -> Tree:
    """Read a YAML preset as a tree by field names."""
    setting = f"config = {str(path)!r}"
    if not is_file(path):
        raise ConfigError(
            one_line(
                f"{setting}: no such file; give the path of a YAML preset, for example "
                "configs/quickstart.yaml"
            )
        )
    try:
        tree: Any = parse(read_text(path))
    except OSError as error:
        raise ConfigError(
            one_line(f"{setting}: can't be read ({error.strerror}); check the file and its rights")
        ) from None
    except BROKEN as error:
        raise ConfigError(
            one_line(f"{setting}: not valid YAML ({reason(error)}); mend it there")
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(one_line(f"{setting}: must hold `key: value` lines at the top"))
    try:
        return by_field_names(cast("Tree", tree))
    except ConfigError as error:
        raise ConfigError(one_line(f"{error} (from {path.name})")) from None


def _for_base(preset: Tree, overrides: Tree, name: str) -> Tree:
    """Return a preset with its section `from_scratch` merged, or without it for a pretrained base.

    In the preset it wins over the same fields outside of the section.

    Raises:
        ConfigError: It is no mapping, or has a name that is no field's.
    """
    rest = {key: value for key, value in preset.items() if key != FROM_SCRATCH}
    section = preset.get(FROM_SCRATCH)
    if section is None:
        return rest
    if not isinstance(section, dict):
        raise ConfigError(f"{FROM_SCRATCH}: is a section; set fields in it (from {name})")
    try:
        values = by_field_names(cast("Tree", section))
    except ConfigError as error:
        raise ConfigError(one_line(f"{FROM_SCRATCH}.{error} (from {name})")) from None
    # Checked here, because a pretrained base leaves the values unread.
    for key, _ in flatten(values):
        if field_types(str(key)) is None:
            text = f"{FROM_SCRATCH}.{key} is not a field of the configuration; {cure(str(key))}"
            raise ConfigError(one_line(f"{text} (from {name})"))
    if (given_values(values.get("base"))).get("path") is not None:
        raise ConfigError(
            f"{FROM_SCRATCH}.base.path: the section is for models without one; move it out of "
            f"the section (from {name})"
        )
    tree = resolve_none(_merge(rest, overrides))
    if given_values(tree.get("base")).get("path") is not None:
        return rest
    if given_values(tree.get("reward_model")).get("base") is not None:
        # Trained from a pretrained model of its own.
        values = {key: value for key, value in values.items() if key != "reward_model"}
    return _merge(rest, values)


def _with_env_config_read(preset: Tree, overrides: Tree, name: str) -> Tree:
    """Return the preset, its `env_config` parsed if overrides change a value in it."""
    try:
        text, values = (tree["ppo"]["env_config"] for tree in (preset, overrides))
    except (KeyError, TypeError):
        return preset
    replaced = isinstance(values, Replacement) or not isinstance(values, dict)
    if replaced or not isinstance(text, str):
        return preset
    try:
        options = read_mapping(text, "env_config")
    except ValueError as error:
        raise ConfigError(one_line(f"ppo.env_config: {error} (from {name})")) from None
    return {**preset, "ppo": {**preset["ppo"], "env_config": options}}


def _merge(base: Tree, top: Tree) -> Tree:
    """Merge `top` into `base`; a `Replacement` in it replaces instead."""
    merged = dict(base)
    for key, value in top.items():
        current = merged.get(key)
        replaces = isinstance(value, Replacement) or not isinstance(value, dict)
        if isinstance(current, dict) and not replaces:
            merged[key] = _merge(cast("Tree", current), cast("Tree", value))
        else:
            merged[key] = value
    return merged


def _with_variables(section: Section, fields: Iterable[str]) -> Section:
    """Return a section with the values that environment variables give its fields."""
    values: dict[str, Any] = {
        name: value for name in fields if (value := os.environ.get(environment_variable(name)))
    }
    if not values:
        return section
    try:
        return type(section).model_validate({**section.model_dump(), **values})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise ConfigError(
            f"{environment_variable(name)} = {values[name]!r}: {first['msg']}; "
            "mend this machine's environment"
        ) from None
