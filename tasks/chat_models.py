"""Policies and scoring models of a chat, by the names that a user gives, and how they reply."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from rlhf.champions import champion, line_of, model_lines
from rlhf.config.pipeline import PromotionConfig
from rlhf.errors import ArtifactMissing, ConfigError
from rlhf.files import is_file
from rlhf.plain_text import one_line
from rlhf.saved import read_saved
from rlhf.store import ArtifactRef, Store
from rlhf.store.manifest import is_digest_prefix
from tasks.challenge import ppo_settings
from tasks.evaluations import find_report
from tasks.model_options import Positive
from tasks.models import (
    CHAMPION,
    POLICY,
    REWARD_MODEL,
    NamedModel,
    fetch_model,
    find_model,
    is_folder,
    judge_of,
    limits_of,
    reply_settings,
    require_kind,
    reward_model_of,
)
from tasks.stages import TRAIN_POLICY

if TYPE_CHECKING:
    from rlhf.chat import Candidate, Conversation, ReplySettings, Score, Speaker
    from rlhf.config import PPOConfig
    from rlhf.data.rows import Message
    from rlhf.modeling.reward import Scorer

#: Words for policies: the champion of a model line, and the SFT policy that another started from.
CHAMPION_WORD, SFT_WORD = "champion", "sft"
#: Value of --judge that means the usable judge of the policy's lineage.
LINEAGE = "lineage"
#: Policies that are proposed where there is no champion.
PROPOSED = 3
#: Most tokens of a reply of a policy in a folder, whose training is not known.
FOLDER_TOKENS = 512


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Options of the commands that let a policy reply to a person."""

    versus: str | None = None
    """A second policy that replies too: sft (that the first one started from), or any name."""
    judge: str | None = None
    """Scores replies too: a judge or reward model, or `lineage` for the judge of the policy's."""
    scores: bool = True
    """Show the score of the reward model that the policy was trained with."""
    temperature: Annotated[float | None, Parameter(validator=validators.Number(gte=0))] = None
    """Of sampling, 0 is greedy; default: that of the policy's training."""
    max_new_tokens: Positive = None
    """Most tokens of a reply; default: those of the policy's training, or 512."""
    seed: int = 0
    """Seed of the replies."""
    system: str | None = None
    """System turn of every conversation."""
    preferences: Path | None = None
    """JSON lines to which preferences are appended; default: .rlhf/preferences.jsonl."""


#: None of them given.
DEFAULT_CHAT = ChatOptions()


@dataclass(frozen=True)
class ChatPolicy:
    """A policy of a chat, with its settings."""

    model: NamedModel
    speaker: Speaker
    settings: ReplySettings

    @property
    def label(self) -> str:
        """The user's name for it and its digest; of a folder its name."""
        name, short = self.model.text, self.model.label
        if self.model.ref is None:
            return self.identity
        return name if short == name else f"{name} ({short})"

    @property
    def identity(self) -> str:
        """Digest of its artifact, or the name of its folder: no path of this machine."""
        return self.model.ref.digest if self.model.ref else self.model.folder.resolve().name


@dataclass(frozen=True)
class ChatModels:
    """Loaded models of a chat: one or two policies, and those that score replies."""

    policies: tuple[ChatPolicy, ...]
    scorers: tuple[tuple[str, NamedModel, Scorer], ...]
    notes: tuple[str, ...]
    """What a user should know of them, such as that there is no reward model."""

    def scores(self, messages: Sequence[Message], text: str) -> tuple[Score, ...]:
        """Return the scores of a reply."""
        from rlhf.chat import score_reply

        return tuple(score_reply(name, scorer, messages, text) for name, _, scorer in self.scorers)

    def answer(
        self, policy: ChatPolicy, conversation: Conversation, seed: int,
        on_text: Callable[[str], object] | None = None,
    ) -> Candidate:  # fmt: skip
        """Let a policy reply to a conversation; return its reply with its scores.

        Raises:
            PromptUnusable: It can't be given the conversation.
        """
        from rlhf.chat import Candidate

        messages = conversation.messages
        reply = policy.speaker.reply(messages, policy.settings, seed, on_text)
        scores = self.scores(messages, reply.text)
        return Candidate(policy.label, policy.identity, reply, scores)


