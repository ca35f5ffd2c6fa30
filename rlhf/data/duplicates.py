"""Near-duplicate texts: MinHash signatures, banded LSH, and the exact Jaccard similarity.

Similarity is J(A, B) = |A ∩ B| / |A ∪ B| of two texts' sets of character 5-grams. Signatures only
propose candidates, by the banding of Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets",
section 3.4; each candidate is verified exactly. So a change of the signatures (another version of
rensa) can change which duplicates are overlooked, never which texts are called similar.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import regex
from numpy.typing import NDArray
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  # no stubs

from rlhf.data import spill
from rlhf.data.chat import loose_text
from rlhf.data.spill import Scratch, runs

#: Characters of a shingle. Chinese, Japanese, Korean and Thai ones count as two.
SHINGLE = 5
#: Values of a signature.
PERMUTATIONS = 128
#: Least probability of finding a pair whose similarity is the threshold itself.
RECALL = 0.995
#: Shingles that more than this share of the texts have are a template, which is not compared.
TEMPLATE_SHARE = 1 / 3
#: Up to this many texts with a shingle, it is no template.
MIN_COMMON = 5

_TEMPLATE_SAMPLE = 2000
#: Sets of shingles that are held: of texts of 8,000 characters, these are 100 MB.
_SETS = 128
#: Arrays of a batch fit into a processor's cache.
_BATCH_CHARS = 60_000
#: A bucket's later members are compared with this many first ones.
_MAX_COMPARED = 16
#: Failed comparisons of one text, after which it is left alone: bounds the time for templates.
_MAX_FAILED = 20
_NOT_WORD = regex.compile(r"[^\p{L}\p{M}\p{N}]+")
_ASCII_WORDS = {code: " " for code in range(128) if not chr(code).isalnum()}
_WIDE = regex.compile(r"([\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}])")
_MULTIPLIER = 0x9E3779B97F4A7C15

Hashes = NDArray[np.uint64]
Numbers = NDArray[np.int64]


def bare_text(text: str) -> str:
    """Return a text's letters and numbers only, or, if it has none, the text without its case."""
    if text.isascii():  # three times as fast
        return " ".join(text.lower().translate(_ASCII_WORDS).split()) or loose_text(text)
    loose = loose_text(text)
    return _NOT_WORD.sub(" ", loose).strip() or loose


def width(text: str) -> int:
    """Return the length of a text in characters; Chinese, Japanese, Korean, Thai count twice."""
    return len(text) if text.isascii() else len(text) + len(_WIDE.findall(text))


class Shingles:
    """Sets of hashed character n-grams of bare texts, without those of a common template.

    Args:
        texts: Sample of distinct texts, which decides what is a template.
    """

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self._template = _template(texts)
        self._set = lru_cache(maxsize=_SETS)(self._set_of)

    def jaccard(self, one: str, other: str) -> float:
        """Return the Jaccard similarity of two bare texts, in [0, 1]."""
        return _jaccard(self._set(one), self._set(other))

    def is_similar(self, one: str, other: str, threshold: float) -> bool:
        """Return whether the similarity of two bare texts is at least `threshold`."""
        a, b = self._set(one), self._set(other)
        return min(len(a), len(b)) >= threshold * max(len(a), len(b)) and (
            _jaccard(a, b) >= threshold
        )

    def flat(self, texts: Sequence[str]) -> tuple[Hashes, Hashes]:
        """Return the hashes of all texts' shingles, and where each text's begin and end.

        Returns:
            `hashes` of shape (shingles,) with repeats, `offsets` of shape (texts + 1,): those of
            text i are `hashes[offsets[i] : offsets[i + 1]]`, at least one.
        """
        hashes, offsets = _windows(texts)
        if not len(self._template):
            return hashes, offsets
        rows = np.repeat(np.arange(len(texts)), np.diff(offsets.astype(np.int64)))
        is_own = ~_is_in(hashes, self._template)
        # A text that is all template has its own hash as the one shingle.
        counts = np.bincount(rows[is_own], minlength=len(texts))
        empty = np.flatnonzero(counts == 0)
        whole = np.array([_digest(texts[int(row)]) for row in empty], dtype=np.uint64)
        hashes, rows = np.append(hashes[is_own], whole), np.append(rows[is_own], empty)
        counts[empty] = 1
        ends = np.cumsum(counts, dtype=np.uint64)
        return hashes[np.argsort(rows, kind="stable")], np.append(np.uint64(0), ends)

    def _set_of(self, text: str) -> frozenset[int]:
        return frozenset(self.flat([text])[0].tolist())


