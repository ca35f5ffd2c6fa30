"""Rewards from environments with episodes, such as those of AITraining and of Tinker's cookbook.

An operator's file makes a custom reward function of such a class (docs/rewards.md):

    from rlhf.step_environments import environment_reward

    reward = environment_reward(lambda row: AnswerEnv(row["prompt"], row["reference"]))

It runs where all custom functions do: in a process of its own, and only from folders that the
machine's operator allows. That process is why this module stands alone: it starts without torch.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: A reply's fields by name, as custom functions get them: prompt, response, reference, metadata, …
Row = Mapping[str, Any]


def environment_reward(
    make: Callable[[Row], Any],
    *,
    action: Callable[[Any, str], Any] | None = None,
    metric: str | None = None,
    versus_reference: bool = False,
) -> Callable[[Sequence[Row]], list[float]]:
    """Make a reward function of environments: a reply's reward is the sum over its episode.

    An environment has `reset()` or `initial_observation()`, and `step(action)` with a result of
    `reward`, `metrics`, and `done` or `episode_done`. They may be coroutines, and then the episodes
    of a batch overlap. AITraining's `TextGenerationEnv` and `MultiObjectiveRewardEnv` step token by
    token, and score the whole text at the end: that function is called on the reply.

    Args:
        make: Makes the environment of one reply; it must pose the row's own prompt.
        action: Makes an action of the environment and a text; by default the token ids if the
            environment has a `tokenizer`, else the text.
        metric: Name of a metric that is the value in place of the reward, for a component of its
            own in an environment of several objectives.
        versus_reference: Whether an episode has two actions, the policy's reply and the reference
            policy's, as of a comparison; the reference's own reply then has the value 0.
    """

    async def value(row: Row) -> float:
        texts = _texts(row, versus_reference)
        if versus_reference and len(texts) == 1:
            return 0.0
        return _value(*await _score(make(row), row, texts, action), metric)

    def reward(batch: Sequence[Row]) -> list[float]:
        async def values() -> list[float]:
            return await asyncio.gather(*map(value, batch))

        return asyncio.run(values())

    return reward


async def _score(
    env: Any, row: Row, texts: Sequence[str], action: Callable[[Any, str], Any] | None
) -> tuple[float, dict[str, Any]]:
    """Return the reward of a reply and its metrics."""
    begin = getattr(env, "initial_observation", None)
    if begin is None:
        by_text = _scored_by_text(env, row)
        if by_text is not None:
            return by_text
        begin = env.reset
    _check_prompt(await _finished(begin()), row)
    total, metrics = 0.0, dict[str, Any]()
    for text in texts:
        step = await _finished(env.step((action or _action)(env, text)))
        total += float(step.reward)
        metrics |= getattr(step, "metrics", None) or {}
        if step.episode_done if hasattr(step, "episode_done") else step.done:
            return total, metrics
    raise ValueError(
        f"{type(env).__name__} expects another action after the reply; a reply is rewarded as a "
        "whole, so that its episode has to end with it"
    )


def _scored_by_text(env: Any, row: Row) -> tuple[float, dict[str, Any]] | None:
    """Return what an environment says of a whole text; None if it has no such function."""
    prompt, response = _text(row["prompt"]), row["response"]
    if hasattr(env, "compute_multi_objective_reward"):
        total, parts = env.compute_multi_objective_reward(prompt, response, prompt + response)
        named = {f"reward_{name}": value for name, value in parts.items()}
        return float(total), {**named, "reward_total": total}
    if callable(getattr(env, "reward_fn", None)):
        value = env.reward_fn(prompt=prompt, generated=response, full_text=prompt + response)
        return float(value), {"reward": value}
    return None


def _texts(row: Row, versus_reference: bool) -> list[str]:
    """Return the texts of an episode: the reply, then the reference policy's if it is asked for."""
    rival = row.get("reference_reply")
    return [row["response"], *([rival] if versus_reference and rival is not None else [])]


def _action(env: Any, text: str) -> Any:
    tokenizer = getattr(env, "tokenizer", None)
    return text if tokenizer is None else tokenizer.encode(text, add_special_tokens=False)


def _check_prompt(observation: Any, row: Row) -> None:
    """Refuse an environment that poses another prompt than the one that was replied to."""
    posed, own = getattr(observation, "prompt", None), _text(row["prompt"])
    if isinstance(posed, str) and posed != own:
        raise ValueError(
            f"the environment poses {posed[:60]!r}, and the reply is to {own[:60]!r}; make it of "
            "the row's own prompt, as in prompts=[row['prompt']]"
        )


def _value(total: float, metrics: Mapping[str, Any], metric: str | None) -> float:
    if metric is None:
        return total
    if metric not in metrics:
        known = ", ".join(map(str, metrics)) or "none"
        raise ValueError(f"the environment has no metric {metric!r}; it has: {known}")
    return float(metrics[metric])


def _text(prompt: Any) -> str:
    """Return a prompt as text; of a conversation its last turn."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


async def _finished(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
