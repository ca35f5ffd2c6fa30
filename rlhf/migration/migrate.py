"""A configuration of ours from the arguments of another tool, and what became of each argument."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import ValidationError

from rlhf.config import PipelineConfig
from rlhf.config.fields import resolve_none
from rlhf.config.messages import explain
from rlhf.config.section import expand_nested
from rlhf.config.text import shown_value
from rlhf.errors import ConfigError
from rlhf.migration.case import Case, Fields, batches, plain
from rlhf.migration.convert import LORA, Partly, Refused, convert
from rlhf.migration.names import Entry, Outcome, defaults, find, nearest
from rlhf.migration.read import Given
from rlhf.migration.secrets import holds_secret, is_secret_name
from rlhf.plain_text import one_line, shortened
from rlhf.proposal.choice import Choice, as_yaml, tree_of

#: What became of an argument; the first four are those of the tables.
Fate = Outcome | Literal["refused", "unknown", "computed"]
TOOLS = {"aitraining": "AITraining", "trl": "TRL"}
#: Value of `data.source` where the old arguments name no pairs.
PLACEHOLDER = "pairs.jsonl"
#: What becomes of PPO's model where SFT is migrated too.
OWN_POLICY = "PPO starts from the SFT policy of the run, not from a model by name"
#: Values of sizes whose defaults are computed from several arguments.
_BATCH_NAMES = {
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches", "batch_size",
    "gradient_accumulation", "mini_batch_size", "nminibatches", "forward_batch_size",
    "rl_chunk_size",
}  # fmt: skip
#: Characters of a line of comments in the file.
_WIDTH = 100
_VARIABLE = re.compile(r"\$\{?[A-Za-z_]")


@dataclass(frozen=True)
class Finding:
    """An argument of the old tool, and what became of it."""

    name: str
    value: str
    """As text; empty for credentials."""
    fate: Fate
    becomes: dict[str, Any]
    """Fields here with their values."""
    text: str
    """Reason, or the nearest thing."""
    origin: str = ""
    """File that holds it."""


@dataclass
class Migration:
    """The outcome of a migration."""

    choices: dict[str, Choice] = field(default_factory=dict[str, Choice])
    findings: list[Finding] = field(default_factory=list[Finding])
    notes: list[str] = field(default_factory=list[str])
    """What to do before a run."""
    silent: int = 0
    """Arguments that have their default there, or say nothing."""
    config: PipelineConfig = field(default_factory=PipelineConfig)

    def text(self, source: str) -> str:
        """Return the YAML file; `source` names what it is from."""
        order = [*PipelineConfig.model_fields]
        choices = sorted(self.choices.values(), key=lambda c: order.index(c.field.split(".")[0]))
        return "\n".join(_wrapped(as_yaml(choices, [*self._head(source)]).split("\n")))

    def _head(self, source: str) -> Iterator[str]:
        yield f"Written by `rlhf migrate` from {source}; docs/migrating.md has all names."
        yield "Look at it with `rlhf config show` and `rlhf preflight` before the first run."
        for note in self.notes:
            yield f"TO DO: {note}"
        for finding in self.findings:
            if not finding.becomes:
                yield f"not carried over: {described(finding)}"


def described(finding: Finding) -> str:
    """Return a finding in one line; the reason is left out where nothing but the name changed."""
    value = f" = {finding.value}" if finding.value else ""
    fields = ", ".join(f"{name} = {_shown(v)}" for name, v in finding.becomes.items())
    arrow = f" → {fields}" if fields else ""
    text = "" if fields and finding.fate == "same" else f": {finding.text}"
    return one_line(f"{finding.name}{value}{arrow}{text}")


def migrate(found: Sequence[Given]) -> Migration:
    """Convert the arguments of one or more trainings to one configuration that is valid.

    Raises:
        ConfigError: Nothing of them can be used.
    """
    result = Migration()
    found = [_without_secrets(_only_said(given, result), result) for given in found]
    # The reward model last: its base is one of its own if it is another than the policy's.
    order = ("sft", "ppo", "reward_model")
    for given in sorted(found, key=lambda given: order.index(given.trainer)):
        _convert_all(given, result)
    result.notes += [note for given in found for note in given.notes]
    trainers = {given.trainer for given in found}
    _join_trainings(trainers, result)
    for given in found:
        _add_defaults(given, result)
    _validate(result)
    _add_notes(trainers, result)
    return result


def _only_said(given: Given, result: Migration) -> Given:
    """Return arguments without those that a tool wrote by itself with their defaults.

    Conversions look at other arguments too, for which these must count as not given.
    """
    if not given.is_dump:
        return given
    said: dict[str, Any] = {}
    for name, value in given.values.items():
        entry = find(given.tool, given.order, name)
        # The model is written in any case: without it ours would be trained from scratch.
        if entry is None or plain(value) != entry.was or name == "model":
            said[name] = value
        else:
            result.silent += 1
    return replace(given, values=said)


def _without_secrets(given: Given, result: Migration) -> Given:
    """Return arguments without credentials, so that no conversion sees them."""
    rest: dict[str, Any] = {}
    for name, value in given.values.items():
        entry = find(given.tool, given.order, name)
        is_marked = entry.secret if entry else is_secret_name(name)
        if is_marked and value is None and entry:
            result.silent += 1
        elif is_marked or holds_secret(value):
            why = "holds what looks like a credential; keep that in the environment"
            why = entry.why if entry and entry.secret else why
            _add(result, given, name, "", "none", {}, f"not copied: {why}")
        else:
            rest[name] = value
    return replace(given, values=rest)


def _convert_all(given: Given, result: Migration) -> None:
    case = _case(given)
    for name, value in given.values.items():
        _convert_one(case, given, name, value, result)
    for name in given.computed:
        entry = find(given.tool, given.order, name)
        to = entry.to.replace("*", given.trainer) if entry else ""
        _add(result, given, name, "", "computed", {}, _computed_text(name, to))
    if case.has_adapters:
        _add_adapters(case, given, result)


def _case(given: Given) -> Case:
    return Case(
        given.tool, given.trainer, given.kind, given.order, given.values, given.calls_lora
    )  # fmt: skip


def _add_adapters(case: Case, given: Given, result: Migration) -> None:
    """Write what peft takes for adapters by default, and tell what differs here."""
    section = f"{given.trainer}.lora"
    if case.has_lora_class:
        values: dict[str, Any] = {"r": 8, "alpha": 8, "dropout": 0.0}
        unknown = {LORA[name] for name in given.computed if name in LORA} - {"r"}
        reason = "by default in peft's LoraConfig, and not changed there:"
        for name, value in values.items():
            dotted = f"{section}.{name}"
            if name not in unknown and dotted not in result.choices:
                result.choices[dotted] = Choice(dotted, value, reason)
                reason = ""
    targets = ("target_modules", "lora_target_modules")
    is_known = any(case.value(name) is not None or name in given.computed for name in targets)
    field_name = f"{section}.target_modules"
    if not is_known and field_name not in result.choices:
        text = ("is not given: peft took the model's attention layers alone; all-linear is ours; "
                "name theirs (q_proj,v_proj and such) to train as few")  # fmt: skip
        reason = f"changed in meaning: target_modules {text}"
        result.choices[field_name] = Choice(field_name, "all-linear", reason)
        becomes = {field_name: "all-linear"}
        _add(result, given, "target_modules", "", "changed", becomes, text)


def _convert_one(case: Case, given: Given, name: str, value: Any, result: Migration) -> None:
    """Record what becomes of one argument."""
    entry = find(given.tool, given.order, name)
    shown = shortened(_shown(value), 80)
    if entry is None:
        near = nearest(given.tool, given.order, name)
        cure = f"did you mean {near}?" if near else f"no argument of {TOOLS[given.tool]}"
        _add(result, given, name, shown, "unknown", {}, cure)
    elif isinstance(value, str) and _VARIABLE.search(value) and entry.to:
        text = "holds a variable; write its value as " + entry.to.replace("*", given.trainer)
        _add(result, given, name, shown, "computed", {}, text)
    elif plain(value) == entry.was and (not entry.to or value is None):
        result.silent += 1
    else:
        _convert_value(case, given, entry, (value, shown), result)


def _convert_value(
    case: Case, given: Given, entry: Entry, value: tuple[Any, str], result: Migration
) -> None:
    """Record what becomes of a value, given with its text for people."""
    try:
        fields = convert(case, entry, value[0])
    except Refused as refusal:
        is_broken = refusal.was_ignored or entry.outcome == "broken"
        fate: Fate = "broken" if is_broken else "none"
        _add(result, given, entry.name, value[1], fate, {}, str(refusal))
        return
    if isinstance(fields, Partly):
        _add(result, given, entry.name, fields.rest, "none", {}, fields.why)
    if not fields and entry.how:
        result.silent += 1
        return
    reason = f"{entry.name} = {value[1]}: {_reason(entry)}"
    kept, text = _choose(fields or [], reason, given, result)
    if kept or not fields:
        _add(result, given, entry.name, value[1], entry.outcome, kept, entry.why)
    else:
        _add(result, given, entry.name, value[1], "refused", {}, text)


def _reason(entry: Entry) -> str:
    """Return the comment of a value, which begins with what is special about it."""
    start = {"changed": "changed in meaning: ", "broken": "never worked there: "}
    return start.get(entry.outcome, "") + entry.why


def _choose(
    fields: Fields, reason: str, given: Given, result: Migration
) -> tuple[dict[str, Any], str]:
    """Add fields to the configuration, unless an earlier argument has set them.

    Returns:
        The fields that were added or are the same, and why others were not.
    """
    kept: dict[str, Any] = {}
    text = ""
    for name, value in fields:
        field_name = name
        old = result.choices.get(name)
        if old is not None and old.value != value and name == "base.path":
            if given.trainer == "reward_model":
                field_name, old = "reward_model.base", result.choices.get("reward_model.base")
            elif given.trainer == "ppo":
                text = text or OWN_POLICY
                continue
        if old is None:
            # The reason stands once, above the first of several fields.
            result.choices[field_name] = Choice(field_name, value, "" if kept else one_line(reason))
        elif old.value != value:
            text = text or f"contradicts {name} = {_shown(old.value)}, which another argument gave"
            continue
        kept[field_name] = value
    return kept, text


def _join_trainings(trainers: set[str], result: Migration) -> None:
    """Leave out what follows here from an earlier stage of the same run."""
    if "sft" in trainers:
        _leave_out("sft.enabled", OWN_POLICY, result)
    if "reward_model" in trainers:
        text = "PPO takes the reward model of the run, not one by name"
        _leave_out("ppo.reward_model_path", text, result)


def _leave_out(name: str, text: str, result: Migration) -> None:
    if result.choices.pop(name, None) is not None:
        result.notes.append(text)
        result.findings = [_without(finding, name, text, "none") for finding in result.findings]


def _add_defaults(given: Given, result: Migration) -> None:
    """Write the values that held there by default and differ from ours."""
    name = TOOLS[given.tool]
    values = defaults(given.tool, given.kind)
    case = _case(given)
    if not _BATCH_NAMES & given.values.keys():
        values |= dict(batches(case))
    if "lr_scheduler_type" in given.values or "scheduler" in given.values:
        values.pop("ppo.lr_final_fraction", None)  # decided with the schedule
    hidden = case.unknown_processes
    if given.by_accelerate and not {"num_processes", "nproc_per_node"} & given.values.keys():
        hidden = hidden or "accelerate launch without --num_processes"
    if hidden:
        size = "ppo.chunk_size" if case.is_ppo else f"{given.trainer}.batch_size"
        result.notes.append(
            f"{hidden} does not tell how many processes there were: {size} is counted for one "
            f"process; multiply it by their number, and set {given.trainer}.processes"
        )
    reason = f"by default in {name}, and not changed there:"
    for dotted, value in values.items():
        if dotted not in result.choices:
            result.choices[dotted] = Choice(dotted, value, reason)
            reason = ""  # stands above the first of them


def _validate(result: Migration) -> None:
    """Take out, one by one, the values that our configuration refuses."""
    if "data.source" not in result.choices:
        text = (
            "TO DO: no preference pairs were named there; every run needs some (docs/own-data.md)"
        )
        result.choices["data.source"] = Choice("data.source", PLACEHOLDER, text)
    while True:
        tree = resolve_none(tree_of([*result.choices.values()]))
        try:
            result.config = PipelineConfig.model_validate(tree)
            return
        except ValidationError as error:
            culprit = _culprit(error, result)
            if culprit is None:
                raise ConfigError(f"can't be converted: {explain(error, {})}") from None
            line = explain(error, {})
            value = result.choices.pop(culprit).value
            _keep_adapters(culprit, value, result)
            findings = [_without(found, culprit, line, "refused") for found in result.findings]
            if all(found.text != line for found in findings):
                findings.append(Finding(culprit, _shown(value), "refused", {}, line))
            result.findings = findings


def _keep_adapters(culprit: str, value: Any, result: Migration) -> None:
    """Write our rank where the last value of `lora` was refused: without one all is trained."""
    section, is_lora, _ = culprit.partition(".lora.")
    rank = f"{section}.lora.r"
    if (
        is_lora
        and value != 16
        and not any(n.startswith(f"{section}.lora.") for n in result.choices)
    ):
        result.choices[rank] = Choice(rank, 16, "LoRA was asked for; what was given is refused")


def _culprit(error: ValidationError, result: Migration) -> str | None:
    """Return the field to leave out: one that the first problem is about."""
    first = next(expand_nested([dict(e) for e in error.errors()]))
    place = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
    words = re.findall(r"[\w.]+", first["msg"])
    inner = [
        name for name in result.choices
        if f"{name}.".startswith(f"{place}.") or f"{place}.".startswith(f"{name}.") or not place
    ]  # fmt: skip
    named = [
        name for word in words for name in inner
        if word in (name, name.removeprefix(f"{place}."), name.rpartition(".")[2])
    ]  # fmt: skip
    exact = [name for name in inner if name == place]
    return next(iter((*exact, *named, *inner)), None)


def _without(finding: Finding, name: str, text: str, fate: Fate) -> Finding:
    """Return a finding without a field; one that has no other gets another text and fate."""
    if name not in finding.becomes:
        return finding
    left = {key: value for key, value in finding.becomes.items() if key != name}
    return replace(finding, becomes=left) if left else replace(
        finding, becomes={}, text=text, fate=fate
    )  # fmt: skip


def _add_notes(trainers: set[str], result: Migration) -> None:
    if result.choices.get("data.source") and result.config.data.source == PLACEHOLDER:
        result.notes.append(
            f"data.source = {PLACEHOLDER} is a placeholder: name your preference pairs; a reward "
            "model, ready or trained here, is approved on held-out pairs"
        )
    if "base.path" not in result.choices:
        result.notes.append("base.path is not set: name your base model; without one a small model "
                            "is trained from scratch")  # fmt: skip
    ours = {"sft": "SFT", "reward_model": "the reward model", "ppo": "PPO"}
    has_model = {"sft": "sft.enabled", "reward_model": "ppo.reward_model_path"}
    rest = [
        words for trainer, words in ours.items()
        if trainer not in trainers and has_model.get(trainer) not in result.choices
    ]  # fmt: skip
    if rest:
        result.notes.append(
            f"our defaults hold for {' and '.join(rest)}; to take the old ones, migrate the files "
            "together: rlhf migrate sft.yaml reward.yaml ppo.yaml"
        )
    if "ppo" in trainers and "ppo.total_episodes" not in result.choices:
        most = result.config.ppo.total_episodes
        result.notes.append(
            f"ppo.total_episodes = {most:,} is our default: there it was epochs × prompts"
        )


def _computed_text(name: str, to: str) -> str:
    if name == "**":
        return "arguments from a mapping, which only running the file would tell; write them out"
    cure = f"; write it as {to}" if to else ""
    return f"has no single value that is written out, and the file is not run{cure}"


def _add(
    result: Migration, given: Given, name: str, value: str, fate: Fate, becomes: dict[str, Any],
    text: str,
) -> None:  # fmt: skip
    # A value without its option stands in the place of a name.
    name = "(not shown)" if holds_secret(name) else shortened(name, 80)
    result.findings.append(Finding(name, value, fate, becomes, one_line(text), given.origin))


def _shown(value: Any) -> str:
    """Return a value as a configuration has it; long ones are cut off."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | dict | tuple):
        with suppress(TypeError, ValueError):  # keys or numbers that JSON can't write
            return shortened(json.dumps(value, ensure_ascii=False, default=str), 120)
        return shown_value(value)
    return value if isinstance(value, str) else shown_value(value)


def _wrapped(lines: Sequence[str]) -> Iterator[str]:
    """Yield lines; comments in lines of at most `_WIDTH` characters."""
    for line in lines:
        indent, mark, comment = line.partition("# ")
        if mark and not indent.strip():
            start = f"{indent}# "
            yield from textwrap.wrap(
                comment, _WIDTH, initial_indent=start, subsequent_indent=f"{start}  ",
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
        else:
            yield line
