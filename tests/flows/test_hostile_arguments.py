"""Every command with arguments that nobody means: an exit code and one line, no traceback."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import sys

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import rlhf.external
from flows import cli
from tasks.console import console
from tests.examples import examples

pytestmark = pytest.mark.prefect
#: Seconds that one command may take here; most need some milliseconds.
PATIENCE = 60

#: Commands; `@` is the hostile argument. None of them gets as far as training or a model.
COMMANDS = [
    "run @", "run bad.yaml @", "stage @ plain.yaml", "stage train-sft @", "@", "config @",
    "stage train-sft plain.yaml --input @", "stage train-sft plain.yaml --input sft=@",
    "stage train-sft plain.yaml --store=@", "config show @", "config show bad.yaml @",
    "config show plain.yaml @", "config show bad.yaml --name=@", "config show bad.yaml --seed=@",
    "config show bad.yaml --ppo.kl_coef=@", "config show bad.yaml --ppo.reward_weights=@",
    "config show bad.yaml --gates.policy=@", "config show bad.yaml --data.source=@",
    "preflight @", "preflight plain.yaml --base.path=@", "preflight plain.yaml --data.source=@",
    "preflight plain.yaml --runtime.work_dir=noread/@", "runs @", "runs --limit @", "status @",
    "forget @", "forget --ids @", "forget --file @", "forget --file folder --store @",
    "approve @", "approve @ --store st", "approve abcdef --store @", "approve abcdef --config @",
    "approve abcdef --store st --name @", "promote @ --store st", "promote x --store @",
    "rollback --why @ --store st", "rollback --why x --to @ --store st", "champion --store @",
    "champion --name @ --store st", "compare @ @", "compare a b --prompts @", "compare a b --out @",
    "compare a b --report @", "judge @ --prompts bytes.txt", "judge a --suite @",
    "judge a --prompts @", "judge a --prompts bytes.txt --out @", "artifacts ls --store @",
    "artifacts ls --config @", "artifacts show @ --store st", "artifacts lineage @ --store st",
    "artifacts verify @ --store st", "artifacts pull @ out --store st", "artifacts @",
    "artifacts pull abcdef @ --store st", "artifacts push @ kind --store st",
    "artifacts push folder @ --store st", "artifacts pin @ n --store st",
    "artifacts pin abcdef @ --store st", "artifacts unpin @ --store st", "data @",
    "artifacts rm @ --store st", "artifacts gc --grace-hours @ --store st", "data inspect @",
    "data inspect @ --as sft", "data inspect bytes.txt --rows @", "data inspect bytes.txt @",
    "server @", "server start --port @ --folder /proc/x", "server start --host @ --folder /proc/x",
    "server stop --folder @",
    "node @", "node --wait @", "export @ out --store st", "export champion @ --store st",
    "export a out --store @", "export a out --push @", "export a out --license @",
    "export a out --prompts @", "export a out --format @", "export a out --converter @",
]  # fmt: skip
HOSTILE = [
    "", "--", "-", "[/x]", "a\0b", "x" * 300, "d/" * 3000, "\udcff\udcfe", "9" * 5000, "-1", "nan",
    "1e400", "null", ".", "~nobody/x", "folder", "socket", "pipe", "pipe.yaml", "pipe.json",
    "unread", "bytes.yaml", "deep.yaml", "list.yaml", "nul.yaml", "/dev/null", "/dev/zero",
    "/proc/self/mem", "s3://", "file://x", "http://x", "\x1b[31m\r\u202e", "{a: [", "=", "../../x",
    "!!python/object:os.system", "https://user:pw@h/x", "champion:[/x]",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with files of all kinds."""
    made = tmp_path_factory.mktemp("hostile")
    (made / "folder").mkdir()
    (made / "folder" / "x").write_text("1")
    for name in ("pipe", "pipe.yaml", "pipe.json"):
        os.mkfifo(made / name)
    (made / "unread").write_text("x")
    (made / "unread").chmod(0)
    for name in ("bytes.yaml", "bytes.txt"):
        (made / name).write_bytes(b"\xff\xfe\x00\x01")
    (made / "plain.yaml").write_text("evaluation: {judge: none}\n")
    (made / "bad.yaml").write_text("name: '[/x]'\n'[/y]': 1\n")
    (made / "deep.yaml").write_text("[" * 3000)
    (made / "list.yaml").write_text("[1, 2]")
    (made / "nul.yaml").write_bytes(b"name: a\0b\n")
    with pytest.MonkeyPatch.context() as patch, socket.socket(socket.AF_UNIX) as listener:
        patch.chdir(made)
        listener.bind("socket")
        patch.setenv("HOME", str(made))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(console, "_width", 100)
        # A valid configuration must not run.
        patch.setattr(cli, "prepare_prefect", lambda _: sys.exit(0))
        yield made


def call(command: str, argument: str) -> tuple[int, str]:
    """Run a command in this process; return its exit code and all that it has printed."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))

    def stop(*_: object) -> None:
        raise AssertionError(f"rlhf {command} hangs with {argument[:50]!r}")

    arguments = ["rlhf", *(word.replace("@", argument) for word in command.split())]
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    try:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
            patch.setattr(sys, "argv", arguments)
            with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
                cli.main()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    code = end.value.code or 0
    assert isinstance(code, int), (command, argument, code)
    errors = [line for line in texts[1].splitlines() if not line.startswith("warning: ")]
    about = (command, argument[:50], code, texts[1][:500])
    assert "Traceback" not in texts[0] + texts[1], about
    assert "fault of the program" not in texts[1], about
    assert code in (0, cli.BROKEN, cli.BAD_INPUT), about
    assert [line[:7] for line in errors] == (["error: "] if code else []), about
    assert len(texts[1]) < 7000, about
    return code, texts[1]


@pytest.mark.parametrize("part", range(4))
def test_every_command_ends_with_a_code_and_one_line(folder, part):
    # Half of all pairs, each argument with each second command.
    for i, command in enumerate(COMMANDS):
        if i % 4 == part:
            for argument in HOSTILE[i % 2 :: 2]:
                call(command, argument)


# Shrinking would take minutes, and the examples are short anyway.
@settings(max_examples=examples(60), phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(command=st.sampled_from(COMMANDS), argument=st.text(max_size=30))
def test_any_text_ends_with_a_code_and_one_line(folder, command, argument):
    # `/` alone would be read as a folder of data.
    call(command, f"x{argument}")


def test_what_is_wrong_is_named(folder):
    assert "error: 'a\\x00b' holds a null character; name it" in call("run @", "a\0b")[1]
    assert "Is no regular file" in call("forget --file @", "pipe")[1]
    long = call("stage train-sft plain.yaml --base.path=@", "x" * 300)
    assert long[0] == 2
    assert "base.path = " in long[1]
    assert "Unknown command" in call("@", "nope")[1]


def test_a_folder_of_too_many_files_is_refused(folder, monkeypatch):
    monkeypatch.setattr(rlhf.external, "MOST_FILES", 3)
    code, said = call("data inspect @", str(folder))
    assert code == 2
    assert "more than 3 files" in said