class DisjointSets:
    """Union-find of the numbers below `size`."""

    def __init__(self, size: int) -> None:
        self._parent = array("q", range(size))

    def roots(self) -> Numbers:
        """Return the least number of each number's set."""
        roots = np.array(self._parent, dtype=np.int64)
        while not np.array_equal(higher := roots[roots], roots):
            roots = higher
        return roots

    def find(self, node: int) -> int:
        """Return the least number of a number's set."""
        parent = self._parent
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    def join(self, one: int, other: int) -> None:
        """Make one set of two numbers' sets."""
        one, other = self.find(one), self.find(other)
        self._parent[max(one, other)] = min(one, other)

    def join_equal(self, values: Numbers | Hashes) -> None:
        """Join the numbers of equal values, of shape (size,)."""
        order = np.argsort(values, kind="stable")
        same = np.flatnonzero(values[order[1:]] == values[order[:-1]])
        for place in same.tolist():
            self.join(int(order[place]), int(order[place + 1]))


def duplicate_groups(
    texts: Sequence[str],
    order: Numbers,
    threshold: float,
    seed: int = 0,
    folder: Path | None = None,
) -> Numbers:
    """Return the group of each text as the number of its first text by `order`.

    Texts are in one group if a chain of texts joins them of which each is at least as similar to
    the next as `threshold`. Of such pairs LSH overlooks less than 1 in 200.
    Texts are read once in their sequence, and those that may be similar once more, so they may
    stand in a file. In memory are 40 bytes a text.

    Args:
        texts: Distinct bare texts, of shape (texts,).
        order: The texts' numbers in an order that their content decides, of shape (texts,): with
            it, the result does not depend on their sequence.
        threshold: Least Jaccard similarity, in (0, 1].
        seed: Of the signatures: another one overlooks other pairs.
        folder: For a temporary file of the signatures; None takes the system's.

    Raises:
        DataError: The disk is full.
    """
    sample: list[int] = order[:: len(texts) // _TEMPLATE_SAMPLE + 1].tolist()
    shingles = Shingles([texts[number] for number in sample])
    sets = DisjointSets(len(texts))  # of places in `order`
    failed = bytearray(len(texts))
    for bucket in _buckets(texts, order, shingles, threshold, seed, folder):
        if len({sets.find(node) for node in bucket}) == 1:
            continue
        for position, node in enumerate(bucket):
            for other in bucket[: min(position, _MAX_COMPARED)]:
                if failed[node] >= _MAX_FAILED or sets.find(node) == sets.find(other):
                    continue
                if shingles.is_similar(
                    texts[int(order[node])], texts[int(order[other])], threshold
                ):
                    sets.join(node, other)
                else:
                    failed[node] += 1
    roots = sets.roots()
    groups = np.empty(len(texts), dtype=np.int64)
    groups[order] = order[roots]
    return groups


def bands(threshold: float) -> tuple[int, int]:
    """Return the number of bands and the rows of each, so that few duplicates are overlooked.

    Two texts of similarity s share a band with probability 1 − (1 − s^rows)^bands.
    """
    for rows in range(16, 1, -1):
        count = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** count >= RECALL:
            return count, rows
    return PERMUTATIONS, 1


def _buckets(
    texts: Sequence[str],
    order: Numbers,
    shingles: Shingles,
    threshold: float,
    seed: int,
    folder: Path | None,
) -> Iterator[list[int]]:
    """Give the sets of texts, by place in `order`, that agree in a band of their signatures."""
    count, rows = bands(threshold)
    keys = _BandKeys(count, len(texts), folder)
    for batch in _batches(texts):
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            *shingles.flat(batch), PERMUTATIONS, seed
        )
        values = np.array(matrix.to_rows(), dtype=np.uint64)[:, : count * rows]
        values = values.reshape(len(batch), count, rows)
        key = np.zeros((len(batch), count), dtype=np.uint64)
        for row in range(rows):
            key = _mixed(key * np.uint64(_MULTIPLIER) + values[:, :, row])
        keys.put(key.T)
    for number in range(count):
        band = keys.band(number)[order]
        places = np.argsort(band, kind="stable")
        starts, ends = runs(band[places])
        are_several = ends - starts > 1
        for start, end in zip(starts[are_several], ends[are_several], strict=True):
            yield places[start:end].tolist()


