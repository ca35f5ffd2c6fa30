"""Rows with several candidate replies inside: Bedrock's pairs, Prodigy's choices, PRISM's turns.

Each is turned into flat rows, one for each turn or pair, which the layouts of columns read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.config import DataConfig
from rlhf.data.chat import ROLES
from rlhf.data.collect import MAX_RANKED_PAIRS
from rlhf.data.columns import Row, plain_name
from rlhf.data.records import Converted, LeftOutError
from rlhf.data.reply_columns import reply_columns
from rlhf.errors import ConfigError, NoPreferences

#: Columns that Prodigy adds to its tasks.
_PRODIGY = ("options", "accept", "answer", "_view_id")
#: Answers of Prodigy's annotators that say nothing of the options.
_UNANSWERED = ("reject", "ignore")
_HISTORY = "conversation_history"
#: Labels of the two candidates of a Bedrock row.
_PREFERRED, _OTHER = "preferred", "non-preferred"
#: Columns that may hold the steps of a solution, and the ratings of each.
_STEPS, _STEP_LABELS = ("completions", "steps"), ("labels", "step_labels")
#: Rows that must have equal options before these are taken for labels.
_FEWEST = 3


@dataclass(frozen=True)
class Candidates:
    """Rows of one of these kinds, and how they become flat rows."""

    flatten: Callable[[Row], list[Row]]
    """Returns the flat rows; raises LeftOutError."""
    read: tuple[str, ...]
    """Columns that are read."""
    note: str
    label: str | None = None
    """Column of the flat rows that says which reply is better."""

    def sample(self, rows: Sequence[Row]) -> tuple[list[str], list[Row]]:
        """Return the columns and rows of the flat form.

        Raises:
            ConfigError: None of the rows can be used.
        """
        flat: list[Row] = []
        reason = ""
        for row in rows:
            try:
                flat += self.flatten(row)
            except LeftOutError as error:
                reason = reason or f"{error.reason}; {error.shown_cure}"
        if not flat:
            raise ConfigError(
                f"data.source: {self.note}, but of the first {len(rows)} rows none can be used: "
                f"{reason or 'they are empty'}"
            )
        return [*dict.fromkeys(name for row in flat for name in row)], flat

    def convert(self, row: Row, convert: Callable[[Row], Converted]) -> Converted:
        """Return what all flat rows of a row say.

        Raises:
            LeftOutError: None of them can be used.
        """
        fault: LeftOutError | None = None
        parts: list[Converted] = []
        for flat in self.flatten(row):
            try:
                parts.append(convert(flat))
            except LeftOutError as error:
                # A tie says less than a fault about a row of which nothing can be used.
                fault = error if fault is None or fault.is_choice else fault
        if not parts:
            raise fault or LeftOutError("the row compares nothing", is_choice=True)
        notes = frozenset(itertools.chain.from_iterable(part.notes for part in parts))
        if fault is not None and not fault.is_choice:
            notes |= {f"turns and pairs that can't be used are left out of their rows: {fault}"}
        return replace(parts[0], comparisons=[c for p in parts for c in p.comparisons], notes=notes)


def find_candidates(
    columns: Sequence[str], sample: Sequence[Row], config: DataConfig, prompts: Collection[str]
) -> Candidates | None:
    """Return how rows of nested candidates become flat ones; None for other rows.

    Args:
        columns: Names of all columns.
        sample: First rows.
        config: Columns that the user set; with the replies' ones nothing is looked for.
        prompts: Names of columns that are taken for prompts.
    """
    if config.chosen_column or config.rejected_column:
        return None
    if {*_PRODIGY[:2]} <= {*columns} and config.label_column in (None, "accept"):
        return _prodigy(columns, sample, config, prompts)
    if config.label_column is not None or config.prompt_column is not None:
        return None
    if "messages" in columns and any(_last_candidates(row) for row in sample):
        return Candidates(
            _bedrock_pairs, ("messages", "system", "schemaVersion"),
            "Bedrock's preference pairs: preferenceLabel says which candidate of the last turn is "
            "preferred",
        )  # fmt: skip
    if _HISTORY in columns and any(_is_rated_chat(row.get(_HISTORY)) for row in sample):
        return Candidates(
            _rated_turns, (_HISTORY, "opening_prompt"),
            "PRISM's conversations: the replies of each turn are compared by score, and the one "
            "with if_chosen is what the next turn follows",
        )  # fmt: skip
    return None


# --- Bedrock ----------------------------------------------------------------------------------


def _last_candidates(row: Row) -> Any:
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list | tuple) and messages else None
    return last.get("candidates") if isinstance(last, Mapping) else None


def _bedrock_pairs(row: Row) -> list[Row]:
    """Return a flat row for each preferred candidate and each other one."""
    candidates = _last_candidates(row)
    if not isinstance(candidates, list | tuple) or len(candidates) < 2:
        raise LeftOutError(
            "the last message has no two candidates", str(candidates)[:60],
            "give each conversation a preferred and a non-preferred candidate",
        )  # fmt: skip
    sides: dict[Any, list[Any]] = {_PREFERRED: [], _OTHER: []}
    for item in candidates:
        label = item.get("preferenceLabel") if isinstance(item, Mapping) else None
        if label not in sides:
            raise LeftOutError(
                "a candidate has an unknown preferenceLabel", repr(label)[:60],
                f"write {_PREFERRED} or {_OTHER}",
            )  # fmt: skip
        sides[label].append([{"role": "assistant", "content": item.get("content")}])
    if not sides[_PREFERRED] or not sides[_OTHER]:
        raise LeftOutError("tie: all candidates have the same preferenceLabel", is_choice=True)
    rest = {"prompt": [*row["messages"][:-1]]}
    rest |= {"system": row["system"]} if row.get("system") else {}
    return [{**rest, "chosen": a, "rejected": b} for a, b in _crossed(*sides.values())]


def _crossed(ones: Sequence[Any], others: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return itertools.islice(itertools.product(ones, others), MAX_RANKED_PAIRS)


# --- Prodigy ----------------------------------------------------------------------------------


def _prodigy(
    columns: Sequence[str], sample: Sequence[Row], config: DataConfig, prompts: Collection[str]
) -> Candidates | None:
    """Return the flat rows of tasks whose options are replies, or labels of reply columns."""
    tasks = [o for row in sample if (o := _options(row)) is not None]
    if not tasks:
        return None
    names = {plain_name(name): name for name in columns if name not in _PRODIGY}
    has_prompt = config.prompt_column is not None or bool(prompts & names.keys())
    read = _PRODIGY if has_prompt else (*_PRODIGY, "text")
    if reply_columns(names, sample) is not None:
        return Candidates(
            lambda row: [{**_task(row, has_prompt), "accept": _only_accepted(row)}],
            read, "Prodigy's choices: accept says which reply is better", "accept",
        )  # fmt: skip
    if len(tasks) >= _FEWEST and len({repr([o.get("text") for o in t]) for t in tasks}) == 1:
        return None  # labels of a single text
    are_two = all(len(task) == 2 for task in tasks)
    form = _chosen_side if are_two else _accepted_pairs
    return Candidates(
        lambda row: form(row, _task(row, has_prompt)), read,
        "Prodigy's choices: the options in accept are preferred to the others",
        "winner" if are_two else None,
    )  # fmt: skip


def _options(row: Row) -> list[Mapping[str, Any]] | None:
    options = row.get("options")
    if not isinstance(options, list | tuple) or len(options) < 2:
        return None
    items = [item for item in options if isinstance(item, Mapping) and "id" in item]
    return items if len(items) == len(options) else None


def _task(row: Row, has_prompt: bool) -> dict[str, Any]:
    """Return the columns of a task beside its options; its text is the prompt if no other is.

    Raises:
        LeftOutError: It was not answered.
    """
    if row.get("answer", "accept") in _UNANSWERED:
        raise LeftOutError(
            "the task was rejected or ignored", f"answer is {row['answer']!r}", is_choice=True
        )
    task = {name: value for name, value in row.items() if name not in _PRODIGY}
    if not has_prompt and "text" in task:
        task["prompt"] = task.pop("text")
    return task


def _accepted(row: Row) -> list[Any]:
    accepted = row.get("accept")
    accepted = accepted if isinstance(accepted, list | tuple) else [accepted]
    return [value for value in accepted if value is not None]


def _only_accepted(row: Row) -> Any:
    accepted = _accepted(row)
    if len(accepted) != 1:
        raise LeftOutError("not exactly one option is accepted", str(accepted)[:60], is_choice=True)
    return accepted[0]


def _split_options(row: Row) -> tuple[list[Any], list[Any]]:
    """Return the texts of the accepted options and of the others.

    Raises:
        LeftOutError: An option is no text, an id is unknown or given twice, or nothing is compared.
    """
    options, accepted = _options(row), _accepted(row)
    if options is None:
        raise LeftOutError("the task has no two options with ids", str(row.get("options"))[:60])
    ids = [option["id"] for option in options]
    if any(ids.count(value) != 1 for value in accepted):
        raise LeftOutError("accept names no single option", f"{accepted} of {ids}"[:60])
    if any("text" not in option for option in options):
        raise LeftOutError("an option has no text", str(options[0])[:60], "give options as text")
    if not 0 < len(accepted) < len(ids):
        raise LeftOutError("tie: all options are accepted, or none", is_choice=True)
    chosen = [option["text"] for option in options if option["id"] in accepted]
    return chosen, [option["text"] for option in options if option["id"] not in accepted]


def _accepted_pairs(row: Row, task: Row) -> list[Row]:
    pairs = _crossed(*_split_options(row))
    return [{**task, "chosen": one, "rejected": other} for one, other in pairs]


def _chosen_side(row: Row, task: Row) -> list[Row]:
    """Return a comparison of two options, which keeps the position of the better one."""
    (chosen, *_), (other, *more) = _split_options(row)
    if more or len(row["options"]) != 2:
        raise LeftOutError(
            "the task has more options than the first rows", f"{len(row['options'])}, not 2",
            "give tasks of two options and of more in a file each",
        )  # fmt: skip
    is_first = row["options"][0]["id"] in _accepted(row)
    texts = (chosen, other) if is_first else (other, chosen)
    sides = {"option_1": texts[0], "option_2": texts[1]}
    return [{**task, **sides, "winner": "option_1" if is_first else "option_2"}]


# --- PRISM ------------------------------------------------------------------------------------


def _is_rated_chat(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(
        isinstance(item, Mapping) and "role" in item and {"score", "if_chosen"} & {*item}
        for item in value
    )


def _rated_turns(row: Row) -> list[Row]:
    """Return a flat row for each turn with several replies, behind the turns that were chosen."""
    history = row.get(_HISTORY)
    if not isinstance(history, list | tuple) or not all(isinstance(m, Mapping) for m in history):
        raise LeftOutError(f"{_HISTORY} is no list of messages", str(history)[:60])
    rows: list[Row] = []
    before: list[Mapping[str, Any]] = []
    for turn in _turns(history):
        asked, replies = turn[0], turn[1:]
        if before and _role(before[-1]) == "user":
            raise LeftOutError(
                "a turn follows replies of which not exactly one has if_chosen",
                f"{len(rows)} turns before it", "mark the reply that the user went on with",
            )  # fmt: skip
        before = [*before, {"role": asked.get("role"), "content": asked.get("content")}]
        if len(replies) > 1:
            rows.append({"prompt": before, "candidates": _scored(replies)})
        is_open = len(replies) > 1
        chosen = [m for m in replies if m.get("if_chosen") is True] if is_open else replies
        if len(chosen) == 1:
            before = [*before, {"role": "assistant", "content": chosen[0].get("content")}]
    if not rows:
        raise LeftOutError("no turn has two replies", is_choice=True)
    return rows


def _turns(history: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Yield each message of the user with the replies to it; a system turn stands alone."""
    turn: list[Mapping[str, Any]] = []
    for message in history:
        if turn and _role(message) != "assistant":
            yield turn
            turn = []
        turn.append(message)
    if turn:
        yield turn


