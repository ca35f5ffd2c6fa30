"""Looks at gate prompts: the comparisons of a model line, as a history in the store.

`looks/<model line>` has an entry for each comparison with the digests of its prompts, so that a
comparison counts for every later set of prompts of which at least half were in it: also if rows
were forgotten, data were added, or the champion's own prompts are not in the store any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlhf import champions
from rlhf.config.gates import ChampionGateConfig
from rlhf.data.gate_prompts import PromptSet
from rlhf.store import Store


@dataclass(frozen=True)
class Looks:
    """Comparisons on some gate prompts, and the chance of error that they were given."""

    count: int
    spent: float
    """Sum of the levels, 1 − confidence, at which they were judged."""


@dataclass(frozen=True)
class _Look:
    """A comparison that was made."""

    policy: str
    result: str
    """Digest of its figures."""
    prompts: PromptSet | None
    """None if its entry is gone: it may have been on any prompts."""
    level: float | None = None
    """Chance of error; None if its entry does not tell."""


def take_look(
    store: Store, line: str, prompts: PromptSet, policy: str, result: str = "", *, level: float
) -> Looks:
    """Record that a policy was compared on some gate prompts; return the looks before it.

    An equal comparison of the same policy looks once, however often it is repeated. Other replies
    of it, as by other settings of the evaluation, are another chance to be found better.

    Args:
        store: Has the history.
        line: Model line.
        prompts: The gate prompts.
        policy: Digest of the policy.
        result: Digest of the comparison's figures.
        level: Chance of error at which they are judged.
    """
    own = policy, result
    entry = {
        "policy": policy, "result": result, "level": level, "prompts": prompts.digest,
        "keys": sorted(prompts.keys), "when": champions.timestamp(),
    }  # fmt: skip
    while True:
        looks, last = _looks(store, line)
        before: dict[tuple[str, str], float] = {}
        for key, spent in _spent(looks, prompts, level):
            if key != own:
                before[key] = max(spent, before.get(key, 0.0))
            elif spent >= level:
                # What others spent until these figures were judged at this level: judged again at a
                # larger one they come after all looks in between.
                return Looks(len(before), sum(before.values()))
        # Of two comparisons at once each has a number of its own: the second counts the first.
        store.history.advance(_history(line), entry, last)


def looks_taken(store: Store, line: str, prompts: PromptSet, *, level: float) -> Looks:
    """Return the comparisons on prompts of which these are at least half.

    Figures that were judged at several levels, as by other settings of the gate, have the largest.

    Args:
        store: Has the history.
        line: Model line.
        prompts: The gate prompts.
        level: That of looks whose entry does not tell, if the shipped one is not larger.
    """
    levels: dict[tuple[str, str], float] = {}
    for key, spent in _spent(_looks(store, line)[0], prompts, level):
        levels[key] = max(spent, levels.get(key, 0.0))
    return Looks(len(levels), sum(levels.values()))


def _spent(
    looks: Sequence[_Look], prompts: PromptSet, default: float
) -> Iterator[tuple[tuple[str, str], float]]:
    """Yield policy and result, and the level, of each look at some prompts, oldest first."""
    for each in looks:
        if each.prompts is None or prompts.is_seen_in(each.prompts):
            # An entry of an earlier version does not tell its level: the shipped one, unless the
            # present one is larger.
            unknown = max(default, ChampionGateConfig().look_level)
            yield (each.policy, each.result), unknown if each.level is None else each.level


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
        found.append(_Look(entry["policy"], entry["result"], prompts, entry.get("level")))
    return found, last


def _history(line: str) -> str:
    return f"looks/{line}"
