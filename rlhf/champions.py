"""Champions of model lines and approvals of policies, as histories in the store.

The last entry of the history `champion/<model line>`, a promotion or a rollback, names the
champion. A new entry is written only after the entry that its writer has read: of two concurrent
changes one wins, the other raises PromotionLost. The last entry of
`approvals/<model line>/<policy>` is the decision on a policy that needs a person's approval.
"""

from __future__ import annotations

import getpass
import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rlhf.config.pipeline import PromotionConfig
from rlhf.costs import Cost
from rlhf.errors import (
    ApprovalMissing,
    ApprovalRefused,
    ArtifactCorrupt,
    ArtifactMissing,
    ConfigError,
    PolicyWithdrawn,
    PromotionLost,
)
from rlhf.gates import VERDICT, Verdict, read_verdict
from rlhf.store import ArtifactRef, Store
from rlhf.store.manifest import Digest, first_problem

#: Environment variable with the name of the person who decides.
USER = "RLHF_USER"
#: Prefix of the names of the champions' histories.
CHAMPIONS = "champion/"
#: Most characters of a name or a reason.
LONGEST = 2000


def printable_line(value: Any) -> Any:
    """Return text as one line of printable characters, for tables and logs."""
    if not isinstance(value, str):
        return value
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


Line = Annotated[str, BeforeValidator(printable_line), Field(max_length=LONGEST)]


class Entry(BaseModel):
    """An entry of a history: author, time, reason and run, as far as they are known."""

    # Later versions may write more fields; earlier ones wrote fewer.
    model_config = ConfigDict(frozen=True, extra="ignore")

    by: Line | None = None
    when: Line | None = None
    why: Line = ""
    run: Line | None = None

    def __str__(self) -> str:
        """Return text such as ` by ann at 2026-01-01T00:00:00+00:00 (too long)`."""
        parts = (("by", self.by), ("in run", self.run), ("at", self.when))
        details = "".join(f" {word} {value}" for word, value in parts if value)
        return details + (f" ({self.why})" if self.why else "")


EntryT = TypeVar("EntryT", bound=Entry)


class Approval(Entry):
    """A person's decision on a policy: approved or refused.

    `identity` is how far `by` is known: Prefect's server knows no users (docs/security.md).
    `request` names the question of a waiting run that it answers, if it does.
    """

    approved: bool
    identity: Literal["claimed"] = "claimed"
    request: Line | None = None


class Promotion(Entry):
    """A change of a model line's champion to `policy`.

    `previous` was champion before. `unapproved` means without the approval of a gate; `approval` is
    a person's, if the line needs one. `cost` is that of all that was made for it, as far as it was
    known; earlier versions wrote none. `number` counts the history's entries from 1.
    """

    model: str = ""
    policy: Digest
    verdict: Digest | None = None
    action: Literal["promote", "rollback"] = "promote"
    previous: Digest | None = None
    unapproved: bool = False
    approval: Approval | None = None
    cost: Cost | None = None
    number: int = Field(default=0, exclude=True)


def history(store: Store, name: str) -> list[Promotion]:
    """Return all promotions and rollbacks of a model line, oldest first."""
    entries = store.history.numbered(CHAMPIONS + name).items()
    return [read_entry(Promotion, CHAMPIONS + name, {**entry, "number": n}) for n, entry in entries]


def latest_entry(store: Store, name: str) -> dict[str, Any] | None:
    """Return the last entry of a model line's history, unchecked; None if there is none."""
    return store.history.latest(CHAMPIONS + name)


def model_lines(store: Store) -> list[str]:
    """Return the names of the model lines that have a history."""
    return [name.removeprefix(CHAMPIONS) for name in store.history.names(CHAMPIONS)]


def line_of(promotion: PromotionConfig, known: Sequence[str]) -> str:
    """Return the model line that is meant: the one that was written, else the only known one."""
    guessed = "name" not in promotion.model_fields_set and len(known) == 1
    return known[0] if guessed else promotion.name


def champion(store: Store, name: str) -> Promotion | None:
    """Return the promotion of a line's champion; None if the line has no champion."""
    return next(reversed(history(store, name)), None)


def opponent(entries: Sequence[Promotion], policy: str | None) -> Promotion | None:
    """Return the entry of the champion that a policy is compared with; None if there is none.

    For the champion itself it is the one that it took the place of, so that a repeated run makes
    the comparison that it made before.

    Args:
        entries: History of the model line, oldest first.
        policy: Digest of the policy; None while it is not trained yet.
    """
    if not entries or entries[-1].policy != policy:
        return entries[-1] if entries else None
    own = [e for e in entries if e.policy == policy and e.action == "promote"]
    if not own or own[-1].previous is None:
        return None
    earlier = [e for e in entries if e.number < own[-1].number and e.policy == own[-1].previous]
    return earlier[-1] if earlier else None


