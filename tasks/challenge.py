"""The champion that a run's policy is compared with, and its gate prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf import champions
from rlhf.champions import Promotion
from rlhf.config import PipelineConfig, PPOConfig
from rlhf.data.rows import PROMPTS_GATE
from rlhf.errors import ArtifactMissing
from rlhf.store import ArtifactRef, Store

#: Roles of the optional inputs of the policy's evaluation, each with the kind of artifact.
CHAMPION, CHAMPION_EVALUATION = "champion", "champion-evaluation"
OPTIONAL = {CHAMPION: "policy", CHAMPION_EVALUATION: "evaluation"}


@dataclass(frozen=True)
class Challenge:
    """Champion that a policy has to be better than, and its gate prompts."""

    champion: ArtifactRef
    """The champion's policy."""
    evaluation: ArtifactRef | None = None
    """The champion's evaluation, if its gate prompts are to be used again."""
    note: str = ""
    """Why they are not, if it is not for another `data.rotation`."""


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
    return Challenge(store.resolve(entry.policy), *_frozen(config, store, entry))


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


def ppo_settings(policy: ArtifactRef, store: Store) -> PPOConfig | None:
    """Return the settings of the PPO training that made a policy; None if they are not known."""
    section = store.manifest(policy).producer.config.get("ppo")
    if not isinstance(section, dict):
        return None
    try:
        return PPOConfig.model_validate(section)
    except ValueError:  # of another version
        return None


def reply_settings(policy: ArtifactRef, store: Store) -> tuple[int, tuple[str, ...]] | None:
    """Return the most tokens of a policy's replies and its stop sequences; None if not known.

    They are those of its training by PPO.
    """
    ppo = ppo_settings(policy, store)
    return None if ppo is None else (ppo.max_new_tokens, ppo.generation.stop_sequences)


def _frozen(
    config: PipelineConfig, store: Store, entry: Promotion
) -> tuple[ArtifactRef | None, str]:
    """Return the evaluation of a champion whose gate prompts stay in use, or None and why."""
    own = "this run's own held-out prompts are used"
    if entry.verdict is None:
        return None, f"the champion was promoted without an evaluation: {own}"
    if not store.exists(entry.verdict):
        return None, f"the champion's verdict {entry.verdict[:12]} is not in the store: {own}"
    digest = store.manifest(entry.verdict).parents.get("evaluation")
    if digest is None or not store.exists(digest):
        return None, f"the champion's evaluation is not in the store: {own}"
    manifest = store.manifest(digest)
    if not any(file.path == PROMPTS_GATE for file in manifest.files):
        return None, f"the champion's evaluation, of an earlier version, has no prompts: {own}"
    if manifest.producer.config.get("rotation", 0) != config.data.rotation:
        return None, ""
    return store.resolve(digest), ""