def load_chat(
    name: str | None, options: ChatOptions, promotion: PromotionConfig,
    device: Callable[[], Any], store: Store, load_scorer: Callable[[NamedModel, Any], Scorer],
) -> ChatModels:  # fmt: skip
    """Find and load the models of a chat.

    Args:
        name: Of the policy; None is the champion.
        options: As the user gave them.
        promotion: Has the model line whose champion is meant.
        device: Prepares the device; called once all names are found.
        store: Where they are.
        load_scorer: Loads a reward model or judge.

    Raises:
        ArtifactMissing: A name names nothing.
        ConfigError: It is no such model, or can't be loaded.
    """
    first = find_policy(name or CHAMPION_WORD, promotion, store)
    found = [first]
    if options.versus is not None:
        found.append(find_policy(options.versus, promotion, store, of=first))
        if found[0].folder.resolve() == found[1].folder.resolve():
            raise ConfigError(f"--versus {options.versus}: is the policy itself; name another")
    scorers, notes = _scorers(first, options, store)
    from rlhf.chat import Speaker

    place = device()
    # Both reply as the first was trained to: else they would differ in more than their weights.
    settings = _with_options(settings_of(first, store), options)
    policies = tuple(
        ChatPolicy(each, Speaker(each.folder, place, limits_of(each, store)), settings)
        for each in found
    )
    loaded = tuple((word, model, load_scorer(model, place)) for word, model in scorers)
    return ChatModels(policies, loaded, tuple(notes))


def find_policy(
    text: str, promotion: PromotionConfig, store: Store, of: NamedModel | None = None,
    purpose: str = "a chat"
) -> NamedModel:  # fmt: skip
    """Find a policy by any name of a model, `champion`, `sft`, or its run, and fetch it.

    A pin or a model's folder of such a name comes first. Of a run, by its name or how that begins,
    it is the policy that PPO has trained, promoted or not.

    Args:
        text: The name.
        promotion: Has the model line whose champion is meant.
        store: Where it is.
        of: Policy from which `sft` is looked up; None takes the champion.
        purpose: What it is for, in an error.

    Raises:
        ArtifactMissing: It names nothing.
        ConfigError: It is no policy.
    """
    is_word = text in (CHAMPION_WORD, SFT_WORD) and not is_folder(text, Path(text))
    if not is_word or store.pins.find(text) is not None:
        return require_kind(_named(text, store), POLICY, purpose)
    if text == CHAMPION_WORD:
        name = line_of(promotion, model_lines(store))
        if champion(store, name) is None:
            raise ArtifactMissing(_no_champion(name, store))
        found = find_model(f"{CHAMPION}{name}", store)
        return replace(found, text=text)
    start = of or find_policy(CHAMPION_WORD, promotion, store)
    digest = store.manifest(start.ref).parents.get(SFT_WORD) if start.ref else None
    if digest is None:
        why = "has no SFT policy in its lineage" if start.ref else "is a folder, without lineage"
        raise ConfigError(f"sft: {start.text} {why}; name a policy, or a folder")
    return fetch_model(SFT_WORD, store.resolve(digest), store)


def _named(text: str, store: Store) -> NamedModel:
    """Find a model by its own name, or else by that of the run that has trained it."""
    try:
        return find_model(text, store)
    except ArtifactMissing:
        if is_digest_prefix(text) or re.search(r"[:/]", text):
            raise
        try:
            run = find_report(text, store)
        except ArtifactMissing:
            run = None
        if run is None:
            raise
    digest = run.parents.get(TRAIN_POLICY.name)
    if digest is None:
        raise ArtifactMissing(
            one_line(
                f"{text}: the run {run.report.run_name} has trained no policy: it ended as "
                f"{run.report.outcome} ({run.report.reason}); name another run or a policy"
            )
        )
    return fetch_model(text, store.resolve(digest), store)


