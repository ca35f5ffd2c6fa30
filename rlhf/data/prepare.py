"""Stage: read preference data, leave out what can't be used, and split it by prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.config import DataConfig, StoreConfig
from rlhf.data import rows as files
from rlhf.data.clean import Known, clean, key
from rlhf.data.rows import Demonstration, Pair, PromptRow, write_rows
from rlhf.data.sources import read_source, source_name
from rlhf.errors import DataError
from rlhf.files import write_json
from rlhf.progress import Progress, silent
from rlhf.stage import StageResult

#: Different prompts on each side of the split: a comparison needs more than one.
MIN_PROMPTS = 2


def prepare_data(
    config: DataConfig,
    out_dir: Path,
    *,
    seed: int = 0,
    store_options: StoreConfig | None = None,
    progress: Progress = silent,
) -> StageResult:
    """Write a dataset folder: demonstrations, training and held-out pairs and prompts, a summary.

    Args:
        config: Source, columns, split.
        out_dir: Empty folder for the dataset.
        seed: Seeds the split (and the world, for `source: world`).
        store_options: S3 options, for an s3:// source.
        progress: Told of the parts done.

    Raises:
        ConfigError: The source does not exist or lacks a column.
        DataError: It can't be parsed, or too little is left to train on and to hold out.
        StoreError: The S3 server of the source can't be reached.
    """
    if config.source == "world":
        left_out: dict[str, int] = {}
        parts = _from_world(config, seed)
    else:
        rows = read_source(config, store_options or StoreConfig())
        known = Known(config)
        pairs, left_out = clean(rows, config, known)
        progress(1, 2, {"pairs": len(pairs)})
        parts = _split(_sample(pairs, config, seed), left_out, config, seed)
        for name in (files.PROMPTS_TRAIN, files.PROMPTS_EVAL):
            parts[name] = [known.completed(row) for row in parts[name]]
    for name, part in parts.items():
        write_rows(out_dir / name, part)
    summary = _summary(config, parts, left_out)
    write_json(out_dir / files.SUMMARY, summary)
    progress(2, 2, {})
    return StageResult({k: v for k, v in summary.items() if not isinstance(v, dict)})


Parts = dict[str, Sequence[Any]]


def _from_world(config: DataConfig, seed: int) -> Parts:
    from rlhf.world import generate

    try:
        world = generate(config.world, seed)
    except ValueError as error:
        raise DataError(f"data.world: {error}; ask for fewer") from None
    return {
        files.DEMONSTRATIONS: world.demonstrations,
        files.PAIRS_TRAIN: [Pair(p.prompt, p.chosen, p.rejected) for p in world.pairs],
        files.PAIRS_EVAL: world.eval_pairs,
        files.PROMPTS_TRAIN: [PromptRow(p) for p in world.prompts],
        files.PROMPTS_EVAL: world.eval_prompts,
    }


def _sample(pairs: list[Pair], config: DataConfig, seed: int) -> list[Pair]:
    """At most `max_pairs` of the pairs, the same ones in whatever order they come."""
    if config.max_pairs is None or len(pairs) <= config.max_pairs:
        return pairs
    kept = set(sorted(map(repr, pairs), key=lambda p: _order(seed, p))[: config.max_pairs])
    return [pair for pair in pairs if repr(pair) in kept]


def _split(pairs: list[Pair], left_out: Mapping[str, int], config: DataConfig, seed: int) -> Parts:
    """Hold out whole prompts: pairs of one prompt never stand on both sides."""
    prompts = sorted({key(p.prompt) for p in pairs}, key=lambda p: _order(seed, p))
    if len(prompts) < 2 * MIN_PROMPTS:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in left_out.items())
        raise DataError(
            f"data.source = {config.source!r}: {len(prompts)} different prompts with usable pairs "
            f"are too few to train on {MIN_PROMPTS} and hold out {MIN_PROMPTS}; give more rows "
            f"(left out: {reasons or 'none'})"
        )
    share = round(len(prompts) * config.eval_fraction)
    held_out = set(prompts[: min(max(share, MIN_PROMPTS), len(prompts) - MIN_PROMPTS)])
    train = [p for p in pairs if key(p.prompt) not in held_out]
    evaluation = [p for p in pairs if key(p.prompt) in held_out]
    return {
        files.DEMONSTRATIONS: [Demonstration(p.prompt, p.chosen) for p in train],
        files.PAIRS_TRAIN: train,
        files.PAIRS_EVAL: evaluation,
        files.PROMPTS_TRAIN: _prompts(train),
        files.PROMPTS_EVAL: _prompts(evaluation),
    }


def _order(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}\0{text}".encode()).hexdigest()


def _prompts(pairs: list[Pair]) -> list[PromptRow]:
    return [PromptRow(p) for p in {key(pair.prompt): pair.prompt for pair in pairs}.values()]


def _summary(config: DataConfig, parts: Parts, left_out: dict[str, int]) -> dict[str, Any]:
    train: Sequence[Pair] = parts[files.PAIRS_TRAIN]
    longer = sum(len(p.chosen) > len(p.rejected) for p in train) / len(train)
    return {
        "source": source_name(config.source),
        "demonstrations": len(parts[files.DEMONSTRATIONS]),
        "pairs_train": len(train),
        "pairs_eval": len(parts[files.PAIRS_EVAL]),
        "prompts_train": len(parts[files.PROMPTS_TRAIN]),
        "prompts_eval": len(parts[files.PROMPTS_EVAL]),
        "chosen_longer": longer,
        "left_out": left_out,
    }
