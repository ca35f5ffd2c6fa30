"""Training stages in child processes, launched by torchrun.

The parent, which loads no torch, starts the launcher (`agent`), which starts the children
(`worker`). They communicate by files in one temporary folder. When one of them ends, the others are
ended.
"""

from rlhf.launch.job import Job, train
from rlhf.launch.parent import launch

__all__ = ["Job", "launch", "train"]
