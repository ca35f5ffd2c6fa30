"""The report's HTML: parts, escaping, determinism, nothing external."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf.gates import Check, Verdict
from rlhf.report import STATES, RunOutcome, RunReport, StageRow, StageState, render
from tests.report import demo, demo_trust

REPORTS = {
    "full": demo.full_report(),
    "rejected": demo.rejected_report(),
    "failed": demo.failed_report(),
    "trust": demo.trust_report(),
    "kept": demo.trust_report(better=False, state="suspected"),
}
PAGES = {name: render(report) for name, report in REPORTS.items()}
VOID = {"meta", "link", "img", "input"}


class Tree(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def sections(page):
    return re.findall(r'<section id="([a-z-]+)"', page)


def test_full_report_has_every_section_in_order():
    assert sections(PAGES["full"]) == [
        "pipeline", "data", "reward-model", "gates", "training", "policy", "samples",
        "configuration", "lineage", "versions",
    ]  # fmt: skip


def test_rejected_report_has_no_policy_and_names_the_rule():
    page = PAGES["rejected"]
    assert sections(page) == [
        "pipeline", "data", "reward-model", "gates", "configuration", "lineage", "versions",
    ]  # fmt: skip
    assert "Rejected by a gate" in page
    # Rounded to three places the value would read 0.5 and look as if it met the bound.
    assert ">0.49998</td>" in page
    assert "≥ 0.5" in page
    # A rule without a value, and one whose value is not a number.
    assert ">missing</td>" in page
    assert ">not finite</td>" in page


def test_failed_report_puts_the_reason_on_top():
    page = PAGES["failed"]
    assert sections(page) == ["pipeline", "configuration"]
    # The head has it too, for the index of reports.
    reason = page.index("TrainingError: loss is nan at step 12", page.index("<body>"))
    assert page.index("<h1") < reason < page.index("<section")


def test_advice_stands_with_the_configuration():
    page = PAGES["full"]
    line = page.index("ppo.kl_coef = 0.9 is outside the advised 0.01–0.5")
    assert page.index('id="configuration"') < line < page.index('id="lineage"')
    without = render(REPORTS["full"].model_copy(update={"advice": ()}))
    assert "advised" not in without


def test_the_data_card_stands_with_the_data_findings_first():
    page = PAGES["full"]
    part = page[page.index('<section id="data"') : page.index('<section id="reward-model"')]
    order = [
        "The longer reply is preferred in 87", ">Kept<", "Rows left out, by reason",
        "How often rules that ignore content", "Agreement of votes", "by category", "<polyline",
        "Languages of the prompts, on a sample",
    ]  # fmt: skip
    assert [part.index(text) for text in order] == sorted(part.index(text) for text in order)
    # Without a card, as of datasets made before there were cards, the reasons are a table.
    old = render(REPORTS["full"].model_copy(update={"card": None}))
    assert ">Left out<" in old
    assert "findings" not in old[old.index("<body") :]


def test_a_report_of_nothing_renders():
    report = RunReport(
        title="t",
        run_name="r",
        started="yesterday",
        outcome=RunOutcome.FAILED,
        reason="config",
        seed=0,
    )
    page = render(report)
    assert sections(page) == []
    assert "yesterday" in page


def test_partial_metrics_render():
    # No interval, no greedy decoding, no judge, no groups; curves of one update with gaps.
    report = REPORTS["full"].model_copy(
        update={
            "reward_model": {"accuracy": 0.7},
            "policy": {"sampled": {"win_rate": 0.6, "kl": float("nan")}},
            "curves": ({"update": 0, "reward": None, "kl": 0.0},),
        }
    )
    page = render(report)
    assert "60.0\u00a0%" in page
    assert "95\u00a0% interval" not in page
    assert "Greedy" not in page
    assert "Independent judge" not in page


def test_trust_stands_where_people_look():
    page = PAGES["trust"]
    assert sections(page) == sections(PAGES["full"])
    order = [
        "Better than SFT?", "Better than the champion?", "Over-optimised?",
        '<section id="pipeline"',
        "Choose by format", "Log-loss", "Reliability", "Margins", "The worst slice is",
        "Flattery is added", '<section id="gates"', "300 gate prompts × 2 replies",
        "Against the champion c4a3f0c4a3f0, look 2 of 10",
        "The watchdog stopped PPO after update 36",
        "Judge</b>", "No sign of over-optimisation.", "Win rate over the champion",
        "non-inferiority margin, 40.0", "Gap: wins by the judge", "Shifts from the SFT policy",
        "Forgetting", "disagree most", "lost most", "changed most",
    ]  # fmt: skip
    assert [page.index(text) for text in order] == sorted(page.index(text) for text in order)
    assert '<th scope="row" class="num">24 · chosen</th>' in page
    # Win rates stand in the answers: their tiles would say it twice.
    assert "Wins by reward" not in page[: page.index("<nav")]
    assert "Wins by reward" in PAGES["full"][: PAGES["full"].index("<nav")]


def test_keeping_the_champion_is_no_rejection():
    page = PAGES["kept"]
    assert '<span class="badge is-kept">' in page
    assert "Keeps the champion" in page
    assert "Not better than the champion" in page
    assert "Over-optimisation is suspected." in page
    assert "is-rejected" not in re.search(r'<p class="reason[^>]*>', page)[0]


PARTS = [
    ("reward_model", key) for key in demo_trust.reward_model_trust()
] + [("policy", key) for key in demo_trust.policy_trust()]  # fmt: skip


@pytest.mark.parametrize(("part", "key"), PARTS)
@pytest.mark.parametrize("value", ["missing", None, {}, [], "text", float("nan")], ids=repr)
def test_each_part_may_be_missing_or_broken(part, key, value):
    report = REPORTS["trust"]
    metrics = {k: v for k, v in getattr(report, part).items() if k != key}
    if value != "missing":
        metrics[key] = value
    page = render(report.model_copy(update={part: metrics}))
    assert sections(page) == sections(PAGES["full"])


@pytest.mark.parametrize(
    "changes",
    [
        {"policy": None, "trust": ()}, {"reward_model": None}, {"watchdog": None}, {"watchdog": {}},
        {"verdicts": ()}, {"samples": ()}, {"curves": ()}, {"power": ()},
        {"watchdog": {"frontier": [{"update": 3}], "chosen": None, "stopped": "x"}},
        {"watchdog": {"frontier": [{"kl": float("nan"), "judge": float("nan")}], "stopped": None}},
    ],
    ids=str,
)  # fmt: skip
def test_parts_of_the_report_may_be_missing(changes):
    page = render(REPORTS["trust"].model_copy(update=changes))
    assert Tree(page).open == []
    if "watchdog" in changes:
        assert "Checkpoints that the watchdog looked at" not in page


def test_tags_nest():
    for page in PAGES.values():
        assert Tree(page).open == []


@pytest.mark.parametrize(
    "place",
    [
        "reply",
        "prompt",
        "reason",
        "config",
        "group",
        "metric",
        "card",
        "reward model",
        "policy",
        "watchdog",
        "verdict",
    ],
)
def test_untrusted_text_is_escaped_everywhere(place):
    full, bad = REPORTS["full"], demo.HOSTILE + "</style></title>' onload='x"
    changes = {
        "reply": {"samples": (full.samples[0].model_copy(update={"after": bad}),)},
        "prompt": {"samples": (full.samples[0].model_copy(update={"prompt": bad}),)},
        "reason": {"reason": bad, "title": bad, "run_name": bad, "started": bad},
        "config": {"config_rows": ((bad, bad, bad),), "advice": (bad,), "versions": {bad: bad}},
        "group": {"reward_model": {"accuracy": 0.7, "by_group": {bad: {"accuracy": 0.7}}}},
        "card": {
            "card": {
                "findings": [{"level": bad, "text": bad}],
                "formats": {bad: {"wins": {"share": 0.6, "n": 3}}},
                "annotators": {"rows": [{"name": bad, "agreement": {"share": 0.6}}]},
                "slices": {bad: {bad: {"share": 0.6}}},
                "languages": {bad: {"share": 0.6}},
                "lengths": {"prompt": {"histogram": {"8": 3}, "quantiles": {"p5": bad}}},
                "left_out": [{"reason": bad, "rows": 3}],
            }
        },
        "reward model": {
            "reward_model": {
                "by_slice": {bad: {"accuracy": 0.6}},
                "worst_slice": bad,
                "worst": {"accuracy": 0.6},
                "probes": {
                    bad: {
                        "rises": 0.3,
                        "mean_change": bad,
                        "example": {
                            "prompt": [{"role": bad, "content": bad}],
                            "reply": bad,
                            "probed": bad,
                            "before": bad,
                        },
                    }
                },
                "reliability": [{"confidence": 0.5, "accuracy": 0.5, "n": bad}],
            }
        },
        "policy": {
            "policy": {
                "champion": {"policy": bad, "by_group": {bad: {"win_rate": 0.5}}, "win_rate": 0.5},
                "shifts": [{"metric": bad, "before": bad}],
                "notes": [bad],
                "judge": {"usable": False, "reason": bad},
                "over_optimisation": {"state": bad, "evidence": bad},
            },
            "trust": ((bad, bad, bad, bad),),
            "power": (bad,),
            "samples": (
                full.samples[0].model_copy(update={"champion": bad, "kinds": ("lost", bad)}),
            ),
        },
        "watchdog": {
            "watchdog": {
                "frontier": [{"update": 1, "kl": 1.0, "judge": 1.0, "proxy": bad}],
                "stopped": {"detector": bad, "evidence": bad},
                "notes": [bad],
            }
        },
        "verdict": {
            "verdicts": (
                Verdict(
                    bad,
                    bad,
                    False,
                    (
                        Check(bad, 1.0, bad, False, note=bad),
                        Check(f"by_group.{bad}.accuracy", 1.0, bad, False, kind="champion"),
                    ),
                    champion=bad,
                    look=1,
                ),
            )
        },
        "metric": {
            "stages": (
                StageRow(name=bad, state=StageState.FAILED, metric=bad, artifact=bad, message=bad),
            ),
            "data": {"source": bad, bad: {bad: bad}, "left_out": {bad: 3}},
            "curves": ({"update": 1, "reward": 1.0, bad: bad},),
        },
    }
    page = render(RunReport.model_validate({**dict(full), **changes[place]}))
    tree = Tree(page)
    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page.lower()
    assert not {"script", "img"} & set(tree.tags)
    assert not [name for name, _ in tree.attributes if name.startswith("on")]


def test_hidden_characters_are_shown_as_escapes_and_the_page_can_be_written():
    page = PAGES["full"]
    assert page.encode()  # a lone surrogate would raise
    assert r"\x00\x1b[31m control \ud800 \u202egnp.exe" in page


def test_same_report_same_bytes():
    # Another process with another hash seed: the order of sets and hashes must not matter.
    script = (
        "import hashlib; from tests.report import demo; from rlhf.report import render; "
        "print(hashlib.sha256(render(demo.full_report()).encode()).hexdigest())"
    )
    there = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True,
        cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONHASHSEED": "12345"},
    ).stdout.strip()  # fmt: skip
    assert there == hashlib.sha256(PAGES["full"].encode()).hexdigest()
    assert render(demo.full_report()) == PAGES["full"]


def test_nothing_external():
    for page in PAGES.values():
        tree = Tree(page)
        targets = [
            v for k, v in tree.attributes if k in {"src", "href", "srcset", "data", "action"}
        ]
        assert all(target == "data:," or target.startswith("#") for target in targets)
        assert not re.search(r"https?://|@import|url\(|@font-face", page)


def test_links_lead_somewhere_and_ids_are_unique():
    for page in PAGES.values():
        tree = Tree(page)
        ids = [value for name, value in tree.attributes if name == "id"]
        assert len(ids) == len(set(ids))
        links = {value[1:] for name, value in tree.attributes if name == "href" and value[0] == "#"}
        assert links <= set(ids)


def test_picture_and_table_name_every_state():
    labels = {look.label for look in STATES.values()}
    found = [t for t in Tree(PAGES["rejected"]).texts if t in labels]
    # Each in the picture and in the table: 2 from cache, 2 completed, 1 rejected, 5 not run;
    # "Rejected" once more as the gate's verdict.
    assert Counter(found) == {"From cache": 4, "Completed": 4, "Rejected": 3, "Not run": 10}
    assert PAGES["rejected"].count('class="node is-notrun gate"') == 1