def promote(
    store: Store,
    name: str,
    policy: str,
    *,
    verdict: str | None,
    expected: Promotion | None,
    why: str,
    by: str | None = None,
    run: str | None = None,
    unapproved: bool = False,
    approval: Approval | None = None,
    cost: Cost | None = None,
) -> Promotion:
    """Make a policy the champion, if `expected` still is the last entry.

    Args:
        store: The store with the history.
        name: The model line.
        policy: Digest of the new champion.
        verdict: Digest of the gate's verdict on it.
        expected: The last entry when the decision was made.
        why: The reason, for people.
        by: The person; see `acting_person`.
        run: Name of the run that promotes it, if one does.
        unapproved: Whether it is promoted without the approval of a gate.
        approval: A person's approval.
        cost: What its training and evaluation cost.

    Raises:
        ConfigError: It is unapproved, and no reason is given.
        PromotionLost: The champion changed meanwhile; nothing was written.
    """
    return _append(
        store, name, expected, policy=policy, by=acting_person(by),
        why=_reason(why) if unapproved else checked_line("--why", why), verdict=verdict, run=run,
        unapproved=unapproved, approval=approval, cost=cost,
    )  # fmt: skip


def rollback(
    store: Store, name: str, *, why: str, to: str | None = None, by: str | None = None
) -> Promotion:
    """Make an earlier champion the champion again, as a new entry.

    Without `to` it is the one before the present champion, without those that were rolled back.

    Raises:
        ArtifactMissing: There is no earlier champion, or its files are incomplete.
        ConfigError: `to` was never champion, or is champion already; or no reason is given.
        PromotionLost: The champion changed meanwhile; nothing was written.
    """
    why = _reason(why)
    entries = history(store, name)
    if not entries:
        raise ArtifactMissing(f"{store.uri}: model line {name!r} has no champion to roll back")
    last = entries[-1]
    target = to or _previous_champion(entries, store, name)
    if target == last.policy:
        raise ConfigError(f"--to {target[:12]}: is the champion of {name!r} already")
    earlier = [entry for entry in entries if entry.policy == target]
    if not earlier:
        raise ConfigError(
            f"--to {target[:12]}: was never champion of {name!r}; choose one of `rlhf champion "
            f"--name {name} --history`, or use `rlhf promote`"
        )
    if not store.exists(target):
        raise ArtifactMissing(
            f"{store.uri}: policy {target[:12]} is not there, or not whole; name another by --to"
        )
    return _append(
        store, name, last, action="rollback", policy=target, by=acting_person(by), why=why,
        verdict=earlier[-1].verdict, unapproved=earlier[-1].unapproved, cost=earlier[-1].cost,
    )  # fmt: skip


def require_standing(entries: Sequence[Promotion], name: str, policy: str) -> None:
    """Raise if a policy was rolled back: a run must not promote it automatically.

    Raises:
        PolicyWithdrawn: It names the rollback, and how to promote the policy again.
    """
    rollback_entry = _replay(entries)[1].get(policy)
    if rollback_entry:
        raise PolicyWithdrawn(
            f"policy {policy[:12]} of model line {name!r} was rolled back{rollback_entry}, and a "
            "run does not promote it again; if it shall be champion after all: `rlhf promote "
            f"{policy[:12]} --name {name}`"
        )


def verdict_of(store: Store, policy: str) -> tuple[ArtifactRef, Verdict] | None:
    """Return the newest verdict on a policy; of equally old ones a rejection."""
    verdicts: list[tuple[float, bool, ArtifactRef, Verdict]] = []
    for ref, manifest, age in store.list():
        if ref.kind == "verdict" and policy in manifest.parents.values():
            verdict = read_verdict(store.fetch(ref, [VERDICT]))
            if verdict.subject == policy:
                verdicts.append((age, verdict.approved, ref, verdict))
    if not verdicts:
        return None
    _, _, ref, verdict = min(verdicts, key=lambda each: each[:2])
    return ref, verdict


def record_approval(
    store: Store,
    name: str,
    policy: str,
    *,
    approved: bool,
    by: str | None = None,
    why: str = "",
    run: str | None = None,
    request: str | None = None,
) -> Approval:
    """Record a person's decision on a policy for a model line; that on a request only once.

    Args:
        store: The store with the history.
        name: The model line.
        policy: Digest of the policy.
        approved: True approves, False refuses.
        by: The person; see `acting_person`.
        why: The reason.
        run: Name of the run that waited for the decision.
        request: Its question. A repeated call with it, after an error of the store that left open
            whether the entry was written, returns the entry that is there.
    """
    approval = Approval(
        approved=approved, by=acting_person(by), when=timestamp(), why=checked_line("--why", why),
        run=run, request=request,
    )  # fmt: skip
    history = _approval_history(name, policy)
    if request is not None:
        entries = [read_entry(Approval, history, e) for e in store.history.entries(history)]
        recorded = next((entry for entry in entries if entry.request == request), None)
        if recorded is not None:
            return recorded
    store.history.append(history, approval.model_dump())
    return approval


