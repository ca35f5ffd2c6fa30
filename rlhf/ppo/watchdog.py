"""The watchdog of a PPO run: measures the policy on held-out prompts with an independent judge.

Its looks draw from generators of their own and change no state of the training, so that a run that
it does not stop has the weights of a run without it. Decisions are made in `rlhf.ppo.frontier`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.config.watchdog import WatchdogConfig
from rlhf.data.fitting import Fitting
from rlhf.data.rows import PAIRS_JUDGE, Pair, PromptRow, iterate_rows
from rlhf.errors import NotFinite
from rlhf.judge import read_judge
from rlhf.modeling.device import upload
from rlhf.modeling.generate import Replies
from rlhf.modeling.reward import Scorer
from rlhf.modeling.sampling import derive_seed
from rlhf.ppo.checkpoint import TrainState
from rlhf.ppo.frontier import NON_FINITE, Finding, Frontier, Look
from rlhf.ppo.trainer import PPOTrainer, Rollouts

#: File of the result with the frontier, the choice, and why the run was stopped.
WATCHDOG = "watchdog.json"
#: Components that score any prompt by a function of the reply, and call no code of the operator's.
_PLAIN = {"reward_model", "default", "length_penalty", "length", "keyword", "regex", "json_valid",
          "repetition"}  # fmt: skip

log = logging.getLogger(__name__)


class Watchdog:
    """Looks at the policy of a run every few updates; stops it, and chooses what goes on.

    Args:
        config: Section of the watchdog.
        trainer: Trainer of the run.
        rows: Prompts of every look.
        judge: Scores the replies; None if there is none that is usable.
        notes: Sentences for the report.
    """

    def __init__(
        self, config: WatchdogConfig, trainer: PPOTrainer, rows: Sequence[PromptRow],
        judge: Scorer | None, notes: Sequence[str],
    ) -> None:  # fmt: skip
        self.config, self.trainer, self.rows, self.judge = config, trainer, rows, judge
        self.notes = [*notes]
        self.updates = trainer.config.updates
        self._has_proxy = _scores_any_prompt(trainer.config)
        self._seed = derive_seed(trainer.seed, "watchdog")

    def is_due(self, update: int) -> bool:
        """Return whether to look after this many updates."""
        return update % self.config.every == 0 or update == self.updates

    def look(self, state: TrainState) -> None:
        """Look at the current policy, and record what follows from it in the state."""
        frontier, look = state.frontier, self._measure(state)
        if len(frontier.looks) == 1:  # measured by the first update, before it learns
            first, start = state.curve[0], frontier.looks[0]
            frontier.looks[0] = replace(
                start,
                proxy_in_training=None if start.proxies else first["reward"],
                explained_variance=first["explained_variance"],
            )
        planned = -(-self.updates // self.config.every)
        models = self.trainer.models
        if frontier.add(look, self.config, planned) and models.ranks.is_leader:
            parameters = models.parameters["policy"]
            state.retained = {n: p.detach().cpu().clone() for n, p in parameters.items()}
        judge = look.judge
        log.info(
            "watchdog after update %d: KL %.2f, judge %s", look.update, look.kl,
            f"{judge.value:.3f} [{judge.low:.3f}, {judge.high:.3f}]" if judge else "none",
        )  # fmt: skip
        self._say_stopped(frontier)

    def survive(self, state: TrainState, error: NotFinite) -> bool:
        """Stop a run at a loss that is not finite; return False if nothing of it can go on.

        A policy goes on only if a judge preferred it to the start: then it is measured, whatever
        came after it. Otherwise the error stands, as nothing is known to be better than the start.
        """
        frontier = state.frontier
        if self.judge is None or not frontier.has_gained:
            return False
        frontier.stopped = Finding(NON_FINITE, state.update + 1, str(error))
        self._say_stopped(frontier)
        return True

    def conclude(self, state: TrainState) -> int:
        """Return the update whose policy goes on; the leader restores its weights."""
        chosen, reason = state.frontier.choose(self.config)
        if not self.trainer.models.ranks.is_leader:
            return chosen
        if chosen != state.update or state.frontier.stopped:
            parameters = self.trainer.models.parameters["policy"]
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(state.retained[name])
        if chosen != self.updates:
            log.warning("watchdog: %s", reason)
        return chosen

    def report(self, state: TrainState) -> dict[str, Any]:
        """Return the content of `watchdog.json`."""
        frontier = state.frontier
        chosen, reason = frontier.choose(self.config)
        return {
            "frontier": [look.row() for look in frontier.looks],
            "chosen": chosen,
            "stopped": frontier.stopped and vars(frontier.stopped),
            "notes": [reason, *self.notes],
        }

    def _say_stopped(self, frontier: Frontier) -> None:
        if frontier.stopped and self.trainer.models.ranks.is_leader:
            log.warning(
                "watchdog: training stops at update %d of %d: %s: %s", frontier.stopped.update,
                self.updates, frontier.stopped.detector, frontier.stopped.evidence,
            )  # fmt: skip

    @torch.no_grad()
    def _measure(self, state: TrainState) -> Look:
        trainer, models = self.trainer, self.trainer.models
        prompts = [trainer.renderer.encode_prompt(r.prompt, trainer.max_prompt) for r in self.rows]
        # The same random numbers at every look: policies that are alike then give replies that are
        # alike, and their paired difference has less noise. Prompts stay independent.
        replies = models.sample(
            prompts, trainer.renderer.tokenizer, trainer.sampling, self._seed,
            trainer.environment.stop, ends=trainer.renderer.end_ids,
        )  # fmt: skip
        texts = [trainer.environment.text(ids) for ids in replies.rows()]
        kl, entropy = self._forward(replies)
        lengths = replies.valid.sum(1)
        proxies: list[float] = []
        if self._has_proxy:
            rollouts = Rollouts(self.rows, replies, texts)
            trainer.score(rollouts)
            proxies = rollouts.scores.tolist()
        since = state.frontier.looks[-1].update if state.frontier.looks else 0
        recent = state.curve[since:]
        judges = self._judge(texts)
        trainer.free()
        return Look(
            update=state.update,
            kl=float(kl.mean()),
            entropy=float(entropy.sum() / lengths.sum()),
            tokens=float(lengths.double().mean()),
            eos_rate=float(replies.finished.double().mean()),
            judges=tuple(judges),
            proxies=tuple(proxies),
            has_plain_rewards=self._has_plain_rewards(),
            proxy_in_training=None if self._has_proxy else _mean(recent, "reward"),
            explained_variance=_mean(recent, "explained_variance"),
            value_loss=_mean(recent, "value_loss"),
        )

    def _has_plain_rewards(self) -> bool:
        config = self.trainer.config
        is_changed = config.whiten_rewards or config.reward_clip is not None
        return config.reward_normalization == "none" and not is_changed

    def _forward(self, replies: Replies) -> tuple[Tensor, Tensor]:
        """Return the KL and the summed entropies of every reply, on the CPU."""
        models = self.trainer.models
        rows = len(replies.mask)
        kl, entropy = (torch.zeros(rows, device=models.device) for _ in range(2))
        own = torch.arange(rows)[models.ranks.share(rows)]
        for index in own.split(self.trainer.config.micro_batch_size):
            part, places = replies.take(index).to(models.device), upload(index, models.device)
            log_probs, entropies = models.log_probs(part)
            reference = models.reference_log_probs(part)
            kl[places] = ((log_probs - reference) * part.mask).sum(1)
            entropy[places] = (entropies * part.mask).sum(1)
        models.ranks.all_reduce(kl, entropy)  # a sum gathers: rows of others are zero here
        return kl.double().cpu(), entropy.double().cpu()

    def _judge(self, texts: Sequence[str]) -> list[float]:
        """Return the judge's scores; it is on an accelerator only meanwhile."""
        judge = self.judge
        if judge is None:
            return []

        def score(items: Sequence[tuple[Any, str]]) -> list[float]:
            return judge([prompt for prompt, _ in items], [text for _, text in items]).tolist()

        items = [(row.prompt, text) for row, text in zip(self.rows, texts, strict=True)]
        device = self.trainer.device
        judge.model.to(device)
        scores = list(self.trainer.models.ranks.split_batches(score)(items))
        if self.trainer.config.optimize_device_cache:
            judge.model.to("cpu")
        return scores


