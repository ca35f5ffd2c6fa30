"""Proposal of a configuration: data and base are looked at, checked as a run does, and written."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.config import PipelineConfig, apply_machine_settings, load_config, load_preset
from rlhf.config.fields import flatten, resolve_none
from rlhf.config.overrides import parse_overrides
from rlhf.data.rendering import Renderer
from rlhf.data.rows import Demonstration, PromptRow
from rlhf.data.sources import absolute_source, source_names
from rlhf.errors import ConfigError, DataError
from rlhf.estimate import Measurement, estimate, stored_bytes
from rlhf.files import expand_home, fsync, read_json
from rlhf.gate_sizes import Sizes, describe_power
from rlhf.modeling.source import ExternalModel
from rlhf.plain_text import counted
from rlhf.proposal.choice import Choice, as_yaml, replaced, tree_of
from rlhf.proposal.facts import (
    MOST_CHARS,
    Base,
    DataFacts,
    count_tokens,
    find_machine,
    read_data,
    share_lost,
    texts_of,
)
from rlhf.proposal.gates import judge_sizes
from rlhf.proposal.lengths import ENOUGH_HELD_OUT, choose_lengths, held_out_share
from rlhf.proposal.memory import adapters, choose_method, fit, with_memory
from rlhf.proposal.rules import (
    MOST_SECONDS,
    Situation,
    all_choices,
    judge_note,
    seconds_of,
    vocabulary,
)
from rlhf.rehearsal_rows import LOOKED_AT, Sample
from tasks.preflight import preflight
from tasks.rehearsal import base_without_weights, rehearse_once
from tasks.runner import producer

#: Name of the file in a project's folder.
FILE = "config.yaml"
#: Sections and fields that can be given beside data and base; the others are chosen.
GIVEN = ("data", "store", "store_options", "name", "seed", "promotion", "runtime", "tracking",
         "retraining", "base.revision")  # fmt: skip
#: Pairs below which nobody should expect a reward model to generalise.
FEW_TO_LEARN = 500
#: Seconds of one training that are worth a word.
LONG_SECONDS = 6 * 3600
#: Settings that name sources.
_SOURCES = ("source", "eval_source", "sft_source", "prompts_source")


@dataclass(frozen=True)
class Proposal:
    """A configuration with its reasons, checked and not yet written."""

    text: str
    """The YAML file."""
    choices: Sequence[Choice]
    config: PipelineConfig
    notes: Sequence[str]
    """How the data were read."""
    warnings: Sequence[str]
    """What the user should know before a run."""
    seconds: Mapping[str, float]
    """Of the training stages by the estimate, by section; empty without an estimate."""


def check_target(folder: Path) -> None:
    """Refuse a project folder that holds something, or can't be made.

    Raises:
        ConfigError: It names the folder and the cure.
    """
    target = expand_home(folder)
    setting = f"folder = {str(folder)!r}"
    try:
        parent, is_taken = target.parent, os.path.lexists(target)
        if is_taken and (not target.is_dir() or target.is_symlink() or any(target.iterdir())):
            raise ConfigError(f"{setting}: is there already; nothing is overwritten: name another")
        if not parent.is_dir():
            raise ConfigError(f"{setting}: there is no folder {str(parent)!r}; make it first")
    except OSError as error:
        raise ConfigError(f"{setting}: can't be used ({error.strerror}); name another") from None
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{setting}: {str(parent)!r} is not writable; name a folder elsewhere")


def write_project(folder: Path, proposal: Proposal) -> Path:
    """Write a project's folder with its configuration, all or nothing; return the file.

    Raises:
        ConfigError: Something stands in its place, or the disk refuses.
    """
    check_target(folder)
    target = expand_home(folder)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name[:40]}-") as made:
            inner = Path(made, "project")
            inner.mkdir()
            path = inner / FILE
            path.write_text(proposal.text, encoding="utf-8")
            fsync(path)
            fsync(inner)
            inner.rename(target)  # refuses a folder that holds something
        fsync(target.parent)
    except OSError as error:
        raise ConfigError(
            f"folder = {str(folder)!r}: can't be written ({error.strerror}); name another"
        ) from None
    return folder / FILE


def find_data(source: str) -> None:
    """Refuse data that are not there.

    Raises:
        ConfigError: It says why.
    """
    _start(source, None, {})


def find_base(base: str) -> None:
    """Refuse a base that is not there, or can't be one.

    Raises:
        ConfigError: It says why.
        StoreError: The server can't be reached.
    """
    model = ExternalModel("--base", _absolute_base(base))
    if not model.is_artifact:
        model.check()


def propose(
    name: str, data: str, base: str | None, overrides: Sequence[str] = (),
    report: Callable[[str], None] = lambda _: None,
) -> Proposal:  # fmt: skip
    """Look at data and base, choose every value that depends on them, and check the outcome.

    Args:
        name: Of the project; its letters, digits and hyphens name run and model line.
        data: Value of `data.source`.
        base: Value of `base.path`; None trains from scratch.
        overrides: Values of `GIVEN` as on the command line.
        report: Receives a line before each step that takes time.

    Raises:
        ConfigError: A value is not valid, or the base can't be trained.
        DataError: A run would stop at these data.
        StoreError: A server can't be reached.
    """
    given = _given(overrides)
    start = _start(data, base, given)
    if base is not None:
        find_base(base)
    report(f"reading {source_names(start.data.source)}")
    facts = read_data(_unlimited(start, given), _share_for(given))
    source = _source_choices(name, start, facts)
    with base_without_weights(start) as folder:
        report(f"counting the tokens of {counted(len(facts.sample), 'pair')}")
        renderer = _renderer(folder, facts)
        case, measured = _situation(start, facts, renderer, folder)
        draft = _draft(case, measured, folder, source, start.base.path)
        choices, case = _with_given(draft.choices, given), draft.case
        text = as_yaml(choices, _head(facts, case))
        config = _loaded(text)
        _check_prompts(facts, renderer, config)
        report("checking store, source and models, as a run does")
        preflight(config)
        if folder is not None:
            report("rehearsing every stage on a miniature of the base")
            rehearse_once(config, folder, _sample(facts), producer("preflight", {}, config.seed))
    seconds = seconds_of(case, dict(flatten(tree_of(choices)))) if case.speeds else {}
    warnings = [*draft.misfits, *_slow(case, seconds), *_warnings(config, facts, case)]
    return Proposal(text, choices, config, facts.notes, warnings, seconds)


def _given(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values that are given, by dotted name; sources by absolute paths.

    Raises:
        ConfigError: One is no field, or a field that is chosen here.
    """
    tree = parse_overrides(overrides)
    values = dict(flatten(tree))
    for field in values:
        if field in {"data.source", "base.path"}:
            raise ConfigError(f"{field}: give it by --{field.partition('.')[0]}")
        if not f"{field}.".startswith(tuple(f"{name}." for name in GIVEN)):
            raise ConfigError(
                f"{field}: is chosen here with a reason; change it in the file that is written, or "
                "on the command line of a run"
            )
    for name in _SOURCES:
        if (field := f"data.{name}") in values:
            values[field] = _absolute_sources(field, values[field])
    return values


