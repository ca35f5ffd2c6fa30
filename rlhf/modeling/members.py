"""Members of a reward model: linear heads on one base, and how far their scores differ.

Member 0 is the trained head, as all other consumers see it. Each of the others shows what other
pairs might have made of it. A pair has the difference d of its replies' pooled hidden states, in
which a linear head w is linear: its margin is w·d. A fit on the frozen base minimises

    Σ c ω ℓ + ½ s²|w − w₀ − a|²,    ℓ = −log σ(w·d − m),

the loss of the training, with m and ω the pair's margin and weight. c is how often a bootstrap
resample of the training prompts has the pair's (Davison and Hinkley 1997, "Bootstrap methods and
their application", section 3.8: the pairs of a prompt depend on each other). The second term is a
Gaussian prior around the trained head w₀, with s² the mean of |d|²: the margin of a typical pair
deviates by 1. Its centre is moved by a draw a from itself, so that members differ in directions of
which no pair tells, too, and where all pairs are fitted (Osband et al. 2018, "Randomized prior
functions for deep reinforcement learning"). With w* that minimum and ŵ the one for c = 1 and a = 0
the member is w₀ + w* − ŵ: training ends before ŵ, which tells nothing of how certain the pairs are.

Ensembles of reward models: Coste et al. 2023, "Reward model ensembles help mitigate
overoptimization"; those that share a base share its errors too: Eisenstein et al. 2023, "Helping or
herding?".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.config.lengths import TokenLimits
from rlhf.errors import ConfigError, DataError, TrainingError
from rlhf.modeling.classifier import Pooled, apply_head, last_layer
from rlhf.modeling.reward import SCORE_STD, Scorer, reward_meta
from rlhf.modeling.structure import evaluating, hidden_width

#: Field of `rlhf.json`, the number of members; and their weights, beside those of the model.
MEMBERS, WEIGHTS = "members", "members.safetensors"
#: Pairs whose hidden states are computed at a time.
_PAIRS = 2048
#: Largest slope of a fit's loss, in margins, at its minimum; and the most steps to it.
_SLOPE, _STEPS = 1e-8, 5000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Members:
    """Heads of a reward model; the first is the trained one."""

    weight: Float[Tensor, "members width"]
    bias: Float[Tensor, " members"] | None
    """As a model's own head has one."""
    mean: Float[Tensor, " members"]
    """Each one's mean score of the reference replies, by which its scores are comparable: pairs
    tell a reward only up to a constant."""
    deviation: float
    """Standard deviation of the trained head's scores of the reference replies."""

    def __len__(self) -> int:
        return len(self.weight)

    def scores(self, states: Tensor, counts: Tensor) -> Float[Tensor, "rows members"]:
        """Score replies by their pooled hidden states and numbers of pooled tokens."""
        scores = states.double() @ self.weight.double().T
        return scores if self.bias is None else scores + counts.double()[:, None] * self.bias

    def disagreement(self, scores: Tensor) -> Float[Tensor, " rows"]:
        """Return how far the members differ on replies, in deviations of the reference scores.

        The standard deviation over the members (n − 1) of a score above the member's own mean.
        """
        return self.spread(scores.double() - self.mean.double())

    def spread(self, values: Tensor) -> Float[Tensor, " rows"]:
        """Return the standard deviation over the members of margins, in the same unit."""
        return values.double().std(1) / (self.deviation or 1.0)

    def save(self, folder: Path) -> None:
        """Write them to `members.safetensors`."""
        tensors = {"weight": self.weight, "bias": self.bias, "mean": self.mean}
        known = {name: t.float().contiguous() for name, t in tensors.items() if t is not None}
        save_file(known, folder / WEIGHTS)


