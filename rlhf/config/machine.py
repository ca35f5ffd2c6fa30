"""Settings of a machine: `RLHF_*` variables for `runtime` and `tracking`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from rlhf.config.pipeline import PipelineConfig
from rlhf.config.section import Section
from rlhf.errors import ConfigError

#: Fields that an environment variable overrides, by section.
FIELDS = {
    "runtime": ("work_dir", "report_dir", "cache_gb", "device", "threads"),
    "tracking": ("log_dir",),
}


def on_this_machine(config: PipelineConfig) -> PipelineConfig:
    """Apply this machine's environment to `runtime` and `tracking`.

    `RLHF_WORK_DIR`, `RLHF_REPORT_DIR`, `RLHF_CACHE_GB`, `RLHF_DEVICE`, `RLHF_THREADS` and
    `RLHF_LOG_DIR` win over the configuration, because one run may cross machines with different
    disks and devices.

    Raises:
        ConfigError: A variable holds a value that its field refuses.
    """
    sections = {
        name: _with_variables(getattr(config, name), fields) for name, fields in FIELDS.items()
    }
    return config.model_copy(update=sections)


def variable(field: str) -> str:
    """The environment variable of a field of `runtime` or `tracking`."""
    return f"RLHF_{field.upper()}"


def _with_variables(section: Section, fields: Iterable[str]) -> Section:
    values: dict[str, Any] = {
        name: value for name in fields if (value := os.environ.get(variable(name)))
    }
    if not values:
        return section
    try:
        return type(section).model_validate({**section.model_dump(), **values})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise ConfigError(
            f"{variable(name)} = {values[name]!r}: {first['msg']}; mend this machine's environment"
        ) from None
