"""The base of every configuration section."""

from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


def kinds(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type there is."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def advised(low: float, high: float) -> dict[str, Any]:
    """Schema note of the range in which a value is usual; outside it is warned about, not wrong."""
    return {"advised": [low, high]}


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
