"""Options of reward functions and of the components of `multi_objective`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, cast
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rlhf.config.numbers import (
    BatchSize,
    Count,
    Factor,
    Few,
    Measure,
    Seconds,
    Signed,
    Tokens,
    Tries,
)
from rlhf.config.section import Section, nested_error, validate_as
from rlhf.config.text import shown_value
from rlhf.limits import MAX_PATTERN, pattern_error

#: Hosts to which a token may be sent unencrypted, because it does not leave the machine.
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


#: A word or phrase that is looked for in replies.
Word = Annotated[str, Field(pattern=r"\S", max_length=MAX_PATTERN)]


class LengthPenaltyConfig(Section):
    """A reply pays for tokens beyond (or off) a target."""

    target: Tokens = Field(default=64, ge=0)
    """Tokens that a reply may have (`side: over`) or should have (`side: both`)."""
    slope: Factor = Field(default=0.01, gt=0)
    """Reward lost with each token."""
    side: Literal["over", "both"] = "over"
    """`over`: only tokens beyond the target cost; `both`: tokens that are missing, too."""


class CorrectnessConfig(Section):
    """A reply is held against the reference answer of its prompt (`data.reference_column`)."""

    mode: Literal["exact", "normalised", "numeric", "regex", "contains"] = "normalised"
    """`exact`: the same text but for space around it; `normalised`: also but for case, spacing,
    punctuation and articles; `numeric`: the last number in the reply; `regex`: the reference is a
    pattern to be found; `contains`: the normalised reply has the normalised reference in it."""
    tolerance: Measure = Field(default=0.0, ge=0)
    """`numeric`: largest difference that still counts as right."""
    relative_tolerance: Factor = Field(default=0.0, ge=0)
    """`numeric`: the same as a share of the reference; the wider of the two holds."""
    right: Signed = 1.0
    """Reward of a right reply."""
    wrong: Signed = 0.0
    """Reward of any other."""
    timeout_seconds: Seconds = Field(default=1.0, gt=0)
    """`regex`: a pattern that takes longer on one reply stops training."""


class CustomConfig(Section):
    """A Python function of one's own: a list of replies (dicts) in, a list of numbers out."""

    function: str
    """`package.module:function` or `folder/file.py:function`, in a folder that the operator lists
    in the environment variable RLHF_ALLOWED_CODE, or in the permissions file of the machine."""
    timeout_seconds: Seconds = Field(default=60.0, gt=0)
    """Time limit of one call, the import at first included; it is interrupted after that."""

    @field_validator("function")
    @classmethod
    def _has_two_parts(cls, value: str) -> str:
        path, colon, name = value.rpartition(":")
        is_module = all(part.isidentifier() for part in path.split("."))
        if not colon or not name.isidentifier() or not (is_module or path.endswith(".py")):
            raise ValueError(f"{value!r} is no function; write module:function or file.py:function")
        return value


class ComponentSection(Section):
    """Options of every component."""

    weight: Signed = 1.0
    """Factor in the sum; `reward_weights` wins over it."""
    normalize: Literal["none", "zscore", "minmax"] = "none"
    """`zscore`: less the mean of all values so far, over their standard deviation; `minmax`: from
    0 at the least value so far to 1 at the largest."""
    clip: Factor | None = Field(default=None, gt=0)
    """Values are clamped to ± this, after normalising; none leaves them alone."""


class RewardModelComponent(ComponentSection):
    """The reward model's score."""

    type: Literal["reward_model"] = "reward_model"
    """Kind of component."""


class LengthComponent(ComponentSection):
    """A piecewise linear function of the number of tokens."""

    type: Literal["length"] = "length"
    """Kind of component."""
    points: tuple[tuple[Measure, Signed], ...] = Field(
        default=((0.0, 0.0), (64.0, 1.0)), min_length=1
    )
    """(tokens, value) pairs, tokens rising; constant before the first and after the last."""

    @field_validator("points")
    @classmethod
    def _tokens_rise(
        cls, value: tuple[tuple[float, float], ...]
    ) -> tuple[tuple[float, float], ...]:
        for (left, _), (right, _) in pairwise(value):
            if right <= left:
                raise ValueError(f"tokens must rise from point to point, and {right:g} follows "
                                 f"{left:g}; put the points in order")  # fmt: skip
        return value


class KeywordComponent(ComponentSection):
    """Words that a reply should hold; with a negative weight, words that it should not."""

    type: Literal["keyword"] = "keyword"
    """Kind of component."""
    words: tuple[Word, ...] = Field(min_length=1)
    """Words or phrases."""
    match: Literal["any", "all", "fraction"] = "any"
    """1 if any (or all) of them are there, else 0; or the share of them that are."""
    case_sensitive: bool = False
    """Tell capitals from small letters."""
    whole_words: bool = True
    """Do not find a word inside of a longer one."""


