"""rlhf-pipeline: from human preferences to a promoted policy.

Library of data, SFT, reward model, PPO, evaluation, gates and store, and the names of the Python
API (docs/python.md). Nothing here knows about Prefect; `tasks` and `flows` do. Submodules are
imported where they are used, so that loading a configuration never loads torch.
"""

import logging
from importlib import import_module
from typing import Any

# peft imports bitsandbytes wherever it is installed, and on a CPU that warns of a kernel it lacks.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"

#: Public names, each with the module that defines it, which is imported when the name is first
#: used. The first three stand above this package and are its users, like a person's script: no
#: module of this package uses them.
PUBLIC = {
    "Pipeline": "flows.python_api",
    "Policy": "tasks.model_handles",
    "RewardModel": "tasks.model_handles",
    "prepare_data": "rlhf.data.prepare",
    "train_sft": "rlhf.sft",
    "train_reward_model": "rlhf.reward",
    "evaluate_reward_model": "rlhf.evaluation.reward_model",
    "train_policy": "rlhf.ppo.train",
    "evaluate_policy": "rlhf.evaluation.policy",
}


def __getattr__(name: str) -> Any:
    """Import a public name."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
    value = getattr(import_module(PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names too, for completion."""
    return sorted({*globals(), *PUBLIC})