def make_watchdog(
    trainer: PPOTrainer, data: Path, judge: Path | None, trained_on: Sequence[PromptRow]
) -> Watchdog | None:
    """Make the watchdog of a run; None if it is switched off.

    Args:
        trainer: Trainer of the run.
        data: Dataset folder; the prompts of its judge split are looked at.
        judge: Folder of the judge's artifact; used if its `judge.json` says that it is usable.
        trained_on: Prompts of the training, which are looked at if there is no judge split.

    Raises:
        DataError: Policy, reward model or judge can't be given too many of the prompts.
        ConfigError: The judge can't be loaded.
    """
    config = trainer.config.watchdog
    if config is None:
        return None
    notes: list[str] = []
    rows = _judge_prompts(data)
    scorer = None
    if not rows:
        rows = list(trained_on)
        notes.append("no judge split: the looks are at prompts of the training, without a judge")
    else:
        scorer = _load_judge(trainer, judge, notes)
        rows = _fitting_rows(rows, trainer, scorer)
    if len(rows) < max(2, trainer.models.ranks.count):
        # A mean needs two, and each process at least one.
        rows, scorer = list(trained_on), None
        notes.append("the judge split has too few prompts to look at: those of the training are")
    generator = torch.Generator().manual_seed(derive_seed(trainer.seed, "watchdog") + 1)
    order = torch.randperm(len(rows), generator=generator).tolist()[: config.prompts]
    if len(order) < config.prompts:
        notes.append(f"there are {len(order)} prompts to look at, of {config.prompts} asked for")
    return Watchdog(config, trainer, [rows[i] for i in order], scorer, notes)


