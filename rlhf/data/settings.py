"""Cures for rows of no known format: the settings that are missing, and columns to set them to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

from rlhf.config import DataConfig
from rlhf.data.columns import Row, cell_of, filled_cells
from rlhf.data.ratings import RATINGS, REPLIES
from rlhf.data.scores import are_scores, beginning, is_score

#: Names of ratings that are read only where a setting names them.
_GRADES = ("grade", "grades", "stars")
#: Most columns, and most scores of replies, that a message lists.
_MOST, _MOST_PATHS = 6, 9
#: Columns of texts have more words than this in a cell, in the mean; others hold names or labels.
_WORDS = 1.5


def settings_to_make(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig, prompts: Set[str]
) -> str:  # fmt: skip
    """Return the settings that would make the rows readable, all at once, as a cure.

    Args:
        names: Columns by their plain names.
        sample: First rows.
        config: Settings that are made already.
        prompts: Names of columns that are taken for prompts without a setting.
    """
    texts = text_columns(names, sample, ())
    rating = next((names[n] for n in (*RATINGS, *_GRADES) if n in names and
                   are_scores(sample, names[n])), None)  # fmt: skip
    known = {name for name in ("prompt_column", "chosen_column", "rejected_column", "label_column")
             if getattr(config, name) is not None}  # fmt: skip
    known |= {"prompt_column"} if prompts & names.keys() else set()
    pairs = _missing(known, prompt="the prompt", chosen="the preferred reply",
                     rejected="the other one")  # fmt: skip
    known |= {"chosen_column"} if {*REPLIES} & names.keys() else set()
    rated = _missing(known, prompt="the prompt", chosen="the reply",
                     label=f"its rating, such as {rating}" if rating else "its rating")  # fmt: skip
    if pairs and "label_column" not in known:
        pairs = [*pairs, "data.label_column if another column says which is better"]
    ways = [("two replies in each row", pairs), ("one rated reply in each row", rated)]
    if rating is not None:
        ways.reverse()
    told = "; or for ".join(
        f"{rows} set {_joined(settings)}" for rows, settings in ways if settings
    )
    columns = f", from the columns of text {', '.join(texts)}" if texts else ""
    if not told:
        return (
            "check that the columns set hold the prompt and replies; docs/data.md shows the formats"
        )
    return f"for {told}{columns}; docs/data.md shows the formats"


def _missing(known: Set[str], **meanings: str) -> list[str]:
    """Return the settings of columns that are not known, each with its meaning."""
    named = {f"{name}_column": meaning for name, meaning in meanings.items()}
    return [f"data.{name} ({meaning})" for name, meaning in named.items() if name not in known]


def text_columns(
    names: Mapping[str, str], sample: Sequence[Row], without: Collection[str | None]
) -> list[str]:
    """Return columns of texts of several words, or without spaces, that may hold a prompt."""
    found = []
    for column in reversed([*names.values()]):  # in the order of the source
        texts = [v for row in sample if isinstance(v := cell_of(row, column), str) and v.strip()]
        if column in without or not texts:
            continue
        words = sum(_words(text) for text in texts) / len(texts)
        if words > _WORDS:
            found.append(column)
    return found[:_MOST]


def _words(text: str) -> float:
    """Return a number of words; scripts without spaces have about two characters a word."""
    return len(text.split()) + sum(ord(c) >= 0x0E00 for c in text) / 2


def score_paths(sample: Sequence[Row], column: str) -> list[str]:
    """Return the paths of scores inside of the replies of a list, as settings name them.

    Of `[{"text": …, "scores": {"bleu": 0.3}}]` in `candidates` this is `candidates.scores.bleu`.
    """
    lists = [v for row in sample if isinstance(v := cell_of(row, column), list | tuple)]
    found: dict[str, None] = {}
    for item in (item for items in lists for item in items if isinstance(item, Mapping)):
        for key, fields in item.items():
            inner = fields if isinstance(fields, Mapping) else {}
            numbers = [k for k, v in inner.items() if type(v) in (int, float)]
            found |= dict.fromkeys(f"{column}.{key}.{field}" for field in numbers)
    return [*found][:_MOST_PATHS]


def unread_rating(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig
) -> tuple[str, str] | None:
    """Return reason and cure where a column of ratings holds no numbers; None for other rows."""
    if config.chosen_column and config.rejected_column:
        return None
    columns = [config.label_column] if config.label_column else [
        names[n] for n in (*RATINGS, *_GRADES) if n in names
    ]  # fmt: skip
    for column in columns:
        values = filled_cells(sample, column)
        wrong = list(dict.fromkeys(beginning(value) for value in values if not is_score(value)))
        if not values or are_scores(sample, column) or not all(map(_is_short, values)):
            continue
        shown = ", ".join(map(repr, wrong[:3]))
        if all(len(value.rstrip("+-")) == 1 and value[0].isalpha() for value in wrong):
            worst, best = max(wrong), min(wrong)
            return (
                f"{column} rates with letters ({shown}), which are no numbers",
                f"replace each by a number, such as {best} by {ord(worst[0]) - ord(best[0])} and "
                f"{worst} by 0, in a column named score",
            )
        return (
            f"{column} holds {shown}, which are neither numbers in one form nor thumbs",
            "write all its values as numbers, such as 4.5, or as true and false",
        )
    return None


def _is_short(value: Any) -> bool:
    return isinstance(value, str | bool | int | float) and len(str(value)) < 25


def _joined(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]
