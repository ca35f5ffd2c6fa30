"""Evaluation of a policy beside the SFT policy on held-out prompts."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.config import EvaluationConfig, PPOConfig, RuntimeConfig
from rlhf.config.lengths import TokenLimits
from rlhf.data.fitting import Fitting
from rlhf.data.rendering import Renderer, load_renderer
from rlhf.data.rows import PROMPTS_EVAL, PromptRow, read_rows
from rlhf.environments.stop import StopSequences
from rlhf.errors import DataError
from rlhf.evaluation.common import EVALUATION, SAMPLES, GoldScore, groups_of, points
from rlhf.files import write_json
from rlhf.modeling.base import context_length, load_policy
from rlhf.modeling.critic import freeze
from rlhf.modeling.device import prepare_device
from rlhf.modeling.generate import Replies, generate
from rlhf.modeling.logprobs import log_probs_and_entropy
from rlhf.modeling.reward import Scorer
from rlhf.modeling.sampling import Sampling
from rlhf.stage import Progress, StageResult, silent
from rlhf.statistics import repeated_ngrams, share


def evaluate_policy(
    config: EvaluationConfig,
    ppo: PPOConfig,
    data: Path,
    sft: Path,
    policy: Path,
    reward_model: Path,
    out_dir: Path,
    *,
    limits: TokenLimits | None = None,
    seed: int = 0,
    runtime: RuntimeConfig | None = None,
    progress: Progress = silent,
) -> StageResult:
    """Compare the policy with the SFT policy on held-out prompts, sampled and greedy.

    Writes `evaluation.json` with `sampled` and `greedy`, each: win_rate of the reward model's
    score (with interval; ties count a half), reward_before/after, kl per reply in nats against the
    SFT policy (see `_kl`), eos_rate, tokens_before/after, repetition_before/after, and the
    independent judge's gold_* if there is one; and `samples.json` with replies side by side.
    Without `limits`, prompts and replies may fill the policy's context.

    Raises:
        DataError: The data have no held-out prompts, or the models can't be given too many.
    """
    rows = read_rows(data / PROMPTS_EVAL, PromptRow)[: config.prompts]
    if not rows:
        raise DataError("no held-out prompts to evaluate on; raise data.eval_fraction")
    device = prepare_device(runtime or RuntimeConfig())
    models = [freeze(load_policy(folder)).to(device) for folder in (sft, policy)]
    renderer = load_renderer(sft)
    context = context_length(models[0])
    limits = (limits or TokenLimits(max_length=context, max_new_tokens=ppo.max_new_tokens)).within(
        context
    )
    scorer = Scorer(reward_model, device, limits)
    fitting = Fitting(renderer, limits)
    rows = fitting.fitting_both(rows, scorer.renderer, scorer.limits)
    if not rows:
        raise DataError("no held-out prompt is left to evaluate on; raise data.eval_fraction")
    groups = groups_of([row.group for row in rows])
    judge = judge_of(config)
    ending = StopSequences(renderer, ppo.generation.stop_sequences)
    evaluation: dict[str, Any] = {"n": len(rows)}
    for part, (mode, temperature) in enumerate((("sampled", config.temperature), ("greedy", 0.0))):
        sampling = Sampling(ppo.max_new_tokens, temperature)
        answers = []
        for index, (model, reference) in enumerate(((models[0], None), (models[1], models[0]))):
            answers.append(
                answer_prompts(
                    model, reference, rows, renderer, ending, scorer, judge, sampling, seed,
                    config, limits.prompt,
                )
            )  # fmt: skip
            progress(2 * part + index + 1, 4, {"reward": float(answers[-1].scores.mean())})
        before, after = answers
        evaluation[mode] = _compare(before, after, range(len(rows)))
        evaluation[mode]["by_group"] = {
            group: _compare(before, after, index) for group, index in groups.items()
        }
        if mode == "sampled":
            write_json(out_dir / SAMPLES, _samples(rows, before, after))
    write_json(out_dir / EVALUATION, evaluation)
    return StageResult({"n": len(rows), **_flat(evaluation), **fitting.metrics()})


def _flat(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of both modes by `mode.name`, without those of groups."""
    return {
        f"{mode}.{name}": value
        for mode in ("sampled", "greedy")
        for name, value in evaluation[mode].items()
        if name != "by_group"
    }


