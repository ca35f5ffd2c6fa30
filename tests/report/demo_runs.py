"""Several runs: the history of a line, two runs side by side, a folder of reports."""

from __future__ import annotations

from rlhf.report.history import Entry
from rlhf.report.model import ConfigRow
from rlhf.report.stored import SavedReport
from rlhf.report.two_runs import TwoRuns, side_by_side
from tests.report import demo

LONG = "a reason that goes on and on " * 12


def entries() -> list[Entry]:
    """Return ten weeks of a line, two of them not promoted, and a rollback; hostile text."""
    found: list[Entry] = []
    for week in range(10):
        promoted = week not in (3, 6)
        rate = 0.55 + 0.02 * week
        metrics = {
            "win_rate": rate, "win_rate_low": rate - 0.07, "win_rate_high": rate + 0.07,
            "judge_win_rate": rate - 0.05, "judge_win_rate_low": rate - 0.12,
            "judge_win_rate_high": rate + 0.02, "reward": week / 10, "reward_before": 0.0,
            "reward_gain": week / 10, "reward_gain_low": week / 10 - 0.2,
            "reward_gain_high": week / 10 + 0.2, "kl": 3.0 + week, "eos_rate": 0.99 - week / 100,
            "tokens": 40.0, "accuracy": 0.7, "pairs": 10_000.0 + 500 * week,
        }  # fmt: skip
        found.append(
            Entry(
                line="support",
                when=f"2026-{9 + week // 5:02d}-{1 + 6 * (week % 5):02d}T08:00:00+00:00",
                outcome="Promoted" if promoted else "NotBetter" if week == 3 else "GateRejected",
                policy=demo.digest(f"policy {week}")[7:], run=f"support-{week} {demo.HOSTILE}",
                reason=LONG if week == 6 else "it met every gate", by="ann", seconds=3600.0 + week,
                metrics=metrics, data=demo.digest("data"), findings=(demo.HOSTILE, LONG),
                drift=("tokens of chosen: 0.09",), changes=("pairs 10,000 → 10,500 (+500)",),
            )
        )  # fmt: skip
    back = Entry(line="support", when="2026-10-28T08:00:00+00:00", outcome="RolledBack",
                 policy=found[8].policy, by="bob", reason="it swears", metrics=found[8].metrics,
                 is_champion=True)  # fmt: skip
    return [*found, back]


def two_runs() -> TwoRuns:
    """Return two runs with the same judge, and hostile text."""
    reports = [
        SavedReport(
            run_name=f"weekly-{side}", started="2026-11-01T08:00:00+00:00", outcome="Promoted",
            reason=demo.HOSTILE, policy=demo.policy(), reward_model=demo.reward_model(),
            config_rows=(
                ConfigRow("ppo.kl_coef", value, "x"), ConfigRow("data.source", value * 60, "x"),
                ConfigRow(demo.HOSTILE, value, "x"),
            ),
        )
        for side, value in (("a", "0.1"), ("b", "0.05"))
    ]  # fmt: skip
    rows = [
        [
            {"prompt": s.prompt, "group": s.group, "before": s.before, "after": s.after,
             "reward_after": gain, "judge_after": gain + i}
            for i, s in enumerate(demo.samples())
        ]
        for gain in (0.0, 1.0)
    ]  # fmt: skip
    return side_by_side(*reports, (rows[0], rows[1]), ["judge"])
