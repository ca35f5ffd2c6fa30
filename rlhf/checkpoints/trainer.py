"""Checkpoints of TRL's trainers, from which a resumed run equals an uninterrupted one.

transformers' own checkpoints are pickles. They lack what the next log will report and the order of
the epoch's rows, so that a resumed curve is another one, and rows are seen twice or never. Here its
loop calls `CheckpointMixin` where it saves and loads, and `Saves` at every step.

Two states of torch's generator matter. That before an epoch decides the order of its rows, and is
saved. That within a step decides dropout, and is seeded by (seed, step, process), so that neither
the order nor a resumed run depends on what earlier steps drew.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from rlhf.checkpoints.folder import (
    STATE,
    check_shapes,
    exclusive,
    load_optimizer,
    load_tensors,
    newest_of_leader,
    optimizer_tensors,
    read_state,
    saved_shapes,
    write_checkpoint,
)
from rlhf.checkpoints.uploads import CheckpointUploads
from rlhf.errors import Interrupted
from rlhf.files import read_json, write_json
from rlhf.modeling.frozen import holds_stored
from rlhf.modeling.sampling import derive_seed
from rlhf.modeling.weights import save_tensors
from rlhf.ranks import Ranks, rank_and_count
from rlhf.signals import deferred_sigterm
from rlhf.trl_adapter import ProgressCallback, check_finite

#: Names of a checkpoint's files: what is trained, the optimizer, the generator before the epoch.
WEIGHTS, OPTIMIZER, ORDER = "weights", "optimizer", "order"
#: Name that transformers' loop reads its own state from.
TRAINER_STATE = "trainer_state.json"
#: What the state of a checkpoint holds, beside the update.
FIELDS = {"steps", "curve", "losses", "logged", "metrics", "tokens", "rates"}
#: Between two saves passes this multiple of the time of the last one, so that a slow disk or store
#: takes a twentieth of the training.
PAUSE = 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointPlan:
    """Folder, interval, uploads and identity of a trainer's checkpoints."""

    folder: Path
    minutes: float
    """Least minutes between two saves; 0 saves after every step."""
    uploads: CheckpointUploads | None
    """Uploads each checkpoint to a store, and restores a newer one from it."""
    identity: Mapping[str, str]
    """Inputs, configuration and seed; a checkpoint with another identity is refused."""


@contextmanager
def resumable(plan: CheckpointPlan | None) -> Iterator[Saves]:
    """Hold back SIGTERM and lock the plan's folder; yields the saves, to train with.

    It should be the outermost block: on leaving it the signal is delivered, which may end the
    process. Without a plan nothing is saved or held back.

    Raises:
        ConfigError: Another process trains with the folder.
        Interrupted: SIGTERM arrived; a checkpoint was saved.
    """
    if plan is None:
        yield Saves(None, lambda: False)
        return
    leads = rank_and_count()[0] == 0
    plan = plan if leads else dataclasses.replace(plan, uploads=None)
    lock = exclusive(plan.folder) if leads else nullcontext()
    with deferred_sigterm() as terminated, lock, plan.uploads or nullcontext():
        yield Saves(plan, terminated)


