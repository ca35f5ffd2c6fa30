"""Section of the data: preference pairs, demonstrations and prompts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf.config.section import Section


class WorldConfig(Section):
    """The generated world of customer questions with a known gold score (`source: world`)."""

    pairs: int = Field(default=6000, ge=10)
    """Preference pairs to train on."""
    demonstrations: int = Field(default=6000, ge=10)
    """Replies of mixed quality for supervised fine-tuning."""
    prompts: int = Field(default=4608, ge=10)
    """Fresh prompts for PPO."""
    eval_pairs: int = Field(default=1000, ge=10)
    """Held-out preference pairs, on prompts that no training stage sees."""
    eval_prompts: int = Field(default=300, ge=10)
    """Held-out prompts for comparing policies; half of them use templates that are new too."""
    temperature: float = Field(default=0.5, gt=0)
    """Bradley–Terry temperature of the labels: P(a ≻ b) = σ((gold(a) − gold(b)) / temperature)."""


#: Layouts of preference data.
DataFormat = Literal[
    "auto", "pairs", "comparison", "rated", "ranking", "open-assistant", "label-studio", "argilla"
]

#: Treatment of rows that hold personal data.
PersonalDataPolicy = Literal["flag", "redact", "quarantine", "ignore"]


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
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return str(value) if is_number else value


class DataConfig(Section):
    """Source, format and split of the data."""

    source: str = Field(default="world", min_length=1)
    """`world`, or a CSV, JSONL, JSON or Parquet file (also .gz), a folder of them, an s3:// URI,
    or a hub dataset, `owner/name[:config][@revision]`, of preference pairs in any of the formats of
    docs/data.md."""
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
    labels: LabelsConfig = LabelsConfig()
    """Meaning of the values of `label_column`."""
    score_weights: dict[str, float] = Field(default_factory=dict[str, float])
    """Weights of several columns that rate one reply, by column; none takes HelpSteer's attributes
    with the weights of NVIDIA's SteerLM reward models."""
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
    max_row_mb: float = Field(default=16.0, gt=0)
    """Longest row that is read, in MB."""
    votes: Literal["majority", "keep"] = "majority"
    """Rows that repeat or contradict a pair: `majority` merges them to one pair and leaves out
    ties, `keep` trains on every row."""
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
    """Share of the *prompts* held out; all pairs of one prompt stay on one side."""
    max_pairs: int | None = Field(default=None, ge=10)
    """Use at most this many pairs (a seeded sample); none uses all."""
    max_prompt_chars: int = Field(default=4000, ge=1)
    """Pairs whose prompt is longer are left out and counted."""
    max_reply_chars: int = Field(default=8000, ge=1)
    """Pairs with a longer reply on either side are left out and counted."""

    @model_validator(mode="after")
    def _world_has_no_columns(self) -> Self:
        for name in ("reference_column", "metadata_columns"):
            value = getattr(self, name)
            if value and self.source == "world":
                raise ValueError(
                    f"{name} = {value!r}: source = 'world' has no such columns; set source to data "
                    "of your own"
                )
        return self

    @field_validator("source")
    @classmethod
    def _known_source(cls, value: str) -> str:
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
