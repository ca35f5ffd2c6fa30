"""The base of every configuration section."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from rlhf.config.wording import one_line

Tree = dict[str, Any]


def kinds(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type there is."""
    if get_origin(annotation) is Annotated:
        return kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for member in get_args(annotation) for kind in kinds(member))
    return (annotation,)


def below(types: tuple[Any, ...], name: str) -> tuple[Any, ...] | None:
    """Types of what is called `name` in a value of one of these types; None if nothing can be.

    Fields of sections (of all of them, where a field may be one of several), and the values of a
    mapping from names to sections, or from a closed set of names.
    """
    found: list[Any] = []
    for section in sections(types):
        if name in section.model_fields:
            found += kinds(section.model_fields[name].annotation)
    for kind in types:
        if get_origin(kind) is not dict:
            continue
        keys, values = get_args(kind)
        if sections(kinds(values)) or (get_origin(keys) is Literal and name in get_args(keys)):
            found += kinds(values)
    return tuple(found) or None


def sections(types: tuple[Any, ...]) -> list[type[BaseModel]]:
    """The sections among some types."""
    return [t for t in types if isinstance(t, type) and issubclass(t, BaseModel)]


def without_none(value: Any, types: tuple[Any, ...]) -> Any:
    """`none` means null where a value may be null, and an empty section is one of defaults."""
    if type(None) in types and isinstance(value, str) and value.lower() in ("none", "null"):
        return None
    if sections(types) and value is None and type(None) not in types:
        return {}
    if isinstance(value, dict):
        tree = cast("Tree", value)
        return {k: without_none(v, below(types, k) or ()) for k, v in tree.items()}
    if isinstance(value, list):
        items = next((kinds(get_args(t)[0]) for t in types if get_origin(t) is tuple), ())
        return [without_none(v, items) for v in cast("list[Any]", value)]
    return value


def advised(low: float, high: float) -> dict[str, Any]:
    """Schema note of the range in which a value is usual; outside it is warned about, not wrong."""
    return {"advised": [low, high]}


class OrText:
    """Marks a field whose JSON schema accepts text too, which a validator reads into a mapping."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The field's own schema with one more member: any text, or one of these words."""
        found = handler(schema)
        text: dict[str, Any] = {"type": "string"}
        if self.words:
            text["enum"] = list(self.words)
        if "anyOf" in found:
            return {**found, "anyOf": [*found["anyOf"], text]}
        return {"anyOf": [found, text]}


def model_place(value: str | None) -> str | None:
    """Refuse what is no place of a model, before anybody asks there."""
    scheme, separator, rest = (value or "").partition("://")
    if not separator:
        return value
    bucket = rest.partition("/")[0]
    if "@" in bucket:
        # The value itself must not be repeated: it may hold a password.
        raise ValueError("holds user info; give credentials by the AWS chain instead")
    if scheme != "s3" or not bucket:
        raise ValueError(
            "is no place of a model; give a local folder, artifact:<digest>, s3://bucket/prefix "
            "or a hub id"
        )
    return value


class Section(BaseModel):
    """Immutable, typed, and closed: an unknown key is an error, never silently ignored."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,  # a value in the wrong place may be a secret
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as true, which pydantic would take for the number 1."""
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, bool) and bool not in kinds(field.annotation):
            raise ValueError(f"must not be {str(value).lower()}; write a number or text")
        return value


#: Kind of an error that stands for several, of a section within.
NESTED = "nested"
SectionT = TypeVar("SectionT", bound=Section)


def chosen(model: type[SectionT], value: Any) -> SectionT:
    """The section of this type, for a validator that knows the type only from another field.

    Raises:
        PydanticCustomError: What is wrong in it, for `explain` to say with full names.
    """
    try:
        return model.model_validate(without_none(value, (model,)))
    except ValidationError as error:
        raise nested([_with_known(model, dict(e)) for e in error.errors()]) from None


def nested(errors: list[dict[str, Any]]) -> PydanticCustomError:
    """One error for several of a section within; `loc` in each starts from there.

    Its own text sums them up, for Python and Prefect, which show no more than that.
    """
    flat = list(expanded(errors))
    summary = one_line("; ".join(map(_summary, flat)))
    return PydanticCustomError(NESTED, "{summary}", {"errors": flat, "summary": summary})


def expanded(errors: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Errors of sections that a validator chose by another field, each under its full name."""
    for error in errors:
        if error["type"] != NESTED:
            yield error
            continue
        for inner in expanded(error["ctx"]["errors"]):
            yield {**inner, "loc": (*error["loc"], *inner["loc"])}


def _summary(error: dict[str, Any]) -> str:
    """Place and fault; no value, for it may be a secret."""
    place = ".".join(map(str, error["loc"]))
    if "known" in error:
        return f"{place} is no field; known are {', '.join(error['known'])}"
    text = error["msg"].removeprefix("Value error, ")
    return f"{place}: {text}" if place else text


def _with_known(model: type[Section], error: dict[str, Any]) -> dict[str, Any]:
    """An unknown key's error also lists the keys that are known in its place."""
    if error["type"] != "extra_forbidden":
        return error
    types: tuple[Any, ...] = (model,)
    for part in error["loc"][:-1]:
        types = below(types, str(part)) or ()
    known = {name for section in sections(types) for name in section.model_fields}
    return {**error, "known": sorted(known)}
