"""Looks at gate prompts: the comparisons of a model line, as a history in the store.

`looks/<model line>` has an entry for each comparison with the digests of its prompts, so that a
comparison counts for every later set of prompts of which at least half were in it: also if rows
were forgotten, data were added, or the champion's own prompts are not in the store any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf import champions
from rlhf.data.gate_prompts import PromptSet
from rlhf.store import Store


@dataclass(frozen=True)
class _Look:
    """A comparison that was made."""

    policy: str
    result: str
    """Digest of its figures."""
    prompts: PromptSet | None
    """None if its entry is gone: it may have been on any prompts."""


def take_look(store: Store, line: str, prompts: PromptSet, policy: str, result: str = "") -> int:
    """Record that a policy was compared on some gate prompts; return the number of its look.

    An equal comparison of the same policy looks once, however often it is repeated. Other replies
    of it, as by other settings of the evaluation, are another chance to be found better.

    Args:
        store: Has the history.
        line: Model line.
        prompts: The gate prompts.
        policy: Digest of the policy.
        result: Digest of the comparison's figures.
    """
    entry = {
        "policy": policy, "result": result, "prompts": prompts.digest,
        "keys": sorted(prompts.keys), "when": champions.timestamp(),
    }  # fmt: skip
    while True:
        looks, last = _looks(store, line)
        taken = _distinct(looks, prompts)
        if (policy, result) in taken:
            return taken.index((policy, result)) + 1
        # Of two comparisons at once each has a number of its own: the second counts the first.
        store.history.advance(_history(line), entry, last)


def looks_taken(store: Store, line: str, prompts: PromptSet) -> int:
    """Return the number of comparisons on prompts of which these are at least half."""
    return len(_distinct(_looks(store, line)[0], prompts))


def _distinct(looks: Sequence[_Look], prompts: PromptSet) -> list[tuple[str, str]]:
    """Return policy and result of the comparisons on some prompts, each once, oldest first."""
    counted = (e for e in looks if e.prompts is None or prompts.is_seen_in(e.prompts))
    return [*dict.fromkeys((each.policy, each.result) for each in counted)]


def _looks(store: Store, line: str) -> tuple[list[_Look], int]:
    """Return all comparisons of a line, oldest first, and the number of the last entry.

    An earlier version had a history for each set of prompts, `looks/<model line>/<sha256>`.
    """
    found: list[_Look] = []
    name = _history(line)
    for older in store.history.names(f"{name}/"):
        if older != name:
            digest = older.rpartition("/")[2]
            found += [
                _Look(e["policy"], e.get("result", ""), PromptSet(digest))
                for e in store.history.entries(older)
            ]
    entries = store.history.numbered(name)
    last = max(entries, default=0)
    for number in range(1, last + 1):
        entry = entries.get(number)
        if entry is None:
            found.append(_Look(f"entry {number}", "", None))
            continue
        prompts = PromptSet(entry["prompts"], frozenset(entry["keys"]))
        found.append(_Look(entry["policy"], entry["result"], prompts))
    return found, last


def _history(line: str) -> str:
    return f"looks/{line}"
