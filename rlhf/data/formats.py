"""Layouts of preference data: found by their columns, and converted row by row."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.config import DataConfig
from rlhf.data.annotators import by_annotator
from rlhf.data.candidates import Candidates, check_steps, find_candidates
from rlhf.data.cells import Cells, Found
from rlhf.data.column_forms import with_forms
from rlhf.data.columns import Row, cell_of, check_settings, plain_name, value_of
from rlhf.data.comparisons import end_with_reply, find_comparison, find_pairs
from rlhf.data.exports import EXPORTS, Export, find_export, trees
from rlhf.data.markup import Markup
from rlhf.data.rankings import find_ranking
from rlhf.data.ratings import CONVERSATIONS, REPLIES, find_rated
from rlhf.data.records import Comparison, Converted, LeftOutError
from rlhf.data.reply_columns import STARTS, NotRepliesError, with_start
from rlhf.data.reply_lists import find_unranked, holds_reply
from rlhf.data.settings import score_paths, settings_to_make, text_columns, unread_rating
from rlhf.data.verdicts import LABEL_COLUMNS
from rlhf.errors import ConfigError, NoPreferences

PROMPTS = (
    "prompt", "question", "instruction", "query", "user_input", "user_prompt", "input", "context",
    "conversations", "conversation", "messages", "history", "problem", "post", "dialogue", "chat",
    "trajectory", "input_text", "x", "contents",
)  # fmt: skip
#: Rows that a layout is tried on.
_TRIED = 20
#: Columns that mark rows without a preference.
TIES = ("is_tie", "tie", "tied")
#: Columns beside a pair that may say in a word that it is a tie.
OUTCOMES = ("status", "outcome", *LABEL_COLUMNS)
_TIE = re.compile(r"\s*(tie|tied|draw)\b.{0,20}", re.I)
#: Columns that identify a row.
_KEYS = ("id", "prompt_id", "conversation_id", "index", "source", "dataset")
SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction")


@dataclass(frozen=True)
class Layout:
    """A format and its columns, and the conversion of its rows."""

    name: str
    """One of `DataFormat`."""
    columns: tuple[str, ...]
    """Columns that are read."""
    notes: tuple[str, ...]
    """Sentences for the user: which columns are taken for what."""
    converter: Callable[[Row], Converted]
    unused: tuple[str, ...] = ()
    """Columns that are not read."""

    def convert(self, fields: Row) -> Converted:
        """Return everything that a row says.

        Raises:
            LeftOutError: It can't be used.
        """
        return self.converter(fields)


def detect(
    columns: Sequence[str], sample: Sequence[Row], config: DataConfig, *, text_cells: bool = False
) -> Layout:
    """Return the layout of a source by its columns, its first rows, and the settings.

    Args:
        columns: Names of all columns.
        sample: First rows.
        config: Format and columns that the user set.
        text_cells: True if all values are text, as in CSV.

    Raises:
        ConfigError: A column that is set does not exist or is not read, or no format fits.
    """
    # A control of Label Studio is no column, but its answers are found under its name.
    controls = {"label_column": None} if {"data", "annotations"} <= {*columns} else {}
    check_settings(columns, sample, config.model_copy(update=controls))
    layout = _detect(columns, sample, config, text_cells)
    labels = [("label_column", config.label_column)]
    for name, column in (*labels, *(("score_weights", column) for column in config.score_weights)):
        if column is not None and column not in layout.columns:
            raise ConfigError(
                f"data.{name}: names {column!r}, but the rows are taken for {layout.name} "
                f"({layout.notes[0]}), where it has no meaning; remove the setting, or set "
                "data.format"
            )
    return layout


def _detect(
    columns: Sequence[str], sample: Sequence[Row], config: DataConfig, text_cells: bool
) -> Layout:
    for name in EXPORTS:
        if config.format not in ("auto", name):
            continue
        if export := find_export(name, columns, sample, config):
            return _exported(name, export, columns, sample, config, text_cells)
    if config.format in ("auto", "open-assistant") and (convert := trees(columns, sample)):
        unused = tuple(name for name in columns if name != "prompt")
        note = "replies to the same message are compared by their rank"
        return Layout("open-assistant", ("prompt",), (note,), convert, unused)
    if found := find_candidates(columns, sample, config, PROMPTS):
        return _with_candidates(found, columns, sample, config, text_cells)
    try:
        layout = _flat(columns, sample, config, text_cells)
    except ConfigError:
        check_steps(sample)  # whose lists of texts look like replies
        raise
    read = {column.partition(".")[0] for column in layout.columns} | set(layout.columns)
    return replace(layout, unused=tuple(name for name in columns if name not in read))


def _exported(
    name: str, export: Export, columns: Sequence[str], sample: Sequence[Row], config: DataConfig,
    text_cells: bool,
) -> Layout:  # fmt: skip
    """Return the layout of an export, from the rows that it is turned into."""
    names, flat = export.flatten(name, sample)
    label = config.label_column or export.label
    settings = {"format": "auto", "label_column": None if export.is_ranking else label}
    layout = _flat(names, flat, config.model_copy(update=settings), text_cells)
    unused = export.unused(columns, sample, layout.columns)

    def convert(row: Row) -> Converted:
        converted = layout.converter(export.widen(row))
        voters = [*by_annotator(row, export.label)]
        if len(voters) == 1:
            return replace(converted, ballots=((voters[0][0], converted.comparisons),))
        ballots: list[tuple[str, list[Comparison]]] = []
        for annotator, own in voters:
            with contextlib.suppress(LeftOutError):  # a tie, or an answer that does not count
                ballots.append((annotator, layout.converter(export.widen(own)).comparisons))
        return replace(converted, ballots=tuple(ballots))

    columns = (*layout.columns, *([label] if export.is_ranking and label else []))
    return replace(layout, name=name, columns=columns, unused=unused, converter=convert)


def _with_candidates(
    found: Candidates, columns: Sequence[str], sample: Sequence[Row], config: DataConfig,
    text_cells: bool,
) -> Layout:  # fmt: skip
    """Return the layout of rows with candidate replies inside, from their flat rows."""
    names, flat = found.sample(sample)
    config = config.model_copy(update={"label_column": config.label_column or found.label})
    layout = _flat(names, flat, config, text_cells)
    read = {*found.read, *layout.columns}
    return replace(
        layout, columns=(*dict.fromkeys((*layout.columns, *(c for c in columns if c in read))),),
        notes=(found.note, *layout.notes),
        unused=tuple(name for name in columns if name not in read),
        converter=lambda row: found.convert(row, layout.converter),
    )  # fmt: skip


def _flat(
    columns: Sequence[str], sample: Sequence[Row], config: DataConfig, text_cells: bool
) -> Layout:
    """Return the layout of rows whose prompt and replies are columns.

    Columns are named alike for different things: the first prompt column with which rows can be
    read is the prompt, or else what two conversations share.
    """
    names = {plain_name(column): column for column in reversed(columns)}
    first: Layout | None = None
    fault: ConfigError | None = None
    for prompt in _find_prompts(names, sample, config):
        try:
            layout = _with_prompt(names, sample, config, replace(prompt, text_cells=text_cells))
        except ConfigError as error:
            fault = fault or error
            continue
        if layout is not None and _can_read(layout, sample[:_TRIED]):
            return layout
        if fault is None:
            first = first or layout
    if first is not None:
        return first  # its rows say why they can't be used
    raise fault or _unknown(columns, sample, config)


def _with_prompt(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig, prompt: Cells
) -> Layout | None:
    finders = {
        "pairs": find_pairs,
        "comparison": find_comparison,
        "ranking": find_ranking,
        "rated": find_rated,
    }
    fault: NotRepliesError | None = None
    for name, find in finders.items():
        if config.format not in ("auto", name):
            continue
        try:
            found = find(names, sample, config, prompt)
            if found and name == "ranking" and config.format == "auto":
                found = _unless_rated(found, names, sample, config, prompt)
        except NotRepliesError as error:
            fault = error
            continue
        if found:
            return _layout(name, found, names, sample)
    if fault is not None:
        raise fault
    return None


def _unless_rated(
    found: Found, names: Mapping[str, str], sample: Sequence[Row], config: DataConfig,
    prompt: Cells,
) -> Found | None:  # fmt: skip
    """Return a ranking, unless another column holds the reply that is rated.

    Beside a reply and its score a list is something else, such as the choices of a question; only
    a list that holds the reply is one of replies.
    """
    if config.label_column or config.chosen_column:
        return found
    try:
        rated = find_rated(names, sample, config, prompt)
    except ConfigError:
        return found
    if rated and rated[0].prompt is None and not end_with_reply(sample, rated[0].first):
        return found  # a conversation that awaits the listed replies
    is_side = rated is not None and not holds_reply(sample, found[0].first, rated[0].first)
    return None if is_side else found


def _layout(name: str, found: Found, names: Mapping[str, str], sample: Sequence[Row]) -> Layout:
    cells, roles, decide, notes = found
    cells, more = with_forms(cells, sample)
    if cells.prompt is None:
        _check_conversations(cells, cells.markups or {}, names, sample)
    columns = tuple(dict.fromkeys((*cells.columns, *decide.columns)))
    tie = next((names[n] for n in TIES if n in names and names[n] not in columns), None)
    start = next((names[n] for n in STARTS if n in names and names[n] not in columns), None)
    outcomes = [] if name != "pairs" else [
        names[n] for n in OUTCOMES if n in names and names[n] not in columns
    ]  # fmt: skip

    def convert(row: Row) -> Converted:
        if tie is not None and str(cell_of(row, tie)).strip().lower() in ("true", "1", "1.0"):
            raise LeftOutError("tie: neither reply is preferred", f"{tie} is set", is_choice=True)
        for column in outcomes:
            if isinstance(word := cell_of(row, column), str) and _TIE.fullmatch(word):
                raise LeftOutError("tie: neither reply is preferred", f"{column} is {word!r}",
                                   is_choice=True)  # fmt: skip
        converted = decide.convert(row, cells, roles)
        return converted if start is None else _started(converted, cell_of(row, start))

    if start is not None:
        columns, more = (*columns, start), [*more, f"{start} goes in front of both replies"]
    if tie is not None:
        columns, more = (*columns, tie), [*more, f"rows in which {tie} is true are ties"]
    return Layout(name, columns, (*notes, *more), convert)


def _started(converted: Converted, start: Any) -> Converted:
    """Return what a row says with the first part of its replies in front of each."""
    comparisons = [
        replace(c, chosen=with_start(start, c.chosen), rejected=with_start(start, c.rejected))
        for c in converted.comparisons
    ]
    rated = [replace(item, reply=with_start(start, item.reply)) for item in converted.rated]
    return replace(converted, comparisons=comparisons, rated=rated)


def _can_read(layout: Layout, sample: Sequence[Row]) -> bool:
    """Return whether at least half of the rows hold what the layout says."""
    bad = 0
    for row in sample:
        try:
            layout.convert(row)
        except LeftOutError as error:
            bad += not error.is_choice
    return bad <= len(sample) / 2


def _check_conversations(
    cells: Cells, markups: Mapping[str, Markup], names: Mapping[str, str], sample: Sequence[Row]
) -> None:
    """Refuse replies that are plain texts, where no column holds the prompt.

    Beside a column of prompts, a chat as one reply to a plain other one is an answer about chats.
    """
    asked = [c for n in PROMPTS if (c := names.get(n)) not in (None, cells.first, cells.second)]
    if cells.first in markups and cells.second not in markups and asked:
        raise ConfigError(
            f"data.source: {cells.first} holds chats that do not continue {asked[0]}, and "
            f"{cells.second} plain replies; give replies, or set data.text_columns={cells.first}"
        )
    values = [value_of(row, cells.first) for row in sample]
    texts = [value for value in values if isinstance(value, str)]
    if cells.first not in markups and len(texts) > len(values) / 2:
        others = text_columns(names, sample, {*cells.columns, cells.second})
        cure = f" to one of {', '.join(others)}" if others else ", or give prompts"
        raise ConfigError(
            f"data.prompt_column: no column holds the prompt, and {cells.first} "
            f"({_shown(texts[0])}) is no conversation that begins with it; set data.prompt_column"
            f"{cure}"
        )


def _find_prompts(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig
) -> list[Cells]:
    """Return the columns that may hold the prompt, the likeliest first, and at last none.

    With each go the columns of the system turn, the history and Alpaca's input; those of the
    replies are empty. A further column counts only where the ones before it are blank.
    """
    if config.prompt_column is not None:
        found: list[str | None] = [config.prompt_column]
    else:
        usual = [names[n] for n in PROMPTS if n in names and not _are_numbers(sample, names[n])]
        texts = [column for column in usual if not _are_keys(sample, column)]
        usual = texts or usual  # "p_0001" is a key beside a column of texts
        filled = next((i for i, c in enumerate(usual) if not _is_blank(sample, c)), 0)
        found = [*usual[filled : filled + 1], None]
    system = config.system_column or next((names[n] for n in SYSTEMS if n in names), None)
    history = names.get("history")
    return [
        Cells(
            prompt, "", "", system=system,
            more=names.get("input") if prompt and plain_name(prompt) == "instruction" else None,
            history=history if history != prompt else None, plain=frozenset(config.text_columns),
        )
        for prompt in found
    ]  # fmt: skip


def _is_blank(sample: Sequence[Row], column: str) -> bool:
    """Return whether most of a column's values are missing or empty."""
    return sum(cell_of(row, column) in (None, "", []) for row in sample) > len(sample) / 2


