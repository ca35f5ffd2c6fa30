"""Preference rows of `data.source`: columns, formats and the source's identity."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from rlhf.config import DataConfig, StoreConfig
from rlhf.data.readers import READERS, MalformedError, Row, Table, ending, read_file
from rlhf.errors import ConfigError, DataError
from rlhf.external import TIMEOUT, External, shorten
from rlhf.files import expand_home


def source_digest(config: DataConfig, options: StoreConfig) -> str:
    """Return the identity of the source's content, by `External.digest`.

    The world's is constant: its rows follow from the seed and the code.

    Raises:
        ConfigError: The source does not exist.
        StoreError: The S3 server can't be reached.
    """
    if config.source == "world":
        return "world"
    return _ExternalData("data.source", config.source, options).digest()


def source_name(source: str) -> str:
    """Return the source for a summary: of a local path the last part only."""
    external = _ExternalData("data.source", source)
    is_remote = source.startswith("s3://") or external.is_on_hub
    return source if is_remote else _local_path(source).name


def read_source(config: DataConfig, options: StoreConfig) -> list[Row]:
    """Read all rows of the source, with the configured columns that a row has.

    Raises:
        ConfigError: The source does not exist, or lacks a column.
        DataError: It has no rows, or can't be parsed.
        StoreError: The S3 server can't be reached, or a transfer broke.
    """
    external = _ExternalData("data.source", config.source, options)
    with tempfile.TemporaryDirectory() as scratch:
        copy = external.fetch(Path(scratch, "source"))
        if external.is_on_hub:
            table = _read_split(config, copy.folder, Path(scratch, "datasets"))
            rows = _rows_with_columns(table, config, config.source)
        else:
            rows = []
            for name, path in copy.files.items():
                table = _parse(external, name, path, _columns(config))
                rows += _rows_with_columns(table, config, name)
    if not rows:
        raise DataError(f"data.source = {config.source!r}: holds no rows; give a file with pairs")
    return rows


@dataclass(frozen=True)
class _ExternalData(External):
    """A file or a folder of files in one format."""

    type = "dataset"
    #: The data, and the card that says which file is which split.
    hub_files = ("README.md", *(f"*{end}{gz}" for end in READERS for gz in ("", ".gz")))

    def is_path(self) -> bool:
        """Return whether it exists, or is written like a path; a hub id is `owner/name`."""
        written_as_path = self.uri.startswith((".", "/", "~", "file:"))
        written_as_path |= ending(self.uri) in READERS
        return written_as_path or self.uri.count("/") != 1 or _exists(Path(self.uri))

    @property
    def path(self) -> Path:
        """The existing file or folder."""
        path = _local_path(self.uri)
        if not _exists(path):
            raise self.error(
                "no such file or folder; give an existing path, an s3:// URI or a hub dataset id"
            )
        return path

    def select(self, names: Sequence[str]) -> list[str]:
        """Return the data files, sorted; they must be of one format."""
        readable = sorted(name for name in names if ending(name) in READERS)
        formats = {ending(name) for name in readable}
        if not formats:
            raise self.error(f"holds no file that can be read; use {', '.join(READERS)} (also .gz)")
        if len(formats) > 1:
            raise self.error(f"mixes {', '.join(sorted(formats))}; keep one format")
        return readable

    def hub_commit(self) -> str:
        """Return the dataset's newest commit."""
        from huggingface_hub import dataset_info

        try:
            commit = dataset_info(self.uri, timeout=TIMEOUT).sha
            if not commit:
                raise ValueError("it names no commit")
            return commit
        # A broken network raises many classes, which all mean the same to a user.
        except Exception as error:
            raise self.error(
                "no such path here, and the hub can't tell of a dataset by that name "
                f"({type(error).__name__}: {shorten(error)}); give an existing path or a hub "
                "dataset id"
            ) from None


def _local_path(source: str) -> Path:
    return expand_home(unquote(source[7:]) if source.startswith("file://") else source)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a null
        return False


def _parse(external: External, name: str, path: Path, columns: Sequence[str]) -> Table:
    try:
        with external.readable():
            return read_file(path, columns)
    except MalformedError as error:
        raise DataError(
            f"data.source = {external.uri!r}: can't be parsed ({name}: {shorten(error)}); "
            "mend the file"
        ) from None


def _read_split(config: DataConfig, folder: Path, cache: Path) -> Table:
    """Read the configured split of a hub dataset's files."""
    import datasets

    datasets.disable_progress_bars()
    try:
        # By folder: by id, `load_dataset` keeps a copy in the user's cache whatever `cache_dir` is.
        loaded = datasets.load_dataset(str(folder), split=config.hub_split, cache_dir=str(cache))
        names = list(loaded.column_names)
        return names, loaded.select_columns([n for n in _columns(config) if n in names]).to_list()
    except Exception as error:  # the library raises anything
        raise ConfigError(
            f"data.source = {config.source!r}, data.hub_split = {config.hub_split!r}: can't be "
            f"read ({type(error).__name__}: {shorten(error)}); check both"
        ) from None


def _rows_with_columns(table: Table, config: DataConfig, name: str) -> list[Row]:
    """Return a table's rows, after a check that it has all configured columns.

    An empty file has no columns, and passes.
    """
    names, rows = table
    for field, column in _column_settings(config):
        if names and column not in names:
            raise ConfigError(
                f"data.{field} = {column!r}: not a column of {name!r}, which has "
                f"{shorten(', '.join(map(str, names)))}; set data.{field} to one of these"
            )
    return rows


def _columns(config: DataConfig) -> list[str]:
    return list(dict.fromkeys(column for _, column in _column_settings(config)))


def _column_settings(config: DataConfig) -> list[tuple[str, str]]:
    """List (setting, column) of every column that the source must have."""
    fields = ["prompt_column", "chosen_column", "rejected_column"]
    if config.reference_column is not None:
        fields.append("reference_column")
    settings = [(field, getattr(config, field)) for field in fields]
    return [*settings, *(("metadata_columns", column) for column in config.metadata_columns)]
