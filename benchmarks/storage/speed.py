"""Measurements of `benchmarks.storage` but faults: time, CPU, memory and bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks.storage.methods import MIB, PEERS, RELEASE, SIDES, cpu_seconds
from benchmarks.storage.report import Table, against, fastest, in_turn, middle, seconds
from benchmarks.storage.runs import Run, Site, delivered, random_files
from benchmarks.storage.throttle import Throttle, throttled
from tests.store.proxy import fault_proxy

RATE = 200
RAW = tuple(side for side in SIDES if side.startswith("s3transfer"))
ONE_BY_ONE = tuple(side for side in RAW if side.endswith("a loop"))
REQUESTS = tuple(side for side in SIDES if side.startswith("boto3"))
OPERATIONS = ("put", "get")
GIB = 1 << 30
Runs = dict[str, dict[str, list[Run]]]
"""Runs by operation and method, in the order of repetitions."""


def large(site: Site, options: Namespace) -> list[Table]:
    """Measure publish and fetch of a large artifact beside s3transfer."""
    gib = options.mib / 1024
    head = ["", "ours, s", "fastest raw, s", "raw/ours", "CPU s/GiB, ours", "raw", "ours − raw"]
    bars = Table(f"{options.mib:g} MiB: ours beside raw s3transfer", head)
    rest: list[Table] = []
    for count in (4, 1):
        size = int(options.mib * MIB / count)
        folder = random_files(site.new_folder() / "large", [size] * count)
        if not bars.notes:
            alone = against(hashing(folder, options.repeats), 0.8, most=True)
            bars.notes.append(f"sha256 alone (`hashlib.file_digest`): {alone} CPU s/GiB.")
        raw = RAW if count > 1 else ONE_BY_ONE
        for slow in [network == "throttled" for network in options.networks]:
            network = f"{RATE} MiB/s" if slow else "loopback"
            case = f"{count} × {options.mib / count:g} MiB, {network}"
            print(f"\n{case}", flush=True)
            if slow:
                with throttled(site.server.endpoint, RATE) as line:
                    runs = moved(site, folder, ("ours", *raw), options.repeats, line.endpoint)
                    bars.notes.append(_throttle_cost(case, line))
            else:
                peers = PEERS if count > 1 else ()
                runs = moved(site, folder, ("ours", *raw, *peers), options.repeats)
            rest.append(everyone(case, runs, options.mib, "MiB"))
            for operation in OPERATIONS:
                row = _comparison_cells(runs[operation], gib, 0.9 if slow else 0.6)
                bars.rows.append([f"{case}, {operation}", *row])
        shutil.rmtree(folder)
    return [bars, *rest]


def _comparison_cells(runs: dict[str, list[Run]], gib: float, bar: float) -> list[str]:
    """Return the cells of ours and the fastest s3transfer: seconds, ratio, CPU s/GiB."""
    best = fastest({side: runs[side] for side in runs if side in RAW})
    ours, raw = runs["ours"], runs[best]
    cpu = [middle(each, lambda r: r.cpu) / gib for each in (ours, raw)]
    return [
        f"{seconds(ours):.2f}",
        f"{seconds(raw):.2f} ({best.removeprefix('s3transfer').strip(' ,')})",
        against(seconds(raw) / seconds(ours), bar),
        f"{cpu[0]:.2f}",
        f"{cpu[1]:.2f}",
        against(cpu[0] - cpu[1], 0.8, most=True),
    ]


def _throttle_cost(case: str, line: Throttle) -> str:
    counts = line.counts()
    forwarded = (counts["up"] + counts["down"]) / GIB
    return f"The throttle of {case} took {counts['cpu'] / forwarded:.2f} CPU s/GiB itself."


def hashing(folder: Path, repeats: int) -> float:
    """Return CPU seconds per GiB of sha256 alone, with the files in memory."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    spent: list[float] = []
    for _ in range(repeats):
        before = cpu_seconds()
        for path in folder.iterdir():
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")
        spent.append((cpu_seconds() - before) / size * GIB)
    return median(spent)


def small(site: Site, options: Namespace) -> list[Table]:
    """Measure many small files."""
    folder = random_files(site.new_folder() / "small", [100_000] * options.files)
    sides = ("ours", *REQUESTS, *ONE_BY_ONE, *PEERS)
    runs = moved(site, folder, sides, options.repeats)
    shutil.rmtree(folder)
    table = everyone(f"{options.files} × 100 KB, loopback", runs, options.files, "files")
    rates = [options.files / seconds(runs[operation]["ours"]) for operation in OPERATIONS]
    table.notes.append(
        f"Ours: {against(rates[0], 150, digits=0)} put/s, {against(rates[1], 250, digits=0)} get/s."
    )
    return [table]


