"""`rlhf samples`: all replies of an evaluation, found by run, policy or champion, in any order."""

from __future__ import annotations

import json
import math
import os
import re

import pytest

from flows.samples import LONGEST, samples
from rlhf.errors import ArtifactMissing, ConfigError
from rlhf.files import write_json
from rlhf.report import RunOutcome
from rlhf.report.replies import all_replies, contradicted, lost, ordered
from rlhf.report.samples import listed_samples, sorted_cards
from tasks.console import console
from tasks.run_record import new_record, write_record
from tests.history.conftest import HOSTILE, sample

#: Gains by the reward model, and by the judge.
ROWS = [
    sample("p1", 1.0, 0.5, group="billing", after="a" * 30),
    sample("p2", 2.0, -1.0),
    sample("p3", -0.5, -3.0, disagreement=0.9, more=[
        {"before": "b", "after": "second", "reward_before": 0.0, "reward_after": -1.0,
         "judge_before": 0.0, "judge_after": 4.0, "champion": None},
    ]),
    sample("p4", -2.0, 0.0, disagreement=0.1),
]  # fmt: skip


@pytest.fixture
def refs(made):
    return made.run(
        "weekly-20261101",
        "2026-11-01T08:00:00+00:00",
        RunOutcome.PROMOTED,
        evaluation={"kl": 1.0},
        rows=ROWS,
    )


def texts(replies) -> list[str]:
    return [reply.row["after"].removeprefix("after ")[:6] for reply in replies]


def test_every_sample_is_a_reply_with_its_gain():
    every = all_replies(ROWS)
    assert [(r.sample, r.samples) for r in every] == [(1, 1), (1, 1), (1, 2), (2, 2), (1, 1)]
    assert [r.gain for r in every] == [0.5, -1.0, -3.0, 4.0, 0.0]  # the judge decides
    without = [{**r, "judge_after": None, "more": []} for r in ROWS]
    assert [r.gain for r in all_replies(without)] == [1.0, 2.0, -0.5, -2.0]
    assert every[3].row["prompt"] == "p3"
    assert "more" not in every[2].row


def test_orders():
    every = all_replies(ROWS)
    assert texts(ordered(every, "lost")) == ["p3", "p2", "p4", "aaaaaa", "second"]
    assert texts(ordered(every, "reward")) == ["p4", "second", "p3", "aaaaaa", "p2"]
    assert texts(lost(every)) == ["p3", "p2"]
    assert texts(ordered(every, "longest"))[0] == "aaaaaa"
    assert texts(ordered(every, "prompts")) == texts(every)
    assert texts(ordered(every, "members"))[:2] == ["p3", "second"]
    # In deviations of each scorer's gains: 2.5 and 1.8 apart.
    assert texts(contradicted(every)) == ["second", "p2"]
    with pytest.raises(ConfigError, match=r"--sort gold: .*no gold score.*choose one of lost"):
        ordered(every, "gold")
    with pytest.raises(ConfigError, match="is no order; choose one of lost, reward"):
        ordered(every, "wrost")


def test_the_page_orders_by_the_length_of_whole_replies():
    long = [sample(f"p{size}", gain, after="a" * size)
            for gain, size in ((1.0, 9000), (4.0, 30000), (3.0, 5), (2.0, 12000))]  # fmt: skip
    cards = sorted_cards(listed_samples(long), of=4)
    assert cards is not None
    ranks = {card.prompt: style.split("--longest:")[1].split(";")[0] for card, style in cards.cards}
    assert ranks == {"p30000": "0", "p12000": "1", "p9000": "2", "p5": "3"}
    texts = [reply.text for card, _ in cards.cards for reply in card.replies]
    assert max(map(len, texts)) < 2100


def test_without_a_judge_members_disagree_and_without_members_nothing_does():
    rows = [sample("p1", 1.0, disagreement=0.1), sample("p2", 1.0, disagreement=0.7)]
    assert texts(contradicted(all_replies(rows))) == ["p2", "p1"]
    with pytest.raises(ConfigError, match=r"neither a judge's scores nor.*use --lost"):
        contradicted(all_replies([sample("p1", 1.0)]))


@pytest.mark.parametrize(
    "name", ["run", "policy", "evaluation", "report", "champion", "line", "verdict"]
)
def test_replies_are_found_by_any_name(made, refs, shown, name):
    made.promote(refs, run="weekly-20261101")
    report = next(ref for ref, _, _ in made.store.list() if ref.kind == "report")
    names = {
        "run": "weekly-2026", "policy": refs["train-policy"].digest[:8],
        "evaluation": refs["evaluate-policy"].short, "report": report.short,
        "champion": "champion", "line": "champion:default", "verdict": refs["gate-policy"].short,
    }  # fmt: skip
    out = shown(samples, names[name])
    assert "4 held-out prompts, 5 replies; by the judge 2 are worse than SFT's, 1 as good" in out
    assert out.index("p3") < out.index("p2") < out.index("p4")


def test_the_newest_evaluation_of_a_policy_is_shown(made, refs, as_json):
    policy = {"policy": refs["train-policy"]}
    files = {"evaluation.json": {}, "samples.json": [sample("newer", 1.0)]}
    newer = made.publish("evaluation", files, policy)
    stored = made.folder.parent / "store"
    old = stored / f"manifests/{refs['evaluate-policy'].digest}.json"
    os.utime(old, (1, 1))
    assert (stored / f"manifests/{newer.digest}.json").exists()
    assert [r["prompt"] for r in as_json(samples, refs["train-policy"].digest)] == ["newer"]