class RegexComponent(ComponentSection):
    """1 where a pattern is found in the reply, else 0."""

    type: Literal["regex"] = "regex"
    """Kind of component."""
    pattern: str = Field(min_length=1)
    """A pattern as Python's `re` reads it."""
    full: bool = False
    """The pattern must match the whole reply."""
    timeout_seconds: Seconds = Field(default=1.0, gt=0)
    """A pattern that takes longer on one reply stops training."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        error = pattern_error(value)
        if error:
            raise ValueError(f"{shown_value(value)} is no pattern ({error}); mend it")
        return value


class JsonValidComponent(ComponentSection):
    """1 where the whole reply is JSON, else 0."""

    type: Literal["json_valid"] = "json_valid"
    """Kind of component."""
    require: Literal["any", "object", "array"] = "any"
    """What the JSON must be."""
    keys: tuple[str, ...] = ()
    """Keys that an object must have."""

    @model_validator(mode="after")
    def _keys_need_an_object(self) -> Self:
        if self.keys and self.require != "object":
            raise ValueError(f"keys = {list(self.keys)} need require = 'object', not "
                             f"{self.require!r}; set it")  # fmt: skip
        return self


class CorrectnessComponent(ComponentSection, CorrectnessConfig):
    """Agreement with the reference answer."""

    type: Literal["correctness"] = "correctness"
    """Kind of component."""


class RepetitionComponent(ComponentSection):
    """Minus the share of a reply's word n-grams that stood in it before: 0 is best, −1 worst."""

    type: Literal["repetition"] = "repetition"
    """Kind of component."""
    ngram: Few = Field(default=3, ge=1)
    """Words that make one n-gram."""


class CustomComponent(ComponentSection, CustomConfig):
    """A Python function of one's own."""

    type: Literal["custom"] = "custom"
    """Kind of component."""


class RemoteComponent(ComponentSection):
    """A service that scores replies: they are posted as JSON, and scores come back."""

    type: Literal["remote"] = "remote"
    """Kind of component."""
    url: str
    """Where to post to, by http:// or https://."""
    token_env: str | None = None
    """NAME of the environment variable that holds a bearer token; the token stands nowhere."""
    batch_size: BatchSize = Field(default=128, ge=1)
    """Most replies in one request."""
    timeout_seconds: Seconds = Field(default=10.0, gt=0)
    """Time limit of one request."""
    retries: Tries = Field(default=3, ge=0)
    """Further tries of a request that found no service, a busy or a failing one."""
    backoff_seconds: Seconds = Field(default=0.5, ge=0)
    """Wait before the first further try; doubles with each, up to a day."""
    fallback: Signed | None = None
    """Value of replies that could not be scored; none stops training instead."""
    breaker_failures: Count = Field(default=3, ge=1)
    """After so many failed requests in a row none is sent for a while; the fallback holds."""
    breaker_seconds: Seconds = Field(default=60.0, ge=0)
    """Length of that while; then one request is tried."""

    @field_validator("url")
    @classmethod
    def _valid_url(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            _ = parts.port
        except ValueError:
            raise ValueError("is no valid URL; mend its host or port") from None
        # The value itself must not be repeated: it may hold a password.
        if "@" in parts.netloc or parts.query:
            raise ValueError("holds user info or a query, where secrets stand; set token_env")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be http://host/path or https://host/path")
        if not _is_usable_url(value):
            raise ValueError("is no valid URL; mend its host, and odd characters in it")
        return value

    @field_validator("token_env")
    @classmethod
    def _valid_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", value):
            # Not repeated: it may be the token itself.
            raise ValueError("is no NAME of an environment variable; set one, and name it here")
        return value

    @model_validator(mode="after")
    def _token_is_encrypted(self) -> Self:
        parts = urlsplit(self.url)
        if self.token_env and parts.scheme == "http" and parts.hostname not in LOOPBACK_HOSTS:
            raise ValueError("token_env would go over the network unencrypted; use https in url")
        return self


AnyComponent = (
    RewardModelComponent | LengthComponent | KeywordComponent | RegexComponent
    | JsonValidComponent | CorrectnessComponent | RepetitionComponent | CustomComponent
    | RemoteComponent
)  # fmt: skip

#: The section of each component type.
COMPONENTS: Mapping[str, type[ComponentSection]] = {
    "reward_model": RewardModelComponent,
    "length": LengthComponent,
    "keyword": KeywordComponent,
    "regex": RegexComponent,
    "json_valid": JsonValidComponent,
    "correctness": CorrectnessComponent,
    "repetition": RepetitionComponent,
    "custom": CustomComponent,
    "remote": RemoteComponent,
}


def validate_component(name: str, value: Any) -> ComponentSection:
    """Validate the options of a component, whose type is its `type`, or else its name.

    Raises:
        PydanticCustomError: The errors in one, see `nested_error`.
    """
    if isinstance(value, ComponentSection):
        return value
    options = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    component_type = options.get("type", name)
    problem = ""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,62}", name):
        problem = f"{name!r} is no name of a component; use letters, digits, _ and -"
    elif name == "missing_eos":
        problem = f"{name!r} is a curve of its own beside the components'; rename it"
    elif not isinstance(component_type, str) or component_type not in COMPONENTS:
        known = ", ".join(COMPONENTS)
        problem = f"type = {component_type!r} is no kind of component; known are {known}"
    if problem:
        raise nested_error([{"type": "value_error", "loc": (), "msg": problem, "input": name}])
    return validate_as(COMPONENTS[component_type], {} if value is None else value)


def _is_usable_url(url: str) -> bool:
    """Return whether httpx accepts the URL, and DNS its host name."""
    import httpx  # slow to import, and rarely needed

    try:
        parsed = httpx.URL(url)
        host = parsed.host and parsed.raw_host.decode("ascii")
        host.encode("idna")  # as a socket does: no part empty or too long
    except (httpx.InvalidURL, UnicodeError):
        return False
    return bool(host) and ("%" not in host or ":" in host)
