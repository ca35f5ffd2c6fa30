"""PPO stage: training loop, exact resume from checkpoints, files of the result."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from rlhf.budget import PLANNED, STOPPED_AT, Deadline, stop_line
from rlhf.checkpoints.folder import exclusive, identity_of
from rlhf.checkpoints.uploads import CheckpointUploads
from rlhf.config import PPOConfig, RuntimeConfig
from rlhf.config.lengths import TokenLimits
from rlhf.data.fitting import Fitting
from rlhf.data.rows import PROMPTS_TRAIN, PromptRow, read_rows
from rlhf.errors import DataError, Interrupted, NotFinite
from rlhf.files import expand_home, write_json
from rlhf.gates import Approved
from rlhf.modeling.base import load_policy
from rlhf.modeling.device import fast_float32, prepare_device, retained_heap
from rlhf.modeling.frozen import check_frozen_dtype, holds_stored
from rlhf.modeling.lora import ADAPTER_FOLDER, merge_adapter, save_adapter
from rlhf.modeling.reward import Scorer
from rlhf.modeling.sampling import derive_seed
from rlhf.modeling.weights import save_model
from rlhf.ppo.checkpoint import TrainState, load_checkpoint, save_checkpoint
from rlhf.ppo.models import load_models
from rlhf.ppo.trainer import PPOTrainer
from rlhf.ppo.watchdog import WATCHDOG, Watchdog, make_watchdog
from rlhf.ranks import Ranks
from rlhf.signals import deferred_sigterm
from rlhf.stage import Progress, StageResult, silent

sample_log = logging.getLogger("rlhf.samples")
log = logging.getLogger(__name__)


def train_policy(
    config: PPOConfig,
    data: Path,
    sft: Path,
    reward_model: Approved[Path] | None,
    out_dir: Path,
    *,
    judge: Path | None = None,
    limits: TokenLimits | None = None,
    seed: int = 0,
    identity: Mapping[str, str] | None = None,
    checkpoints: Path | None = None,
    uploads: CheckpointUploads | None = None,
    runtime: RuntimeConfig | None = None,
    progress: Progress = silent,
    deadline: Deadline | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> StageResult:
    """Optimise the SFT policy with PPO and write the result to `out_dir`.

    With `checkpoints`, training continues from the newest one; a resumed run produces the same
    bytes as an uninterrupted one. At a `deadline` it stops after the update in progress, and the
    policy that the watchdog chooses among those so far goes on; the same call without one goes on
    from that update, to the bytes of a run that had none.

    Args:
        config: Hyper-parameters.
        data: A dataset folder as `prepare_data` writes it; its training prompts are used.
        sft: Folder of the starting policy, which is the KL reference too.
        reward_model: Folder of a reward model that passed its gate (`rlhf.gates.require`); None
            for an environment that needs none.
        out_dir: Empty folder for the policy; `curve.json` has a row per update, `watchdog.json`
            one per look of the watchdog.
        judge: Folder of the judge, by which the watchdog chooses the update whose policy goes on.
        limits: Most tokens of prompts and replies; None lets them fill the policy's context.
        seed: Seeds prompt order and sampling.
        identity: Digests of `data`, `base`, `reward model` and `judge`, as far as they are known;
            the rest is hashed from the folders. A checkpoint with another identity is refused.
        checkpoints: Folder to save to and resume from; None trains without checkpoints.
        uploads: Uploads each saved checkpoint to a store, and restores a newer one from it.
        runtime: Device and threads.
        progress: Called after every update.
        deadline: When to stop at the latest; None makes all updates.
        clock: What the deadline is compared with.

    Raises:
        ConfigError: Rendering mismatch, a checkpoint of other inputs, or another process trains
            with the same checkpoints.
        CheckpointError: A checkpoint can't be written.
        StoreError: A checkpoint can't be uploaded or fetched; local checkpoints are intact.
        DataError: There are no prompts, or the models can't be given too many of them.
        TrainingError: A loss or score is not finite, or no checkpoint is whole. After a loss that
            is not finite a policy that the judge preferred to the start goes on instead.
        Interrupted: SIGTERM arrived; a checkpoint was saved.
    """
    rows = read_rows(data / PROMPTS_TRAIN, PromptRow)
    if not rows:
        raise DataError("no prompts to train the policy on; check data.source")
    runtime = runtime or RuntimeConfig()
    device = prepare_device(runtime)
    check_frozen_dtype(config.frozen_dtype, "ppo", device, runtime)
    trainer = build_trainer(config, sft, reward_model, seed, device, rows, limits)
    fitting = Fitting(trainer.renderer, trainer.limits)
    rows = _fitting_rows(rows, fitting, trainer.models.scorer)
    leads = trainer.models.ranks.is_leader
    watchdog = make_watchdog(trainer, data, judge, rows)
    if watchdog is None:
        judge = None
    run = _run_identity(config, seed, data, sft, reward_model, judge, trainer, identity or {})
    timer = _Timer(config.updates, trainer.models.ranks, deadline, clock)
    with exclusive(checkpoints) if checkpoints and leads else nullcontext():
        state = _run_updates(trainer, rows, watchdog, checkpoints, uploads, run, progress, timer)
    metrics: dict[str, Any] = {"updates": state.update}
    chosen = state.update
    if watchdog:
        chosen = watchdog.conclude(state)
        metrics |= {"chosen_update": chosen, "stopped": int(state.frontier.stopped is not None)}
    if leads:
        _write_result(trainer, state, sft, out_dir)
        if watchdog:
            write_json(out_dir / WATCHDOG, watchdog.report(state))
    if timer.has_stopped:
        metrics |= {STOPPED_AT: state.update, PLANNED: config.updates}
        if leads:
            log.warning("budget: %s (%s)", stop_line(metrics), timer.reason)
    # A row is measured before its update: that of the next one is of the policy that goes on.
    row = state.curve[min(chosen, len(state.curve) - 1)]
    metrics |= {k: row[k] for k in ("reward", "kl", "tokens", "eos_rate")}
    metrics |= {f"{k}_before": state.curve[0][k] for k in ("reward", "tokens", "eos_rate")}
    return StageResult({**metrics, **fitting.metrics()})


def _fitting_rows(
    rows: Sequence[PromptRow], fitting: Fitting, scorer: Scorer | None
) -> list[PromptRow]:
    """Return the prompts that policy and reward model can be given.

    Raises:
        DataError: They are too few.
    """
    fit = (
        fitting.fitting_both(rows, scorer.renderer, scorer.limits)
        if scorer
        else fitting.fitting(rows)
    )
    if not fit:
        raise DataError("no prompt is left to train the policy on; check data.source")
    return fit


def build_trainer(
    config: PPOConfig,
    sft: Path,
    reward_model: Approved[Path] | None,
    seed: int,
    device: torch.device,
    rows: Sequence[PromptRow] = (),
    limits: TokenLimits | None = None,
) -> PPOTrainer:
    """Load models and environment and make the trainer; raises as `load_models`."""
    models, environment, renderer = load_models(
        config, sft, reward_model, seed, device, rows, limits
    )
    return PPOTrainer(config, models, environment, renderer, seed, limits)


def prompts_of_update(
    rows: Sequence[PromptRow], update: int, config: PPOConfig, seed: int
) -> list[PromptRow]:
    """Select the prompts of one update; each epoch is a new seeded shuffle."""
    chosen: list[PromptRow] = []
    order: list[int] = []
    k = config.replies_per_prompt
    first = update * config.chunk_size
    last = min(first + config.chunk_size, config.total_episodes)
    for number in range(first // k, -(-last // k)):
        epoch, position = divmod(number, len(rows))
        if not order or position == 0:
            generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
            order = torch.randperm(len(rows), generator=generator).tolist()
        chosen.append(rows[order[position]])
    return chosen


def checkpoint_score(curve: Sequence[Mapping[str, float]], config: PPOConfig) -> float | None:
    """Score of a checkpoint: the mean of reward − kl_coef·KL over its last updates.

    It is the objective that PPO maximises, averaged over as many updates as lie between two
    checkpoints, in the reward's own units (before any normalisation). The coefficient is the
    configured one: an adaptive controller's value would change the ranking of checkpoints.

    Returns:
        None if the score is not finite.
    """
    rows = curve[-config.checkpoint_every :]
    score = sum(row["reward"] - config.kl_coef * row["kl"] for row in rows) / len(rows)
    return score if math.isfinite(score) else None


def _run_identity(
    config: PPOConfig, seed: int, data: Path, sft: Path, reward_model: Approved[Path] | None,
    judge: Path | None, trainer: PPOTrainer, known: Mapping[str, str],
) -> dict[str, str]:  # fmt: skip
    """Identity of a run for its checkpoints: digests of inputs, configuration, seed.

    A digest that is not in `known` is computed from the folder.
    """
    folders = {"data": data, "base": sft}
    if reward_model is not None:
        folders["reward model"] = reward_model.subject
    if judge is not None:
        folders["judge"] = judge
    if config.comparison and config.comparison.pair_model:
        folders["pair model"] = expand_home(config.comparison.pair_model)
    return identity_of(
        config, folders, known, tokenizer=trainer.renderer.template_hash, seed=str(seed),
        limits=trainer.limits.model_dump_json(exclude={"max_bad_fraction"}),
    )  # fmt: skip


def _run_updates(
    trainer: PPOTrainer, rows: Sequence[PromptRow], watchdog: Watchdog | None,
    checkpoints: Path | None, uploads: CheckpointUploads | None, identity: Mapping[str, str],
    progress: Progress, timer: _Timer,
) -> TrainState:  # fmt: skip
    """Run the remaining updates, saving checkpoints; return the final state."""
    config, ranks = trainer.config, trainer.models.ranks
    if not ranks.is_leader:
        uploads = None
    if checkpoints and uploads:
        uploads.restore(checkpoints)
    state = load_checkpoint(checkpoints, trainer.models, identity) if checkpoints else TrainState()
    if state.update:
        log.info("PPO goes on after update %d of %d", state.update, config.updates)
        trainer.load_state_dict(state.trainer)
    sigterm = deferred_sigterm() if checkpoints else nullcontext(lambda: False)
    # The order matters: uploads end before SIGTERM is passed on, which may end the process.
    memory, uploading = retained_heap(trainer.device), uploads or nullcontext()
    with fast_float32(trainer.device), memory, sigterm as terminated, uploading:
        if watchdog and not state.frontier.looks:
            watchdog.look(state)
        while not timer.stops(state):
            metrics = _update(trainer, rows, watchdog, state)
            if metrics is None:
                break
            # After SIGTERM skip progress: the Prefect client may block, and the save must not
            # wait for it.
            if ranks.is_leader and not terminated():
                progress(state.update, config.updates, metrics)
            due = state.update % config.checkpoint_every == 0
            # Writing the result reads the SFT folder again; a failure there must not lose the run.
            ends = state.update == config.updates or state.frontier.stopped is not None
            due |= ends and _base_is_lowered(trainer)
            # With a larger budget training goes on from here.
            due |= timer.stops(state) and timer.has_stopped
            failed = uploads is not None and uploads.failed
            # The decision is shared: a process that decided alone would block the others.
            if checkpoints and ranks.any(due or failed or terminated()):
                if ranks.count > 1:
                    ranks.check_equal("the policy's weights", trainer.models.checksum())
                if ranks.is_leader:
                    state.trainer = trainer.state_dict()
                    saved = save_checkpoint(checkpoints, state, trainer.models, identity)
                    if uploads:
                        uploads.submit(saved, state.update, checkpoint_score(state.curve, config))
                if ranks.any(terminated()):
                    raise Interrupted(
                        f"SIGTERM after update {state.update} of {config.updates}: saved; run the "
                        "same again to go on from there"
                    )
        _look_at_last(watchdog if timer.has_stopped else None, state)
    return state


def _look_at_last(watchdog: Watchdog | None, state: TrainState) -> None:
    """Look at the policy at which a deadline stopped, if no look at it was due.

    The look is in no checkpoint: a run that goes on does without it, as one without a deadline.
    """
    if watchdog is not None and state.frontier.looks[-1].update != state.update:
        watchdog.look(state)


class _Timer:
    """Ends the updates: after the last one, at a finding of the watchdog, or at a deadline."""

    def __init__(
        self, updates: int, ranks: Ranks, deadline: Deadline | None, clock: Callable[[], float]
    ) -> None:
        self._updates, self._ranks = updates, ranks
        self._deadline, self._clock = deadline, clock
        self._last: tuple[int, float] | None = None
        self.has_stopped = False
        """Whether the deadline ended the updates."""

    @property
    def reason(self) -> str:
        """Budget that is used up at the deadline."""
        return self._deadline.reason if self._deadline else ""

    def stops(self, state: TrainState) -> bool:
        """Return whether no update follows; it may be asked several times after one.

        At least one update is made in all. The next one is taken to last as long as the last one
        of this try, with what belongs to it. All processes get the leader's answer.
        """
        if state.update >= self._updates or state.frontier.stopped or self.has_stopped:
            return True
        if self._deadline is None or (self._last and self._last[0] == state.update):
            return False
        now = self._clock()
        step = now - self._last[1] if self._last else 0.0
        self._last = (state.update, now)
        passes = state.update > 0 and self._deadline.passes(now, step)
        self.has_stopped = self._ranks.from_leader(passes)
        return self.has_stopped


def _update(
    trainer: PPOTrainer, rows: Sequence[PromptRow], watchdog: Watchdog | None, state: TrainState
) -> Mapping[str, float] | None:
    """Perform an update, and a look at its policy if one is due.

    Returns:
        Metrics of the update; None if its loss is not finite and an earlier policy goes on.

    Raises:
        NotFinite: Its loss is not finite, and no earlier policy can go on.
    """
    chunk = prompts_of_update(rows, state.update, trainer.config, trainer.seed)
    try:
        result = trainer.update(state.update, chunk)
    except NotFinite as error:
        if watchdog and watchdog.survive(state, error):
            return None
        raise
    state.update += 1
    state.curve.append({"update": state.update, **result.metrics})
    state.samples += result.samples
    if result.samples:
        # For a display of this process: progress has numbers alone.
        first = result.samples[0]
        sample_log.debug("%s", json.dumps([first["prompt"], first["response"]]))
    if watchdog and watchdog.is_due(state.update):
        watchdog.look(state)
    return result.metrics


def _write_result(trainer: PPOTrainer, state: TrainState, sft: Path, out_dir: Path) -> None:
    policy = trainer.models.accelerator.unwrap_model(trainer.models.policy)
    base = load_policy(sft) if _base_is_lowered(trainer) else None
    if trainer.config.lora is not None:
        # Alone it is a few megabytes, and many of them can be served on one SFT policy.
        save_adapter(policy, out_dir / ADAPTER_FOLDER)
    save_model(merge_adapter(policy, base), out_dir)
    trainer.renderer.tokenizer.save_pretrained(out_dir)
    write_json(out_dir / "curve.json", state.curve)
    write_json(out_dir / "samples.json", state.samples)


def _base_is_lowered(trainer: PPOTrainer) -> bool:
    """Return whether the policy's base is stored in fewer bits during training.

    The result then needs the base's own weights, which are loaded again.
    """
    config = trainer.config
    is_stored = holds_stored(trainer.models.policy)
    return config.lora is not None and (config.precision == "bf16" or is_stored)
