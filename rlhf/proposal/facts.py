"""Facts that a proposed configuration follows from: the data, their tokens, the machine."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf.config import PipelineConfig
from rlhf.data.partition import JUDGE_MIN_PROMPTS, Partition, check_sizes, partition
from rlhf.data.prepare import Reading, read_pairs
from rlhf.data.prompt_fields import PromptFields
from rlhf.data.quarantine import Quarantine
from rlhf.data.rendering import Renderer
from rlhf.data.rows import Pair, Prompt, messages_of
from rlhf.errors import DataError, PromptUnusable

#: Rows that are read of each file. More change no choice: from here on nothing grows with the data.
ROWS = 50_000
#: Pairs whose tokens are counted, evenly spaced; a quantile of 95 % is known within 1 %.
MEASURED = 2_000
#: A prompt's length that none reaches.
_ANY = 2**31 - 1
#: Largest number of characters of a prompt or a reply that is looked at.
MOST_CHARS = 10**6


@dataclass(frozen=True)
class DataFacts:
    """Numbers of rows, pairs and prompts, by the split that a run will make."""

    rows: int
    is_begun: bool
    """Whether only the first rows of a file were read."""
    formats: str
    pairs: int
    """Pairs to train on."""
    prompts: int
    """Their different prompts."""
    held_out_pairs: int
    held_out_prompts: int
    judge_pairs: int
    has_own_held_out: bool
    """Whether the source has a test part of its own."""
    eval_fraction: float
    lengths_differ: bool
    """Whether the preferred reply of a held-out pair is the longer one in some, and not in all."""
    longest_prompt: int
    """In characters, as is the next."""
    longest_reply: int
    sample: Sequence[Pair]
    """Pairs by which tokens are counted."""
    left_out: str
    """Commonest reasons for which rows are left out, or ""."""
    warnings: tuple[str, ...]
    """What the pairs teach besides quality."""
    notes: tuple[str, ...]
    """What was guessed while the rows were read."""

    @property
    def at_least(self) -> str:
        """`at least ` if there are more rows than were read."""
        return "at least " if self.is_begun else ""


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a sample of pairs, by the tokenizer and template of the base."""

    prompt: NDArray[np.int64]
    chosen: NDArray[np.int64]
    """Of the preferred reply, with its end."""
    longer: NDArray[np.int64]
    """Of the longer of both replies."""

    def __len__(self) -> int:
        return len(self.prompt)

    def share_that_ends(self, tokens: int) -> float:
        """Return the share of preferred replies that end within so many tokens."""
        return float((self.chosen <= tokens).mean())


@dataclass(frozen=True)
class Machine:
    """The hardware that a configuration is for."""

    device: str
    """`cuda`, `mps` or `cpu`."""
    name: str
    memory: float
    """Bytes that are free."""
    cores: int
    has_bf16: bool = False

    @property
    def is_gpu(self) -> bool:
        """Whether it is an NVIDIA GPU, whose memory is known."""
        return self.device == "cuda"


@dataclass(frozen=True)
class Base:
    """A pretrained model to start from."""

    name: str
    """The last part of its path or id."""
    parameters: int
    context: int
    bytes_stored: float
    """Of a weight in its files."""
    has_template: bool
    """Whether it has a chat template of its own, so that it has learnt to answer."""

    @property
    def size(self) -> str:
        """Its number of parameters, such as `135 M`."""
        count = self.parameters
        return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def read_data(
    config: PipelineConfig, fraction_for: Callable[[int], float], limit: int = ROWS
) -> DataFacts:
    """Read the pairs as a run does, and divide them as it will.

    Args:
        config: Source, columns, and what else is given of section `data`.
        fraction_for: Returns the share to hold out of a number of prompts.
        limit: Read at most this many rows of each file.

    Raises:
        ConfigError: The source does not exist, or its format is not known.
        DataError: A run would stop at these rows.
        StoreError: The S3 server can't be reached.
    """
    quarantine = Quarantine(personal_data=config.data.personal_data)
    reading = read_pairs(
        config.data, config.store_options, quarantine, PromptFields(config.data), limit=limit
    )
    prompts = len(np.unique(reading.pairs.prompt))
    fraction = fraction_for(prompts)
    data = config.data.model_copy(update={"eval_fraction": fraction})
    parts = partition(reading.pairs, reading.held_out, data, config.seed, reading.note)
    assert reading.sources is not None
    reading.ledger.close(reading.sources.leave_out)
    for source in reading.sources.all:
        source.check(data.max_bad_fraction)
    left_out = quarantine.in_words()
    check_sizes(parts, bool(reading.held_out), left_out, data, quarantine.main_cure(reading.rows))
    is_begun = any(source.rows >= limit for source in reading.sources.all)
    return _facts(reading, parts, fraction, is_begun, left_out, quarantine)


