"""Reads preference rows from wherever `data.source` points, and tells their identity."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from rlhf.config import DataConfig, StoreConfig
from rlhf.data.readers import READERS, MalformedError, Row, Table, ending, read_file
from rlhf.errors import ConfigError, DataError, StoreError
from rlhf.files import at_home
from rlhf.store.bucket import objects_under, open_bucket, save_object

if TYPE_CHECKING:
    from rlhf.store.s3 import S3Backend

#: What is fetched of a hub dataset: its data, and the card that says which file is which split.
HUB_FILES = ["README.md", *(f"*{end}{gz}" for end in READERS for gz in ("", ".gz"))]
#: Seconds for one answer of the hub, or of a server that is asked before a run.
PATIENCE = 10


def source_digest(config: DataConfig, options: StoreConfig) -> str:
    """Identity of the source's content: the same data gives the same digest, changed data another.

    Files are hashed, S3 objects identified by entity tag and size, hub datasets by their commit;
    the world follows from the seed and the code.

    Raises:
        ConfigError: The source does not exist.
        StoreError: The S3 server can't be reached.
    """
    source = config.source
    if source == "world":
        return "world"
    if source.startswith("s3://"):
        with open_bucket("data.source", source, options) as (bucket, key):
            found = _objects(source, bucket.hurried(PATIENCE), key)
        return hashlib.sha256(repr(found).encode()).hexdigest()
    if not _is_local(source):
        return _hub_commit(source)
    digest = hashlib.sha256()
    for name, path in _local_files(source):
        digest.update(name.encode() + b"\0")
        with _readable(source), path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def source_name(source: str) -> str:
    """How a summary calls the source: without the folder it lies in on this machine."""
    return _local_path(source).name if _is_local(source) else source


def read_source(config: DataConfig, options: StoreConfig) -> list[Row]:
    """All rows of the source, with the columns as far as a row has them.

    Raises:
        ConfigError: The source does not exist, or lacks a column.
        DataError: It has no rows, or can't be parsed.
        StoreError: The S3 server can't be reached, or a transfer broke.
    """
    source = config.source
    if source.startswith("s3://") or _is_local(source):
        with _copies(source, options) as files:
            rows = [row for name, path in files for row in _read(name, path, config)]
    else:
        rows = _checked(_read_hub(config), config, source)
    if not rows:
        raise DataError(f"data.source = {source!r}: holds no rows; give a file with pairs")
    return rows


def _read(name: str, path: Path, config: DataConfig) -> list[Row]:
    try:
        with _readable(config.source):
            table = read_file(path, _columns(config))
    except MalformedError as error:
        raise DataError(
            f"data.source = {config.source!r}: can't be parsed ({name}: {_short(error)}); "
            "mend the file"
        ) from None
    return _checked(table, config, name)


def _checked(table: Table, config: DataConfig, name: str) -> list[Row]:
    """The rows of a table that has the columns; without any column it is just empty."""
    names, rows = table
    for field, column in _named_columns(config):
        if names and column not in names:
            raise ConfigError(
                f"data.{field} = {column!r}: not a column of {name!r}, which has "
                f"{_short(', '.join(map(str, names)))}; set data.{field} to one of these"
            )
    return rows


def _named_columns(config: DataConfig) -> list[tuple[str, str]]:
    """(setting, column) of every column that the source must have."""
    fields = ["prompt_column", "chosen_column", "rejected_column"]
    if config.reference_column is not None:
        fields.append("reference_column")
    named = [(field, getattr(config, field)) for field in fields]
    return [*named, *(("metadata_columns", column) for column in config.metadata_columns)]


def _columns(config: DataConfig) -> list[str]:
    return list(dict.fromkeys(column for _, column in _named_columns(config)))


@contextmanager
def _copies(source: str, options: StoreConfig) -> Iterator[list[tuple[str, Path]]]:
    """Name and path of each of the source's files, fetched into a scratch folder if need be."""
    if not source.startswith("s3://"):
        yield _local_files(source)
        return
    with tempfile.TemporaryDirectory() as scratch:
        files: list[tuple[str, Path]] = []
        with open_bucket("data.source", source, options) as (bucket, key):
            for name, _, _ in _objects(source, bucket, key):
                path = Path(scratch, f"{len(files)}-{Path(name).name}")
                save_object(bucket, name, path)
                files.append((name, path))
        yield files


