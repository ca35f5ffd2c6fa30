"""Conversations with policies: streamed replies, their scores, and preferences between them.

A reply is sampled as evaluations sample it (`rlhf.modeling.generate`), one conversation at a time.
Nothing here prints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from rlhf.config.lengths import TokenLimits
from rlhf.data.fitting import Fitting
from rlhf.data.rendering import TOO_LONG
from rlhf.data.rows import Message
from rlhf.environments.stop import StopSequences
from rlhf.errors import ConfigError, PromptUnusable
from rlhf.evaluation.replies import Policy, SamplingPlan
from rlhf.modeling.base import context_length
from rlhf.modeling.generate import generate
from rlhf.modeling.members import member_scores
from rlhf.modeling.reward import Scorer
from rlhf.modeling.sampling import Sampling, derive_seed

#: Ends of replies: an end token or stop sequence, the most tokens, the model's context, the caller.
Ending = Literal["stop", "length", "context", "cancelled"]
#: What decoding writes for bytes that are no character, or not yet.
_UNDECODED = "\ufffd"
#: More tokens than any prompt: nothing is left out of a conversation.
_ALL = 2**62


@dataclass(frozen=True)
class ReplySettings:
    """Sampling settings of a policy's replies; temperature 0 is greedy."""

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_sequences: tuple[str, ...] = ()

    @property
    def sampling(self) -> Sampling:
        """Sampling parameters."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True)
class Reply:
    """A policy's reply to a conversation."""

    text: str
    tokens: int
    prompt_tokens: int
    ending: Ending
    notes: tuple[str, ...] = ()
    """What its reader should know, such as that it was cut off."""