def _start(data: str, base: str | None, given: Mapping[str, Any]) -> PipelineConfig:
    """Return the configuration of what is given alone.

    Raises:
        ConfigError: A value is not valid; data or base are not there.
    """
    if data == "world":
        raise ConfigError(
            "--data = 'world': is generated, and has configs/quickstart.yaml; give data of your own"
        )
    tree = tree_of([Choice(field, value, "") for field, value in given.items()])
    tree.setdefault("data", {})["source"] = _absolute_sources("--data", data)
    if base is not None:
        tree.setdefault("base", {})["path"] = _absolute_base(base)
    tree.setdefault("store", str(Path(PipelineConfig().store).absolute()))
    return load_preset(None, tree).config


def _absolute_sources(field: str, value: Any) -> Any:
    """Return the value of a setting of sources with absolute paths.

    Raises:
        ConfigError: It is not valid, or names what is not there.
    """
    setting = "source" if field == "--data" else field.rpartition(".")[2]
    # A source of pairs, for the other settings need one.
    tree = {"data": {"source": "x.jsonl", setting: value}}
    sources = getattr(load_preset(None, tree).config.data, setting)
    if isinstance(sources, str):
        return absolute_source(sources, field)
    return [
        {**item.model_dump(mode="json", exclude_unset=True),
         "source": absolute_source(item.source, field)}
        for item in sources
    ]  # fmt: skip


def _absolute_base(base: str) -> str:
    """Return a base by a name that is the same in every folder."""
    model = ExternalModel("--base", base)
    is_local = not (base.startswith("s3://") or model.is_artifact) and model.is_path()
    return os.path.abspath(model.path) if is_local else base  # noqa: PTH100  (without `..`)