def read_members(folder: Path) -> Members | None:
    """Read the members of a reward model; None if it is a single head.

    Raises:
        ConfigError: Their file is missing or damaged, or has another number of them.
    """
    meta = reward_meta(folder)
    count = meta.get(MEMBERS, 1)
    if count == 1:
        return None
    try:
        tensors = load_file(folder / WEIGHTS)
        members = Members(
            tensors["weight"], tensors.get("bias"), tensors["mean"], float(meta[SCORE_STD])
        )
        known = [t for t in (members.bias, members.mean) if t is not None]
        if len(members) != count or any(t.shape != (count,) for t in known):
            raise ValueError("shapes")
    except Exception as error:  # safetensors raises several types
        raise ConfigError(
            f"reward model {str(folder)!r} has {count!r} members by its rlhf.json, and {WEIGHTS} "
            f"does not hold them ({type(error).__name__}); copy it too, or train the model again"
        ) from error
    return members


def linear_head(model: Any) -> nn.Linear | None:
    """Return the layer that is a reward model's whole head; None if its head is not linear.

    Told by what the head computes: it must give the layer's own output for any hidden state.
    """
    layer = last_layer(model)
    if not isinstance(model, Pooled) or layer is None:
        return None
    width = hidden_width(model)
    device = layer.weight.device
    states = torch.linspace(-1, 1, 3 * width, device=device).view(1, 3, width).square()
    with torch.no_grad(), evaluating(model):
        if layer.in_features != width:
            return None
        return layer if torch.equal(apply_head(model, states), layer(states)) else None


def check_members(model: Any, start: Path | str, count: int) -> None:
    """Refuse a model that can't have several members.

    Raises:
        ConfigError: Its head is not one linear layer on hidden states that are pooled.
    """
    if count > 1 and linear_head(model) is None:
        raise ConfigError(
            f"reward_model.members = {count} are linear heads on the last hidden states of one "
            f"base, and {type(model).__name__} of {str(start)!r} has a head of another kind; set "
            "it to 1, or start from a decoder"
        )


def check_prompts(rows: Sequence[Mapping[str, Any]], count: int) -> None:
    """Refuse pairs that can't be resampled.

    Raises:
        DataError: They have one prompt in common.
    """
    if count > 1 and len({*_prompts_of(rows)}) < 2:
        raise DataError(
            f"reward_model.members = {count} are fitted to resamples of the prompts, and all "
            f"{len(rows)} training pairs have the same one; set it to 1, or give more prompts"
        )


