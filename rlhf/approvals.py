"""What people say of a policy: who, when and why, kept beside the champions' history.

`approvals/<model>/<policy>` in the store; what was said last counts. An entry names no artifact, so
it keeps none from garbage collection.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rlhf.errors import ApprovalMissing, ApprovalRefused, ArtifactCorrupt, ConfigError
from rlhf.store import Store
from rlhf.store.manifest import first_problem

USER = "RLHF_USER"
#: Most characters of who or why.
LONGEST = 2000


def one_line(value: Any) -> Any:
    """Text as one line of what can be printed, as it goes into tables and logs."""
    if not isinstance(value, str):
        return value
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


Line = Annotated[str, BeforeValidator(one_line), Field(max_length=LONGEST)]


class Said(BaseModel):
    """Who did something, when, why, and in which run, as far as it is known."""

    # A later version may say more, and an earlier one said less.
    model_config = ConfigDict(frozen=True, extra="ignore")

    by: Line | None = None
    when: Line | None = None
    why: Line = ""
    run: Line | None = None

    def __str__(self) -> str:
        """` by ann at 2026-01-01T00:00:00+00:00 (worse on long prompts)`."""
        parts = (("by", self.by), ("in run", self.run), ("at", self.when))
        said = "".join(f" {word} {value}" for word, value in parts if value)
        return said + (f" ({self.why})" if self.why else "")


SaidT = TypeVar("SaidT", bound=Said)


class Approval(Said):
    """Whether a person approved of a policy."""

    approved: bool


def record_approval(
    store: Store,
    name: str,
    policy: str,
    *,
    approved: bool,
    by: str | None = None,
    why: str = "",
    run: str | None = None,
) -> Approval:
    """Write down what a person said of a policy for that model line.

    Args:
        store: Where the line is.
        name: The model line.
        policy: Digest of the policy.
        approved: Yes or no.
        by: Who; see `person`.
        why: The reason.
        run: Name of the run that asked.
    """
    said = Approval(approved=approved, by=person(by), when=now(), why=line("--why", why), run=run)
    store.history.append(_place(name, policy), said.model_dump())
    return said


def approval_of(store: Store, name: str, policy: str) -> Approval | None:
    """What was said last of a policy; None if nothing was."""
    entry = store.history.latest(_place(name, policy))
    return read_entry(Approval, _place(name, policy), entry) if entry else None


def require_approval(store: Store, name: str, policy: str) -> Approval:
    """The approval of a person.

    Raises:
        ApprovalMissing: Nobody has said anything yet.
        ApprovalRefused: It was refused.
    """
    said = approval_of(store, name, policy)
    subject = f"policy {policy[:12]} of model line {name!r}"
    if said is None:
        raise ApprovalMissing(
            f"{subject} waits for a person's approval (promotion.approval = manual); give it by "
            "`rlhf approve`, and run the same again"
        )
    if not said.approved:
        raise ApprovalRefused(
            f"{subject} was refused{said}; to change that: `rlhf approve`, and run the same again"
        )
    return said


def person(by: str | None = None) -> str:
    """Who does it: as given, as RLHF_USER says, or the name of the system's user."""
    try:
        found = by or os.environ.get(USER) or getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        found = f"uid {os.getuid()}"
    return line("--by", found)


def now() -> str:
    """This moment, as entries tell it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def line(option: str, text: str) -> str:
    """Who or why, as one line.

    Raises:
        ConfigError: It is too long.
    """
    found = one_line(text)
    if len(found) > LONGEST:
        raise ConfigError(f"{option}: {len(found)} characters; write at most {LONGEST}")
    return found


def read_entry(kind: type[SaidT], place: str, entry: Mapping[str, Any]) -> SaidT:
    """An entry of a history.

    Raises:
        ArtifactCorrupt: It is something else.
    """
    try:
        return kind.model_validate(entry)
    except ValidationError as error:
        raise ArtifactCorrupt(
            f"refs/{place}: an entry is not one that this version understands "
            f"({first_problem(error)})"
        ) from None


def _place(name: str, policy: str) -> str:
    return f"approvals/{name}/{policy}"
