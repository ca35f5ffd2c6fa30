"""Manual approvals of policies, and the common fields of histories' entries.

The last entry of the history `approvals/<model line>/<policy>` in the store counts. Entries are no
references: they keep no artifact from garbage collection.
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
#: Most characters of a name or a reason.
LONGEST = 2000


def one_line(value: Any) -> Any:
    """Return text as one line of printable characters, for tables and logs."""
    if not isinstance(value, str):
        return value
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


Line = Annotated[str, BeforeValidator(one_line), Field(max_length=LONGEST)]


class Entry(BaseModel):
    """An entry of a history: author, time, reason and run, as far as they are known."""

    # Later versions may write more fields; earlier ones wrote fewer.
    model_config = ConfigDict(frozen=True, extra="ignore")

    by: Line | None = None
    when: Line | None = None
    why: Line = ""
    run: Line | None = None

    def __str__(self) -> str:
        """` by ann at 2026-01-01T00:00:00+00:00 (worse on long prompts)`."""
        parts = (("by", self.by), ("in run", self.run), ("at", self.when))
        known = "".join(f" {word} {value}" for word, value in parts if value)
        return known + (f" ({self.why})" if self.why else "")


EntryT = TypeVar("EntryT", bound=Entry)


class Approval(Entry):
    """A person's decision on a policy: approved or refused."""

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
    """Record a person's decision on a policy for a model line.

    Args:
        store: The store with the history.
        name: The model line.
        policy: Digest of the policy.
        approved: True approves, False refuses.
        by: The person; see `acting_person`.
        why: The reason.
        run: Name of the run that waited for the decision.
    """
    approval = Approval(
        approved=approved, by=acting_person(by), when=timestamp(), why=checked_line("--why", why),
        run=run,
    )  # fmt: skip
    store.history.append(_approval_history(name, policy), approval.model_dump())
    return approval


def approval_of(store: Store, name: str, policy: str) -> Approval | None:
    """Return the last decision on a policy; None if there is none."""
    history = _approval_history(name, policy)
    entry = store.history.latest(history)
    return read_entry(Approval, history, entry) if entry else None


def require_approval(store: Store, name: str, policy: str) -> Approval:
    """Return a person's approval of a policy.

    Raises:
        ApprovalMissing: No person has decided yet.
        ApprovalRefused: It was refused.
    """
    approval = approval_of(store, name, policy)
    subject = f"policy {policy[:12]} of model line {name!r}"
    if approval is None:
        raise ApprovalMissing(
            f"{subject} waits for a person's approval (promotion.approval = manual); give it by "
            "`rlhf approve`, and run the same again"
        )
    if not approval.approved:
        raise ApprovalRefused(
            f"{subject} was refused{approval}; to change that: `rlhf approve`, and run the same "
            "again"
        )
    return approval


def acting_person(by: str | None = None) -> str:
    """Return `by`, the value of RLHF_USER, or the name of the system's user."""
    try:
        name = by or os.environ.get(USER) or getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        name = f"uid {os.getuid()}"
    return checked_line("--by", name)


def timestamp() -> str:
    """Return the current time as entries hold it: UTC in ISO 8601, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def checked_line(option: str, text: str) -> str:
    """Return the text of an option as one line.

    Raises:
        ConfigError: It is too long.
    """
    line = one_line(text)
    if len(line) > LONGEST:
        raise ConfigError(f"{option}: {len(line)} characters; write at most {LONGEST}")
    return line


def read_entry(model: type[EntryT], history: str, entry: Mapping[str, Any]) -> EntryT:
    """Parse an entry of a history.

    Raises:
        ArtifactCorrupt: It does not fit the model.
    """
    try:
        return model.model_validate(entry)
    except ValidationError as error:
        raise ArtifactCorrupt(
            f"refs/{history}: an entry is not one that this version understands "
            f"({first_problem(error)})"
        ) from None


def _approval_history(name: str, policy: str) -> str:
    """Return the name of the history of decisions on a policy."""
    return f"approvals/{name}/{policy}"
