"""Exports: a policy as a folder for transformers, checked against the policy in the store.

An export counts only if a process that has nothing of this project loads it and gives the same
greedy replies (`export_check.py`). Both compute in float32, on the same device, one prompt at a
time. Where two tokens are equally likely within `TIE`, either choice is right.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf import export_check
from rlhf.config import RuntimeConfig
from rlhf.data.chat_template import tokens_within
from rlhf.data.rendering import Renderer
from rlhf.data.rows import Message, Prompt, messages_of
from rlhf.errors import ConfigError, ExportFailed, PromptUnusable
from rlhf.files import read_json, write_json
from rlhf.modeling.lora import ADAPTER_CONFIG, ADAPTER_FOLDER, ADAPTER_WEIGHTS
from rlhf.plain_text import one_line

log = logging.getLogger(__name__)

#: Largest difference of log-probabilities of two tokens between which rounding may choose. In
#: float32 it is below 1e-4; a damaged weight is far above.
TIE = 1e-3
#: Files of a published policy that transformers reads; others are records of the training.
MODEL_FILES = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.jinja",
)  # fmt: skip
GENERATION_CONFIG = "generation_config.json"
#: Conversations of every check, beside the held-out prompts.
CONVERSATIONS: tuple[list[Message], ...] = (
    [{"role": "user", "content": "What is your name?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello – ça va?"}],
    [
        {"role": "user", "content": "2 + 2?\n\n- as a word"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "And 3 + 3?"},
    ],
)
#: Prompts where a policy has no held-out ones.
OWN_PROMPTS = (
    "What is the capital of France?", "Write a sentence about the sea.", "Why is the sky blue?",
    "Name three fruits.", "How do I boil an egg?", "What is 7 times 8?", "Tell me a short story.",
    "Give me advice for a job interview.",
)  # fmt: skip
_UNBOUNDED = 2**31
#: Variable of a machine that needs longer, or is to wait less, for the check of an export.
CHECK_SECONDS = "RLHF_EXPORT_SECONDS"
#: Its limit without it: to load, and for a token, of a model of many billions of weights on a CPU.
LOADING_SECONDS, TOKEN_SECONDS = 3600.0, 10.0
MOST_SECONDS = 604_800

Check = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Answers a request as `export_check.check` does."""


@dataclass(frozen=True)
class Sampled:
    """Sampling settings of the PPO training that made a policy."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop_sequences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checked:
    """Result of a check that an export has passed."""

    prompts: int
    held_out: bool
    """Whether the prompts are the policy's held-out ones."""
    equal: int
    """Prompts with the same reply, token by token."""
    ties: int
    """Prompts whose replies differ from a place on where two tokens are equally likely."""
    max_new_tokens: int
    conversations: int
    device: str
    dtype: str
    """Dtype of the model's files."""
    own: int | None
    """Prompts with the same reply if the model computes in that dtype; None if it is float32."""
    adapter: int | None
    """Prompts with the same reply by the adapter, merged; None without one."""
    versions: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def replies(self) -> str:
        """Count of the equal replies, in words."""
        ties = f", {self.ties} after a tie of two tokens" if self.ties else ""
        return f"{self.equal} of {self.prompts} greedy replies are the same{ties}"


def write_model(policy: Path, out: Path, sampled: Sampled | None) -> None:
    """Copy a policy's model files, with the generation settings of its training.

    Args:
        policy: Published files.
        out: An empty folder.
        sampled: Settings of PPO; None leaves those of the base.
    """
    files = sorted({path for pattern in MODEL_FILES for path in policy.glob(pattern)})
    for path in files:
        shutil.copyfile(path, out / path.name)
    if (policy / ADAPTER_FOLDER).is_dir():
        (out / ADAPTER_FOLDER).mkdir()
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(policy / ADAPTER_FOLDER / name, out / ADAPTER_FOLDER / name)
    if sampled is not None:
        _write_generation_config(policy, out, sampled)


