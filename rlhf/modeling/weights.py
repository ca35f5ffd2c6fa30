"""Weight files: safetensors in shards of bounded size, digest of weights.

After a broken transfer only the shards that are missing are sent again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from rlhf.files import files_sha256

#: Bytes of tensors in one file; a larger tensor has a file of its own. The next file is hashed
#: while one is sent to a store: one file of 1 GB takes an eighth longer than two of 0.5 GB.
MAX_SHARD = 500_000_000


def save_model(model: Any, folder: Path) -> None:
    """Save a model by transformers, in shards; its default is one file up to 50 GB."""
    model.save_pretrained(folder, max_shard_size=MAX_SHARD)


def save_tensors(tensors: Mapping[str, Tensor], folder: Path, name: str) -> None:
    """Write tensors to `<name>.safetensors` or to shards.

    Shards are called `<name>-00001-of-00003.safetensors` and so on. Copies the tensors of one file
    at a time from an accelerator.
    """
    groups = [*_groups(tensors)]
    for path, group in zip(_paths(folder, name, len(groups)), groups, strict=True):
        save_file({key: t.detach().cpu().contiguous() for key, t in group.items()}, path)


def shards_of(folder: Path, name: str) -> list[Path]:
    """Return the files that `save_tensors` wrote, or the path of a single file.

    Raises:
        ValueError: Shards are missing.
    """
    single = folder / f"{name}.safetensors"
    shards = sorted(folder.glob(f"{name}-*-of-*.safetensors"))
    if single.exists() or not shards:
        return [single]
    count = shards[-1].stem.rpartition("-of-")[2]
    if not count.isdigit() or shards != _paths(folder, name, int(count)):
        raise ValueError(f"{name}: of its {count} shards only {len(shards)} are there")
    return shards


def weights_digest(folder: Path) -> str:
    """Return the hex sha256 of a model folder's safetensors, ordered by name."""
    return files_sha256((path.name, path) for path in sorted(folder.glob("*.safetensors")))


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Group tensors into shards, sorted by name."""
    group: dict[str, Tensor] = {}
    size = 0
    # Sorted, because the order of an optimiser's state depends on its history.
    for name, tensor in sorted(tensors.items()):
        if group and size + tensor.nbytes > MAX_SHARD:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    yield group


def _paths(folder: Path, name: str, count: int) -> list[Path]:
    """Return the paths of `count` shards."""
    if count == 1:
        return [folder / f"{name}.safetensors"]
    return [folder / f"{name}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
