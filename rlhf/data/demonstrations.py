"""Demonstrations for SFT of their own: conversations, prompts with replies, chats as text.

Each reply that SFT shall learn is a demonstration with everything before it as its prompt. Of a
conversation these are all of the assistant's turns, as axolotl and LLaMA-Factory train them: an
early answer is as good an example as the last one. `data.sft_turns=last` takes the last alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.config import DataConfig, StoreConfig
from rlhf.data.cells import Cells
from rlhf.data.collect import exact_key, too_long
from rlhf.data.column_forms import find_markups, with_forms
from rlhf.data.columns import Row, cell_of, check_settings, filled_cells, plain_name
from rlhf.data.comparisons import PAIRS
from rlhf.data.formats import PROMPTS, SYSTEMS
from rlhf.data.markup import LISTS
from rlhf.data.mixing import MixedSource
from rlhf.data.model_check import CheckPrompt
from rlhf.data.own_rows import Found, OwnRows, RowLayout, read_own_rows
from rlhf.data.privacy import PersonalData
from rlhf.data.quarantine import Quarantine
from rlhf.data.ratings import CONVERSATIONS, RATINGS
from rlhf.data.records import LeftOutError
from rlhf.data.rows import Demonstration, Message, Pair, Prompt, messages_of
from rlhf.data.scores import is_score, thumb_of
from rlhf.data.special_tokens import without_prompt
from rlhf.errors import ConfigError

#: Columns of a reply, the usual one first.
REPLIES = (
    "completion", "response", "output", "answer", "reply", "target", "generation", "assistant",
    "solution", "model_answer", "bot", "gpt",
)  # fmt: skip
#: Columns of whole conversations.
CHATS = (*CONVERSATIONS, "chat", "dialog", "dialogue", "turns")
#: Columns of text in which a chat may be written.
TEXTS = ("text", "content", "transcript")
_PROMPTS = tuple(name for name in PROMPTS if name not in (*CHATS, "history", "context"))
#: Columns whose text follows the prompt: Alpaca's, and Dolly's.
_MORE = ("input", "context")
_ASKING = ("instruction", "question", "prompt")
#: Settings of a source that have no meaning for demonstrations.
_FOREIGN = ("rejected_column", "label_column", "score_weights", "margin_column",
            "reference_column", "metadata_columns")  # fmt: skip


def read_demonstrations(
    config: DataConfig,
    options: StoreConfig,
    quarantine: Quarantine,
    pairs: Iterable[Pair],
    held_out: Iterable[Prompt],
    seed: int,
    note: Callable[[str], None],
    personal: PersonalData,
    check: CheckPrompt | None = None,
    limit: int | None = None,
) -> OwnRows[Demonstration]:
    """Read `data.sft_source`.

    Args:
        config: The section.
        options: S3 options.
        quarantine: Receives the rows that are left out.
        pairs: Pairs to train on; a reply that lost to another is no demonstration.
        held_out: Prompts that no training stage may see.
        seed: Seeds the choice by weights.
        note: Receives sentences for the user.
        personal: Policy for personal data.
        check: Finds prompts that the model can't be given.
        limit: Read at most this many rows of each file, to look at them.

    Raises:
        ConfigError: A source does not exist, or its format is not known.
        DataError: It can't be parsed, or too many rows are unusable.
        StoreError: The S3 server can't be reached, or a transfer broke.
    """
    lost = {(exact_key(pair.prompt), pair.rejected.strip()) for pair in pairs}

    def refuse(found: Found[Demonstration]) -> LeftOutError | None:
        if (exact_key(found.prompt), found.reply.strip()) in lost:
            return LeftOutError(
                "reply lost to another in the pairs", found.reply[:60], is_choice=True
            )
        return None

    return read_own_rows(
        config, "sft_source", options, quarantine, find_layout,
        held_out=held_out, refuse=refuse, seed=seed, note=note, personal=personal, check=check,
        limit=limit,
    )  # fmt: skip


def find_layout(
    columns: Sequence[str], sample: Sequence[Row], source: MixedSource, text_cells: bool
) -> RowLayout[Demonstration]:
    """Return how the rows of a file hold demonstrations, by columns, first rows and settings.

    Raises:
        ConfigError: No column holds a reply, or a setting has no meaning here.
    """
    config = source.config
    check_settings(columns, sample, config)
    for name in _FOREIGN:
        if getattr(config, name):
            raise ConfigError(f"{name} has no meaning for demonstrations; remove the setting")
    if config.format != "auto":
        raise ConfigError(
            f"format = {config.format!r} is one of pairs; remove the setting, and set "
            "prompt_column and chosen_column if the columns have unusual names"
        )
    names = {plain_name(column): column for column in reversed(columns)}
    thumbs = _thumbs(names, sample)
    chat = _chat_column(names, sample, config)
    reply = config.chosen_column or next((names[n] for n in REPLIES if n in names), None)
    if chat and not (reply and _ends_with_question(sample, chat)):
        return _conversations(chat, names, sample, config, text_cells, thumbs)
    prompt = config.prompt_column or chat or _first(names, _PROMPTS, without=reply)
    if reply is None or prompt is None:
        raise _unknown(names, columns, sample, prompt)
    return _prompts_and_replies(prompt, reply, names, sample, config, text_cells, thumbs)


def more_column(names: Mapping[str, str], prompt: str, reply: str | None = None) -> str | None:
    """Return the column whose text belongs behind the prompt: Alpaca's input, Dolly's context."""
    if plain_name(prompt) not in _ASKING:
        return None
    return next((names[n] for n in _MORE if n in names and names[n] not in (prompt, reply)), None)


@dataclass(frozen=True)
class _Reader:
    """Converts rows to demonstrations.

    Args:
        cells: Columns; without a prompt column, of whole conversations.
        config: Limits, and the turns to learn.
        thumbs: Column with thumbs for the replies.
    """

    cells: Cells
    config: DataConfig
    thumbs: str | None

    def _is_down(self, value: Any) -> bool:
        thumb = _thumb(value)
        if thumb is None and is_score(value):
            raise ConfigError(
                f"data.sft_source: {self.thumbs!r} holds {value!r}, but in the first rows thumbs "
                "alone, of which those down are left out; write all of them as true and false, or "
                "rename the column if it does not rate the reply"
            )
        return thumb is False

    def convert(self, row: Row, note: Callable[[str], None]) -> list[Found[Demonstration]]:
        """Return the demonstrations of a row."""
        if self.thumbs is not None and self._is_down(cell_of(row, self.thumbs)):
            raise LeftOutError("the reply was rated down", self.thumbs, is_choice=True)
        notes: set[str] = set()
        replies = self._turns(row, notes) if self.cells.prompt is None else self._one(row, notes)
        found = [
            Found(Demonstration(prompt, reply), prompt, reply,
                  too_long(prompt, [reply], self.config))
            for prompt, reply in replies
        ]  # fmt: skip
        for text in sorted(notes):
            note(text)
        return found[-1:] if self.config.sft_turns == "last" else found

    def _one(self, row: Row, notes: set[str]) -> Iterator[tuple[Prompt, str]]:
        """Yield the replies of the history, and that of the row."""
        cells = self.cells
        assert cells.prompt is not None
        prompt = cells.read_prompt(row, notes)
        value = cell_of(row, cells.first)
        reply = cells.read_reply(value, cells.first, prompt, "reply", notes)
        messages = messages_of(prompt)
        if cells.history and isinstance(cell_of(row, cells.prompt), str):
            for index, message in enumerate(messages):
                if message["role"] == "assistant":
                    yield messages[:index], message["content"]
        if cells.repeats:
            rest = without_prompt(messages[-1]["content"], reply)
            if rest is not None:
                notes.add("the prompt is repeated in front of replies, and cut from them")
            reply = reply if rest is None else rest
        yield prompt, reply

    def _turns(self, row: Row, notes: set[str]) -> list[tuple[Prompt, str]]:
        """Return the replies of a conversation, each with the turns before it."""
        cells = self.cells
        messages = cells.read_messages(row, "conversation")
        learned = _learned(_raw(cell_of(row, cells.first), cells), len(messages))
        start = _check_order(messages)
        system = [m for m in messages[:start] if m["role"] == "system"]
        if len(system) < start:
            notes.add("replies before a user's first turn are cut")
        if messages[-1]["role"] != "assistant":
            notes.add("turns after the last reply are not used")
        found = []
        for index in range(start, len(messages)):
            if messages[index]["role"] != "assistant":
                continue
            if not learned[index]:
                notes.add("replies marked as not to learn (weight 0, train false) are only context")
                continue
            turns = [*system, *messages[start : index + 1]]
            found.append(cells.read_conversation({**row, cells.first: turns}, "reply", notes))
        if not found:
            raise LeftOutError(
                "the conversation has no reply to learn", f"{len(messages)} messages",
                "give conversations with a turn of the assistant after one of a user",
            )  # fmt: skip
        return found


def _conversations(
    column: str, names: Mapping[str, str], sample: Sequence[Row], config: DataConfig,
    text_cells: bool, thumbs: str | None,
) -> RowLayout[Demonstration]:  # fmt: skip
    system = config.system_column or _first(names, SYSTEMS)
    plain = frozenset(config.text_columns)
    cells = Cells(None, column, column, system=system, text_cells=text_cells, plain=plain)
    cells, notes = with_forms(cells, sample)
    reader = _Reader(cells, config, thumbs)
    turns = "every" if config.sft_turns == "all" else "the last"
    first = f"conversations in {column}; {turns} reply of the assistant is a demonstration"
    return _layout("conversations", reader, [first, *notes])


def _prompts_and_replies(
    prompt: str, reply: str, names: Mapping[str, str], sample: Sequence[Row], config: DataConfig,
    text_cells: bool, thumbs: str | None,
) -> RowLayout[Demonstration]:  # fmt: skip
    history = names.get("history")
    cells = Cells(
        prompt, reply, reply, more=more_column(names, prompt, reply), text_cells=text_cells,
        system=config.system_column or _first(names, SYSTEMS),
        history=history if history not in (prompt, reply) else None,
        plain=frozenset(config.text_columns),
    )  # fmt: skip
    cells, notes = with_forms(cells, sample)
    reader = _Reader(cells, config, thumbs)
    name = "alpaca" if plain_name(prompt) == "instruction" else "prompt-reply"
    return _layout(name, reader, [f"{name}: {reply} is the reply to {prompt}", *notes])


def _layout(name: str, reader: _Reader, notes: list[str]) -> RowLayout[Demonstration]:
    columns = [*reader.cells.columns]
    if reader.cells.system is not None:
        notes = [*notes, f"{reader.cells.system} goes before the prompt as a system turn"]
    if reader.thumbs is not None:
        columns.append(reader.thumbs)
        notes = [*notes, f"replies that {reader.thumbs} rates down are left out"]
    return RowLayout(name, tuple(columns), tuple(notes), reader.convert)


def _chat_column(names: Mapping[str, str], sample: Sequence[Row], config: DataConfig) -> str | None:
    """Return the column that holds whole conversations, as messages or as text."""
    if config.prompt_column is not None:
        wanted = [config.prompt_column] if config.chosen_column is None else []
    elif config.chosen_column is not None:
        wanted = [config.chosen_column]
    else:
        wanted = [names[n] for n in (*CHATS, *TEXTS) if n in names]
    return next((column for column in wanted if _holds_chats(column, sample)), None)


def _holds_chats(column: str, sample: Sequence[Row]) -> bool:
    values = [value for row in sample if (value := cell_of(row, column)) not in (None, "", [])]
    lists = sum(isinstance(value, list | tuple) for value in values)
    if lists and lists > len(values) / 2:
        # Of messages; a list of texts is a list of answers.
        items = [value[0] for value in values if isinstance(value, list | tuple)]
        return not all(isinstance(item, str) for item in items)
    markup = find_markups(Cells(None, column, column), sample)[0].get(column)
    return markup is not None and markup not in LISTS


def _ends_with_question(sample: Sequence[Row], column: str) -> bool:
    """Return whether most conversations of a column are prompts that a user's turn ends."""
    cells = Cells(None, column, column)
    cells = replace(cells, markups=find_markups(cells, sample)[0])
    ends = []
    for row in sample:
        try:
            ends.append(cells.read_messages(row, "prompt")[-1]["role"] != "assistant")
        except LeftOutError:
            continue
    return sum(ends) > len(ends) / 2


