"""The promote stage and its commands, on a real store and a small real policy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flows.cli import app
from rlhf import champions
from rlhf.challenge import describe_verdict, with_comparison
from rlhf.champions import record_approval
from rlhf.config import ChampionGateConfig, GateRule, PipelineConfig
from rlhf.data.rows import PROMPTS_EVAL, PromptRow, read_rows
from rlhf.errors import (
    ApprovalMissing,
    ApprovalRefused,
    ArtifactMissing,
    ConfigError,
    GateRejected,
    PolicyWithdrawn,
    PromotionLost,
    SmokeTestFailed,
    is_retriable,
)
from rlhf.files import read_json, write_json
from rlhf.gates import Check, judge
from rlhf.smoke import PROMPTS
from rlhf.store import ArtifactRef, Producer, Store
from tasks import promotion
from tasks.runner import Outcome, fingerprint, run_stage, store_of
from tasks.stages import STAGES

PRODUCER = Producer(stage="x", code_version="1", config={}, seed=0, versions={})
PROMOTE = STAGES["promote"]


class Line:
    """A model line with its store, and what a promotion takes."""

    def __init__(self, folder: Path, fresh: Path, data: Path) -> None:
        self.folder, self.fresh = folder, fresh
        self.data = self._published(data, "dataset")

    def config(self, **promotion_: object) -> PipelineConfig:
        runtime = {"work_dir": str(self.folder / "work"), "device": "cpu", "threads": 1}
        section = {"name": "ours", **promotion_}
        tree = {"store": str(self.folder / "store"), "promotion": section, "runtime": runtime}
        return PipelineConfig.model_validate(tree)

    @property
    def store(self) -> Store:
        return store_of(self.config())

    def policy(self, change: Callable[[Path], object] = lambda _: None) -> ArtifactRef:
        bundle = Path(shutil.copytree(self.fresh, self.folder / "bundle", dirs_exist_ok=True))
        change(bundle)
        return self._published(bundle, "policy", data=self.data)

    def verdict(
        self, policy: ArtifactRef, least: float = 0.0, champion: str | None = None,
        loses: bool = False,
    ) -> ArtifactRef:  # fmt: skip
        said = judge("gate-policy", policy.digest, {"m": 0.5}, [GateRule(metric="m", min=least)])
        said = replace(said, champion=champion)
        if loses:
            looked = Check("look", 2.0, "≤ 1", False, kind="champion")
            said = replace(said, approved=False, checks=(*said.checks, looked))
        (self.folder / "verdict").mkdir(exist_ok=True)
        write_json(self.folder / "verdict" / "verdict.json", asdict(said))
        return self._published(self.folder / "verdict", "verdict", policy=policy)

    def run(
        self, policy: ArtifactRef, least: float = 0.0, champion: str | None = None,
        **promotion_: object,
    ) -> Outcome:  # fmt: skip
        verdict = self.verdict(policy, least, champion)
        inputs = {"data": self.data, "policy": policy, "verdict": verdict}
        return run_stage(PROMOTE, self.config(**promotion_), inputs)

    def champion(self) -> champions.Promotion | None:
        return champions.champion(self.store, "ours")

    def _published(self, folder: Path, kind: str, **parents: ArtifactRef) -> ArtifactRef:
        return self.store.publish(folder, kind, parents=parents, producer=PRODUCER, metrics={})


@pytest.fixture
def line(tmp_path, fresh, data) -> Line:
    return Line(tmp_path, fresh, data)


@pytest.fixture
def answering(monkeypatch) -> None:
    """The smoke test, which takes seconds, is passed by all where a test is not about it."""
    said = [{"prompt": "tea?", "reply": "good"}]
    for module in ("tasks.promotion.smoke_test", "rlhf.smoke.smoke_test"):
        monkeypatch.setattr(module, lambda *_, **__: said)


def noted(text: str) -> Callable[[Path], object]:
    """A bundle that differs from others by a note."""
    return lambda bundle: (bundle / "note.txt").write_text(text)


def unreadable(bundle: Path) -> None:
    path = bundle / "tokenizer.json"
    path.write_text(path.read_text()[:-200])


def spoilt(bundle: Path) -> None:
    weights = load_file(bundle / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, bundle / "model.safetensors", {"format": "pt"})


# --- the stage --------------------------------------------------------------------------------


def test_a_policy_that_answers_is_promoted_with_its_replies(line, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torch.py").write_text("raise SystemExit('not of this folder')")
    policy = line.policy()
    done = line.run(policy)
    assert not done.cached
    folder = line.store.fetch(done.ref)
    replies = read_json(folder / "smoke.json")
    held_out = read_rows(data / PROMPTS_EVAL, PromptRow)[:PROMPTS]
    assert [row["prompt"] for row in replies] == [row.prompt for row in held_out]
    assert len(replies) == PROMPTS
    assert any(row["reply"] for row in replies)
    assert read_json(folder / "promotion.json") == {
        "model": "ours", "policy": policy.digest, "verdict": line.verdict(policy).digest,
        "champion": None, "approval": None,
    }  # fmt: skip
    entry = line.champion()
    assert (entry.policy, entry.why, entry.run) == (
        policy.digest, "it met every gate; first champion", None,
    )  # fmt: skip
    # Promoted as the run says: not again, whoever would have to approve now.
    again = line.run(policy, approval="manual", smoke_seconds=3.0)
    assert (again.cached, again.ref) == (True, done.ref)


def test_one_that_can_not_answer_is_not_promoted(line):
    with pytest.raises(SmokeTestFailed) as caught:
        line.run(line.policy(unreadable))
    said = str(caught.value)
    assert said.startswith("smoke test: ")
    assert "JSONDecodeError: " in said
    assert "\n" not in said
    assert not is_retriable(caught.value)
    assert line.champion() is None
    with pytest.raises(SmokeTestFailed, match=r"promotion\.smoke_seconds = 0\.1;"):
        line.run(line.policy(), smoke_seconds=0.1)
    assert line.champion() is None


def test_settings_of_a_promotion_are_no_part_of_its_identity(line):
    policy = line.policy()
    inputs = {"data": line.data, "policy": policy, "verdict": line.verdict(policy)}
    configs = line.config(), line.config(approval="manual", smoke_seconds=3.0)
    assert len({fingerprint(PROMOTE, config, inputs) for config in configs}) == 1
    assert dict(PROMOTE.depends_on(configs[0])) == {"promotion": {"name": "ours"}}


def test_a_rejected_one_is_not_asked_to_answer(line):
    with pytest.raises(GateRejected, match=r"m = 0\.5, needs ≥ 0.9"):
        line.run(line.policy(spoilt), least=0.9)


@pytest.mark.usefixtures("answering")
def test_manual_promotion_waits_for_a_person(line):
    policy = line.policy()
    with pytest.raises(ApprovalMissing, match="'ours' waits"):
        line.run(policy, approval="manual")
    record_approval(line.store, "ours", policy.digest, approved=False, by="ann", why="no")
    with pytest.raises(ApprovalRefused, match="refused by ann"):
        line.run(policy, approval="manual")
    assert line.champion() is None
    said = record_approval(line.store, "ours", policy.digest, approved=True, by="bob", why="read")
    done = line.run(policy, approval="manual")
    entry = line.champion()
    assert (entry.policy, entry.by, entry.why, entry.approval) == (
        policy.digest, "bob", "read", said
    )  # fmt: skip
    saved = read_json(line.store.fetch(done.ref) / "promotion.json")
    assert saved["approval"] == json.loads(said.model_dump_json())


@pytest.mark.usefixtures("answering")
def test_what_is_champion_already_needs_nobody(line):
    """Promoted by hand, or by a try that was killed before it could record it."""
    policy = line.policy()
    champions.promote(
        line.store, "ours", policy.digest, verdict=None, expected=None, why="by hand", by="ann"
    )
    line.run(policy, approval="manual")
    assert (line.champion().number, line.champion().by) == (1, "ann")


@pytest.mark.usefixtures("answering")
def test_a_run_does_not_promote_again_what_was_rolled_back(line):
    first, second = line.policy(noted("1")), line.policy(noted("2"))
    line.run(first)
    line.run(second, champion=first.digest)
    champions.rollback(line.store, "ours", why="it leaks", by="ann")
    with pytest.raises(PolicyWithdrawn, match="rolled back by ann"):
        line.run(second)
    assert line.run(first).cached
    assert line.champion().policy == first.digest


@pytest.mark.usefixtures("answering")
def test_who_is_champion_now_has_to_be_the_one_it_was_compared_with(line):
    """A champion that came since, as from a run at the same time, is not displaced unseen."""
    first, second, third = (line.policy(noted(each)) for each in "123")
    line.run(first)
    with pytest.raises(PromotionLost, match=rf"with no champion, .* is {first.short} now; run the"):
        line.run(second)
    assert line.run(second, champion=first.digest).metrics == {"model": "ours"}
    with pytest.raises(PromotionLost, match=rf"with {first.short}, .* is {second.short} now"):
        line.run(third, champion=first.digest)
    assert line.champion().policy == second.digest
    assert not is_retriable(PromotionLost("x"))


def test_the_history_says_what_a_promotion_rests_on(line):
    verdict = judge("gate-policy", "p" * 64, {"m": 0.5}, [GateRule(metric="m", min=0)])
    before = "c" * 64
    assert describe_verdict(verdict, None) == "it met every gate; first champion"
    unseen = "it met every gate; not compared with the champion cccccccccccc"
    assert describe_verdict(verdict, before) == unseen
    # 0.75 of 100 prompts: with z = 2.626 (t of 99 at 0.995) Wilson's lower end is
    # (0.75 + 0.03448 − 2.626 √(0.001875 + 0.000172)) / 1.06896 = 0.623.
    evaluation = {
        "prompts_sha256": "f" * 64,
        "champion": {"policy": "c" * 64, "win_rate": 0.75, "win_rate_size": 100.0, "n": 100},
    }
    compared = with_comparison(verdict, evaluation, ChampionGateConfig(), 1)
    assert compared.approved
    assert describe_verdict(compared, before) == (
        "it met every gate; better than the champion cccccccccccc (win rate 75.0%, lower end 62.3%)"
    )


@pytest.mark.parametrize("same", [False, True])
def test_of_two_runs_at_once_one_is_told(line, monkeypatch, same):
    """Another one promotes while this one is being tested; if of the same policy, all is well."""
    policy, other = line.policy(noted("1")), line.policy(noted("2"))

    def meanwhile(*_: object, **__: object) -> list[dict[str, str]]:
        champions.promote(
            line.store, "ours", (policy if same else other).digest, verdict=None, expected=None,
            why="faster", by="bob",
        )  # fmt: skip
        return []

    monkeypatch.setattr(promotion, "smoke_test", meanwhile)
    if same:
        line.run(policy)
    else:
        with pytest.raises(PromotionLost, match=rf"{other.digest[:12]} .* by bob .* \(faster\)"):
            line.run(policy)
    assert (line.champion().number, line.champion().by) == (1, "bob")


# --- the commands -----------------------------------------------------------------------------


@pytest.fixture
def rlhf(line, monkeypatch, capsys, tmp_path):
    """Runs the command in this process; what it prints, in one line."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        store = ("--store", line.store.uri)
        words = [*words, *store]
        app(words, exit_on_error=False, print_error=False, result_action="return_value")
        return capsys.readouterr().out

    return run