class MemberScorer(Scorer):
    """Scorer that also gives the scores of all members, in the same forward passes.

    Without members it gives the hidden states that they are fitted on.
    """

    members: Members | None = None

    def __call__(self, prompts: list[Any], replies: list[str]) -> Float[Tensor, " batch"]:
        """Score each reply to its own prompt, as `Scorer` does."""
        return self.table(prompts, replies)[0]

    def of_members(self, prompts: list[Any], replies: list[str]) -> Float[Tensor, "batch members"]:
        """Score each reply to its prompt by every member; the first is the model's own score.

        Raises:
            PromptUnusable: The model can't be given a prompt.
            TrainingError: A score is not finite.
        """
        assert self.members is not None
        own, states, counts = self.table(prompts, replies)
        scores = self.members.scores(states, counts)
        scores[:, 0] = own
        return scores

    def states(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return pooled hidden states of token sequences, and how many tokens were pooled."""
        table = self.score_ids(rows)
        return table[:, 2:], table[:, 1]

    def table(self, prompts: list[Any], replies: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scores of replies, their states and numbers of tokens."""
        if not prompts:
            return torch.empty(0), torch.empty(0, hidden_width(self.model)), torch.empty(0)
        table = super().__call__(prompts, replies)
        return table[:, 0], table[:, 2:], table[:, 1]

    def _result(
        self, scores: Tensor, hidden: Tensor, index: Tensor, counted: Tensor
    ) -> Float[Tensor, "batch columns"]:
        """Put the number of tokens and the pooled states behind the score of each row."""
        states = hidden.flatten(0, -2)[index].float()
        counts = counted.sum(1) if self.model.pooling == "sum" else torch.ones_like(scores)
        pooled = pool_states(states, counted, self.model.pooling)
        return torch.cat([scores[:, None], counts[:, None].float(), pooled], dim=1)


def open_scorer(folder: Path, device: torch.device, limits: TokenLimits | int) -> Scorer:
    """Load a reward model as a scorer; with members, as one that knows them.

    Raises:
        ConfigError: Their file is missing, damaged or another model's.
    """
    members = read_members(folder)
    if members is None:
        return Scorer(folder, device, limits)
    scorer = MemberScorer(folder, device, limits)
    head = linear_head(scorer.model)
    # Member 0 is the published head itself, in the dtype that it is published in.
    own = None if head is None else head.weight.detach().float().cpu().flatten()
    if own is None or not torch.equal(members.weight[0].float(), own):
        raise ConfigError(
            f"reward model {str(folder)!r}: the heads in {WEIGHTS} are not for its base; copy the "
            "file that belongs to it, or train it again"
        )
    scorer.members = members
    return scorer


def members_of(scorer: Scorer) -> Members | None:
    """Return the members that a scorer knows; None for a single head."""
    return scorer.members if isinstance(scorer, MemberScorer) else None


def member_scores(
    scorer: Scorer, prompts: list[Any], replies: list[str]
) -> Float[Tensor, "batch members"]:
    """Score replies by every member of a reward model; one column if it is a single head."""
    if isinstance(scorer, MemberScorer):
        return scorer.of_members(prompts, replies)
    return scorer(prompts, replies)[:, None]


def pool_states(
    states: Float[Tensor, "batch time width"], counted: Bool[Tensor, "batch time"], pooling: str
) -> Float[Tensor, "batch width"]:
    """Pool hidden states as `rlhf.modeling.classifier.pool` does the scores of tokens."""
    if pooling == "sum":
        return (states * counted[..., None]).sum(1)
    positions = torch.arange(states.shape[1], device=states.device)
    last = (positions * counted).argmax(1)
    return states[torch.arange(len(states), device=states.device), last]


def publish_members(
    trained: Scorer, folder: Path, rows: Sequence[Mapping[str, Any]], count: int, seed: int,
    reference: tuple[list[Any], list[str]],
) -> None:  # fmt: skip
    """Fit the members of a trained reward model; write them beside its weights.

    Args:
        trained: Scorer of the model.
        folder: Its folder.
        rows: Training pairs, see `fit_members`.
        count: Number of members, the trained head included.
        seed: See `fit_members`.
        reference: Prompts and replies on which the members' scores have the mean 0.

    Raises:
        TrainingError: A fit does not reach its minimum.
    """
    # Its published weights may be in 16 bits, in which it would compute.
    model = trained.model.float()
    scorer = MemberScorer(folder, trained.device, trained.limits, model=model)
    weight, bias = fit_members(scorer, rows, count, seed)
    members = Members(weight.float(), bias if bias is None else bias.float(), weight[:, 0] * 0, 1.0)
    _, states, counts = scorer.table(*reference)
    replace(members, mean=members.scores(states, counts).mean(0)).save(folder)


def fit_members(
    scorer: MemberScorer, rows: Sequence[Mapping[str, Any]], count: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Return weights and biases of a trained model's head and of `count` − 1 further members.

    A member depends on its number and the seed, not on how many there are.

    Args:
        scorer: The trained model.
        rows: Training pairs as `rlhf.reward` encodes them: `chosen_ids`, `rejected_ids`,
            `reply_at`, and where given `weight` and `margin`.
        count: Number of members, the trained head included.
        seed: Of the members' random numbers.

    Raises:
        TrainingError: A fit does not reach its minimum.
    """
    head = linear_head(scorer.model)
    assert head is not None
    differences = _differences(scorer, rows)
    trained = head.weight.detach().cpu().double().flatten()
    if head.bias is None:
        differences = differences[:, :-1]
    else:
        trained = torch.cat([trained, head.bias.detach().cpu().double()])
    weights, margins = (
        np.array([row.get(name, default) for row in rows], dtype=np.float64)
        for name, default in (("weight", 1.0), ("margin", 0.0))
    )
    fit = _Fit(differences, margins, trained)
    whole, prompts = fit.shift(weights), _prompts_of(rows)
    shifts = [torch.zeros_like(trained)]
    for number in range(1, count):
        draw = np.random.default_rng([seed, number])
        times = resample(prompts, draw)
        shifts.append(fit.shift(weights * times, draw.normal(size=len(trained))) - whole)
    heads = trained + torch.stack(shifts)
    width = head.in_features
    return heads[:, :width], heads[:, width] if head.bias is not None else None


def resample(prompts: Sequence[object], draw: np.random.Generator) -> Floats:
    """Return how often a resample of the prompts has each pair: as often as it has its prompt."""
    order = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    drawn = draw.integers(len(order), size=len(order))
    times = np.bincount(drawn, minlength=len(order)).astype(np.float64)
    return times[[order[prompt] for prompt in prompts]]


def _prompts_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, ...]]:
    """Return the tokens of each pair's prompt, which tell it from others."""
    return [tuple(row["chosen_ids"][: row["reply_at"]]) for row in rows]


def _differences(scorer: MemberScorer, rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return chosen minus rejected: pooled states and, in the last column, numbers of tokens."""
    parts: list[Tensor] = []
    for start in range(0, len(rows), _PAIRS):
        part = rows[start : start + _PAIRS]
        both = [[*row[f"{side}_ids"]] for side in ("chosen", "rejected") for row in part]
        states, counts = scorer.states(both)
        chosen, rejected = torch.cat([states, counts[:, None]], dim=1).double().chunk(2)
        parts.append(chosen - rejected)
    return torch.cat(parts)


class _Fit:
    """Fits of a head to weighted pairs, see the module's docstring.

    Args:
        differences: Differences of the replies, a row for each pair.
        margins: To be subtracted from the difference of the rewards.
        trained: The trained head.
    """

    def __init__(self, differences: Tensor, margins: Floats, trained: Tensor) -> None:
        self.start = differences @ trained - torch.from_numpy(margins)
        self.scale = float(torch.linalg.vector_norm(differences)) / len(differences) ** 0.5 or 1.0
        # In units of the scale the prior is |x|²/2, and its slope as large as the losses'. In
        # place, as they are the largest part of the memory.
        self.differences = differences.div_(self.scale)

    def shift(self, weights: Floats, anchor: Floats | None = None) -> Tensor:
        """Return the distance of the best head for these weights from the trained one.

        Args:
            weights: Of the pairs.
            anchor: Place that the prior is around, in its deviations from the trained head.

        Raises:
            TrainingError: The minimum is not reached.
        """
        from scipy.optimize import minimize  # takes 1 s to import

        total = float(weights.sum())
        own = torch.from_numpy(weights) / total

        def loss(x: Floats) -> tuple[float, Floats]:
            point = torch.from_numpy(x)
            z = self.start + self.differences @ point
            away = point if anchor is None else point - torch.from_numpy(anchor)
            value = own @ nn.functional.softplus(-z) + away @ away / (2 * total)
            slope = away / total - self.differences.T @ (own * torch.sigmoid(-z))
            return float(value), slope.numpy()

        options: Any = {"maxiter": _STEPS, "maxfun": 2 * _STEPS, "ftol": 0, "gtol": _SLOPE}
        found: Any = minimize(
            loss, np.zeros(self.differences.shape[1]), jac=True, method="L-BFGS-B", options=options
        )
        # Rounding may end the line search a little before the slope is reached.
        slope = float(np.abs(loss(found.x)[1]).max())
        if not slope <= 100 * _SLOPE * max(1.0, float(found.fun)):
            raise TrainingError(
                f"reward_model.members: a head's fit ended at a slope of {slope:.1e} "
                f"({found.message}); set it to 1"
            )
        return torch.from_numpy(found.x) / self.scale
