"""The commands `rlhf artifacts …`, called as from a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows import artifacts
from rlhf.champions import promote
from rlhf.errors import ConfigError
from rlhf.store import ArtifactRef, Producer, open_store


@pytest.fixture
def rlhf(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder, in this process; what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(artifacts.console, "_width", 200)

    def run(*words: str, code: int = 0) -> str:
        result = artifacts.app(
            [*words], exit_on_error=False, print_error=False, result_action="return_value"
        )
        assert (result or 0) == code
        return capsys.readouterr().out

    return run


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "deep" / "weights.safetensors").write_bytes(b"w" * 5000)
    return folder


def pushed(rlhf, folder: Path, kind: str = "policy") -> str:
    return rlhf("push", str(folder), kind).split()[1]


def test_push_show_pull(rlhf, model, tmp_path):
    digest = pushed(rlhf, model)
    assert len(digest) == 64
    assert pushed(rlhf, model) == digest
    shown = rlhf("show", digest[:8])
    assert '"deep/weights.safetensors"' in shown
    assert '"stage": "push"' in shown
    assert rlhf("pull", digest[:8], "copy").strip() == str(tmp_path / "copy")
    assert (tmp_path / "copy/deep/weights.safetensors").read_bytes() == b"w" * 5000
    (tmp_path / "empty").mkdir()
    rlhf("pull", digest[:8], "empty")
    assert (tmp_path / "empty/config.json").read_text() == "{}"
    with pytest.raises(ConfigError, match="is there already"):
        rlhf("pull", digest[:8], "copy")


def test_a_pull_that_fails_leaves_nothing(rlhf, model, tmp_path, monkeypatch):
    digest = pushed(rlhf, model)

    def full(source, target):
        Path(target).mkdir()
        Path(target, "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts.shutil, "copytree", full)
    with pytest.raises(ConfigError, match=r"No space left.*choose another"):
        rlhf("pull", digest, "copy")
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".rlhf"}


def test_ls_marks_champions_and_pins(rlhf, model):
    first = pushed(rlhf, model)
    second = pushed(rlhf, model, "reward-model")
    store = open_store(".rlhf/store", cache_dir=Path("c"))
    store.history.append("champion/ours", {"policy": first})
    rlhf("pin", second[:10], "good")
    table = rlhf("ls")
    (champion,) = [line for line in table.splitlines() if first[:12] in line]
    (pinned,) = [line for line in table.splitlines() if second[:12] in line]
    assert "champion of ours" in champion
    assert "pin good" in pinned
    assert "reward-model" in rlhf("show", "good")
    assert "reward-model" in rlhf("lineage", "good")


def test_verify(rlhf, model):
    good = pushed(rlhf, model)
    (model / "config.json").write_text('{"x": 1}')
    bad = pushed(rlhf, model)
    assert "2 of 2 artifacts are whole" in rlhf("verify")
    entry = open_store(".rlhf/store", cache_dir=Path("c")).manifest(bad).files[0]
    blob = Path(f".rlhf/store/blobs/sha256/{entry.sha256[:2]}/{entry.sha256}")
    blob.write_text('{"x": 2}')
    assert "2 of 2" in rlhf("verify")
    said = rlhf("verify", "--deep", code=1)
    assert f"{bad[:12]}  " in said
    assert "(config.json) does not have the sha256 in its name" in said
    assert "1 of 2 artifacts are whole (every byte read)" in said
    assert "1 of 1" in rlhf("verify", good[:8], "--deep")
    blob.unlink()
    assert "is missing" in rlhf("verify", bad, code=1)


def test_gc_looks_first(rlhf, model):
    digest = pushed(rlhf, model)
    assert "to remove: 0 artifacts" in rlhf("gc")
    for path in Path(".rlhf/store").rglob("*"):
        os.utime(path, (path.stat().st_mtime - 5 * 3600,) * 2)
    assert "to remove: 0 artifacts" in rlhf("gc")
    said = rlhf("gc", "--grace-hours", "4")
    assert f"artifact {digest}" in said
    assert "to remove: 1 artifacts, 3 objects" in said
    assert "nothing was removed; --delete does it" in said
    rlhf("verify", digest)
    rlhf("pin", digest, "keep")
    assert "0 artifacts" in rlhf("gc", "--delete", "--grace-hours", "4")
    rlhf("unpin", "keep")
    assert "removed: 1 artifacts, 3 objects" in rlhf("gc", "--delete", "--grace-hours", "4")
    assert "0 of 0" in rlhf("verify")
    with pytest.raises(ConfigError, match="at least"):
        rlhf("gc", "--grace-hours", "0.1")


def test_gc_lets_go_of_old_records(rlhf, model, tmp_path):
    store = open_store(".rlhf/store", cache_dir=tmp_path / "cache")
    digest = pushed(rlhf, model)
    ref = store.resolve(digest)
    store.history.append(f"records/train-sft/{'0' * 64}", ref.model_dump(mode="json"))
    for path in Path(".rlhf/store").rglob("*"):
        os.utime(path, (path.stat().st_mtime - 91 * 24 * 3600,) * 2)
    assert "to remove: 0 artifacts" in rlhf("gc")
    assert "to remove: 0 records, 0 artifacts" in rlhf("gc", "--older-than", "14w")
    said = rlhf("gc", "--keep-runs", "1")
    assert "all records stay: 0 runs have a report" in said
    said = rlhf("gc", "--older-than", "90d")
    assert f"record train-sft/{'0' * 64}" in said
    assert f"artifact {digest}  policy  0.0 MB" in said
    assert "to remove: 1 records, 1 artifacts, 4 objects" in said
    assert "nothing was removed; --delete does it" in said
    rlhf("verify", digest)
    assert "removed: 1 records, 1 artifacts" in rlhf("gc", "--older-than=90d", "--delete")
    assert "0 of 0" in rlhf("verify")


HOSTILE = [
    *(
        (f"--keep-runs={text}", "whole number of 1 to")
        for text in ("", "0", "-3", "1.5", "1e9", "9" * 5000, "²", "[/x]", "3\n", "90d")
    ),
    ("--older-than=0d", "give at least --grace-hours, 24h"),
    ("--older-than=23h", "give at least --grace-hours, 24h"),
    ("--older-than=36501d", "at most 36500d"),
    *(
        (f"--older-than={text}", "one whole number and one unit")
        for text in ("", "90", "d", "-5d", "1d12h", "1.5d", "90D", "90m", "90 d", "nan", "infd",
                     "1e3d", "٣d", "90d\n", "[/x]", "9" * 5000 + "d")
    ),
]  # fmt: skip


def test_retention_out_of_range(rlhf):
    for option, reason in HOSTILE:
        with pytest.raises(ConfigError) as caught:
            rlhf("gc", option, "--delete")
        message = str(caught.value)
        assert reason in message
        assert message.startswith(option.partition("=")[0])
        assert "\n" not in message
        assert len(message) < 200
    with pytest.raises(ConfigError, match="are both given; give one of them"):
        rlhf("gc", "--keep-runs=3", "--older-than=90d")


def test_a_champions_gate_prompts_stay(rlhf, model, tmp_path):
    """All its challengers answer them."""
    store = open_store(".rlhf/store", cache_dir=tmp_path / "cache")
    producer = Producer(stage="x", code_version="1", config={}, seed=0, versions={})

    def made(kind: str, **parents: ArtifactRef) -> ArtifactRef:
        (model / "config.json").write_text(f'"{kind}"')
        return store.publish(model, kind, parents=parents, producer=producer, metrics={})

    policy = made("policy")
    evaluation = made("evaluation", policy=policy)
    verdict = made("verdict", policy=policy, evaluation=evaluation)
    promote(store, "x", policy.digest, verdict=verdict.digest, expected=None, why="", by="ann")
    with pytest.raises(ConfigError, match="is pinned or a champion; unpin it"):
        rlhf("rm", policy.digest, "--unfreeze")
    for ref in (verdict, evaluation):
        said = f"{ref.short} is, or .* a champion's verdict {verdict.short}: .*--unfreeze"
        with pytest.raises(ConfigError, match=said):
            rlhf("rm", ref.digest)
        assert store.exists(ref)
    assert f"removed {evaluation.digest}" in rlhf("rm", evaluation.digest, "--unfreeze")


def test_the_whole_command(model, tmp_path):
    """Errors are one line with an exit code there too."""
    command = [sys.executable, "-m", "flows.cli", "artifacts"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *words], capture_output=True, text=True, cwd=tmp_path, env=environment,
            check=False,
        )  # fmt: skip

    (model / "weights.bin").write_bytes(b"pickle")
    done = run("push", "model", "policy")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: can't publish model: path 'weights.bin' looks like")
    assert done.stderr.count("\n") == 1
    done = run("show", "nothing")
    assert done.returncode == 2
    assert "'nothing' names no artifact" in done.stderr


def test_hostile_names_are_shown_as_they_are(rlhf, model):
    evil = "[/x]\x1b[31m\r\u202e"
    (model / "[y].json").write_text("{}")
    made = Producer(stage=evil, code_version="1", config={"[/z]": evil}, seed=0, versions={})
    store = open_store(".rlhf/store", cache_dir=Path(".rlhf"))
    ref = store.publish(model, "policy", parents={}, metrics={"[/m]": 1.0}, producer=made)
    shown = "[/x]\\x1b[31m \\u202e"
    listed = rlhf("ls")
    assert shown.strip() in listed
    assert "policy" in rlhf("lineage", ref.digest)
    manifest = json.loads(rlhf("show", ref.digest))
    assert manifest["producer"]["stage"] == evil
    assert rlhf("pull", ref.digest, "[/out]").strip().endswith("/[/out]")
    assert not {"\x1b", "\r", "\u202e"} & {*listed}
