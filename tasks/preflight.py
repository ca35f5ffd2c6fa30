"""What can be known to fail is found out before anything expensive starts."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf.config import PipelineConfig
from rlhf.data.sources import source_digest
from rlhf.errors import ConfigError
from tasks.runner import store_of


def preflight(config: PipelineConfig) -> None:
    """Check folders, store, data source and base model.

    Raises:
        ConfigError: One line naming field, value and cure (StoreConfigError for the store).
    """
    for field in ("work_dir", "report_dir"):
        _check_writable(f"runtime.{field}", Path(getattr(config.runtime, field)).expanduser())
    store = store_of(config)
    store.check()
    source_digest(config.data, config.store_options)
    for field, path in (
        ("base.path", config.base.path),
        ("reward_model.base", config.reward_model.base),
    ):
        if path is None:
            continue
        if path.startswith("artifact:"):
            store.resolve(path)
        elif (
            path.startswith((".", "/", "~"))
            and not (Path(path).expanduser() / "config.json").is_file()
        ):
            raise ConfigError(
                f"{field} = {path!r}: no model there (no config.json); give a folder that holds "
                "config.json and safetensors, a hub id or artifact:<digest>"
            )


def _check_writable(field: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{field} = {str(folder)!r}: can't be created ({error.strerror}); choose another folder"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{field} = {str(folder)!r}: not writable; choose another folder")
