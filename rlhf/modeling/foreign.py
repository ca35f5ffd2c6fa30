"""Models that the configuration names: what can be known of one before it is loaded, and a copy.

A place is a local folder, `s3://bucket/prefix` or a hub id (`owner/name`, also with `@revision`).
An `artifact:<digest>` is for the caller to resolve; only its `config.json` is looked at here.
Loads no torch, so that a run is refused before anything expensive starts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config.pipeline import StoreConfig
from rlhf.errors import ConfigError, StoreError
from rlhf.files import at_home
from rlhf.store.backend import in_parallel
from rlhf.store.bucket import objects_under, open_bucket, save_object
from rlhf.store.manifest import PICKLES

if TYPE_CHECKING:
    from rlhf.store.s3 import S3Backend

#: Endings of what a model consists of; nothing else is fetched or part of its identity.
MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")
CONFIG = "config.json"
MAX_CONFIG_BYTES = 2**20
#: Seconds for one answer of a server that is asked before a run.
PATIENCE = 10


@dataclass(frozen=True)
class ForeignModel:
    """A model that a stage starts from, or (`ready`) publishes in place of training one."""

    field: str
    place: str
    revision: str | None = None
    options: StoreConfig = dataclasses.field(default_factory=StoreConfig)
    ready: bool = False

    @property
    def is_artifact(self) -> bool:
        """Whether it lies in the pipeline's own store, which then answers for it."""
        return self.place.startswith("artifact:")

    def check(self) -> None:
        """Refuse what can be known to fail before the model is fetched.

        Raises:
            ConfigError: There is no model, its weights are no safetensors, or see `check_config`.
            StoreError: The S3 server can't be reached.
        """
        self.check_config(self._where.config())

    def check_config(self, data: bytes) -> None:
        """Refuse a broken `config.json`, and that of a ready model which can't be a reward model.

        Raises:
            ConfigError: It is no sequence-classification model with one label.
        """
        try:
            config: Any = json.loads(data)
        except ValueError:
            config = None
        if not isinstance(config, dict):
            raise self.error(f"its {CONFIG} is no JSON object; give the folder of a whole model")
        if self.ready:
            self._check_classifier(config)

    def digest(self) -> str:
        """Identity of its content: of a folder the files' hashes, of S3 objects their tags and
        sizes, of a hub model its commit.
        """
        return self._where.digest()

    def local(self, scratch: Path) -> Path:
        """A folder with the model's files, fetched into the new folder `scratch` if need be.

        Raises:
            ConfigError: There is no model.
            StoreError: The server can't be reached, or what it holds changed meanwhile.
        """
        return self._where.local(scratch)

    def error(self, reason: str) -> ConfigError:
        """An error that names field and place."""
        return ConfigError(f"{self.field} = {self.place!r}: {reason}")

    @property
    def _where(self) -> _Folder | _Bucket | _Hub:
        if self.place.startswith("s3://"):
            return _Bucket(self)
        written_as_path = self.place.startswith((".", "/", "~")) or self.place.count("/") > 1
        return _Folder(self) if written_as_path or Path(self.place).is_dir() else _Hub(self)

    def _check_classifier(self, config: Mapping[str, Any]) -> None:
        names = [str(name) for name in config.get("architectures") or ()]
        # transformers leaves out its default of two labels.
        labels = len(config.get("id2label") or ()) or config.get("num_labels", 2)
        classifier = any("ForSequenceClassification" in name for name in names)
        if classifier and labels == 1:
            return
        found = ", ".join(names) or "of no named architecture"
        found += f" with {labels} labels" if classifier else ""
        raise self.error(
            f"must be a sequence-classification model with one label, and this one is {found}; "
            "give a reward model, or none to train one"
        )

    def check_names(self, names: Sequence[str]) -> None:
        """Refuse a folder without configuration or without safetensors; pickles are never read."""
        if CONFIG not in names:
            raise self.error(
                f"no model there (no {CONFIG}); give a folder or prefix that holds {CONFIG}, a "
                "tokenizer and safetensors, a hub id or artifact:<digest>"
            )
        if not any(name.endswith(".safetensors") for name in names):
            pickles = sorted(name for name in names if Path(name).suffix in PICKLES)
            found = f"its weights are a pickle ({pickles[0]})" if pickles else "it has no weights"
            raise self.error(
                f"{found}, and only safetensors are read; save it again with save_pretrained"
            )


