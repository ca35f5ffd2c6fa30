"""Section of the retraining flow: when it trains, and which model it starts from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config.section import Section


class RetrainingConfig(Section):
    """Rules of the retraining flow; a plain run of the pipeline does not ask them."""

    warm_start: Literal["none", "sft", "policy"] = "policy"
    """What of the champion takes the place of the base model: its SFT policy, itself, or nothing.
    With `sft.enabled: false` PPO starts from it directly."""
    min_new_pairs: int = Field(default=1, ge=1)
    """Fewest training pairs that the last retraining did not have."""
    max_age_days: float | None = Field(default=None, gt=0)
    """Age of the champion from which it is trained again whatever is new; none waits for data."""
