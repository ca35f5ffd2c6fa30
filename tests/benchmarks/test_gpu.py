"""The GPU benchmark: its script at tiny sizes on a CPU, and its errors on a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as main
from benchmarks.gpu import pack, processes, profiling, quickstart, report, resume, speed
from benchmarks.gpu.section import Context, Results, SectionFailedError, not_finite

ROOT = Path(__file__).parent.parent.parent
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "RLHF_CHECK_SHAPES": "0"}


@pytest.fixture(scope="module")
def carried(tmp_path_factory):
    """A folder as `.gpu`, with an archive of models trained for a few steps."""
    folder = tmp_path_factory.mktemp("carried")
    command = [sys.executable, "-m", "benchmarks.gpu.pack", "--tiny", "--threads", "1"]
    archive = folder / main.ARCHIVE
    subprocess.run(
        [*command, "--out", str(archive)], check=True, cwd=ROOT, env=ALONE, capture_output=True
    )
    return folder


def script(*arguments):
    environment = {**ALONE, "RLHF_GPU_PYTHON": sys.executable}
    return subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--cpu", *map(str, arguments)],
        check=False, cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_every_section_runs_and_one_that_fails_says_why(carried, tmp_path):
    done = script("--out", tmp_path, "--carried", carried, "--fail", "cache")
    assert "packages missing: none" in done.stdout
    result = json.loads((tmp_path / "gpu.json").read_text())
    outcomes = {name: (s["status"], s["reason"]) for name, s in result["sections"].items()}
    assert outcomes.pop("cache") == ("failed", "told to fail")
    assert outcomes.pop("trl") == ("skipped", f"no wheel of TRL in {carried}/trl")
    assert set(outcomes) == {s.name for s in main.SECTIONS} - {"cache", "trl"}
    assert set(outcomes.values()) == {("ok", "")}, (tmp_path / "gpu.log").read_text()
    assert done.returncode == 1
    assert not_finite(result) == []
    text = (tmp_path / "gpu.md").read_text()
    for name, (status, _) in outcomes.items():
        assert f"| {name} | {status} |" in text
        assert name == "environment" or f"\n## {name}\n" in text
    assert "Incomplete" not in text
    results = {name: s["results"] for name, s in result["sections"].items()}
    assert results["golden"]["passed"] > 100
    assert all(outcome["bit_equal"] for outcome in results["resume"].values())
    assert results["rollouts-500m"]["full, 4 rows"]["reply_tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["rollout"], "no section is called 'rollout'; there are environment,"),
        (["--seconds", "1"], "--seconds 1 is too little"),
        (["--out"], "--out needs a folder"),
        (["--out", "README.md"], "README.md is a file"),
    ],
)
def test_a_bad_call_ends_before_any_work(arguments, reason):
    done = script(*arguments)
    assert done.returncode == 2
    assert reason in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_nothing_is_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")],
        check=False, cwd=ROOT, env=ALONE, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "finds no NVIDIA GPU; --cpu tries the script without one" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_script_that_is_ended_ends_its_sections_and_says_so(tmp_path, carried):
    command = ["bash", "benchmarks/gpu.sh", "--cpu", "--out", str(tmp_path), "--carried"]
    environment = {**ALONE, "RLHF_GPU_PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    started = [*command, str(carried), "resume", "learning"]
    with subprocess.Popen(started, cwd=ROOT, env=environment) as running:
        while not [*tmp_path.glob("rlhf-gpu-*/resume/*")]:
            assert running.poll() is None
            time.sleep(0.01)
        running.terminate()
    assert running.returncode == 143
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    left = {name: s["status"] for name, s in sections.items() if name != "environment"}
    assert set(left) == {"resume", "learning"}
    assert "interrupted" in left.values()
    assert set(left.values()) <= {"interrupted", "not run"}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(("rlhf-gpu-", "tmp."))] == []
    assert str(tmp_path) not in subprocess.run(
        ["ps", "-eo", "args"], check=True, capture_output=True, text=True
    ).stdout.replace("ps -eo", "")


def test_some_sections_leave_the_others_results(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"device": "cpu", "tiny": True, "sections": {"golden": {"a": 1}}}))
    assert main.earlier_sections(path, Namespace(device="cpu", tiny=True)) == {"golden": {"a": 1}}
    assert main.earlier_sections(path, Namespace(device="cuda", tiny=False)) == {}
    path.write_text("{")
    assert main.earlier_sections(path, Namespace(device="cpu", tiny=True)) == {}
    names = [s.name for s in main.chosen(Namespace(sections=["lora"]))]
    assert names == ["environment", "rates", "lora"]


# --- the archive --------------------------------------------------------------------------------


def test_the_same_files_give_the_same_archive(tmp_path):
    archives = []
    for name in ("a", "b"):
        folder = tmp_path / name
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "file").write_text("text")
        archives.append(pack.packed(folder))
        time.sleep(0.01)
    assert archives[0] == archives[1]


def test_an_archive_writes_nothing_outside_of_its_folder(tmp_path):
    archive, folder = tmp_path / "archive.tar.gz", tmp_path / "folder"
    (tmp_path / "file").write_text("text")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "file", "../outside")
    assert main.unpack(archive, folder).startswith("broken (OutsideDestinationError")
    assert not (tmp_path / "outside").exists()


def test_a_broken_archive_fails_the_sections_that_need_it(tmp_path):
    archive, folder = tmp_path / main.ARCHIVE, tmp_path / "folder"
    assert main.unpack(archive, tmp_path / "none").startswith("none (")
    archive.write_bytes(b"no archive")
    assert main.unpack(archive, folder).startswith("broken (ReadError")
    context = Context("learning", "cpu", True, str(tmp_path), str(folder), str(tmp_path), "")
    with pytest.raises(SectionFailedError, match=r"broken or has no quickstart/data; make it with"):
        quickstart.folder(context, "data")


# --- sections as processes ----------------------------------------------------------------------


def sleeper(argument):
    """Start a child, note both ids, and sleep."""
    child = subprocess.Popen(["sleep", "60"])
    Path(argument).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(60)


def test_a_late_section_is_killed_with_its_children(tmp_path):
    note = tmp_path / "note"
    child = processes.start(f"{__name__}:sleeper", str(note), tmp_path / "log")
    while not note.is_file() or not note.read_text():
        assert child.poll() is None
        time.sleep(0.01)
    _, grandchild = note.read_text().split()
    assert child.kill() == -signal.SIGKILL
    state = Path(f"/proc/{grandchild}/stat")
    deadline = time.monotonic() + 60
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the section's own child still runs"
        time.sleep(0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here a fork can use CUDA")
def test_a_fork_that_cannot_use_cuda_becomes_a_new_interpreter(tmp_path):
    log = tmp_path / "log"
    child = processes.start("os:chdir", str(tmp_path / "missing"), log, needs_cuda=True)
    assert child.wait() == 1
    text = log.read_text()
    assert "the fork can't use CUDA" in text
    assert "FileNotFoundError" in text  # the function's own error, in the new interpreter


def benchmark(tmp_path, **options):
    given = {"sections": [], "out": tmp_path / "out", "device": "cpu", "tiny": True,
             "seconds": 60, "fail": [], "missing": "", "carried": str(tmp_path)}  # fmt: skip
    (tmp_path / "scratch").mkdir()
    return main.Benchmark(Namespace(**{**given, **options}), tmp_path / "scratch")


def test_sections_end_at_their_limit_and_none_starts_without_time(tmp_path, monkeypatch):
    hangs = main.Section("hangs", "hangs:hangs", 0.3, needs_cuda=False)
    late = main.Section("late", "late:late", 10, needs_cuda=False)
    monkeypatch.setattr(main, "SECTIONS", (hangs, late))
    monkeypatch.setattr(main, "_preload", lambda: None)
    monkeypatch.setattr(main, "LEAST_SECONDS", 0.5)

    def start(entry, argument, log, **_):
        """In place of the section's function, one that hangs after a first number.

        From then on there is less time left than a section needs.
        """
        run.end = time.monotonic() + 0.4
        Results(Path(Context.from_json(argument).results)).put(first=1.0)
        note = str(tmp_path / "note")
        return started(f"{__name__}:sleeper", note, log)

    started = processes.start
    monkeypatch.setattr(processes, "start", start)
    run = benchmark(tmp_path, seconds=60)
    assert run.run((hangs, late)) is False
    sections = json.loads((tmp_path / "out" / "gpu.json").read_text())["sections"]
    assert sections["hangs"]["reason"].startswith("stopped after")
    assert sections["hangs"]["results"] == {"first": 1.0}
    assert sections["late"]["reason"] == "no time left of 60 s"


# --- what a CPU does not show -------------------------------------------------------------------


def test_the_search_for_the_largest_batch_ends_out_of_memory(tmp_path):
    def run(rows):
        if rows > 8:
            raise torch.OutOfMemoryError("tried to allocate")
        return {"rows": rows}

    results = Results(tmp_path / "results.json")
    found = speed._doubled(run, 4, 64, torch.device("cpu"), results)
    assert found["fitted"] == [{"rows": 4}, {"rows": 8}]
    assert found["out_of_memory_at"] == 16
    assert "| none | 16 | – |" in report.markdown(
        {"sections": {"largest": {"status": "ok", "reason": "", "seconds": 1.0,
                                  "results": {"decode": {**found, "fitted": []}}}},
         "tiny": False, "started": "", "seconds": 1.0, "device": "cuda", "missing_packages": ""}
    )  # fmt: skip


def test_calls_per_decoded_token_leave_the_prompt_out():
    def profile(steps):
        calls = dict.fromkeys(profiling.CALLS, 100 + 7 * steps)
        return {
            "calls": calls,
            "kernel_milliseconds": 5.0 + steps,
            "device_operations": 50 + 9 * steps,
        }

    found = profiling._per_step(profile(8), profile(24), 16)
    assert found["kernel_launches"] == 7
    assert (found["kernel_milliseconds"], found["device_operations"]) == (1.0, 9.0)


def test_a_run_that_torch_refuses_to_make_deterministic_goes_on_with_warnings(
    tmp_path, monkeypatch
):
    modes = []

    class Run:
        def __init__(self, context, variant, folder):
            self.checkpoints = folder

        def train(self, mode, killed_after=None):
            modes.append(mode)
            if mode == "strict":
                return {"code": 1, "error": "cumsum does not have a deterministic one. Turn it off"}
            code = -signal.SIGKILL if killed_after else 0
            return {"code": code, "nondeterministic": ["cumsum", "scatter"]}

    context = Context("resume", "cpu", True, "", "", str(tmp_path), "")
    monkeypatch.setattr(resume, "_Run", Run)
    monkeypatch.setattr(resume, "_compared", lambda *_: {"bit_equal": True, "finding": ""})
    outcome = resume._variant(context, "fp32", "strict")
    assert modes == ["strict", "warned", "warned", "warned"]
    assert outcome["refused"] == "cumsum does not have a deterministic one"
    assert outcome["nondeterministic"] == ["cumsum", "scatter"]
    assert outcome["bit_equal"]
