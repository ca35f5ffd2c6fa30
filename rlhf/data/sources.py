"""Files and hub datasets of `data.source`: their records, and their identity."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from rlhf.config import DataConfig, StoreConfig
from rlhf.config.data import Sources
from rlhf.data.readers import (
    ENDINGS,
    MalformedError,
    ReadOptions,
    ending,
    is_metadata,
    read_records,
)
from rlhf.data.records import Record
from rlhf.errors import ConfigError, DataError
from rlhf.external import TIMEOUT, External, shorten
from rlhf.files import exists, expand_home
from rlhf.permissions import check_paths


def source_digest(config: DataConfig, options: StoreConfig) -> str:
    """Return the identity of the sources' content, by `External.digest`.

    The world's is constant: its rows follow from the seed and the code.

    Raises:
        ConfigError: A source does not exist.
        StoreError: The S3 server can't be reached.
    """
    if config.source == "world":
        return "world"
    digests = []
    for setting in ("source", "eval_source", "sft_source", "prompts_source"):
        value = getattr(config, setting)
        if value is None:
            continue
        if setting in ("sft_source", "prompts_source"):
            digests.append(setting)  # the pairs of one run may be the demonstrations of another
        if isinstance(value, str):
            digests.append(_ExternalData(f"data.{setting}", value, options).digest())
            continue
        for index, item in enumerate(value):
            digests.append(_ExternalData(f"data.{setting}[{index}]", item.source, options).digest())
            # Whoever leaves locations out of an identity leaves the settings beside them out too.
            digests.append(item.model_dump_json(exclude={"source"}))
    return " ".join(digests)


def source_name(source: str) -> str:
    """Return the source for a summary: of a local path the last part only."""
    external = _ExternalData("data.source", source)
    is_remote = source.startswith("s3://") or external.is_on_hub
    return source if is_remote else _local_path(source).name


def source_names(source: Sources) -> str:
    """Return the names of one source or several for a summary."""
    items = [source] if isinstance(source, str) else [item.source for item in source]
    return ", ".join(map(source_name, items))


def absolute_source(source: str, field: str = "data.source") -> str:
    """Return a source by a name that is the same in every folder: of a local path the whole.

    Raises:
        ConfigError: There is no such file or folder, or it may not be read.
    """
    external = _ExternalData(field, source)
    if source.startswith("s3://") or external.is_on_hub:
        return source
    return os.path.abspath(external.path)  # noqa: PTH100  (without `..`, and links as they are)


@dataclass(frozen=True)
class Part:
    """A file of a source, or a split of a hub dataset."""

    name: str
    records: Callable[[], Iterator[Record]]
    """Reads the part's rows anew, in order."""
    text_cells: bool = False
    """True if all values are text, as in CSV."""
    held_out: bool = False
    """True if no training stage may see it."""


@contextmanager
def open_source(
    config: DataConfig, options: StoreConfig, note: Callable[[str], None],
    field: str = "data.source",
) -> Iterator[list[Part]]:  # fmt: skip
    """Fetch the sources and give their parts, which can be read until the block ends.

    Args:
        config: Source, held-out source, and how files are read.
        options: S3 options.
        note: Receives a sentence for everything that was guessed.
        field: Setting that names the source, for messages.

    Raises:
        ConfigError: A source does not exist, or has no readable file.
        DataError: It can't be parsed (also while its records are read).
        StoreError: The S3 server can't be reached, or a transfer broke.
    """
    with tempfile.TemporaryDirectory() as scratch:
        assert isinstance(config.source, str)
        parts = _parts(config, config.source, field, options, Path(scratch, "source"), note)
        if config.eval_source is not None:
            uri = config.eval_source
            own = _parts(config, uri, "data.eval_source", options, Path(scratch, "eval"), note)
            parts = [*(replace(p, held_out=False) for p in parts)]
            parts += [replace(part, held_out=True) for part in own]
        elif any(part.held_out for part in parts):
            names = ", ".join(part.name for part in parts if part.held_out)
            note(f"held out as the source's own test part: {names}")
        yield parts


