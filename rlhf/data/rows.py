"""Rows of a dataset artifact, as Parquet files of one schema each.

| file | columns |
|---|---|
| `demonstrations.parquet` | response |
| `pairs-train.parquet`, `pairs-eval.parquet` | chosen, rejected, group, margin, weight |
| `pairs-judge.parquet` | the same, for the judge of the policy, if the data have a part for it |
| `prompts-train.parquet`, `prompts-eval.parquet` | group, reference, metadata |
| each of the above | prompt, prompt_is_text, row_ids |
| `rows.parquet` | id, source, line, split: the rows of the source that are used |
| `quarantine.jsonl` | source, line, id, reason, detail, row |
| `card.json`, `card.md` | findings and figures of the audit (rlhf/data/audit.py) |

`prompt` is a list of chat messages `{role, content}` in every file; a prompt that is a plain text
is one message of the user, and `prompt_is_text` is true. `group` names a slice that evaluation
reports separately, or is null. `reference` is the right answer, or null. `metadata` is a JSON
object that maps columns of the source to their values. `margin` is by how much the chosen reply is
better, in the units of the source's ratings, or null. `weight` is how much the pair counts in the
reward model's loss beside others, or null for 1. `row_ids` are the ids of the source's rows
that a row comes from (`rlhf.data.records.Record.id`).

Older artifacts hold the same rows as JSON lines, `pairs-train.jsonl`; they remain readable.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter

from rlhf.errors import DataError
from rlhf.saved import FAULTS, damaged

if TYPE_CHECKING:
    import pyarrow

Message = dict[str, str]
Prompt = str | list[Message]


def messages_of(prompt: Prompt) -> list[Message]:
    """Return a prompt as chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def joined(turns: Iterable[tuple[str, str]]) -> str:
    """Return one text for roles and contents that no other turns give."""
    return "".join(f"{role} {len(content)} {content}" for role, content in turns)


DEMONSTRATIONS = "demonstrations.parquet"
PAIRS_TRAIN = "pairs-train.parquet"
PAIRS_EVAL = "pairs-eval.parquet"
PAIRS_JUDGE = "pairs-judge.parquet"
PROMPTS_TRAIN = "prompts-train.parquet"
PROMPTS_EVAL = "prompts-eval.parquet"
#: In the artifact of a policy's evaluation: the prompts that it answered.
PROMPTS_GATE = "prompts-gate.parquet"
SUMMARY = "summary.json"
ROWS = "rows.parquet"
QUARANTINE = "quarantine.jsonl"
#: Data card for programs and for people.
CARD = "card.json"
CARD_TEXT = "card.md"
#: Rows of a row group: at most these are in memory beside the caller's own.
_GROUP = 10_000
_MESSAGE_FIELDS = {"role", "content"}


