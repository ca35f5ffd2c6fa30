"""Sketch of a dataset: bounded counts by which drift is measured without its texts.

`sketch.json` holds, of at most SAMPLE prompts drawn by a hash, how often tokens fall into each of
BUCKETS buckets and texts into each class of length, in GROUPS groups of prompts; beside them the
rates and shares of the data card. The groups tell how much the counts vary by chance when texts,
not tokens, are drawn. No text is in it: about a hundred words share each bucket, and pairs whose
label is compared are hashes.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from rlhf.data.rows import (
    DEMONSTRATIONS,
    PAIRS_EVAL,
    PAIRS_TRAIN,
    PROMPTS_TRAIN,
    Demonstration,
    Pair,
    Prompt,
    PromptRow,
    iterate_rows,
    messages_of,
)
from rlhf.data.stored import read_card
from rlhf.errors import DataError
from rlhf.files import read_json

SKETCH = "sketch.json"
#: Of the file; a sketch of another version is computed anew from the Parquet files.
VERSION = 1
#: Most prompts, and pairs of one prompt, that are counted.
SAMPLE = 3_000
PAIRS_OF_A_PROMPT = 4
#: Most pairs of a prompt that are held meanwhile, all of which may be demonstrations.
MAX_ROWS = 64
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
REPLY_KINDS = ("chosen replies", "rejected replies")
#: A number of things that were counted; far beyond it numpy draws no samples.
Count = Annotated[int, Field(ge=0, le=2**40, strict=True)]


@dataclass(frozen=True)
class TextCounts:
    """Counts of one kind of text, by group."""

    texts: list[Count]
    tokens: list[list[Count]]
    """By group and bucket."""
    lengths: list[list[Count]]
    """By group and class of length (`length_class`); trailing zeros are left out."""


@dataclass(frozen=True)
class Sketch:
    """Counts of a dataset, as `sketch.json` holds them."""

    version: int
    prompts: Count
    """Different prompts of the pairs, all of them."""
    pairs: Count
    texts: dict[str, TextCounts]
    """By kind of text: prompts, chosen replies, rejected replies, and, where they are not those of
    the pairs, PPO prompts and demonstrations."""
    longer: list[tuple[Count, float]]
    """By group: pairs, and those whose longer reply is preferred (equal lengths count a half)."""
    preferred: dict[str, Count]
    """By hash of a pair, whichever reply is preferred: 1 if it is the one that sorts first."""
    rates: dict[str, tuple[float, Count]]
    """Share and number of observations of each rate of the labels."""
    shares: dict[str, dict[str, Count]]
    """Counts by value of languages and of each column of slices."""


_SKETCHES = TypeAdapter(Sketch)
#: Cure of all faults of the champion's data, which may be gone for good.
_WITHOUT = "set data.drift.enabled=false to go on without the comparison"


def make_sketch(
    pairs: Iterable[Pair],
    prompts: Iterable[Prompt],
    demonstrations: Iterable[Demonstration],
    card: Mapping[str, Any],
) -> Sketch:
    """Count a dataset in one pass; memory holds the sample alone.

    Args:
        pairs: Pairs of all parts.
        prompts: Prompts that PPO answers.
        demonstrations: What SFT learns.
        card: Figures of its data card (`card.json`); may be empty.
    """
    sample, count = _Sample(), 0
    for pair in pairs:
        sample.add(_text(pair.prompt), (pair.chosen, pair.rejected))
        count += 1
    replies = [
        (key, texts[0], texts[1])
        for key, all_of in sample.items()
        for texts in all_of[:PAIRS_OF_A_PROMPT]
    ]
    texts = {
        "prompts": _count((key, key) for key, _ in sample.items()),
        "chosen replies": _count((key, text) for key, text, _ in replies),
        "rejected replies": _count((key, text) for key, _, text in replies),
    }
    own_prompts, own_replies = _Sample(), _Sample()
    for prompt in prompts:
        own_prompts.add(_text(prompt), ("",))
    for row in demonstrations:
        own_replies.add(_text(row.prompt), (row.response,))
    if any(sample.lacks(key) for key, _ in own_prompts.items()):
        texts["PPO prompts"] = _count((key, key) for key, _ in own_prompts.items())
    drawn = [(key, reply) for key, some in own_replies.items() for (reply, *_) in some]
    if any(sample.lacks(key, reply) for key, reply in drawn):
        texts["demonstrations"] = _count(drawn)
    longer = [(0, 0.0)] * GROUPS
    for key, better, worse in replies:
        n, wins = longer[_group(key)]
        tied = len(better) == len(worse)
        longer[_group(key)] = (n + 1, wins + (0.5 if tied else len(better) > len(worse)))
    return Sketch(
        VERSION, sample.size(), count, texts, longer, dict(_preferred(replies)),
        dict(_rates(card)), dict(_shares(card)),
    )  # fmt: skip


def write_sketch(out_dir: Path, pairs: Iterable[Pair]) -> None:
    """Write `sketch.json` of a dataset whose other files have been written.

    Args:
        out_dir: Folder of the dataset.
        pairs: Its pairs, for training and held out.
    """
    sketch = _sketch_of(out_dir, pairs)
    # By `vars`: asdict copies each of the 50,000 counts, a fifth of the stage's time on few rows.
    text = json.dumps(vars(sketch), default=vars, ensure_ascii=False, separators=(",", ":"))
    (out_dir / SKETCH).write_bytes(text.encode("utf-8", "replace") + b"\n")


def read_sketch(folder: Path) -> Sketch:
    """Read a dataset's sketch; of an older dataset without one, count its files.

    Raises:
        DataError: `sketch.json`, or a file to count, is missing, damaged or edited.
    """
    path = folder / SKETCH
    if path.exists():
        try:
            saved = read_json(path)
            if not isinstance(saved, dict) or saved.get("version") == VERSION:
                sketch = _SKETCHES.validate_python(saved)
                _check(sketch)
                return sketch
        except (ValueError, RecursionError) as error:  # of JSON, UTF-8, pydantic or `_check`
            reason = str(error)
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise DataError(
                f"{SKETCH} is damaged ({' '.join(reason.split())[:120]}); restore the artifact, or "
                f"{_WITHOUT}"
            ) from None
    names = (PAIRS_TRAIN, PAIRS_EVAL)
    pairs = itertools.chain.from_iterable(iterate_rows(folder / name, Pair) for name in names)
    try:
        return _sketch_of(folder, pairs)
    except DataError as error:
        raise DataError(f"{error}, or {_WITHOUT}") from None


def _check(sketch: Sketch) -> None:
    """Refuse a sketch that no dataset has.

    Raises:
        ValueError: With the part.
    """
    known = {"prompts", *REPLY_KINDS}
    if not known <= sketch.texts.keys() <= known | FALLBACK.keys():
        raise ValueError(f"its kinds of text are {', '.join(sketch.texts)}")
    for kind, counts in sketch.texts.items():
        widths = {len(row) for row in counts.lengths}
        is_whole = (
            len(counts.texts) == len(counts.tokens) == len(counts.lengths) == GROUPS
            and all(len(row) == BUCKETS for row in counts.tokens)
            and len(widths) == 1
            and 0 not in widths
        )
        if not is_whole:
            raise ValueError(f"the table of {kind} is not of {GROUPS} groups and {BUCKETS} buckets")
    if len(sketch.longer) != GROUPS or any(not 0 <= wins <= n for n, wins in sketch.longer):
        raise ValueError("longer is no count of pairs by group")
    if any(not 0 <= share <= 1 or n < 1 for share, n in sketch.rates.values()):
        raise ValueError("rates are no shares")
    if any(not sum(counts.values()) for counts in sketch.shares.values()):
        raise ValueError("shares hold no counts")


def _sketch_of(folder: Path, pairs: Iterable[Pair]) -> Sketch:
    return make_sketch(
        pairs,
        (row.prompt for row in iterate_rows(folder / PROMPTS_TRAIN, PromptRow)),
        iterate_rows(folder / DEMONSTRATIONS, Demonstration),
        read_card(folder) or {},
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


def _group(key: str) -> int:
    # The low bits: those that sampling decides by are the high ones.
    return _hash(key) % GROUPS


class _Sample:
    """The SAMPLE texts with the lowest hashes: mostly the same ones when the data grow."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, str], list[tuple[str, ...]]] = {}
        self._highest: list[tuple[int, str]] = []
        self._is_full = False

    def add(self, key: str, row: tuple[str, ...]) -> None:
        """Add a row of a key, if the key is among the lowest so far."""
        place = (_hash(key), key)
        if place in self._rows:
            if len(self._rows[place]) < MAX_ROWS:
                self._rows[place].append(row)
            return
        if self._is_full and place > self._highest[-1]:
            return
        self._rows[place] = [row]
        bisect.insort(self._highest, place)
        if len(self._highest) > SAMPLE:
            self._is_full = True
            del self._rows[self._highest.pop()]

    def items(self) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
        """Yield keys and rows in the order of the hashes."""
        return ((place[1], self._rows[place]) for place in self._highest)

    def size(self) -> int:
        """Return the number of different keys, estimated within 2 % above SAMPLE.

        (k − 1) / U with the largest U of the k lowest hashes in (0, 1) (Bar-Yossef et al. 2002).
        """
        if not self._is_full:
            return len(self._highest)
        return round((SAMPLE - 1) * 2**32 / (self._highest[-1][0] + 1))

    def lacks(self, key: str, text: str | None = None) -> bool:
        """Return whether no row was added for a key, or none that begins with a text.

        False for a key that sampling would have left out, and where rows of a key were left out.
        """
        place = (_hash(key), key)
        if place not in self._rows:
            return not self._is_full or place < self._highest[-1]
        rows = self._rows[place]
        return text is not None and len(rows) < MAX_ROWS and text not in {row[0] for row in rows}


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
