"""Makes the environment that a configuration asks for, and checks it before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rlhf.config import (
    ComponentSection,
    CorrectnessConfig,
    CustomConfig,
    LengthPenaltyConfig,
    PPOConfig,
)
from rlhf.data.rendering import Renderer
from rlhf.data.rows import PromptRow
from rlhf.environments import functions
from rlhf.environments.answers import Correctness
from rlhf.environments.contract import Environment, Reply, Values
from rlhf.environments.custom import CustomFunction
from rlhf.environments.kinds import MultiObjective, PreferenceComparison, TextGeneration
from rlhf.environments.model import ModelReward, PairModel
from rlhf.environments.remote import RemoteReward
from rlhf.environments.stop import Ending
from rlhf.errors import ConfigError
from rlhf.files import at_home
from rlhf.modeling.reward import Scorer
from rlhf.ranks import Ranks

#: Components that need nothing but their own section.
SIMPLE: Mapping[str, Callable[[Any], Values]] = {
    "length": functions.length,
    "keyword": functions.keyword,
    "regex": functions.pattern,
    "json_valid": functions.json_valid,
    "repetition": functions.repetition,
}


def build_environment(
    config: PPOConfig,
    scorer: Scorer | None,
    renderer: Renderer,
    rows: Sequence[PromptRow] = (),
    *,
    device: torch.device | None = None,
    context: int = 1024,
    ranks: Ranks | None = None,
) -> Environment:
    """The environment of a PPO run.

    Args:
        config: Says which, and with what options.
        scorer: The reward model; none where `config.needs_reward_model` is false.
        renderer: The policy's, which decodes replies.
        rows: The training prompts, whose reference answers are checked.
        device: Where a pair model runs; none is the CPU.
        context: Tokens that a pair model may read.
        ranks: The processes that train together: models score each its share of the replies, what
            has effects outside is called by one of them.

    Raises:
        ConfigError: Something that it needs is missing or does not work: the reward model, a
            reference answer, custom code that may not run or fails on a dry batch, a token.
    """
    builder = _Builder(
        config, scorer, renderer, rows, device or torch.device("cpu"), context, ranks or Ranks()
    )
    return builder.made()


class _Builder:
    def __init__(
        self, config: PPOConfig, scorer: Scorer | None, renderer: Renderer,
        rows: Sequence[PromptRow], device: torch.device, context: int, ranks: Ranks,
    ) -> None:  # fmt: skip
        self.config, self.scorer, self.rows = config, scorer, rows
        self.device, self.context, self.ranks = device, context, ranks
        self.ending = Ending(renderer, config.generation.stop_sequences)
        self.functions: list[CustomFunction] = []

    def made(self) -> Environment:
        config = self.config
        if config.comparison:
            judge, pairs = None, None
            if config.comparison.judge == "pair_model":
                model = self._pair_model(str(config.comparison.pair_model))
                pairs = self.ranks.shared(model.advantages)
            else:
                judge = self._function(config.comparison.judge, config.comparison.custom, "judge")
            return PreferenceComparison(config.comparison, judge, pairs, **self._shared())
        if config.multi_objective:
            parts = {name: (c, self._component(name, c)) for name, c in config.components.items()}
            return MultiObjective(parts, **self._shared())
        name = config.reward_fn or "default"
        options = getattr(config, name, None)
        values = self._function(name, options, f"reward_fn = {name!r}")
        shown = "reward_model" if name == "default" else name
        return TextGeneration(shown, values, **self._shared())

    def _shared(self) -> dict[str, Any]:
        return {
            "ending": self.ending,
            "needs_reward_model": self.config.needs_reward_model,
            "functions": self.functions,
        }

    def _component(self, name: str, section: ComponentSection) -> Values:
        kind = str(getattr(section, "type", ""))
        if kind == "remote":
            remote = RemoteReward(section, name)  # pyright: ignore[reportArgumentType]
            return self.ranks.led(remote)
        if kind in SIMPLE:
            return SIMPLE[kind](section)
        return self._function(kind, section, f"component {name!r}", f".components.{name}")

    def _function(self, kind: str, options: Any, needing: str, place: str = "") -> Values:
        if kind == "length_penalty":
            return functions.length_penalty(options or LengthPenaltyConfig())
        if kind == "correctness":
            correctness = Correctness(options or CorrectnessConfig())
            correctness.check(self.rows, needing)
            return correctness
        if kind == "custom":
            in_environment = self.config.env_type in ("multi_objective", "preference_comparison")
            start = f"ppo.env_config{place or '.custom'}" if in_environment else "ppo.custom"
            return self._custom(options, start)
        if self.scorer is None:
            raise ConfigError(f"ppo: {needing} needs a reward model, and there is none; give one")
        return self.ranks.shared(ModelReward(self.scorer).values)

    def _pair_model(self, folder: str) -> PairModel:
        try:
            return PairModel(at_home(folder), self.device, self.context, self.config.precision)
        except (OSError, ValueError) as error:  # as transformers calls whatever is no model
            raise ConfigError(
                f"ppo.env_config.pair_model = {folder!r}: can't be loaded "
                f"({' '.join(str(error).split())[:200]}); give a folder with a one-label "
                "sequence classifier and its tokenizer"
            ) from None

    def _custom(self, options: CustomConfig, field: str) -> Values:
        function = CustomFunction(options, field)
        function.dry_run(dry_batch(self.rows))
        self.functions.append(function)
        if not self.ranks.leads:
            function.close()
        return self.ranks.led(function)


def dry_batch(rows: Sequence[PromptRow]) -> list[Reply]:
    """Two replies as training would hand them over, to see if a function takes them."""
    first = [*rows[:2], PromptRow("A question?"), PromptRow("Another one?")][:2]
    texts = ("A reply.", "")
    return [
        Reply(row.prompt, text, len(text.split()), bool(text), row.reference, row.metadata, i, text)
        for i, (row, text) in enumerate(zip(first, texts, strict=True))
    ]
