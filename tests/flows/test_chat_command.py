"""The command `rlhf chat` on the models of a finished run: from a pipe to the next retraining."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
import torch

from rlhf.config import load_config
from rlhf.data.prepare import prepare_data
from rlhf.data.rows import PAIRS_EVAL, PAIRS_TRAIN, PROMPTS_EVAL, Pair, PromptRow, read_rows
from rlhf.evaluation.replies import Policy, SamplingPlan
from rlhf.modeling.reward import Scorer
from rlhf.plain_text import printable
from rlhf.store import open_store
from tasks.models import find_model, limits_of, reward_model_of
from tests.parrot import HOSTILE, write_parrot


@pytest.fixture
def models(first_run, finished, tmp_path, monkeypatch):
    """Digests of the run's artifacts by stage; the command's store and folders are the test's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_WORK_DIR", str(tmp_path / "work"))
    monkeypatch.setenv("RLHF_THREADS", "1")
    return {stage: ref.digest for stage, ref in first_run.result.refs.items()}


@pytest.fixture
def opened(finished, tmp_path):
    return open_store(str(finished), cache_dir=tmp_path / "own-cache")


@pytest.fixture
def talk(rlhf, finished, monkeypatch):
    """Runs a chat whose input is these lines; returns what it prints, and what beside it."""

    def call(*words, said=(), code=0):
        text = "".join(f"{line}\n" for line in said)
        stdin = io.TextIOWrapper(io.BytesIO(text.encode(errors="surrogateescape")))
        monkeypatch.setattr(sys, "stdin", stdin)
        done = rlhf("chat", *words, "--store", finished)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout, done.stderr

    return call


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_a_greedy_reply_is_that_of_the_evaluation(talk, models, opened):
    data = opened.fetch(models["prepare-data"])
    prompt = next(
        row.prompt for row in read_rows(data / PROMPTS_EVAL, PromptRow)
        if isinstance(row.prompt, str) or len(row.prompt) == 1
    )  # fmt: skip
    asked = prompt if isinstance(prompt, str) else prompt[0]["content"]
    policy = find_model("champion:default", opened)
    plan = SamplingPlan(max_new_tokens=8, temperature=0.0)
    device, limits = torch.device("cpu"), limits_of(policy, opened)
    answers = Policy(policy.folder, device, plan, limits).answer([PromptRow(asked)], 3)
    shown, aside = talk("--temperature", 0, said=[asked])
    assert shown == answers.texts[0][0] + "\n"
    assert answers.texts[0][0]
    # Its score is that of the reward model which it was trained with.
    reward = reward_model_of(policy, opened)
    scorer = Scorer(reward.folder, device, limits_of(reward, opened))
    score = float(scorer([asked], answers.texts[0])[0])
    assert f"reward {score:+.3f}" in aside
    assert f"reward: {reward.label}" in aside
    assert "greedy, at most 8 tokens a reply, context 160" in aside  # as PPO trained it


def test_from_use_to_the_next_retraining(talk, rlhf, models, tmp_path):
    said = [
        "Where is my parcel?", "/prefer 1", "And what is the fee?", "/retry", "/prefer 4",
        "Thanks! Anything else?", "/prefer 2", "/prefer 1",
    ]  # fmt: skip
    shown, aside = talk("champion", "--versus", "sft", "--seed", 3, said=said, code=2)
    assert "reply 2 is preferred already, which is written" in aside
    path = tmp_path / ".rlhf/preferences.jsonl"
    rows = rows_of(path)
    # One pair, three, and one; what is preferred already is not written twice.
    assert [len(row["prompt"]) for row in rows] == [1, 3, 3, 3, 5]
    assert printable(rows[0]["chosen"])[:3] in shown
    assert rows[0]["prompt"] == [user("Where is my parcel?")]
    assert rows[1]["prompt"][1:] == [assistant(rows[0]["chosen"]), user("And what is the fee?")]
    assert rows[4]["prompt"][:3] == rows[3]["prompt"]
    assert rows[4]["prompt"][3] == assistant(rows[1]["chosen"])
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert {row["chosen"] for row in rows[1:4]} == {rows[1]["chosen"]}
    policies = (models["train-policy"], models["train-sft"])
    assert (rows[0]["chosen_policy"], rows[0]["rejected_policy"]) == policies
    assert rows[1]["chosen_policy"] == policies[1]  # the second reply of the second attempt
    assert "5 preferences written" in aside
    # A second session appends. Enough rows for a retraining, each with a prompt of its own.
    more = [line for i in range(30) for line in (f"Parcel {i} of {i * 7}?", "/prefer 1", "/reset")]
    talk("champion", "--versus", "sft", "--temperature", 2, said=more)
    assert rows_of(path)[:5] == rows
    done = rlhf("data", "inspect", path)
    assert done.returncode == 0, done.stderr
    assert "pairs" in done.stdout
    assert "left out" not in done.stdout, done.stdout
    assert "arning" not in done.stdout + done.stderr, done.stdout
    config = load_config(None, [f"--data.source={path}"]).config
    out = tmp_path / "data"
    out.mkdir()
    prepare_data(config.data, out, seed=config.seed)
    pairs = [pair for file in (PAIRS_TRAIN, PAIRS_EVAL) for pair in read_rows(out / file, Pair)]
    assert len(pairs) == len(rows_of(path))
    chats = [pair for pair in pairs if not isinstance(pair.prompt, str) and len(pair.prompt) > 1]
    everywhere = {json.dumps(row["prompt"]) for row in rows_of(path)}
    assert chats
    assert all(json.dumps(pair.prompt) in everywhere for pair in chats)