def _role(message: Mapping[str, Any]) -> str | None:
    return ROLES.get(str(message.get("role")).strip().lower())


def _scored(replies: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return texts and scores of a turn's replies; without any score, the chosen one has 1.

    Raises:
        LeftOutError: The chosen reply has a lower score than another one.
    """
    scores = [reply.get("score") for reply in replies]
    if not any(score is not None for score in scores):
        scores = [float(reply.get("if_chosen") is True) for reply in replies]
    known = [score for score in scores if isinstance(score, int | float)]
    for reply, score in zip(replies, scores, strict=True):
        is_lower = isinstance(score, int | float) and score < max(known)
        if reply.get("if_chosen") is True and is_lower:
            raise LeftOutError(
                "if_chosen and score say the contrary", f"{score:g} of {max(known):g}",
                "leave one of them out",
            )  # fmt: skip
    return [{"text": r.get("content"), "score": s} for r, s in zip(replies, scores, strict=True)]


# --- ratings of steps -------------------------------------------------------------------------


def check_steps(sample: Sequence[Row]) -> None:
    """Refuse rows whose steps are rated, which no comparison of whole replies can use.

    Raises:
        ConfigError: With what they are, and the setting where it may be otherwise.
    """
    cure = (
        "ratings of steps train process reward models, and the reward model here learns from whole "
        "replies; give two whole solutions of each problem and which is better, such as a right "
        "and a wrong one"
    )
    for row in sample:
        label = row.get("label")
        steps = label.get("steps") if isinstance(label, Mapping) else None
        if isinstance(steps, list | tuple) and steps:
            raise NoPreferences(
                f"data.source: label.steps holds solutions whose steps are rated (PRM800K): {cure}"
            )
        for one, other in itertools.product(_STEPS, _STEP_LABELS):
            if not _rate_each(row.get(one), row.get(other)):
                continue
            if one == "completions":
                cure += (
                    f"; or, if each text in {one} is a whole reply, set data.label_column={other}"
                )
            raise NoPreferences(
                f"data.source: {one} and {other} hold solutions whose steps are rated (TRL's "
                f"stepwise supervision): {cure}"
            )


def _rate_each(steps: Any, labels: Any) -> bool:
    """Return whether a list of texts has a flag or a rating of −1, 0 and 1 for each."""
    if not isinstance(steps, list | tuple) or not isinstance(labels, list | tuple):
        return False
    are_flags = all(isinstance(label, int | float) and label in (-1, 0, 1) for label in labels)
    are_texts = all(isinstance(step, str) for step in steps)
    return bool(steps) and len(steps) == len(labels) and are_flags and are_texts