def _thumbs(names: Mapping[str, str], sample: Sequence[Row]) -> str | None:
    """Return the column with thumbs up and down for each reply, if there is one."""
    for column in (names[n] for n in RATINGS if n in names):
        values = filled_cells(sample, column)
        if values and all(_thumb(value) is not None for value in values):
            return column
    return None


def _thumb(value: Any) -> bool | None:
    """Return True for a thumb up, False for one down; of numbers, 1 is up, and 0 and −1 are down.

    A rating of pairs takes the higher number for the better one too.
    """
    if (thumb := thumb_of(value)) is not None:
        return thumb
    try:
        return {1.0: True, 0.0: False, -1.0: False}.get(float(value))
    except (TypeError, ValueError, OverflowError):
        return None


def _first(
    names: Mapping[str, str], known: Sequence[str], without: str | None = None
) -> str | None:
    return next((names[n] for n in known if n in names and names[n] != without), None)


def _raw(value: Any, cells: Cells) -> Any:
    """Return a conversation as the source holds it, with all keys of its messages."""
    markup = (cells.markups or {}).get(cells.first)
    parsed = markup is not None and markup.parse is not None and isinstance(value, str)
    return markup.parse(value) if parsed else value  # pyright: ignore[reportOptionalMemberAccess, reportOptionalCall]


