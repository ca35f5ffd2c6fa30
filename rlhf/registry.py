"""The champion of each model line, who made it so and why: a history that only grows.

`champion/<model>` holds promotions and rollbacks, and its last entry names the champion. Whoever
changes it read it first, and the entry it writes follows the one it read: of two at once one wins,
and the other is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from rlhf.approvals import Approval, Said, line, now, person, read_entry
from rlhf.errors import ArtifactMissing, ConfigError, PolicyWithdrawn, PromotionLost
from rlhf.gates import VERDICT, Verdict, read_verdict
from rlhf.store import ArtifactRef, Store
from rlhf.store.manifest import Digest


class Promotion(Said):
    """One change of a line's champion to `policy`, and what it rests on.

    `previous` was champion before. `unapproved` says that no gate's yes stands behind it;
    `approval` is a person's, where one was asked. `number` is its place in the history, from 1.
    """

    model: str = ""
    policy: Digest
    verdict: Digest | None = None
    action: Literal["promote", "rollback"] = "promote"
    previous: Digest | None = None
    unapproved: bool = False
    approval: Approval | None = None
    number: int = Field(default=0, exclude=True)


def history(store: Store, name: str) -> list[Promotion]:
    """All promotions and rollbacks of a model line, oldest first."""
    place = _place(name)
    entries = store.history.numbered(place).items()
    return [read_entry(Promotion, place, {**entry, "number": n}) for n, entry in entries]


def champion(store: Store, name: str) -> Promotion | None:
    """How the line's champion came to be it; None if the line has none."""
    return next(reversed(history(store, name)), None)


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
) -> Promotion:
    """Make a policy the champion, if `expected` still is what made the present one.

    Args:
        store: Where the line is.
        name: The model line.
        policy: Digest of the new champion.
        verdict: Digest of the verdict on it.
        expected: The last entry when the decision was made.
        why: The reason, for people.
        by: Who; see `rlhf.approvals.person`.
        run: Name of the run that does it, if one does.
        unapproved: Whether it is promoted without a gate's yes.
        approval: What a person said of it.

    Raises:
        ConfigError: It is unapproved, and no reason is given.
        PromotionLost: Somebody else changed the champion meanwhile; nothing was written.
    """
    entry = Promotion(
        model=name, policy=policy, verdict=verdict, by=person(by), when=now(), run=run,
        why=_reason(why) if unapproved else line("--why", why), unapproved=unapproved,
        previous=expected.policy if expected else None,
        number=expected.number + 1 if expected else 1, approval=approval,
    )  # fmt: skip
    return _written(store, entry)


def rollback(
    store: Store, name: str, *, why: str, to: str | None = None, by: str | None = None
) -> Promotion:
    """Make an earlier champion the champion again, as a new entry.

    Without `to` it is the one before the present champion; those that were rolled back are passed
    over.

    Raises:
        ArtifactMissing: There is none to go back to, or its files are not all there.
        ConfigError: `to` was never champion, or is it now; or no reason is given.
        PromotionLost: Somebody else changed the champion meanwhile; nothing was written.
    """
    why = _reason(why)
    entries = history(store, name)
    if not entries:
        raise ArtifactMissing(f"{store.uri}: model line {name!r} has no champion to roll back")
    last = entries[-1]
    target = to or _before(entries, store, name)
    if target == last.policy:
        raise ConfigError(f"--to {target[:12]}: is the champion of {name!r} already")
    then = [entry for entry in entries if entry.policy == target]
    if not then:
        raise ConfigError(
            f"--to {target[:12]}: was never champion of {name!r}; choose one of `rlhf champion "
            f"--name {name} --history`, or use `rlhf promote`"
        )
    if not store.exists(target):
        raise ArtifactMissing(
            f"{store.uri}: policy {target[:12]} is not there, or not whole; name another by --to"
        )
    entry = Promotion(
        model=name, policy=target, verdict=then[-1].verdict, action="rollback", by=person(by),
        when=now(), why=why, previous=last.policy, unapproved=then[-1].unapproved,
        number=last.number + 1,
    )  # fmt: skip
    return _written(store, entry)


def require_standing(entries: Sequence[Promotion], name: str, policy: str) -> None:
    """Refuse a policy that was rolled back, for a run that decides on its own.

    Raises:
        PolicyWithdrawn: Says who took it back, and how to promote it all the same.
    """
    taken_back = _replayed(entries)[1].get(policy)
    if taken_back:
        raise PolicyWithdrawn(
            f"policy {policy[:12]} of model line {name!r} was rolled back{taken_back}, and a run "
            "does not promote it again; if it shall be champion after all: `rlhf promote "
            f"{policy[:12]} --name {name}`"
        )


def verdict_of(store: Store, policy: str) -> tuple[ArtifactRef, Verdict] | None:
    """The verdict on a policy; the newest of several, and a no rather than a yes as old as it."""
    found: list[tuple[float, bool, ArtifactRef, Verdict]] = []
    for ref, manifest, age in store.list():
        if ref.kind == "verdict" and policy in manifest.parents.values():
            verdict = read_verdict(store.fetch(ref, [VERDICT]))
            if verdict.subject == policy:
                found.append((age, verdict.approved, ref, verdict))
    if not found:
        return None
    _, _, ref, verdict = min(found, key=lambda each: each[:2])
    return ref, verdict


def _before(entries: Sequence[Promotion], store: Store, name: str) -> str:
    standing, _ = _replayed(entries)
    if len(standing) < 2:
        raise ArtifactMissing(
            f"{store.uri}: before {entries[-1].policy[:12]} model line {name!r} had no champion "
            "that was not rolled back; name one by --to, or promote another"
        )
    return standing[-2]


def _replayed(entries: Sequence[Promotion]) -> tuple[list[str], dict[str, Promotion]]:
    """Champions that stand, the present one last, and those that were rolled back, by which entry.

    A rollback takes back every champion after the one that it returns to.
    """
    standing: list[str] = []
    taken_back: dict[str, Promotion] = {}
    for entry in entries:
        known = entry.policy in standing
        if entry.action == "rollback":
            at = standing.index(entry.policy) if known else max(len(standing) - 1, 0)
            taken_back |= dict.fromkeys(standing[at:], entry)
            del standing[at:]
        elif known:
            standing.remove(entry.policy)
        standing.append(entry.policy)
        taken_back.pop(entry.policy, None)
    return standing, taken_back


def _written(store: Store, entry: Promotion) -> Promotion:
    name, policy = entry.model, entry.policy[:12]
    if store.history.advance(_place(name), entry.model_dump(), entry.number - 1):
        return entry
    won = next((each for each in history(store, name) if each.number == entry.number), None)
    what = f"{won.policy[:12]} became champion{won}" if won else "by whom is not known"
    raise PromotionLost(
        f"{store.uri}: {policy} did not become champion of {name!r}, as somebody else changed that "
        f"meanwhile: {what}; look at `rlhf champion --name {name} --history`, and if it shall be "
        f"{policy} all the same: `rlhf promote {policy} --name {name}`"
    )


def _reason(why: str) -> str:
    found = line("--why", why)
    if not found:
        raise ConfigError("--why is empty; say why, for those who read the history")
    return found


def _place(name: str) -> str:
    return f"champion/{name}"
