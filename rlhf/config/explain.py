"""Says in one line what is wrong with a value: field, value, the cure, and where it was given."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import ValidationError

from rlhf.config.fields import nearest, siblings
from rlhf.config.section import expanded
from rlhf.config.wording import one_line, shown_value

#: Our words for pydantic's kinds of error; braces take from the error's context.
WORDING = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a whole number, and not so long",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text; put it in quotes",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must match {pattern}",
    "literal_error": "must be {expected}",
    "tuple_type": "must be a list",
    "too_short": "must hold at least {min_length}",
    "dict_type": "must be a mapping from names to values",
    "model_type": "is a section; set the fields in it",
    "missing": "is missing; add it",
    "invalid_key": "is no name of a field; names are text",
}


def explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    """The first problem of a configuration whose values came from `sources`."""
    errors = list(expanded([dict(e) for e in error.errors()]))
    # A misspelt field that must be there gives two errors, and this one names the cure.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    # A field that may be a number or text reports the type it tried as if it were a field.
    parts = [str(part) for part in first["loc"] if part not in ("float", "str", "[key]")]
    field, kind = ".".join(parts), first["type"]
    if kind == "extra_forbidden":
        known = first.get("known")
        text = f"{field} is not a field of the configuration; "
        text += f"known are {', '.join(known)}" if known else cure(field)
    elif kind == "value_error":
        # The validator names the value, unless it must not be repeated.
        text = first["msg"].removeprefix("Value error, ")
        text = f"{field}: {text}" if field else text
    else:
        context = first.get("ctx", {}).items()
        bounds = {k: f"{v:.12g}" if isinstance(v, float) else v for k, v in context}
        ours = WORDING.get(kind)
        text = ours.format_map(bounds) if ours else first["msg"].replace("Input should", "must")
        valued = kind not in ("missing", "invalid_key")
        shown = f" = {shown_value(first['input'])}" if valued else ""
        text = f"{field}{shown}: {text}"
    return one_line(text + _origin(field, text, sources))


def cure(field: str) -> str:
    """What to do about a field that does not exist."""
    if field.startswith("ppo.env_config.") and (known := siblings(field)):
        return f"known are {', '.join(known)}"
    near = nearest(field)
    return f"did you mean {near}?" if near else "see `rlhf config show` for the fields"


def _origin(field: str, text: str, sources: Mapping[str, str]) -> str:
    """` (from quickstart.yaml)`; for a rule on several fields, where the ones it names are from."""
    below = [k for k in sources if not field or f"{k}.".startswith(f"{field}.")]
    # An item of a list has no origin of its own.
    below = below or [k for k in sources if field.startswith(f"{k}.")]
    words = set(re.findall(r"\w+", text))
    named = [k for k in below if k.rpartition(".")[2] in words] or below
    origins = sorted({sources[k] for k in named})
    return f" (from {' and '.join(origins)})" if origins else ""