def _learned(raw: Any, count: int) -> list[bool]:
    """Return for each message whether it may be learned: OpenAI's `weight`, axolotl's `train`."""
    items = raw if isinstance(raw, list | tuple) and len(raw) == count else [None] * count
    return [
        not isinstance(item, Mapping)
        or (item.get("weight") != 0 and item.get("train") is not False)
        for item in items
    ]


def _check_order(messages: list[Message]) -> int:
    """Return the position of the first turn that is neither system's nor assistant's.

    Raises:
        LeftOutError: There is none, or two messages of the assistant follow each other.
    """
    start = next(
        (i for i, m in enumerate(messages) if m["role"] not in ("system", "assistant")), -1
    )
    if start < 0:
        raise LeftOutError(
            "the conversation has no user's turn", f"{len(messages)} messages",
            "give the question before each reply",
        )  # fmt: skip
    for index in range(start + 1, len(messages)):
        if messages[index]["role"] == messages[index - 1]["role"] == "assistant":
            raise LeftOutError(
                "two messages of the assistant follow each other",
                f"messages {index} and {index + 1} of {len(messages)}", "join them to one",
            )  # fmt: skip
        if messages[index]["role"] == "system":
            raise LeftOutError(
                "a system turn inside the conversation", f"message {index + 1} of {len(messages)}",
                "put it first",
            )  # fmt: skip
    return start


