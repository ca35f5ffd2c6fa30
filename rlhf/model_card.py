"""The model card of an export: front matter of the Hugging Face Hub, figures, gates, lineage.

Every text that a user or a model could have written is escaped (`rlhf/markdown.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.config.metric_names import is_share
from rlhf.errors import ConfigError
from rlhf.export import Checked, Sampled
from rlhf.gates import NOT_JUDGED, NOT_MEASURED, Check, Verdict
from rlhf.markdown import (
    Markdown,
    bold,
    bullets,
    code,
    code_block,
    heading,
    paragraphs,
    table,
    words,
)
from rlhf.plain_text import one_line
from rlhf.report.metric_words import metric_name

#: Identifiers of licences on the hub, such as apache-2.0, and of models.
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.\-]{0,63}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}")
#: Metrics of the policy's evaluation that a card shows, if they were measured.
_FIGURES = (
    "win_rate", "judge_win_rate", "gold_win_rate", "reward_difference", "kl", "eos_rate",
    "tokens", "repetition",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """An artifact that a policy was made from."""

    role: str
    kind: str
    digest: str
    stage: str


@dataclass(frozen=True)
class CardFacts:
    """Facts about a policy for its model card, as far as the store has them."""

    digest: str
    stage: str
    champion_of: tuple[str, ...] = ()
    base: str = ""
    """The base as the configuration names it; empty if there was none, or it is not known."""
    from_scratch: bool = False
    base_is_on_hub: bool = False
    licence: str | None = None
    sampled: Sampled | None = None
    verdict: Verdict | None = None
    verdict_digest: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Of the policy's evaluation."""
    reward_metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Of the evaluation of the reward model that it was trained on."""
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Counts of the dataset."""
    lineage: tuple[Step, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    """Libraries that trained it."""
    code_version: str = ""

    @property
    def standing(self) -> str:
        """Return the gate's verdict in one line."""
        if self.verdict is None:
            return "NOT JUDGED: no gate has judged this policy."
        if self.verdict.approved:
            return f"Approved by its gate: {self.verdict.approval}."
        if self.verdict.keeps_champion:
            return f"NOT BETTER than the champion, which stayed: {self.verdict.reason}"
        return f"REJECTED by its gate: {self.verdict.reason}"


def model_card(facts: CardFacts, checked: Checked, *, has_adapter: bool, gguf: str = "") -> str:
    """Return the README.md of an export.

    Args:
        facts: What the store knows of the policy.
        checked: The check that the export has passed.
        has_adapter: Whether the export holds the adapter alone, too.
        gguf: What was done about GGUF; empty without that format.
    """
    body = paragraphs(
        heading(f"Policy {facts.digest[:12]}"),
        bold(facts.standing) if not _is_approved(facts) else words(facts.standing),
        words(*_origin(facts)),
        heading("Use", 2),
        code_block(_usage(facts, checked), "python"),
        _generation(facts.sampled),
        _adapter(facts) if has_adapter else words(),
        heading("Verification", 2),
        bullets(_verification(checked, gguf)),
        *_figures(facts),
        *_gate(facts),
        heading("Data", 2),
        _data(facts),
        heading("Lineage", 2),
        table(
            ("Role", "Kind", "Made by", "Digest"),
            [(s.role, s.kind, s.stage, code(s.digest)) for s in facts.lineage],
        ),
        bullets(_training(facts)),
        heading("Limits", 2),
        bullets(_limits(facts)),
        heading("Licence", 2),
        words(_licence(facts)),
    )
    return f"---\n{_front_matter(facts)}\n---\n\n{body}\n"


def checked_licence(text: str) -> str:
    """Return a licence's identifier as the hub has it.

    Raises:
        ConfigError: It is none.
    """
    if not _LICENCE.fullmatch(text):
        raise ConfigError(
            f"--license {one_line(text)[:60]!r}: write the hub's identifier in small letters, such "
            "as apache-2.0, mit, llama3.2 or other"
        )
    return text


def is_hub_id(text: str) -> bool:
    """Return whether a base's name is that of a hub's repository, with a revision or without."""
    return bool(_HUB_ID.fullmatch(text.partition("@")[0]))


def _is_approved(facts: CardFacts) -> bool:
    return facts.verdict is not None and facts.verdict.approved


def _front_matter(facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    base = facts.base.partition("@")[0]
    on_hub = facts.base_is_on_hub and _HUB_ID.fullmatch(base)
    data: Any = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", license=facts.licence,
        base_model=base if on_hub else None,
        tags=["rlhf", "ppo" if facts.sampled else "sft", "conversational"],
    )  # fmt: skip
    return data.to_yaml().strip()


def _origin(facts: CardFacts) -> Iterator[object]:
    yield "A language model,"
    yield "trained by PPO from human preferences," if facts.sampled else f"made by {facts.stage},"
    unknown = "from scratch" if facts.from_scratch else "on a base that the store does not know"
    yield words("on the base", code(facts.base)) if facts.base else unknown
    if facts.champion_of:
        yield f"(champion of {', '.join(facts.champion_of)})"


def _usage(facts: CardFacts, checked: Checked) -> str:
    length = facts.sampled.max_new_tokens if facts.sampled else 256
    return f"""
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"  # or its id on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)  # {checked.dtype}
inputs = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "Hello!"}}],
    add_generation_prompt=True, return_tensors="pt", return_dict=True,
)
output = model.generate(**inputs, max_new_tokens={length})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def _generation(sampled: Sampled | None) -> Markdown:
    if sampled is None:
        return words("Its generation settings are those of its base.")
    parts = [
        "By default it samples as PPO did:",
        f"temperature {sampled.temperature:g}, top-k {sampled.top_k or 'off'}, top-p",
        f"{sampled.top_p:g}, at most {sampled.max_new_tokens:,} new tokens.",
    ]
    if sampled.stop_sequences:
        shown = (code(text) for text in sampled.stop_sequences)
        parts += ["PPO ended replies also at these texts; set them as stop_strings:", *shown]
    return words(*parts)


def _adapter(facts: CardFacts) -> Markdown:
    sft = next((s.digest for s in facts.lineage if s.role == "sft"), "")
    return words(
        "The folder", code("adapter/"), "holds the LoRA adapter alone. It belongs onto the SFT "
        "policy", code(sft), "which the same command exports; the files beside it have it merged.",
    )  # fmt: skip


def _verification(checked: Checked, gguf: str) -> Iterator[object]:
    versions = ", ".join(f"{name} {version}" for name, version in checked.versions.items())
    yield (
        "This folder was loaded in a fresh process, without the code that trained it and without "
        f"network ({versions}; {checked.device})."
    )
    which = "held-out prompts" if checked.held_out else "prompts of the command's own"
    yield (
        f"{checked.replies} as those of the policy in the store, to {checked.prompts} {which}, one "
        f"at a time, up to {checked.max_new_tokens} tokens, both in float32."
    )
    if checked.own is not None:
        yield (
            f"Computed in {checked.dtype}, as it loads by default, {checked.own} of "
            f"{checked.prompts} are the same; what differs there is rounding."
        )
    yield (
        f"Its chat template gives the tokens of the training for {checked.conversations} "
        "conversations."
    )
    if checked.adapter is not None:
        yield (
            f"Its adapter, merged onto the SFT policy, gives the same replies to "
            f"{checked.adapter} of {checked.prompts} prompts."
        )
    if gguf:
        yield gguf


def _figures(facts: CardFacts) -> Iterator[Markdown]:
    rows = [*_rows(facts.metrics)]
    accuracy = _row("accuracy", facts.reward_metrics)
    if accuracy:
        rows.append(("Accuracy of the reward model on held-out pairs", *accuracy[1:]))
    if rows:
        yield heading("Figures", 2)
        yield words(
            "On held-out prompts; the policy before is the SFT policy, from which PPO began."
        )
        yield table(("Measure", "Value", "Before", "95 % interval"), rows)


def _rows(metrics: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for mode in ("sampled", "greedy"):
        for name in _FIGURES:
            row = _row(f"{mode}.{name}", metrics)
            if row:
                yield row


def _row(name: str, metrics: Mapping[str, Any]) -> tuple[str, str, str, str] | None:
    value = metrics.get(name, metrics.get(f"{name}_after"))
    if not isinstance(value, int | float):
        return None
    before, low, high = (metrics.get(f"{name}_{end}") for end in ("before", "low", "high"))
    interval = (
        "–" if low is None or high is None else f"{_number(name, low)} to {_number(name, high)}"
    )
    shown = "–" if before is None else _number(name, before)
    return metric_name(name), _number(name, value), shown, interval


def _number(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if is_share(name) else f"{value:.3g}"


def _gate(facts: CardFacts) -> Iterator[Markdown]:
    if facts.verdict is None:
        return
    yield heading("Gate", 2)
    yield words(facts.standing)
    yield table(
        ("Metric", "Value", "Rule", "Met"),
        [
            (
                c.metric,
                "–" if c.value is None else f"{c.value:.3g}",
                c.bound,
                _met(c),
            )
            for c in facts.verdict.checks
        ],
    )
    if facts.verdict_digest:
        yield words("Verdict", code(facts.verdict_digest))


def _met(check: Check) -> str:
    """Return whether a rule was met; one that was skipped for want of a value was not."""
    for left_out in (NOT_MEASURED, NOT_JUDGED):
        if check.passed and check.note.startswith(left_out):
            return left_out
    return "yes" if check.passed else "NO"


def _data(facts: CardFacts) -> Markdown:
    counts = [
        (name.replace("_", " "), f"{value:,}")
        for name, value in sorted(facts.data.items())
        if isinstance(value, int) and not isinstance(value, bool)
    ]
    return table(("Rows", "Count"), counts) or words(
        "Not known: no dataset of the store led to it."
    )


def _training(facts: CardFacts) -> Iterator[object]:
    if facts.code_version:
        yield f"rlhf-pipeline, code version {facts.code_version}"
    if facts.versions:
        yield ", ".join(f"{name} {version}" for name, version in sorted(facts.versions.items()))


def _limits(facts: CardFacts) -> Iterator[object]:
    if not _is_approved(facts):
        yield bold("No gate has approved this policy: do not use it for anything but experiments.")
    yield (
        "It was trained towards the score of a reward model, which stands for people's preferences "
        "only as far as its accuracy goes. Replies may be wrong, or please without being right."
    )
    judge = facts.metrics.get("over_optimisation.state")
    if judge:
        yield f"Over-optimisation of the reward model: {judge}."
    prompts = facts.metrics.get("n")
    if isinstance(prompts, int):
        yield f"The figures are of {prompts:,} held-out prompts of the training data's kind."
    yield "Harm, bias and facts were not measured beyond what the figures name."


def _licence(facts: CardFacts) -> str:
    if facts.licence:
        return f"{facts.licence}; that of the base holds for what was made from it."
    if not facts.from_scratch:
        return "Not known here: that of the base holds. Look it up before you pass the model on."
    return "None is stated: the model was trained from scratch, and its owner decides."