def _is_part(name: str) -> bool:
    return name.endswith(MODEL_FILES) and not name.startswith(".")


@dataclass(frozen=True)
class _Folder:
    model: ForeignModel

    def config(self) -> bytes:
        path = self.local()
        self.model.check_names([p.name for p in path.iterdir()] if path.is_dir() else [])
        return (path / CONFIG).read_bytes()

    def digest(self) -> str:
        digest = hashlib.sha256()
        for file in sorted(self.local().iterdir()):
            if file.is_file() and _is_part(file.name):
                digest.update(file.name.encode() + b"\0")
                with file.open("rb") as handle:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
        return digest.hexdigest()

    def local(self, _: Path | None = None) -> Path:
        return at_home(self.model.place)


@dataclass(frozen=True)
class _Bucket:
    model: ForeignModel

    def config(self) -> bytes:
        with open_bucket(self.model.field, self.model.place, self.model.options) as (bucket, key):
            hurried = bucket.hurried(PATIENCE)
            keys = {name: path for path, name, _, _ in self._objects(hurried, key)}
            return hurried.get_bytes(keys[CONFIG], MAX_CONFIG_BYTES)

    def digest(self) -> str:
        with open_bucket(self.model.field, self.model.place, self.model.options) as (bucket, key):
            found = [entry[1:] for entry in self._objects(bucket.hurried(PATIENCE), key)]
        return hashlib.sha256(repr(found).encode()).hexdigest()

    def local(self, scratch: Path) -> Path:
        with open_bucket(self.model.field, self.model.place, self.model.options) as (bucket, key):
            objects = self._objects(bucket, key)
            scratch.mkdir()
            in_parallel(lambda entry: save_object(bucket, entry[0], scratch / entry[1]), objects)
            if self._objects(bucket, key) != objects:
                raise StoreError("it changed while it was being read; try again")
        return scratch

    def _objects(self, bucket: S3Backend, key: str) -> list[tuple[str, str, str, int]]:
        """(key, file name, entity tag, size) of the model's files, in order."""
        folder = f"{key.rstrip('/')}/" if key else ""
        found = objects_under(self.model.field, self.model.place, bucket, key)
        inside = {k: k.removeprefix(folder) for k in sorted(found) if k.startswith(folder)}
        # What lies deeper is no part of the model, as for a folder.
        names = {k: name for k, name in inside.items() if "/" not in name}
        self.model.check_names([*names.values()])
        return [(k, name, *found[k]) for k, name in names.items() if _is_part(name)]


@dataclass(frozen=True)
class _Hub:
    model: ForeignModel

    def config(self) -> bytes:
        return self._config().read_bytes()

    def digest(self) -> str:
        return f"{self._name}@{self._config().parent.name}"

    def local(self, _: Path) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        commit, wanted = self._config().parent.name, [f"*{end}" for end in MODEL_FILES]
        # Every failure of the network ends here, under many classes; all mean the same to a user.
        try:
            folder = snapshot_download(
                self._name, revision=commit, allow_patterns=wanted, ignore_patterns=["*/*"]
            )
        except Exception as error:
            raise StoreError(
                f"{self.model.field} = {self.model.place!r}: the transfer from the hub broke "
                f"({type(error).__name__}); try again"
            ) from None
        self.model.check_names([path.name for path in Path(folder).iterdir()])
        return Path(folder)

    @property
    def _name(self) -> str:
        return self.model.place.partition("@")[0]

    def _config(self) -> Path:
        """Its `config.json` in the hub's cache, where the folder is named by the commit."""
        from huggingface_hub import hf_hub_download

        revision = self.model.place.partition("@")[2] or self.model.revision
        try:
            found = hf_hub_download(self._name, CONFIG, revision=revision, etag_timeout=PATIENCE)
        except Exception as error:
            raise self.model.error(
                f"no such folder here, and the hub gives no {CONFIG} of that name "
                f"({type(error).__name__}); give an existing folder, s3://bucket/prefix, "
                "artifact:<digest> or a hub id"
            ) from None
        return Path(found)