def _are_numbers(sample: Sequence[Row], column: str) -> bool:
    values = [value for row in sample if (value := cell_of(row, column)) is not None]
    return bool(values) and all(
        isinstance(value, bool | int | float)
        or (isinstance(value, str) and value.strip().replace(".", "", 1).isdecimal())
        for value in values
    )


def _are_keys(sample: Sequence[Row], column: str) -> bool:
    """Return whether a column's values are single short words, such as ids."""
    values = [value for row in sample if (value := cell_of(row, column)) is not None]
    return bool(values) and all(
        isinstance(value, str) and value.isascii() and len(value.split()) < 2 and len(value) < 40
        for value in values
    )


def _unknown(columns: Sequence[str], sample: Sequence[Row], config: DataConfig) -> ConfigError:
    """Return the error for rows of which nothing says what was preferred.

    Its cure is one that can work: rows without anything to compare have no column to set.
    """
    first = sample[0] if sample else {}
    shown = "; ".join(f"{name} ({_shown(first.get(name))})" for name in [*columns][:8]) or "none"
    names = {plain_name(name): name for name in columns}
    cure = settings_to_make(names, sample, config, {*PROMPTS})
    error: type[ConfigError] = ConfigError
    if {"parent_id", "message_id"} <= {*names}:
        reason = "rows are single messages of trees"
        cure = "give the file with whole message trees, one on each line"
    elif config.format != "auto":
        reason = f"data.format = {config.format!r} does not fit these columns"
    elif unread := unread_rating(names, sample, config):
        reason, cure = unread
    elif not ({*PROMPTS} & names.keys() or config.prompt_column) and find_unranked(names, sample):
        reason = "no column holds the prompt"
        cure = f"set data.prompt_column{_nested_prompt(sample)}"
    elif column := find_unranked(names, sample):
        reason = f"the replies in {column} have neither scores nor ranks"
        cure = "set data.label_column to a column with a score for each, if there is one"
        if paths := score_paths(sample, column):
            reason = (
                f"the replies in {column} have several scores, as in llm-blender's mix-instruct, "
                "and nothing says which of them decides"
            )
            cure = f"set data.label_column={' or '.join(paths)}"
        if names.keys() <= {*PROMPTS, *SYSTEMS, *_KEYS, plain_name(column)}:
            cure = "set data.format=ranking if the best comes first, or give a score for each"
    elif names.keys() <= {*PROMPTS, *SYSTEMS, *REPLIES, *_KEYS} and sample:
        error, reason = NoPreferences, "there is nothing to compare in these columns"
        if names.keys() & {*CONVERSATIONS, *REPLIES}:
            reason = f"looks like data for supervised fine-tuning: {reason}"
        cure = (
            "give two replies to each prompt and which is better, or replies with ratings; "
            "docs/data.md shows the formats"
        )
    elif names.keys() & {*CONVERSATIONS, *REPLIES}:
        error = NoPreferences
        reason = (
            "looks like data for supervised fine-tuning: no column says which of two replies is "
            "better, or rates one"
        )
    else:
        error, reason = NoPreferences, "no format fits these columns"
    if error is NoPreferences and names.keys() & {*CONVERSATIONS, *REPLIES}:
        cure += "; demonstrations beside pairs are given by data.sft_source"
    return error(f"data.source: {reason}: {shown}; {cure}")


def _nested_prompt(sample: Sequence[Row]) -> str:
    """Return the value of the setting for a prompt that is a field of an object: `=info.post`."""
    for column, value in (sample[0] if sample else {}).items():
        for field in PROMPTS if isinstance(value, Mapping) else ():
            if isinstance(value.get(field), str):
                return f"={column}.{field}"
    return ""


def _shown(value: Any) -> str:
    text = " ".join(str(value).split())
    return f"{type(value).__name__} {text[:30]}{'…' if len(text) > 30 else ''}"
