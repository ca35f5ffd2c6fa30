"""Stage `prepare-data`: read preference data, drop unusable rows, split by prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.config import DataConfig, StoreConfig
from rlhf.data.clean import PromptFields, clean, prompt_key
from rlhf.data.rows import (
    DEMONSTRATIONS,
    PAIRS_EVAL,
    PAIRS_TRAIN,
    PROMPTS_EVAL,
    PROMPTS_TRAIN,
    SUMMARY,
    Demonstration,
    Pair,
    PromptRow,
    write_rows,
)
from rlhf.data.sources import read_source, source_name
from rlhf.errors import DataError
from rlhf.files import write_json
from rlhf.stage import Progress, StageResult, silent

#: Least number of different prompts on each side of the split: a comparison needs two.
MIN_PROMPTS = 2

#: Rows of a dataset by the name of their file.
Parts = dict[str, Sequence[Any]]


def prepare_data(
    config: DataConfig,
    out_dir: Path,
    *,
    seed: int = 0,
    store_options: StoreConfig | None = None,
    progress: Progress = silent,
) -> StageResult:
    """Write a dataset: demonstrations, pairs and prompts, split by prompt; a summary.

    Args:
        config: Source, columns, split.
        out_dir: Empty folder for the dataset.
        seed: Seeds the split (and the world, for `source: world`).
        store_options: S3 options, for an s3:// source.
        progress: Called after reading and after writing.

    Raises:
        ConfigError: The source does not exist or lacks a column.
        DataError: It can't be parsed, or too few prompts are left to split.
        StoreError: The S3 server of the source can't be reached.
    """
    if config.source == "world":
        left_out: dict[str, int] = {}
        parts = _from_world(config, seed)
    else:
        rows = read_source(config, store_options or StoreConfig())
        fields = PromptFields(config)
        pairs, left_out = clean(rows, config, fields)
        progress(1, 2, {"pairs": len(pairs)})
        parts = _split(_sample(pairs, config, seed), left_out, config, seed)
        for name in (PROMPTS_TRAIN, PROMPTS_EVAL):
            parts[name] = [fields.complete(row) for row in parts[name]]
    for name, part in parts.items():
        write_rows(out_dir / name, part)
    summary = _summary(config, parts, left_out)
    write_json(out_dir / SUMMARY, summary)
    progress(2, 2, {})
    return StageResult({k: v for k, v in summary.items() if not isinstance(v, dict)})


def _from_world(config: DataConfig, seed: int) -> Parts:
    from rlhf.world import generate

    try:
        world = generate(config.world, seed)
    except ValueError as error:
        raise DataError(f"data.world: {error}; ask for fewer") from None
    return {
        DEMONSTRATIONS: world.demonstrations,
        PAIRS_TRAIN: [Pair(p.prompt, p.chosen, p.rejected) for p in world.pairs],
        PAIRS_EVAL: world.eval_pairs,
        PROMPTS_TRAIN: [PromptRow(p) for p in world.prompts],
        PROMPTS_EVAL: world.eval_prompts,
    }


def _sample(pairs: list[Pair], config: DataConfig, seed: int) -> list[Pair]:
    """Return at most `max_pairs` of the pairs, chosen independently of their order."""
    if config.max_pairs is None or len(pairs) <= config.max_pairs:
        return pairs
    sample = set(sorted(map(repr, pairs), key=lambda p: _seeded_hash(seed, p))[: config.max_pairs])
    return [pair for pair in pairs if repr(pair) in sample]


def _split(pairs: list[Pair], left_out: Mapping[str, int], config: DataConfig, seed: int) -> Parts:
    """Hold out a share of the prompts with all their pairs."""
    prompts = sorted({prompt_key(p.prompt) for p in pairs}, key=lambda p: _seeded_hash(seed, p))
    if len(prompts) < 2 * MIN_PROMPTS:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in left_out.items())
        raise DataError(
            f"data.source = {config.source!r}: {len(prompts)} different prompts with usable pairs "
            f"are too few to train on {MIN_PROMPTS} and hold out {MIN_PROMPTS}; give more rows "
            f"(left out: {reasons or 'none'})"
        )
    share = round(len(prompts) * config.eval_fraction)
    held_out = set(prompts[: min(max(share, MIN_PROMPTS), len(prompts) - MIN_PROMPTS)])
    train = [p for p in pairs if prompt_key(p.prompt) not in held_out]
    evaluation = [p for p in pairs if prompt_key(p.prompt) in held_out]
    return {
        DEMONSTRATIONS: [Demonstration(p.prompt, p.chosen) for p in train],
        PAIRS_TRAIN: train,
        PAIRS_EVAL: evaluation,
        PROMPTS_TRAIN: _prompts(train),
        PROMPTS_EVAL: _prompts(evaluation),
    }


def _seeded_hash(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}\0{text}".encode()).hexdigest()


def _prompts(pairs: list[Pair]) -> list[PromptRow]:
    return [PromptRow(p) for p in {prompt_key(pair.prompt): pair.prompt for pair in pairs}.values()]


def _summary(config: DataConfig, parts: Parts, left_out: dict[str, int]) -> dict[str, Any]:
    train: Sequence[Pair] = parts[PAIRS_TRAIN]
    longer = sum(len(p.chosen) > len(p.rejected) for p in train) / len(train)
    return {
        "source": source_name(config.source),
        "demonstrations": len(parts[DEMONSTRATIONS]),
        "pairs_train": len(train),
        "pairs_eval": len(parts[PAIRS_EVAL]),
        "prompts_train": len(parts[PROMPTS_TRAIN]),
        "prompts_eval": len(parts[PROMPTS_EVAL]),
        "chosen_longer": longer,
        "left_out": left_out,
    }
