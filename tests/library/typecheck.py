"""Checks types and array shapes of `rlhf` at run time: `install()` before it is imported."""

from __future__ import annotations

import sys

from beartype import BeartypeConf, beartype
from jaxtyping import config, install_import_hook

#: Not `config` and `store`: beartype refuses typing.Self in pydantic's validators. Not `world`:
#: it has no arrays, and its small functions are called a million times.
MODULES = [
    *("data", "environments", "errors", "evaluate", "gates", "judges", "modeling", "ppo"),
    *("progress", "report", "reward", "sft", "stage", "statistics", "trl_adapter"),
]

#: An int where a float is announced is fine, as it is for type checkers (PEP 484).
check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install() -> None:
    """Check every function of `MODULES` that is imported from now on; a second call does nothing.

    Raises:
        RuntimeError: Some of them are imported already and would go unchecked.
    """
    if any(getattr(finder, "_rlhf", False) for finder in sys.meta_path):
        return
    names = [f"rlhf.{module}" for module in MODULES]
    if early := [name for name in names if name in sys.modules]:
        raise RuntimeError(f"imported before the type checker was installed: {early}")
    install_import_hook(names, f"{__name__}.check")
    sys.meta_path[0]._rlhf = True


def enable(wanted: bool) -> None:
    """Check the calls from now on, or don't."""
    config.update("jaxtyping_disable", not wanted)
