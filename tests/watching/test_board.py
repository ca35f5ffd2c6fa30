"""The display of a run: lines in a log, and a live picture on a real pseudo-terminal."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pyte
import pytest

from rlhf.errors import ConfigError
from tasks import board as board_module
from tasks.board import Board
from tasks.console import PlainConsole
from tasks.run_record import INTERRUPTED, RUNNING, new_record, read_records
from tasks.screen import picture, sparkline

ROOT = Path(__file__).parent.parent.parent
STAGES = ["prepare-data", "train-sft", "train-policy", "promote"]
#: A run without models: what flows and tasks tell the board, in their order.
RUN = """
import logging, sys
from pathlib import Path
from tasks.board import NoticeHandler, board
from tasks.console import console
logging.getLogger("rlhf").addHandler(NoticeHandler())
logging.getLogger("rlhf").setLevel(logging.INFO)
board.show_on(console, plain="plain" in sys.argv)
names = ["prepare-data", "train-sft", "train-policy", "promote"]
with board.running("tiny-1", names, Path(sys.argv[1])):
    board.start_stage("prepare-data")
    board.end_stage("prepare-data", "Completed", 1.5, "64 pairs")
    board.start_stage("train-sft")
    for step in range(1, 41):
        board.tell("train-sft", step, 40, {"loss": 5.0 - step / 10}, "loss 1")
    board.end_stage("train-sft", "Cached", 0.1, "loss 5.7")
    board.start_stage("train-policy")
    for step in range(1, 31):
        metrics = {"reward": step, "kl": 0.1 * step, "entropy": 3.0, "tokens": 8.0 + step}
        board.tell("train-policy", step, 100, metrics, f"reward {step}")
    logging.getLogger("rlhf.samples").debug("%s", '["Say hello.", "Hello\\\\u001b[2J you"]')
    logging.getLogger("rlhf.ppo").info("watchdog after update 30: KL 0.00")
    board.wait("train-policy failed and gets try 2 of 3: the disk is full")
    if board.is_live:
        board._live.refresh()
        input()
    board.end("Failed", "the disk is full")
print("the end")
"""


def on_terminal(tmp_path, columns, lines):
    """The screen while that run waits, and the screen after its end."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "CI"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path)], stdin=follower, stdout=follower,
        stderr=follower, cwd=ROOT, env=environment, close_fds=True,
    )  # fmt: skip
    os.close(follower)
    screen = pyte.Screen(columns, lines)
    stream = pyte.ByteStream(screen)

    def read_until(word):
        while select.select([leader], [], [], 120)[0]:
            try:
                data = os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
            stream.feed(data)
            if word and any(word in line for line in screen.display):
                break
        return [line.rstrip() for line in screen.display]

    try:
        during = read_until("waits:")
        os.write(leader, b"\n")
        after = read_until("")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    return during, after


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (120, 40)])
def test_a_terminal_shows_all_stages_figures_and_what_is_waited_for(columns, lines, tmp_path):
    during, after = on_terminal(tmp_path, columns, lines)
    text = "\n".join(during)
    for stage, state in zip(STAGES, ("Completed", "Cached", RUNNING, "Pending"), strict=True):
        (line,) = [line for line in during if f" {stage} " in line and "waits" not in line]
        assert state in line
    assert "30/100 ETA" in text
    for label in ("reward", "KL", "entropy", "length"):
        assert any(line.startswith(f"  {label} ") for line in during), text
    assert "▁" in text
    assert "█" in text
    assert "Say hello." in text
    assert "Hello\\x1b[2J you" in text  # a reply is no command to the terminal
    assert "watchdog after update 30" in text  # above the picture, not over it
    assert "waits: train-policy failed and gets try 2 of 3" in text
    assert during[-1] == ""  # it fits: a picture as high as the screen would scroll
    assert any("the end" in line for line in after)
    assert not any("waits:" in line for line in after)


def test_a_log_has_a_line_per_event_and_no_escape_codes(tmp_path):
    for extra in ([], ["plain"]):
        process = subprocess.run(
            [sys.executable, "-c", RUN, str(tmp_path), *extra], cwd=ROOT, capture_output=True,
            text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}, check=True,
        )  # fmt: skip
        shown = process.stdout.splitlines()
        assert "\x1b" not in process.stdout + process.stderr
        assert shown[0] == "prepare-data: Completed in 2 s  64 pairs"
        assert [line for line in shown if line.startswith("train-sft")] == [
            *(line for line in shown if line.startswith("train-sft: ") and "/40" in line),
            "train-sft: Cached  loss 5.7",
        ]
        steps = [int(line.split()[1].split("/")[0]) for line in shown if "/40" in line]
        assert steps[0] == 1
        assert steps[-1] == 40
        assert len(steps) == len(set(steps)) <= 12  # every tenth, none twice
        assert "waits: train-policy failed and gets try 2 of 3: the disk is full" in shown
        assert process.stderr == "watchdog after update 30: KL 0.00\n"


