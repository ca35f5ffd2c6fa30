"""Runs of PPO on the toy task, for the tests of PPO."""

from __future__ import annotations

from pathlib import Path

from rlhf.config import LoraConfig
from tests.library import toys

LORA = LoraConfig(r=4, alpha=16.0)


class Stopped(Exception):
    """The machine goes away."""


def assert_same_run(a: Path, b: Path) -> None:
    toys.assert_same_weights(a, b)
    for name in ("curve.json", "samples.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
