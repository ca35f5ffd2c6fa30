"""The champion that a run's policy is compared with, its gate prompts, and the looks at them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf import champions
from rlhf.champions import Promotion
from rlhf.config import PipelineConfig
from rlhf.data.rows import PROMPTS_GATE
from rlhf.errors import ArtifactMissing
from rlhf.store import ArtifactRef, Store

#: Roles of the optional inputs of the policy's evaluation, each with the kind of artifact.
CHAMPION, CHAMPION_EVALUATION = "champion", "champion-evaluation"
OPTIONAL = {CHAMPION: "policy", CHAMPION_EVALUATION: "evaluation"}
#: Prefix of the histories of policies that were compared on the same gate prompts.
_LOOKS = "looks"


@dataclass(frozen=True)
class Challenge:
    """What a policy has to be better than."""

    champion: ArtifactRef
    """The champion's policy."""
    evaluation: ArtifactRef | None = None
    """The champion's evaluation, if its gate prompts are to be used again."""


def find_challenge(
    config: PipelineConfig, store: Store, policy: str | None = None
) -> Challenge | None:
    """Return what a policy is compared with; None without a champion or without a comparison.

    A policy that is the champion itself is compared with the one before it, as it was when it was
    promoted: a repeated run finds its stages in the store.

    Args:
        config: Configuration with the model line, `gates.champion` and `data.rotation`.
        store: Where the champion is.
        policy: Digest of the policy, if it is known yet.

    Raises:
        ArtifactMissing: The champion is not in the store, or not whole.
    """
    line = config.promotion.name
    if config.gates.champion is None:
        return None
    entries = champions.history(store, line)
    entry = champions.opponent(entries, policy)
    if entry is None:
        return None
    if not store.exists(entry.policy):
        if entry is not entries[-1]:
            # This policy is the champion already: nothing is promoted for want of a comparison.
            return None
        raise ArtifactMissing(
            f"{store.uri}: the champion {entry.policy[:12]} of {line} is not there, or not whole, "
            "so no policy can be compared with it; make another one champion (`rlhf rollback` or "
            "`rlhf promote`), take another promotion.name, or set gates.champion to none"
        )
    return Challenge(store.resolve(entry.policy), _frozen(config, store, entry))


def optional_inputs(
    config: PipelineConfig, refs: Mapping[str, ArtifactRef], store: Store
) -> dict[str, ArtifactRef]:
    """Return the optional inputs of the policy's evaluation: champion and its evaluation."""
    challenge = find_challenge(config, store, refs["policy"].digest)
    if challenge is None:
        return {}
    inputs = {CHAMPION: challenge.champion}
    if challenge.evaluation is not None:
        inputs[CHAMPION_EVALUATION] = challenge.evaluation
    return inputs


def take_look(store: Store, line: str, prompts: str, policy: str) -> int:
    """Record that a policy was compared on some gate prompts; return the number of its look.

    The same policy looks once, however often it is evaluated.

    Args:
        store: Has the history.
        line: Model line.
        prompts: Digest of the gate prompts.
        policy: Digest of the policy.
    """
    name = _history(line, prompts)
    if policy not in _policies(store, name):
        store.history.append(name, {"policy": policy, "when": champions.timestamp()})
    return _policies(store, name).index(policy) + 1


def looks_taken(store: Store, line: str, prompts: str) -> int:
    """Return the number of policies that were compared on some gate prompts."""
    return len(_policies(store, _history(line, prompts)))


def _frozen(config: PipelineConfig, store: Store, entry: Promotion) -> ArtifactRef | None:
    """Return the evaluation of a champion whose gate prompts stay in use; None if they do not."""
    if entry.verdict is None or not store.exists(entry.verdict):
        return None
    digest = store.manifest(entry.verdict).parents.get("evaluation")
    if digest is None or not store.exists(digest):
        return None
    manifest = store.manifest(digest)
    has_prompts = any(file.path == PROMPTS_GATE for file in manifest.files)
    same = manifest.producer.config.get("rotation", 0) == config.data.rotation
    return store.resolve(digest) if has_prompts and same else None


def _policies(store: Store, name: str) -> list[str]:
    """Return the policies of a history of looks, each once."""
    return [*dict.fromkeys(entry["policy"] for entry in store.history.entries(name))]


def _history(line: str, prompts: str) -> str:
    return f"{_LOOKS}/{line}/{prompts}"
