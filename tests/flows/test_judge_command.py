"""The commands `rlhf judge` and `rlhf compare` on the models of a finished run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.data.chat import loose_key
from rlhf.data.lineage import forget_rows
from rlhf.data.rendering import load_renderer
from rlhf.data.rows import (
    PAIRS_EVAL,
    PAIRS_JUDGE,
    PROMPTS_EVAL,
    PROMPTS_GATE,
    PROMPTS_TRAIN,
    Pair,
    PromptRow,
    read_rows,
    write_rows,
)
from rlhf.evaluation.common import points
from rlhf.evaluation.replies import Policy, SamplingPlan
from rlhf.files import read_json
from rlhf.inference import mean_of, share_of
from rlhf.modeling.reward import Scorer
from rlhf.report.comparison import render_comparison
from rlhf.store import open_store
from tasks.models import find_model, known_prompts
from tests.report import demo_compare
from tests.report.test_render import sections


@pytest.fixture
def models(first_run, finished, tmp_path, monkeypatch) -> dict[str, str]:
    """Digests of the run's artifacts by stage; the commands' store and folders are the test's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_WORK_DIR", str(tmp_path / "work"))
    monkeypatch.setenv("RLHF_THREADS", "1")
    return {stage: ref.digest for stage, ref in first_run.result.refs.items()}


@pytest.fixture
def opened(finished, tmp_path):
    return open_store(str(finished), cache_dir=tmp_path / "own-cache")


@pytest.fixture
def run(rlhf, finished):
    """Runs a command on the finished store; what it prints."""

    def call(*words, code: int = 0) -> str:
        done = rlhf(*words, "--store", finished)
        assert done.returncode == code, done.stderr
        if code:
            assert done.stderr.startswith("error: ")
            assert done.stderr.count("\n") == 1
        return done.stderr if code else done.stdout

    return call


