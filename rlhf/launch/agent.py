"""`python -m rlhf.launch.agent <folder> <count>`: torchrun, which ends when its parent does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from rlhf.launch import folder as names


def main() -> None:
    """Run the processes until all have ended, or one has failed."""
    folder, count = Path(sys.argv[1]), sys.argv[2]
    os.environ[names.AGENT_PID] = str(os.getpid())
    # The parent tells the processes; whoever tells all that runs here tells them too.
    signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Thread(target=_watch, args=(folder,), daemon=True).start()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = [
        "--standalone", "--local-addr=127.0.0.1", "--max-restarts=0", f"--nproc-per-node={count}",
        "--signals-to-handle=SIGINT", "-m", "rlhf.launch.worker", str(folder),
    ]  # fmt: skip
    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        (folder / names.FAILURES).write_text(json.dumps(codes))
        sys.exit(1)


def _watch(folder: Path) -> None:
    """End everything when the parent's end of our stdin is closed."""
    sys.stdin.buffer.read()
    names.send(folder, signal.SIGKILL)
    for _ in range(3):  # something may still be written while it is removed
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
    os._exit(1)


if __name__ == "__main__":
    main()
