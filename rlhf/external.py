"""External inputs: data or a model in a folder, a bucket or the Hugging Face hub.

Imports neither torch nor, for a folder, boto3, so that preflight checks are fast.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from rlhf.config.pipeline import StoreConfig
from rlhf.errors import ConfigError, StoreError
from rlhf.files import exists, files_sha256, is_dir, is_file, known_sha256
from rlhf.limits import read_some
from rlhf.permissions import check_paths, check_uri
from rlhf.store.objects import Sink, in_parallel

if TYPE_CHECKING:
    from rlhf.store.s3 import S3Backend

#: Most files of a folder: a path such as / would be read for hours.
MOST_FILES = 100_000
#: Seconds for one answer of a server that is checked before a run.
TIMEOUT = 10


class LocalCopy(NamedTuple):
    """Local copy of an external input: its folder, and the paths of its files by name."""

    folder: Path
    files: Mapping[str, Path]


@dataclass(frozen=True)
class External(ABC):
    """Data or a model that a setting names by path, `s3://bucket/key` or hub id.

    A subclass decides which files belong to it. A model is the files directly in a folder. A
    dataset is a single file, or a folder with its subfolders.

    Args:
        field: The setting, named in errors.
        uri: Its value.
        options: S3 options.
        revision: Branch, tag or commit on the hub.
    """

    field: str
    uri: str
    options: StoreConfig = dataclasses.field(default_factory=StoreConfig)
    revision: str | None = None

    #: The type of repository on the hub.
    type: ClassVar[Literal["dataset", "model"]]
    #: Patterns of the files to fetch from the hub.
    hub_files: ClassVar[Sequence[str]]

    def digest(self) -> str:
        """Return the identity of the content: equal for equal content in the same place.

        Local files are identified by name and sha256, objects by name, entity tag and size, a
        repository on the hub by its commit.

        Raises:
            ConfigError: The input is missing or incomplete, or can't be read.
            StoreError: The S3 server can't be reached.
        """
        return self._location.digest()

    def fetch(self, scratch: Path) -> LocalCopy:
        """Return local files: a folder's own, else copies in the new folder `scratch`.

        A model from the hub is kept in the hub's cache instead.

        Raises:
            ConfigError: The input is missing or incomplete, or can't be read.
            StoreError: The server can't be reached, or a transfer broke.
        """
        return self._location.fetch(scratch)

    def read(self, name: str, limit: int) -> bytes:
        """Read one small file of the input; a server may send at most `limit` bytes."""
        return self._location.read(name, limit)

    def error(self, reason: str) -> ConfigError:
        """Return an error that names the setting and its value."""
        return ConfigError(f"{self.field} = {self.uri!r}: {reason}")

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Turn an OSError of reading local files into a ConfigError."""
        try:
            yield
        except OSError as error:
            raise self.error(
                f"can't be read ({error.strerror}); check the file and its rights"
            ) from None

    @property
    def is_on_hub(self) -> bool:
        """True if the URI is neither `s3://` nor a path."""
        return isinstance(self._location, _Hub)

    @property
    def _location(self) -> _Folder | _Bucket | _Hub:
        setting = f"{self.field} = {self.uri!r}"
        if self.uri.startswith("s3://"):
            check_uri(setting, self.uri)
            return _Bucket(self)
        if self.is_path():
            return _Folder(self)
        check_uri(setting, f"hf://{self.repository}")
        return _Hub(self)

    @abstractmethod
    def is_path(self) -> bool:
        """Return whether the URI, which is not `s3://`, is a path rather than a hub id."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """The local path."""

    @abstractmethod
    def select(self, names: Sequence[str]) -> list[str]:
        """Return those of the files that belong to the input, sorted.

        Raises:
            ConfigError: It is incomplete.
        """

    @property
    def repository(self) -> str:
        """Name of the repository on the hub."""
        return self.uri

    @abstractmethod
    def hub_commit(self) -> str:
        """Return the commit on the hub.

        Raises:
            ConfigError: The hub can't be reached, or has no such repository.
        """


def shorten(reason: object) -> str:
    """Return the text of an error on one line of at most 200 characters."""
    text = " ".join(str(reason).split())
    return text if len(text) <= 200 else f"{text[:199]}…"


@dataclass(frozen=True)
class _Folder:
    """An input in a local folder, or a local file."""

    external: External

    def digest(self) -> str:
        with self.external.readable():
            return files_sha256(self._files().items(), b"\0", known_sha256)

    def fetch(self, _: Path) -> LocalCopy:
        files = self._files()
        return LocalCopy(self.external.path, files)

    def read(self, name: str, limit: int) -> bytes:
        with self.external.readable():
            return read_some(self._files()[name], limit)

    def _files(self) -> dict[str, Path]:
        path, is_dataset = self.external.path, self.external.type == "dataset"
        setting = f"{self.external.field} = {self.external.uri!r}"
        check_paths(setting, [path])
        with self.external.readable():
            if is_dir(path):
                inside = [*islice(path.glob("**/*" if is_dataset else "*"), MOST_FILES + 1)]
                if len(inside) > MOST_FILES:
                    raise self.external.error(
                        f"holds more than {MOST_FILES:,} files; name a folder of the data alone"
                    )
                paths = {p.relative_to(path).as_posix(): p for p in inside}
                if is_dataset:
                    paths = {name: p for name, p in paths.items() if _is_visible(name)}
            else:
                paths = {path.name: path} if is_dataset else {}
            if not is_dataset:
                self._refuse_dangling(paths.values())
            files = {name: p for name, p in paths.items() if is_file(p)}
            # Of a model all, for its libraries look for more files than are selected, in folders
            # too, such as those of named chat templates. Links to folders are paths themselves.
            further = () if is_dataset else path.rglob("*")
            check_paths(setting, chain(files.values(), islice(further, MOST_FILES)))
        return {name: files[name] for name in self.external.select(list(files))}

    def _refuse_dangling(self, paths: Iterable[Path]) -> None:
        """Refuse links to files that are not there, as in a part of the hub's cache."""
        for path in sorted(paths):
            is_wanted = any(path.match(pattern) for pattern in self.external.hub_files)
            if is_wanted and path.is_symlink() and not exists(path):
                raise self.external.error(
                    f"{path.name} is a link to {path.readlink()}, which is not there; copy the "
                    "model with the files that its links lead to (cp -rL)"
                )


