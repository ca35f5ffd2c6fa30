"""Public suites for reward models: their files, read in the suites' own layouts.

| suite | columns | replies |
|---|---|---|
| RewardBench 2 | prompt, chosen, rejected (lists), num_correct, subset, id | 1 right, 3 wrong |
| RewardBench | prompt, chosen, rejected (texts), subset | 1 right, 1 wrong |
| RM-Bench | prompt, chosen, rejected (three styles each), domain | 3 right, 3 wrong |

Sources: the dataset cards of allenai/reward-bench-2, allenai/reward-bench and THU-KEG/RM-Bench.
`suite_scores` has the scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any, Literal

from rlhf.data.content import MalformedError, ReadOptions
from rlhf.data.readers import ENDINGS, ending, is_metadata, read_records
from rlhf.data.records import LeftOutError, Record
from rlhf.data.rows import Prompt
from rlhf.errors import ConfigError, DataError
from rlhf.files import file_sha256, is_dir, is_file

LayoutName = Literal["RewardBench 2", "RewardBench", "RM-Bench"]
REWARD_BENCH_2: LayoutName = "RewardBench 2"
REWARD_BENCH: LayoutName = "RewardBench"
RM_BENCH: LayoutName = "RM-Bench"
#: Subset of RewardBench 2 with several right replies, which is scored by a rule of its own.
TIES = "ties"
#: Domains of RM-Bench: `safety-refuse` and `safety-response` are of `safety`.
DOMAINS = ("chat", "code", "math", "safety")
#: Styles of RM-Bench's replies, in their order.
STYLES = ("concise", "detailed", "markdown")
#: Largest share of rows that may be unusable, as `data.max_bad_fraction` is for training data.
MAX_BAD_FRACTION = 0.1
#: Rows by which a file's layout is told.
_SAMPLE = 20
_ROW_MB = 64


@dataclass(frozen=True)
class Item:
    """A prompt with replies, of which the first `right` ones are right."""

    prompt: Prompt
    replies: tuple[str, ...]
    right: int
    group: str
    """Subset or domain."""
    id: str = ""
    """Id in the suite: of a tie `ref:<number>` or `tied:<number>`."""

    @property
    def key(self) -> str:
        """Text by which rows with the same prompt are told."""
        return repr(self.prompt)


@dataclass
class Suite:
    """Items of a suite, and what became of its rows."""

    layout: LayoutName
    items: list[Item] = field(default_factory=list[Item])
    files: dict[str, str] = field(default_factory=dict[str, str])
    """sha256 by name."""
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter[str])
    """Rows that can't be used, by reason."""
    examples: dict[str, str] = field(default_factory=dict[str, str])
    """First row of each reason."""
    notes: list[str] = field(default_factory=list[str])

    def leave_out(self, reason: str, place: str) -> None:
        """Count a row that can't be used."""
        self.left_out[reason] += 1
        self.examples.setdefault(reason, place)

    def check(self) -> None:
        """Refuse a suite of which too little is left for its score to mean anything.

        Raises:
            DataError: No item is left, or more than a tenth of the rows can't be used.
        """
        bad = self.left_out.total()
        if self.items and bad <= MAX_BAD_FRACTION * self.rows:
            return
        reasons = ", ".join(
            f"{count:,} × {reason} (first: {self.examples[reason]})"
            for reason, count in self.left_out.most_common(3)
        )
        raise DataError(
            f"--suite: {bad:,} of {self.rows:,} rows can't be used, so that the score would be "
            f"another suite's: {reasons or 'there are none'}; mend or download the files again"
        )


def read_suite(path: Path) -> Suite:
    """Read a suite from a folder (or one file) of JSON, JSON lines or Parquet.

    Rows that stand in another file too count once: RM-Bench's repository holds all rows in one
    file, and again by domain.

    Raises:
        ConfigError: There is no such path, or it holds no readable file.
        DataError: A file can't be parsed, has another layout than the known ones or than another
            file, or too many rows can't be used.
    """
    files = _files(path)
    suite: Suite | None = None
    named_first = ""
    seen: dict[str, str] = {}
    notes: list[str] = []
    for name, file in files.items():
        records = _records(name, file, notes)
        sample = [*islice(records, _SAMPLE)]
        if not sample:
            raise DataError(f"--suite {str(path)!r}: {name} holds no rows; download it again")
        layout = _layout_of(name, sample)
        if suite is None:
            suite, named_first = Suite(layout, notes=notes), name
        elif layout != suite.layout:
            raise DataError(
                f"--suite {str(path)!r}: {name} is of {layout}, and {named_first} of "
                f"{suite.layout}; give a folder with one suite"
            )
        suite.files[name] = file_sha256(file)
        _add(suite, name, chain(sample, records), seen)
    assert suite is not None
    suite.check()
    return suite