def _unlimited(config: PipelineConfig, given: Mapping[str, Any]) -> PipelineConfig:
    """Return a configuration that leaves no row out for its characters: tokens will decide."""
    names = ("max_prompt_chars", "max_reply_chars")
    free = {name: MOST_CHARS for name in names if f"data.{name}" not in given}
    return config.model_copy(update={"data": config.data.model_copy(update=free)})


def _share_for(given: Mapping[str, Any]) -> Callable[[int], float]:
    share = given.get("data.eval_fraction")
    return held_out_share if share is None else lambda _: share


def _source_choices(name: str, start: PipelineConfig, facts: DataFacts) -> list[Choice]:
    """Return the choices of names and places."""
    slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "project"
    source = start.data.source
    value: Any = source
    if not isinstance(source, str):
        value = [item.model_dump(mode="json", exclude_unset=True) for item in source]
    total = facts.pairs + facts.held_out_pairs + facts.judge_pairs
    read = f"{facts.at_least}{total:,} pairs of {facts.rows:,} rows, format {facts.formats}"
    return [
        Choice("name", slug, "of runs and reports"),
        Choice("store", start.store, "models and results; absolute, so that any folder will do"),
        Choice("data.source", value, read, "data", f"{facts.at_least}{total:,} pairs"),
        Choice("promotion.name", slug, "the model line that has a champion"),
    ]


def _renderer(folder: Path | None, facts: DataFacts) -> Renderer:
    """Return the base's renderer; that of a tokenizer trained on the sample without one."""
    from rlhf.modeling.base import train_tokenizer
    from rlhf.modeling.tokenizer import load_tokenizer

    if folder is not None:
        return Renderer(load_tokenizer(folder))
    return Renderer(train_tokenizer(texts_of(facts.sample), vocabulary(facts.pairs)))


def _situation(
    start: PipelineConfig, facts: DataFacts, renderer: Renderer, folder: Path | None
) -> tuple[Situation, Measurement | None]:
    """Return all that the choices go by, and the base's measurement if its family has one."""
    from rlhf.modeling.base import folder_context

    machine = find_machine(apply_machine_settings(start).runtime.device)
    tokens = count_tokens(facts.sample, renderer)
    if folder is None:
        lengths = choose_lengths(tokens, machine, None)
        return Situation(facts, tokens, lengths, machine, None, {}), None
    name = (start.base.path or "").rstrip("/").rpartition("/")[2]
    base = Base(name, 0, folder_context(folder), stored_bytes(folder), _has_template(folder))
    lengths = choose_lengths(tokens, machine, base)
    try:
        measured = Measurement(folder, lengths.row, start.runtime.device)
        base = replace(base, parameters=measured.plain.parameters)
    except ValueError:  # no estimate for this family; the rehearsal tells whether it can be trained
        measured = None
    return Situation(facts, tokens, lengths, machine, base, {}), measured


def _has_template(folder: Path) -> bool:
    if any(folder.glob("chat_template*")):
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(read_json(path).get("chat_template"))


@dataclass(frozen=True)
class _Draft:
    """Choices that fit into memory."""

    case: Situation
    choices: Sequence[Choice]
    misfits: Sequence[str] = ()
    """Stages that fit by no setting, and what else to change."""


def _draft(
    case: Situation, measured: Measurement | None, folder: Path | None,
    source: Sequence[Choice], uri: str | None,
) -> _Draft:  # fmt: skip
    """Choose method and sizes by the estimate, as far as there is one."""

    def choices(case: Situation) -> list[Choice]:
        return all_choices(case, PipelineConfig(), source, uri)

    if folder is None:
        return _Draft(case, choices(case))
    if measured is None:
        why = "adapters on one base in memory; this family has no estimate"
        case = replace(case, method=adapters(four_bits=False), method_reason=why)
        return _Draft(case, choices(case))
    config = _config(choices(case))
    method, why = choose_method(config, folder, measured, case.machine, case.data.pairs)
    case = replace(case, method=method, method_reason=why)
    stages = estimate(_config(choices(case)), folder, measured)
    case = replace(case, speeds={stage.section: stage.tokens_per_second for stage in stages})
    sized = fit(_config(choices(case)), folder, measured, case.machine)
    return _Draft(case, with_memory(choices(case), sized, case.machine), sized.misfits)


def _config(choices: Sequence[Choice]) -> PipelineConfig:
    return PipelineConfig.model_validate(resolve_none(tree_of(choices)))


def _with_given(choices: Sequence[Choice], given: Mapping[str, Any]) -> list[Choice]:
    """Return choices in which what is given stands in place of what was chosen."""
    changes: dict[str, dict[str, Any]] = {}
    for field, value in given.items():
        section, _, name = field.partition(".")
        if name:
            changes.setdefault(section, {})[name] = value
    rest = [field for field in given if "." not in field]
    reason = "given to rlhf init"
    kept = [choice for choice in choices if choice.field not in rest]
    front = [Choice(field, given[field], reason) for field in rest]
    return [*front, *replaced(kept, changes, reason)]