@torch.no_grad()
def answer_prompts(
    model: Any, reference: Any, rows: Sequence[PromptRow], renderer: Renderer,
    ending: StopSequences, scorer: Scorer, judge: GoldScore | None, sampling: Sampling, seed: int,
    config: EvaluationConfig, max_prompt: int,
) -> Answers:  # fmt: skip
    """Generate and score a model's replies; with a reference, estimate their KL too."""
    prompts = [r.prompt for r in rows]
    texts: list[str] = []
    tokens, finished, kl = [], [], []
    for start in range(0, len(rows), config.batch_size):
        batch = [
            renderer.encode_prompt(p, max_prompt)
            for p in prompts[start : start + config.batch_size]
        ]
        stop = ending if ending.sequences else None
        replies = generate(
            model, batch, renderer.tokenizer, sampling, seed + start, stop, ends=renderer.end_ids
        )
        texts += [ending.text(ids) for ids in replies.rows()]
        tokens.append(replies.mask.sum(1).float().cpu())
        finished.append(replies.finished.float().cpu())
        if reference is not None:
            kl.append(_kl(model, reference, replies, sampling.temperature).cpu())
    return Answers(
        texts,
        scorer(prompts, texts),
        torch.cat(tokens),
        torch.cat(finished),
        torch.cat(kl) if kl else None,
        [judge(p, t) for p, t in zip(prompts, texts, strict=True)] if judge else None,
    )


@dataclass(frozen=True)
class Answers:
    """A policy's replies to the held-out prompts, with their scores."""

    texts: list[str]
    scores: Float[Tensor, " batch"]
    tokens: Float[Tensor, " batch"]
    finished: Float[Tensor, " batch"]
    kl: Float[Tensor, " batch"] | None
    gold: list[float] | None


def judge_of(config: EvaluationConfig) -> GoldScore | None:
    """Return the configured judge: `judge(prompt, reply) -> score`."""
    if config.judge == "none":
        return None
    from rlhf.world import gold

    return gold


def repetition(text: str) -> float:
    """Return the share of a reply's 3-grams of words that repeat earlier ones."""
    return repeated_ngrams(text.lower().split(), 3)


def _compare(before: Answers, after: Answers, index: Sequence[int]) -> dict[str, float]:
    rows = list(index)
    n = len(rows)
    wins = float((torch.sign(after.scores - before.scores)[rows] + 1).sum() / 2)
    assert after.kl is not None
    result: dict[str, float] = {
        **share("win_rate", wins, n),
        "n": n,
        "reward_before": float(before.scores[rows].mean()),
        "reward_after": float(after.scores[rows].mean()),
        "kl": float(after.kl[rows].mean()),
        "eos_rate": float(after.finished[rows].mean()),
        "tokens_before": float(before.tokens[rows].mean()),
        "tokens_after": float(after.tokens[rows].mean()),
        "repetition_before": _mean([repetition(before.texts[i]) for i in rows]),
        "repetition_after": _mean([repetition(after.texts[i]) for i in rows]),
    }
    if before.gold is not None and after.gold is not None:
        old, new = before.gold, after.gold
        gold_wins = sum(points(new[i] - old[i]) for i in rows)
        not_worse = sum(new[i] >= old[i] for i in rows)
        result |= {
            **share("gold_win_rate", gold_wins, n),
            "gold_not_worse": not_worse / n,
            "gold_strict_win_rate": sum(new[i] > old[i] for i in rows) / n,
            "gold_before": _mean([old[i] for i in rows]),
            "gold_after": _mean([new[i] for i in rows]),
        }
    return result


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _samples(rows: Sequence[PromptRow], before: Answers, after: Answers) -> list[dict[str, Any]]:
    """Return all replies side by side, ordered by a hash of their prompt.

    The order keeps the replies out of the choice of the first few, which reports show.
    """
    order = sorted(range(len(rows)), key=lambda i: zlib.crc32(repr(rows[i].prompt).encode()))
    return [
        {
            "prompt": rows[i].prompt,
            "group": rows[i].group,
            "before": before.texts[i],
            "after": after.texts[i],
            "reward_before": float(before.scores[i]),
            "reward_after": float(after.scores[i]),
            "gold_before": before.gold[i] if before.gold else None,
            "gold_after": after.gold[i] if after.gold else None,
        }
        for i in order
    ]


def _kl(
    model: Any, reference: Any, replies: Replies, temperature: float
) -> Float[Tensor, " batch"]:
    """Estimate the KL of each reply in nats: k1, Σ log π − log π_ref over its tokens.

    Both are at the sampling temperature and over the whole vocabulary, from which evaluation
    samples whatever PPO's `top_k` and `top_p` are: on average it is the KL of the distribution that
    is sampled. A greedy reply is no sample: its value is the log-ratio at temperature 1.
    """
    temperature = temperature or 1.0
    log_p, _ = log_probs_and_entropy(model, replies, temperature, entropy=False)
    log_p_ref, _ = log_probs_and_entropy(reference, replies, temperature, entropy=False)
    return ((log_p - log_p_ref) * replies.mask).sum(1)