def test_promote_rollback_champion(line, rlhf):
    first, second = line.policy(noted("1")), line.policy(noted("2"))
    for policy in (first, second):
        line.verdict(policy)
    said = rlhf("promote", first.digest[:10], "--name", "ours", "--by", "ann", "--why", "by hand")
    expected = (
        f"{first.short} is the champion of ours; it answered {PROMPTS} held-out prompts; it met "
        "every gate; first champion\n"
    )
    assert said == expected
    assert line.champion().verdict == line.verdict(first).digest
    assert (line.champion().by, line.champion().why) == ("ann", "by hand")
    assert "already" in rlhf("promote", first.digest, "--name=ours")
    champions.promote(
        line.store, "ours", second.digest, verdict=None, expected=line.champion(), why="", by="bob"
    )
    line.store.history.append("champion/theirs", {"policy": second.digest})
    shown = rlhf("champion")
    assert first.short not in shown
    assert shown.count(second.short) == 2
    shown = rlhf("champion", "--name=ours", "--history").splitlines()
    assert [row.split()[:3] for row in shown[1:]] == [
        ["ours", first.short, "promote"], ["ours", second.short, "promote"],
    ]  # fmt: skip
    rows = json.loads(rlhf("champion", "--name=ours", "--history", "--json"))
    assert [(row["number"], row["policy"]) for row in rows] == [
        (1, first.digest), (2, second.digest),
    ]  # fmt: skip
    assert (rows[0]["by"], rows[0]["why"]) == ("ann", "by hand")
    said = rlhf("rollback", "--name=ours", "--why", "it leaks", "--by", "carl")
    assert said == f"{first.short} is the champion of ours in place of {second.short}\n"
    assert (line.champion().action, line.champion().by) == ("rollback", "carl")
    rlhf("rollback", "--name=ours", "--why", "no", "--to", second.digest[:8])
    assert line.champion().policy == second.digest