class HubName(NamedTuple):
    """Dataset on the hub: `owner/name`, with `:config` and `@revision` where they are given."""

    repository: str
    config: str | None
    revision: str | None


def hub_name(uri: str) -> HubName | None:
    """Return the parts of a hub dataset's id, None for a text that is none."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w./-]+))?", uri)
    return HubName(*match.groups()) if match else None


@dataclass(frozen=True)
class _ExternalData(External):
    """A file or a folder of files in one format."""

    type = "dataset"
    #: The data, and the card that says which file is which split.
    hub_files = ("README.md", *(f"*{end}{gz}" for end in ENDINGS for gz in ("", ".gz")))

    def is_path(self) -> bool:
        """Return whether it exists, or is written like a path; a hub id is `owner/name`."""
        written_as_path = self.uri.startswith((".", "/", "~", "file:"))
        written_as_path |= ending(self.uri) in ENDINGS
        return written_as_path or hub_name(self.uri) is None or exists(Path(self.uri))

    @property
    def repository(self) -> str:
        """Name of the dataset's repository."""
        name = hub_name(self.uri)
        return name.repository if name else self.uri

    @property
    def path(self) -> Path:
        """The existing file or folder."""
        path = _local_path(self.uri)
        check_paths(f"{self.field} = {self.uri!r}", [path])  # before it says what is there
        if not exists(path):
            raise self.error(
                "no such file or folder; give an existing path, an s3:// URI or a hub dataset id"
            )
        return path

    def select(self, names: Sequence[str]) -> list[str]:
        """Return the data files, sorted; they must be of one format."""
        readable = sorted(n for n in names if ending(n) in ENDINGS and not is_metadata(n))
        formats = {ending(name) for name in readable}
        if not formats:
            raise self.error(f"holds no file that can be read; use {', '.join(ENDINGS)} (also .gz)")
        if len(formats) > 1:
            raise self.error(f"mixes {', '.join(sorted(formats))}; keep one format")
        return readable

    def hub_commit(self) -> str:
        """Return the commit of the dataset's revision, of its newest one without."""
        from huggingface_hub import dataset_info

        name = hub_name(self.uri)
        revision = name.revision if name else None
        try:
            commit = dataset_info(self.repository, revision=revision, timeout=TIMEOUT).sha
            if not commit:
                raise ValueError("it names no commit")
            return commit
        # A broken network raises many classes, which all mean the same to a user.
        except Exception as error:
            raise self.error(
                "no such path here, and the hub can't tell of a dataset by that name "
                f"({type(error).__name__}: {shorten(error)}); give an existing path or a hub "
                "dataset id, owner/name[:config][@revision]"
            ) from None


def _local_path(source: str) -> Path:
    return expand_home(unquote(source[7:]) if source.startswith("file://") else source)


def _parts(
    config: DataConfig, uri: str, field: str, options: StoreConfig, scratch: Path,
    note: Callable[[str], None],
) -> list[Part]:  # fmt: skip
    external = _ExternalData(field, uri, options)
    copy = external.fetch(scratch)
    if external.is_on_hub:
        return _hub_splits(config, field, uri, copy.folder, scratch.parent / "datasets")
    read = ReadOptions(
        encoding=config.encoding, delimiter=config.delimiter, max_row_mb=config.max_row_mb
    )
    held_out = own_test_files(list(copy.files)) if config.split == "auto" else set()
    return [
        Part(
            name,
            partial(_records, external, name, path, read, note),
            text_cells=ending(name) in (".csv", ".tsv"),
            held_out=name in held_out,
        )
        for name, path in copy.files.items()
    ]


#: Words in a file's or a folder's name that mark held-out data, and data to train on.
_TEST_WORDS = frozenset(
    ("test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev", "heldout")
)
_TRAIN_WORDS = frozenset(("train", "training"))
#: Words that mean something else too (a dev team): they count only at a name's end.
_WEAK_WORDS = frozenset(("dev", "val", "valid"))


