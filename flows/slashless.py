"""Lets Prefect's command line accept `prefect deployment run rlhf-pipeline`.

Prefect wants `<flow>/<deployment>` there. This plugin, enabled in pyproject.toml and so only in a
process that starts in the checkout's root, writes the name in full; it imports nothing of ours and
does nothing in any other process.
"""

from __future__ import annotations

import sys
from typing import Any

from prefect.plugins import register_hook

NAME = "rlhf-pipeline"
COMMAND = ["deployment", "run", NAME]


@register_hook
def setup_environment(*, ctx: Any) -> None:
    """Complete the one command line; no environment is changed."""
    if sys.argv[0].rpartition("/")[2] == "prefect" and sys.argv[1:4] == COMMAND:
        sys.argv[3] = f"{NAME}/{NAME}"