def test_a_long_step_gives_a_sign_of_life(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(board_module.time, "monotonic", lambda: clock[0])
    out = PlainConsole(file=io.StringIO(), force_terminal=False, width=80)
    board = Board()
    board.show_on(out)
    with board.running("tiny", ["train-sft"], tmp_path):
        board.start_stage("train-sft")
        board._stop.set()  # the clock is ours
        board._sign_of_life()
        board.tell("train-sft", 3, 9, {}, "")
        board._sign_of_life()
        board.wait("the lock")
        board._sign_of_life()
        board.end("Completed")
    assert [line.split(" for ")[0] for line in out.file.getvalue().splitlines()] == [
        "train-sft: at work", "train-sft: 3/9  ETA –", "train-sft: at work", "waits: the lock",
        "still waits: the lock",
    ]  # fmt: skip


def test_what_is_left_shrinks_while_a_long_step_is_made(tmp_path, monkeypatch):
    """The record is written again within a step, for others to watch: its ETA stood still."""
    clock = [100.0]
    monkeypatch.setattr(board_module.time, "monotonic", lambda: clock[0])
    board = Board()
    board.show_on(PlainConsole(file=io.StringIO(), force_terminal=False))
    with board.running("tiny", ["evaluate-policy"], tmp_path):
        board.start_stage("evaluate-policy")
        board._stop.set()  # the clock is ours
        clock[0] += 170.0
        board.tell("evaluate-policy", 1, 3, {}, "")
        left = []
        for _ in range(3):
            board.note_report(tmp_path / "page.html")
            (record,) = read_records(tmp_path / "runs")
            left.append(record.stages[0].left)
            clock[0] += 85.0
        board.end("Completed")
    assert left == [340.0, 255.0, 170.0]


def test_an_error_that_leaves_the_run_ends_its_record(tmp_path):
    board = Board()
    board.show_on(PlainConsole(file=io.StringIO(), force_terminal=False))
    with pytest.raises(ConfigError), board.running("a", ["train-sft"], tmp_path):
        raise ConfigError("sft.epochs = -1 is too few")
    with pytest.raises(KeyboardInterrupt), board.running("b", ["train-sft"], tmp_path):
        raise KeyboardInterrupt
    with board.running("c", ["train-sft"], tmp_path):
        board.end_by_signal(INTERRUPTED, 143)
        found = {r.name: (r.state, r.code) for r in read_records(tmp_path / "runs")}
    assert found == {"a": ("Failed", 2), "b": (INTERRUPTED, None), "c": (INTERRUPTED, 143)}


def test_a_worker_shows_and_writes_nothing(tmp_path):
    board = Board()
    with board.running("a", ["train-sft"], tmp_path):
        board.start_stage("train-sft")
        board.tell("train-sft", 1, 2, {"loss": 1.0}, "loss 1")
        board.wait("a lock")
    assert not [*tmp_path.iterdir()]


def test_the_picture_fits_its_height_whatever_is_in_it():
    record = new_record("a" * 200, [f"stage-{n}" for n in range(10)])
    record.series = {key: [1.0, 2.0, 3.0] for key in ("reward", "kl", "entropy", "tokens")}
    record.sample = ["word " * 300, "line\n" * 300]
    record.waits = "w" * 500
    for height in (16, 20, 24, 40):
        out = PlainConsole(file=io.StringIO(), width=80)
        out.print(picture(record, 80, height))
        lines = out.file.getvalue().splitlines()
        assert len(lines) < height
        assert max(map(len, lines)) <= 80
        assert lines[-1].startswith("waits: ")


def test_sparklines_are_between_the_lowest_and_the_highest():
    assert sparkline([0.0, 7.0, 3.5], 10) == "▁█▅"
    assert sparkline([1.0, 1.0], 10) == "▁▁"
    assert sparkline([0.0, float("inf"), 1.0], 10) == "▁ █"
    assert sparkline([float(n) for n in range(100)], 5) == "▁▃▅▆█"
