"""Evaluation stages: reward models and policies on held-out data."""

from rlhf.evaluation.common import EVALUATION, SAMPLES
from rlhf.evaluation.policy import evaluate_policy
from rlhf.evaluation.reward_model import evaluate_reward_model

__all__ = ["EVALUATION", "SAMPLES", "evaluate_policy", "evaluate_reward_model"]
