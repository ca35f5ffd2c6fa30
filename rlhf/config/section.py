"""Base of all configuration sections, and functions on their fields' types.

A field whose section type depends on another field, such as `ppo.env_config` on `ppo.env_type`, is
validated with `validate_as`, which keeps each error of the inner section for `messages`.
"""

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

from rlhf.config.numbers import LEAST, find_vanishing
from rlhf.config.text import one_line

Tree = dict[str, Any]
#: Type of the error that carries the errors of an inner section.
NESTED = "nested"


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

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
        """Refuse true and false, which pydantic reads as 1 and 0, for numbers."""
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, bool) and bool not in union_members(field.annotation):
            raise ValueError(f"must not be {str(value).lower()}; write a number or text")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _no_vanishing_number(cls, value: Any) -> Any:
        """Refuse a number that is not 0 here, and 0 in float32, where it divides or scales."""
        number = find_vanishing(value)
        if number is not None:
            raise ValueError(f"{number:g} is 0 in float32; write 0, or at least {LEAST:g} in size")
        return value


SectionT = TypeVar("SectionT", bound=Section)


class OrText:
    """Annotation that adds text to the JSON schema of a field.

    The field's validator reads the text.

    Args:
        words: The only texts that are accepted; without them any text is.
    """

    def __init__(self, *words: str) -> None:
        self.words = words

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        field = handler(schema)
        text: dict[str, Any] = {"type": "string"}
        if self.words:
            text["enum"] = list(self.words)
        if "anyOf" in field:
            return {**field, "anyOf": [*field["anyOf"], text]}
        return {"anyOf": [field, text]}


def advised_range(low: float, high: float) -> dict[str, Any]:
    """Return a JSON schema note of a field's usual range, for `messages.advice`."""
    return {"advised": [low, high]}


def check_model_uri(value: str | None) -> str | None:
    """Check that a value may name a folder, artifact, s3:// URI or hub id.

    Raises:
        ValueError: It is another URI, names no bucket, or holds user info.
    """
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


def validate_as(model: type[SectionT], value: Any) -> SectionT:
    """Validate a value as a section that was chosen by another field.

    Raises:
        PydanticCustomError: The section's errors in one, see `nested_error`.
    """
    try:
        return model.model_validate(without_none(value, (model,)))
    except ValidationError as error:
        raise nested_error([_with_known(model, dict(e)) for e in error.errors()]) from None


def nested_error(errors: list[dict[str, Any]]) -> PydanticCustomError:
    """Return one error that carries several of an inner section.

    Their `loc` starts in that section. The text of the one error sums them up, for callers from
    Python, who see only the text.
    """
    leaves = list(expand_nested(errors))
    summary = one_line("; ".join(map(_describe, leaves)))
    return PydanticCustomError(NESTED, "{summary}", {"errors": leaves, "summary": summary})


def expand_nested(errors: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the errors; each `nested_error` as its inner ones, with their full `loc`."""
    for error in errors:
        if error["type"] != NESTED:
            yield error
            continue
        for inner in error["ctx"]["errors"]:
            yield {**inner, "loc": (*error["loc"], *inner["loc"])}


def union_members(annotation: Any) -> tuple[Any, ...]:
    """Return the types in an annotation: the members of a union, or the one type."""
    if get_origin(annotation) is Annotated:
        return union_members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(t for member in get_args(annotation) for t in union_members(member))
    return (annotation,)


def sections(types: tuple[Any, ...]) -> list[type[BaseModel]]:
    """Return the section classes among some types."""
    return [t for t in types if isinstance(t, type) and issubclass(t, BaseModel)]


def member_types(types: tuple[Any, ...], name: str) -> tuple[Any, ...] | None:
    """Return the types of member `name` in a value of these types; None without one.

    A member is a field of a section (of any of them, where a field may be one of several), or a
    value of a mapping whose values are sections or whose names are a closed set.
    """
    members: list[Any] = []
    for section in sections(types):
        if name in section.model_fields:
            members += union_members(section.model_fields[name].annotation)
    for mapping in types:
        if get_origin(mapping) is not dict:
            continue
        keys, values = get_args(mapping)
        is_known_name = get_origin(keys) is Literal and name in get_args(keys)
        if sections(union_members(values)) or is_known_name:
            members += union_members(values)
    return tuple(members) or None


def without_none(value: Any, types: tuple[Any, ...]) -> Any:
    """Return the value with `none` as null where allowed, and null sections as empty."""
    if type(None) in types and isinstance(value, str) and value.lower() in ("none", "null"):
        return None
    if sections(types) and value is None and type(None) not in types:
        return {}
    if isinstance(value, dict):
        tree = cast("Tree", value)
        return {k: without_none(v, member_types(types, k) or ()) for k, v in tree.items()}
    if isinstance(value, list):
        items = next((union_members(get_args(t)[0]) for t in types if get_origin(t) is tuple), ())
        return [without_none(v, items) for v in cast("list[Any]", value)]
    return value


def _describe(error: dict[str, Any]) -> str:
    """Return location and text of an error, without the value: it may be a secret."""
    location = ".".join(map(str, error["loc"]))
    if "known" in error:
        return f"{location} is no field; known are {', '.join(error['known'])}"
    text = error["msg"].removeprefix("Value error, ")
    return f"{location}: {text}" if location else text


def _with_known(model: type[Section], error: dict[str, Any]) -> dict[str, Any]:
    """Return the error; an unknown key's with `known`, the keys of its section."""
    if error["type"] != "extra_forbidden":
        return error
    types: tuple[Any, ...] = (model,)
    for part in error["loc"][:-1]:
        types = member_types(types, str(part)) or ()
    known = {name for section in sections(types) for name in section.model_fields}
    return {**error, "known": sorted(known)}
