"""Check, once the data are known and before any training, of what the gates will need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf.config import PipelineConfig
from rlhf.data.chat import loose_key
from rlhf.data.gate_prompts import MAX_KNOWN, GatePrompts, read_gate_prompts
from rlhf.data.rows import PAIRS_EVAL, PROMPTS_EVAL, PROMPTS_GATE, Pair, PromptRow, iterate_rows
from rlhf.errors import ConfigError
from rlhf.gate_sizes import Sizes, check_gate_sizes, describe_power
from rlhf.saved import read_saved
from rlhf.store import ArtifactRef, Store
from tasks.challenge import Challenge, find_challenge, looks_taken
from tasks.stages import EVALUATION

#: Name of the check among a run's stages.
CHECK = "check-gates"


@dataclass(frozen=True)
class GateCheck:
    """What is known of the gates before training."""

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
        ConfigError: A gate can't be passed with so few held-out rows, or too many of the champion's
            gate prompts are training data.
        ArtifactMissing: The champion is not in the store.
    """
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
    """Return sentences on the gate prompts, and on the looks at them."""
    settings = config.gates.champion
    if settings is None or challenge is None or challenge.evaluation is None or prompts is None:
        return []
    notes = [note] if (note := prompts.note()) else []
    evaluation = read_saved(store.fetch(challenge.evaluation, [EVALUATION]) / EVALUATION)
    taken = looks_taken(store, config.promotion.name, evaluation["prompts_sha256"])
    if taken:
        notes.append(
            f"{taken} of {settings.looks} looks at the champion's gate prompts are taken"
            + (
                "; a new policy can't be promoted on them: raise data.rotation"
                if taken >= settings.looks
                else ""
            )
        )
    return notes
