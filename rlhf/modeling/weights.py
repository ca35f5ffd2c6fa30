"""Weight files: safetensors in shards of bounded size, their dtypes, digest of weights.

After a broken transfer only the shards that are missing are sent again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf.errors import TrainingError
from rlhf.files import files_sha256
from rlhf.modeling.generation_config import make_savable
from rlhf.modeling.headers import Header
from rlhf.modeling.structure import sections_of

log = logging.getLogger(__name__)

#: Bytes of tensors in one file; a larger tensor has a file of its own. The next file is hashed
#: while one is sent to a store: one file of 1 GB takes an eighth longer than two of 0.5 GB.
MAX_SHARD = 500_000_000

#: Weights that are remembered from loading, to measure what rounding takes from training.
_SAMPLE = 1_000_000

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredDtypes:
    """Dtypes in which a model's weights are stored: that of most, and those of single tensors.

    A tensor is found by its name, or by its end from the numbered layer on: transformers may
    rename a weight while loading.
    """

    main: torch.dtype
    tensors: Mapping[str, torch.dtype] = field(default_factory=dict)

    @classmethod
    def of(cls, headers: Mapping[str, Header]) -> StoredDtypes:
        """Read them from headers; what is no 16-bit float is float32, as in training."""
        sizes: dict[torch.dtype, int] = {}
        tensors: dict[str, torch.dtype] = {}
        ends: dict[str, set[torch.dtype]] = {}
        for name, header in headers.items():
            dtype = _DTYPES.get(header.dtype, torch.float32)
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(header.shape)
            tensors[name] = dtype
            ends.setdefault(_end(name), set()).add(dtype)
        unique = {end: next(iter(dtypes)) for end, dtypes in ends.items() if len(dtypes) == 1}
        return cls(max(sizes, key=lambda dtype: sizes[dtype]), {**unique, **tensors})

    def __getitem__(self, name: str) -> torch.dtype:
        return self.tensors.get(name) or self.tensors.get(_end(name), self.main)


def set_save_dtype(model: Any, dtype: str) -> None:
    """Set the dtype in which `save_model` writes a model; `auto` leaves that of its files."""
    if dtype != "auto":
        model.stored_dtypes = StoredDtypes(getattr(torch, dtype))


def remember_weights(model: Any) -> None:
    """Remember a sample of a model's weights as they were loaded, 4 MB at most.

    `save_model` warns by it if rounding takes most of what training changed.
    """
    weights = [(n, w) for n, w in model.named_parameters() if w.is_floating_point()]
    step = 1 + sum(weight.numel() for _, weight in weights) // _SAMPLE
    model.loaded_sample = step, {n: w.detach().flatten()[::step].clone() for n, w in weights}


def save_model(model: Any, folder: Path) -> None:
    """Save a model by transformers, in shards; its default is one file up to 50 GB.

    A pretrained model's weights are written in the dtypes of its files (`stored_dtypes`), to which
    they are rounded in place, each once. float16 is left for float32 where a weight has outgrown
    it. Only a generation config that transformers would refuse is repaired.

    Raises:
        TrainingError: A weight is NaN or infinite.
    """
    for name, count in not_finite(model):
        raise TrainingError(
            f"training diverged: {count:,} of the values of {name} are NaN or infinite; lower this "
            "stage's learning_rate or max_grad_norm"
        )
    for part in sections_of(model.config):
        vars(part).pop("auto_map", None)  # of code that is not run, and not among the files
    stored: StoredDtypes | None = getattr(model, "stored_dtypes", None)
    make_savable(model)
    dtype = _round(model, stored) if stored else model.dtype
    model.save_pretrained(folder, max_shard_size=MAX_SHARD)
    if model.dtype != dtype:  # transformers writes down that of the first weight
        _set_dtype(model.config, dtype)
        model.config.save_pretrained(folder)


def not_finite(model: Any) -> Iterator[tuple[str, int]]:
    """Yield names of weights with NaN or infinity, and how many of their values are."""
    for name, weight in model.state_dict().items():
        # min and max are NaN if one element is; they need no memory of the weight's size.
        if not weight.is_floating_point() or weight.numel() == 0:
            continue
        if not torch.stack(torch.aminmax(weight)).isfinite().all():
            yield name, int((~weight.isfinite()).sum())


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


def _round(model: Any, stored: StoredDtypes) -> torch.dtype:
    """Convert a model's weights to the dtypes of its files, in place; return the main one."""
    saved = model.state_dict()
    weights = [
        (name, weight)
        for name, weight in [*model.named_parameters(), *model.named_buffers()]
        if name in saved and weight.is_floating_point()
    ]
    limit = torch.finfo(torch.float16).max
    for name, weight in weights:
        if stored[name] == torch.float16 and weight.abs().max() > limit:
            log.warning("published in float32: weight %s has outgrown float16", name)
            stored = StoredDtypes(torch.float32)
            break
    _warn_of_loss(model, stored)
    for name, weight in weights:
        weight.data = weight.data.to(stored[name])
    _set_dtype(model.config, stored.main)
    return stored.main


def _warn_of_loss(model: Any, stored: StoredDtypes) -> None:
    """Warn if rounding takes more than a tenth of what training changed.

    The share that is kept is that of the rounded change along the change, a projection.
    """
    step, sample = getattr(model, "loaded_sample", None) or (1, {})
    kept = changed = 0.0
    parameters = dict(model.named_parameters())
    for name in sample.keys() & parameters.keys():
        before = sample[name]
        after = parameters[name].detach().flatten()[::step][: len(before)].cpu().double()
        start = before[: len(after)].cpu().double()
        change = after - start
        kept += float((after.to(stored[name]).double() - start) @ change)
        changed += float(change @ change)
    if changed and kept < 0.9 * changed:
        log.warning(
            "about %.0f %% of what training changed is less than %s resolves, and not in the "
            "published weights; raise the learning rate, or set base.save_dtype to float32",
            100 * (1 - kept / changed), str(stored.main).removeprefix("torch."),
        )  # fmt: skip


def _set_dtype(config: Any, dtype: torch.dtype) -> None:
    """Set the dtype that a configuration and its parts state."""
    for part in sections_of(config):
        part.dtype = dtype


def _end(name: str) -> str:
    """Return the end of a weight's name, from its numbered layer on."""
    parts = name.split(".")
    layer = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[max(0, layer - 1) :])


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
