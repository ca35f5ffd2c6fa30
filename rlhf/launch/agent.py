"""Launcher of the children: torchrun, which ends when its parent does.

Runs as a script: `python -m rlhf.launch.agent <folder> <count> [<place as JSON>]`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from rlhf.launch.job import AGENT_PID, FAILURES, send

#: Seconds in which all launchers must have met; each has loaded torch before.
MEET_SECONDS = 300


def main() -> None:
    """Run the children until all have ended, or one has failed."""
    folder, count = Path(sys.argv[1]), sys.argv[2]
    os.environ[AGENT_PID] = str(os.getpid())
    # SIGTERM is meant for the children, which get it from the parent or by the process group.
    signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = [
        *_rendezvous(sys.argv[3:]), "--max-restarts=0", f"--nproc-per-node={count}",
        "--signals-to-handle=SIGINT", "-m", "rlhf.launch.worker", str(folder),
    ]  # fmt: skip
    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        (folder / FAILURES).write_text(json.dumps(codes))
        sys.exit(1)


def _rendezvous(place: list[str]) -> list[str]:
    """Return torchrun's arguments on where the launchers of all machines meet."""
    if not place:
        return ["--standalone", "--local-addr=127.0.0.1"]
    at = json.loads(place[0])
    return [
        # By number: node 0 has the first ranks, which lead. All come within seconds of each other.
        "--rdzv-backend=static", f"--rdzv-conf=timeout={MEET_SECONDS}",
        f"--nnodes={at['nodes']}", f"--node-rank={at['node']}", f"--local-addr={at['own']}",
        f"--master-addr={at['host']}", f"--master-port={at['port']}",
    ]  # fmt: skip


def _end_with_parent(folder: Path) -> None:
    """Kill the children and exit when the parent's end of stdin is closed."""
    sys.stdin.buffer.read()
    send(folder, signal.SIGKILL)
    for _ in range(3):  # a child that is being killed may still write into it
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
    os._exit(1)


if __name__ == "__main__":
    main()