def own_test_files(names: Sequence[str]) -> set[str]:
    """Return the files that hold a source's own test part.

    A file `test.jsonl` or a folder `test` is one beside any other. A name with other words
    (`prefs_test`) is one beside a name with the word "train" or without the word "test" (`prefs`).
    """
    words = {name: _words(name) for name in names}
    has_train = any(_TRAIN_WORDS & set(parts) for parts in words.values())
    others = {tuple(parts) for parts in words.values()}

    def is_test(name: str) -> bool:
        parts = words[name]
        if _TRAIN_WORDS & set(parts):
            return False
        folders = [_words(part) for part in name.split("/")]
        if any(part and _TEST_WORDS.issuperset(part) for part in folders):
            return True
        if not (_TEST_WORDS - _WEAK_WORDS) & set(parts) and not _TEST_WORDS & set(parts[-1:]):
            return False
        return has_train or tuple(part for part in parts if part not in _TEST_WORDS) in others

    marked = {name for name in names if is_test(name)}
    return marked if len(marked) < len(names) else set()


def _words(name: str) -> list[str]:
    """Return the words of a file's name without its ending, "held-out" as one."""
    stem = re.sub(r"held[-_ ]?out|hold[-_ ]?out", "heldout", name.lower())
    for end in (".gz", *ENDINGS):
        stem = stem.removesuffix(end)
    return [word for word in re.split(r"[^a-z]+", stem) if word not in ("", "data", "of")]


def _records(
    external: External, name: str, path: Path, options: ReadOptions, note: Callable[[str], None]
) -> Iterator[Record]:
    try:
        with external.readable():
            yield from read_records(path, name, options, lambda text: note(f"{name}: {text}"))
    except MalformedError as error:
        raise DataError(
            f"{external.field} = {external.uri!r}: can't be parsed ({name}: {shorten(error)}); "
            "mend the file"
        ) from None


def _hub_splits(config: DataConfig, field: str, uri: str, folder: Path, cache: Path) -> list[Part]:
    """Return the split to train on, and the dataset's own test parts beside it."""
    is_eval = field == "data.eval_source"
    own = config.split == "auto" and config.eval_source is None and not is_eval
    names = _split_names(uri, folder, cache) if own and config.hub_split in _TRAIN_WORDS else []
    held_out = [name for name in names if _TEST_WORDS & set(_words(name))]
    parts = [Part(uri, partial(_split, uri, config.hub_split, folder, cache))]
    for name in held_out:
        read = partial(_split, uri, name, folder, cache)
        parts.append(Part(f"{uri}[{name}]", read, held_out=True))
    return parts


def _split_names(uri: str, folder: Path, cache: Path) -> list[str]:
    """Return the names of a dataset's splits; none where they can't be told before reading."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(folder), _config_of(uri), cache_dir=str(cache))
        return [str(name) for name in builder.config.data_files or ()]
    except Exception:  # the library raises anything; reading the split says why
        return []


def _config_of(uri: str) -> str | None:
    name = hub_name(uri)
    return name.config if name else None


def _split(uri: str, split: str, folder: Path, cache: Path) -> Iterator[Record]:
    """Read a split of a hub dataset's files."""
    import datasets

    datasets.disable_progress_bars()
    try:
        # By folder: by id, `load_dataset` keeps a copy in the user's cache whatever `cache_dir` is.
        loaded = datasets.load_dataset(
            str(folder), _config_of(uri), split=split, cache_dir=str(cache)
        )
    except Exception as error:  # the library raises anything
        cure = "check both"
        if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
            cure = f"name a configuration: {uri.partition(':')[0].partition('@')[0]}:name"
        raise ConfigError(
            f"data.source = {uri!r}, data.hub_split = {split!r}: can't be "
            f"read ({type(error).__name__}: {shorten(error)}); {cure}"
        ) from None
    for number, row in enumerate(loaded, start=1):
        yield Record(f"{uri}[{split}]" if split != "train" else uri, number, dict(row))
