"""Evaluation of a policy beside the SFT policy, and the champion, on held-out prompts."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rlhf.config import EvaluationConfig, PPOConfig, RuntimeConfig
from rlhf.config.lengths import TokenLimits
from rlhf.data.fitting import Fitting
from rlhf.data.gate_prompts import PromptSet, read_gate_prompts
from rlhf.data.rendering import Renderer, load_renderer
from rlhf.data.rows import PROMPTS_EVAL, PROMPTS_GATE, PromptRow, read_rows, write_rows
from rlhf.environments.stop import StopSequences
from rlhf.errors import DataError
from rlhf.evaluation.answers import (
    Answers,
    Values,
    answer_prompts,
    gold_of,
    gold_scores,
    scored_by,
)
from rlhf.evaluation.common import EVALUATION, SAMPLES, groups_of
from rlhf.evaluation.comparison import (
    compare,
    kinds_of,
    over_optimisation,
    own_metrics,
    shifts,
)
from rlhf.evaluation.forgetting import held_out_replies, measure_forgetting, reply_losses
from rlhf.evaluation.texts import REFUSALS
from rlhf.files import write_json
from rlhf.judge import Judge, read_judge
from rlhf.modeling.base import folder_context, load_policy
from rlhf.modeling.critic import freeze
from rlhf.modeling.device import prepare_device
from rlhf.modeling.members import open_scorer
from rlhf.modeling.reward import Scorer
from rlhf.modeling.sampling import Sampling
from rlhf.stage import Progress, Scalar, StageResult, silent

#: Distance of the seeds of two policies: their replies are drawn independently, so that every
#: reply of one may be compared with every reply of the other.
SEEDS = 2**24
_NOTES = (
    "refusals are found by {refusals} English beginnings: the rate serves to compare policies",
    "words are separated by spaces: repetition and distinct n-grams say little where none are",
)


def evaluate_policy(
    config: EvaluationConfig,
    ppo: PPOConfig,
    data: Path,
    sft: Path,
    policy: Path,
    reward_model: Path,
    out_dir: Path,
    *,
    judge: Path | None = None,
    champion: Path | None = None,
    champion_digest: str | None = None,
    champion_replies: tuple[int, tuple[str, ...]] | None = None,
    prompts: Path | None = None,
    forgotten: Set[str] = frozenset(),
    limits: TokenLimits | None = None,
    seed: int = 0,
    runtime: RuntimeConfig | None = None,
    progress: Progress = silent,
) -> StageResult:
    """Compare the policy with the SFT policy, and with the champion, on held-out prompts.

    Each answers every prompt by `config.samples_per_prompt` samples and, but for the champion, one
    greedy reply. All replies are scored by the reward model, the judge if it is usable, and the
    gold score if there is one. Writes `evaluation.json` (docs/trust.md), `samples.json` with
    one reply of each policy to every prompt, and `prompts-gate.parquet` with the gate prompts.

    Args:
        config: Numbers of prompts and samples, temperature, gold score.
        ppo: Longest replies, stop sequences.
        data: Dataset with held-out prompts and pairs.
        sft: The policy's start.
        policy: The policy.
        reward_model: That which it was trained by.
        out_dir: Empty folder.
        judge: Artifact of the judge, with `judge.json`.
        champion: Policy in production.
        champion_digest: Its artifact's digest, for the report.
        champion_replies: Most tokens of its replies, and its stop sequences; None takes those of
            the policy.
        prompts: Gate prompts in place of the dataset's held-out ones, in a file as
            `prompts-gate.parquet`; those that the dataset trains on are left out.
        forgotten: Ids of the source's rows whose prompts must not be used any more.
        limits: Most tokens of prompts and replies; without, they may fill the policy's context.
        seed: Of the samples.
        runtime: Device and threads.
        progress: Called after each policy's replies and each model's scores.

    Raises:
        DataError: There are no held-out prompts, or the models can't be given too many.
    """
    context = folder_context(sft)
    limits = (limits or TokenLimits(max_length=context, max_new_tokens=ppo.max_new_tokens)).within(
        context
    )
    run = _Evaluation(config, ppo, limits, seed, prepare_device(runtime or RuntimeConfig()))
    known = read_judge(judge)
    scorers = {"reward": run.scorer(reward_model)}
    if judge is not None and known.usable:
        scorers["judge"] = run.scorer(judge)
    sides = [_Side(sft), _Side(policy), *([_Side(champion, champion_replies)] if champion else [])]
    gate, fresh, notes = _gate_prompts(config, data, prompts, forgotten)
    rows, fitting = run.fitting_prompts(fresh, sides, scorers, are_given=prompts is not None)
    notes += run.reply_notes(sides, rows)
    run.total, run.progress = len(sides) + len(scorers), progress
    demonstrations = held_out_replies(data, sides[0].renderer, limits)
    losses = run.answer_all(sides, rows, demonstrations)
    run.score_all(sides, rows, scorers)
    evaluation = {
        **_provenance(config, rows, gate, prompts is not None, notes),
        "judge": known.facts(),
        **_comparisons(sides, rows, known),
        "forgetting": measure_forgetting(*losses, demonstrations),
    }
    if champion is not None:
        evaluation["champion"] = _against_champion(sides, rows, champion_digest)
    write_json(out_dir / EVALUATION, evaluation)
    write_json(out_dir / SAMPLES, _samples(rows, sides, config.samples))
    # All of them, so that the next challenger gets the same whatever this one left out.
    write_rows(out_dir / PROMPTS_GATE, gate)
    return StageResult({**dict(_flat(evaluation)), **fitting.metrics()})


@dataclass
class _Side:
    """A policy, and its replies by decoding."""

    folder: Path
    replies: tuple[int, tuple[str, ...]] | None = None
    """Most tokens of a reply, and stop sequences; None takes the run's."""
    sampled: Answers | None = None
    greedy: Answers | None = None
    renderer: Renderer = field(init=False)

    def __post_init__(self) -> None:
        self.renderer = load_renderer(self.folder)

    def answers(self, mode: str) -> Answers:
        answers = getattr(self, mode)
        assert answers is not None
        return answers


