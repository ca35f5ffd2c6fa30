"""Runs bad inputs in one process, and writes what came of each as a line of JSON.

`python -m benchmarks.bad_inputs.worker <folder> <cases.json>`. The process may hang or be killed:
who started it sees at which case.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from benchmarks.bad_inputs.cases import Outcome

#: Bytes of address space; libraries that are only mapped count too.
SPACE = 16 * 2**30
#: What a command may write: the cache of verified artifacts.
_CACHES = ("home", ".rlhf")


def main() -> None:
    """Run the cases of a file."""
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    prepare(folder)
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
    out = os.fdopen(os.dup(1), "w")
    for number, arguments in cases:
        out.write(json.dumps({"number": number, **asdict(call(folder, arguments))}) + "\n")
        out.flush()


def prepare(folder: Path) -> None:
    """Make this process one in which commands may run: in this folder, without any network."""
    (folder.parent / "home").mkdir(exist_ok=True)
    os.environ.update(HOME=str(folder.parent / "home"), HF_HUB_OFFLINE="1", COLUMNS="100")
    for name in [*os.environ]:
        if name.startswith(("PREFECT_", "RLHF_", "AWS_")):
            del os.environ[name]
    os.environ.update(
        RLHF_THREADS="1", RLHF_WORK_DIR=str(folder.parent / "home" / "work"),
        PREFECT_HOME=str(folder.parent / "home" / ".prefect"), AWS_EC2_METADATA_DISABLED="true",
    )  # fmt: skip
    os.chdir(folder)


def call(folder: Path, arguments: list[str]) -> Outcome:
    """Run one command in this process; a valid configuration is not run."""
    from flows import cli

    digests = json.loads((folder / "digests.json").read_text())
    for kind, digest in digests.items():
        arguments = [word.replace(f"<{kind}>", digest) for word in arguments]
    cli.prepare_prefect = _stop
    shutil.rmtree(folder.parent / "home" / "work", ignore_errors=True)  # verified copies
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    before, peak = snapshot(folder), _peak()
    started, code, argv = time.process_time(), 0, sys.argv
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["rlhf", *arguments]
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException as error:
            code = 99
            print(f"Traceback (most recent call last): {error!r}", file=sys.stderr)
        finally:
            sys.argv = argv
    seconds = time.process_time() - started
    after = snapshot(folder)
    changed = changes(before, after)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(errors="replace"))
    if changed:
        restore(folder)
    return Outcome(code, texts[0][:20_000], texts[1][:20_000], seconds, _peak() - peak, changed)


def snapshot(folder: Path) -> Mapping[str, tuple[int, int]]:
    """Return size and time of every file under a folder, by its path."""
    found: dict[str, tuple[int, int]] = {}
    for path, _, names in os.walk(folder):
        for name in names:
            whole = os.path.join(path, name)  # noqa: PTH118  (twice as fast, 2,000 files a case)
            status = os.lstat(whole)
            found[whole.removeprefix(f"{folder}/")] = (status.st_size, status.st_mtime_ns)
    return found


def changes(
    before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]
) -> tuple[str, ...]:
    """Return the files that were made, changed or removed."""
    names = (name for name in {*before, *after} if before.get(name) != after.get(name))
    # A collection that ends leaves a mark for the next.
    return tuple(sorted(name for name in names if not name.endswith(".ended")))


def restore(folder: Path) -> None:
    """Make the folder what it was, from the copy beside it."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    copy_tree(folder.parent / "original", folder)


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder with links, pipes and times."""
    import subprocess

    target.mkdir(exist_ok=True)
    subprocess.run(["cp", "-a", f"{source}/.", str(target)], check=True)


def _stop(_: bool) -> None:
    sys.exit(0)


def _peak() -> float:
    """Return the most memory that this process had, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
