"""`rlhf init`: what it writes runs as it is, for data and bases of every shape."""

from __future__ import annotations

import csv
import json
import os
import pty
import random
import sys
from pathlib import Path

import pytest

from rlhf.config import ArchitectureConfig, load_config
from rlhf.config.load import OWN_PRESETS, load_preset, presets
from rlhf.errors import ConfigError
from rlhf.modeling.base import from_scratch
from tasks import proposal
from tasks.console import console
from tasks.preflight import preflight
from tasks.proposal import propose, write_project

pytestmark = pytest.mark.prefect

WORDS = ("the", "a", "river", "stone", "bright", "quiet", "walks", "over", "under", "seldom", "old")


def rows(count: int, words: int = 4, seed: int = 0) -> list[dict[str, str]]:
    """Pairs whose good replies say "good", with prompts that are no near duplicates."""
    rng = random.Random(seed)

    def reply(kind: str) -> str:
        return " ".join([kind, *rng.choices(WORDS, k=rng.randint(1, words))])

    return [
        {
            "prompt": f"{' '.join(rng.choices(WORDS, k=words))} {i}?",
            "chosen": reply("good"),
            "rejected": reply("bad"),
        }
        for i in range(count)
    ]


def write_lines(path: Path, made: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pretrained model of a few thousand weights, whose vocabulary has no merges."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-base"
    architecture = ArchitectureConfig(
        hidden_size=16, layers=1, heads=2, intermediate_size=32, vocab_size=300, context=256
    )
    model, tokenizer = from_scratch(architecture, ["good bad"], seed=3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A user's folder with 40 pairs in `pairs.jsonl`; no test adds to it but its own project."""
    folder = tmp_path_factory.mktemp("user")
    write_lines(folder / "pairs.jsonl", rows(40))
    return folder


@pytest.fixture
def user(own, monkeypatch):
    monkeypatch.chdir(own)
    monkeypatch.setenv("RLHF_THREADS", "1")
    return own


def test_what_it_writes_runs_as_it_is(rlhf, user, base, tmp_path, monkeypatch):
    made = rlhf("init", "mine", "--data", "pairs.jsonl", "--base", os.path.relpath(base))
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[-1] == "next:    rlhf run mine/config.yaml"
    config = load_config("mine/config.yaml").config
    assert config.sft.lora == config.ppo.lora is not None
    assert (config.data.source, config.base.path) == (str(user / "pairs.jsonl"), str(base))
    # From another folder the same store, data and base are found.
    monkeypatch.chdir(tmp_path)
    checked = rlhf("preflight", user / "mine" / "config.yaml")
    assert checked.returncode == 0, checked.stderr
    assert "does not fit" not in checked.stdout
    ran = rlhf("run", user / "mine" / "config.yaml")
    # The base's weights are random, as warnings say; none is about the configuration.
    told = [line for line in ran.stderr.splitlines() if line.startswith("warning:")]
    known = ("its weights are random", "its weights look untrained")
    assert all(any(words in line for words in known) for line in told), told
    assert told, "the base's weights are random"
    # So few pairs may not pass the gates; the whole flow up to them ran, with nothing changed.
    assert ran.returncode in (0, 3), ran.stderr
    assert "evaluate-reward-model" in ran.stdout
    assert (user / ".rlhf" / "store").is_dir()
    assert not (tmp_path / ".rlhf" / "store").exists()


SHAPES = {
    "few": ("jsonl", rows(12), []),
    "many": ("jsonl", rows(640), []),
    "long": ("jsonl", rows(30, words=120), []),
    "one word": ("jsonl", [{**row, "chosen": "yes", "rejected": "no"} for row in rows(9)], []),
    "chats": (
        "jsonl",
        [
            {**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows(30)
        ],
        [],
    ),
    "ratings": (
        "jsonl",
        [
            {"prompt": row["prompt"], "response": row[name], "score": score}
            for row in rows(30)
            for name, score in (("chosen", 9), ("rejected", 2))
        ],
        [],
    ),
    "foreign columns": (
        "csv",
        [{"ask": r["prompt"], "best": r["chosen"], "worst": r["rejected"]} for r in rows(30)],
        ["--data.prompt_column=ask", "--data.chosen_column=best", "--data.rejected_column=worst"],
    ),
}  # fmt: skip


# A rehearsal of the base takes seconds of CPU: those of two shapes must do.
@pytest.mark.parametrize(
    ("shape", "is_pretrained"),
    [*((shape, False) for shape in SHAPES), ("chats", True), ("many", True)],
)
def test_every_shape_gets_a_configuration_without_a_warning(
    shape, is_pretrained, base, tmp_path, monkeypatch
):
    kind, made, columns = SHAPES[shape]
    path = tmp_path / f"data.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(made[0]))
            writer.writeheader()
            writer.writerows(made)
    else:
        write_lines(path, made)
    monkeypatch.chdir(tmp_path)
    found = propose("A Project", "data." + kind, str(base) if is_pretrained else None, columns)
    folder = write_project(Path("project"), found).parent
    loaded = load_config(folder / "config.yaml")
    assert loaded.config == found.config
    assert loaded.advice() == []
    preflight(loaded.config)
    assert found.config.name == found.config.promotion.name == "a-project"
    assert all(choice.reason for choice in found.choices)
    lines = found.text.splitlines()
    values = [
        i for i, line in enumerate(lines) if line.strip() and not line.strip().startswith("#")
    ]
    for i in values:
        # A section's name alone needs no reason.
        assert lines[i].endswith(":") or lines[i - 1].strip().startswith("# "), lines[i]
    is_trial = shape != "many"
    assert (found.config.promotion.approval == "manual") is is_trial
    assert any("too little to trust" in line for line in found.warnings) is is_trial
    assert all(("on" in rule) is not is_trial for rule in _shares(found.text))


def _shares(text: str) -> list[dict]:
    """Rules on shares of a written configuration."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("- {metric:")]
    names = ("{metric: accuracy", "{metric: sampled.win_rate")
    found = [line for line in lines if any(name in line for name in names)]
    assert len(found) == 2
    return [{"on": True} if "on: low" in line else {} for line in found]


def test_prompts_that_the_base_can_not_read_are_told_before_anything_is_written(
    rlhf, user, base, tmp_path
):
    write_lines(tmp_path / "long.jsonl", rows(30, words=120))
    said = rlhf("init", "long", "--data", tmp_path / "long.jsonl", "--base", base)
    assert said.returncode == 2
    assert "tiny-base reads 256" in said.stderr
    assert not Path("long").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["new"], "--data is missing, and there is no terminal to ask on; give --data <file"),
        (["--data", "pairs.jsonl"], "the folder is missing; name a new one"),
        (["new", "--data", "gone.jsonl"], "--data = 'gone.jsonl': no such file or folder"),
        (["new", "--data", "world"], "configs/quickstart.yaml"),
        (["no/new", "--data", "pairs.jsonl"], "there is no folder 'no'; make it first"),
        (["pairs.jsonl", "--data", "pairs.jsonl"], "is there already; nothing is overwritten"),
        (["taken", "--data", "pairs.jsonl"], "is there already; nothing is overwritten"),
        (["new", "--data", "pairs.jsonl", "--base", "./gone"], "gone': no model there"),
        (["new", "--data", "pairs.jsonl", "--ppo.kl_coef=1"], "ppo.kl_coef: is chosen here"),
        (["new", "--data", "pairs.jsonl", "--data.source=x"], "data.source: give it by --data"),
        (["new", "--data", "pairs.jsonl", "--data.chosen_column=x"], "data.chosen_column = 'x'"),
        (["new", "--data", "three.jsonl"], "too few"),
        (["--ppo.kl_coef=1"], "rlhf init my-project --ppo.kl_coef"),
    ],
)
def test_one_line_says_what_to_do_and_nothing_is_written(rlhf, user, arguments, said):
    Path("taken").mkdir(exist_ok=True)
    Path("taken", "notes").write_text("mine")
    write_lines(Path("three.jsonl"), rows(3))
    result = rlhf("init", *arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not Path("new").exists()
    assert [path.name for path in Path("taken").iterdir()] == ["notes"]


def test_a_folder_that_is_filled_meanwhile_stays_as_it_is(user, tmp_path, monkeypatch):
    found = propose("late", "pairs.jsonl", None)
    target = tmp_path / "late"
    target.mkdir()
    check = proposal.check_target

    def check_and_be_overtaken(folder):
        check(folder)
        (folder / "theirs").write_text("kept")

    monkeypatch.setattr(proposal, "check_target", check_and_be_overtaken)
    with pytest.raises(ConfigError, match="can't be written"):
        write_project(target, found)
    assert [path.name for path in tmp_path.iterdir()] == ["late"]
    assert [path.name for path in target.iterdir()] == ["theirs"]


def test_an_empty_folder_is_taken(user, tmp_path):
    (tmp_path / "empty").mkdir()
    path = write_project(tmp_path / "empty", propose("empty", "pairs.jsonl", None))
    assert load_config(path).config.name == "empty"
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty"]


def test_names_of_strangers_are_no_yaml(user, tmp_path, monkeypatch):
    path = tmp_path / "a: [b]\nppo: {kl_coef: 9}\x1b[31m #.jsonl"
    write_lines(path, rows(30))
    found = propose("e: {}", str(path), None)
    assert found.config.data.source == str(path)
    assert "\x1b" not in found.text
    assert found.config.ppo.kl_coef != 9


def test_the_summary_fits_into_80_columns(rlhf, user, monkeypatch):
    monkeypatch.setattr(console, "_width", 80)
    result = rlhf("init", "narrow", "--data", "pairs.jsonl")
    assert result.returncode == 0, result.stderr
    table, _, end = result.stdout.partition("written:")
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in table.partition("choice")[2]
    assert end.endswith("rlhf run narrow/config.yaml\n")


def test_on_a_terminal_what_is_missing_is_asked(rlhf, user, monkeypatch):
    ours, theirs = pty.openpty()
    monkeypatch.setattr(sys, "stdin", os.fdopen(theirs, "r", closefd=False))
    # Folder, data that are not there, data; and the default base.
    os.write(ours, b"asked\nnothing.jsonl\npairs.jsonl\n\n")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    result = rlhf("init")
    assert result.returncode == 0, result.stderr
    assert "'nothing.jsonl': no such file" in result.stdout
    assert load_config("asked/config.yaml").config.base.path is None
    os.write(ours, b"\x04")  # Ctrl-D
    ended = rlhf("init", "never")
    assert "no answer; give the folder, --data" in ended.stderr
    assert not Path("never").exists()
    os.close(ours)
    os.close(theirs)


def test_a_project_is_a_preset_of_a_deployment(user, tmp_path, monkeypatch):
    write_project(tmp_path / "ours", propose("ours", "pairs.jsonl", None))
    (tmp_path / "quickstart.yaml").write_text("name: theirs\n")
    assert "ours" not in presets()
    with pytest.raises(ConfigError, match="put its file into the folder of RLHF_PRESETS"):
        load_preset("ours", {})
    monkeypatch.setenv(OWN_PRESETS, str(tmp_path))
    assert "ours" in presets()
    assert load_preset("ours", {"seed": 3}).config.name == "ours"
    assert load_preset("quickstart", {}).config.name == "quickstart"  # a shipped one stays
