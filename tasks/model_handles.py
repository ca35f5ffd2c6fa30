"""Models of the Python API: policies that reply, and reward models that score, by any name.

`rlhf.Policy` and `rlhf.RewardModel` are these classes (docs/python.md). A name is looked up when
the object is made; weights are loaded by the first reply or score.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, overload

from pydantic import Field, ValidationError

from rlhf.config import PipelineConfig, apply_machine_settings, load_source
from rlhf.config.messages import explain
from rlhf.config.numbers import Temperature, Tokens
from rlhf.config.section import Section
from rlhf.config.text import as_written
from rlhf.errors import ConfigError

if TYPE_CHECKING:
    from rlhf.chat import Reply, ReplySettings, Speaker
    from rlhf.data.rendering import Renderer
    from rlhf.data.rows import Message, Prompt
    from rlhf.modeling.reward import Scorer
    from rlhf.store import Manifest, Store
    from tasks.models import NamedModel

#: What to give as a prompt, for errors.
_FORMS = "a text, a list of messages with role and content, or a list of such prompts"


class SamplingOptions(Section):
    """Sampling of replies, as far as it differs from that of the policy's training."""

    max_new_tokens: Tokens | None = Field(default=None, ge=1)
    """Most tokens of a reply."""
    temperature: Temperature | None = Field(default=None, ge=0)
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: Tokens | None = Field(default=None, ge=0)
    """Number of likeliest tokens to sample from; 0 takes all."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Share of probability of the likeliest tokens to sample from."""
    stop_sequences: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    """Texts at which a reply ends; they are cut off."""


class _Model:
    """A model of a store, or in a folder."""

    def __init__(
        self, name: str | Path, store: str | None, config: Any,
        find: Callable[[str, PipelineConfig, Store], NamedModel],
    ) -> None:  # fmt: skip
        from tasks.stage import store_of

        loaded = load_source(config, {} if store is None else {"store": store}).config
        self._runtime = apply_machine_settings(loaded).runtime
        self._store = store_of(loaded)
        self._ppo = None if config is None else loaded.ppo
        self._model = find(str(name), loaded, self._store)

    @property
    def digest(self) -> str | None:
        """Digest of the artifact; None for a folder that is none."""
        return self._model.ref.digest if self._model.ref else None

    @property
    def folder(self) -> Path:
        """Folder with its files, which transformers can load; not to be changed."""
        return self._model.folder

    @property
    def manifest(self) -> Manifest | None:
        """Manifest in the store: files, parents, producer, metrics; None for a folder."""
        return self._store.manifest(self._model.ref) if self._model.ref else None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.digest or str(self.folder)!r})"

    def _device(self) -> Any:
        from transformers.utils import logging

        from rlhf.modeling.device import prepare_device

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return prepare_device(self._runtime)


class Policy(_Model):
    """A policy that replies to prompts.

    Args:
        name: champion (of the configuration's model line), champion:<line>, sft (that the champion
            started from), a digest or its first 6 or more digits, a pin's name, a URI, or a folder.
        store: Address of the store; that of the configuration by default.
        config: A configuration as `Pipeline` takes it; it names store, device and model line.

    Raises:
        ArtifactMissing: The name names nothing.
        ConfigError: It is no policy.
    """

    def __init__(
        self, name: str | Path = "champion", *, store: str | None = None, config: Any = None
    ) -> None:
        from tasks.chat_models import find_policy

        super().__init__(
            name, store, config, lambda text, c, opened: find_policy(text, c.promotion, opened)
        )

    @overload
    def generate(self, prompts: str | list[Message], *, seed: int = 0, **sampling: Any) -> str: ...

    @overload
    def generate(
        self, prompts: list[str] | list[list[Message]], *, seed: int = 0, **sampling: Any
    ) -> list[str]: ...

    def generate(self, prompts: Any, *, seed: int = 0, **sampling: Any) -> str | list[str]:
        """Return the reply to a prompt, or the replies to a list of prompts.

        The same seed, prompts and settings give the same replies. Settings that are not given are
        those of the policy's training.

        Args:
            prompts: A text, a conversation as messages with `role` and `content`, or a list of
                such prompts.
            seed: Of the sampling.
            sampling: Fields of `SamplingOptions`, such as `temperature=0`.

        Raises:
            ConfigError: A prompt or setting is none.
            PromptUnusable: The policy can't be given a prompt.
        """
        from rlhf.chat import reply_seed

        settings = self._settings_with(sampling)
        if _is_one(prompts):
            return self.speaker.reply(_messages(prompts), settings, seed).text
        conversations = [_messages(prompt) for prompt in _listed(prompts)]
        return [
            self.speaker.reply(messages, settings, reply_seed(seed, i)).text
            for i, messages in enumerate(conversations)
        ]

    def reply(
        self, prompt: Prompt, *, seed: int = 0, on_text: Callable[[str], object] | None = None,
        **sampling: Any,
    ) -> Reply:  # fmt: skip
        """Return one reply with its number of tokens, how it ended, and notes on it.

        Args:
            prompt: A text, or a conversation as messages.
            seed: Of the sampling.
            on_text: Called with each part of the text as soon as it is certain.
            sampling: Fields of `SamplingOptions`.

        Raises:
            ConfigError: The prompt or a setting is none.
            PromptUnusable: The policy can't be given the prompt.
        """
        settings = self._settings_with(sampling)
        return self.speaker.reply(_messages(prompt), settings, seed, on_text)

    @cached_property
    def settings(self) -> ReplySettings:
        """How it replies by default: as it was trained to, as far as that is known."""
        from tasks.chat_models import settings_of

        return settings_of(self._model, self._store, self._ppo)

    @cached_property
    def speaker(self) -> Speaker:
        """The loaded policy; the first access loads it."""
        from rlhf.chat import Speaker
        from tasks.models import limits_of

        return Speaker(self.folder, self._device(), limits_of(self._model, self._store))

    @property
    def model(self) -> Any:
        """The causal language model, frozen and on its device."""
        return self.speaker.model

    @property
    def renderer(self) -> Renderer:
        """Renders prompts to tokens, and tokens to text; `renderer.tokenizer` is the tokenizer."""
        return self.speaker.renderer

    def _settings_with(self, sampling: Mapping[str, Any]) -> ReplySettings:
        for name in sampling:
            if name not in SamplingOptions.model_fields:
                known = [*SamplingOptions.model_fields, "seed"]
                close = difflib.get_close_matches(name, known, n=1)
                cure = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
                raise ConfigError(f"{name} is no setting of sampling; {cure}")
        try:
            given = SamplingOptions.model_validate(sampling)
        except ValidationError as error:
            raise ConfigError(explain(error, {})) from None
        values = {name: getattr(given, name) for name in sampling}
        return replace(self.settings, **{k: v for k, v in values.items() if v is not None})