def _unknown(
    names: Mapping[str, str], columns: Sequence[str], sample: Sequence[Row], prompt: str | None
) -> ConfigError:
    """Return the error for rows without replies to learn."""
    pair = next(((a, b) for a, b in PAIRS if a in names and b in names), None)
    text = next((names[n] for n in TEXTS if n in names), None)
    listed = ", ".join(map(str, columns))[:200]
    if pair is not None:
        return ConfigError(
            f"the rows are preference pairs ({pair[0]}, {pair[1]}); without data.sft_source their "
            f"best replies are the demonstrations; or set chosen_column: {names[pair[0]]} and "
            "prompt_column in the source's settings"
        )
    if text is not None and prompt is None:
        return ConfigError(
            f"{text} holds plain text without a prompt, from which SFT here learns nothing: it "
            "learns replies to prompts, not to continue text; give a prompt and a reply, "
            "messages, or chats written as text"
        )
    if prompt is not None:
        return ConfigError(
            f"no column holds the reply to {prompt} ({listed}); if one does, write "
            f"data.sft_source={{source: …, prompt_column: {prompt}, chosen_column: …}}"
        )
    return ConfigError(
        f"no column holds conversations, or prompts with replies ({listed}); write "
        "data.sft_source={source: …, prompt_column: …, chosen_column: …}"
    )