def _head(facts: DataFacts, case: Situation) -> list[str]:
    base = f"{case.base.name} ({case.base.size})" if case.base else "a small model from scratch"
    return [
        f"Written by rlhf init for {facts.pairs:,} pairs to train on, {base}, {case.machine.name}.",
        "Each value stands below its reason. What is not here has its default: rlhf config show.",
    ]


def _loaded(text: str) -> PipelineConfig:
    """Load a configuration's text as a run does."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, FILE)
        path.write_text(text, encoding="utf-8")
        return load_config(path).config


def _check_prompts(facts: DataFacts, renderer: Renderer, config: PipelineConfig) -> None:
    """Refuse data of which a run would leave out too many prompts as too long.

    Raises:
        DataError: It says how many.
    """
    most = config.token_limits().prompt
    lost, allowed = share_lost(facts.sample, renderer, most), config.data.max_bad_fraction
    if lost > allowed:
        raise DataError(
            f"data.source: {lost:.0%} of the prompts can't be used with this base, whose context "
            f"leaves {most:,} tokens for a prompt, and data.max_bad_fraction = {allowed:g}; give a "
            "base with a longer context, or shorter prompts"
        )


def _sample(facts: DataFacts) -> Sample:
    pairs = facts.sample[:LOOKED_AT]
    return Sample(
        [Demonstration(pair.prompt, pair.chosen) for pair in pairs],
        pairs,
        [PromptRow(pair.prompt) for pair in pairs],
    )


def _slow(case: Situation, seconds: Mapping[str, float]) -> list[str]:
    """Return a sentence on a training of pairs that takes longer than a first run should."""
    longest = max(seconds.get(name, 0.0) for name in ("sft", "reward_model"))
    if longest <= LONG_SECONDS:
        return []
    total = case.data.pairs + case.data.held_out_pairs
    fewer = max(500, round(total * MOST_SECONDS / longest, -2))
    return [
        f"with all pairs the longest training takes some {longest / 3600:.0f} hours on "
        f"{case.machine.name}; --data.max_pairs={fewer} (to rlhf init, too) makes it "
        f"{MOST_SECONDS // 3600} hours, or take a GPU or a smaller base"
    ]


def _warnings(config: PipelineConfig, facts: DataFacts, case: Situation) -> list[str]:
    """Return what these data and this machine can't show or do, in sentences."""
    evaluation, held_out = config.evaluation, facts.held_out_prompts
    sizes = Sizes(
        facts.held_out_pairs, held_out, min(held_out, evaluation.prompts),
        evaluation.samples_per_prompt,
    )  # fmt: skip
    judgement = judge_sizes(facts, sizes.prompts, sizes.samples)
    lines: list[str] = []
    if judgement.is_trial:
        lines.append(
            f"{facts.held_out_pairs:,} held-out pairs of {held_out:,} prompts tell "
            f"{judgement.accuracy_in_words} from a coin, and show {judgement.win_rate_in_words}: "
            "too little to trust. The gates go by estimates, and a person approves; see this as a "
            f"trial of the flow. {ENOUGH_HELD_OUT} held-out prompts would do"
        )
    if facts.pairs < FEW_TO_LEARN:
        lines.append(
            f"{facts.pairs:,} pairs teach a style at best; reward models are trained on thousands"
        )
    if case.lengths.ends < 0.5:
        lines.append(
            f"only {case.lengths.ends:.0%} of the preferred replies end within ppo.max_new_tokens "
            f"= {case.lengths.new}: most sampled replies will be cut, and are judged by their "
            "beginning; longer ones (sft and reward_model.max_length, too) take as much more time"
        )
    if case.base and not case.base.has_template:
        lines.append(
            f"{case.base.name} has no chat template, so it has hardly learnt to answer; an "
            "instruction-tuned model needs far fewer pairs"
        )
    if case.base is None:
        lines.append("a model from scratch learns the form of replies alone; give --base for more")
    if facts.left_out:
        lines.append(f"rows left out: {facts.left_out}")
    for setting in ("sft_source", "prompts_source"):
        if getattr(config.data, setting) is not None:
            lines.append(f"data.{setting} was not counted: passes and replies go by the pairs")
    return [*lines, judge_note(facts), *facts.warnings, describe_power(config, sizes)]