def _files(path: Path) -> dict[str, Path]:
    """Return the data files under a path by name, in order.

    RewardBench's card has two splits, of which the leaderboard scores `filtered`.

    Raises:
        ConfigError: There is none.
    """
    if is_file(path):
        return {path.name: path}
    if not is_dir(path):
        raise ConfigError(
            f"--suite {str(path)!r}: no such folder; download the suite's files there, for example "
            "those of allenai/reward-bench-2 or THU-KEG/RM-Bench"
        )
    found = sorted(p for p in path.rglob("*") if p.is_file())
    names = {p.relative_to(path).as_posix(): p for p in found}
    files = {n: p for n, p in names.items() if ending(n) in ENDINGS and not is_metadata(n)}
    if not files:
        raise ConfigError(
            f"--suite {str(path)!r}: holds no file that can be read; use {', '.join(ENDINGS)} "
            "(also .gz)"
        )
    stems = {name: PurePath(name).name for name in files}
    if any(stem.startswith("filtered") for stem in stems.values()):
        files = {name: p for name, p in files.items() if not stems[name].startswith("raw")}
    return files


class _Options(ReadOptions):
    """Limits of a suite's files, which no setting changes."""

    def too_long(self, position: str, hint: str = "") -> MalformedError:
        """Return the error for a row over the limit."""
        return MalformedError(f"{position}: a row of more than {_ROW_MB} MB, as no suite has")


def _records(name: str, file: Path, notes: list[str]) -> Iterator[Record]:
    def note(text: str) -> None:
        notes.append(f"{name}: {text}")

    try:
        yield from read_records(file, name, _Options(max_row_mb=_ROW_MB), note)
    except (MalformedError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"--suite: {name} can't be parsed ({reason}); download it again") from None


def _layout_of(name: str, sample: Sequence[Record]) -> LayoutName:
    """Return the layout of a file's first rows.

    Raises:
        DataError: It is none of those known.
    """
    rows = [record.fields for record in sample if record.fields is not None]
    if not rows:
        raise DataError(
            f"--suite: {name} can't be parsed (row {sample[0].line}: {sample[0].fault}); download "
            "it again"
        )
    columns = [*dict.fromkeys(key for row in rows for key in row)]
    has_lists = any(isinstance(row.get(c), list) for row in rows for c in ("chosen", "rejected"))
    if {"prompt", "chosen", "rejected"} <= {*columns}:
        if has_lists and {"num_correct", "subset"} <= {*columns}:
            return REWARD_BENCH_2
        if has_lists and ("domain" in columns or _domain_of_file(name)):
            return RM_BENCH
        if not has_lists and "subset" in columns:
            return REWARD_BENCH
    listed = ", ".join(str(column)[:40] for column in columns[:20])
    raise DataError(
        f"--suite: {name} has the columns {listed}, and is of no known layout; RewardBench 2 has "
        "prompt, chosen and rejected (lists), num_correct and subset; RM-Bench prompt, chosen and "
        "rejected (three each) and domain; RewardBench prompt, chosen, rejected (texts) and subset"
    )


def _add(suite: Suite, name: str, records: Iterator[Record], seen: dict[str, str]) -> None:
    """Add the items of a file's rows."""
    convert = _CONVERTERS[suite.layout]
    repeated = 0
    for record in records:
        suite.rows += 1
        try:
            if record.fields is None:
                raise LeftOutError("row can't be parsed", record.fault)
            item = convert(record.fields, name)
        except LeftOutError as error:
            detail = f" ({error.detail})" if error.detail else ""
            suite.leave_out(error.reason, f"{name}:{record.line}{detail}")
            continue
        content = repr((item.prompt, item.replies, item.right, item.group))
        if seen.setdefault(content, name) != name:
            repeated += 1
            continue
        suite.items.append(item)
    if repeated:
        suite.rows -= repeated
        suite.notes.append(f"{repeated:,} rows of {name} stand in another file too, and count once")


