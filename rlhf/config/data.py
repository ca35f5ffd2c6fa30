"""Section of the data: preference pairs, demonstrations and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rlhf.config.drift import DriftConfig
from rlhf.config.lengths import SystemPolicy
from rlhf.config.numbers import Count, Factor, RowMegabytes, Signed, Temperature, Tokens
from rlhf.config.section import Section, nested_error, validate_as
from rlhf.config.text import BROKEN, parse


class WorldConfig(Section):
    """The generated world of customer questions with a known gold score (`source: world`)."""

    pairs: Count = Field(default=6000, ge=10)
    """Preference pairs to train on."""
    demonstrations: Count = Field(default=6000, ge=10)
    """Replies of mixed quality for supervised fine-tuning."""
    judge_pairs: Count | None = Field(default=None, ge=0)
    """Preference pairs for the judge of the policy, on prompts of their own; none is a quarter of
    `pairs`, 0 makes none."""
    prompts: Count = Field(default=4608, ge=10)
    """Fresh prompts for PPO."""
    eval_pairs: Count = Field(default=1000, ge=10)
    """Held-out preference pairs, on prompts that no training stage sees."""
    eval_prompts: Count = Field(default=300, ge=10)
    """Held-out prompts for comparing policies; half of them use templates that are new too."""
    temperature: Temperature = Field(default=0.5, gt=0)
    """Bradley–Terry temperature of the labels: P(a ≻ b) = σ((gold(a) − gold(b)) / temperature)."""


#: Layouts of preference data.
DataFormat = Literal[
    "auto", "pairs", "comparison", "rated", "ranking", "open-assistant", "label-studio", "argilla"
]

#: Treatment of rows that hold personal data.
PersonalDataPolicy = Literal["flag", "redact", "quarantine", "ignore"]


def _column_names(value: object) -> object:
    """Return the names of columns that are written as on the command line: `chosen,rejected`."""
    return tuple(value.split(",")) if isinstance(value, str) else value


#: Names of columns, in a list or in one text.
Columns = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_column_names)]


class LabelsConfig(Section):
    """Values of the label column of a comparison log whose meaning its name does not tell."""

    first: str | None = None
    """Value of rows whose first reply (`response_a`, `answer_1`) is better."""
    second: str | None = None
    """Value of rows whose second reply is better."""
    tie: str | None = None
    """Value of rows without a preference, which are left out."""

    @field_validator("first", "second", "tie", mode="before")
    @classmethod
    def _numbers_are_text(cls, value: object) -> object:
        if isinstance(value, bool):
            words = "yes, on or true" if value else "no, off or false"
            raise ValueError(
                f"YAML reads {words} as a boolean; quote it as it stands in the data, such as "
                f"'{words.split(',', maxsplit=1)[0]}'"
            )
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return str(value) if is_number else value


class SourceConfig(Section):
    """One of several sources, and its settings that differ from the section's."""

    source: str = Field(min_length=1)
    """A file, folder, s3:// URI or hub dataset id."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """How often its rows are used: 1 once each, 2 twice, 0.3 three of ten, chosen by a hash."""
    format: DataFormat | None = None
    """Layout of its rows; none takes that of the section, here and below."""
    prompt_column: str | None = Field(default=None, min_length=1)
    """Column that holds the prompt, or a whole conversation."""
    chosen_column: str | None = Field(default=None, min_length=1)
    """Column that holds the preferred reply; in a source of demonstrations, the reply."""
    rejected_column: str | None = Field(default=None, min_length=1)
    """Column that holds the other reply."""
    system_column: str | None = Field(default=None, min_length=1)
    """Column whose text goes before the prompt as a system turn."""
    label_column: str | None = Field(default=None, min_length=1)
    """Column that says which reply is better, or rates one."""
    text_columns: Columns | None = None
    """Columns that are text as they stand."""
    ignore_columns: Columns | None = None
    """Columns of images, audio, video or tools that the replies do not depend on."""
    labels: LabelsConfig | None = None
    """Meaning of the values of `label_column`."""
    score_weights: dict[str, Signed] | None = None
    """Weights of several columns that rate one reply."""
    margin_column: str | None = Field(default=None, min_length=1)
    """Column with the margin of each pair."""
    margin_scale: Factor | None = Field(default=None, gt=0)
    """Factor of its margins, which brings sources with other scales to one unit."""
    reference_column: str | None = None
    """Column that holds the right answer to the prompt."""
    metadata_columns: tuple[str, ...] | None = None
    """Columns that go with the prompt to rewards."""
    encoding: str | None = None
    """Encoding of its text files."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """Delimiter of its CSV files."""
    hub_split: str | None = None
    """Split to read of a hub dataset."""

    @field_validator("source")
    @classmethod
    def _readable(cls, value: str) -> str:
        if value == "world":
            raise ValueError("'world' can't be mixed with other sources; give files or hub ids")
        return _check_uri(value)


#: One source by its name, or several with their weights and settings.
Sources = Annotated[str, Field(min_length=1)] | tuple[SourceConfig, ...]


#: Settings that follow from the data and are no part of them.
CONSEQUENCES = frozenset({"drift"})


class DataConfig(Section):
    """Source, format and split of the data."""

    source: Sources = "world"
    """`world`, or a CSV, JSONL, JSON or Parquet file (also .gz), a folder of them, an s3:// URI,
    or a hub dataset, `owner/name[:config][@revision]`, of preference pairs in any of the formats of
    docs/data.md; or a list of them, each a name or `{source, weight}` with the settings that
    differ."""
    sft_source: Sources | None = None
    """Demonstrations of their own for SFT, a name or a list as in `source`: conversations, or
    prompts with replies. Columns are found by name, or set in the list; none takes the best
    replies of the pairs."""
    sft_mode: Literal["replace", "add"] = "replace"
    """Whether the demonstrations of `sft_source` stand in place of those from the pairs, or beside
    them."""
    sft_turns: Literal["all", "last"] = "all"
    """Turns of a conversation that SFT learns: every assistant's, or the last one only."""
    prompts_source: Sources | None = None
    """Prompts of their own for PPO, a name or a list as in `source`, with the columns of
    references and metadata of this section; none takes the prompts of the pairs."""
    prompts_mode: Literal["replace", "add"] = "replace"
    """Whether the prompts of `prompts_source` stand in place of those of the pairs, or beside
    them."""
    world: WorldConfig = WorldConfig()
    """Size of the generated world; used with `source: world` only."""
    format: DataFormat = "auto"
    """Layout of the rows (docs/data.md); `auto` finds it by the columns, and says what it found."""
    prompt_column: str | None = Field(default=None, min_length=1)
    """Column that holds the prompt: a string, or a list of chat messages. This and all columns may
    be a dotted path (`pair.better`, `messages.0.content`); none finds it by name."""
    chosen_column: str | None = Field(default=None, min_length=1)
    """Column that holds the preferred reply; none finds it by name."""
    rejected_column: str | None = Field(default=None, min_length=1)
    """Column that holds the other reply; none finds it by name."""
    system_column: str | None = Field(default=None, min_length=1)
    """Column whose text goes before the prompt as a system turn; none finds it by name."""
    label_column: str | None = Field(default=None, min_length=1)
    """Column that says which of two replies is better, or rates a single one; none finds it by
    name."""
    text_columns: Columns = ()
    """Columns that are text as they stand: marks of chats, names of speakers and end tokens in them
    belong to the text, so that nothing is parsed, cut or left out for them."""
    ignore_columns: Columns = ()
    """Columns of images, audio, video or tools that the replies do not depend on; rows with content
    in others of that kind are left out, because no model here sees it."""
    labels: LabelsConfig = LabelsConfig()
    """Meaning of the values of `label_column`."""
    score_weights: dict[str, Signed] = Field(default_factory=dict[str, float])
    """Weights of several columns that rate one reply, by column; none takes HelpSteer's attributes
    with the weights of NVIDIA's SteerLM reward models."""
    margin_column: str | None = Field(default=None, min_length=1)
    """Column with the margin of each pair: by how much the preferred reply is better, for
    `reward_model.margin_coef`; none finds it by name, or takes the difference of scores."""
    margin_scale: Factor = Field(default=1.0, gt=0)
    """Factor of all margins."""
    reference_column: str | None = None
    """Column that holds the right answer to the prompt, for rewards that compare with it."""
    metadata_columns: tuple[str, ...] = ()
    """Columns that go with the prompt to custom and remote rewards."""
    eval_source: str | None = Field(default=None, min_length=1)
    """Held-out pairs of their own, read as `source` is; none holds out the source's own test or
    validation part, if it has one, or else a share of its prompts."""
    split: Literal["auto", "random"] = "auto"
    """`auto` holds out a folder's files named test, validation or eval; `random` treats all files
    alike, and holds out a share of the prompts."""
    encoding: str | None = None
    """Encoding of text files (`cp1252`, `utf-16`); none reads UTF-8."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """Delimiter of CSV files; none finds it: comma, semicolon, tab or pipe."""
    max_row_mb: RowMegabytes = Field(default=16.0, gt=0)
    """Longest row that is read, in MB."""
    votes: Literal["majority", "keep", "weight"] = "majority"
    """Rows that repeat or contradict a pair: `majority` merges them to one pair and leaves out
    ties, `weight` does too and trains on it with the weight |a − b| / (a + b) of a : b votes,
    `keep` trains on every row."""
    personal_data: PersonalDataPolicy = "flag"
    """Rows with an email address, phone number, payment card, IBAN or IP address: `flag` counts
    them, `redact` replaces each by a placeholder such as `[EMAIL]`, `quarantine` leaves the rows
    out, `ignore` does not look. With `redact` and `quarantine` no file of the dataset holds any."""
    max_bad_fraction: float = Field(default=0.1, ge=0, le=1)
    """Largest share of rows with something wrong; above it the stage stops and explains. Ties, lost
    votes and rows whose replies are the same are not wrong."""
    hub_split: str = "train"
    """Split to read when `source` is a hub dataset."""
    eval_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the *prompts* held out; prompts near each other stay on one side (docs/data.md)."""
    rotation: Count = Field(default=0, ge=0)
    """Number of the choice of held-out prompts: another number holds out others, and lets the gates
    leave the champion's gate prompts for those of this run (docs/gates.md). Of sources with a
    held-out part of their own, and of the world, it changes the latter alone."""
    judge_fraction: float | None = Field(default=None, ge=0, lt=1)
    """Share of the prompts whose pairs go to `pairs-judge.parquet`, on which the judge alone is
    trained (section `judge`); no other stage and no gate sees them. 0 writes no such file; none is
    0.1 from 1,000 prompts on, near duplicates counted once, and 0 below."""
    near_duplicates: float | None = Field(default=0.8, ge=0.5, le=1)
    """Least Jaccard similarity of two texts that count as near duplicates; none searches none."""
    max_reply_share: float | None = Field(default=0.01, gt=0, le=1)
    """Largest share of the prompts under which one reply, or near duplicates of it, may stand;
    pairs with such a reply are left out, unless most pairs of their file have one. Replies under 20
    characters may recur, and every reply under ten prompts. none allows all."""
    contradictions: Literal["keep", "majority", "downweight"] = "keep"
    """Pairs of which a near duplicate prefers the other reply: `keep` trains on both, `majority`
    leaves out those with fewer rows, and ties; `downweight` does too and trains on the others with
    the weight |a − b| / (a + b) of a : b rows."""
    max_pairs: Count | None = Field(default=None, ge=10)
    """Use at most this many pairs (a seeded sample); none uses all."""
    max_prompt_chars: Count = Field(default=4000, ge=1)
    """Pairs whose prompt is longer are left out and counted."""
    max_reply_chars: Count = Field(default=8000, ge=1)
    """Pairs with a longer reply on either side are left out and counted."""
    drift: DriftConfig = DriftConfig()
    """Consequences of a difference between the data and those of the champion."""
    max_prompt: Tokens | None = Field(default=None, ge=1)
    """Longest prompt in tokens of the model, in every stage: of a longer one whole turns after the
    system turn are left out, oldest first; what still does not fit is left out and counted. none is
    what `ppo.max_new_tokens` leave of the shorter `max_length`."""
    max_reply: Tokens | None = Field(default=None, ge=1)
    """Longest reply in tokens, with its end token, in every stage; a longer one is cut and has no
    end token. none is what its prompt leaves of `max_length`."""
    system: SystemPolicy = "fold"
    """System turns where the model's chat template has none: `fold` puts them into the first user
    turn, `refuse` leaves the rows out and counts them."""

    @model_validator(mode="after")
    def _world_has_no_columns(self) -> Self:
        for name in ("reference_column", "metadata_columns", "margin_column"):
            value = getattr(self, name)
            if value and self.source == "world":
                raise ValueError(
                    f"{name} = {value!r}: source = 'world' has no such columns; set source to data "
                    "of your own"
                )
        for name in ("sft_source", "prompts_source"):
            if getattr(self, name) is not None and self.source == "world":
                raise ValueError(
                    f"{name} is set, but source = 'world' makes all of its data; set source to "
                    "data of your own"
                )
        return self

    @model_validator(mode="after")
    def _modes_need_sources(self) -> Self:
        for name in ("sft", "prompts"):
            if getattr(self, f"{name}_mode") == "add" and getattr(self, f"{name}_source") is None:
                raise ValueError(
                    f"{name}_mode = 'add' adds {name}_source, which is not set; set it"
                )
        return self

    @model_validator(mode="after")
    def _some_prompts_are_trained_on(self) -> Self:
        if self.judge_fraction and self.source == "world":
            raise ValueError(
                f"judge_fraction = {self.judge_fraction:g}: source = 'world' makes the pairs of "
                "its judge; set world.judge_pairs instead"
            )
        if self.judge_fraction and self.judge_fraction + self.eval_fraction >= 1:
            raise ValueError(
                f"judge_fraction = {self.judge_fraction:g} and eval_fraction = "
                f"{self.eval_fraction:g} leave nothing to train on; together they must be below 1"
            )
        return self

    @field_validator("source", "sft_source", "prompts_source", mode="before")
    @classmethod
    def _read_list(cls, value: Any) -> Any:
        """Read a list, and one written as text on the command line."""
        if isinstance(value, str) and value[:1] in ("[", "{"):
            try:
                value = parse(value)
            except BROKEN:
                raise ValueError(
                    "begins like a list of sources, and is none; write "
                    "[{source: a.jsonl, weight: 2}, {source: b.jsonl}]"
                ) from None
        if isinstance(value, dict):
            value = [value]
        return tuple(_read_sources(cast("list[Any]", value))) if _is_list(value) else value

    @field_validator("source", "eval_source", "sft_source", "prompts_source")
    @classmethod
    def _known_source(cls, value: Sources | None) -> Sources | None:
        return _check_uri(value) if isinstance(value, str) else value

    @property
    def has_references(self) -> bool:
        """True if a column holds right answers to the prompts that PPO answers."""
        sources = self.source if self.prompts_source is None else self.prompts_source
        items: tuple[SourceConfig, ...] = () if isinstance(sources, str) else sources
        return bool(self.reference_column or any(item.reference_column for item in items))


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _read_sources(items: list[Any]) -> Iterator[SourceConfig]:
    if not items:
        raise ValueError("is an empty list; give at least one source")
    for index, item in enumerate(items):
        if isinstance(item, SourceConfig):
            yield item
            continue
        try:
            yield validate_as(SourceConfig, {"source": item} if isinstance(item, str) else item)
        except PydanticCustomError as error:
            errors = cast("list[dict[str, Any]]", (error.context or {})["errors"])
            raise nested_error([{**e, "loc": (index, *e["loc"])} for e in errors]) from None


def _check_uri(value: str) -> str:
    scheme, separator, rest = value.partition("://")
    if not separator:
        return value
    host = rest.partition("/")[0]
    if "@" in host:
        # The value itself must not be repeated: it may hold a password.
        raise ValueError("holds user info; give credentials by the AWS chain instead")
    if scheme not in ("file", "s3"):
        raise ValueError(
            f"scheme {scheme!r} is not supported; download the data, or use s3:// or a hub id"
        )
    if bool(host) is not (scheme == "s3"):
        raise ValueError("is no full URI; write s3://bucket/key or file:///folder")
    return value
