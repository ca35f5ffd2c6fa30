"""Run-time checks of types and array shapes in `rlhf`, by beartype and jaxtyping."""

from __future__ import annotations

import sys

from beartype import BeartypeConf, beartype
from jaxtyping import config, install_import_hook

#: Without `config` and `store`, as beartype refuses typing.Self in pydantic's validators, and
#: without `world`, which has no arrays and whose small functions are called a million times.
MODULES = [
    *("champions", "custom_code", "data", "environments", "errors", "evaluate", "external"),
    *("files", "gates", "launch", "modeling", "ppo", "ranks", "report", "reward", "sft"),
    *("signals", "smoke", "stage", "statistics", "trl_adapter"),
]

#: Accepts an int for a float, as type checkers do (PEP 484).
check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install() -> None:
    """Check all functions of `MODULES`, which must not be imported yet; idempotent.

    Raises:
        RuntimeError: Some of them are imported already and would not be checked.
    """
    if any(getattr(finder, "_rlhf", False) for finder in sys.meta_path):
        return
    names = [f"rlhf.{module}" for module in MODULES]
    if early := [name for name in names if name in sys.modules]:
        raise RuntimeError(f"imported before the type checker was installed: {early}")
    install_import_hook(names, f"{__name__}.check")
    sys.meta_path[0]._rlhf = True


def enable(wanted: bool) -> None:
    """Switch the checks on or off for calls from now on."""
    config.update("jaxtyping_disable", not wanted)