@pytest.mark.usefixtures("answering")
def test_promote_without_a_gates_yes(line, rlhf):
    judged, unjudged = line.policy(noted("1")), line.policy(noted("2"))
    no = line.verdict(judged, least=0.9)
    with pytest.raises(ConfigError, match=r"gate-policy said no \(m = 0\.5, needs ≥ 0.9\); to"):
        rlhf("promote", judged.digest)
    worse = line.policy(noted("3"))
    not_better = line.verdict(worse, champion="c" * 64, loses=True)
    with pytest.raises(ConfigError, match=r"it is not better than the champion c{12} \(look = 2"):
        rlhf("promote", worse.digest)
    assert line.store.exists(not_better)
    with pytest.raises(ConfigError, match=r"no gate has judged it; .*--unapproved --why"):
        rlhf("promote", unjudged.digest)
    with pytest.raises(ConfigError, match="--unapproved needs --why"):
        rlhf("promote", judged.digest, "--unapproved", "--why", " ")
    assert line.store.history.names("champion/") == []
    rlhf("promote", judged.digest, "--unapproved", "--why", "a demo")
    entry = champions.champion(line.store, "default")
    assert (entry.unapproved, entry.verdict, entry.why) == (True, no.digest, "a demo")
    assert "unapproved" in rlhf("champion")
    # Where a gate said yes, the word changes nothing.
    line.verdict(unjudged)
    rlhf("promote", unjudged.digest, "--unapproved", "--why", "a demo")
    assert not champions.champion(line.store, "default").unapproved


