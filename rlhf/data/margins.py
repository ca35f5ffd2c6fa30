"""Margins: by how much a row prefers its reply, from a column of the source.

Scores and preference strengths of a format give margins without such a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlhf.config import DataConfig
from rlhf.data.columns import MISSING, Row, is_missing, plain_name, value_of
from rlhf.data.formats import Layout
from rlhf.data.records import Converted, LeftOutError
from rlhf.data.scores import find_unit, number_of, unit_of
from rlhf.errors import ConfigError

#: Names of the column, the usual one first.
MARGIN_COLUMNS = ("margin", "preference_margin", "score_difference", "score_diff", "score_margin")


def add_margins(
    layout: Layout, columns: Sequence[str], sample: Sequence[Row], config: DataConfig
) -> Layout:
    """Return the layout with margins from their column, and by the scale of the source.

    Raises:
        ConfigError: The column that is set does not exist, or its rows hold several pairs.
    """
    scale, setting = config.margin_scale, config.margin_column
    column = find_margin_column(columns, sample, setting)
    unit = find_unit(sample, column) if column else None
    if setting is not None and all(value_of(row, setting) is MISSING for row in sample):
        raise ConfigError(
            f"data.margin_column = {setting!r}: not a column of the source, which has "
            f"{', '.join(columns)[:200]}; correct it, or remove it"
        )
    if setting is not None and layout.name in ("rated", "ranking"):
        raise ConfigError(
            f"data.margin_column = {setting!r}: the rows are taken for {layout.name}, whose "
            "margins are the differences of the scores; remove the setting"
        )
    is_own = setting is not None or layout.name in ("pairs", "comparison")
    if column is None or not is_own or (setting is None and column in layout.columns):
        if scale == 1:
            return layout
        return replace(layout, converter=lambda row: scaled(layout.convert(row), scale))
    return replace(
        layout,
        columns=(*layout.columns, column),
        notes=(*layout.notes, f"{column} is by how much the preferred reply is better"),
        unused=tuple(name for name in layout.unused if name != column.partition(".")[0]),
        converter=lambda row: with_margin(layout.convert(row), row, column, scale, unit),
    )


def find_margin_column(
    columns: Sequence[str], sample: Sequence[Row], setting: str | None
) -> str | None:
    """Return the column of `data.margin_column`, or one found by its name.

    The latter holds numbers of which none is negative: a sign may mean either reply.
    """
    if setting is not None:
        return setting
    names = {plain_name(name): name for name in columns}
    found = next((names[name] for name in MARGIN_COLUMNS if name in names), None)
    if found is None:
        return None
    values = [value_of(row, found) for row in sample]
    filled = [value for value in values if not is_missing(value)]
    unit = unit_of(filled)
    numbers = [number_of(value, unit) for value in filled]
    is_margin = bool(numbers) and all(number is not None and number >= 0 for number in numbers)
    return found if is_margin else None


def with_margin(
    converted: Converted, row: Row, column: str, scale: float, unit: str | None = None
) -> Converted:
    """Return a row's comparison with the margin of its column, which wins over that of scores.

    Args:
        converted: All that the row says.
        row: Values by column.
        column: Column of the margin.
        scale: Factor of all margins of the source.
        unit: Unit of the column's numbers.

    Raises:
        LeftOutError: The margin is no number, or says that the other reply is better.
    """
    value = value_of(row, column)
    if is_missing(value):
        return scaled(converted, scale)
    number = number_of(value, unit)
    if number is None:
        raise LeftOutError(
            f"{column} is no finite number", f"{type(value).__name__} {value!r}"[:60],
            "mend the margins, or leave the cell empty",
        )  # fmt: skip
    if number < 0:
        raise LeftOutError(
            f"{column} is negative: it contradicts the label", f"{number:g}",
            "give by how much the preferred reply is better, 0 or more",
        )  # fmt: skip
    if len(converted.comparisons) > 1 or converted.rated:
        raise LeftOutError(
            f"{column} is one margin for several pairs", f"{len(converted.comparisons)} pairs",
            "give one pair per row, or scores of the replies",
        )  # fmt: skip
    comparisons = [replace(item, margin=number) for item in converted.comparisons]
    return scaled(replace(converted, comparisons=comparisons), scale)


def scaled(converted: Converted, scale: float) -> Converted:
    """Return a row's comparisons and ratings with their margins multiplied by a factor."""
    if scale == 1:
        return converted
    return replace(
        converted,
        comparisons=[
            item if item.margin is None else replace(item, margin=item.margin * scale)
            for item in converted.comparisons
        ],
        rated=[replace(item, score=item.score * scale) for item in converted.rated],
    )
