"""What a machine knows better than the run that comes to it: its folders, device and threads."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from rlhf.config.pipeline import PipelineConfig
from rlhf.config.section import Section
from rlhf.errors import ConfigError

#: Fields that a machine knows better, by section.
FIELDS = {
    "runtime": ("work_dir", "report_dir", "cache_gb", "device", "threads"),
    "tracking": ("log_dir",),
}


def on_this_machine(config: PipelineConfig) -> PipelineConfig:
    """The configuration with `runtime` and `tracking` as this machine's environment has them.

    `RLHF_WORK_DIR`, `RLHF_REPORT_DIR`, `RLHF_CACHE_GB`, `RLHF_DEVICE`, `RLHF_THREADS` and
    `RLHF_LOG_DIR` win over what the run says: one run crosses machines whose disks and devices
    differ.

    Raises:
        ConfigError: A variable holds what its field can't.
    """
    sections = {name: _section(getattr(config, name), fields) for name, fields in FIELDS.items()}
    return config.model_copy(update=sections)


def _section(section: Section, fields: Iterable[str]) -> Section:
    """A section with what the environment holds of these fields."""
    given: dict[str, Any] = {
        name: value for name in fields if (value := os.environ.get(variable(name)))
    }
    if not given:
        return section
    try:
        return type(section).model_validate({**section.model_dump(), **given})
    except ValidationError as error:
        wrong = error.errors()[0]
        name = str(wrong["loc"][0])
        raise ConfigError(
            f"{variable(name)} = {given[name]!r}: {wrong['msg']}; mend this machine's environment"
        ) from None


def variable(field: str) -> str:
    """The environment variable of a field of `runtime` or `tracking`."""
    return f"RLHF_{field.upper()}"
