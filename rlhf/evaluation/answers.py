"""Replies of a policy to held-out prompts: their texts, measures and scores, by prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf.config import EvaluationConfig
from rlhf.data.rendering import Renderer
from rlhf.data.rows import PromptRow
from rlhf.environments.stop import StopSequences
from rlhf.evaluation.common import GoldScore
from rlhf.evaluation.texts import distinct, is_refusal, repetition
from rlhf.modeling.device import upload
from rlhf.modeling.generate import Replies, generate
from rlhf.modeling.logprobs import log_probs_and_entropy, reply_logits
from rlhf.modeling.members import member_scores, members_of
from rlhf.modeling.reward import Scorer
from rlhf.modeling.sampling import Sampling

#: Logits held at a time by an exact KL, which needs several tensors of this size: 64 MiB each in
#: float32, and 512 MiB on an accelerator.
LOGITS, ACCELERATOR_LOGITS = 2**24, 2**27

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """A policy's replies to held-out prompts, the same number to each."""

    texts: list[list[str]]
    """By prompt."""
    measures: dict[str, Values]
    """By name; the mean of the replies to each prompt, of shape (prompts,)."""
    scores: dict[str, Values] = field(default_factory=dict[str, Values])
    """By scorer: `reward`, `judge` or `gold`; of each reply, of shape (prompts, replies).
    `disagreement` is that of the reward model's members, if it has any."""

    def scored(self, name: str, scores: Values) -> Answers:
        """Return them with the scores of another scorer."""
        return replace(self, scores={**self.scores, name: scores})


@torch.no_grad()
def answer_prompts(
    model: Any,
    reference: Any,
    rows: Sequence[PromptRow],
    renderer: Renderer,
    ending: StopSequences,
    sampling: Sampling,
    seed: int,
    *,
    max_prompt: int,
    batch_size: int,
    replies: int = 1,
) -> Answers:
    """Generate replies to prompts, and measure them.

    Measures are `tokens`, `eos_rate` (ended by an end token or stop sequence), `repetition`,
    `distinct_1`, `distinct_2`, `refusal`; of sampled replies also `entropy`, and with a reference
    `kl` and `kl_exact`, see `_likelihoods`; of greedy ones with a reference `kl`.

    Args:
        model: The policy.
        reference: Policy from which the KL is measured; None measures none.
        rows: Prompts.
        renderer: The policy's.
        ending: Stop sequences, with the same renderer.
        sampling: Temperature 0 is greedy.
        seed: Each batch has a seed of its own from here on.
        max_prompt: Most tokens of a prompt.
        batch_size: Replies decoded at a time.
        replies: Number to each prompt.
    """
    encoded = [renderer.encode_prompt(row.prompt, max_prompt) for row in rows]
    prompts = [ids for ids in encoded for _ in range(replies)]
    texts: list[str] = []
    parts: dict[str, list[Tensor]] = {}
    stop = ending if ending.sequences else None
    for start in range(0, len(prompts), batch_size):
        drawn = generate(
            model, prompts[start : start + batch_size], renderer.tokenizer, sampling,
            seed + start, stop, ends=renderer.end_ids,
        )  # fmt: skip
        texts += [ending.text(ids) for ids in drawn.rows()]
        measured = {"tokens": drawn.mask.sum(1).float(), "eos_rate": drawn.finished.float()}
        measured |= _likelihoods(model, reference, drawn, sampling.temperature)
        for name, values in measured.items():
            parts.setdefault(name, []).append(values.cpu())
    by_prompt = [texts[i : i + replies] for i in range(0, len(texts), replies)]
    measures = {
        name: torch.cat(values).double().numpy().reshape(-1, replies).mean(1)
        for name, values in parts.items()
    }
    return Answers(by_prompt, measures | _text_measures(by_prompt))


def score_answers(answers: Answers, rows: Sequence[PromptRow], scorer: Scorer) -> Values:
    """Return the scores of all replies, of shape (prompts, replies)."""
    return scored_by("scorer", scorer, answers, rows).scores["scorer"]


def scored_by(name: str, scorer: Scorer, answers: Answers, rows: Sequence[PromptRow]) -> Answers:
    """Return answers with a model's scores, and how far its members differ if it has any."""
    prompts = [row.prompt for row, texts in zip(rows, answers.texts, strict=True) for _ in texts]
    table = member_scores(scorer, prompts, [text for texts in answers.texts for text in texts])
    found = {name: table[:, 0]}
    if (members := members_of(scorer)) is not None:
        found["disagreement"] = members.disagreement(table)
    for each, values in found.items():
        answers = answers.scored(each, values.double().numpy().reshape(len(rows), -1))
    return answers


