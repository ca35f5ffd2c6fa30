"""Replies that are rated one by one: by thumbs (KTO), scores, or HelpSteer's attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rlhf.config import DataConfig
from rlhf.data.cells import Cells, Found
from rlhf.data.columns import Row, cell_of, value_of
from rlhf.data.records import Converted, Rated
from rlhf.data.scores import are_scores, direction, is_score, mean_score
from rlhf.errors import ConfigError

REPLIES = ("completion", "response", "answer", "reply", "output", "generation", "text")
#: Columns of whole conversations, whose last message is the reply that is rated.
CONVERSATIONS = ("messages", "conversations", "conversation")
RATINGS = (
    "label", "thumbs", "feedback", "vote", "rating", "score", "overall_score", "reward", "quality",
    "overall", "is_good", "desirable",
)  # fmt: skip
#: Default of `data.score_weights`: HelpSteer's attributes, as NVIDIA's SteerLM weighs them.
ATTRIBUTES = {
    "helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45, "complexity": 0.55,
    "verbosity": -0.4,
}  # fmt: skip
#: Columns of thumbs, whose numbers are no scale.
_THUMBS = ("label", "thumbs", "feedback", "vote")


@dataclass(frozen=True)
class _Rating:
    """Rows of one reply with a label or scores."""

    columns: tuple[str, ...]
    weights: tuple[float, ...] = (1.0,)

    def convert(self, row: Row, cells: Cells, roles: Sequence[str]) -> Converted:
        notes: set[str] = set()
        if cells.prompt is None:
            prompt, reply = cells.read_conversation(row, roles[0], notes)
        else:
            prompt = cells.read_prompt(row, notes)
            value = cell_of(row, cells.first)
            reply = cells.read_reply(value, cells.first, prompt, roles[0], notes)
        score = sum(
            weight * mean_score(value_of(row, column), column)
            for column, weight in zip(self.columns, self.weights, strict=True)
        )
        return Converted(rated=[Rated(prompt, reply, score)], notes=frozenset(notes))


def find_rated(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig,
    prompt: Cells,
) -> Found | None:  # fmt: skip
    """Return the columns of a prompt, a reply, and its label or scores, if there are such."""
    reply = config.chosen_column or next((names[n] for n in REPLIES if n in names), None)
    label = config.label_column or next(
        (names[n] for n in RATINGS if n in names and are_scores(sample, names[n])), None
    )
    if reply is None and prompt.prompt in [names.get(n) for n in CONVERSATIONS]:
        reply, prompt = prompt.prompt, replace(prompt, prompt=None)
    elif prompt.prompt in (None, reply):
        return None
    if reply is None:
        return None
    cells = replace(prompt, first=reply, second=reply)
    attributes = config.score_weights or {
        names[n]: weight for n, weight in ATTRIBUTES.items() if n in names
    }
    if config.score_weights or (label is None and len(attributes) > 1):
        total = " ".join(f"{weight:+g} {name}" for name, weight in attributes.items())
        note = f"rated: replies to one prompt are compared by {total}"
        return cells, ("reply", "reply"), _Rating((*attributes,), (*attributes.values(),)), (note,)
    label = label or next(iter(attributes), None)
    if label is None or not are_scores(sample, label):
        return None
    _check_thumbs(sample, label)
    sign, order = direction(label)
    source = f"{reply} to {prompt.prompt}" if prompt.prompt else f"the last reply of {reply}"
    note = f"rated: {source}; replies to one prompt are compared by {label}, the {order} is best"
    return cells, ("reply", "reply"), _Rating((label,), (sign,)), (note,)


def _check_thumbs(sample: Sequence[Row], column: str) -> None:
    """Refuse thumbs of 1 and 2: nothing says which of them is up.

    Raises:
        ConfigError: With the values that say it.
    """
    values = [cell_of(row, column) for row in sample]
    scores = {mean_score(value, column) for value in values if is_score(value)}
    if column.lower() in _THUMBS and scores == {1.0, 2.0}:
        raise ConfigError(
            f"data.label_column: {column!r} holds 1 and 2, which don't say whether 1 or 2 is the "
            "better; write true and false, or rename the column to rating (the highest is best) "
            "or rank (the lowest)"
        )
