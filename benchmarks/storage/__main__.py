"""The artifact store beside its alternatives: `python -m benchmarks.storage`.

On a one-node Ceph of its own, in one run: medians of `--repeats`, every operation in a fresh
process, the methods' order reversed from one repetition to the next. Prints tables, then the same
as Markdown for RESULTS.md. `--only` takes one or several of

    large   publish and fetch of 1 GiB beside s3transfer, through 200 MiB/s and on loopback
    small   1,000 files of 100 KB
    memory  peak memory with 20 GB
    again   bytes and seconds of a second publish of the same content
    faults  outcomes of faults: survived, failed cleanly or silently wrong

The peers (`aws s3 sync`, MLflow) are installed into an environment of their own under /tmp. Linux,
and Ceph as for the tests; nothing else may run beside it. In two minutes, without figures worth
keeping: `--repeats 1 --mib 16 --files 50 --gb 0.2`.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from benchmarks.storage import speed
from benchmarks.storage.faults import measure
from benchmarks.storage.report import Table
from benchmarks.storage.runs import PEER_PACKAGES, Site, site

NO_HUB = (
    "A hub's folder upload (`huggingface_hub.upload_folder`) is not among them: it speaks to a "
    "hub's own commit service, which no S3 server offers, so nothing here could answer it."
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=[*MEASUREMENTS])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mib", type=float, default=1024, help="size of the large artifact")
    parser.add_argument("--files", type=int, default=1000, help="number of small files")
    parser.add_argument("--gb", type=float, default=20, help="size for the peak of memory")
    networks = ["throttled", "loopback"]
    parser.add_argument("--networks", nargs="+", choices=networks, default=networks)
    parser.add_argument("--work", type=Path, help="folder for files, instead of the system's /tmp")
    options = parser.parse_args()
    # On SIGTERM too, the server is stopped by the with block.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began, tables = time.monotonic(), list[Table]()
    with site(options.work) as here:
        for name in options.only:
            print(f"\n{name}", flush=True)
            tables += MEASUREMENTS[name](here, options)
    # Without a terminal rich assumes 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 150)
    for table in tables:
        console.print()
        table.show(console)
    print(f"\n## {datetime.now(UTC):%Y-%m-%d} · The artifact store beside its alternatives · "
          "`python -m benchmarks.storage`\n")  # fmt: skip
    print(f"{machine()}. Medians of {options.repeats}; {time.monotonic() - began:.0f} s in all.\n")
    print("\n".join(table.markdown() for table in tables))


def faults(site: Site, options: Namespace) -> list[Table]:
    """Measure the faults on small artifacts, as speed does not matter there."""
    table = measure(site, min(48, options.mib))
    table.notes.append(NO_HUB)
    return [table]


MEASUREMENTS: dict[str, Callable[[Site, Namespace], list[Table]]] = {
    "large": speed.large,
    "small": speed.small,
    "memory": speed.memory,
    "again": speed.again,
    "faults": faults,
}


def machine() -> str:
    """Return the machine and the versions in one line."""
    cpus = Path("/proc/cpuinfo").read_text().split("model name")
    name = cpus[1].partition(":")[2].partition("\n")[0].strip() if len(cpus) > 1 else "CPU"
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    python = Site.peers_python()
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    peers = [line.replace("==", " ") for line in listed if line.split("==")[0] in PEER_PACKAGES]
    return (
        f"{os.cpu_count()} cores ({name}), {gib:.0f} GiB; boto3 {version('boto3')}, s3transfer "
        f"{version('s3transfer')}; the peers' own {', '.join(peers)}"
    )


if __name__ == "__main__":
    main()