class CheckpointMixin:
    """Mixin for a trainer of transformers: its loop saves and loads by `saves`."""

    saves: Saves

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.saves.save()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.saves.load_weights(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.saves.load_optimizer(Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load nothing: `Saves` sets the generator before each epoch and step."""


class Saves(TrainerCallback):
    """The saves of one training, and the states that it resumes with; see `resumable`."""

    def __init__(self, plan: CheckpointPlan | None, terminated: Callable[[], bool]) -> None:
        self._plan, self._terminated = plan, terminated
        self._order: Tensor | None = None  # generator before this epoch
        self._next_order: Tensor | None = None  # before the next one; None until rows are drawn
        self._restored: dict[str, Any] = {}
        self._saved_at = self._took = 0.0

    def train(self, trainer: Any, progress: ProgressCallback) -> None:
        """Train, or go on from the newest checkpoint.

        Raises:
            CheckpointError: A checkpoint can't be written.
            StoreError: A checkpoint can't be uploaded or fetched; local checkpoints are intact.
            ConfigError: The checkpoint belongs to other inputs or another configuration.
            TrainingError: All checkpoints are damaged, or the training diverged.
            Interrupted: SIGTERM arrived; a checkpoint was saved.
        """
        self._trainer, self._progress = trainer, progress
        progress.terminated = self._terminated
        self._ranks = Ranks(*rank_and_count(), trainer.args.device)
        trainer.saves = self
        trainer.add_callback(self)
        newest = self._newest(self._plan) if self._plan else None
        if newest is None:
            trainer.train()
            return
        checkpoint, self._restored = newest
        step, steps = self._restored["update"], self._restored["steps"]
        log.info("training goes on after step %d of %d", step, steps)
        if step >= steps:  # the trainer's loop would make another step in a part of an epoch
            self.load_weights(checkpoint)
            progress.curve[:] = self._restored["curve"]
            return
        self._order = dict(load_tensors(checkpoint, ORDER))[ORDER]
        trainer.train(resume_from_checkpoint=str(checkpoint))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore what was not logged yet, which the trainer's loop has just reset."""
        self._saved_at = time.monotonic()
        if not self._restored:
            return
        trainer, saved = self._trainer, self._restored
        losses = saved["losses"]
        # Of each process; of others than trained before, the mean, which is what the log reports.
        is_same = len(losses) == self._ranks.count
        loss = losses[self._ranks.rank] if is_same else math.fsum(losses) / len(losses)
        trainer._tr_loss.fill_(loss)
        trainer._globalstep_last_logged = saved["logged"]
        trainer._metrics["train"].update(saved["metrics"])
        trainer._total_train_tokens = saved["tokens"]
        self._progress.curve[:] = saved["curve"]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the generator that the order of the epoch's rows is drawn by."""
        self._order = self._order if self._next_order is None else self._next_order
        self._next_order = None
        if self._order is None:
            self._order = torch.get_rng_state()
        torch.set_rng_state(self._order)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seed the step's dropout."""
        if self._next_order is None:  # the epoch's first step here: its rows have been drawn
            self._next_order = torch.get_rng_state()
        torch.manual_seed(derive_seed(args.seed, f"{state.global_step}/{self._ranks.rank}"))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Have the trainer save after its log, if a save is due."""
        plan = self._plan
        if plan is None:
            return
        pause = max(60 * plan.minutes, PAUSE * self._took) if plan.minutes else 0
        due = time.monotonic() - self._saved_at >= pause
        # Writing the result reads the base again; a failure there must not lose the run.
        due |= state.global_step >= state.max_steps and holds_stored(self._trainer.model)
        failed = plan.uploads is not None and plan.uploads.failed
        # The decision is shared: a process that decided alone would block the others.
        control.should_save = self._ranks.any(due or failed or self._terminated())

    def save(self) -> None:
        """Write a checkpoint and queue its upload.

        Raises:
            Interrupted: SIGTERM arrived before.
        """
        assert self._plan is not None
        started = time.monotonic()
        trainer, leads = self._trainer, self._ranks.is_leader
        step, steps = trainer.state.global_step, trainer.state.max_steps
        tensors = {
            WEIGHTS: _whole(trained_tensors(trainer), leads),
            OPTIMIZER: _whole(optimizer_tensors(trainer.optimizer), leads),
            ORDER: {ORDER: self._order_of_next_row()},
        }
        losses = self._ranks.gather(float(trainer._tr_loss))
        if leads:
            saved = self._write(self._plan, tensors, losses)
            if self._plan.uploads:
                self._plan.uploads.submit(saved, step, None)
        self._saved_at = time.monotonic()
        self._took = self._saved_at - started
        if self._ranks.any(self._terminated()):
            raise Interrupted(
                f"SIGTERM after step {step} of {steps}: saved; run the same again to go on from "
                "there"
            )

    def load_weights(self, checkpoint: Path) -> None:
        """Load what is trained."""
        tensors = trained_tensors(self._trainer)
        with torch.no_grad():
            for name, saved in load_tensors(checkpoint, WEIGHTS):
                tensors[name].copy_(_like(tensors[name], saved))

    def load_optimizer(self, checkpoint: Path) -> None:
        """Load the optimizer's state and the position in the schedule."""
        optimizer, scheduler = self._trainer.optimizer, self._trainer.lr_scheduler
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        tensors = load_tensors(checkpoint, OPTIMIZER)
        load_optimizer(
            optimizer, ((key, _like(weights[int(key.split("/")[0])], t)) for key, t in tensors)
        )
        step, rates = self._restored["update"], self._restored["rates"]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        position = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
        scheduler.load_state_dict({**scheduler.state_dict(), **position})

    def _newest(self, plan: CheckpointPlan) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest intact checkpoint, from the folder or the store, and its state."""

        def read(checkpoint: Path) -> dict[str, Any]:
            saved = read_state(checkpoint, plan.identity)
            if read_json(checkpoint / TRAINER_STATE)["global_step"] != saved["update"]:
                raise ValueError(f"{TRAINER_STATE} is of another step")
            if missing := FIELDS - {*saved}:
                raise ValueError(f"{STATE} lacks {', '.join(sorted(missing))}")
            check_shapes(checkpoint, WEIGHTS, trained_tensors(self._trainer))
            check_shapes(checkpoint, ORDER, {ORDER: torch.get_rng_state()})
            saved_shapes(checkpoint, OPTIMIZER)
            return saved

        if plan.uploads:
            plan.uploads.restore(plan.folder)
        return newest_of_leader(plan.folder, read, self._ranks)

    def _order_of_next_row(self) -> Tensor:
        """Return the generator's state before the epoch of the next step."""
        state = self._trainer.state
        order = self._next_order if float(state.epoch).is_integer() else self._order
        assert order is not None
        return order

    def _write(
        self, plan: CheckpointPlan, tensors: Mapping[str, Mapping[str, Tensor]],
        losses: list[float],
    ) -> Path:  # fmt: skip
        trainer = self._trainer
        step, metrics = trainer.state.global_step, dict(trainer._metrics["train"])
        check_finite({name: math.fsum(values) for name, values in metrics.items()}, step)
        state = {
            "update": step, "steps": trainer.state.max_steps, "identity": dict(plan.identity),
            "curve": self._progress.curve, "losses": losses, "metrics": metrics,
            "logged": trainer._globalstep_last_logged, "tokens": trainer._total_train_tokens,
            "rates": [group["lr"] for group in trainer.optimizer.param_groups],
        }  # fmt: skip
        # Its logs are in the curve.
        of_loop = {**dataclasses.asdict(trainer.state), "log_history": []}

        def write(partial: Path) -> None:
            for name, group in tensors.items():
                save_tensors(group, partial, name)
            write_json(partial / TRAINER_STATE, of_loop)
            write_json(partial / STATE, state)

        return write_checkpoint(plan.folder, step, write)


def trained_tensors(trainer: Any) -> dict[str, Tensor]:
    """Return the weights that a trainer changes, and the buffers that belong to its model."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    saved = model.state_dict()
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return weights | {name: b for name, b in model.named_buffers() if name in saved}


def _whole(tensors: Mapping[str, Tensor], leads: bool) -> dict[str, Tensor]:
    """Gather sharded tensors in the leading process."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            gathered = tensor.full_tensor()
            if leads:
                whole[name] = gathered.cpu()
        else:
            whole[name] = tensor
    return whole


def _like(weight: Tensor, saved: Tensor) -> Tensor:
    """Shard a saved tensor as a weight is; an optimizer's counters stay whole."""
    if isinstance(weight, DTensor) and saved.shape == weight.shape:
        saved = saved.to(weight.device)
        return distribute_tensor(saved, weight.device_mesh, weight.placements)
    return saved
