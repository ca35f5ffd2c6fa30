"""Messages about configuration values: one-line errors, and notes on odd values.

An error names field, value and cure, and the file or command line that the value is from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from rlhf.config.fields import nearest, siblings
from rlhf.config.pipeline import PipelineConfig
from rlhf.config.section import expand_nested
from rlhf.config.text import one_line, shown_value

#: Text for pydantic's error types; names in braces are from the error's context.
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
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must match {pattern}",
    "literal_error": "must be {expected}",
    "tuple_type": "must be a list",
    "too_short": "must hold at least {min_length}",
    "too_long": "must hold at most {max_length}",
    "dict_type": "must be a mapping from names to values",
    "model_type": "is a section; set the fields in it",
    "missing": "is missing; add it",
    "invalid_key": "is no name of a field; names are text",
}

#: Names of settings by which other tools quantise a base.
_QUANTISATION = re.compile(r"quanti[sz]|qlora|load_in_\d|bnb_|nf4", re.IGNORECASE)


def explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    """Return the first problem of a configuration in one line.

    Args:
        error: The errors of validation.
        sources: Source of each value, by dotted name.
    """
    errors = list(expand_nested([dict(e) for e in error.errors()]))
    # A misspelt field that is required gives two errors; the unknown name leads to the cure.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    # For a field that may be a number or text, pydantic adds the type it tried to the location.
    types = ("float", "str", "constrained-float", "constrained-str", "[key]")
    parts = [str(part) for part in first["loc"] if part not in types]
    field, error_type = ".".join(parts), first["type"]
    if error_type == "extra_forbidden":
        known = first.get("known")
        text = f"{field} is not a field of the configuration; "
        text += f"known are {', '.join(known)}" if known else cure(field)
    elif error_type == "value_error":
        # The validator names the value, unless it must not be repeated.
        text = first["msg"].removeprefix("Value error, ")
        text = f"{field}: {text}" if field else text
    else:
        context = first.get("ctx", {}).items()
        bounds = {k: f"{v:.12g}" if isinstance(v, float) else v for k, v in context}
        wording = WORDING.get(error_type)
        text = first["msg"].replace("Input should", "must")
        text = wording.format_map(bounds) if wording else text
        has_value = error_type not in ("missing", "invalid_key")
        assignment = f" = {shown_value(first['input'])}" if has_value else ""
        text = f"{field}{assignment}: {text}"
    return one_line(text + _source_note(field, text, sources))


def cure(field: str) -> str:
    """Return advice on a field that does not exist."""
    if field.startswith("ppo.env_config.") and (known := siblings(field)):
        return f"known are {', '.join(known)}"
    if _QUANTISATION.search(field):
        return (
            "to hold a frozen base in 4 bits (QLoRA) set frozen_dtype = nf4 beside lora, in "
            "sft, reward_model and ppo"
        )
    near = nearest(field)
    return f"did you mean {near}?" if near else "see `rlhf config show` for the fields"


def unusual_values(config: PipelineConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield advice in one line on values outside of their advised range, or without effect.

    Each comes with the dotted names of the values that it is about.
    """
    yield from _unusual_values(config, "")
    yield from _unused_limits(config)
    yield from _idle_values(config)
    yield from _unscored_truncation(config)


def _unused_limits(config: PipelineConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    drift = config.data.drift
    for name in ("veto", "trigger"):
        limits = {k: v for k, v in getattr(drift, name).model_dump().items() if v is not None}
        if limits and not drift.enabled:
            field, values = f"data.drift.{name}", [f"{k} = {v:g}" for k, v in limits.items()]
            yield (
                ("data.drift.enabled", *(f"{field}.{measure}" for measure in limits)),
                f"{field} ({', '.join(values)}) has no effect, because "
                "data.drift.enabled = false compares nothing; set it to true, or remove the limits",
            )


#: Values of PPO that nothing reads with this value of another field, and one with which they are.
_IDLE = (
    ("kl_target", "kl_controller", "fixed", "adaptive"),
    ("kl_horizon", "kl_controller", "fixed", "adaptive"),
    ("missing_eos_penalty", "missing_eos", "none", "subtract"),
    ("lr_final_fraction", "lr_scheduler", "constant", "linear"),
)


def _idle_values(config: PipelineConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    ppo = config.ppo
    for name, switch, idle, cure in _IDLE:
        value = getattr(ppo, name)
        # A configuration that is passed between flows gives all values.
        is_own = value not in (None, type(ppo).model_fields[name].default)
        if is_own and getattr(ppo, switch) == idle:
            yield (
                (f"ppo.{name}", f"ppo.{switch}", "ppo.compat"),
                f"ppo.{name} = {value:g} has no effect, because ppo.{switch} = {idle}; set that to "
                f"{cure}, or remove the value",
            )


def _source_note(field: str, text: str, sources: Mapping[str, str]) -> str:
    """Return the sources of an error's values, such as ` (from quickstart.yaml)`.

    For a rule on several fields they are those of the fields that its text names.
    """
    keys = [k for k in sources if not field or f"{k}.".startswith(f"{field}.")]
    # The items of a list have the source of the list.
    keys = keys or [k for k in sources if field.startswith(f"{k}.")]
    words = set(re.findall(r"\w+", text))
    named = [k for k in keys if k.rpartition(".")[2] in words] or keys
    origins = sorted({sources[k] for k in named})
    return f" (from {' and '.join(origins)})" if origins else ""


def _unusual_values(section: BaseModel, prefix: str) -> Iterator[tuple[tuple[str, ...], str]]:
    for name, field in type(section).model_fields.items():
        value: Any = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _unusual_values(value, f"{prefix}{name}.")
            continue
        extra = field.json_schema_extra
        if not isinstance(extra, dict) or "advised" not in extra or value is None:
            continue
        low, high = cast("list[float]", extra["advised"])
        if not low <= value <= high:
            line = f"{prefix}{name} = {value:g} is outside the advised {low:g}–{high:g}; "
            yield (f"{prefix}{name}",), line + "keep it only if you mean it"


def _unscored_truncation(config: PipelineConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield a note if replies are drawn from another distribution than the one that is scored."""
    ppo = config.ppo
    by_k = [f"top_k = {ppo.top_k}"] if ppo.top_k > 0 else []
    by_p = [f"top_p = {ppo.top_p:g}"] if ppo.top_p < 1 else []
    if ppo.truncation == "none" and (by_k or by_p):
        yield (
            ("ppo.truncation", "ppo.compat", "ppo.top_k", "ppo.top_p"),
            f"ppo.truncation = none with {' and '.join(by_k + by_p)} computes ratio and KL of "
            "another distribution than replies are drawn from; set ppo.truncation to replay, or "
            "ppo.top_k to 0 and ppo.top_p to 1",
        )
