"""Check, once the data are known and before any training, of what the gates will need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rlhf.challenge import NEW_PROMPTS
from rlhf.config import PipelineConfig
from rlhf.data.chat import loose_key
from rlhf.data.gate_prompts import MAX_KNOWN, GatePrompts, PromptSet, read_gate_prompts
from rlhf.data.lineage import forgotten_ids
from rlhf.data.rows import PAIRS_EVAL, PROMPTS_EVAL, PROMPTS_GATE, Pair, PromptRow, iterate_rows
from rlhf.errors import ArtifactMissing, ConfigError
from rlhf.gate_sizes import Sizes, check_gate_sizes, describe_power
from rlhf.store import ArtifactRef, Store
from rlhf.store.manifest import Manifest
from tasks.challenge import Challenge, find_challenge
from tasks.looks import looks_taken
from tasks.runner import find_inputs
from tasks.stages import EVALUATE_POLICY, GATE_POLICY, PREPARE_DATA

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
    # The champion's own configuration meets the champion before it, as it did when it was trained.
    challenge = find_challenge(config, store, _trained_policy(config, data))
    folder = store.fetch(data)
    frozen = _frozen_prompts(config, store, challenge, folder)
    held_out = [*islice(iterate_rows(folder / PROMPTS_EVAL, PromptRow), config.evaluation.prompts)]
    sizes = _sizes(config, folder, len(held_out), frozen)
    check_gate_sizes(config, sizes, has_champion=challenge is not None)
    notes = _remarks(config, challenge, frozen)
    if challenge is not None:
        rows, whose = (frozen.rows, "the champion's") if frozen else (held_out, "this run's")
        notes += _check_looks(config, store, PromptSet.of(rows), whose)
    return GateCheck(describe_power(config, sizes), tuple(notes))


def _trained_policy(config: PipelineConfig, data: ArtifactRef) -> str | None:
    """Return the digest of the policy that this configuration trained before; None if it did not.

    Whoever gives a stage other inputs trains another one; its gate compares that as it has to.
    """
    try:
        found = find_inputs(EVALUATE_POLICY, config, {"data": data}, optional=False)
        return found["policy"].digest
    except ArtifactMissing:
        return None


def _sizes(
    config: PipelineConfig, folder: Path, held_out: int, frozen: GatePrompts | None
) -> Sizes:
    pairs = [loose_key(pair.prompt) for pair in iterate_rows(folder / PAIRS_EVAL, Pair)]
    return Sizes(
        len(pairs),
        len(set(pairs)),
        held_out if frozen is None else len(frozen.fresh),
        config.evaluation.samples_per_prompt,
        are_frozen=frozen is not None,
    )


def _frozen_prompts(
    config: PipelineConfig, store: Store, challenge: Challenge | None, folder: Path
) -> GatePrompts | None:
    """Return the champion's gate prompts; None if they are not used.

    Raises:
        ConfigError: The dataset in the folder trains on too many of them.
    """
    if challenge is None or challenge.evaluation is None:
        return None
    path = store.fetch(challenge.evaluation, [PROMPTS_GATE]) / PROMPTS_GATE
    prompts = read_gate_prompts(path, folder, forgotten_ids(store))
    if not prompts.too_many_known:
        return prompts
    files = ", ".join(f"{count:,} in {name}" for name, count in prompts.files.items())
    raise ConfigError(
        f"data: {prompts.known:,} of the {len(prompts.rows):,} gate prompts of the champion "
        f"{challenge.champion.short} of {config.promotion.name} are among this run's training "
        f"data ({files}), and at most {MAX_KNOWN:.0%} may be: a comparison on them is worth "
        f"little; take the champion's seed (not {config.seed}), another data.rotation than "
        f"{config.data.rotation} to compare on held-out prompts of this run, or another "
        "promotion.name"
    )


def _remarks(
    config: PipelineConfig, challenge: Challenge | None, frozen: GatePrompts | None
) -> list[str]:
    """Return sentences on the gate prompts."""
    if challenge is None or frozen is None:
        return [challenge.note] if challenge and challenge.note else []
    notes = [note] if (note := frozen.note()) else []
    if config.evaluation.prompts > (count := len(frozen.rows)):
        notes.append(f"the champion's {count:,} gate prompts are used until data.rotation changes")
    return notes


def _check_looks(
    config: PipelineConfig, store: Store, prompts: PromptSet, whose: str
) -> list[str]:  # fmt: skip
    """Return a sentence on the looks at the gate prompts that are taken; none if none is.

    Args:
        config: Configuration with model line and planned looks.
        store: Has the looks.
        prompts: The gate prompts.
        whose: Whose they are, in words.

    Raises:
        ConfigError: No look is left for a policy that is not evaluated yet.
    """
    settings = config.gates.champion
    if settings is None:
        return []
    taken = looks_taken(store, config.promotion.name, prompts, level=settings.look_level)
    said = f"{taken.count} of {settings.looks} looks at {whose} gate prompts are taken"
    risk = f"{taken.spent:.2%} of the chance of error of {1 - settings.confidence:.2%}"
    if abs(taken.spent - taken.count * settings.look_level) > 1e-9:  # of other settings
        said = f"{taken.count} looks at {whose} gate prompts have spent {risk}"
    if settings.allows_look(taken.spent):
        return [said] if taken.count else []
    if not _is_evaluated(config):
        raise ConfigError(
            f"gates.champion.looks = {settings.looks}: {taken.count} comparisons on {whose} gate "
            f"prompts have spent {risk}, so that a new policy could not be promoted; {NEW_PROMPTS}"
        )
    return [f"{said}; no other policy can be promoted on them: {NEW_PROMPTS}"]


def _is_evaluated(config: PipelineConfig) -> bool:
    """Return whether this configuration's policy met the champion already: nothing is lost then."""
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
