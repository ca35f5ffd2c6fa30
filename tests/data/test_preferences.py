"""The preference file: whole lines by many processes, refusals, and no credentials."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.errors import ConfigError
from rlhf.preferences import PREFERENCES, PreferenceFile, credential_in
from tests.data.helpers import message, user

ROOT = Path(__file__).parents[2]


def row(prompt="tea?", chosen="good", rejected="bad", **more):
    return {"prompt": [user(prompt)], "chosen": chosen, "rejected": rejected, **more}


def test_rows_are_appended_and_nothing_is_changed(tmp_path):
    path = tmp_path / "new" / "own.jsonl"
    PreferenceFile(path).append([row(), row(chosen="日本\u2028\n")])
    before = path.read_bytes()
    file = PreferenceFile(path)
    file.append([row("cup?")])
    assert path.read_bytes().startswith(before)
    assert [r["prompt"][0]["content"] for r in lines_of(path)] == ["tea?", "tea?", "cup?"]
    assert lines_of(path)[1]["chosen"] == "日本\u2028\n"
    # An editor may leave the last line without its end.
    path.write_bytes(before.rstrip())
    file.append([row("jar?")])
    assert [r["prompt"][0]["content"] for r in lines_of(path)] == ["tea?", "tea?", "jar?"]


def lines_of(path):
    """Lines as JSON lines have them: a text may hold other ends of lines."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def test_the_default_file_is_beside_the_default_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PreferenceFile().append([row()])
    assert lines_of(tmp_path / PREFERENCES) == [row()]


WRITER = """
import sys
from rlhf.preferences import PreferenceFile
file, name = PreferenceFile(__import__("pathlib").Path(sys.argv[1])), sys.argv[2]
for i in range(40):
    texts = {"chosen": f"{name} {i} " + "x" * 20_000, "rejected": "y"}
    file.append([{"prompt": [{"role": "user", "content": "p"}], **texts}] * 2)
"""


def test_processes_that_append_at_once_take_turns(tmp_path):
    path = tmp_path / "own.jsonl"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], cwd=ROOT)
        for name in "abcd"
    ]
    assert [writer.wait() for writer in writers] == [0] * 4
    chosen = [r["chosen"].split()[:2] for r in lines_of(path)]
    assert len(chosen) == 4 * 40 * 2
    assert chosen[::2] == chosen[1::2]  # the rows of one call stand together
    for name in "abcd":
        assert [int(i) for n, i in chosen[::2] if n == name] == [*range(40)]


FULL = """
import resource, sys
from pathlib import Path
from rlhf.errors import ConfigError
from rlhf.preferences import PreferenceFile
path = Path(sys.argv[1])
file = PreferenceFile(path)
size = path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))
pair = {"prompt": [{"role": "user", "content": "p"}], "chosen": "x" * 500, "rejected": "y"}
try:
    file.append([pair])
except ConfigError as error:
    print(error)
"""


def test_a_line_is_whole_or_not_there_when_there_is_no_room(tmp_path):
    path = tmp_path / "own.jsonl"
    PreferenceFile(path).append([row()])
    before = path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert "can't be written (File too large); nothing changed" in done.stdout
    assert path.read_bytes() == before


def test_files_that_are_refused(tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "tea?"}\n')
    (tmp_path / "broken.jsonl").write_text("prompt,chosen\n")
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, said in (
        ("pairs.csv", "give a name that ends in .jsonl"),
        ("pairs.jsonl.gz", "give a name that ends in .jsonl"),
        ("other.jsonl", "holds something else than lines with prompt, chosen and rejected"),
        ("broken.jsonl", "holds something else"),
        ("folder.jsonl", "is no regular file"),
        ("pipe.jsonl", "is no regular file"),
        ("other.jsonl/x.jsonl", "can't be read (Not a directory)"),
    ):
        assert said in message(ConfigError, PreferenceFile, tmp_path / name), name
    assert other.read_text() == '{"question": "tea?"}\n'
    # What comes between the look at the start and the vote is seen too.
    path = tmp_path / "late.jsonl"
    file = PreferenceFile(path)
    path.write_text("mine\n")
    assert "something else" in message(ConfigError, file.append, [row()])
    path.unlink()
    path.symlink_to("/dev/null")
    assert "is no regular file" in message(ConfigError, file.append, [row()])
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere.jsonl")
    file.append([row()])  # a link is the user's own choice
    assert lines_of(tmp_path / "elsewhere.jsonl") == [row()]


SECRETS = {
    "an AWS access key": "AKIA" + "ABCDEFGH01234567",
    "a Hugging Face token": "hf_" + "a1B2" * 9,
    "a GitHub token": "ghp_" + "a1B2" * 9,
    "an API key": "sk-proj-" + "a1B2" * 9,
    "a private key": "-----BEGIN RSA PRIVATE KEY-----",
    "an authorization header": "Authorization: Bearer " + "a1B2" * 6,
    "a password in a URL": "postgres://ann:hunter2@db.example.org/x",
    "a web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijkl",
    "a Slack token": "xoxb-123456789012-abcdef",
}


@pytest.mark.parametrize("what", SECRETS)
def test_credentials_are_never_written(tmp_path, what):
    path = tmp_path / "own.jsonl"
    file = PreferenceFile(path)
    for secret in (row(f"why: {SECRETS[what]}?"), row(rejected=f"it is {SECRETS[what]}")):
        said = message(ConfigError, file.append, [row(), secret])
        assert what in said
        assert "nothing was written" in said
        assert SECRETS[what] not in said
    assert not path.exists()


def test_the_values_of_secret_variables_are_never_written(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "correct horse battery")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert credential_in(row("is false a token?")) is None
    said = message(
        ConfigError, PreferenceFile(tmp_path / "x.jsonl").append, [row("correct horse battery")]
    )
    assert "looks like the value of MY_API_KEY" in said
    assert "horse" not in said


@pytest.mark.parametrize(
    "text",
    [
        "What is an API key, and what does sk- mean?", "Authorization: Bearer <token>",
        "ann@example.org asked https://example.org/a@b", "git clone ssh://git@example.org/x",
        "the risk-adjusted-return-of-investments-abcdefghijkl",
    ],
)  # fmt: skip
def test_talk_about_credentials_is_no_credential(text):
    assert credential_in(row(text)) is None
