"""Headers of a model's safetensors: names, shapes and dtypes of its weights, without torch.

`look_untrained` alone reads weights, by torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from rlhf.limits import load_json, read_some

#: The files that transformers loads: one, or the shards that an index lists.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

#: Bytes of an index: some hundred for each of a hundred thousand weights.
MAX_INDEX_BYTES = 2**26
#: Dtypes of weights that can be trained, as headers call them.
FLOATS = ("F64", "F32", "F16", "BF16")

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_LFS_POINTER = b"version https://git-lfs"


class DamagedWeights(ValueError):
    """A model's weight files are incomplete or unreadable; the message has a cure."""


class Header(NamedTuple):
    """Name of a tensor's dtype, its shape and its file."""

    dtype: str
    shape: tuple[int, ...]
    path: Path


def read_headers(folder: Path) -> dict[str, Header]:
    """Return the headers of all tensors that transformers would load from a folder, by name.

    Raises:
        DamagedWeights: A file is missing, truncated, empty or no safetensors, it is not clear
            which files are meant, or a tensor is stored twice.
    """
    headers: dict[str, Header] = {}
    for path in weight_files(folder):
        for name, header in _headers_of(path).items():
            if name in headers:
                raise DamagedWeights(
                    f"{name} is in both {headers[name].path.name} and {path.name}; remove the file "
                    f"that does not belong to the model, and its entry in {INDEX}"
                )
            headers[name] = header
    if not headers:
        raise DamagedWeights("its safetensors hold no tensor; save the model again")
    return headers


def look_untrained(folder: Path) -> bool:
    """Return whether weights look as they were initialised, by the vectors among them.

    A class fills its norms' scales and its biases with one number each, usually 1 or 0, and
    training changes them, in bfloat16 if it is long enough. Files without such vectors tell
    nothing.

    Raises:
        DamagedWeights: See `read_headers`.
    """
    vectors = {
        name: header
        for name, header in read_headers(folder).items()
        if len(header.shape) == 1 and header.shape[0] > 1 and header.dtype in FLOATS
    }
    for path in {header.path for header in vectors.values()}:
        # torch, for numpy has no bfloat16.
        with safe_open(path, framework="pt") as file:
            for name, header in vectors.items():
                if header.path == path:
                    vector = file.get_tensor(name)
                    if bool((vector != vector[0]).any()):
                        return False
    return bool(vectors)


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers would load from a folder.

    Raises:
        DamagedWeights: They are incomplete, ambiguous or have other names.
    """
    single, index = folder / SINGLE, folder / INDEX
    shards = _indexed(index) if index.is_file() else []
    if single.is_file():
        others = [path for path in shards if path != single and path.is_file()]
        if others:
            raise DamagedWeights(
                f"it holds {SINGLE} as well as {others[0].name}, two models of which only the "
                f"first would be loaded; remove {SINGLE}, or {INDEX} and its shards"
            )
        return [single]
    if not index.is_file():
        raise DamagedWeights(_misnamed([path.name for path in folder.glob("*.safetensors")]))
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise DamagedWeights(
            f"of the {len(shards)} files in its {INDEX}, {len(missing)} are not there (first: "
            f"{missing[0]}); copy or download all of them"
        )
    return shards


def _indexed(index: Path) -> list[Path]:
    """Return the shards that an index lists, sorted."""
    try:
        content: Any = load_json(read_some(index, MAX_INDEX_BYTES))
        names = sorted(set(content["weight_map"].values()))
        shards = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError):
        names, shards = [], []
    if not shards:
        raise DamagedWeights(
            f"its {INDEX} lists no files (no weight_map); copy or download it again"
        )
    for name in names:
        # transformers would follow the path, and the model's identity not cover what it reads.
        if Path(name).name != name:
            raise DamagedWeights(
                f"its {INDEX} names {name!r}, and only files beside it are read; put all shards "
                "into the model's own folder, and list them by name alone"
            )
    return shards


def _misnamed(names: Sequence[str]) -> str:
    """Return why no weights would be loaded from safetensors of these names."""
    if any(_SHARD.fullmatch(name) for name in names):
        return f"it holds shards, but no {INDEX} that lists them; copy or download that file, too"
    return (
        f"its weights are called {min(names, default='none')}, and only {SINGLE}, or the shards in "
        f"{INDEX}, are loaded; save the model again with save_pretrained"
    )


def _headers_of(path: Path) -> dict[str, Header]:
    """Read the header of one file; safetensors checks the file's length against it."""
    try:
        # numpy loads no torch; dtypes that it lacks are not touched here.
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Header(part.get_dtype(), tuple(part.get_shape()), path)
                for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        with path.open("rb") as raw:
            is_pointer = raw.read(len(_LFS_POINTER)) == _LFS_POINTER
        if is_pointer:
            raise DamagedWeights(
                f"{path.name} is a pointer of Git LFS without its content; run `git lfs pull`"
            ) from None
        reason = " ".join(str(error).split())[:120]
        raise DamagedWeights(
            f"{path.name} is broken ({reason}); copy or download it again"
        ) from None