def test_the_same_seed_gives_the_same_conversation(talk, models):
    said = ["tea?", "and a cup?", "/retry"]
    first, _ = talk(models["train-policy"][:10], "--seed", 5, said=said)
    assert talk("champion:default", "--seed", 5, "--no-scores", said=said)[0] == first
    assert talk("champion", "--seed", 6, said=said)[0] != first


def test_a_long_conversation_ends_by_being_said(talk, models, tmp_path):
    long = "Where is my parcel, please? " * 3
    shown, aside = talk("champion", "--max-new-tokens", 8, said=[long] * 6, code=2)
    assert 1 <= len(shown.splitlines()) < 6
    assert "the context is full: the conversation has" in aside
    assert "begin a new conversation, or leave out earlier turns" in aside
    assert "prompts of the policy's training had at most" in aside  # before that


def test_what_a_policy_writes_does_not_act_on_the_terminal(talk, models, tmp_path):
    parrot = write_parrot(tmp_path / "parrot")
    words = (parrot, "--versus", "sft", "--temperature", 0, "--max-new-tokens", 200)
    refused = talk(*words, said=["tea?"], code=2)[1]
    assert "is a folder, without lineage; name a policy, or a folder" in refused
    other = write_parrot(tmp_path / "other", ["tea"])
    words = (parrot, "--versus", other, "--temperature", 0, "--max-new-tokens", 200)
    judge = models["train-reward-model"]
    shown, aside = talk(*words, "--judge", judge, said=["tea?", "/prefer 1"])
    assert f"1: {printable(HOSTILE)}\n" in shown
    assert "\\x1b[31m" in shown
    assert "\x1b" not in shown + aside
    assert "\u202e" not in shown + aside
    assert "2: tea\n" in shown
    assert "judge " in aside
    # In the file the text is as the policy wrote it, and no path of this machine is.
    (row,) = rows_of(tmp_path / ".rlhf/preferences.jsonl")
    assert (row["chosen"], row["rejected"]) == (HOSTILE, "tea")
    assert (row["chosen_policy"], row["rejected_policy"]) == ("parrot", "other")


def test_the_commands_of_a_chat(talk, models, tmp_path):
    said = ["/help", "/system be kind", "/system", "//slash", "/reset", "/retry", "/nothing",
            "/prefer x", "/prefer 1", "  ", "\udcff", "/quit", "never read"]  # fmt: skip
    shown, aside = talk("champion", said=said, code=2)
    assert len(shown.splitlines()) <= 1
    for line in (
        "/prefer N", "system: be kind; a new conversation", "system: be kind\n",
        "a new conversation", "nothing to reply to yet", "/nothing: there is no such command",
        "/prefer x: write the number of a reply", "there is no reply to prefer yet",
        "bytes that are not UTF-8",
    ):  # fmt: skip
        assert line in aside, line
    assert not (tmp_path / ".rlhf").exists()
    # The system turn is part of the conversation that is written.
    talk("champion", "--versus", "sft", "--system", "be kind", "--preferences", "own.jsonl",
         said=["tea?", "/prefer 2"])  # fmt: skip
    (row,) = rows_of(tmp_path / "own.jsonl")
    assert row["prompt"] == [{"role": "system", "content": "be kind"}, user("tea?")]


def test_names_that_name_no_policy(talk, models, opened, tmp_path):
    (tmp_path / "own.csv").write_text("a\n")
    shutil.copytree(opened.fetch(models["train-reward-model"]), tmp_path / "rm")
    for words, said in (
        (["./rm"], "is a reward model, and a chat needs a policy"),
        (["champion:other"], "has no champion of that line; lines that have: default"),
        (["nobody"], "names no artifact"),
        (["champion", "--versus", models["train-policy"]], "is the policy itself; name another"),
        (["sft", "--versus", "sft"], "has no SFT policy in its lineage"),
        (["champion", "--judge", models["train-sft"]], "--judge needs a reward model or judge"),
        (["sft", "--judge", "lineage"], "--judge lineage: sft: "),
        (["champion", "--preferences", "own.csv"], "give a name that ends in .jsonl"),
    ):
        _, aside = talk(*words, said=["tea?"], code=2)
        assert said in aside, (words, aside)
        assert aside.count("error: ") == 1
    empty = tmp_path / "empty"
    aside = talk("--config", tmp_path / "x.yaml", said=[], code=2)[1]
    assert "x.yaml" in aside
    assert not empty.exists()


def test_without_a_champion_policies_are_proposed(rlhf, models, opened, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("tea?\n"))
    config = tmp_path / "own.yaml"
    config.write_text(f"store: {opened.uri}\npromotion: {{name: other}}\n")
    done = rlhf("chat", "--config", config)
    assert done.returncode == 2
    assert "has no champion of the line other (lines that have: default)" in done.stderr
    assert models["train-policy"][:12] in done.stderr
