"""Fields of the configuration as cells of a table: default, bounds, advised range, meaning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf.config.section import sections, union_members
from rlhf.config.text import as_written


def fields_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted names and fields of a section, those of the sections in it included."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        inner = sections(union_members(field.annotation))
        if len(inner) == 1:
            yield from fields_of(inner[0], f"{prefix}{name}.")


def default_of(field: FieldInfo) -> str:
    """Return the default as code; `its own` of a section."""
    value: Any = field.get_default(call_default_factory=True)
    if field.is_required():
        return "required"
    first = next(iter(value), None) if isinstance(value, list | tuple) else value
    return "its own" if isinstance(first, BaseModel) else f"`{as_written(value)}`"


def bounds_of(field: FieldInfo) -> str:
    """Return a field's choices or the interval of its numbers; empty without either."""
    types = union_members(field.annotation)
    choices = [c for t in types if get_origin(t) is Literal for c in get_args(t)]
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    if bool in types:
        return "`true`, `false`"
    ends = {
        name: getattr(part, name)
        for part in (*field.metadata, *_constraints(field.annotation))
        for name in ("ge", "gt", "le", "lt")
        if getattr(part, name, None) is not None
    }
    low, high = ends.get("ge", ends.get("gt")), ends.get("le", ends.get("lt"))
    if low is None or high is None:
        return ""
    none = " or none" if type(None) in types else ""
    left, right = "[" if "ge" in ends else "(", "]" if "le" in ends else ")"
    return f"{left}{_number(low)}, {_number(high)}{right}{none}"


def _constraints(annotation: Any) -> Iterator[Any]:
    """Yield the constraints of a union's members, such as `Le(1000)` in `Count | None`."""
    for member in get_args(annotation):
        yield from getattr(member, "__metadata__", ())
        yield from _constraints(member)


def _number(value: float) -> str:
    """Return a bound as text; large powers of ten as such."""
    if value < 0:
        return f"−{_number(-value)}"
    zeros = len(f"{value:.0f}") - 1
    is_power = value >= 1000 and value == 10**zeros
    return "10" + str(zeros).translate(_SUPERSCRIPTS) if is_power else f"{value:.12g}"


_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def advised_of(field: FieldInfo) -> str:
    """Return the advised range; empty without one."""
    extra = field.json_schema_extra
    if not isinstance(extra, dict) or "advised" not in extra:
        return ""
    low, high = cast("list[float]", extra["advised"])
    return f"{low:g}–{high:g}"


def meaning_of(field: FieldInfo) -> str:
    """Return a field's docstring as one line of a table."""
    return " ".join((field.description or "").split()).replace("|", "\\|")