def gold_scores(answers: Answers, rows: Sequence[PromptRow], gold: GoldScore) -> Values:
    """Return the gold scores of all replies, of shape (prompts, replies)."""
    return np.array(
        [
            [gold(row.prompt, text) for text in texts]
            for row, texts in zip(rows, answers.texts, strict=True)
        ]
    )


def gold_of(config: EvaluationConfig) -> GoldScore | None:
    """Return the configured gold score: `gold(prompt, reply) -> score`."""
    if config.judge == "none":
        return None
    from rlhf.world import gold

    return gold


def _text_measures(texts: Sequence[Sequence[str]]) -> dict[str, Values]:
    def means(measure: Callable[[str], float]) -> Values:
        return np.array([sum(map(measure, own)) / len(own) for own in texts], dtype=np.float64)

    return {
        "repetition": means(repetition),
        "distinct_1": np.array([distinct(own, 1) for own in texts]),
        "distinct_2": np.array([distinct(own, 2) for own in texts]),
        "refusal": means(is_refusal),
    }


def _likelihoods(
    model: Any, reference: Any, replies: Replies, temperature: float
) -> dict[str, Tensor]:
    """Measure replies by the distributions of their tokens, in nats.

    `entropy` is the mean over a reply's tokens of the entropy of the distribution that each was
    drawn from. `kl` is Σ log π − log π_ref over the reply (k1), whose mean over sampled replies is
    their KL. `kl_exact` sums the KL of the whole distributions at each token instead: its mean is
    the same, with less noise.

    All are at the sampling temperature and over the whole vocabulary, from which evaluation samples
    whatever PPO's `top_k` and `top_p` are. A greedy reply is no sample: its `kl` is the log-ratio
    at temperature 1, and it has no entropy.
    """
    if temperature == 0:
        if reference is None:
            return {}
        ours, theirs = (
            log_probs_and_entropy(m, replies, 1.0, entropy=False)[0] for m in (model, reference)
        )
        return {"kl": ((ours - theirs) * replies.mask).sum(1)}
    if reference is None:
        entropies = log_probs_and_entropy(model, replies, temperature)[1]
        return {"entropy": (entropies * replies.mask).sum(1) / replies.mask.sum(1).clamp(min=1)}
    parts = [
        _divergences(model, reference, replies.take(rows), temperature)
        for rows in _row_chunks(replies, model)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _divergences(
    model: Any, reference: Any, replies: Replies, temperature: float
) -> dict[str, Tensor]:
    """Return entropy, `kl` and `kl_exact` of each reply, from whole distributions."""
    log_p = reply_logits(model, replies, temperature).log_softmax(-1)
    # The policy may have tokens that its reference lacks, and never draws.
    log_ref = reply_logits(reference, replies, temperature).log_softmax(-1)
    valid = upload(replies.valid.flatten().nonzero().squeeze(1), log_p.device)
    drawn = replies.reply_ids.flatten()[valid][:, None]
    p = log_p.exp()
    # 0·(−∞) is NaN in floating point and 0 in these sums.
    tokens = {
        "entropy": -(p * log_p).masked_fill(p == 0, 0).sum(-1),
        "kl": (log_p.gather(1, drawn) - log_ref.gather(1, drawn)).squeeze(1),
        "kl_exact": (p * (log_p - log_ref)).masked_fill(p == 0, 0).sum(-1),
    }
    lengths = replies.valid.sum(1).tolist()
    sums = {
        name: torch.stack([part.sum() for part in values.cpu().split(lengths)])
        for name, values in tokens.items()
    }
    return {**sums, "entropy": sums["entropy"] / torch.tensor(lengths).clamp(min=1)}


def _row_chunks(replies: Replies, model: Any) -> list[Tensor]:
    """Return the rows in groups whose logits take a limited amount of memory."""
    on_cpu = replies.ids.device.type == "cpu"
    budget = (LOGITS if on_cpu else ACCELERATOR_LOGITS) // model.config.get_text_config().vocab_size
    chunks: list[list[int]] = [[]]
    tokens = 0
    for row, length in enumerate(replies.valid.sum(1).tolist()):
        if chunks[-1] and tokens + length > budget:
            chunks.append([])
            tokens = 0
        chunks[-1].append(row)
        tokens += length
    return [torch.tensor(rows) for rows in chunks]
