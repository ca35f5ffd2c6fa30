"""Sketch of a dataset: bounded counts by which drift is measured without its texts.

`sketch.json` holds, of at most SAMPLE prompts drawn by a hash, how often tokens fall into each of
BUCKETS buckets and texts into each class of length, in GROUPS groups of prompts; beside them the
rates and shares of the data card. The groups tell how much the counts vary by chance when texts,
not tokens, are drawn. No text is in it: about a hundred words share each bucket, and pairs whose
label is compared are hashes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.data.rows import (
    CARD,
    DEMONSTRATIONS,
    PAIRS_EVAL,
    PAIRS_TRAIN,
    PROMPTS_TRAIN,
    Demonstration,
    Pair,
    Prompt,
    PromptRow,
    messages_of,
    read_rows,
)
from rlhf.files import read_json

SKETCH = "sketch.json"
#: Of the file; a sketch of another version is computed anew from the Parquet files.
VERSION = 1
#: Most prompts, and pairs of one prompt, that are counted.
SAMPLE = 3_000
PAIRS_OF_A_PROMPT = 4
#: Pairs whose label is kept, so that it can be compared where another dataset has them too.
MAX_PREFERRED = 2_000
BUCKETS = 512
GROUPS = 32
#: Longest part of a text whose tokens are counted, in characters.
MAX_CHARS = 8_000

#: Numbers, runs of letters, and all other signs one by one.
_TOKEN = re.compile(r"\d+|[^\W\d_]+|[^\w\s]|_")
#: From here on most scripts write without spaces between words or without case.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")

#: Kinds of text, and the kind that takes the place of one that a dataset has not of its own.
FALLBACK = {"PPO prompts": "prompts", "demonstrations": "chosen replies"}


@dataclass(frozen=True)
class TextCounts:
    """Counts of one kind of text, by group."""

    texts: list[int]
    tokens: list[list[int]]
    """By group and bucket."""
    lengths: list[list[int]]
    """By group and class of length (`length_class`); trailing zeros are left out."""


@dataclass(frozen=True)
class Sketch:
    """Counts of a dataset, as `sketch.json` holds them."""

    version: int
    prompts: int
    """Different prompts of the pairs, all of them."""
    pairs: int
    texts: dict[str, TextCounts]
    """By kind of text: prompts, chosen replies, rejected replies, and, where they are not those of
    the pairs, PPO prompts and demonstrations."""
    longer: list[tuple[int, float]]
    """By group: pairs, and those whose longer reply is preferred (equal lengths count a half)."""
    preferred: dict[str, int]
    """By hash of a pair, whichever reply is preferred: 1 if it is the one that sorts first."""
    rates: dict[str, tuple[float, int]]
    """Share and number of observations of each rate of the labels."""
    shares: dict[str, dict[str, int]]
    """Counts by value of languages and of each column of slices."""


def make_sketch(
    pairs: Iterable[Pair],
    prompts: Sequence[Prompt],
    demonstrations: Sequence[Demonstration],
    card: Mapping[str, Any],
) -> Sketch:
    """Count a dataset, whose pairs are read one after the other.

    Args:
        pairs: Pairs of all parts.
        prompts: Prompts that PPO answers.
        demonstrations: What SFT learns.
        card: Figures of its data card (`card.json`); may be empty.
    """
    sample: dict[str, list[Pair]] = {}
    seen = [array("Q"), array("Q")]
    for pair in pairs:
        key = _text(pair.prompt)
        seen[0].append(_digest(key))
        if demonstrations:
            seen[1].append(_digest(pair.chosen))
        kept = sample.setdefault(key, [])
        if len(kept) < PAIRS_OF_A_PROMPT:
            kept.append(pair)
        if len(sample) > 2 * SAMPLE:
            sample = {key: sample[key] for key in _sample(sample)}
    known, chosen = (np.unique(np.frombuffer(digests, np.uint64)) for digests in seen)
    sample = {key: sample[key] for key in _sample(sample)}
    own_prompts = _without({_text(prompt): "" for prompt in prompts}, known)
    # By reply: SFT may learn several replies to one prompt.
    own_replies = _without({d.response: _text(d.prompt) for d in demonstrations}, chosen)
    replies = [(key, p.chosen, p.rejected) for key, some in sample.items() for p in some]
    texts = {
        "prompts": _count((key, key) for key in sample),
        "chosen replies": _count((key, text) for key, text, _ in replies),
        "rejected replies": _count((key, text) for key, _, text in replies),
    }
    if own_prompts:
        texts["PPO prompts"] = _count((key, key) for key in _sample(own_prompts))
    if own_replies:
        texts["demonstrations"] = _count((own_replies[r], r) for r in _sample(own_replies))
    longer = [(0, 0.0)] * GROUPS
    for key, better, worse in replies:
        n, wins = longer[_group(key)]
        tied = len(better) == len(worse)
        longer[_group(key)] = (n + 1, wins + (0.5 if tied else len(better) > len(worse)))
    return Sketch(
        VERSION, len(known), len(seen[0]), texts, longer, dict(_preferred(replies)),
        dict(_rates(card)), dict(_shares(card)),
    )  # fmt: skip


def write_sketch(
    out_dir: Path,
    pairs: Iterable[Pair],
    prompts: Sequence[Prompt],
    demonstrations: Sequence[Demonstration],
) -> None:
    """Write `sketch.json` beside a data card that has been written."""
    sketch = make_sketch(pairs, prompts, demonstrations, read_json(out_dir / CARD))
    text = json.dumps(asdict(sketch), ensure_ascii=False, separators=(",", ":"))
    (out_dir / SKETCH).write_bytes(text.encode("utf-8", "replace") + b"\n")


def read_sketch(folder: Path) -> Sketch:
    """Read a dataset's sketch; of an older dataset without one, count its files.

    Raises:
        OSError: The dataset has no pairs.
    """
    path = folder / SKETCH
    if path.exists():
        saved: dict[str, Any] = read_json(path)
        if saved.get("version") == VERSION:
            texts = {kind: TextCounts(**counts) for kind, counts in saved.pop("texts").items()}
            longer = [(n, wins) for n, wins in saved.pop("longer")]
            rates = {name: (share, n) for name, (share, n) in saved.pop("rates").items()}
            return Sketch(**saved, texts=texts, longer=longer, rates=rates)
    card = folder / CARD
    return make_sketch(
        [p for name in (PAIRS_TRAIN, PAIRS_EVAL) for p in read_rows(folder / name, Pair)],
        [row.prompt for row in read_rows(folder / PROMPTS_TRAIN, PromptRow)],
        read_rows(folder / DEMONSTRATIONS, Demonstration),
        read_json(card) if card.exists() else {},
    )


def tokens_of(text: str) -> list[str]:
    """Return a text's tokens: words, signs, 0 for a number; characters of scripts without spaces.

    Case is ignored. No model's tokenizer, so that data of two models can be compared.
    """
    tokens = []
    for token in _TOKEN.findall(text[:MAX_CHARS].casefold()):
        if token.isascii():
            tokens.append("0" if token[0].isdigit() else token)
        elif token[0].isdigit():
            tokens.append("0")
        elif _UNSPACED.match(token):
            tokens += token
        else:
            tokens.append(token)
    return tokens


def bucket_of(token: str) -> int:
    """Return a token's bucket, 0 to BUCKETS − 1."""
    return zlib.crc32(token.encode("utf-8", "replace")) % BUCKETS


