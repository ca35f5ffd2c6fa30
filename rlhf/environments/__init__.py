"""Where the reward of a reply comes from: reward functions and environments."""

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
