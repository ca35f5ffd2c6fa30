"""Library of rlhf-pipeline: data, SFT, reward model, PPO, evaluation, gates, store.

Nothing here knows about Prefect; `tasks` and `flows` do. Submodules are imported where they are
used, so that loading a configuration never loads torch.
"""

import logging

# peft imports bitsandbytes wherever it is installed, and on a CPU that warns of a kernel it lacks.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