@dataclass(frozen=True)
class Demonstration:
    """A reply to imitate."""

    prompt: Prompt
    response: str
    # Provenance, not content: rows with equal text are equal, and samples don't depend on it.
    row_ids: tuple[str, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt, the first preferred."""

    prompt: Prompt
    chosen: str
    rejected: str
    group: str | None = None
    # Not in repr(), by which data.max_pairs samples: it must not depend on the margins.
    margin: float | None = field(default=None, repr=False)
    row_ids: tuple[str, ...] = field(default=(), repr=False, compare=False)
    weight: float | None = field(default=None, repr=False)


@dataclass(frozen=True)
class PromptRow:
    """A prompt to answer, with fields for reward functions."""

    prompt: Prompt
    group: str | None = None
    reference: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    row_ids: tuple[str, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class SourceRow:
    """A row of the source that is used, and where."""

    id: str
    source: str
    """Name of its file."""
    line: int
    split: str
    """`train`, `eval`, `judge`, `sft`, `prompts`, or `quarantine` for a row that is left out."""


Row = TypeVar("Row", Demonstration, Pair, PromptRow)
_Stored = TypeVar("_Stored", Demonstration, Pair, PromptRow, SourceRow)
T = TypeVar("T")
#: Stands for a column that is no field of its rows' type, and is never empty.
_GIVEN: Any = field()


#: Type of the rows in each file.
_TYPES: dict[str, type[Any]] = {
    DEMONSTRATIONS: Demonstration,
    PAIRS_TRAIN: Pair,
    PAIRS_EVAL: Pair,
    PAIRS_JUDGE: Pair,
    PROMPTS_TRAIN: PromptRow,
    PROMPTS_EVAL: PromptRow,
    PROMPTS_GATE: PromptRow,
    ROWS: SourceRow,
}


def write_rows(path: Path, rows: Iterable[Any]) -> int:
    """Write rows as Parquet, in row groups; the file appears whole or not at all.

    Returns:
        Number of rows.

    The file's name decides its schema. Equal rows give equal bytes with one version of pyarrow.

    Raises:
        DataError: A text holds a lone surrogate, which UTF-8 can't write, or a message has other
            fields than role and content.
    """
    from pyarrow import parquet

    schema = _schema(_TYPES[path.name])
    scratch = path.with_name(f".{path.name}.part")
    try:
        with parquet.ParquetWriter(scratch, schema, compression="zstd") as writer:
            remaining, count = iter(rows), 0
            while batch := list(itertools.islice(remaining, _GROUP)):
                writer.write_batch(_batch(batch, schema, path.name))
                count += len(batch)
        scratch.replace(path)
        return count
    finally:
        scratch.unlink(missing_ok=True)


def read_rows(path: Path, row_type: type[_Stored]) -> list[_Stored]:
    """Read rows written by `write_rows`, or by its predecessor as JSON lines.

    Raises:
        DataError: The file is missing, or does not hold such rows.
    """
    return list(iterate_rows(path, row_type))


def iterate_rows(path: Path, row_type: type[_Stored]) -> Iterator[_Stored]:
    """Yield the rows of `read_rows`, a row group in memory."""
    older = path.with_suffix(".jsonl")
    if not path.exists() and older.exists():
        yield from json_lines(older, TypeAdapter(row_type).validate_python)
    else:
        yield from _parquet_rows(path, row_type)


def json_lines(path: Path, read: Callable[[Any], T]) -> Iterator[T]:
    """Yield what a function makes of each line of a file of an artifact.

    Raises:
        DataError: A line is no JSON, or the function finds a fault.
    """
    done = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield read(json.loads(line))
                done += 1
    except FAULTS as error:
        raise damaged(path, error, f"line {done + 1}: ") from None


def _parquet_rows(path: Path, row_type: type[_Stored]) -> Iterator[_Stored]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow, row_type)
            for batch in file.iter_batches(batch_size=_GROUP, use_threads=False):
                yield from _rows_of(batch, row_type)
    except (*FAULTS, pa.ArrowException) as error:
        raise damaged(path, error) from None


def _rows_of(batch: pyarrow.RecordBatch, row_type: type[_Stored]) -> list[_Stored]:
    for name in batch.schema.names:
        if row_type.__dataclass_fields__.get(name, _GIVEN).default is not None:
            _refuse_nulls(name, batch.column(name))
    columns = {name: batch.column(name).to_pylist() for name in batch.schema.names}
    if "prompt" in columns:
        are_text = columns.pop("prompt_is_text")
        if any(is_text and not p for p, is_text in zip(columns["prompt"], are_text, strict=True)):
            raise ValueError("a prompt has no message")
        columns["prompt"] = [
            messages[0]["content"] if is_text else messages
            for messages, is_text in zip(columns["prompt"], are_text, strict=True)
        ]
    if "row_ids" in columns:
        columns["row_ids"] = [tuple(ids) for ids in columns["row_ids"]]
    if "metadata" in columns:
        columns["metadata"] = [json.loads(text) for text in columns["metadata"]]
        if not all(isinstance(value, dict) for value in columns["metadata"]):
            raise ValueError("metadata is no JSON object")
    return [
        row_type(**dict(zip(columns, values, strict=True)))
        for values in zip(*columns.values(), strict=True)
    ]


def _check_columns(found: pyarrow.Schema, row_type: type[Any]) -> None:
    """Refuse a file with other columns than a type's; those with a default may lack.

    Raises:
        ValueError: A column is missing, unknown, or of another type.
    """
    import pyarrow as pa

    wanted = _schema(row_type)
    for name in found.names:
        if name not in wanted.names:
            raise ValueError(f"column {name} is unknown")
    for column in wanted:
        spec = row_type.__dataclass_fields__.get(column.name, _GIVEN)
        is_optional = spec.default is not MISSING or spec.default_factory is not MISSING
        if column.name not in found.names:
            if not is_optional:
                raise ValueError(f"column {column.name} is missing")
            continue
        own = found.field(column.name).type
        if not _fits(own, column.type) and not (is_optional and pa.types.is_null(own)):
            raise ValueError(f"column {column.name} is of type {own}, not {column.type}")


def _fits(found: pyarrow.DataType, wanted: pyarrow.DataType) -> bool:
    """Return whether a type has the values of another: files of other tools differ in widths."""
    from pyarrow import types

    if types.is_list(wanted):
        return (types.is_list(found) or types.is_large_list(found)) and _fits(
            found.value_type, wanted.value_type
        )
    if types.is_struct(wanted):
        return (
            types.is_struct(found)
            and {field.name for field in found} == _MESSAGE_FIELDS
            and all(_fits(found.field(f.name).type, f.type) for f in wanted)
        )
    if types.is_large_string(wanted) or types.is_string(wanted):
        return types.is_string(found) or types.is_large_string(found)
    if types.is_int64(wanted):
        return types.is_integer(found)
    return bool(found == wanted)


def _refuse_nulls(name: str, column: pyarrow.Array[Any]) -> None:
    from pyarrow import types

    if column.null_count:
        raise ValueError(f"column {name} has empty cells")
    if types.is_list(column.type) or types.is_large_list(column.type):
        _refuse_nulls(name, column.flatten())
    elif types.is_struct(column.type):
        for place in range(column.type.num_fields):
            _refuse_nulls(name, column.field(place))


def _schema(row_type: type[Any]) -> pyarrow.Schema:
    """Return the schema of a type's file; text is large: a column's batch may exceed 2 GB."""
    import pyarrow as pa

    text = pa.large_string()
    message = pa.struct([("role", text), ("content", text)])
    others = {"prompt": pa.list_(message), "row_ids": pa.list_(pa.string()), "line": pa.int64(),
              "margin": pa.float64(), "weight": pa.float64()}  # fmt: skip
    fields = [(name, others.get(name, text)) for name in row_type.__dataclass_fields__]
    if "prompt" in row_type.__dataclass_fields__:
        fields.insert(1, ("prompt_is_text", pa.bool_()))
    return pa.schema(fields)


def _batch(rows: list[Any], schema: pyarrow.Schema, name: str) -> pyarrow.RecordBatch:
    import pyarrow as pa

    columns: dict[str, Any] = {c: [getattr(r, c, None) for r in rows] for c in schema.names}
    prompts: list[Prompt] | None = columns.pop("prompt", None)
    if "metadata" in columns:  # escaped, so that it may hold a lone surrogate
        columns["metadata"] = [json.dumps(v) if v else "{}" for v in columns["metadata"]]
    try:
        if prompts is not None:
            columns["prompt_is_text"] = [isinstance(prompt, str) for prompt in prompts]
            columns["prompt"] = _messages(prompts, schema.field("prompt").type, name)
            # Rows of the generated world come from no source.
            lists = [ids or () for ids in columns["row_ids"]]
            ids = pa.array(itertools.chain.from_iterable(lists), pa.string())
            columns["row_ids"] = _lists(lists, ids)
        return pa.RecordBatch.from_pydict(columns, schema=schema)
    except UnicodeEncodeError as error:
        seen = ascii(error.object[max(0, error.start - 20) : error.end])
        raise DataError(
            f"{name}: a text holds a lone surrogate, which UTF-8 can't write ({seen}); mend the row"
        ) from None


def _messages(prompts: list[Prompt], kind: pyarrow.ListType[Any], name: str) -> pyarrow.Array[Any]:
    """Return prompts as a column of lists of messages, without a dictionary for each text.

    Raises:
        DataError: A message has other fields than role and content.
    """
    import pyarrow as pa

    roles: list[str] = []
    contents: list[str] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            roles.append("user")
            contents.append(prompt)
            continue
        for message in prompt:
            if message.keys() != _MESSAGE_FIELDS:
                raise DataError(
                    f"{name}: a message has the fields {sorted(message)}; give it role and content"
                )
            roles.append(message["role"])
            contents.append(message["content"])
    text = pa.large_string()
    messages = pa.StructArray.from_arrays(
        [pa.array(roles, text), pa.array(contents, text)], fields=list(kind.value_type)
    )
    return _lists(
        [(prompt,) if isinstance(prompt, str) else prompt for prompt in prompts], messages
    )


def _lists(lists: list[Any], values: pyarrow.Array[Any]) -> pyarrow.Array[Any]:
    """Return a column of lists of these lengths."""
    import pyarrow as pa

    offsets = [0, *itertools.accumulate(map(len, lists))]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
