"""Check, once the data are known and before any training, of what the gates will need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf.challenge import NEW_PROMPTS
from rlhf.config import PipelineConfig
from rlhf.data.chat import loose_key
from rlhf.data.gate_prompts import MAX_KNOWN, GatePrompts, read_gate_prompts
from rlhf.data.rows import PAIRS_EVAL, PROMPTS_EVAL, PROMPTS_GATE, Pair, PromptRow, iterate_rows
from rlhf.errors import ArtifactMissing, ConfigError
from rlhf.gate_sizes import Sizes, check_gate_sizes, describe_power
from rlhf.saved import read_saved
from rlhf.store import ArtifactRef, Store
from rlhf.store.manifest import Manifest
from tasks.challenge import Challenge, find_challenge, looks_taken
from tasks.runner import find_inputs
from tasks.stages import EVALUATION, GATE_POLICY, PREPARE_DATA

#: Beginning of a model's name that is an artifact.
ARTIFACT = "artifact:"
#: Name of the check among a run's stages.
CHECK = "check-gates"


@dataclass(frozen=True)
class GateCheck:
    """Facts about the gates that are known before training."""

    power: str
    """What the comparison with the champion can find, in a sentence."""
    notes: tuple[str, ...] = ()
    """Sentences on the gate prompts."""

    @property
    def lines(self) -> tuple[str, ...]:
        """All of it, a sentence each."""
        return (self.power, *self.notes)


def check_gates(config: PipelineConfig, data: ArtifactRef, store: Store) -> GateCheck:
    """Check that the gates can be passed, and that there is a champion to compare with.

    Args:
        config: Configuration with gates, model line and evaluation.
        data: The run's dataset.
        store: Where dataset and champion are.

    Raises:
        ConfigError: A gate can't be passed with so few held-out rows, too many of the champion's
            gate prompts are training data, no look at them is left, or a model to start from was
            trained on data of another rotation.
        ArtifactMissing: The champion is not in the store.
    """
    _check_rotation(config, store)
    challenge = find_challenge(config, store)
    prompts = _frozen_prompts(config, store, challenge, data)
    sizes = _sizes(config, store.fetch(data), prompts)
    check_gate_sizes(config, sizes, has_champion=challenge is not None)
    return GateCheck(
        describe_power(config, sizes), tuple(_notes(config, store, challenge, prompts))
    )


def _sizes(config: PipelineConfig, folder: Path, prompts: GatePrompts | None) -> Sizes:
    pairs = [loose_key(pair.prompt) for pair in iterate_rows(folder / PAIRS_EVAL, Pair)]
    if prompts is not None:
        count = len(prompts.fresh)
    else:
        held_out = sum(1 for _ in iterate_rows(folder / PROMPTS_EVAL, PromptRow))
        count = min(held_out, config.evaluation.prompts)
    return Sizes(
        len(pairs),
        len(set(pairs)),
        count,
        config.evaluation.samples_per_prompt,
        are_frozen=prompts is not None,
    )


def _frozen_prompts(
    config: PipelineConfig, store: Store, challenge: Challenge | None, data: ArtifactRef
) -> GatePrompts | None:
    """Return the champion's gate prompts; None if they are not used.

    Raises:
        ConfigError: The dataset trains on too many of them.
    """
    if challenge is None or challenge.evaluation is None:
        return None
    evaluation = store.fetch(challenge.evaluation, [PROMPTS_GATE])
    prompts = read_gate_prompts(evaluation, store.fetch(data))
    if not prompts.too_many_known:
        return prompts
    total = prompts.known + len(prompts.fresh)
    files = ", ".join(f"{count:,} in {name}" for name, count in prompts.files.items())
    raise ConfigError(
        f"data: {prompts.known:,} of the {total:,} gate prompts of the champion "
        f"{challenge.champion.short} of {config.promotion.name} are among this run's training "
        f"data ({files}), and at most {MAX_KNOWN:.0%} may be: a comparison on them is worth "
        f"little; take the champion's seed (not {config.seed}), another data.rotation than "
        f"{config.data.rotation} to compare on held-out prompts of this run, or another "
        "promotion.name"
    )


def _notes(
    config: PipelineConfig, store: Store, challenge: Challenge | None, prompts: GatePrompts | None
) -> list[str]:
    """Return sentences on the gate prompts, and on the looks at them.

    Raises:
        ConfigError: No look is left for a policy that is not trained yet.
    """
    settings = config.gates.champion
    if settings is None or challenge is None:
        return []
    if challenge.evaluation is None or prompts is None:
        return [challenge.note] if challenge.note else []
    notes = [note] if (note := prompts.note()) else []
    if config.evaluation.prompts > (count := len(prompts.fresh) + prompts.known):
        notes.append(f"the champion's {count:,} gate prompts are used until data.rotation changes")
    evaluation = read_saved(store.fetch(challenge.evaluation, [EVALUATION]) / EVALUATION)
    taken = looks_taken(store, config.promotion.name, evaluation["prompts_sha256"])
    if taken >= settings.looks and not _is_trained(config):
        raise ConfigError(
            f"gates.champion.looks = {settings.looks}: as many comparisons were made on the gate "
            f"prompts of the champion {challenge.champion.short}, so that a new policy could not "
            f"be promoted; {NEW_PROMPTS}"
        )
    if taken:
        notes.append(
            f"{taken} of {settings.looks} looks at the champion's gate prompts are taken"
            + (
                f"; no other policy can be promoted on them: {NEW_PROMPTS}"
                if taken >= settings.looks
                else ""
            )
        )
    return notes


def _is_trained(config: PipelineConfig) -> bool:
    """Return whether this configuration's policy is trained already, so that nothing is lost."""
    try:
        find_inputs(GATE_POLICY, config, {})
    except ArtifactMissing:
        return False
    return True


def _check_rotation(config: PipelineConfig, store: Store) -> None:
    """Refuse a model to start from that was trained on what is held out now.

    Raises:
        ConfigError: Data of its lineage have another `data.rotation`.
    """
    if config.data.source == "world":  # whose held-out prompts depend on the seed alone
        return
    rotation = config.data.rotation
    for field, path in (
        ("base.path", config.base.path),
        ("reward_model.base", config.reward_model.base),
        ("judge.base", config.judge.base),
        ("ppo.reward_model_path", config.ppo.reward_model_path),
    ):
        if path is None or not path.startswith(ARTIFACT):
            continue
        for manifest in _ancestors(store, path.removeprefix(ARTIFACT)):
            data = manifest.producer.config.get("data")
            if manifest.kind != PREPARE_DATA.kind or not isinstance(data, dict):
                continue
            if data.get("rotation", 0) != rotation:
                raise ConfigError(
                    f"data.rotation = {rotation}: {field} = {path[:32]} was trained on data of "
                    f"rotation {data.get('rotation', 0)}, and with it on most prompts that are "
                    "held out now; start from a model that was not (retraining.warm_start = none, "
                    f"or another {field}), or keep the rotation"
                )


def _ancestors(store: Store, item: str) -> Iterator[Manifest]:
    """Yield the manifests of an artifact and of what it was made from, as far as they are there."""
    todo, seen = [store.resolve(item).digest], set[str]()
    while todo:
        digest = todo.pop()
        if digest in seen or not store.exists(digest):
            continue
        seen.add(digest)
        manifest = store.manifest(digest)
        yield manifest
        todo += manifest.parents.values()