def memory(site: Site, options: Namespace) -> list[Table]:
    """Measure peak resident memory with large sparse files."""
    size = int(options.gb * 1e9 / 10)
    free = shutil.disk_usage(site.work).free
    if free < 1.1 * options.gb * 1e9:
        raise SystemExit(f"{site.work} has {free / 1e9:.0f} GB free; see --gb and --work")
    folder = site.new_folder()
    for number in range(10):
        with (folder / f"{number:02}.safetensors").open("wb") as file:
            file.write(os.urandom(4096))
            file.truncate(size)
    head = ["", "publish, s", "peak MiB", "fetch, s", "peak MiB"]
    table = Table(f"{options.gb:g} GB in 10 sparse files, to a server that keeps no zeros", head)
    for side in ("ours", ONE_BY_ONE[-1]):
        row = [side]
        target, place, memo = site.new_folder(), site.place(), ""
        with sink() as endpoint:
            for operation, where in (("put", folder), ("get", target)):
                run = site.run(side, operation, str(where), place, memo, endpoint=endpoint)
                memo = run.memo
                peak = against(run.peak, 300, most=True, digits=0)
                row += [f"{run.seconds:.0f}", peak if side == "ours" else f"{run.peak:.0f}"]
        sizes = [path.stat().st_size for path in Path(memo).iterdir()]
        if sizes != [size] * 10:
            raise RuntimeError(f"{side} delivered files of {sizes} bytes")
        shutil.rmtree(target)
        print("; ".join(row), flush=True)
        table.rows.append(row)
    shutil.rmtree(folder)
    return [table]


@contextmanager
def sink() -> Iterator[str]:
    """Endpoint of a `benchmarks.storage.sink` process, which ends with the block."""
    command = [sys.executable, "-m", "benchmarks.storage.sink"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin
        assert process.stdout
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


def again(site: Site, options: Namespace) -> list[Table]:
    """Measure a second publish of the same content."""
    sides = ("ours", *PEERS)
    folder = random_files(site.new_folder() / "again", [int(options.mib * MIB / 4)] * 4)
    runs = {f"{side}, {n}": list[tuple[Run, float]]() for side in sides for n in (1, 2)}
    with throttled(site.server.endpoint, RATE) as line:
        for repetition in range(options.repeats):
            for side in in_turn(sides, repetition):
                place = site.place()
                for number in (1, 2):
                    before = line.counts()["up"]
                    run = site.run(side, "put", str(folder), place, endpoint=line.endpoint)
                    runs[f"{side}, {number}"].append((run, line.counts()["up"] - before))
                site.forget(place)
    head = ["", "first, s", "MiB sent", "again, s", "CPU s", "bytes sent", "again/first, s"]
    table = Table(f"4 × {options.mib / 4:g} MiB published twice, {RATE} MiB/s", head)
    for side in sides:
        (first, sent), (second, sent_again) = (
            ([run for run, _ in runs[f"{side}, {n}"]], median(b for _, b in runs[f"{side}, {n}"]))
            for n in (1, 2)
        )
        row = [side, f"{seconds(first):.2f}", f"{sent / MIB:.1f}", f"{seconds(second):.2f}"]
        row += [f"{middle(second, lambda r: r.cpu):.2f}", f"{sent_again:.0f}"]
        table.rows.append([*row, f"{seconds(second) / seconds(first):.3f}"])
    table.notes.append(
        f"Bytes include the heads of requests. {_bodies(site, folder)} were all bodies that ours "
        "sent the second time."
    )
    shutil.rmtree(folder)
    return [table]


def _bodies(site: Site, folder: Path) -> str:
    """Return a second publish's requests with a body, as key and bytes."""
    place, sent = site.place(), list[str]()

    def look(method: str, path: str, headers: dict[str, str]) -> None:
        if length := int(headers.get("Content-Length", 0)):
            key = path.partition("?")[0].removeprefix(f"/{place}/")
            sent.append(f"{method} {key.partition('/')[0]}/… of {length} bytes")

    site.run("ours", "put", str(folder), place, RELEASE)
    with fault_proxy(site.server.endpoint) as faults:
        faults.refuse = look
        site.run("ours", "put", str(folder), place, endpoint=faults.endpoint)
    site.forget(place)
    return ", ".join(sent) or "None"


def moved(
    site: Site, folder: Path, sides: Sequence[str], repeats: int, endpoint: str | None = None
) -> Runs:
    """Put, get and delete a folder with every method, `repeats` times."""
    runs: Runs = {operation: {side: [] for side in sides} for operation in OPERATIONS}
    for repetition in range(repeats):
        for side in in_turn(sides, repetition):
            place, target = site.place(), site.new_folder()
            put = site.run(side, "put", str(folder), place, endpoint=endpoint)
            got = site.run(side, "get", str(target), place, put.memo, endpoint=endpoint)
            if delivered(got.folder, folder) != "right":
                raise RuntimeError(f"{side} delivered other bytes")
            runs["put"][side].append(put)
            runs["get"][side].append(got)
            shutil.rmtree(target)
            site.forget(place)
            print(f"{side}: put {put.seconds:.2f} s, get {got.seconds:.2f} s", flush=True)
    return runs


def everyone(title: str, runs: Runs, work: float, unit: str) -> Table:
    """Return the table of all methods; `work` is an operation's MiB or files."""
    head = [""]
    for operation in OPERATIONS:
        head += [f"{operation}, s", f"{unit}/s", "CPU s", "peak MiB"]
    table = Table(title, head)
    for side in runs["put"]:
        row = [side]
        for operation in OPERATIONS:
            of = runs[operation][side]
            row += [f"{seconds(of):.2f}", f"{work / seconds(of):.0f}"]
            row += [f"{middle(of, lambda r: r.cpu):.2f}", f"{max(r.peak for r in of):.0f}"]
        table.rows.append(row)
    return table
