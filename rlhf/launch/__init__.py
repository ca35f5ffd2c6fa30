"""Training stages in child processes, launched by torchrun.

The parent, which loads no torch, starts the launcher (`agent`), which starts the children
(`worker`). They communicate by files in one temporary folder. When one of them ends, the others are
ended. With several machines each has such a parent, and the first one's leads.
"""

from rlhf.launch.job import Job, train
from rlhf.launch.nodes import Nodes
from rlhf.launch.parent import launch, take_part

__all__ = ["Job", "Nodes", "launch", "take_part", "train"]