def _judge_prompts(data: Path) -> list[PromptRow]:
    """Return the different prompts of the judge split; none without one."""
    path = data / PAIRS_JUDGE
    if not path.is_file():
        return []
    pairs = iterate_rows(path, Pair)
    return [*{repr(p.prompt): PromptRow(p.prompt, p.group) for p in pairs}.values()]


def _fitting_rows(
    rows: list[PromptRow], trainer: PPOTrainer, judge: Scorer | None
) -> list[PromptRow]:
    """Return the prompts that all models can be given.

    However many others there are: no stage has checked this small split, and PPO needs none of it.
    """
    lenient = {"max_bad_fraction": 1.0}
    fitting = Fitting(trainer.renderer, trainer.limits.model_copy(update=lenient))
    rows = fitting.fitting(rows)
    for other in filter(None, (trainer.models.scorer, judge)):
        rows = fitting.fitting_both(rows, other.renderer, other.limits.model_copy(update=lenient))
    return rows


def _load_judge(trainer: PPOTrainer, folder: Path | None, notes: list[str]) -> Scorer | None:
    """Load the judge if it is usable; else note why it is not."""
    if folder is None:
        notes.append("no judge was given: the policy is not judged during the training")
        return None
    known = read_judge(folder)
    if not known.usable:
        notes.append(f"the judge is not usable: {known.reason}")
        return None
    config = trainer.config
    return Scorer(
        folder, trainer.device, trainer.limits, precision=config.precision,
        frozen_dtype=config.scorer_dtype,
    )  # fmt: skip


def _scores_any_prompt(config: PPOConfig) -> bool:
    """Return whether the environment can score replies to other prompts without side effects.

    Custom functions and services may count their calls, running scales would move, comparisons are
    relative to rivals, and reference answers belong to the prompts of the training.
    """
    if config.comparison:
        return False
    if config.multi_objective:
        parts = config.components.values()
        types = {str(getattr(part, "type", "")) for part in parts}
        return types <= _PLAIN and all(part.normalize == "none" for part in parts)
    return (config.reward_fn or "default") in _PLAIN


def _mean(curve: Sequence[Mapping[str, float]], name: str) -> float | None:
    values = [row[name] for row in curve if name in row]
    return sum(values) / len(values) if values else None