def write_lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def copy_of(folder: Path, target: Path, change) -> Path:
    """A copy of a model with changed weights, by name."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    save_file(change(weights), target / "model.safetensors", {"format": "pt"})
    return target


# --- suites -----------------------------------------------------------------------------------


def suite_rows(count: int = 12) -> list[dict]:
    replies = ("yes", "no way", "thanks", "maybe so")
    return [
        {
            "id": str(i), "prompt": f"is {i} even?", "chosen": [replies[i % 4]],
            "rejected": [replies[(i + j) % 4] for j in (1, 2, 3)], "num_correct": 1,
            "subset": "Math" if i % 2 else "Focus",
        }
        for i in range(count)
    ]  # fmt: skip


def test_a_suite_is_scored_by_the_reward_model(run, models, opened, tmp_path):
    rows = suite_rows()
    write_lines(tmp_path / "suite/data/test.jsonl", rows)
    digest = models["train-reward-model"]
    shown = run("judge", digest[:10], "--suite", "suite", "--out", "scores.json")
    got = read_json(tmp_path / "scores.json")
    scorer = Scorer(opened.fetch(digest), torch.device("cpu"), 2048)
    right = {"Math": [], "Focus": []}
    for row in rows:
        scores = scorer([row["prompt"]] * 4, [*row["chosen"], *row["rejected"]]).tolist()
        right[row["subset"]].append(float(scores[0] == max(scores)))
    for subset, values in right.items():
        assert got["groups"][subset]["score"] == pytest.approx(sum(values) / 6)
        assert got["groups"][subset]["score_low"] == pytest.approx(share_of(values).low)
    assert got["overall"]["score"] == pytest.approx(sum(map(sum, right.values())) / 12)
    assert got["model"] == {"name": digest[:10], "kind": "reward-model", "digest": digest}
    assert "12 of 12 rows used" in shown
    assert "note: the overall score is not the leaderboard's" in shown
    assert f"{got['overall']['score']:.3f}" in shown


def test_what_judge_refuses(run, models, tmp_path):
    write_lines(tmp_path / "suite/test.jsonl", suite_rows())
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "hello"}])
    policy, reward, data = (
        models[stage] for stage in ("train-policy", "train-reward-model", "prepare-data")
    )
    for words, said in (
        ((policy, "--suite", "suite"), "is a policy, and --suite needs a reward model or judge"),
        ((reward, "--prompts", "prompts.jsonl"), "is a reward model, and --prompts needs a policy"),
        ((data, "--suite", "suite"), "is of kind dataset; give a policy, a reward model"),
        ((reward,), "give either --suite <folder>"),
        ((reward, "--suite", "suite", "--prompts", "prompts.jsonl"), "give either --suite"),
        ((reward, "--suite", "none"), "no such folder"),
        ((reward, "--suite", "suite", "--judge", reward), "--judge is for a policy's replies"),
        ((reward, "--suite", "suite", "--limit", 3), "--limit is for a policy's replies"),
        ((policy, "--prompts", "none.jsonl"), "no such file"),
        ((policy, "--prompts", "prompts.jsonl", "--judge", policy), "is a policy, and --judge"),
        ((policy, "--prompts", "prompts.jsonl", "--out", "."), "is a folder; name a file"),
        ((policy, "--prompts", "prompts.jsonl", "--out", "no/x.json"), "does not exist"),
        (("./nothing", "--suite", "suite"), "no such folder"),
        (("champion:nobody", "--suite", "suite"), "has no champion of that line"),
    ):  # fmt: skip
        assert said in run("judge", *words, code=2), words


def test_a_judge_that_was_not_trained(run, models, tmp_path):
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "hello"}])
    folder = tmp_path / "judge"
    folder.mkdir()
    facts = {"trained": False, "usable": False, "reason": "the data have no judge split"}
    (folder / "judge.json").write_text(json.dumps(facts))
    words = ("judge", models["train-policy"], "--prompts", "prompts.jsonl", "--judge", "./judge")
    assert "no judge was trained (the data have no judge split)" in run(*words, code=2)


def test_a_judge_that_is_no_better_than_a_coin(run, models, opened, tmp_path):
    write_lines(tmp_path / "suite/test.jsonl", suite_rows())
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "hello"}])
    folder = Path(shutil.copytree(opened.fetch(models["train-reward-model"]), tmp_path / "judge"))
    facts = {"trained": True, "usable": False, "reason": "accuracy 0.5"}
    (folder / "judge.json").write_text(json.dumps(facts))
    words = ("judge", models["train-policy"], "--prompts", "prompts.jsonl", "--judge", "./judge")
    assert "this judge is not usable (accuracy 0.5)" in run(*words, code=2)
    assert "warning: judge judge is not usable" in run("judge", "./judge", "--suite", "suite")


# --- replies ----------------------------------------------------------------------------------


def test_a_policys_replies_are_scored(run, models, opened, tmp_path):
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"what is {i}?"} for i in range(7)])
    words = ("judge", models["train-policy"][:12], "--prompts", "prompts.jsonl", "--samples", 2)
    shown = run(*words, "--out", "replies.json", "--limit", 5)
    got = read_json(tmp_path / "replies.json")
    assert (got["n"], got["prompts"]) == (10, 5)
    replies = got["replies"]
    assert [r["prompt"] for r in replies] == [f"what is {i}?" for i in range(5) for _ in range(2)]
    scorer = Scorer(opened.fetch(models["train-reward-model"]), torch.device("cpu"), 128)
    again = scorer([r["prompt"] for r in replies], [r["reply"] for r in replies]).tolist()
    assert [r["score"] for r in replies] == pytest.approx(again, abs=1e-5)
    expected = mean_of(again, [r["prompt"] for r in replies])
    assert got["score"] == pytest.approx(expected.value, abs=1e-5)
    assert got["score_low"] == pytest.approx(expected.low, abs=1e-4)
    assert 0 <= got["eos_rate_low"] <= got["eos_rate"] <= 1
    # The length is that of the policy's training.
    assert got["sampling"]["max_new_tokens"] == 8
    assert 1 <= got["tokens"] <= 8
    assert got["judge"]["digest"] == models["train-reward-model"]
    assert "the reward model that it was trained on: " in shown
    assert run(*words, "--out", "again.json", "--limit", 5)
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "replies.json").read_bytes()


def test_prompts_of_text_and_csv(run, models, tmp_path):
    (tmp_path / "prompts.txt").write_text("one?\n\ntwo?\none?\n")
    (tmp_path / "prompts.csv").write_text("prompt,answer\none?,x\ntwo?,y\n")
    for name in ("prompts.txt", "prompts.csv"):
        shown = run("judge", models["train-policy"], "--prompts", name)
        assert "2 replies to 2 prompts" in shown
    (tmp_path / "empty.txt").write_text("\n")
    said = run("judge", models["train-policy"], "--prompts", "empty.txt", code=2)
    assert "holds no prompt" in said
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    said = run("judge", models["train-policy"], "--prompts", "other.csv", code=2)
    assert "no column holds prompts by its name (a, b)" in said


def test_a_folder_needs_a_judge(run, models, opened, tmp_path):
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "hello"}, {"prompt": "bye"}])
    shutil.copytree(opened.fetch(models["train-policy"]), tmp_path / "policy")
    words = ("judge", "./policy", "--prompts", "prompts.jsonl")
    assert "has neither a judge nor a reward model; name one: --judge" in run(*words, code=2)
    shown = run(*words, "--judge", models["train-reward-model"])
    assert "named by --judge" in shown


def test_the_judge_of_the_lineage_scores(run, models, opened, tmp_path):
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "hello"}, {"prompt": "bye"}])
    policy = opened.manifest(models["train-policy"])
    parents = {
        role: opened.resolve(digest)
        for role, digest in policy.parents.items()
        if role in ("data", "sft")
    }
    folder = Path(shutil.copytree(opened.fetch(models["train-reward-model"]), tmp_path / "judge"))

    def publish(**facts) -> str:
        (folder / "judge.json").write_text(json.dumps({"trained": True, "accuracy": 0.8, **facts}))
        return opened.publish(
            folder, "judge", parents=parents, producer=policy.producer, metrics={}
        ).digest

    # PPO had the run's own judge, which a handful of pairs leaves a coin.
    own = run("judge", models["train-policy"], "--prompts", "prompts.jsonl")
    assert "is not usable: its accuracy on" in own
    # The SFT policy is older than any judge: one that was made from it and its data is found.
    words = ("judge", models["train-sft"], "--prompts", "prompts.jsonl")
    publish(usable=False, reason="accuracy 0.5")
    digest = publish(usable=True, reason=None)
    assert f"scored by {digest[:12]}, the judge of its lineage" in run(*words, "--out", "x.json")
    got = read_json(tmp_path / "x.json")["judge"]
    assert (got["digest"], got["kind"], got["accuracy"]) == (digest, "judge", 0.8)
    # The judge of the second policy's lineage decides; without a usable one its reward model.
    for first, second, by in (
        ("train-policy", "train-sft", "judge"), ("train-sft", "train-policy", "reward"),
    ):  # fmt: skip
        run("compare", models[first], models[second], "--out", f"compared-{by}")
        got = read_json(tmp_path / f"compared-{by}/evaluation.json")
        assert got["decided_by"] == by
        assert by in got["scorers"]


def test_folders_that_are_no_whole_model(run, models, opened, tmp_path):
    write_lines(tmp_path / "suite/test.jsonl", suite_rows())
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "hello"}])
    reward = Path(shutil.copytree(opened.fetch(models["train-reward-model"]), tmp_path / "rm"))
    policy = Path(shutil.copytree(opened.fetch(models["train-policy"]), tmp_path / "pi"))
    words = ("judge", "./pi", "--prompts", "prompts.jsonl", "--judge", models["train-reward-model"])
    for folder in (reward, policy):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    assert "'./rm': can't be loaded" in run("judge", "./rm", "--suite", "suite", code=2)
    assert "tokenizer" in run(*words, code=2)
    (policy / "model.safetensors").write_bytes(b"broken")
    assert "model.safetensors" in run(*words, code=2)
    (policy / "config.json").write_text("{broken")
    assert "config.json is damaged" in run(*words, code=2)
    (policy / "config.json").write_text('{"architectures": ["BertModel"]}')
    assert "is BertModel; give a causal language model" in run(*words, code=2)
    (policy / "config.json").unlink()
    assert "no such folder" in run(*words[:1], "./none", *words[2:], code=2)
    assert "holds no config.json" in run(*words, code=2)
    assert "names no artifact" in run(*words[:1], "x" * 400, *words[2:], code=2)


# --- compare ----------------------------------------------------------------------------------


def test_a_policys_tokens_are_those_of_training(models, opened):
    folder = opened.fetch(models["train-policy"])
    policy = Policy(folder, torch.device("cpu"), SamplingPlan())
    trained = load_renderer(folder)
    assert policy.renderer.template_hash == trained.template_hash
    assert policy.renderer.end_ids == trained.end_ids


def test_two_policies(run, models, opened, tmp_path):
    sft, policy = models["train-sft"], models["train-policy"]
    shown = run("compare", sft[:12], "champion:default", "--samples", 2, "--out", "compared")
    got = read_json(tmp_path / "compared/evaluation.json")
    rows = read_json(tmp_path / "compared/samples.json")
    held_out = read_rows(opened.fetch(models["prepare-data"]) / PROMPTS_EVAL, PromptRow)
    assert {str(row["prompt"]) for row in rows} == {str(row.prompt) for row in held_out}
    assert got["n"] == len(held_out)
    assert len(rows) == 2 * len(held_out)
    own: dict[str, list[dict]] = {}
    for row in rows:
        own.setdefault(str(row["prompt"]), []).append(row)
    # Every reply of one policy with every reply of the other.
    wins = [
        sum(points(x["reward_after"] - y["reward_before"]) for x in group for y in group) / 4
        for group in own.values()
    ]
    expected = share_of(wins)
    part = got["sampled"]
    assert part["win_rate"] == pytest.approx(expected.value)
    assert part["win_rate_low"] == pytest.approx(expected.low)
    changes = [r["reward_after"] - r["reward_before"] for r in rows]
    assert part["reward_difference"] == pytest.approx(sum(changes) / len(changes), abs=1e-5)
    assert changes == sorted(changes)
    assert part["kl"] is not None
    assert {"tokens", "eos_rate", "refusal"} <= {shift["metric"] for shift in got["shifts"]}
    assert got["decided_by"] == "reward"
    assert got["a"]["digest"] == sft
    assert got["b"]["digest"] == policy
    assert f"by reward model {models['train-reward-model'][:12]}" in got["sentence"]
    assert got["sentence"] in shown
    # The prompts are those by which the gate decided on b.
    source = f"the gate prompts of b's evaluation {models['evaluate-policy'][:12]}"
    assert got["prompts_from"] == source
    assert f"prompts: {len(held_out):,}, {source}" in shown
    (page,) = (tmp_path / ".rlhf/reports").glob("compare-*.html")
    assert f"report: {page}" in shown
    assert render_comparison(got, rows) == page.read_text()
    assert sections(page.read_text()) == ["policy", "samples"]
    # So that the demonstration, which the browser's tests look at, has the form of a real one.
    demo = demo_compare.policies(judge=False)
    assert demo.keys() == got.keys()
    assert {*demo_compare.replies()[0]} == {*rows[0]}
    assert any("which decides, and may exploit it" in note for note in got["notes"])


def test_a_model_is_judged_by_what_it_was_trained_on(run, models, tmp_path):
    """Either model may exploit its own reward model, so both are named."""
    sft, policy, judge = (models[f"train-{name}"] for name in ("sft", "policy", "reward-model"))
    write_lines(tmp_path / "own.jsonl", [{"prompt": f"number {i}?"} for i in range(3)])
    note = f"was trained on {judge[:12]}, which judges it here, and may exploit it"
    for pair, exploits, other in (((policy, sft), "a", "b"), ((sft, policy), "b", "a")):
        shown = run("compare", *pair, "--prompts", "own.jsonl", "--judge", judge[:12])
        assert f"{exploits} {note}" in shown
        assert f"{other} {note}" not in shown


def test_a_judge_decides(run, models, opened, tmp_path):
    # A judge with the reward model's head negated prefers what that dislikes.
    folder = opened.fetch(models["train-reward-model"])
    negated = copy_of(
        folder, tmp_path / "judge",
        lambda weights: {k: -v if k.startswith("score") else v for k, v in weights.items()},
    )  # fmt: skip
    facts = {"trained": True, "usable": True, "reason": None, "accuracy": 0.9}
    (negated / "judge.json").write_text(json.dumps(facts))
    write_lines(tmp_path / "own.jsonl", [{"prompt": f"number {i}?"} for i in range(9)])
    words = ("compare", models["train-sft"], models["train-policy"], "--prompts", "own.jsonl")
    run(*words, "--judge", "./judge", "--out", "compared")
    got = read_json(tmp_path / "compared/evaluation.json")
    part = got["sampled"]
    assert got["decided_by"] == "judge"
    assert got["verdict_metric"] == "judge_win_rate"
    assert part["judge_win_rate"] == pytest.approx(1 - part["win_rate"])
    assert part["gap"] == pytest.approx(part["judge_win_rate"] - part["win_rate"])
    assert got["scorers"]["judge"]["kind"] == "judge"
    assert got["scorers"]["judge"]["accuracy"] == 0.9
    assert "by judge judge" in got["sentence"]


def test_two_reward_models(run, models, opened, tmp_path):
    folder = opened.fetch(models["train-reward-model"])
    copy_of(
        folder, tmp_path / "negated",
        lambda weights: {k: -v if k.startswith("score") else v for k, v in weights.items()},
    )  # fmt: skip
    words = ("compare", "./negated", models["train-reward-model"], "--out", "compared")
    shown = run(*words, "--max-length", 128)  # of a folder the length of its training is not known
    got = read_json(tmp_path / "compared/evaluation.json")
    pairs = read_rows(opened.fetch(models["prepare-data"]) / PAIRS_EVAL, Pair)
    assert got["n"] == len(pairs)
    rows = read_json(tmp_path / "compared/samples.json")
    # The negated model chooses the other reply wherever the first one chooses at all.
    ties = sum(row["margin_after"] == 0 for row in rows)
    assert got["agreement"] == pytest.approx(ties / len(pairs))
    assert ties < len(pairs) / 2
    assert got["accuracy_before"] == pytest.approx(1 - got["accuracy_after"])
    difference = got["accuracy_after"] - got["accuracy_before"]
    assert got["accuracy_difference"] == pytest.approx(difference)
    assert got["accuracy_after"] == pytest.approx((got["only_after_right"] + ties / 2) / len(pairs))
    assert got["both_right"] == 0
    assert all(row["margin_before"] == pytest.approx(-row["margin_after"]) for row in rows)
    dataset = f"held-out pairs of b's dataset {models['prepare-data'][:12]}"
    assert got["pairs_from"] == dataset
    # The same report as of evaluate-reward-model, for each of both.
    own = read_json(opened.fetch(models["evaluate-reward-model"]) / "evaluation.json")
    after = got["reports"]["after"]
    for name in ("accuracy", "accuracy_low", "log_loss", "margin_mean", "prefers_longer"):
        assert after[name] == pytest.approx(own[name], rel=1e-4), name
    assert after["margins"]["right"] == own["margins"]["right"]
    rises = [{name: probe["rises"] for name, probe in r["probes"].items()} for r in (after, own)]
    assert rises[0] == rises[1]
    assert f"b: accuracy {100 * got['accuracy_after']:.1f} %" in shown
    (page,) = (tmp_path / ".rlhf/reports").glob("compare-*.html")
    assert sections(page.read_text()) == ["accuracy", "model-a", "model-b", "samples"]
    demo = demo_compare.reward_models()
    assert demo.keys() <= got.keys()
    assert {*demo_compare.pairs()[0]} == {*rows[0]}
    gaps = [abs(row["disagreement"]) for row in rows]
    assert gaps == sorted(gaps, reverse=True)
    assert "note: what ./negated was trained on is not known" in shown
    assert got["sentence"] in shown


def test_prompts_of_training_are_left_out(run, models, opened, tmp_path):
    data = opened.fetch(models["prepare-data"])
    trained = [row.prompt for row in read_rows(data / PROMPTS_TRAIN, PromptRow)][:3]
    # A judge would score what it was trained on.
    trained.append(read_rows(data / PAIRS_JUDGE, Pair)[0].prompt)
    write_lines(tmp_path / "own.jsonl", [{"prompt": prompt} for prompt in trained])
    words = ("compare", models["train-sft"], models["train-policy"], "--prompts", "own.jsonl")
    refusal = "was trained on the prompts of all 4 rows, or chosen by them; give others"
    assert refusal in run(*words, code=2)
    # The watchdog chose the policy's update by the judge's prompts. Spacing and case don't count.
    judges = [f" {p.prompt.upper()} " for p in read_rows(data / PAIRS_JUDGE, Pair)[:2]]
    asked = (*trained, *judges, "new?", "newer?")
    write_lines(tmp_path / "own.jsonl", [{"prompt": p} for p in asked])
    said = "note: 6 rows are left out: a model was trained on their prompts, or chosen by them"
    assert said in run(*words)


def test_a_judges_prompts_are_known_to_what_it_chose(models, opened):
    """An SFT policy and a reward model have no judge, so its split is held out for them."""
    data = opened.fetch(models["prepare-data"])
    judges = {loose_key(pair.prompt) for pair in read_rows(data / PAIRS_JUDGE, Pair)}
    for stage, knows in (
        ("train-sft", False), ("train-reward-model", False), ("train-policy", True),
    ):  # fmt: skip
        model = find_model(models[stage], opened)
        known = known_prompts([model], opened)
        assert (judges <= known) is knows, stage
        assert not knows or known > judges


def test_the_gate_prompts_that_are_used(run, models, opened, tmp_path):
    sft, policy = models["train-sft"], models["train-policy"]
    data = opened.fetch(models["prepare-data"])
    producer = opened.manifest(models["evaluate-policy"]).producer

    def evaluated(name: str, prompts: list[PromptRow]) -> str:
        """Publish an evaluation of the SFT policy on other prompts."""
        folder = tmp_path / name
        folder.mkdir()
        write_rows(folder / PROMPTS_GATE, prompts)
        parents = {"policy": opened.resolve(sft)}
        return opened.publish(
            folder, "evaluation", parents=parents, producer=producer, metrics={}
        ).short

    def compared(*words) -> tuple[str, dict]:
        shutil.rmtree(tmp_path / "compared", ignore_errors=True)
        shown = run("compare", sft, policy, "--out", "compared", "--report", "x.html", *words)
        assert "<h1" in (tmp_path / "x.html").read_text()
        return shown, read_json(tmp_path / "compared/evaluation.json")

    trained = read_rows(data / PROMPTS_TRAIN, PromptRow)[:8]
    fresh = [PromptRow(f"fresh {i}?", row_ids=(f"row-{i}",)) for i in range(9)]
    # Two of nine were trained on, which are more than a tenth; then those of b are used.
    bad = evaluated("bad", [*trained[:2], *fresh[:7]])
    shown, got = compared()
    assert got["prompts_from"].startswith("the gate prompts of b's evaluation")
    assert f"evaluation {bad} are not used: the policies were trained on 2 of 9" in shown
    # The newest comes first; forgotten rows are left out, and one of ten that was trained on too.
    good = evaluated("good", [*fresh, trained[0], PromptRow("forgotten?", row_ids=("gone",))])
    forget_rows(opened, ["gone"])
    shown, got = compared()
    assert got["prompts_from"] == f"the gate prompts of a's evaluation {good}"
    assert (got["n"], "1 rows are left out" in shown) == (9, True)
    # What is named is used instead.
    _, got = compared("--data", models["prepare-data"])
    assert got["prompts_from"] == f"held-out prompts of the dataset {models['prepare-data'][:12]}"
    write_lines(tmp_path / "own.jsonl", [{"prompt": "one?"}, {"prompt": "two?"}])
    _, got = compared("--prompts", "own.jsonl")
    assert got["prompts_from"] == "of the file own.jsonl"
    # What a folder was trained on is not known, so that no gate's prompts are taken for it.
    shutil.copytree(opened.fetch(sft), tmp_path / "pi")
    shown = run("compare", "./pi", policy)
    assert "held-out prompts of b's dataset" in shown


def test_what_compare_refuses(run, models, opened, tmp_path):
    sft, policy, reward, data = (
        models[stage]
        for stage in ("train-sft", "train-policy", "train-reward-model", "prepare-data")
    )
    shutil.copytree(opened.fetch(reward), tmp_path / "rm")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    for words, said in (
        ((sft, reward), "is a reward model, and a comparison with"),
        ((reward, sft), "is a policy, and a comparison with"),
        ((sft, sft[:12]), "are the same model; give two"),
        ((sft, data), "is of kind dataset"),
        ((sft, policy, "--data", reward), "is of kind reward-model; give a dataset"),
        ((sft, policy, "--data", data, "--prompts", "x.jsonl"), "give one of them"),
        ((sft, policy, "--out", "full"), "is there already; name a new folder"),
        ((sft, policy, "--report", "."), "--report '.': is a folder; name a file"),
        ((sft, policy, "--report", "no/x.html"), "its folder does not exist"),
        (("./rm", reward, "--judge", reward), "--judge is for a policy's replies; leave it out in"),
        (("./rm", reward, "--samples", 2), "--samples is for a policy's replies"),
        (("./rm", reward, "--max-new-tokens", 2), "--max-new-tokens is for a policy's replies"),
        (("./rm", reward, "--prompts", "x.jsonl"), "--prompts is for policies"),
        ((sft, policy, "--judge", sft), "is a policy, and --judge needs a reward model"),
    ):
        assert said in run("compare", *words, code=2), words


def test_neither_command_loads_prefect():
    code = (
        "import flows.compare, flows.judge, tasks.models, sys;"
        "assert 'prefect' not in sys.modules and 'torch' not in sys.modules, sys.modules"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-300:]