def settings_of(
    policy: NamedModel, store: Store, configured: PPOConfig | None = None
) -> ReplySettings:
    """Return how a policy replied in training and evaluation, as far as that is known.

    Of a policy by PPO those are PPO's settings. An SFT policy is evaluated with those of the PPO
    that starts from it: as configured, or else of the newest policy that did. Of another artifact
    they are the lengths alone, and of a folder its generation configuration.

    Args:
        policy: The policy.
        store: Where it is.
        configured: PPO's settings in the run that an SFT policy is of.
    """
    from rlhf.chat import ReplySettings

    if policy.ref is None:
        return _folder_settings(policy.folder)
    ppo = ppo_settings(policy.ref, store) or configured or _ppo_from(policy.ref, store)
    if ppo is not None:
        return ReplySettings(
            ppo.max_new_tokens, ppo.temperature, ppo.top_k, ppo.top_p,
            ppo.generation.stop_sequences,
        )  # fmt: skip
    new_tokens, stops = reply_settings(policy, store)
    return ReplySettings(new_tokens or FOLDER_TOKENS, stop_sequences=stops)


def _ppo_from(sft: ArtifactRef, store: Store) -> PPOConfig | None:
    """Return PPO's settings of the newest policy that started from an SFT policy."""
    for ref, manifest, _ in sorted(store.list(), key=lambda each: each.age):
        if ref.kind == POLICY and manifest.parents.get(SFT_WORD) == sft.digest:
            ppo = ppo_settings(ref, store)
            if ppo is not None:
                return ppo
    return None


def _folder_settings(folder: Path) -> ReplySettings:
    from rlhf.chat import ReplySettings
    from rlhf.modeling.generation_config import FILE

    values = read_saved(folder / FILE) if is_file(folder / FILE) else {}
    settings = ReplySettings(FOLDER_TOKENS)
    if values.get("do_sample") is not True:
        return settings

    def number(name: str, default: float) -> float:
        value = values.get(name)
        if not isinstance(value, int | float) or value is True:
            return default
        return value if 0 < value < math.inf else default

    return replace(
        settings, temperature=number("temperature", 1.0), top_k=int(number("top_k", 0)),
        top_p=min(1.0, number("top_p", 1.0)),
    )  # fmt: skip


def _with_options(settings: ReplySettings, options: ChatOptions) -> ReplySettings:
    given = {name: getattr(options, name) for name in ("temperature", "max_new_tokens")}
    return replace(settings, **{name: v for name, v in given.items() if v is not None})


def _scorers(
    policy: NamedModel, options: ChatOptions, store: Store
) -> tuple[list[tuple[str, NamedModel]], list[str]]:
    """Return the scoring models by the name of their score, and notes on missing ones."""
    found: list[tuple[str, NamedModel]] = []
    notes: list[str] = []
    if options.scores:
        reward = reward_model_of(policy, store)
        if reward is not None:
            found.append(("reward", reward))
        elif options.judge is None:
            why = "a folder has no lineage" if policy.ref is None else "none is in its lineage"
            notes.append(f"no reward model is known of {policy.text} ({why}); --judge names one")
    if options.judge == LINEAGE:
        judge, why = judge_of(policy, store)
        if judge is None:
            raise ConfigError(f"--judge {LINEAGE}: {policy.text}: {why}; name a judge")
        found.append(("judge", judge))
    elif options.judge is not None:
        judge = require_kind(find_model(options.judge, store), REWARD_MODEL, "--judge")
        if judge.judge is not None and not judge.judge.usable:
            notes.append(f"judge {judge.label} is not usable ({judge.judge.reason})")
        found.append(("judge", judge))
    return found, notes


def _no_champion(line: str, store: Store) -> str:
    lines = ", ".join(model_lines(store)) or "none"
    newest: list[ArtifactRef] = [
        ref for ref, _, _ in sorted(store.list(), key=lambda each: each.age) if ref.kind == POLICY
    ]
    cure = (
        "name a policy: " + ", ".join(ref.short for ref in newest[:PROPOSED])
        if newest
        else "it holds no policy either: train one by rlhf run, name the store by --store, or a "
        "model's folder"
    )
    return f"{store.uri} has no champion of the line {line} (lines that have: {lines}); {cure}"
