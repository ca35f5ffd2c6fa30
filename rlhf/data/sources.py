"""Reads preference rows from wherever `data.source` points, and tells their identity."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.config import DataConfig, StoreConfig
from rlhf.errors import ConfigError, DataError

#: Endings that can be read, with or without .gz, and the reader of the datasets library for them.
READERS = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def source_digest(config: DataConfig, options: StoreConfig) -> str:
    """Identity of the source's content: the same data gives the same digest, changed data another.

    Files are hashed, S3 objects identified by their entity tags, hub datasets by their commit;
    the world follows from the seed and the code.

    Raises:
        ConfigError: The source does not exist or can't be reached.
    """
    if config.source == "world":
        return "world"
    if config.source.startswith("s3://"):
        identity = repr([(key, tag) for key, tag in _s3_objects(config.source, options)])
        return hashlib.sha256(identity.encode()).hexdigest()
    if _looks_local(config.source):
        digest = hashlib.sha256()
        for path in _local_files(config.source):
            digest.update(path.name.encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()
    return _hub_commit(config.source)


def read_source(config: DataConfig, options: StoreConfig) -> list[dict[str, Any]]:
    """All rows of the source, as dictionaries with at least the three columns.

    Raises:
        ConfigError: The source does not exist, can't be parsed, or lacks a column.
        DataError: It has no rows.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    with tempfile.TemporaryDirectory() as scratch:
        try:
            with _files(config.source, options, Path(scratch)) as files:
                if files:
                    kind = READERS[_ending(files[0])]
                    names = [str(f) for f in files]
                    loaded = datasets.load_dataset(
                        kind, data_files=names, split="train", cache_dir=f"{scratch}/cache"
                    )
                else:
                    loaded = datasets.load_dataset(
                        config.source, split=config.hub_split, cache_dir=f"{scratch}/cache"
                    )
        except DatasetGenerationError as error:
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            raise ConfigError(
                f"data.source = {config.source!r}: can't be parsed ({reason}); mend the file"
            ) from error
        columns = list(loaded.column_names or [])
        rows = list(loaded)
    if not rows:
        raise DataError(f"data.source = {config.source!r}: holds no rows; give a file with pairs")
    for field in ("prompt_column", "chosen_column", "rejected_column"):
        name = getattr(config, field)
        if name not in columns:
            raise ConfigError(
                f"data.{field} = {name!r}: not a column of {config.source!r}, which has "
                f"{', '.join(columns)}; set data.{field} to one of these"
            )
    return rows  # pyright: ignore[reportReturnType]


@contextmanager
def _files(source: str, options: StoreConfig, scratch: Path) -> Iterator[list[Path]]:
    """Local copies of the source's files; none for a hub dataset."""
    if source.startswith("s3://"):
        yield _download(source, options, scratch)
    elif _looks_local(source):
        yield _local_files(source)
    else:
        yield []


def _looks_local(source: str) -> bool:
    """A path that exists or is written like one; else it is a hub id (`owner/name`)."""
    path = Path(source)
    written_as_path = source.startswith((".", "/", "~", "file:")) or _ending(path) in READERS
    return path.exists() or written_as_path or source.count("/") != 1


def _local_files(source: str) -> list[Path]:
    path = Path(source.removeprefix("file://")).expanduser()
    if not path.exists():
        raise ConfigError(
            f"data.source = {source!r}: no such file or folder; give an existing path, an s3:// "
            "URI or a hub dataset id"
        )
    files = sorted(p for p in path.rglob("*") if _ending(p) in READERS) if path.is_dir() else [path]
    endings = {_ending(f) for f in files}
    if not files or not endings <= READERS.keys():
        raise ConfigError(
            f"data.source = {source!r}: holds no file that can be read; use "
            f"{', '.join(READERS)} (also .gz)"
        )
    if len({READERS[e] for e in endings}) > 1:
        raise ConfigError(
            f"data.source = {source!r}: mixes {', '.join(sorted(endings))}; keep one format"
        )
    return files


def _ending(path: Path) -> str:
    suffixes = path.suffixes
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else path.suffix


def _hub_commit(source: str) -> str:
    from huggingface_hub import dataset_info

    try:
        return dataset_info(source).sha or "unknown"
    # Every failure of the network ends here, under many classes; all mean the same to a user.
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"data.source = {source!r}: no such path here, and the hub can't tell of a dataset by "
            f"that name ({reason}); give an existing path or a hub dataset id"
        ) from error


def _s3_objects(source: str, options: StoreConfig) -> list[tuple[str, str]]:
    """(key, entity tag) of every readable object at or under an s3:// URI."""
    from rlhf.store.s3 import list_objects

    found = [(k, tag) for k, tag in list_objects(source, options) if _ending(Path(k)) in READERS]
    if not found:
        raise ConfigError(
            f"data.source = {source!r}: no object there can be read; use {', '.join(READERS)} "
            "(also .gz)"
        )
    return found


def _download(source: str, options: StoreConfig, scratch: Path) -> list[Path]:
    from rlhf.store.s3 import download

    paths = []
    for index, (key, _) in enumerate(_s3_objects(source, options)):
        path = scratch / f"{index:06d}-{Path(key).name}"
        download(source, key, path, options)
        paths.append(path)
    return paths