@dataclass(frozen=True)
class _Bucket:
    """An input in an S3 bucket: the objects under a key, or one object."""

    external: External

    def digest(self) -> str:
        with self._open() as (bucket, key):
            objects = self._objects(bucket.hurried(TIMEOUT), key)
        entries = [(name, tag, size) for name, (_, tag, size) in objects.items()]
        return hashlib.sha256(repr(entries).encode()).hexdigest()

    def fetch(self, scratch: Path) -> LocalCopy:
        is_dataset = self.external.type == "dataset"
        with self._open() as (bucket, key):
            objects = self._objects(bucket, key)
            scratch.mkdir()
            # The name of a dataset's object is a key, which need not be a safe path.
            files = {
                name: scratch / (f"{i}-{Path(name).name}" if is_dataset else name)
                for i, name in enumerate(objects)
            }

            def download(name: str) -> None:
                with files[name].open("wb") as file:
                    bucket.get_file(objects[name][0], Sink(file, lambda _: None))

            in_parallel(download, objects)
            if not is_dataset and self._objects(bucket, key) != objects:
                raise StoreError("it changed while it was being read; try again")
        return LocalCopy(scratch, files)

    def read(self, name: str, limit: int) -> bytes:
        with self._open() as (bucket, key):
            hurried = bucket.hurried(TIMEOUT)
            return hurried.get_bytes(self._objects(hurried, key)[name][0], limit)

    @contextmanager
    def _open(self) -> Iterator[tuple[S3Backend, str]]:
        """Yield the bucket and the key in it; errors of the bucket name the setting."""
        from rlhf.store.s3 import S3Backend

        name, _, key = self.external.uri.removeprefix("s3://").partition("/")
        bucket = f"s3://{name}"
        try:
            yield S3Backend(bucket, self.external.options), key
        except StoreError as error:
            reason = str(error).removeprefix(f"{bucket}: ")
            message = f"{self.external.field} = {self.external.uri!r}: {reason}"
            raise type(error)(message) from None

    def _objects(self, bucket: S3Backend, key: str) -> dict[str, tuple[str, str, int]]:
        """Return (key, entity tag, size) of the input's objects by name, in order.

        An object of a dataset is named by its key, one of a model by the rest after the folder.
        """
        folder = f"{key.rstrip('/')}/" if key else ""
        listed = bucket.objects(key)
        objects = {k: v for k, v in listed.items() if k == key or k.startswith(folder)}
        if not objects:
            raise self.external.error(
                f"bucket {bucket.bucket!r} holds no object of this name, and none under it; "
                "correct the key"
            )
        if self.external.type == "dataset":
            names = {k: k for k in objects if k == key or _is_visible(k.removeprefix(folder))}
        else:
            keys = {k.removeprefix(folder): k for k in objects if k.startswith(folder)}
            names = {name: k for name, k in keys.items() if "/" not in name}
        selected = self.external.select(list(names))
        return {name: (names[name], *objects[names[name]]) for name in selected}


@dataclass(frozen=True)
class _Hub:
    """An input in a repository on the Hugging Face hub."""

    external: External

    def digest(self) -> str:
        commit = self.external.hub_commit()
        is_dataset = self.external.type == "dataset"
        return commit if is_dataset else f"{self.external.repository}@{commit}"

    def fetch(self, scratch: Path) -> LocalCopy:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        is_dataset = self.external.type == "dataset"
        commit = self.external.hub_commit()
        disable_progress_bars()
        # A broken network raises many classes, which all mean the same to a user.
        try:
            folder = Path(
                snapshot_download(
                    self.external.repository,
                    repo_type=self.external.type,
                    revision=commit,
                    cache_dir=scratch if is_dataset else None,
                    allow_patterns=list(self.external.hub_files),
                    ignore_patterns=None if is_dataset else ["*/*"],
                )
            )
        except Exception as error:
            detail = f": {shorten(error)}" if is_dataset else ""
            raise StoreError(
                f"{self.external.field} = {self.external.uri!r}: the transfer from the hub broke "
                f"({type(error).__name__}{detail}); try again"
            ) from None
        files = {path.name: path for path in folder.iterdir()}
        names = list(files) if is_dataset else self.external.select(list(files))
        return LocalCopy(folder, {name: files[name] for name in names})

    def read(self, name: str, limit: int) -> bytes:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(
            self.external.repository,
            name,
            repo_type=self.external.type,
            revision=self.external.hub_commit(),
        )
        return read_some(Path(path), limit)


def _is_visible(name: str) -> bool:
    """True unless a part of the path is hidden, as are checkpoints and tools' caches."""
    return "/." not in f"/{name}"
