"""The `rlhf artifacts` commands: list, verify, copy, pin and collect artifacts."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from rlhf.config import load_config
from rlhf.errors import ArtifactMissing, ConfigError
from rlhf.files import exists, is_dir
from rlhf.plain_text import one_line
from rlhf.store.retention import Retention
from tasks.console import console, say, styled, text_column
from tasks.listing import Column, JsonOption, WideOption, show_json, show_listing

if TYPE_CHECKING:
    from rlhf.store import Store
    from rlhf.store.store import Listener

app = App(name="artifacts", help="Look at stored artifacts, move them, keep the store sound.")

StoreOption = Annotated[str | None, Parameter(help="Store URI; default: the preset's store.")]
ConfigOption = Annotated[Path | None, Parameter(help="Preset that names the store.")]
#: Least grace of `gc`, in hours. A publisher reuses objects that are up to an hour old, and they
#: have to stay until it is done.
LEAST_GRACE = 2.0
#: Seconds of the units of `--older-than`.
UNITS = {"h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}
#: Limits of `--keep-runs`, and of `--older-than`: a hundred years.
MOST_RUNS, MOST_SECONDS = 1_000_000, 36_500 * UNITS["d"]
#: Hours of a century: more is a mistake, and infinity no time.
LONGEST_GRACE = 876_600.0


@app.command
def ls(
    *, wide: WideOption = False, json: JsonOption = False, store: StoreOption = None,
    config: ConfigOption = None,
) -> None:  # fmt: skip
    """List all artifacts of a store, the newest last, and how much disk they take."""
    from rlhf.champions import latest_entry, model_lines
    from tasks.disk import disk_use

    loaded = load_config(config, [f"--store={store}"] if store else []).config
    opened = open_existing(store, config)
    champions = {line: latest_entry(opened, line) for line in model_lines(opened)}
    marks = [(entry["policy"], f"champion of {line}") for line, entry in champions.items() if entry]
    marks += [(digest, f"pin {name}") for name, digest in opened.pins.by_name().items()]
    artifacts = sorted(opened.list(), key=lambda each: -each.age)
    rows = [
        {
            "digest": ref.digest, "kind": ref.kind, "stage": manifest.producer.stage,
            "seed": manifest.producer.seed, "files": len(manifest.files), "bytes": ref.size,
            "age_seconds": age, "marks": [mark for digest, mark in marks if digest == ref.digest],
        }
        for ref, manifest, age in artifacts
    ]  # fmt: skip
    columns = (
        Column("artifact", "digest", show=lambda digest: digest[:12]),
        Column("kind", "kind"),
        Column("stage", "stage"),
        Column("seed", "seed", wide=True, right=True),
        Column("files", "files", wide=True, right=True),
        Column("size", "bytes", show=lambda size: f"{size / 1e6:.2f} MB", right=True),
        Column("age", "age_seconds", show=_age, right=True),
        Column("", "marks", show=lambda marks: styled((one_line(", ".join(marks)), "bold"))),
    )
    show_listing(rows, columns, wide=wide, json=json)
    if not json:
        for line in disk_use(loaded, artifacts).lines():
            say(line)


@app.command(name="show")
def show_artifact(ref: str, *, store: StoreOption = None, config: ConfigOption = None) -> None:
    """Print an artifact's manifest: files, parents, producer, metrics.

    Parameters
    ----------
    ref
        Digest, its first 6 or more digits, a pin's name, or URI.
    """
    opened = open_named(store, config)
    manifest = opened.manifest(opened.resolve(ref))
    console.print_json(manifest.model_dump_json(), ensure_ascii=True)


@app.command
def lineage(
    ref: str, *, rows: bool = False, json: JsonOption = False, store: StoreOption = None,
    config: ConfigOption = None,
) -> None:  # fmt: skip
    """Print everything that an artifact was made from.

    Parameters
    ----------
    ref
        Digest, its first 6 or more digits, a pin's name, or URI.
    rows
        Print the rows of the data instead, as JSON lines: id, source, line, split, dataset.
    """
    from flows.terminal import lineage_tree

    opened = open_named(store, config)
    ancestors = opened.lineage(opened.resolve(ref))
    if not rows:
        if json:
            show_json(
                [
                    {"depth": depth, "role": role, "digest": ref.digest, "kind": ref.kind}
                    for depth, role, ref in ancestors
                ]
            )
        else:
            console.print(lineage_tree(ancestors))
        return
    from rlhf.data.lineage import rows_of

    for dataset in sorted({a.ref.digest for a in ancestors if a.ref.kind == "dataset"}):
        for row in rows_of(opened.fetch(dataset)):
            show_json({**vars(row), "dataset": dataset[:12]}, indent=None)


@app.command
def verify(
    *refs: str, deep: bool = False, json: JsonOption = False, store: StoreOption = None,
    config: ConfigOption = None,
) -> int:  # fmt: skip
    """Check that artifacts are whole; the exit code is 1 if one is not.

    Parameters
    ----------
    refs
        Digests, their first 6 or more digits, pins' names, or URIs; none checks all.
    deep
        Read every byte in the store and compare its sha256, instead of sizes alone.
    """
    opened = open_existing(store, config)
    digests = [opened.resolve(ref).digest for ref in refs] or opened.digests()
    rows = []
    for digest in digests:
        rows.append({"digest": digest, "problems": [*opened.problems(digest, deep)]})
        for problem in () if json else rows[-1]["problems"]:
            say(f"{digest[:12]}  {problem}", "red")
    broken = sum(bool(row["problems"]) for row in rows)
    if json:
        show_json(rows)
        return 1 if broken else 0
    how = "every byte read" if deep else "sizes compared; --deep reads every byte"
    say(f"{len(digests) - broken} of {len(digests)} artifacts are whole ({how})")
    return 1 if broken else 0


@app.command
def pull(ref: str, folder: Path, *, store: StoreOption = None, config: ConfigOption = None) -> None:
    """Copy an artifact's files, every byte verified, to a new folder that appears whole.

    Parameters
    ----------
    ref
        Digest, its first 6 or more digits, a pin's name, or URI.
    folder
        Must not exist yet, or be empty.
    """
    folder = folder.absolute()
    if exists(folder) and (not is_dir(folder) or any(folder.iterdir())):
        raise ConfigError(f"{str(folder)!r} is there already; name a new folder")
    opened = open_named(store, config)
    resolved = opened.resolve(ref)
    with _progress(f"pull {resolved.short}") as listener:
        source = opened.fetch(resolved, listener=listener)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            copy = shutil.copytree(source, Path(scratch) / folder.name)
            copy.replace(folder)
    except (OSError, shutil.Error) as error:
        raise ConfigError(f"can't write to {str(folder)!r} ({error}); choose another") from error
    say(folder)


@app.command
def push(
    folder: Path, kind: str, *, store: StoreOption = None, config: ConfigOption = None
) -> None:
    """Store a folder's files as an artifact, and print its digest.

    Parameters
    ----------
    folder
        Holds safetensors, JSON and other plain data; pickles are refused.
    kind
        What it is, for example policy, reward-model or dataset.
    """
    from rlhf.store import PublishError
    from tasks.runner import producer

    opened = open_named(store, config)
    try:
        with _progress(f"push {folder.name}") as listener:
            ref = opened.publish(
                folder, kind, parents={}, metrics={}, producer=producer("push", {}, 0),
                listener=listener,
            )  # fmt: skip
    except PublishError as error:
        raise ConfigError(str(error)) from None
    say(f"artifact {ref.digest}")


@app.command
def pin(ref: str, name: str, *, store: StoreOption = None, config: ConfigOption = None) -> None:
    """Give an artifact a name that keeps it, and all it was made from, from `gc`.

    Parameters
    ----------
    ref
        Digest, its first 6 or more digits, or URI.
    name
        Letters, digits, '.', '_' and '-'.
    """
    opened = open_named(store, config)
    opened.pins.add(name, opened.resolve(ref))


@app.command
def unpin(name: str, *, store: StoreOption = None, config: ConfigOption = None) -> None:
    """Take a pin away; the artifact stays until nothing else refers to it and `gc` comes."""
    open_named(store, config).pins.remove(name)


@app.command
def rm(
    *refs: str, unfreeze: bool = False, store: StoreOption = None, config: ConfigOption = None
) -> None:
    """Remove artifacts; `gc --delete` then removes the files that no other artifact has.

    Parameters
    ----------
    refs
        Digests, their first 6 or more digits, or URIs. A champion, its verdict and evaluation, a
        pinned artifact, and what they were made from stay.
    unfreeze
        Remove a champion's verdict or evaluation all the same, and with it the gate prompts that
        all challengers answer. Each is then compared on its own held-out prompts.
    """
    from rlhf.champions import latest_entry, model_lines

    if not refs:
        raise ConfigError("no artifact is named; give the digests of those to remove")
    opened = open_existing(store, config)
    champions = [entry for line in model_lines(opened) if (entry := latest_entry(opened, line))]
    verdicts = {entry["verdict"] for entry in champions if entry.get("verdict")}
    needed = {entry["policy"] for entry in champions} | set(opened.pins.by_name().values())
    kept, frozen = (
        {a.ref.digest: top for top in tops if opened.exists(top) for a in opened.lineage(top)}
        for tops in (needed, verdicts)
    )
    digests = [opened.resolve(ref).digest for ref in refs]
    for digest in digests:
        if digest in kept:
            raise ConfigError(
                f"{digest[:12]} is, or was used to make, {kept[digest][:12]}, which is pinned or a "
                "champion; unpin it, or promote another first"
            )
        if digest in frozen and not unfreeze:
            raise ConfigError(
                f"{digest[:12]} is, or was used to make, a champion's verdict {frozen[digest][:12]}"
                ": without it challengers can't be compared on the prompts that were frozen for "
                "them; promote another first, or add --unfreeze (looks at the prompts still count)"
            )
    for digest in digests:
        opened.delete(digest)
        say(f"removed {digest}")


@app.command
def gc(
    *, delete: bool = False, grace_hours: float = 24.0, keep_runs: str | None = None,
    older_than: str | None = None, json: JsonOption = False, store: StoreOption = None,
    config: ConfigOption = None,
) -> None:  # fmt: skip
    """Find what no record, champion or pin leads to; only look, unless told to delete.

    Parameters
    ----------
    delete
        Remove it. Publishers may be at work meanwhile.
    grace_hours
        What is younger stays, by the store's clock.
    keep_runs
        Let go of the records that were last used before the oldest of this many runs with a report.
        Champions of any time, approvals, policies that their gate approved, pins, work that can go
        on, and all that belongs to these stay.
    older_than
        Likewise, of the records that were last used before this time: 12h, 90d or 8w.
    """
    if not grace_hours >= LEAST_GRACE:
        raise ConfigError(
            f"--grace-hours {grace_hours:g}: publishers rely on at least {LEAST_GRACE:g}; give more"
        )
    if grace_hours > LONGEST_GRACE:
        raise ConfigError(
            f"--grace-hours {grace_hours:g}: with more than {LONGEST_GRACE:g} nothing is ever old "
            "enough; give less"
        )
    retention = _retention(keep_runs, older_than, grace_hours)
    opened = open_existing(store, config)
    garbage = opened.collect(grace=grace_hours * 3600, dry_run=not delete, retention=retention)
    if json:
        show_json(vars(garbage))
        return
    for name in garbage.records:
        say(name.replace("records/", "record ", 1))
    for digest in garbage.artifacts:
        kind, size = garbage.contents.get(digest, ("", 0))
        say(f"artifact {digest}" + (f"  {kind}  {size / 1e6:.1f} MB" if kind else ""))
    done = "removed" if garbage.removed else "to remove"
    records = f"{len(garbage.records)} records, " if retention else ""
    say(
        f"{done}: {records}{len(garbage.artifacts)} artifacts, {len(garbage.keys)} objects, "
        f"{garbage.size / 1e6:.1f} MB; {garbage.kept} artifacts stay"
    )
    if retention and retention.keep_runs and (garbage.runs or 0) <= retention.keep_runs:
        say(f"all records stay: {garbage.runs} runs have a report; --older-than goes by age")
    if garbage.versions and garbage.keys:
        say(f"warning: {garbage.versions}", "yellow")
    if garbage.removed:
        say(f"unfinished uploads removed: {garbage.uploads}")
    elif garbage.keys:
        say("nothing was removed; --delete does it")


def _retention(
    keep_runs: str | None, older_than: str | None, grace_hours: float
) -> Retention | None:
    """Return which records to let go of; None keeps all.

    Raises:
        ConfigError: An option is out of its range, or both are given.
    """
    if keep_runs is not None and older_than is not None:
        raise ConfigError("--keep-runs and --older-than are both given; give one of them")
    if keep_runs is not None:
        if not re.fullmatch(r"[0-9]{1,7}", keep_runs) or not 1 <= int(keep_runs) <= MOST_RUNS:
            raise ConfigError(
                f"--keep-runs {_shown(keep_runs)}: write a whole number of 1 to {MOST_RUNS:,}"
            )
        return Retention(keep_runs=int(keep_runs))
    if older_than is None:
        return None
    match = re.fullmatch(r"([0-9]{1,6})([hdw])", older_than)
    if not match:
        raise ConfigError(
            f"--older-than {_shown(older_than)}: write one whole number and one unit, such as 12h, "
            "90d or 8w"
        )
    seconds = int(match[1]) * UNITS[match[2]]
    if not grace_hours * 3600 <= seconds <= MOST_SECONDS:
        raise ConfigError(
            f"--older-than {older_than}: give at least --grace-hours, {grace_hours:g}h, and at "
            f"most {MOST_SECONDS / UNITS['d']:g}d"
        )
    return Retention(older_than=seconds)


def _age(seconds: float) -> str:
    """Return an age in the largest unit that it has one of."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _shown(value: str) -> str:
    """Return an option's value for a message, shortened."""
    return repr(value) if len(value) <= 40 else f"{value[:40]!r}…"


def open_named(store: str | None, config: Path | None) -> Store:
    """Open a preset's store, or the store at this URI with the preset's options."""
    from tasks.stage import store_of

    return store_of(load_config(config, [f"--store={store}"] if store else []).config)


def open_existing(store: str | None, config: Path | None) -> Store:
    """Open a store as `open_named` does, of which something is to be said.

    Of a wrong address it would be said that nothing is damaged, or that nothing was reached.

    Raises:
        ArtifactMissing: Nothing was ever stored there.
    """
    return not_empty(open_named(store, config))


def not_empty(opened: Store) -> Store:
    """Return a store if anything was ever stored there.

    Raises:
        ArtifactMissing: Nothing was.
    """
    if opened.is_empty():
        raise ArtifactMissing(
            f"{opened.uri}: there is no store, or nothing was ever stored there; give another "
            "--store, or --config"
        )
    return opened


@contextmanager
def _progress(label: str) -> Iterator[Listener]:
    """Show a transient bar with speed and ETA, if the console is a terminal."""
    columns = (
        text_column("{task.description}"), BarColumn(24), DownloadColumn(), TransferSpeedColumn(),
        text_column("ETA"), TimeRemainingColumn(),
    )  # fmt: skip
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