def test_selections_limits_and_json(refs, shown, as_json):
    run = "weekly-20261101"
    assert [r["gain"] for r in as_json(samples, run)] == [-3.0, -1.0, 0.0, 0.5, 4.0]
    assert [r["gain"] for r in as_json(samples, run, lost=True)] == [-3.0, -1.0]
    assert [r["prompt"] for r in as_json(samples, run, all=True)] == ["p1", "p2", "p3", "p3", "p4"]
    assert [r["gain"] for r in as_json(samples, run, lost=True, sort="reward")] == [-3.0, -1.0]
    assert as_json(samples, run, longest=True, n=1)[0]["characters"] == 30
    out = shown(samples, run, lost=True, n=1)
    assert "--lost: 2 of 5" in out
    assert "1 more: --n 2 or --all shows them" in out
    with pytest.raises(ConfigError, match="--lost and --longest are both given"):
        samples(run, lost=True, longest=True)
    with pytest.raises(ConfigError, match="--sort 'x' is no order"):
        samples(run, sort="x")


def test_side_by_side_on_a_wide_terminal_and_stacked_on_a_narrow_one(refs, shown, monkeypatch):
    narrow = shown(samples, "weekly-20261101", n=1)
    assert max(map(len, narrow.splitlines())) <= 100  # the first line is not wrapped
    assert re.search(r"before \(SFT\) .*\nbefore p3\nafter \(PPO\)", narrow)
    monkeypatch.setattr(console, "_width", 130)
    assert re.search(r"before p3 +after p3", shown(samples, "weekly-20261101", n=1))


def test_hostile_and_huge_texts_stay_text(made, shown, as_json):
    chat = [{"role": "user", "content": HOSTILE}]
    rows = [sample(chat, -1.0, after=HOSTILE * 1000, before="", group=HOSTILE, champion=HOSTILE)]
    made.run("h", "2026-11-01", RunOutcome.NOT_BETTER, evaluation={"kl": 1.0}, rows=rows)
    out = shown(samples, "h")
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert r"\x1b[31m[/red]<script>" in out
    assert f"{len(HOSTILE) * 1000 - LONGEST:,} more characters; --json" in re.sub(r"\s+", " ", out)
    assert "(empty reply)" in out
    assert as_json(samples, "h")[0]["after"] == HOSTILE * 1000


def test_a_run_without_replies_or_of_no_such_name_has_one_line(made, refs, as_json):
    made.run("stopped", "2026-11-02", RunOutcome.GATE_REJECTED, reason="accuracy = 0.5")
    store = made.store.uri
    with pytest.raises(ArtifactMissing, match=r"stopped: .*not evaluated.*GateRejected: accuracy"):
        samples("stopped", store=store)
    with pytest.raises(ArtifactMissing, match=r"'nope': no run.*weekly-20261101.*--store"):
        samples("nope", store=store)
    with pytest.raises(ConfigError, match="is of kind dataset; give a run, a policy"):
        samples(refs["prepare-data"].digest, store=store)
    with pytest.raises(ArtifactMissing, match="has no champion of that line; lines that have: non"):
        samples("champion:x", store=store)
    made.run("weekly-20261102", "2026-11-03", RunOutcome.FAILED)
    with pytest.raises(ConfigError, match="'weekly': 2 runs are meant"):
        samples("weekly", store=store)


def test_this_machines_record_names_the_store(made, refs, capsys, tmp_path):
    record = new_record("weekly-20261101", [], made.store.uri)
    write_record(record, tmp_path / "work/runs")
    samples("weekly", json=True)
    assert '"p3"' in capsys.readouterr().out
    write_record(
        record.model_copy(update={"store": str(tmp_path / "away")}), tmp_path / "work/runs"
    )
    with pytest.raises(ArtifactMissing, match="away: there is no store"):
        samples("weekly")


def test_a_comparisons_folder_has_replies_too(made, refs, as_json, tmp_path):
    (tmp_path / "compared").mkdir()
    write_json(tmp_path / "compared/samples.json", [sample("p", -1.0)])
    assert [r["gain"] for r in as_json(samples, "compared")] == [-1.0]


def test_a_folder_needs_no_store(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_WORK_DIR", str(tmp_path / "work"))
    monkeypatch.setenv("PREFECT_API_URL", "")
    (tmp_path / "compared").mkdir()
    write_json(tmp_path / "compared/samples.json", [sample("p", -1.0)])
    samples("compared", json=True)
    assert [row["gain"] for row in json.loads(capsys.readouterr().out)] == [-1.0]
    assert [path.name for path in tmp_path.iterdir()] == ["compared"]


def test_numbers_that_are_not_finite_are_null(tmp_path, capsys):
    rows = [
        {**sample("nan", 0.0), "reward_after": math.nan, "disagreement": math.inf},
        {**sample("huge", 0.0), "reward_before": -1e308, "reward_after": 1e308},
    ]
    (tmp_path / "samples.json").write_text(json.dumps(rows))
    samples(str(tmp_path), json=True, all=True)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    nan, huge = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert (nan["reward_after"], nan["disagreement"], nan["gain"]) == (None, None, None)
    assert (huge["reward_after"], huge["gain"]) == (1e308, None)