def _facts(
    reading: Reading, parts: Partition, fraction: float, is_begun: bool, left_out: str,
    quarantine: Quarantine,
) -> DataFacts:  # fmt: skip
    from rlhf.data.audit import Evidence, audit_pairs, left_out_reasons
    from rlhf.data.findings import find

    used = [*parts.used().once().written()]
    reasons = left_out_reasons(quarantine.ordered(), quarantine.examples)
    evidence = Evidence(reading.tallies, reading.totals, reading.rows, reasons)
    found = find(audit_pairs(used, evidence, with_languages=False))
    longer = {len(p.chosen) > len(p.rejected) for p in parts.held_out.written()}
    train, held_out, judge = parts.prompts
    return DataFacts(
        rows=reading.rows, is_begun=is_begun, formats=", ".join(reading.formats),
        pairs=len(parts.in_train), prompts=train,
        held_out_pairs=len(parts.in_held_out), held_out_prompts=held_out,
        judge_pairs=len(parts.in_judge) if judge else 0,
        has_own_held_out=bool(reading.held_out), eval_fraction=fraction,
        lengths_differ=len(longer) > 1,
        longest_prompt=max(map(_characters, (pair.prompt for pair in used))),
        longest_reply=max(max(len(pair.chosen), len(pair.rejected)) for pair in used),
        sample=_spaced(used, MEASURED), left_out=left_out,
        warnings=tuple(finding.text for finding in found if finding.level == "warning"),
        notes=(*reading.notes, *reading.personal.notes),
    )  # fmt: skip


def count_tokens(pairs: Sequence[Pair], renderer: Renderer) -> TokenCounts:
    """Count the tokens of pairs; those whose prompt the chat template refuses are left out.

    Raises:
        DataError: It refuses all of them.
    """
    rows: list[tuple[int, int, int]] = []
    refusal: PromptUnusable | None = None
    for pair in pairs:
        try:
            prompt = len(renderer.encode_prompt(pair.prompt, _ANY))
        except PromptUnusable as error:
            refusal = error
            continue
        chosen, rejected = (
            len(renderer.encode_reply(reply)) for reply in (pair.chosen, pair.rejected)
        )
        rows.append((prompt, chosen, max(chosen, rejected)))
    if not rows:
        raise DataError(f"data.source: no prompt can be used with this base: {refusal}")
    return TokenCounts(*np.array(rows, dtype=np.int64).T)


def share_lost(pairs: Sequence[Pair], renderer: Renderer, most: int) -> float:
    """Return the share of pairs whose prompt does not fit in so many tokens, turns left out."""
    lost = 0
    for pair in pairs:
        try:
            renderer.encode_prompt(pair.prompt, most)
        except PromptUnusable:
            lost += 1
    return lost / len(pairs)


def quantile(counts: NDArray[np.int64], share: float) -> int:
    """Return the least count that a share of the values does not exceed."""
    return int(np.quantile(counts, share, method="higher"))


def texts_of(pairs: Sequence[Pair]) -> Iterator[str]:
    """Yield prompts and replies, for training a tokenizer."""
    for pair in pairs:
        yield from (message["content"] for message in messages_of(pair.prompt))
        yield pair.chosen
        yield pair.rejected


def find_machine(device: str) -> Machine:
    """Return the device that `runtime.device` selects here, and its free memory."""
    import psutil
    import torch

    from rlhf.estimate import available_bytes

    allowed = len(os.sched_getaffinity(0))
    cores = max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))
    memory = available_bytes(device)
    if device in ("auto", "cuda") and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return Machine("cuda", name, memory, cores, torch.cuda.is_bf16_supported())
    if device in ("auto", "mps") and torch.backends.mps.is_available():
        return Machine("mps", "Apple's GPU", memory, cores)
    return Machine("cpu", f"{cores} CPU cores", memory, cores)


def has_judge(prompts: int) -> bool:
    """Return whether a run takes a share of so many prompts for a judge by itself."""
    return prompts >= JUDGE_MIN_PROMPTS


def _spaced(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """Return at most so many of the pairs, evenly spaced."""
    step = max(1, math.ceil(len(pairs) / count))
    return list(pairs[::step])


def _characters(prompt: Prompt) -> int:
    return sum(len(message["content"]) for message in messages_of(prompt))