class RewardModel(_Model):
    """A reward model or judge that scores replies.

    Args:
        name: A digest or its first 6 or more digits, a pin's name, a URI, or a folder.
        store: Address of the store; that of the configuration by default.
        config: A configuration as `Pipeline` takes it; it names store and device.

    Raises:
        ArtifactMissing: The name names nothing.
        ConfigError: It is no reward model.
    """

    def __init__(self, name: str | Path, *, store: str | None = None, config: Any = None) -> None:
        from tasks.models import REWARD_MODEL, find_model, require_kind

        super().__init__(
            name, store, config,
            lambda text, _, opened: require_kind(find_model(text, opened), REWARD_MODEL, "a score"),
        )  # fmt: skip

    @overload
    def score(self, prompts: Prompt, replies: str) -> float: ...

    @overload
    def score(
        self, prompts: list[str] | list[list[Message]], replies: list[str]
    ) -> list[float]: ...

    def score(self, prompts: Any, replies: Any) -> float | list[float]:
        """Return the score of a reply to a prompt, or of each reply to its own prompt.

        Args:
            prompts: A text, or a conversation as messages; for several replies a list of these.
            replies: The reply, or a list with one for each prompt.

        Raises:
            ConfigError: A prompt is none, or there is not one reply for each.
            PromptUnusable: The model can't be given a prompt.
        """
        from rlhf.modeling.members import member_scores

        one = isinstance(replies, str)
        conversations = [_messages(each) for each in ([prompts] if one else _listed(prompts))]
        texts = [replies] if one else [*replies]
        if len(texts) != len(conversations) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(
                f"replies: {len(texts)} for {len(conversations)} prompts; give a text for each"
            )
        if not texts:
            return []
        scores = member_scores(self.scorer, [*conversations], texts)[:, 0].tolist()
        return scores[0] if one else scores

    @cached_property
    def scorer(self) -> Scorer:
        """The loaded model; the first access loads it."""
        from tasks.models import load_scorer

        return load_scorer(self._model, self._device(), None, self._store)


def _is_one(prompts: Any) -> bool:
    """Return whether it is one prompt, and not a list of prompts."""
    if isinstance(prompts, str):
        return True
    return isinstance(prompts, list) and any(isinstance(part, Mapping) for part in prompts)


def _listed(prompts: Any) -> list[Any]:
    """Return a list of prompts.

    Raises:
        ConfigError: It is none.
    """
    if not isinstance(prompts, list | tuple) or _is_one(prompts):
        raise ConfigError(f"prompts = {as_written(prompts)}: give {_FORMS}")
    return [*prompts]


def _messages(prompt: Any) -> list[Message]:
    """Return a prompt as messages.

    Raises:
        ConfigError: It is none.
    """
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    turns = cast("list[Any]", prompt) if isinstance(prompt, list) else []
    if not turns or not all(_is_message(each) for each in turns):
        shown = as_written(prompt) if isinstance(prompt, str) else type(prompt).__name__
        raise ConfigError(f"a prompt is {shown}; give {_FORMS}")
    return [{"role": each["role"], "content": each["content"]} for each in turns]


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    message = cast("Mapping[str, Any]", value)
    return all(isinstance(message.get(name), str) for name in ("role", "content"))