class _BandKeys:
    """Keys of all texts by band, in memory or, for many texts, in a file.

    Args:
        count: Number of bands.
        texts: Number of texts.
        folder: Of the file.
    """

    def __init__(self, count: int, texts: int, folder: Path | None) -> None:
        self._count, self._texts = count, texts
        self._scratch = Scratch(folder) if count * texts * 8 > spill.MEMORY else None
        size = min(texts, max(spill.MEMORY // (count * 8), 1)) if self._scratch else texts
        self._held = np.empty((count, size), dtype=np.uint64)
        self._start, self._filled = 0, 0

    def put(self, keys: Hashes) -> None:
        """Add keys of the next texts, of shape (bands, batch)."""
        done = 0
        while done < keys.shape[1]:
            size = min(keys.shape[1] - done, self._held.shape[1] - self._filled)
            self._held[:, self._filled : self._filled + size] = keys[:, done : done + size]
            self._filled, done = self._filled + size, done + size
            if self._filled == self._held.shape[1]:
                self._flush()

    def band(self, number: int) -> Hashes:
        """Return the keys of a band, of shape (texts,)."""
        if self._scratch is None:
            return self._held[number]
        self._flush()
        size = self._texts * 8
        return np.frombuffer(self._scratch.read(size, number * size), dtype=np.uint64)

    def _flush(self) -> None:
        if self._scratch is None or not self._filled:
            return
        for number, keys in enumerate(self._held[:, : self._filled]):
            at = (number * self._texts + self._start) * 8
            self._scratch.write(keys.tobytes(), at)
        self._start, self._filled = self._start + self._filled, 0


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield texts in batches of about _BATCH_CHARS."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _template(texts: Sequence[str]) -> Hashes:
    """Return the shingles of a template, sorted; none if the texts have no template.

    Shingles of more than TEMPLATE_SHARE of the texts are one if as many texts consist of them by
    more than half. Common words alone are none: a long text shares them with every other.
    """
    if len(texts) <= MIN_COMMON:
        return np.empty(0, dtype=np.uint64)
    found = []
    for batch in _batches(texts):
        hashes, offsets = _windows(batch)
        found += [np.unique(part) for part in np.split(hashes, offsets[1:-1].astype(np.int64))]
    values, counts = np.unique(np.concatenate(found), return_counts=True)
    limit = max(MIN_COMMON, TEMPLATE_SHARE * len(texts))
    template = values[counts > limit]
    texts_of_it = sum(_is_in(part, template).mean() > 0.5 for part in found)
    return template if texts_of_it > limit else template[:0]


def _is_in(hashes: Hashes, values: Hashes) -> NDArray[np.bool_]:
    """Return which hashes are among the sorted values; `np.isin` would sort all of the hashes."""
    if not len(values):
        return np.zeros(len(hashes), dtype=bool)
    places = np.searchsorted(values, hashes)
    return values[np.minimum(places, len(values) - 1)] == hashes


def _windows(texts: Sequence[str]) -> tuple[Hashes, Hashes]:
    """Return the hashes of all n-grams, and the offset of each text's."""
    padded = [
        (text if text.isascii() else _WIDE.sub(r"\1\1", text)).ljust(SHINGLE) for text in texts
    ]
    raw = "".join(padded).encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(raw, dtype="<u4").astype(np.uint64)
    lengths = np.fromiter(map(len, padded), dtype=np.int64, count=len(padded))
    if not len(lengths):
        return codes, np.zeros(1, dtype=np.uint64)
    hashes = np.zeros(len(codes) - SHINGLE + 1, dtype=np.uint64)
    for position in range(SHINGLE):
        hashes *= np.uint64(_MULTIPLIER)
        hashes += codes[position : position + len(hashes)]
    inside = np.ones(len(codes), dtype=bool)
    ends = np.cumsum(lengths)
    for back in range(1, SHINGLE):  # a window must not reach into the next text
        inside[ends - back] = False
    offsets = np.append(0, np.cumsum(lengths - SHINGLE + 1)).astype(np.uint64)
    return _mixed(hashes[inside[: len(hashes)]]), offsets


def _mixed(values: Hashes) -> Hashes:
    """Return each value with all bits mixed: the finaliser of SplitMix64, a bijection."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _digest(text: str) -> int:
    raw = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest())


def _jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)