def _item_of_two(row: Mapping[str, Any], name: str) -> Item:
    """Convert a row of RewardBench."""
    replies = (_text(row, "chosen"), _text(row, "rejected"))
    return Item(_prompt(row), replies, 1, _group(row, "subset"), _id(row))


def _item_of_four(row: Mapping[str, Any], name: str) -> Item:
    """Convert a row of RewardBench 2."""
    prompt, group, own = _prompt(row), _group(row, "subset"), _id(row)
    chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
    number = row.get("num_correct")
    if number != len(chosen):
        raise LeftOutError(
            "num_correct is not the number of chosen replies", f"{str(number)[:20]}, {len(chosen)}"
        )
    if group.lower() != TIES:
        if len(chosen) != 1:
            raise LeftOutError("several chosen replies outside of Ties", f"{len(chosen)}")
    elif tie_of(own) is None:
        raise LeftOutError("id of a tie is neither ref:<number> nor tied:<number>", own[:40])
    elif len(chosen) < 2 and own.startswith("tied"):
        raise LeftOutError("a tie with a single right reply", own[:40])
    return Item(prompt, (*chosen, *rejected), len(chosen), group, own)


def tie_of(own: str) -> tuple[str, int] | None:
    """Return the kind and number in the id of a tie, such as `("ref", 3)`; None of another id."""
    kind, colon, number = own.partition(":")
    is_one = kind in ("ref", "tied") and colon and number.isdecimal()
    return (kind, int(number)) if is_one else None


def _item_of_styles(row: Mapping[str, Any], name: str) -> Item:
    """Convert a row of RM-Bench."""
    prompt = _prompt(row)
    chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
    if len(chosen) != len(STYLES) or len(rejected) != len(STYLES):
        raise LeftOutError("not three replies of each side", f"{len(chosen)}, {len(rejected)}")
    own = row.get("domain")
    domain = _domain_of_file(name) if own is None else _beginning(str(own))
    if domain is None:
        raise LeftOutError(f"domain is none of {', '.join(DOMAINS)}", str(own)[:40])
    return Item(prompt, (*chosen, *rejected), len(chosen), domain, _id(row))


def _domain_of_file(name: str) -> str | None:
    """Return the domain that a file's name begins with: `chat_filtered.json`."""
    return _beginning(PurePath(name).name)


def _beginning(text: str) -> str | None:
    return next((domain for domain in DOMAINS if text.lower().startswith(domain)), None)


_CONVERTERS = {
    REWARD_BENCH: _item_of_two,
    REWARD_BENCH_2: _item_of_four,
    RM_BENCH: _item_of_styles,
}


def _prompt(row: Mapping[str, Any]) -> Prompt:
    value = row.get("prompt")
    if isinstance(value, str) and value.strip():
        return value
    if value is None or value in ("", []) or isinstance(value, str):
        raise LeftOutError("prompt is missing")
    if isinstance(value, list) and all(map(_is_message, value)):
        messages = [{"role": m["role"], "content": m["content"]} for m in value]
        if messages[-1]["role"] == "user":
            return messages
    raise LeftOutError("prompt is neither text nor messages up to a user's", _start(value))


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") in ("system", "user", "assistant")
        and isinstance(value.get("content"), str)
    )


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        raise LeftOutError(f"{column} is missing")
    if not isinstance(value, str):
        raise LeftOutError(f"{column} is no text", _start(value))
    return value


def _texts(row: Mapping[str, Any], column: str) -> list[str]:
    value = row.get(column)
    if value is None or value == []:
        raise LeftOutError(f"{column} is missing")
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise LeftOutError(f"{column} is no list of texts", _start(value))
    return value


def _group(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise LeftOutError(f"{column} is missing")
    return value


def _id(row: Mapping[str, Any]) -> str:
    value = row.get("id")
    return "" if value is None else str(value)


def _start(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]}"