def length_class(characters: int) -> int:
    """Return a length's class; each is √2 times as long as the one before it."""
    return round(2 * math.log2(characters + 1))


def _text(prompt: Prompt) -> str:
    """Return all that a prompt says, as the key by which it is drawn."""
    return "\n".join(message["content"] for message in messages_of(prompt))


def _hash(key: str) -> int:
    return zlib.crc32(key.encode("utf-8", "replace"))


def _digest(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _without(texts: dict[str, str], digests: NDArray[np.uint64]) -> dict[str, str]:
    """Return the entries whose keys' digests are none of these, which are sorted."""
    keys = np.array([_digest(text) for text in texts], np.uint64)
    is_known = np.isin(keys, digests)
    return {text: texts[text] for text, known in zip(texts, is_known, strict=True) if not known}


def _group(key: str) -> int:
    # The low bits: those that sampling decides by are the high ones.
    return _hash(key) % GROUPS


def _sample(keys: Iterable[str]) -> list[str]:
    """Return the texts with the lowest hashes: mostly the same ones when the data grow."""
    return sorted(keys, key=lambda key: (_hash(key), key))[:SAMPLE]


def _count(texts: Iterable[tuple[str, str]]) -> TextCounts:
    """Count texts, each given with the key of its group."""
    tokens = [Counter[str]() for _ in range(GROUPS)]
    lengths = [Counter[int]() for _ in range(GROUPS)]
    numbers = [0] * GROUPS
    for key, text in texts:
        group = _group(key)
        numbers[group] += 1
        tokens[group].update(tokens_of(text))
        lengths[group][length_class(len(text))] += 1
    longest = max((max(counts, default=0) for counts in lengths), default=0)
    table: list[list[int]] = []
    for counts in tokens:
        row = [0] * BUCKETS
        for token, count in counts.items():
            row[bucket_of(token)] += count
        table.append(row)
    classes = [[counts[k] for k in range(longest + 1)] for counts in lengths]
    return TextCounts(numbers, table, classes)


def _preferred(replies: Sequence[tuple[str, str, str]]) -> Iterator[tuple[str, int]]:
    for key, better, worse in replies[:MAX_PREFERRED]:
        pair = "\0".join((key, *sorted((better, worse))))
        digest = hashlib.blake2b(pair.encode("utf-8", "replace"), digest_size=6).hexdigest()
        yield digest, int(better < worse)


def _rates(card: Mapping[str, Any]) -> Iterator[tuple[str, tuple[float, int]]]:
    """Yield the rates of a data card that depend on labels, without that of longer replies."""
    rates = {
        "first reply preferred": card.get("position"),
        "votes that agree": (card.get("repeats") or {}).get("pairwise"),
    }
    for name, bias in (card.get("formats") or {}).items():
        rates[f"reply with {name} preferred"] = bias.get("wins")
    for name, rate in rates.items():
        if rate:
            yield name, (rate["share"], rate["n"])


def _shares(card: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, int]]]:
    languages = card.get("languages") or {}
    if languages:
        yield "languages", {code: round(r["share"] * r["n"]) for code, r in languages.items()}
    for column, values in (card.get("slices") or {}).items():
        yield f"slices by {column}", {name: rate["n"] for name, rate in values.items()}
