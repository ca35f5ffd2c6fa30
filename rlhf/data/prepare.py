"""Stage: read preference data, leave out what can't be used, and split it by prompt."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf.config import DataConfig, StoreConfig
from rlhf.data import rows as files
from rlhf.data.rows import Demonstration, Pair, Prompt, PromptRow, write_rows
from rlhf.data.sources import read_source
from rlhf.errors import DataError
from rlhf.progress import Progress, silent
from rlhf.stage import StageResult, write_json


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
        DataError: Too little is left to train and to hold out.
    """
    if config.source == "world":
        left_out: dict[str, int] = {}
        parts = _from_world(config, seed)
    else:
        pairs, left_out = clean(read_source(config, store_options or StoreConfig()), config)
        progress(1, 2, {"pairs": len(pairs)})
        parts = _split(pairs, config, seed)
    for name, part in parts.items():
        if not part:
            raise DataError(
                f"data.source = {config.source!r} leaves nothing for {name} "
                f"(left out: {left_out or 'nothing'}); give more rows"
            )
        write_rows(out_dir / name, part)
    summary = _summary(config, parts, left_out)
    write_json(out_dir / files.SUMMARY, summary)
    progress(2, 2, {})
    return StageResult({k: v for k, v in summary.items() if not isinstance(v, dict)})


Parts = dict[str, Sequence[Any]]


def _from_world(config: DataConfig, seed: int) -> Parts:
    from rlhf.world import generate

    world = generate(config.world, seed)
    return {
        files.DEMONSTRATIONS: world.demonstrations,
        files.PAIRS_TRAIN: [Pair(p.prompt, p.chosen, p.rejected) for p in world.pairs],
        files.PAIRS_EVAL: world.eval_pairs,
        files.PROMPTS_TRAIN: [PromptRow(p) for p in world.prompts],
        files.PROMPTS_EVAL: world.eval_prompts,
    }


def clean(rows: Iterable[dict[str, Any]], config: DataConfig) -> tuple[list[Pair], dict[str, int]]:
    """Usable pairs, and how many rows were left out for which reason."""
    pairs: dict[str, Pair] = {}
    left_out: Counter[str] = Counter()
    for row in rows:
        pair = Pair(
            row[config.prompt_column],
            _reply(row[config.chosen_column]),
            _reply(row[config.rejected_column]),
        )
        reason = _unusable(pair, config)
        identity = json.dumps([pair.prompt, pair.chosen, pair.rejected])
        if reason is None and identity in pairs:
            reason = "duplicate"
        if reason:
            left_out[reason] += 1
        else:
            pairs[identity] = pair
    return list(pairs.values()), dict(left_out)


def _reply(value: Any) -> Any:
    """A reply's text; of a list of chat messages, that of the last one."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        return value[-1].get("content")
    return value


def _unusable(pair: Pair, config: DataConfig) -> str | None:
    if not _is_prompt(pair.prompt):
        return "prompt is empty or no text"
    if not all(isinstance(r, str) and r.strip() for r in (pair.chosen, pair.rejected)):
        return "a reply is empty or no text"
    if pair.chosen == pair.rejected:
        return "both replies are the same"
    if len(_key(pair.prompt)) > config.max_prompt_chars:
        return "prompt too long"
    if max(len(pair.chosen), len(pair.rejected)) > config.max_reply_chars:
        return "reply too long"
    return None


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, list):
        return bool(prompt) and all(
            isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m
            for m in prompt
        )
    return isinstance(prompt, str) and bool(prompt.strip())


def _key(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt)


def _split(pairs: list[Pair], config: DataConfig, seed: int) -> Parts:
    """Hold out whole prompts: pairs of one prompt never stand on both sides."""
    if config.max_pairs is not None:
        pairs = sorted(pairs, key=lambda p: _order(seed, repr(p)))[: config.max_pairs]
    prompts = sorted({_key(p.prompt) for p in pairs}, key=lambda p: _order(seed, p))
    held_out = set(prompts[: max(1, round(len(prompts) * config.eval_fraction))])
    train = [p for p in pairs if _key(p.prompt) not in held_out]
    evaluation = [p for p in pairs if _key(p.prompt) in held_out]
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
    return [PromptRow(p) for p in {_key(pair.prompt): pair.prompt for pair in pairs}.values()]


def _summary(config: DataConfig, parts: Parts, left_out: dict[str, int]) -> dict[str, Any]:
    train: Sequence[Pair] = parts[files.PAIRS_TRAIN]
    longer = sum(len(p.chosen) > len(p.rejected) for p in train) / len(train)
    return {
        "source": Path(config.source).name if "://" not in config.source else config.source,
        "demonstrations": len(parts[files.DEMONSTRATIONS]),
        "pairs_train": len(train),
        "pairs_eval": len(parts[files.PAIRS_EVAL]),
        "prompts_train": len(parts[files.PROMPTS_TRAIN]),
        "prompts_eval": len(parts[files.PROMPTS_EVAL]),
        "chosen_longer": longer,
        "left_out": left_out,
    }
