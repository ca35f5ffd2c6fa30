"""Training stages in child processes, launched by torchrun: the same functions, for `processes`.

The parent loads no torch. It starts the launcher (`agent`), which starts the processes (`worker`);
all talk by files in one temporary folder. Whoever of them ends, the others end too.
"""

from rlhf.launch.stages import train_policy, train_reward_model, train_sft

__all__ = ["train_policy", "train_reward_model", "train_sft"]
