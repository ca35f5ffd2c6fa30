"""Reward functions and environments: the sources of a reply's reward."""

from rlhf.environments.build import build_environment
from rlhf.environments.contract import Environment, Reply, Reward, Scored, Stop
from rlhf.environments.model import ModelReward, check_rendering

__all__ = [
    "Environment",
    "ModelReward",
    "Reply",
    "Reward",
    "Scored",
    "Stop",
    "build_environment",
    "check_rendering",
]