class Speaker:
    """A policy that replies in conversations.

    Args:
        folder: A causal language model with its tokenizer.
        device: Device of the model.
        limits: Most tokens of its training, if they are known.

    Raises:
        ConfigError: The model or its tokenizer can't be loaded.
    """

    def __init__(
        self, folder: Path, device: torch.device, limits: TokenLimits | None = None
    ) -> None:
        policy = Policy(folder, device, SamplingPlan(max_new_tokens=1), limits)
        self.model, self.renderer = policy.model, policy.renderer
        self.context = context_length(policy.model)
        self._trained = limits
        # Its check of system turns is that of the training; nothing is too long for it.
        whole = (limits or TokenLimits(max_length=2)).model_copy(
            update={"max_length": _ALL, "max_prompt": None, "max_new_tokens": 1}
        )
        self._fitting = Fitting(policy.renderer, whole)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a whole conversation; no turn is left out.

        Raises:
            PromptUnusable: The template refuses it, or no token of a reply fits behind it.
        """
        self._fitting.check([*messages])
        ids, _ = self.renderer.fit_prompt([*messages], _ALL)
        if len(ids) >= self.context:
            raise PromptUnusable(
                TOO_LONG,
                f"the context is full: the conversation has {len(ids):,} tokens, and the model "
                f"reads {self.context:,} with its reply",
                "begin a new conversation, or leave out earlier turns",
            )
        return ids

    def reply(
        self, messages: Sequence[Message], settings: ReplySettings, seed: int,
        on_text: Callable[[str], object] | None = None, cancelled: Callable[[], bool] | None = None,
    ) -> Reply:  # fmt: skip
        """Sample a reply to a conversation.

        Args:
            messages: Turns; the last is a user's.
            settings: How it replies.
            seed: Of the sampling.
            on_text: Called with each part of the text as soon as no later token can change it.
            cancelled: Asked after each token whether to end here.

        Raises:
            PromptUnusable: The model can't be given the conversation.
            ConfigError: A stop sequence would never be found.
        """
        ids = self.prompt_ids(messages)
        room = self.context - len(ids)
        ending = StopSequences(self.renderer, settings.stop_sequences)
        stream = TextStream(ending)
        was_cancelled = False

        def watch(rows: list[list[int]]) -> list[bool]:
            nonlocal was_cancelled
            if on_text is not None and (text := stream.add(rows[0])):
                on_text(text)
            stops = bool(ending.sequences) and ending(rows)[0]
            was_cancelled = not stops and cancelled is not None and cancelled()
            return [stops or was_cancelled]

        drawn = generate(
            self.model, [ids], self.renderer.tokenizer,
            replace(settings, max_new_tokens=min(settings.max_new_tokens, room)).sampling, seed,
            watch, ends=self.renderer.end_ids, read_every=1 if on_text else None,
        )  # fmt: skip
        (tokens,) = drawn.rows()
        if on_text is not None and (text := stream.finish(tokens)):
            on_text(text)
        how: Ending = "length" if room >= settings.max_new_tokens else "context"
        if bool(drawn.finished[0]):
            # A last token that ends the reply by itself is no cancellation.
            whole = tokens[-1] in self.renderer.end_ids
            how = "cancelled" if was_cancelled and not whole else "stop"
        return Reply(
            ending.text(tokens), len(tokens), len(ids), how,
            self._notes(len(ids), len(tokens), how),
        )  # fmt: skip

    def _notes(self, prompt: int, tokens: int, ending: Ending) -> tuple[str, ...]:
        notes: list[str] = []
        trained = self._trained.prompt if self._trained else _ALL
        if prompt > trained:
            notes.append(
                f"the conversation has {prompt:,} tokens, and prompts of the policy's training "
                f"had at most {trained:,}: replies may be worse than those that were evaluated"
            )
        if ending == "length":
            notes.append(f"cut off after {tokens:,} tokens, the most that a reply may have")
        elif ending == "context":
            notes.append(
                f"cut off after {tokens:,} tokens: the context is full ({self.context:,} tokens)"
            )
        elif ending == "cancelled":
            notes.append("cancelled")
        return tuple(notes)


class TextStream:
    """The text of a reply while it is drawn, in parts that add up to it.

    Held back are bytes that are no whole character yet, blanks that may end the reply, and what may
    become a stop sequence.
    """

    def __init__(self, ending: StopSequences) -> None:
        self._ending = ending
        self._given = ""

    def add(self, ids: Sequence[int]) -> str:
        """Return the part that became certain; `ids` are all tokens of the reply so far."""
        text = self._ending.text(ids).rstrip(_UNDECODED)
        held = max((_begun(text, stop) for stop in self._ending.sequences), default=0)
        return self._give(text[: len(text) - held].rstrip())

    def finish(self, ids: Sequence[int]) -> str:
        """Return the rest of a whole reply."""
        return self._give(self._ending.text(ids))

    def _give(self, text: str) -> str:
        # Decoders of single bytes may take back a character until the bytes behind it are whole.
        if not text.startswith(self._given):
            return ""
        part, self._given = text[len(self._given) :], text
        return part


def _begun(text: str, stop: str) -> int:
    """Return how many of the last characters may be the beginning of a stop sequence."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1)
                 if text.endswith(stop[:n])), 0)  # fmt: skip


@dataclass(frozen=True)
class Score:
    """A scoring model's score of a reply."""

    name: str
    """`reward` or `judge`."""
    value: float | None
    note: str = ""
    """Why there is none, or what the model did not read."""


def score_reply(name: str, scorer: Scorer, messages: Sequence[Message], text: str) -> Score:
    """Score a reply; what the scoring model can't read whole is said.

    Args:
        name: Of the score.
        scorer: A reward model or judge.
        messages: The conversation.
        text: The reply.
    """
    try:
        encoded = scorer.renderer.encode([*messages], text, scorer.limits)
    except PromptUnusable as error:
        return Score(name, None, f"{error.reason}: {error.detail}")
    notes: list[str] = []
    if encoded.turns_dropped:
        notes.append(f"without the first {encoded.turns_dropped} turns, which do not fit")
    if encoded.is_cut:
        notes.append(f"of the first {len(encoded.response):,} tokens, which fit")
    value = float(member_scores(scorer, [[*messages]], [text])[0, 0])
    return Score(name, value, ", ".join(notes))


@dataclass(frozen=True)
class Candidate:
    """A reply to a conversation's last user turn, one of those to choose from."""

    speaker: str
    """Name of the policy for people."""
    policy: str
    """Its digest, or the name of its folder."""
    reply: Reply
    scores: tuple[Score, ...] = ()


