"""Helpers for tests of checkpoint uploads: machines with a common store."""

from __future__ import annotations

import threading
import time

from rlhf.checkpoints.folder import checkpoints_in
from rlhf.checkpoints.store import CheckpointStore
from rlhf.checkpoints.uploads import CheckpointUploads
from rlhf.store import Producer, open_store
from rlhf.store.local import LocalBackend
from tests.servers import PATIENCE

PRODUCER = Producer(stage="train-policy", code_version="1", config={}, seed=0, versions={})


class Machine:
    """A machine: a work folder, and a store that may be common to several."""

    def __init__(self, folder, uri, options=None):
        self.checkpoints = folder / "checkpoints"
        self.store = open_store(uri, options=options, cache_dir=folder)
        self.folder = folder

    def uploads(self):
        return CheckpointUploads(CheckpointStore(self.store, PRODUCER))

    def use(self):
        return {"checkpoints": self.checkpoints, "uploads": self.uploads()}


class Watched(LocalBackend):
    """A folder store that calls `hook` with the key before it writes a blob."""

    hook = staticmethod(lambda key: None)

    def _put(self, key, data):
        if key.startswith("blobs/"):
            self.hook(key)
        super()._put(key, data)


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def names(folder):
    return [path.name for path in checkpoints_in(folder)]


def stored(store):
    """Return the update numbers of the store's checkpoints."""
    return sorted(artifact.manifest.metrics["update"] for artifact in store.list())


def keys_of(store):
    """Return the keys of all manifests and blobs of a store's artifacts."""
    found = set()
    for ref, manifest, _ in store.list():
        found.add(f"manifests/{ref.digest}.json")
        found |= {f"blobs/sha256/{e.sha256[:2]}/{e.sha256}" for e in manifest.files}
    return found


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name == "checkpoints"]


def left_behind(machine):
    """Return temporary files of uploads in the work folder; there should be none."""
    return [*machine.checkpoints.glob(".upload-*"), *machine.folder.glob("artifacts/[!.]*")]


def checkpoint(folder, update, same="warm-up"):
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(f'{{"update": {update}}}')
    (folder / "policy.safetensors").write_text(same)
    (folder / "critic.safetensors").write_text(f"{update}")
    return folder
