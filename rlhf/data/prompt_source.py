"""Prompts of their own for PPO: a text or a chat, with a reference and metadata.

An answer in the row never becomes a part of the prompt: a conversation loses the replies that end
it, columns with answers are not read, and a prompt that ends with the row's answer is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from rlhf.config import DataConfig, StoreConfig
from rlhf.data.cells import Cells
from rlhf.data.chat import loose_text
from rlhf.data.collect import too_long
from rlhf.data.column_forms import with_forms
from rlhf.data.columns import Row, cell_of, check_settings, plain_name
from rlhf.data.comparisons import PAIRS
from rlhf.data.demonstrations import CHATS, TEXTS, more_column
from rlhf.data.demonstrations import REPLIES as SINGLE_REPLIES
from rlhf.data.formats import PROMPTS, SYSTEMS, detect
from rlhf.data.markup import LISTS
from rlhf.data.mixing import MixedSource
from rlhf.data.model_check import CheckPrompt
from rlhf.data.own_rows import Found, OwnRows, RowLayout, read_own_rows
from rlhf.data.privacy import PersonalData
from rlhf.data.prompt_fields import PromptFields
from rlhf.data.quarantine import Quarantine
from rlhf.data.records import LeftOutError
from rlhf.data.reply_lists import LISTS as REPLY_LISTS
from rlhf.data.rows import Prompt, PromptRow, messages_of
from rlhf.errors import ConfigError

_PROMPTS = (*(n for n in PROMPTS if n not in (*CHATS, "history", "context")), *CHATS, *TEXTS,
            "context", "history")  # fmt: skip
#: Columns that hold answers, which are not read.
ANSWERS = (
    *SINGLE_REPLIES, *REPLY_LISTS, *(name for pair in PAIRS for name in pair), "ground_truth",
    "reference", "best_answer", "correct_answer", "label", "labels", "final_answer",
)  # fmt: skip
#: A shorter answer, such as a number or an option, may end a question by chance. In characters.
_MIN_ANSWER = 20
#: Settings of a source that have no meaning for prompts.
_FOREIGN = ("chosen_column", "rejected_column", "label_column", "score_weights", "margin_column")


def read_prompts(
    config: DataConfig,
    options: StoreConfig,
    quarantine: Quarantine,
    fields: PromptFields,
    held_out: Iterable[Prompt],
    seed: int,
    note: Callable[[str], None],
    personal: PersonalData,
    check: CheckPrompt | None = None,
    limit: int | None = None,
) -> OwnRows[PromptRow]:
    """Read `data.prompts_source`; references and metadata are those of `fields`.

    Args:
        config: The section.
        options: S3 options.
        quarantine: Receives the rows that are left out.
        fields: Receives and holds references and metadata.
        held_out: Prompts of the gate, which no training stage may see.
        seed: Seeds the choice by weights.
        note: Receives sentences for the user.
        personal: Policy for personal data.
        check: Finds prompts that the model can't be given.
        limit: Read at most this many rows of each file, to look at them.

    Raises:
        ConfigError: A source does not exist, or no column holds prompts.
        DataError: It can't be parsed, or too many rows are unusable.
        StoreError: The S3 server can't be reached, or a transfer broke.
    """
    own = read_own_rows(
        config, "prompts_source", options, quarantine, partial(find_layout, fields=fields),
        held_out=held_out, seed=seed, note=note, personal=personal, check=check,
        limit=limit,
    )  # fmt: skip
    own.items = [fields.complete(row) for row in own.items]
    return own


def find_layout(
    columns: Sequence[str], sample: Sequence[Row], source: MixedSource, text_cells: bool, *,
    fields: PromptFields,
) -> RowLayout[PromptRow]:  # fmt: skip
    """Return how the rows of a file hold prompts, by columns, first rows and settings.

    Raises:
        ConfigError: No column holds a prompt, or a setting has no meaning here.
    """
    config = source.config
    check_settings(columns, sample, config)
    for name in _FOREIGN:
        if getattr(config, name):
            raise ConfigError(f"{name} has no meaning for prompts; remove the setting")
    names = {plain_name(column): column for column in reversed(columns)}
    extra = (*config.metadata_columns, *filter(None, [config.reference_column]))
    prompt = config.prompt_column or next(
        (names[n] for n in _PROMPTS if n in names and names[n] not in extra), None
    )
    present = dict.fromkeys(names[n] for n in ANSWERS if n in names)
    answers = tuple(column for column in present if column not in (prompt, *extra))
    if prompt is None:
        return _from_pairs(columns, sample, config, text_cells, extra, fields)
    cells = Cells(
        prompt, prompt, prompt, text_cells=text_cells,
        system=config.system_column or next((names[n] for n in SYSTEMS if n in names), None),
        more=more_column(names, prompt),
        history=names.get("history") if names.get("history") != prompt else None,
        plain=frozenset(config.text_columns),
    )  # fmt: skip
    cells, notes = with_forms(cells, sample)
    reader = _Reader(cells, config, fields.of(config), answers)
    first = [f"prompts are those of {prompt}"]
    if cells.system is not None:
        first.append(f"{cells.system} goes before the prompt as a system turn")
    if answers:
        first.append(f"answers are not read: {', '.join(answers)}")
    return RowLayout("prompts", (*cells.columns, *extra), (*first, *notes), reader.convert)


@dataclass(frozen=True)
class _Reader:
    """Converts rows to prompts without answers."""

    cells: Cells
    config: DataConfig
    fields: PromptFields
    answers: tuple[str, ...]
    """Columns that hold answers."""

    def convert(self, row: Row, note: Callable[[str], None]) -> list[Found[PromptRow]]:
        """Return the prompt of a row."""
        notes: set[str] = set()
        prompt = self.cells.read_prompt(self._without_reply(row, notes), notes)
        last = messages_of(prompt)[-1]
        if last["role"] == "system":
            raise LeftOutError(
                "prompt has no user's turn", last["content"][:60], "give the question too"
            )
        self._check_answers(row, last["content"])
        for text in sorted(notes):
            note(text)
        return [_found(row, prompt, self.config, self.fields)]

    def _without_reply(self, row: Row, notes: set[str]) -> Row:
        """Return the row with a conversation that ends before its last reply."""
        cells = self.cells
        assert cells.prompt is not None
        value = cell_of(row, cells.prompt)
        markup = (cells.markups or {}).get(cells.prompt)
        is_text = isinstance(value, str) and (markup is None or markup in LISTS)
        if is_text or not isinstance(value, str | list | tuple | dict) or not value:
            return row
        messages = cells.read_messages(row, "prompt")
        count = len(messages)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise LeftOutError("prompt is nothing but replies", cure="give the question too")
        if len(messages) < count:
            notes.add(f"the reply that ends a conversation in {cells.prompt} is cut off")
        return {**row, cells.prompt: messages}

    def _check_answers(self, row: Row, question: str) -> None:
        """Refuse a prompt that ends with an answer of its row."""
        asked = loose_text(question)
        for column in self.answers:
            answer = cell_of(row, column)
            if not isinstance(answer, str):
                continue
            text = loose_text(answer)
            if len(text) >= _MIN_ANSWER and asked.endswith(text):
                raise LeftOutError(
                    "prompt ends with the row's answer", f"{column}: {answer[:40]!r}",
                    "set prompt_column to a column without it",
                )  # fmt: skip


def _from_pairs(
    columns: Sequence[str], sample: Sequence[Row], config: DataConfig, text_cells: bool,
    extra: Sequence[str], fields: PromptFields,
) -> RowLayout[PromptRow]:  # fmt: skip
    """Return the layout of preference data whose prompts are no column.

    Raises:
        ConfigError: The rows are none.
    """
    try:
        layout = detect(columns, sample, config, text_cells=text_cells)
    except ConfigError:
        listed = ", ".join(map(str, columns))[:200]
        raise ConfigError(
            f"no column holds prompts by its name ({listed}); write "
            "data.prompts_source={source: …, prompt_column: …}"
        ) from None
    own = fields.of(config)

    def convert(row: Row, note: Callable[[str], None]) -> list[Found[PromptRow]]:
        converted = layout.convert(row)
        prompts = [item.prompt for item in (*converted.comparisons, *converted.rated)]
        for text in sorted(converted.notes):
            note(text)
        return [_found(row, prompt, config, own) for prompt in prompts[:1]]

    notes = (*layout.notes, "only the prompts are used")
    return RowLayout(layout.name, (*layout.columns, *extra), notes, convert)


def _found(row: Row, prompt: Prompt, config: DataConfig, fields: PromptFields) -> Found[PromptRow]:
    fault = too_long(prompt, [""], config)
    return Found(PromptRow(prompt), prompt, fault=fault, on_use=fields.read(row, prompt))
