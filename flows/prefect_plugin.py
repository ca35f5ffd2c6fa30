"""Prefect plugin for the command `prefect deployment run rlhf-pipeline`.

Prefect expects `<flow>/<deployment>` there, and the plugin completes the name. It is enabled in
pyproject.toml, so Prefect loads it only in processes that start in the checkout's root. It imports
no other module of the project, and does nothing in any other command.
"""

from __future__ import annotations

import sys
from typing import Any

from prefect.plugins import register_hook

NAME = "rlhf-pipeline"
COMMAND = ["deployment", "run", NAME]


@register_hook
def setup_environment(*, ctx: Any) -> None:
    """Complete the name in the command's arguments; the environment stays unchanged."""
    if sys.argv[0].rpartition("/")[2] == "prefect" and sys.argv[1:4] == COMMAND:
        sys.argv[3] = f"{NAME}/{NAME}"
