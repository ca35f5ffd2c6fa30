"""NF4: sizes, the package that rounds to it, the check that it is there; loads without torch."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from rlhf.errors import ConfigError

#: Weights that share a scale, and scales that share one of theirs, as in the paper.
BLOCK, SCALE_BLOCK = 64, 256
#: Bytes of a weight in NF4, with its share of the scales.
NF4_BYTES = 0.5 + 1 / BLOCK + 4 / (BLOCK * SCALE_BLOCK)


def check_package(section: str) -> None:
    """Refuse NF4 where bitsandbytes, an optional dependency, is not installed.

    Args:
        section: The section whose `frozen_dtype` it is.

    Raises:
        ConfigError: It is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{section}.frozen_dtype = 'nf4' needs bitsandbytes, which is not installed; run "
            "`pip install bitsandbytes`, or set it to auto"
        )


def functions() -> Any:
    """Return bitsandbytes' functions; loading it takes a second, and torch."""
    return importlib.import_module("bitsandbytes.functional")