def approval_of(store: Store, name: str, policy: str) -> Approval | None:
    """Return the last decision on a policy; None if there is none."""
    history = _approval_history(name, policy)
    entry = store.history.latest(history)
    return read_entry(Approval, history, entry) if entry else None


def require_approval(store: Store, name: str, policy: str, options: bool = False) -> Approval:
    """Return a person's approval of a policy.

    Args:
        store: Where the decisions are.
        name: Model line.
        policy: Digest of the policy.
        options: Whether the store has options, which the command of the message needs too.

    Raises:
        ApprovalMissing: No person has decided yet.
        ApprovalRefused: It was refused.
    """
    approval = approval_of(store, name, policy)
    subject = f"policy {policy[:12]} of model line {name!r}"
    command = f"rlhf approve {policy[:12]} --name {name} --store {shlex.quote(store.uri)}"
    if options:
        command += " --config <the configuration of the run>"
    if approval is None:
        raise ApprovalMissing(
            f"{subject} waits for a person's approval (promotion.approval = manual); give it by "
            f"`{command}` (or refuse it: --refuse), and run the same again"
        )
    if not approval.approved:
        raise ApprovalRefused(
            f"{subject} was refused{approval}; to change that: `{command}`, and run the same again"
        )
    return approval


def acting_person(by: str | None = None) -> str:
    """Return `by`, the value of RLHF_USER, or the name of the system's user.

    Raises:
        ConfigError: The name is too long, or nothing of it can be printed.
    """
    try:
        name = by or os.environ.get(USER) or getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        name = f"uid {os.getuid()}"
    line = checked_line("--by", name)
    if not line:
        raise ConfigError(f"--by is blank; give a name by it, or by {USER}")
    return line


def timestamp() -> str:
    """Return the current time as entries hold it: UTC in ISO 8601, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def checked_line(option: str, text: str) -> str:
    """Return the text of an option as one line.

    Raises:
        ConfigError: It is too long.
    """
    line = printable_line(text)
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


def _append(store: Store, name: str, last: Promotion | None, **fields: Any) -> Promotion:
    """Append an entry after `last`, the last one that the caller has read.

    Raises:
        PromotionLost: Another entry stands there; nothing was written.
    """
    for digest in (fields["policy"], fields.get("verdict")):
        if digest:
            store.renew(digest)  # so that no collection takes it that does not see the entry
    entry = Promotion(
        model=name, when=timestamp(), previous=last.policy if last else None,
        number=last.number + 1 if last else 1, **fields,
    )  # fmt: skip
    unknown = {"cost"} if entry.cost is None else set[str]()
    written = entry.model_dump(exclude={"number", *unknown})
    if store.history.advance(CHAMPIONS + name, written, entry.number - 1):
        return entry
    policy = entry.policy[:12]
    winner = next((each for each in history(store, name) if each.number == entry.number), None)
    cause = f"{winner.policy[:12]} became champion{winner}" if winner else "by whom is not known"
    raise PromotionLost(
        f"{store.uri}: {policy} did not become champion of {name!r}, as somebody else changed that "
        f"meanwhile: {cause}; look at `rlhf champion --name {name} --history`, and if it shall be "
        f"{policy} all the same: `rlhf promote {policy} --name {name}`"
    )


def _reason(why: str) -> str:
    """Return the reason as one line; ConfigError if it is empty or too long."""
    reason = checked_line("--why", why)
    if not reason:
        raise ConfigError("--why is empty; say why, for those who read the history")
    return reason


def _previous_champion(entries: Sequence[Promotion], store: Store, name: str) -> str:
    """Return the standing champion before the present one."""
    standing, _ = _replay(entries)
    if len(standing) < 2:
        raise ArtifactMissing(
            f"{store.uri}: before {entries[-1].policy[:12]} model line {name!r} had no champion "
            "that was not rolled back; name one by --to, or promote another"
        )
    return standing[-2]


def _replay(entries: Sequence[Promotion]) -> tuple[list[str], dict[str, Promotion]]:
    """Return the champions not rolled back, newest last, and rollbacks by policy.

    A rollback withdraws every champion after the one that it returns to.
    """
    standing: list[str] = []
    withdrawn: dict[str, Promotion] = {}
    for entry in entries:
        is_standing = entry.policy in standing
        if entry.action == "rollback":
            at = standing.index(entry.policy) if is_standing else max(len(standing) - 1, 0)
            withdrawn |= dict.fromkeys(standing[at:], entry)
            del standing[at:]
        elif is_standing:
            standing.remove(entry.policy)
        standing.append(entry.policy)
        withdrawn.pop(entry.policy, None)
    return standing, withdrawn


def _approval_history(name: str, policy: str) -> str:
    """Return the name of the history of decisions on a policy."""
    return f"approvals/{name}/{policy}"