def _write_generation_config(policy: Path, out: Path, sampled: Sampled) -> None:
    """Write the settings with which PPO sampled, and the policy's special tokens; nothing else.

    A base's penalty for repetitions, for example, played no part in the training.
    """
    from transformers import GenerationConfig

    path, config = policy / GENERATION_CONFIG, read_json(policy / "config.json")
    known = read_json(path) if path.is_file() else {}
    tokens = {
        name: known.get(name, config.get(name))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    GenerationConfig(
        do_sample=True, temperature=sampled.temperature, top_k=sampled.top_k, top_p=sampled.top_p,
        max_new_tokens=sampled.max_new_tokens, **tokens,
    ).save_pretrained(out)  # fmt: skip


def verify_export(
    policy: Path,
    export: Path,
    prompts: Sequence[Prompt],
    runtime: RuntimeConfig,
    *,
    max_new_tokens: int,
    adapter_base: Path | None = None,
    held_out: bool = True,
    check: Check | None = None,
) -> tuple[Checked, list[list[int]], list[list[int]]]:
    """Compare an export, loaded in a process of its own, with the policy in the store.

    Args:
        policy: Published files, of the store.
        export: Folder of the export.
        prompts: Prompts to answer; those that the model can't be given are left out.
        runtime: Device and threads, of both sides.
        max_new_tokens: Most tokens of a reply.
        adapter_base: Model onto which the export's adapter belongs; None does not check it.
        held_out: Whether the prompts are held-out ones, for the record.
        check: Answers the request; None is `in_own_process`.

    Returns:
        The result, and the token ids of the prompts and of the policy's replies.

    Raises:
        ExportFailed: The export can't be loaded, renders a conversation differently, or gives
            another reply; the first prompt with another one is named.
        ConfigError: None of the prompts can be given to the model.
    """
    texts, asked, replies, conversations, device = _expected(
        policy, prompts, runtime, max_new_tokens
    )
    request = {
        "folder": str(export.resolve()),
        "device": device,
        "threads": runtime.threads,
        "max_new_tokens": max_new_tokens,
        "prompts": asked,
        "replies": replies,
        "conversations": [messages for messages, _ in conversations],
        "adapter": adapter_base
        and {"folder": str(export.resolve() / ADAPTER_FOLDER), "base": str(adapter_base.resolve())},
    }
    result = (check or in_own_process)(request)
    if "error" in result:
        raise _failed(f"it can't be loaded or answer ({result['error']})")
    for (messages, ids), found in zip(conversations, result["templates"], strict=True):
        if found != ids:
            raise _failed(f"its chat template gives other tokens for {_shown(messages)}")
    equal, ties = _count(result["replies"], texts, "its reply is another one")
    own = result["own"] and sum(each["gap"] is None for each in result["own"])
    adapter = None
    if adapter_base is not None:
        adapter = sum(_count(result["adapter"], texts, "its adapter's reply is another one"))
    checked = Checked(
        len(asked), held_out, equal, ties, max_new_tokens, len(conversations), device,
        result["dtype"], own, adapter, result["versions"],
    )  # fmt: skip
    return checked, asked, replies


def in_own_process(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run `export_check.py` in a process without this project and network; return its result.

    Raises:
        ExportFailed: The process died.
    """
    with tempfile.TemporaryDirectory(prefix="export-check-") as scratch:
        asked, answer = Path(scratch, "request.json"), Path(scratch, "result.json")
        write_json(asked, request)
        environment = {
            **os.environ, "HF_HOME": scratch, "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        # -I: neither PYTHONPATH nor the current folder, where this project may lie.
        limit = check_seconds(request)
        try:
            process = subprocess.run(
                [sys.executable, "-I", export_check.__file__, str(asked), str(answer)],
                cwd=scratch, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
                text=True, errors="replace", check=False, timeout=limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            shown = f"{limit:,.0f}" if limit >= 1 else f"{limit:g}"
            raise _failed(
                f"its process gave no answer in {shown} s and was ended; give more by "
                f"{CHECK_SECONDS}=<seconds>, or check less by --prompts and --new-tokens"
            ) from None
        if process.returncode != 0 or not answer.is_file():
            last = [line for line in process.stderr.splitlines() if line.strip()][-1:]
            raise _failed(
                f"its process ended with {process.returncode} ({one_line(*last or [''])})"
            )
        return json.loads(answer.read_text(encoding="utf-8"))


def check_seconds(request: Mapping[str, Any]) -> float:
    """Return the most seconds that the check of an export may take: generous for its tokens.

    RLHF_EXPORT_SECONDS wins.

    Raises:
        ConfigError: The variable holds no number of seconds.
    """
    given = os.environ.get(CHECK_SECONDS)
    if given:
        try:
            seconds = float(given)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds <= MOST_SECONDS:
            raise ConfigError(
                f"{CHECK_SECONDS} = {given[:40]!r}: is no time; give seconds, up to {MOST_SECONDS}"
            )
        return seconds
    # Every prompt is answered at most three times: in float32, in its own dtype, by the adapter.
    tokens = 3 * len(request["prompts"]) * request["max_new_tokens"]
    return min(MOST_SECONDS, LOADING_SECONDS + TOKEN_SECONDS * tokens)


def _expected(
    folder: Path, prompts: Sequence[Prompt], runtime: RuntimeConfig, max_new_tokens: int
) -> tuple[list[Prompt], list[list[int]], list[list[int]], list[Any], str]:
    """Return the prompts that fit, their tokens, the replies' tokens, conversations, the device."""
    from rlhf.evaluation.replies import Policy, SamplingPlan
    from rlhf.modeling.device import prepare_device
    from rlhf.modeling.generate import generate
    from rlhf.modeling.sampling import Sampling

    device = prepare_device(runtime)
    plan = SamplingPlan(max_new_tokens=max_new_tokens, temperature=0.0, batch_size=1)
    policy = Policy(folder, device, plan)
    renderer, sampling = policy.renderer, Sampling(max_new_tokens, 0.0)
    texts: list[Prompt] = []
    asked: list[list[int]] = []
    for prompt in prompts:
        try:
            asked.append(renderer.encode_prompt(prompt, policy.limits.prompt))
        except PromptUnusable as error:
            log.info("left out of the check: %s", error)
            continue
        texts.append(prompt)
    if not asked:
        raise ConfigError("none of the held-out prompts fits into the model; lower --new-tokens")
    replies = [
        generate(
            policy.model, [ids], renderer.tokenizer, sampling, 0, ends=renderer.end_ids
        ).rows()[0]
        for ids in asked
    ]
    return texts, asked, replies, _conversations(renderer, prompts), str(device)


def _conversations(
    renderer: Renderer, prompts: Sequence[Prompt]
) -> list[tuple[list[dict[str, Any]], list[int]]]:
    """Return conversations as a template takes them, and the tokens that training gave them.

    Left out are those to which training does more than the template: where a text holds a control
    token, which is broken up, or a system turn has no place of its own.
    """
    found: list[tuple[list[dict[str, Any]], list[int]]] = []
    for prompt in [*CONVERSATIONS, *prompts]:
        messages = messages_of(prompt)
        if any(tokens_within(renderer.tokenizer, m["content"]) for m in messages):
            continue
        try:
            if renderer.folds(prompt):
                continue
            ids = renderer.encode_prompt(prompt, _UNBOUNDED)
        except PromptUnusable:
            continue
        shown: list[dict[str, Any]] = [{**message} for message in messages]
        if renderer.turn.parts:
            shown = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in shown]
        found.append((shown, ids))
    return found


def _count(
    answers: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], otherwise: str
) -> tuple[int, int]:
    """Return how many replies are equal, and how many differ after a tie.

    Raises:
        ExportFailed: One differs by more.
    """
    gaps = [each["gap"] for each in answers]
    for prompt, gap in zip(prompts, gaps, strict=True):
        if gap is not None and gap > TIE:
            raise _failed(f"{otherwise} for the prompt {_shown(prompt)}")
    return sum(gap is None for gap in gaps), sum(gap is not None for gap in gaps)


def _failed(reason: str) -> ExportFailed:
    return ExportFailed(
        f"the export does not behave like the policy in the store: {reason}; nothing was written"
    )


def _shown(prompt: Any) -> str:
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    return repr(one_line(text)[:200])