class _Evaluation:
    """Settings of an evaluation, and the use of its models: each is loaded once, and freed."""

    def __init__(
        self, config: EvaluationConfig, ppo: PPOConfig, limits: TokenLimits, seed: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.config, self.ppo, self.limits = config, ppo, limits
        self.seed, self.device = seed, device
        self.progress: Progress = silent
        self.done = self.total = 0

    def scorer(self, folder: Path) -> Scorer:
        """Load a scorer, which waits in the CPU's memory until all replies are drawn."""
        return open_scorer(folder, torch.device("cpu"), self.limits)

    def fitting_prompts(
        self, rows: list[PromptRow], sides: Sequence[_Side], scorers: Mapping[str, Scorer],
        *, are_given: bool,
    ) -> tuple[list[PromptRow], Fitting]:  # fmt: skip
        """Return the prompts that all models can be given, and counts of the others.

        Prompts of the champion's evaluation, and what the champion can't be given, are left out
        however many they are: this run's data were checked before training, and these were not.
        """
        lenient = {"max_bad_fraction": 1.0}
        own = self.limits.model_copy(update=lenient) if are_given else self.limits
        fitting = Fitting(sides[0].renderer, own)
        others = [
            (scorer.renderer, scorer.limits.model_copy(update=lenient) if are_given
             else scorer.limits)
            for scorer in scorers.values()
        ]  # fmt: skip
        for side in sides[2:]:
            limits = self.limits.within(folder_context(side.folder))
            others.append((side.renderer, limits.model_copy(update=lenient)))
        rows = fitting.fitting(rows)
        for renderer, limits in others:
            is_same = renderer.template_hash == fitting.renderer.template_hash
            if is_same and limits.max_length == self.limits.max_length:
                continue
            other = Fitting(renderer, limits)
            rows = other.fitting(rows)
            for name in ("prompts_refused", "system_turns_refused", "prompts_too_long"):
                fitting.counts[name] += other.counts[name]
        if not rows:
            cure = "set another data.rotation" if are_given else "raise data.eval_fraction"
            raise DataError(f"no held-out prompt is left to evaluate on; {cure}")
        return rows, fitting

    def reply_settings(self, side: _Side, rows: Sequence[PromptRow]) -> tuple[int, tuple[str, ...]]:
        """Return the most tokens of a policy's replies, and the stop sequences that end them."""
        if side.replies is None:
            return self.ppo.max_new_tokens, self.ppo.generation.stop_sequences
        tokens, stops = side.replies
        context = folder_context(side.folder)
        most = self.limits.within(context).prompt
        longest = max(len(side.renderer.encode_prompt(row.prompt, most)) for row in rows)
        return max(1, min(tokens, context - longest)), tuple(stops)

    def reply_notes(self, sides: Sequence[_Side], rows: Sequence[PromptRow]) -> list[str]:
        """Return a note where the champion answers by settings of its own."""
        settings = [self.reply_settings(side, rows) for side in sides[1:]]
        if len({*settings}) < 2:
            return []
        ours, champions = settings
        return [
            f"the champion answers by its own settings, at most {champions[0]} tokens and stop "
            f"sequences {list(champions[1])}; the policy by {ours[0]} and {list(ours[1])}"
        ]

    def answer_all(
        self, sides: Sequence[_Side], rows: Sequence[PromptRow], demonstrations: Any
    ) -> tuple[Values, Values]:
        """Draw all replies; return the losses of held-out replies under both first policies."""
        losses: list[Values] = []
        reference = None
        for number, side in enumerate(sides):
            if number == 2:
                reference = None  # nothing is measured from the SFT policy any more
            model = freeze(load_policy(side.folder)).to(self.device)
            self._answer(side, number, model, reference, rows)
            if number < 2:
                losses.append(reply_losses(model, demonstrations, side.renderer))
            if number == 0:
                reference = model
            del model
            self._free()
            self._report({"tokens": float(side.answers("sampled").measures["tokens"].mean())})
        return losses[0], losses[1]

    def _answer(
        self, side: _Side, number: int, model: Any, reference: Any, rows: Sequence[PromptRow]
    ) -> None:
        limits = self.limits.within(folder_context(side.folder))
        max_new_tokens, stops = self.reply_settings(side, rows)
        ending = StopSequences(side.renderer, stops)
        modes = [("sampled", self.config.temperature, self.config.samples_per_prompt)]
        modes += [("greedy", 0.0, 1)] if number < 2 else []
        for mode, temperature, replies in modes:
            answers = answer_prompts(
                model, reference, rows, side.renderer, ending,
                Sampling(max_new_tokens, temperature), self.seed + number * SEEDS,
                max_prompt=limits.prompt, batch_size=self.config.batch_size, replies=replies,
            )  # fmt: skip
            setattr(side, mode, answers)

    def score_all(
        self, sides: Sequence[_Side], rows: Sequence[PromptRow], scorers: dict[str, Scorer]
    ) -> None:
        """Score all replies, one model on the device at a time; the scorers are used up."""
        for name in [*scorers]:
            scorer = scorers.pop(name)
            scorer.model.to(self.device)
            scorer.device = self.device
            for side, mode, answers in _all_answers(sides):
                setattr(side, mode, scored_by(name, scorer, answers, rows))
            del scorer
            self._free()
            self._report({name: float(sides[1].answers("sampled").scores[name].mean())})
        gold = gold_of(self.config)
        if gold is None:
            return
        for side, mode, answers in _all_answers(sides):
            setattr(side, mode, answers.scored("gold", gold_scores(answers, rows, gold)))

    def _free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _report(self, metrics: Mapping[str, float]) -> None:
        self.done += 1
        self.progress(self.done, self.total, metrics)


def _all_answers(sides: Sequence[_Side]) -> list[tuple[_Side, str, Answers]]:
    return [
        (side, mode, answers)
        for side in sides
        for mode, answers in (("sampled", side.sampled), ("greedy", side.greedy))
        if answers is not None
    ]


def _gate_prompts(
    config: EvaluationConfig, data: Path, given: Path | None, forgotten: Set[str]
) -> tuple[list[PromptRow], list[PromptRow], list[str]]:
    """Return the gate prompts, those that no stage has trained on, and a note on the others.

    Raises:
        DataError: There are none, or too many are training data.
    """
    if given is None:
        rows = read_rows(data / PROMPTS_EVAL, PromptRow)[: config.prompts]
        if not rows:
            raise DataError("no held-out prompts to evaluate on; raise data.eval_fraction")
        return rows, rows, []
    found = read_gate_prompts(given, data, forgotten)
    note = found.note()
    if note and found.too_many_known:
        raise DataError(f"{note}, which are too many; set another data.rotation")
    return found.rows, found.fresh, [note] if note else []


def _provenance(
    config: EvaluationConfig, rows: Sequence[PromptRow], gate: Sequence[PromptRow], is_given: bool,
    notes: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Return which prompts were answered, and remarks on what is measured."""
    return {
        "n": len(rows),
        "samples_per_prompt": config.samples_per_prompt,
        "prompts_from": "champion" if is_given else "run",
        "prompts_sha256": PromptSet.of(gate).digest,
        "notes": [*notes, *(note.format(refusals=len(REFUSALS)) for note in _NOTES)],
    }


def _keys(rows: Sequence[PromptRow]) -> list[str]:
    """Return the identities of prompts: equal ones are not independent."""
    return [repr(row.prompt) for row in rows]


def _with_groups(before: Answers, after: Answers, rows: Sequence[PromptRow]) -> dict[str, Any]:
    keys, groups = _keys(rows), groups_of([row.group for row in rows])
    return {
        **compare(before, after, keys),
        "by_group": {name: compare(before, after, keys, index) for name, index in groups.items()},
    }


def _comparisons(sides: Sequence[_Side], rows: Sequence[PromptRow], judge: Judge) -> dict[str, Any]:
    """Compare the policy with the SFT policy."""
    (before, after), keys = sides[:2], _keys(rows)
    result: dict[str, Any] = {
        mode: _with_groups(before.answers(mode), after.answers(mode), rows)
        for mode in ("sampled", "greedy")
    }
    result["shifts"] = shifts(before.answers("sampled"), after.answers("sampled"), keys)
    result["over_optimisation"] = over_optimisation(result["sampled"], judge.reason)
    return result


def _against_champion(
    sides: Sequence[_Side], rows: Sequence[PromptRow], digest: str | None
) -> dict[str, Any]:
    """Compare the policy with the champion, which stands for `before`."""
    policy, champion = (side.answers("sampled") for side in sides[1:])
    # The KL is that from the SFT policy, and would read here as one from the champion.
    measures = {k: v for k, v in policy.measures.items() if k not in ("kl", "kl_exact")}
    return {
        "policy": digest,
        **_with_groups(champion, replace(policy, measures=measures), rows),
        "own": own_metrics(champion),
    }


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    """Yield the values of nested metrics by dotted names, without lists and those of groups."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            if name != "by_group":
                yield from _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            yield f"{prefix}{name}", value


def _samples(rows: Sequence[PromptRow], sides: Sequence[_Side], count: int) -> list[dict[str, Any]]:
    """Return the samples of each policy to every prompt, ordered by a hash of the prompt.

    The order keeps the replies out of the choice of the first few, which reports show. A row is the
    first sample of each policy, `more` are the others. `kinds` names the `count` prompts of each
    kind that are worth reading, see `kinds_of`.
    """
    answers = [side.answers("sampled") for side in sides]
    kinds = kinds_of(answers[0], answers[1], count)
    order = sorted(range(len(rows)), key=lambda i: zlib.crc32(repr(rows[i].prompt).encode()))
    return [
        {
            "prompt": rows[i].prompt,
            "group": rows[i].group,
            **_sample(answers, i, 0),
            "more": [_sample(answers, i, j) for j in range(1, len(answers[0].texts[i]))],
            "kinds": [name for name, index in kinds.items() if i in index],
        }
        for i in order
    ]


def _sample(answers: Sequence[Answers], index: int, number: int) -> dict[str, Any]:
    """Return the texts and scores of one sample of each policy to a prompt."""

    def score(side: int, scorer: str) -> float | None:
        scores = answers[side].scores.get(scorer) if side < len(answers) else None
        return None if scores is None else float(scores[index, number])

    names, has_members = ("before", "after", "champion"), "disagreement" in answers[1].scores
    return {
        **{
            name: answers[side].texts[index][number] if side < len(answers) else None
            for side, name in enumerate(names)
        },
        **{
            f"{scorer}_{name}": score(side, scorer)
            for scorer in ("reward", "judge", "gold")
            for side, name in enumerate(names)
            if (scorer, name) != ("gold", "champion")
        },
        **({"disagreement": score(1, "disagreement")} if has_members else {}),
    }