def test_mistakes(line, rlhf, fresh):
    with pytest.raises(ArtifactMissing, match=r": no champion$"):
        rlhf("champion")
    policy = line.policy()
    with pytest.raises(ConfigError, match=f"{line.data.short} is of kind dataset; give a policy"):
        rlhf("promote", line.data.digest)
    with pytest.raises(ConfigError, match=r"promotion\.name = 'Ä': must match"):
        rlhf("promote", policy.digest, "--name", "Ä")
    words = ("--unapproved", "--why", "x")
    with pytest.raises(ConfigError, match=f"{policy.short} is of kind policy; give a dataset"):
        rlhf("promote", policy.digest, "--data", policy.digest, *words)
    pushed = line.store.publish(fresh, "policy", parents={}, producer=PRODUCER, metrics={})
    with pytest.raises(ConfigError, match=r"trained on no dataset of this store; .* --data"):
        rlhf("promote", pushed.digest, *words)
    with pytest.raises(SmokeTestFailed, match="logits are not finite"):
        rlhf("promote", line.policy(spoilt).digest, *words)
    assert line.store.history.names("champion/") == []
    line.store.history.append("champion/theirs", {"policy": policy.digest})
    with pytest.raises(ArtifactMissing, match="for model line 'ours'; there is one of theirs"):
        rlhf("champion", "--name=ours")
