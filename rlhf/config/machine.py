"""What a machine knows better than the run that comes to it: its folders, device and threads."""

from __future__ import annotations

import os
from typing import Any

from pydantic import ValidationError

from rlhf.config.pipeline import PipelineConfig, RuntimeConfig
from rlhf.errors import ConfigError

FIELDS = ("work_dir", "report_dir", "cache_gb", "device", "threads")


def on_this_machine(config: PipelineConfig) -> PipelineConfig:
    """The configuration with `runtime` as this machine's environment has it.

    `RLHF_WORK_DIR`, `RLHF_REPORT_DIR`, `RLHF_CACHE_GB`, `RLHF_DEVICE` and `RLHF_THREADS` win over
    what the run says: one run crosses machines whose disks and devices differ.

    Raises:
        ConfigError: A variable holds what its field can't.
    """
    given: dict[str, Any] = {
        name: value for name in FIELDS if (value := os.environ.get(variable(name)))
    }
    if not given:
        return config
    try:
        runtime = RuntimeConfig.model_validate({**config.runtime.model_dump(), **given})
    except ValidationError as error:
        wrong = error.errors()[0]
        name = str(wrong["loc"][0])
        raise ConfigError(
            f"{variable(name)} = {given[name]!r}: {wrong['msg']}; mend this machine's environment"
        ) from None
    return config.model_copy(update={"runtime": runtime})


def variable(field: str) -> str:
    """The environment variable of a field of `runtime`."""
    return f"RLHF_{field.upper()}"