@dataclass
class Conversation:
    """Turns of a conversation, and the replies to its last user turn.

    It goes on with the reply that was preferred, else with the first of the newest ones.
    """

    seed: int = 0
    system: str = ""
    candidates: list[Candidate] = field(default_factory=list[Candidate])
    preferred: int | None = None
    """Index of the candidate that was preferred."""
    _turns: list[Message] = field(default_factory=list[Message])
    _attempt: int = 0
    _newest: int = 0

    @property
    def messages(self) -> list[Message]:
        """The turns up to the last user's, after the system turn if there is one."""
        system = [{"role": "system", "content": self.system}] if self.system.strip() else []
        return [*system, *self._turns]

    @property
    def current(self) -> Candidate | None:
        """The reply that the conversation goes on with."""
        if not self.candidates:
            return None
        return self.candidates[self._newest if self.preferred is None else self.preferred]

    def say(self, text: str) -> None:
        """Append a user's turn; replace the last one if there was no reply to it.

        Raises:
            ConfigError: It is empty, or no text.
        """
        if not text.strip():
            raise ConfigError("a message is empty; write something")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError("the message holds bytes that are not UTF-8; write text") from None
        if (reply := self.current) is not None:
            self._turns.append({"role": "assistant", "content": reply.reply.text})
        elif self._turns:
            self._turns.pop()  # a user's turn to which there was no reply
        self._turns.append({"role": "user", "content": text})
        self.candidates, self.preferred, self._attempt, self._newest = [], None, 0, 0

    def begin_attempt(self) -> int:
        """Return the seed of the next replies to the last user turn.

        Raises:
            ConfigError: There is no user turn.
        """
        if not self._turns:
            raise ConfigError("there is nothing to reply to yet; write a message first")
        self._newest = len(self.candidates)
        self._attempt += 1
        return derive_seed(self.seed, f"turn {len(self._turns)}, attempt {self._attempt}")

    def reset(self) -> None:
        """Forget all turns; the system turn stays."""
        self._turns, self.candidates, self.preferred = [], [], None
        self._attempt = self._newest = 0

    def prefer(self, number: int) -> list[dict[str, Any]]:
        """Return the rows that say that a candidate is better than the others.

        `accept` then makes it the current reply: only once the rows are written.

        Args:
            number: Of the candidate, from 1.

        Raises:
            ConfigError: There is no such candidate, no other to compare it with, or one of this
                turn is preferred already.
        """
        if not self.candidates:
            raise ConfigError("there is no reply to prefer yet; write a message first")
        if not 1 <= number <= len(self.candidates):
            raise ConfigError(
                f"{number}: there is no such reply; those to choose from are 1 to "
                f"{len(self.candidates)}"
            )
        if self.preferred is not None:
            raise ConfigError(
                f"reply {self.preferred + 1} is preferred already, which is written; ask again"
            )
        if len(self.candidates) == 1:
            raise ConfigError("there is one reply alone; make another to choose from by /retry")
        return preference_rows(
            self.messages, self.candidates[number - 1],
            [other for i, other in enumerate(self.candidates) if i != number - 1],
        )  # fmt: skip

    def accept(self, number: int) -> None:
        """Go on with a candidate."""
        self.preferred = number - 1


def reply_seed(seed: int, index: int) -> int:
    """Return the seed of one of several replies to the same turn.

    With one seed for all, policies that differ little would often draw the same reply, and of two
    that are equal none can be preferred.
    """
    return derive_seed(seed, f"reply {index}") if index else seed


def preference_rows(
    messages: Sequence[Message], chosen: Candidate, others: Sequence[Candidate]
) -> list[dict[str, Any]]:
    """Return a pair for each different reply that another was preferred to.

    Raises:
        ConfigError: The reply is empty or was cancelled, or no other differs from it.
    """
    usable = [o for o in others if o.reply.text and o.reply.ending != "cancelled"]
    if not chosen.reply.text or chosen.reply.ending == "cancelled":
        raise ConfigError("a reply that is empty or was cancelled can't be preferred; ask again")
    rejected = {o.reply.text: o for o in usable if o.reply.text != chosen.reply.text}
    if not rejected:
        raise ConfigError("no other reply differs from it, so that there is nothing to choose")
    return [
        {
            "prompt": [*messages], "chosen": chosen.reply.text, "rejected": text,
            "chosen_policy": chosen.policy, "rejected_policy": other.policy,
        }
        for text, other in rejected.items()
    ]  # fmt: skip
