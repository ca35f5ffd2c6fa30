"""The judge: a second reward model that judges the policy, and what is known of it.

It is trained as a reward model is, on pairs that no other model sees and with another seed. Its
artifact is a reward model with `judge.json`, or that file alone where none could be trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rlhf.config import RewardModelConfig, RuntimeConfig
from rlhf.config.lengths import TokenLimits
from rlhf.data.rows import PAIRS_EVAL, PAIRS_JUDGE, Pair, iterate_rows, read_rows
from rlhf.files import read_json, write_json
from rlhf.inference import share_of
from rlhf.modeling.reward_source import is_encoder
from rlhf.modeling.source import CONFIG
from rlhf.saved import checked, read_saved
from rlhf.stage import StageResult

#: File beside the judge's weights.
JUDGE = "judge.json"


@dataclass(frozen=True)
class Judge:
    """Facts about a judge: `judge.json`."""

    trained: bool
    usable: bool
    """Whether it is better than a coin on held-out pairs; only then metrics are given by it."""
    reason: str | None = None
    """Why it is not usable."""
    base: str | None = None
    """What it started from."""
    accuracy: float | None = None
    """Share of held-out pairs that it orders as people did; a tie counts a half."""
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    accuracy_size: float | None = None
    accuracy_error: float | None = None
    n: int | None = None
    """Held-out pairs."""
    prompts: int | None = None
    """Their different prompts."""

    def facts(self) -> dict[str, Any]:
        """Return what is known, by the names of `judge.json`."""
        kept = ("trained", "usable", "reason")
        return {k: v for k, v in asdict(self).items() if v is not None or k in kept}


_JUDGES = TypeAdapter(Judge)


def read_judge(folder: Path | None) -> Judge:
    """Read what is known of the judge in an artifact; without a folder there is none.

    Raises:
        DataError: `judge.json` is missing or damaged.
    """
    if folder is None:
        return Judge(False, False, "no judge was given")
    path = folder / JUDGE
    values = read_saved(path)
    return checked(path, lambda: _JUDGES.validate_python(values))


def has_judge_pairs(data: Path) -> bool:
    """Return whether a dataset has pairs for a judge."""
    path = data / PAIRS_JUDGE
    return path.is_file() and next(iter(iterate_rows(path, Pair)), None) is not None


def judge_section(
    section: RewardModelConfig, base: Path | None, negatives: float = 0.0
) -> RewardModelConfig:
    """Return the reward model's section for the judge.

    A base that reads both ways has no use for options of decoders, which the reward model may need.
    A judge has no members.

    Args:
        section: Hyper-parameters of the reward model.
        base: Folder of the judge's own base; None starts from the SFT policy.
        negatives: Setting `judge.negatives`.
    """
    section = section.model_copy(update={"negatives": negatives, "members": 1})
    if base is None:
        return section.model_copy(update={"base": None})
    unused = {"pooling": "last", "lm_loss_coef": 0.0}
    changes = unused if is_encoder(read_json(base / CONFIG)) else {}
    return section.model_copy(update={"base": str(base), **changes})


def write_no_judge(out_dir: Path, reason: str) -> StageResult:
    """Write why there is no judge."""
    return _write(out_dir, Judge(False, False, reason), {})


def measure_judge(
    data: Path,
    out_dir: Path,
    training: Mapping[str, Any],
    base: str,
    *,
    limits: TokenLimits | int,
    runtime: RuntimeConfig | None = None,
) -> StageResult:
    """Measure a trained judge's accuracy on held-out pairs; write `judge.json` beside it.

    A judge is usable if the lower bound of the 95 % interval, clustered by prompt, is above ½.

    Args:
        data: Dataset folder.
        out_dir: Folder of the judge.
        training: Metrics of its training.
        base: What it started from.
        limits: Most tokens of prompts and replies.
        runtime: Device and threads.

    Raises:
        DataError: The judge can't be given too many of the prompts.
    """
    points, prompts = _points(data, out_dir, limits, runtime or RuntimeConfig())
    known: dict[str, Any] = {"base": base, "n": len(points), "prompts": len(set(prompts))}
    if not points:
        reason = "there is no held-out pair to measure it on; raise data.eval_fraction"
        return _write(out_dir, Judge(True, False, reason, **known), training)
    accuracy = share_of(points, prompts)
    known |= accuracy.metrics("accuracy")
    reason = None
    if accuracy.low <= 0.5:
        reason = (
            f"its accuracy on {len(points):,} held-out pairs is {accuracy.value:.3f} "
            f"[{accuracy.low:.3f}, {accuracy.high:.3f}], which may be a coin's; give it more pairs "
            "(data.judge_fraction), or another judge.base"
        )
    return _write(out_dir, Judge(True, reason is None, reason, **known), training)


def _points(
    data: Path, folder: Path, limits: TokenLimits | int, runtime: RuntimeConfig
) -> tuple[list[float], list[str]]:
    """Return a point for each held-out pair that the judge orders right, and its prompt.

    Pairs that are equal where the judge cuts them are left out, as in training.
    """
    import torch  # this module is also read by processes that need no model

    from rlhf.data.fitting import Fitting
    from rlhf.modeling.device import prepare_device
    from rlhf.modeling.reward import Scorer

    scorer = Scorer(folder, prepare_device(runtime), limits)
    fitting = Fitting(scorer.renderer, scorer.limits)

    def differs(pair: Pair) -> bool:
        one, other = (fitting.encode(pair.prompt, t) for t in (pair.chosen, pair.rejected))
        return one.response != other.response

    pairs: list[Pair] = []
    fitting.map(
        read_rows(data / PAIRS_EVAL, Pair), lambda pair: differs(pair) and pairs.append(pair)
    )
    prompts = [pair.prompt for pair in pairs]
    chosen, rejected = (
        scorer(prompts, [getattr(pair, side) for pair in pairs]) for side in ("chosen", "rejected")
    )
    points = (torch.sign(chosen - rejected) + 1) / 2
    return points.tolist(), [repr(prompt) for prompt in prompts]


def _write(out_dir: Path, judge: Judge, training: Mapping[str, Any]) -> StageResult:
    write_json(out_dir / JUDGE, judge.facts())
    return StageResult({**training, **judge.facts()})
