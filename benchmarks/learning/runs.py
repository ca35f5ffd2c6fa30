"""One PPO run of `benchmarks.learning`: our training, and both sides' evaluation."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

from rlhf.config import PipelineConfig
from rlhf.data.rendering import load_renderer
from rlhf.data.rows import PROMPTS_EVAL, PROMPTS_TRAIN, PromptRow, read_rows
from rlhf.environments.stop import StopSequences
from rlhf.evaluation import EVALUATION
from rlhf.evaluation.answers import answer_prompts, gold_of, gold_scores, score_answers
from rlhf.files import read_json
from rlhf.gates import Approved, judge, require
from rlhf.modeling.base import load_policy
from rlhf.modeling.critic import freeze
from rlhf.modeling.device import prepare_device
from rlhf.modeling.reward import Scorer
from rlhf.modeling.sampling import Sampling

#: Seed of the evaluation's sampling, equal for all runs, so that they compare in pairs.
EVALUATION_SEED = 20_000


class Run:
    """One training with its curve of gold score, KL and more, every few updates."""

    def __init__(self, config: PipelineConfig, work: Path, seed: int, every: int) -> None:
        self.config, self.seed, self.every = config, seed, every
        self.data, self.sft, self.reward_model = (
            work / name for name in ("data", "sft", "reward-model")
        )
        self.evaluation = read_json(work / "evaluation" / EVALUATION)
        self.device = prepare_device(config.runtime)
        self.renderer = load_renderer(self.sft)
        self.reference = freeze(load_policy(self.sft)).to(self.device)
        room = self.reference.config.max_position_embeddings
        self.max_prompt = room - config.ppo.max_new_tokens
        self.scorer = Scorer(self.reward_model, self.device, room)
        self.held_out = read_rows(self.data / PROMPTS_EVAL, PromptRow)[: config.evaluation.prompts]
        self.prompts = read_rows(self.data / PROMPTS_TRAIN, PromptRow)
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0
        self._started = time.monotonic()
        self.judge_policy(0, self.reference)

    def approved(self) -> Approved[Path]:
        """Return the reward model as approved by the quickstart's gate."""
        rules = self.config.gates.reward_model
        verdict = judge("reward model", "benchmark", self.evaluation, rules)
        return require(self.reward_model, "benchmark", verdict)

    def after_update(self, number: int, policy: Any) -> None:
        """Evaluate the policy if it is due; `number` counts completed updates."""
        if number % self.every == 0 or number == self.config.ppo.updates:
            self.judge_policy(number, policy)

    def judge_policy(self, number: int, policy: Any) -> None:
        """Sample replies to held-out prompts and append their scores to the curve."""
        self.seconds += time.monotonic() - self._started
        ppo, evaluation = self.config.ppo, self.config.evaluation
        # A copy: the evaluation must not change the policy in training.
        policy = freeze(copy.deepcopy(policy))
        answers = answer_prompts(
            policy, self.reference, self.held_out, self.renderer, StopSequences(self.renderer),
            Sampling(ppo.max_new_tokens, evaluation.temperature), EVALUATION_SEED,
            max_prompt=self.max_prompt, batch_size=evaluation.batch_size,
        )  # fmt: skip
        gold = gold_of(evaluation)
        assert gold is not None
        point = {
            "update": float(number),
            "rollouts": float(number * ppo.chunk_size),
            "gold": float(gold_scores(answers, self.held_out, gold).mean()),
            "kl": float(answers.measures["kl"].mean()),
            "reward": float(score_answers(answers, self.held_out, self.scorer).mean()),
            "eos_rate": float(answers.measures["eos_rate"].mean()),
            "tokens": float(answers.measures["tokens"].mean()),
            "seconds": self.seconds,
        }
        self.curve.append(point)
        print(" ".join(f"{name} {value:.3f}" for name, value in point.items()), flush=True)
        self._started = time.monotonic()

    def ours(self) -> None:
        """Train by the product's trainer."""
        from rlhf.ppo.train import build_trainer, prompts_of_update

        config = self.config.ppo
        trainer = build_trainer(config, self.sft, self.approved(), self.seed, self.device)
        for number in range(config.updates):
            rows = prompts_of_update(self.prompts, number, config, self.seed)
            trainer.update(number, rows)
            self.after_update(number + 1, trainer.models.policy)

    def result(self) -> dict[str, Any]:
        """Return the run's result as JSON."""
        return {"seed": self.seed, "seconds": self.seconds, "curve": self.curve}