def _is_local(source: str) -> bool:
    """A path that exists or is written like one; else it is a hub id (`owner/name`)."""
    if source.startswith("s3://"):
        return False
    written_as_path = source.startswith((".", "/", "~", "file:")) or ending(source) in READERS
    return written_as_path or source.count("/") != 1 or _exists(Path(source))


def _local_path(source: str) -> Path:
    return at_home(unquote(source[7:]) if source.startswith("file://") else source)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long a name, or one with a null in it
        return False


def _local_files(source: str) -> list[tuple[str, Path]]:
    path = _local_path(source)
    if not _exists(path):
        raise ConfigError(
            f"data.source = {source!r}: no such file or folder; give an existing path, an s3:// "
            "URI or a hub dataset id"
        )
    if path.is_dir():
        with _readable(source):
            below = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
        found = {name: p for name, p in below.items() if _visible(name)}
    else:
        found = {path.name: path} if path.is_file() else {}
    return [(name, found[name]) for name in _one_format(source, list(found))]


def _one_format(source: str, names: Sequence[str]) -> list[str]:
    """Those of the files that can be read, in order; they must all be of one format."""
    readable = sorted(name for name in names if ending(name) in READERS)
    formats = {ending(name) for name in readable}
    if not formats:
        raise ConfigError(
            f"data.source = {source!r}: holds no file that can be read; use "
            f"{', '.join(READERS)} (also .gz)"
        )
    if len(formats) > 1:
        raise ConfigError(
            f"data.source = {source!r}: mixes {', '.join(sorted(formats))}; keep one format"
        )
    return readable


def _visible(name: str) -> bool:
    """Not hidden below the source's folder, as checkpoints and caches of tools are."""
    return "/." not in f"/{name}"


@contextmanager
def _readable(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"data.source = {source!r}: can't be read ({error.strerror}); check the file and its "
            "rights"
        ) from None


def _objects(source: str, bucket: S3Backend, key: str) -> list[tuple[str, str, int]]:
    """(key, entity tag, size) of the object of this key, or of all in the folder of this name."""
    folder = f"{key.rstrip('/')}/" if key else ""
    found = objects_under("data.source", source, bucket, key)
    visible = [k for k in found if k == key or _visible(k.removeprefix(folder))]
    return [(name, *found[name]) for name in _one_format(source, visible)]


def _hub_commit(source: str) -> str:
    from huggingface_hub import dataset_info

    try:
        commit = dataset_info(source, timeout=PATIENCE).sha
        if not commit:
            raise ValueError("it names no commit")
        return commit
    # Every failure of the network ends here, under many classes; all mean the same to a user.
    except Exception as error:
        raise ConfigError(
            f"data.source = {source!r}: no such path here, and the hub can't tell of a dataset by "
            f"that name ({type(error).__name__}: {_short(error)}); give an existing path or a hub "
            "dataset id"
        ) from None


def _read_hub(config: DataConfig) -> Table:
    """Fetch a hub dataset into a scratch folder, at one commit, and read the split."""
    import datasets
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    commit = _hub_commit(config.source)
    disable_progress_bars()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        # The libraries raise anything, so that only the place tells what went wrong.
        try:
            # `load_dataset` by id would keep a copy in the user's cache, whatever it is told.
            folder = snapshot_download(
                config.source,
                repo_type="dataset",
                revision=commit,
                cache_dir=f"{scratch}/hub",
                allow_patterns=HUB_FILES,
            )
        except Exception as error:
            raise StoreError(
                f"data.source = {config.source!r}: the transfer from the hub broke "
                f"({type(error).__name__}: {_short(error)}); try again"
            ) from None
        try:
            loaded = datasets.load_dataset(
                folder, split=config.hub_split, cache_dir=f"{scratch}/datasets"
            )
            names = list(loaded.column_names)
            wanted = [name for name in _columns(config) if name in names]
            return names, loaded.select_columns(wanted).to_list()
        except Exception as error:
            raise ConfigError(
                f"data.source = {config.source!r}, data.hub_split = {config.hub_split!r}: can't be "
                f"read ({type(error).__name__}: {_short(error)}); check both"
            ) from None


def _short(reason: object) -> str:
    text = " ".join(str(reason).split())
    return text if len(text) <= 200 else f"{text[:199]}…"
