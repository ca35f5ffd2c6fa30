"""Stage: PPO. Updates, checkpoints, and the exact resume from one."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from rlhf.config import PPOConfig, RuntimeConfig
from rlhf.config.processes import WHERE
from rlhf.data.rendering import Renderer
from rlhf.data.rows import PROMPTS_TRAIN, PromptRow, read_rows
from rlhf.errors import DataError, Interrupted
from rlhf.gates import Approved
from rlhf.modeling.base import device_of, load_policy
from rlhf.modeling.lora import merged
from rlhf.modeling.matmul import fast_float32
from rlhf.modeling.shards import save_model
from rlhf.paths import at_home
from rlhf.ppo.build import build_trainer
from rlhf.ppo.checkpoint import TrainState, load_checkpoint, save_checkpoint, sole_user
from rlhf.ppo.memory import kept
from rlhf.ppo.termination import deferred_sigterm
from rlhf.ppo.trainer import PPOTrainer, mix
from rlhf.ppo.upload import CheckpointUploads
from rlhf.progress import Progress, silent
from rlhf.stage import StageResult, write_json

log = logging.getLogger(__name__)


def train_policy(
    config: PPOConfig,
    data: Path,
    sft: Path,
    reward_model: Approved[Path] | None,
    out_dir: Path,
    *,
    seed: int = 0,
    identity: Mapping[str, str] | None = None,
    checkpoints: Path | None = None,
    uploads: CheckpointUploads | None = None,
    runtime: RuntimeConfig | None = None,
    progress: Progress = silent,
) -> StageResult:
    """Optimise the SFT policy against the reward model and write the result to `out_dir`.

    Args:
        config: Hyper-parameters.
        data: A dataset folder as `prepare_data` writes it; its training prompts are used.
        sft: Folder of the starting policy, which is the KL reference too.
        reward_model: Folder of a reward model that passed its gate (`rlhf.gates.require`); None
            for an environment that needs none.
        out_dir: Empty folder for the policy; `curve.json` has a row per update.
        seed: Seeds prompt order and sampling.
        identity: Digests of `data`, `base` and `reward model`, where they are known; a
            checkpoint of others is refused.
        checkpoints: Folder to save to and resume from; none trains without.
        uploads: Sends what is saved there to a store, and fetches from it what is newer.
        runtime: Device and threads.
        progress: Told of every update.

    Raises:
        ConfigError: Rendering mismatch, a checkpoint of other inputs, or another process trains
            with the same checkpoints.
        CheckpointError: A checkpoint can't be written.
        StoreError: A checkpoint can't be uploaded, or fetched; what was learnt is saved.
        DataError: There are no prompts.
        TrainingError: A loss or score is not finite, or no checkpoint is whole.
        Interrupted: SIGTERM came; a checkpoint was saved.
    """
    rows = read_rows(data / PROMPTS_TRAIN, PromptRow)
    if not rows:
        raise DataError("no prompts to train the policy on; check data.source")
    device = device_of(runtime or RuntimeConfig())
    trainer = build_trainer(config, sft, reward_model, seed, device, rows)
    leads = trainer.models.ranks.leads
    who = _identity(config, seed, data, sft, reward_model, trainer.renderer, identity or {})
    with sole_user(checkpoints) if checkpoints and leads else nullcontext():
        state = _updates(trainer, rows, checkpoints, uploads, who, progress)
    if leads:
        _write(trainer, state, sft, out_dir)
    last = state.curve[-1]
    return StageResult(
        {"updates": state.update, **{k: last[k] for k in ("reward", "kl", "tokens", "eos_rate")}}
    )


def _updates(
    trainer: PPOTrainer, rows: Sequence[PromptRow], checkpoints: Path | None,
    uploads: CheckpointUploads | None, who: Mapping[str, str], progress: Progress,
) -> TrainState:  # fmt: skip
    """All updates that are left to do."""
    config, ranks = trainer.config, trainer.models.ranks
    if not ranks.leads:
        uploads = None
    if checkpoints and uploads:
        uploads.restore(checkpoints)
    ranks.barrier()  # all wait for what is restored
    state = load_checkpoint(checkpoints, trainer.models, who) if checkpoints else TrainState()
    if state.update:
        log.info("PPO goes on after update %d of %d", state.update, config.updates)
        trainer.load_state_dict(state.trainer)
    hold = deferred_sigterm() if checkpoints else nullcontext(lambda: False)
    # Uploads end before SIGTERM is passed on, which may end the process.
    memory, sent = kept(trainer.device), uploads or nullcontext()
    with fast_float32(trainer.device), memory, hold as terminated, sent:
        while state.update < config.updates:
            chunk = prompts_of_update(rows, state.update, config, trainer.seed)
            updated = trainer.update(state.update, chunk)
            state.update += 1
            state.curve.append({"update": state.update, **updated.metrics})
            state.samples += updated.samples
            # Who listens may be ending too, and must not keep us from saving.
            if ranks.leads and not terminated():
                progress(state.update, config.updates, updated.metrics)
            due = state.update % config.checkpoint_every == 0
            # Publishing reads the SFT folder again; what was learnt must not depend on that.
            due |= state.update == config.updates and _is_stored_lowered(config)
            failed = uploads is not None and uploads.failed
            # What one process knows, all must: else some would wait for the others.
            if checkpoints and ranks.any(due or failed or terminated()):
                if ranks.count > 1:
                    ranks.must_agree("the policy's weights", trainer.models.checksum())
                if ranks.leads:
                    state.trainer = trainer.state_dict()
                    saved = save_checkpoint(checkpoints, state, trainer.models, who)
                    if uploads:
                        uploads.submit(saved, state.update, score_of(state.curve, config))
                if ranks.any(terminated()):
                    raise Interrupted(
                        f"SIGTERM after update {state.update} of {config.updates}: saved; run the "
                        "same again to go on from there"
                    )
    return state


def score_of(curve: Sequence[Mapping[str, float]], config: PPOConfig) -> float | None:
    """How good a checkpoint is: the mean of reward − kl_coef·KL over its last updates.

    It is the objective that PPO maximises, of as many updates as lie between two checkpoints, in
    the reward's own units (before any normalisation). The coefficient is the configured one for
    all: an adaptive controller's would rank checkpoints by itself.

    Returns:
        None where that is no finite number.
    """
    rows = curve[-config.checkpoint_every :]
    score = sum(row["reward"] - config.kl_coef * row["kl"] for row in rows) / len(rows)
    return score if math.isfinite(score) else None


def _write(trainer: PPOTrainer, state: TrainState, sft: Path, out_dir: Path) -> None:
    policy = trainer.models.accelerator.unwrap_model(trainer.models.policy)
    base = load_policy(sft) if _is_stored_lowered(trainer.config) else None
    save_model(merged(policy, base), out_dir)
    trainer.renderer.tokenizer.save_pretrained(out_dir)
    write_json(out_dir / "curve.json", state.curve)
    write_json(out_dir / "samples.json", state.samples)


def _is_stored_lowered(config: PPOConfig) -> bool:
    """Whether the policy's own base is rounded, so that it can't be published."""
    return config.lora is not None and config.precision == "bf16"


def prompts_of_update(
    rows: Sequence[PromptRow], update: int, config: PPOConfig, seed: int
) -> list[PromptRow]:
    """The prompts of one update's chunk: a fresh seeded shuffle for every pass over the data."""
    chosen: list[PromptRow] = []
    order: list[int] = []
    k = config.replies_per_prompt
    first = update * config.chunk_size
    last = min(first + config.chunk_size, config.total_episodes)
    for number in range(first // k, -(-last // k)):
        lap, position = divmod(number, len(rows))
        if not order or position == 0:
            generator = torch.Generator().manual_seed(mix(seed, lap))
            order = torch.randperm(len(rows), generator=generator).tolist()
        chosen.append(rows[order[position]])
    return chosen


def _identity(
    config: PPOConfig, seed: int, data: Path, sft: Path, reward_model: Approved[Path] | None,
    renderer: Renderer, known: Mapping[str, str],
) -> dict[str, str]:  # fmt: skip
    """What a run depends on; what the caller did not name is told by its content."""
    folders = {"data": data, "base": sft}
    if reward_model is not None:
        folders["reward model"] = reward_model.subject
    if config.comparison and config.comparison.pair_model:
        folders["pair model"] = at_home(config.comparison.pair_model)
    return {
        **{name: known.get(name) or _content(folder) for name, folder in folders.items()},
        "tokenizer": renderer.template_hash,
        # Where and how often to checkpoint changes nothing that is learnt, nor how many compute.
        "config": _sha256(config.model_dump_json(exclude={"checkpoint_every", *WHERE}).encode()),
        "seed": str(seed),
    }


def _content(folder: Path) -> str:
    digest = hashlib.sha256()
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    for name, file in sorted(files.items()):
        with file.open("rb") as handle:
            digest.update(name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
