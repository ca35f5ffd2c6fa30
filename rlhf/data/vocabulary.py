"""Names of columns that some layout reads, to tell late columns that matter from those that don't.

Detecting a layout anew reads the first rows again, so it is done only for a column that could
change it: one with a known or configured name, or that another cell names.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

from rlhf.config import DataConfig
from rlhf.data import formats, rankings, reply_columns, verdicts
from rlhf.data.columns import Row, plain_name
from rlhf.data.comparisons import PAIR_SCORES, PAIRS
from rlhf.data.formats import Layout
from rlhf.data.margins import MARGIN_COLUMNS
from rlhf.data.ratings import ATTRIBUTES, CONVERSATIONS, RATINGS, REPLIES
from rlhf.data.tallies import ANNOTATOR_COLUMNS, SLICE_COLUMNS

#: Columns of exports that hold the texts or the answers, and of messages of a tree.
_HOLDERS = ("data", "annotations", "fields", "responses", "replies", "text", "options", "accept")


@functools.cache
def known_names() -> frozenset[str]:
    """Return the plain names of all columns that a layout looks for."""
    words = (*reply_columns.REPLY_WORDS, *verdicts.SCORE_COLUMNS, "model", "name", "winner_model")
    suffixes = set(itertools.chain(*reply_columns.SUFFIXES))
    forms = ("{0}_{1}", "{0}{1}", "{1}_{0}", "response_{1}_{0}", "model_{1}_{0}")
    return frozenset(
        (
            *formats.PROMPTS, *formats.SYSTEMS, *formats.TIES, *formats.OUTCOMES,
            *itertools.chain(*PAIRS, *PAIR_SCORES), *verdicts.LABEL_COLUMNS, "winner_tie",
            *rankings.COLUMNS, *RATINGS, *REPLIES, *CONVERSATIONS, *ATTRIBUTES, *MARGIN_COLUMNS,
            *ANNOTATOR_COLUMNS, *SLICE_COLUMNS, *reply_columns.STARTS, *_HOLDERS,
            *(form.format(word, suffix) for form in forms for word in words for suffix in suffixes),
            *(f"rejected_{word}" for word in reply_columns.REPLY_WORDS),
        )
    )  # fmt: skip


def could_matter(column: str, row: Row, layout: Layout, config: DataConfig) -> bool:
    """Return whether a column that first appears in a row could change the layout.

    Args:
        column: The column.
        row: The first row that has it.
        layout: Layout of the rows before.
        config: Columns that the user set.
    """
    if plain_name(column) in known_names() or column in _configured(config):
        return True
    if any(name == column or name.startswith(f"{column}.") for name in layout.columns):
        return True
    if any(isinstance(value, str) and value == column for value in row.values()):
        return True  # {"winner": "claude", "claude": …}
    value = row[column]
    if layout.name in ("label-studio", "argilla") and isinstance(value, list | Mapping):
        return True  # a question of its own
    vote = value.get("selected") if isinstance(value, Mapping) else value
    return isinstance(vote, str) and verdicts.names_a_reply(vote, layout.columns)


def _configured(config: DataConfig) -> set[str]:
    """Return the columns that settings name, of dotted paths the first part too."""
    named: list[Any] = [
        config.prompt_column, config.chosen_column, config.rejected_column, config.system_column,
        config.label_column, config.margin_column, config.reference_column,
        *config.metadata_columns, *config.score_weights, *config.text_columns,
    ]  # fmt: skip
    return {part for name in named if name for part in (name, name.partition(".")[0])}
