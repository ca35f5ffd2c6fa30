"""Options of the commands that let policies reply and models score; flows define no class."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

from cyclopts import Parameter, validators

from rlhf.errors import ConfigError

#: Most tokens of a reply where the policy's training does not tell.
NEW_TOKENS = 128
#: Most tokens of prompt and reply in a suite, as in the suites' own evaluations.
SUITE_LENGTH = 2048

Positive = Annotated[int | None, Parameter(validator=validators.Number(gte=1))]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options for sampling replies of policies and for scoring them."""

    judge: str | None = None
    """Scores policies' replies; default: the usable judge of (b's) lineage, or its reward model."""
    samples: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 1
    """Replies to each prompt."""
    temperature: Annotated[float, Parameter(validator=validators.Number(gte=0))] = 1.0
    """Of sampling; 0 is greedy."""
    max_new_tokens: Positive = None
    """Most tokens of a reply; default: those of the policy's training, or 128."""
    max_length: Positive = None
    """Most tokens that scoring models are given; default: of their training, and of suites 2048."""
    limit: Positive = None
    """Use at most this many prompts or pairs."""
    seed: int = 0
    """Seed of the replies."""

    @property
    def replies(self) -> dict[str, Any]:
        """Settings of a `SamplingPlan`, those that are given."""
        names = ("samples", "temperature", "max_new_tokens", "seed")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def refuse(self, without: str, *but: str) -> None:
        """Refuse options that are of no effect.

        Args:
            without: Where they are of none, for the message.
            but: Names of those that are of some.

        Raises:
            ConfigError: One of the others is given.
        """
        for field in fields(self):
            if field.name not in but and getattr(self, field.name) != field.default:
                option = f"--{field.name.replace('_', '-')}"
                raise ConfigError(f"{option} is for a policy's replies; leave it out {without}")


#: None of them given.
DEFAULT_OPTIONS = ModelOptions()
