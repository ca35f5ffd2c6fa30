"""OpenAI's chat completions: the request as far as a policy can serve it, and its answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rlhf.chat import Reply, ReplySettings
from rlhf.errors import ConfigError
from rlhf.limits import load_json

#: Most turns of a conversation, and characters of a stop sequence.
MOST_TURNS, LONGEST_STOP = 1_000, 200
#: Values with which these fields ask for nothing; others would change a reply and are refused.
_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
}
#: Ends of a reply as OpenAI calls them.
_FINISH = {"stop": "stop", "length": "length", "context": "length", "cancelled": "length"}


class Turn(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        """Return the text of a content in parts; parts of other kinds are refused."""
        if not isinstance(value, list):
            return value
        texts = [part.get("text") if isinstance(part, dict) else None for part in value]
        known = [text for text in texts if isinstance(text, str)]
        if len(known) < len(texts):
            raise ValueError("has parts that are no text; a policy reads text alone")
        return "".join(known)

    @property
    def message(self) -> dict[str, str]:
        """The message as templates take it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content}


Turns = Annotated[list[Turn], Field(min_length=1, max_length=MOST_TURNS)]
Tokens = Annotated[int, Field(ge=1)]


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request for a chat completion; fields that change no reply are not looked at."""

    model_config = ConfigDict(extra="allow")

    messages: Turns
    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    stop: list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]] = Field(
        default=[], max_length=8
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @field_validator("stop", mode="before")
    @classmethod
    def _list_stops(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else [] if value is None else value

    @field_validator("stream", mode="before")
    @classmethod
    def _not_streamed(cls, value: Any) -> Any:
        return False if value is None else value

    @field_validator("stream_options", mode="before")
    @classmethod
    def _no_options(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("messages")
    @classmethod
    def _end_with_a_user(cls, value: list[Turn]) -> list[Turn]:
        if value[-1].role != "user":
            raise ValueError("have to end with a user's turn")
        return value

    def settings(self, own: ReplySettings, most: int) -> ReplySettings:
        """Return how to reply: what the request names, else the policy's own settings.

        Raises:
            ConfigError: More tokens are asked for than the server gives.
        """
        asked = self.max_completion_tokens or self.max_tokens
        if asked is not None and asked > most:
            raise ConfigError(f"max_tokens {asked:,}: this server gives at most {most:,}")
        given = {"temperature": self.temperature, "top_p": self.top_p}
        return replace(
            own, max_new_tokens=asked or min(own.max_new_tokens, most),
            stop_sequences=(*own.stop_sequences, *self.stop),
            **{name: value for name, value in given.items() if value is not None},
        )  # fmt: skip


def parse(body: bytes, shape: type[Any]) -> Any:
    """Parse a request's body.

    Raises:
        ConfigError: It is no JSON, has other fields, or asks for what a policy can't do.
    """
    try:
        value = load_json(body)
        # Half a surrogate pair is no character: no tokenizer takes it.
        json.dumps(value, ensure_ascii=False).encode()
    except ValueError as error:
        raise ConfigError(f"the body is no JSON that can be read ({str(error)[:200]})") from None
    try:
        request = shape.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the body"
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{place}: {reason}") from None
    for name, values in _NOTHING.items():
        asked = (request.model_extra or {}).get(name)
        if asked is not None and asked not in values:
            raise ConfigError(f"{name}: this server replies with text of one policy; leave it out")
    return request


@dataclass(frozen=True)
class Completion:
    """The answers to one request."""

    id: str
    created: int
    model: str

    def whole(self, reply: Reply) -> dict[str, Any]:
        """Return the answer with the whole reply."""
        choice = {
            "index": 0, "message": {"role": "assistant", "content": reply.text, "refusal": None},
            "logprobs": None, "finish_reason": _FINISH[reply.ending],
        }  # fmt: skip
        return self._of("chat.completion", choices=[choice], usage=_usage(reply))

    def part(self, text: str | None) -> dict[str, Any]:
        """Return a streamed part of the text; None is the first, with the role."""
        delta = {"role": "assistant", "content": ""} if text is None else {"content": text}
        return self._chunk([{"index": 0, "delta": delta, "finish_reason": None}])

    def end(self, reply: Reply) -> dict[str, Any]:
        """Return the streamed part that says how the reply ended."""
        return self._chunk([{"index": 0, "delta": {}, "finish_reason": _FINISH[reply.ending]}])

    def usage(self, reply: Reply) -> dict[str, Any]:
        """Return the streamed part with the numbers of tokens."""
        return self._chunk([], usage=_usage(reply))

    def _chunk(self, choices: list[Any], **more: Any) -> dict[str, Any]:
        return self._of("chat.completion.chunk", choices=choices, **more)

    def _of(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **more}


def _usage(reply: Reply) -> dict[str, int]:
    return {
        "prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens,
        "total_tokens": reply.prompt_tokens + reply.tokens,
    }  # fmt: skip
