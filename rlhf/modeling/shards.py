"""Weights in files of bounded size, so that what broke on the way is sent again in small parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

#: Bytes of tensors in one file; a tensor that is larger has a file of its own. While one is on its
#: way to a store, the next is hashed: one file of 1 GB takes an eighth longer than two of 0.5 GB.
MAX_SHARD = 500_000_000


def save_model(model: Any, folder: Path) -> None:
    """Save a model as transformers does, which by itself would not split it below 50 GB."""
    model.save_pretrained(folder, max_shard_size=MAX_SHARD)


def save_tensors(tensors: Mapping[str, Tensor], folder: Path, name: str) -> None:
    """Write `<name>.safetensors`, or `<name>-00001-of-00003.safetensors` and so on if it is large.

    Only one file's tensors are copied from an accelerator at a time.
    """
    parts = [*_split(tensors)]
    for path, part in zip(_paths(folder, name, len(parts)), parts, strict=True):
        save_file({key: t.detach().cpu().contiguous() for key, t in part.items()}, path)


def shards_of(folder: Path, name: str) -> list[Path]:
    """The files that `save_tensors` wrote; a file that is not sharded is named even if absent.

    Raises:
        ValueError: Some of the shards are missing.
    """
    whole = folder / f"{name}.safetensors"
    found = sorted(folder.glob(f"{name}-*-of-*.safetensors"))
    if whole.exists() or not found:
        return [whole]
    count = found[-1].stem.rpartition("-of-")[2]
    if not count.isdigit() or found != _paths(folder, name, int(count)):
        raise ValueError(f"{name}: of its {count} shards only {len(found)} are there")
    return found


def _split(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """By name, as the order of an optimiser's state depends on how it came to be."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in sorted(tensors.items()):
        if part and size + tensor.nbytes > MAX_SHARD:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part


def _paths(folder: Path, name: str, count: int) -> list[Path]:
    if count == 1:
        return [folder / f"{name}.safetensors"]
    return [folder / f"{name}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
