"""Construction of the environment of a PPO run, with the checks before training."""

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
from rlhf.environments.contract import Environment, Reply, RewardFunction
from rlhf.environments.custom import CustomFunction
from rlhf.environments.env_types import MultiObjective, PreferenceComparison, TextGeneration
from rlhf.environments.functions import (
    Correctness,
    json_valid,
    keyword,
    length,
    length_penalty,
    regex_match,
    repetition,
)
from rlhf.environments.model import ModelReward, PairModel
from rlhf.environments.remote import RemoteReward
from rlhf.environments.stop import StopSequences
from rlhf.errors import ConfigError
from rlhf.files import expand_home
from rlhf.modeling.reward import Scorer
from rlhf.ranks import Ranks

#: Components by type that need only their section.
SIMPLE_COMPONENTS: Mapping[str, Callable[[Any], RewardFunction]] = {
    "length": length,
    "keyword": keyword,
    "regex": regex_match,
    "json_valid": json_valid,
    "repetition": repetition,
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
    """Build the environment of a PPO run.

    Args:
        config: Selects the environment and its options.
        scorer: The reward model; None if `config.needs_reward_model` is false.
        renderer: Decodes the policy's replies.
        rows: Training prompts, whose reference answers are checked.
        device: Device of a pair model; None is the CPU.
        context: Maximum number of tokens of a pair model's input.
        ranks: Processes of the training. Each runs models on its share of the replies; custom
            functions and services are called by the leading one.

    Raises:
        ConfigError: Something required is missing or fails: the reward model, a reference answer,
            custom code that is not allowed or fails on a dry batch, a token.
    """
    builder = _Builder(
        config, scorer, renderer, rows, device or torch.device("cpu"), context, ranks or Ranks()
    )
    return builder.build()


def dry_batch(rows: Sequence[PromptRow]) -> list[Reply]:
    """Return two replies like those of training, to test a custom function."""
    prompts = [*rows[:2], PromptRow("A question?"), PromptRow("Another one?")][:2]
    texts = ("A reply.", "")
    return [
        Reply(row.prompt, text, len(text.split()), bool(text), row.reference, row.metadata, i, text)
        for i, (row, text) in enumerate(zip(prompts, texts, strict=True))
    ]


class _Builder:
    """Builds an environment and its reward functions."""

    def __init__(
        self, config: PPOConfig, scorer: Scorer | None, renderer: Renderer,
        rows: Sequence[PromptRow], device: torch.device, context: int, ranks: Ranks,
    ) -> None:  # fmt: skip
        self.config, self.scorer, self.rows = config, scorer, rows
        self.device, self.context, self.ranks = device, context, ranks
        self.ending = StopSequences(renderer, config.generation.stop_sequences)
        self.functions: list[CustomFunction] = []

    def build(self) -> Environment:
        config = self.config
        if config.comparison:
            judge, pairs = None, None
            if config.comparison.judge == "pair_model":
                model = self._pair_model(str(config.comparison.pair_model))
                pairs = self.ranks.split_batches(model.advantages)
            else:
                judge = self._function(config.comparison.judge, config.comparison.custom, "judge")
            return PreferenceComparison(config.comparison, judge, pairs, **self._base_options())
        if config.multi_objective:
            components = {
                name: (section, self._component(name, section))
                for name, section in config.components.items()
            }
            return MultiObjective(components, **self._base_options())
        name = config.reward_fn or "default"
        options = getattr(config, name, None)
        function = self._function(name, options, f"reward_fn = {name!r}")
        label = "reward_model" if name == "default" else name
        return TextGeneration(label, function, **self._base_options())

    def _base_options(self) -> dict[str, Any]:
        """Return the arguments of `BaseEnvironment`."""
        return {
            "ending": self.ending,
            "needs_reward_model": self.config.needs_reward_model,
            "functions": self.functions,
        }

    def _component(self, name: str, section: ComponentSection) -> RewardFunction:
        type_name = str(getattr(section, "type", ""))
        if type_name == "remote":
            remote = RemoteReward(section, name)  # pyright: ignore[reportArgumentType]
            return self.ranks.on_leader(remote)
        if type_name in SIMPLE_COMPONENTS:
            return SIMPLE_COMPONENTS[type_name](section)
        return self._function(type_name, section, f"component {name!r}", f".components.{name}")

    def _function(
        self, type_name: str, options: Any, label: str, field: str = ""
    ) -> RewardFunction:
        """Build a reward function; `label` and `field` name it in errors."""
        if type_name == "length_penalty":
            return length_penalty(options or LengthPenaltyConfig())
        if type_name == "correctness":
            correctness = Correctness(options or CorrectnessConfig())
            correctness.check(self.rows, label)
            return correctness
        if type_name == "custom":
            in_environment = self.config.env_type in ("multi_objective", "preference_comparison")
            path = f"ppo.env_config{field or '.custom'}" if in_environment else "ppo.custom"
            return self._custom(options, path)
        if self.scorer is None:
            raise ConfigError(f"ppo: {label} needs a reward model, and there is none; give one")
        return self.ranks.split_batches(ModelReward(self.scorer).values)

    def _pair_model(self, folder: str) -> PairModel:
        try:
            config = self.config
            return PairModel(
                expand_home(folder), self.device, self.context, config.precision,
                config.scorer_dtype,
            )  # fmt: skip
        except (OSError, ValueError) as error:  # transformers raises these for what is no model
            raise ConfigError(
                f"ppo.env_config.pair_model = {folder!r}: can't be loaded "
                f"({' '.join(str(error).split())[:200]}); give a folder with a one-label "
                "sequence classifier and its tokenizer"
            ) from None

    def _custom(self, options: CustomConfig, field: str) -> RewardFunction:
        function = CustomFunction(options, field)
        function.dry_run(dry_batch(self.rows))
        self.functions.append(function)
        if not self.ranks.is_leader:
            function.close()
        return self.ranks.on_leader(function)
