"""Sample reports: promoted, rejected and failed, with hostile and long text."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from hashlib import sha256
from typing import Any

from rlhf.data.audit import Evidence, LeftOut, audit_pairs
from rlhf.data.collect import Totals
from rlhf.data.findings import find
from rlhf.data.records import Comparison, Converted
from rlhf.data.rows import Pair
from rlhf.data.tallies import MAX_NAME, Tallies
from rlhf.gates import Check, Verdict
from rlhf.report import (
    Lineage,
    LineageNode,
    RunOutcome,
    RunReport,
    Sample,
    StageRow,
    StageState,
    trust_answers,
)
from rlhf.report.samples import listed_samples
from tests.report import demo_findings, demo_trust

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)> & "quotes"'
NAMES = (
    "prepare-data",
    "train-sft",
    "train-reward-model",
    "evaluate-reward-model",
    "gate-reward-model",
    "train-judge",
    "train-policy",
    "evaluate-policy",
    "gate-policy",
    "promote",
)
METRICS = (
    "6 000 pairs", "loss 1.02", "loss 0.463", "1 000 pairs", "1 of 1 rules met",
    "accuracy 0.701 [0.672, 0.729]", "reward −0.31 → 1.84", "wins 83.7 %", "3 of 3 rules met",
    "champion of default",
)  # fmt: skip
SECONDS = (4.2, 71.0, 58.3, 6.1, 0.04, 19.5, 948.0, 41.7, 0.03, 0.9)


def digest(name: str) -> str:
    return f"sha256:{sha256(name.encode()).hexdigest()}"


def stages(stop: int = 10, state: str = "Completed", message: str = "") -> tuple[StageRow, ...]:
    """Return the ten stages; that at `stop` ends in `state`, later ones did not run."""
    rows = []
    for i, (name, metric, seconds) in enumerate(zip(NAMES, METRICS, SECONDS, strict=True)):
        if i > stop:
            rows.append(StageRow(name=name, state=StageState.NOT_RUN))
        elif i == stop:
            rows.append(
                StageRow.model_validate(
                    {
                        "name": name,
                        "state": state,
                        "seconds": seconds,
                        "message": message,
                        "metric": "1 of 4 rules met" if state == "GateRejected" else "",
                    }
                )
            )
        else:
            how = StageState.CACHED if i < 2 else StageState.COMPLETED
            artifact = None if name == "promote" else digest(name)
            rows.append(
                StageRow(name=name, state=how, seconds=seconds, metric=metric, artifact=artifact)
            )
    return tuple(rows)


def reward_model(accuracy: float = 0.782) -> dict[str, Any]:
    def group(value: float, n: int) -> dict[str, Any]:
        half = 1.96 * math.sqrt(value * (1 - value) / n)
        return {
            "accuracy": value,
            "accuracy_low": value - half,
            "accuracy_high": value + half,
            "n": n,
        }

    return {
        **group(accuracy, 1000),
        "baseline_longer": 0.571, "baseline_longer_low": 0.54, "baseline_longer_high": 0.602,
        "margin_mean": 1.13, "ceiling": 0.861, "share_of_ceiling": 0.908,
        "by_group": {
            "billing": group(accuracy + 0.03, 260), "delivery": group(accuracy - 0.01, 310),
            "returns": group(accuracy + 0.01, 240), "new templates": group(accuracy - 0.05, 190),
        },
    }  # fmt: skip


def policy() -> dict[str, Any]:
    def wins(rate: float, low: float, high: float) -> dict[str, float]:
        return {"win_rate": rate, "win_rate_low": low, "win_rate_high": high, "n": 150}

    sampled = {
        "win_rate": 0.837, "win_rate_low": 0.791, "win_rate_high": 0.875, "n": 300,
        "reward_before": -0.312, "reward_after": 1.842, "kl": 6.41, "eos_rate": 0.983,
        "tokens_before": 31.4, "tokens_after": 38.2,
        "repetition_before": 0.041, "repetition_after": 0.052,
        "gold_before": 2.11, "gold_after": 3.74, "gold_win_rate": 0.776,
        "gold_win_rate_low": 0.726, "gold_win_rate_high": 0.82,
        "by_group": {
            "seen templates": wins(0.86, 0.795, 0.907), "new templates": wins(0.813, 0.743, 0.868),
        },
    }  # fmt: skip
    greedy = {
        "win_rate": 0.797, "win_rate_low": 0.748, "win_rate_high": 0.838, "n": 300,
        "reward_before": 0.644, "reward_after": 2.02, "kl": 5.2, "eos_rate": 0.997,
        "tokens_before": 33.0, "tokens_after": 37.1,
        "repetition_before": 0.046, "repetition_after": 0.05,
        "gold_before": 2.93, "gold_after": 3.98, "gold_win_rate": 0.741,
        "gold_win_rate_low": 0.688, "gold_win_rate_high": 0.787,
    }  # fmt: skip
    return {"sampled": sampled, "greedy": greedy}


def curves(updates: int = 36) -> list[dict[str, Any]]:
    rows = []
    for i in range(updates):
        rise, wave = 1 - math.exp(-i / 10), math.sin(i * 1.7) * math.cos(i * 0.6)
        rows.append({
            "update": i + 1, "reward": -0.31 + 2.1 * rise + 0.11 * wave,
            "kl": 6.6 * (1 - math.exp(-i / 14)) + 0.2 * wave * rise,
            "entropy": 1.42 - 0.55 * rise + 0.03 * wave,
            "tokens": 31.4 + 7 * rise + 0.8 * wave,
            "value_loss": 0.05 + 0.8 * math.exp(-i / 4) + 0.012 * wave,
            "policy_loss": -0.012 + 0.003 * wave, "clip_fraction": 0.06 + 0.02 * wave,
            "approx_kl": 0.004 + 0.001 * wave,
            "eos_rate": min(1.0, 0.91 + 0.075 * rise + 0.008 * wave),
            "learning_rate": 1e-5 * (1 - 0.9 * i / updates),
            "explained_variance": 0.7 * rise + 0.03 * wave,
        })  # fmt: skip
    return rows


def samples() -> tuple[Sample, ...]:
    return (
        Sample(
            prompt="My parcel was due on Monday and tracking hasn't moved since. Where is it?",
            group="delivery",
            before="We are sorry. Please check the tracking page.",
            after="I'm sorry about the wait. Your parcel left our depot on Friday and is held at "
            "the local hub. It will be delivered tomorrow before noon; if it isn't, reply here and "
            "I'll send a new one at no cost.",
            reward_before=-0.42, reward_after=2.31, gold_before=1.8, gold_after=4.4,
        ),
        Sample(
            prompt="I was charged twice for order 20391.", group="billing", before="",
            after="You're right, and I apologise: the second charge was an error.\n\n"
            "1. I have cancelled it.\n2. The money is back within 3 days.\n"
            "3. You'll get a receipt by email.",
            reward_before=-1.9, reward_after=2.04, gold_before=0.0, gold_after=4.1,
        ),
        Sample(
            prompt=f"What does this mean: {HOSTILE}", group="returns", before=HOSTILE,
            after="long" * 120, reward_before=0.0, reward_after=float("nan"),
        ),
        Sample(
            prompt="متى تصل طلبيتي؟", before="قريبًا.",
            after="\x00\x1b[31m control \ud800 \u202egnp.exe",
        ),
    )  # fmt: skip


def config_rows() -> tuple[tuple[str, str, str], ...]:
    return (
        ("name", "customer-answers", "preset file"),
        ("seed", "7", "command line"),
        ("store", "s3://a-bucket-with-a-long-name/" + "prefix-that-goes-on/" * 6, "preset file"),
        ("ppo.kl_coef", "0.05", "command line"),
        ("evaluation.judge", "world", "preset file"),
        ("gates.reward_model", '[{"metric": "accuracy_low", "min": 0.5}]', "default"),
        ("ppo.learning_rate", "1e-05", "default"),
        ("ppo.chunk_size", "128", "default"),
        ("ppo.clip_range", "0.2", "default"),
        ("reward_model.pooling", "last", "default"),
        ("base.architecture.hidden_size", "128", "default"),
        ("runtime.threads", "2", "default"),
    )


def lineage(count: int = 8) -> Lineage:
    kinds = (
        "dataset",
        "policy",
        "reward-model",
        "metrics",
        "verdict",
        "policy",
        "metrics",
        "verdict",
    )
    edges = (
        (0, 1), (0, 2), (1, 2), (2, 3), (0, 3), (3, 4),
        (1, 5), (2, 5), (0, 5), (5, 6), (1, 6), (6, 7),
    )  # fmt: skip
    nodes = tuple(
        LineageNode(digest=digest(name), kind=kind, stage=name)
        for name, kind in zip(NAMES[:count], kinds[:count], strict=True)
    )
    pairs = tuple((digest(NAMES[a]), digest(NAMES[b])) for a, b in edges if b < count)
    return Lineage(nodes=nodes, edges=pairs)


def _report(**changes: Any) -> RunReport:
    return RunReport.model_validate(
        {
            "title": "customer-answers",
            "run_name": "quick-ibis-20261123",
            "started": "2026-11-23T05:40:12+00:00",
            "seed": 7,
            "data": {
                "source": "world",
                "pairs_train": 6000,
                "pairs_eval": 1000,
                "prompts_train": 4608,
                "prompts_eval": 300,
                "demonstrations": 6000,
                "chosen_longer": 0.571,
                "left_out": {
                    "reply too long": 12,
                    "both replies are the same": 31,
                    "prompt is empty": 2,
                },
                "rows": 6_412,
                "rows_used": 6_367,
                "agreement": 0.914,
                "rows_left_out": "45 of 6,412 rows left out",
                "unused_columns": "annotator, created_at",
                "notes": ["format: comparison; response_a against response_b, decided by winner"],
            },
            "config_rows": config_rows(),
            "advice": (
                "ppo.kl_coef = 0.9 is outside the advised 0.01–0.5; keep it if you mean it",
            ),
            "versions": {
                "rlhf-pipeline": "0.1.0",
                "torch": "2.13.0",
                "trl": "1.16.0",
                "transformers": "5.23.0",
                "python": "3.11.7",
            },
            **changes,
        }
    )


GATES = (
    Verdict(
        gate="gate-reward-model",
        subject=digest("train-reward-model"),
        approved=True,
        checks=(Check(metric="accuracy_low", value=0.7564, bound=">= 0.5", passed=True),),
    ),
    Verdict(
        gate="gate-policy",
        subject=digest("train-policy"),
        approved=True,
        checks=(
            Check(metric="sampled.win_rate_low", value=0.791, bound=">= 0.5", passed=True),
            Check(metric="sampled.kl", value=6.41, bound="<= 20.0", passed=True),
            Check(metric="sampled.eos_rate", value=0.983, bound=">= 0.8", passed=True),
        ),
    ),
)


def card() -> dict[str, Any]:
    """Return the data card of a comparison log whose judges like length and lists."""
    draw = random.Random(0)
    names = ("ada", "bert", "cleo", HOSTILE[:MAX_NAME])
    tallies, totals = Tallies(annotator_column="annotator"), Totals()
    tallies.set_columns(("annotator", "category"))
    pairs = []
    for i in range(600):
        prompt, votes = "Where do I find my old invoices? " * (1 + i % 5), []
        texts = ["Look into your account. " * draw.randrange(1, 20) for _ in range(2)]
        texts[0] += "\n- one\n- two" * draw.randrange(2)
        chosen, rejected = sorted(texts, key=lambda t: -len(t) * draw.uniform(0.5, 1.5))
        position = draw.choice(("first", "first", "second"))
        for name in draw.sample(names, 1 + i % 3):
            one, other = (chosen, rejected) if draw.random() < 0.8 else (rejected, chosen)
            comparison = Comparison(f"{prompt}{i}", one, other, None, position)
            row = {"annotator": name, "category": ("returns", "orders", HOSTILE)[i % 3]}
            tallies.add(row, Converted([comparison]))
            votes.append(one == chosen)
        if len(votes) > 1:
            totals.repeated += 1
            totals.votes += len(votes)
            totals.agreeing += max(sum(votes), len(votes) - sum(votes))
            totals.pairwise += 0.7
        pairs.append(Pair(f"{prompt}{i}", chosen, rejected))
    left_out = (
        LeftOut("reply too long", 12, f"a.csv:7 {HOSTILE}", "raise data.max_reply_chars", False),
        LeftOut("both replies are the same", 31, "a.csv:9", "remove the row", True),
    )
    audit = audit_pairs(pairs, Evidence(tallies, totals, 643, left_out))
    figures = {"findings": [asdict(finding) for finding in find(audit)], **asdict(audit)}
    return json.loads(json.dumps(figures))


def full_report() -> RunReport:
    """Return the report of a promoted run, with every part."""
    return _report(
        outcome="Promoted",
        reason="The policy met every rule of both gates and is the new champion.",
        stages=stages(),
        card=card(),
        reward_model=reward_model(),
        policy=policy(),
        curves=curves(),
        samples=samples(),
        replies=tuple(listed_samples([sample.model_dump() for sample in samples()])),
        replies_of=4,
        verdicts=GATES,
        lineage=lineage(),
    )


def trust_report(better: bool = True, state: str = "no") -> RunReport:
    """Return the report of a run with a judge, a champion and a watchdog."""
    verdict = demo_trust.policy_verdict(digest("train-policy"), better)
    figures, judged = policy(), demo_trust.sampled_trust()
    for mode in figures.values():
        mode.update(judged)
    figures |= demo_trust.policy_trust(state, better)
    kinds = (("disagree", "lost"), ("changed",), ("lost",), ())
    replies = [
        sample.model_copy(update={"kinds": kind, "judge_before": 0.4, "judge_after": 1.1})
        for sample, kind in zip(samples(), kinds, strict=True)
    ]
    replies[0] = replies[0].model_copy(
        update={
            "champion": "We are sorry. " + HOSTILE,
            "reward_champion": 1.2,
            "disagreement": 0.31,
        }
    )
    return full_report().model_copy(
        update={
            "outcome": RunOutcome.PROMOTED if better else RunOutcome.NOT_BETTER,
            "reason": "The policy met every gate and is the champion of default."
            if better
            else "keep the champion: champion.judge_win_rate = 0.492, needs 99.5 % lower end ≥ 0.5",
            "reward_model": {**reward_model(), **demo_trust.reward_model_trust()},
            "policy": figures,
            "watchdog": demo_trust.watchdog(),
            "power": (
                "300 gate prompts × 2 replies: a policy that truly wins 58.2% of its comparisons "
                "with the champion is found better in 4 of 5 runs (at 99.5% confidence, for each "
                "of 10 looks); to find one that wins 55% takes 1,180 prompts",
            ),
            "verdicts": (GATES[0], verdict),
            "trust": trust_answers(figures, verdict),
            "overview": demo_findings.worse(),
            "samples": tuple(replies),
            "stages": stages() if better else stages(8, "NotBetter", "keep the champion"),
        }
    )


def rejected_report() -> RunReport:
    """Return the report of a rejected reward model: no policy, curves or samples."""
    why = "accuracy_low = 0.49998 does not meet >= 0.5"
    verdict = Verdict(
        gate="gate-reward-model",
        subject=digest("train-reward-model"),
        approved=False,
        checks=(
            Check(metric="accuracy_low", value=0.49998, bound=">= 0.5", passed=False),
            Check(metric="margin_mean", value=None, bound=">= 0.1", passed=False),
            Check(metric="calibration_error", value=float("nan"), bound="<= 0.1", passed=False),
            Check(metric="n", value=1000.0, bound=">= 200", passed=True),
        ),
    )
    return _report(
        outcome="GateRejected",
        reason=f"The reward model was rejected: {why}.",
        stages=stages(4, "GateRejected", why),
        reward_model=reward_model(0.531),
        verdicts=(verdict,),
        lineage=lineage(5),
    )


def failed_report() -> RunReport:
    """Return the report of a run that failed in its second stage, without lineage."""
    why = (
        "TrainingError: loss is nan at step 12; lower sft.learning_rate\n  in /work/" + "deep/" * 40
    )
    return _report(
        outcome="Failed", reason=why, stages=stages(1, "Failed", why), data={}, versions={}
    )
