"""PPO's checkpoints: the state of training in a folder of `rlhf.checkpoints`.

Random generators are not part of it: every draw is seeded by (seed, update), so the update counter
is the state of generators, prompt order and learning-rate schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.checkpoints.folder import (
    STATE,
    check_shapes,
    load_optimizer,
    load_tensors,
    newest_of_leader,
    optimizer_tensors,
    read_state,
    saved_shapes,
    write_checkpoint,
)
from rlhf.files import write_json
from rlhf.modeling.weights import save_tensors
from rlhf.ppo.frontier import Frontier
from rlhf.ppo.models import Models

#: Name of the files with the frontier's retained weights.
RETAINED = "retained"


@dataclass
class TrainState:
    """Training state beside weights and optimizers."""

    update: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    trainer: dict[str, Any] = field(default_factory=dict)
    frontier: Frontier = field(default_factory=Frontier)
    """Looks of the watchdog; none without one."""
    retained: dict[str, Tensor] = field(default_factory=dict)
    """The frontier's retained weights of the policy; in the leading process only."""

    def values(self) -> dict[str, Any]:
        """Return all but the weights, as JSON values."""
        values = {name: value for name, value in vars(self).items() if name != RETAINED}
        return {**values, "frontier": self.frontier.state_dict()}


def save_checkpoint(
    folder: Path, state: TrainState, models: Models, identity: Mapping[str, str]
) -> Path:
    """Write a checkpoint under `folder` atomically and delete all but the newest two.

    Raises:
        CheckpointError: It can't be written, as on a full disk; earlier checkpoints are intact.
    """

    def write(partial: Path) -> None:
        for name, parameters in models.parameters.items():
            save_tensors(parameters, partial, name)
        for name, optimizer in models.optimizers.items():
            save_tensors(optimizer_tensors(optimizer), partial, f"optimizer-{name}")
        if state.retained:
            save_tensors(state.retained, partial, RETAINED)
        write_json(partial / STATE, {**state.values(), "identity": dict(identity)})

    return write_checkpoint(folder, state.update, write)


def load_checkpoint(folder: Path, models: Models, identity: Mapping[str, str]) -> TrainState:
    """Load the newest intact checkpoint under `folder`; return a fresh state if none.

    Raises:
        ConfigError: The checkpoint belongs to another base, tokenizer, reward model, data, seed or
            configuration.
        TrainingError: All checkpoints are damaged.
    """

    def read(checkpoint: Path) -> TrainState:
        saved = read_state(checkpoint, identity)
        frontier = Frontier.of(saved.pop("frontier"))
        state = TrainState(**saved, frontier=frontier)
        _check_files(checkpoint, models, state)
        return state

    newest = newest_of_leader(folder, read, models.ranks)
    if newest is None:
        return TrainState()
    checkpoint, state = newest
    _load_tensors(checkpoint, models)
    if state.frontier.looks and models.ranks.is_leader:
        state.retained |= load_tensors(checkpoint, RETAINED)
    return state


def _check_files(checkpoint: Path, models: Models, state: TrainState) -> None:
    """Check names, shapes and file lengths, before any tensor is loaded."""
    wanted = dict(models.parameters)
    if state.frontier.looks:
        wanted[RETAINED] = models.parameters["policy"]
    for name, parameters in wanted.items():
        check_shapes(checkpoint, name, parameters)
    for name in models.optimizers:
        saved_shapes(checkpoint, f"optimizer-{name}")


def _load_tensors(checkpoint: Path, models: Models) -> None:
    with torch.no_grad():
        for name, parameters in models.parameters.items():
            for key, weights in load_tensors(checkpoint, name):
                parameters[key].copy_(weights)
    for name, optimizer in models.optimizers.items():
        load_optimizer(optimizer, load_tensors(checkpoint, f"optimizer-{name}"))
