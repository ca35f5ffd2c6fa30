"""The command `rlhf judge`: scores of a reward model on a suite, or of a policy's replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from flows.artifacts import ConfigOption, StoreOption
from flows.models import (
    check_file,
    excerpt,
    interval,
    load_policies,
    named_judge,
    open_for_models,
    progress_of,
)
from rlhf.config import RuntimeConfig
from rlhf.errors import ConfigError
from rlhf.files import write_json
from rlhf.plain_text import counted, one_line
from rlhf.report.text import figure
from tasks.console import console, say
from tasks.listing import print_listing
from tasks.model_options import DEFAULT_OPTIONS, SUITE_LENGTH, ModelOptions

if TYPE_CHECKING:
    from rlhf.store import Store
    from tasks.models import NamedModel

#: Replies that are shown, the best and the worst of them.
SHOWN = 2


def judge(
    model: str, *, suite: Path | None = None, prompts: Path | None = None, out: Path | None = None,
    options: ModelOptions = DEFAULT_OPTIONS, store: StoreOption = None, config: ConfigOption = None,
) -> None:  # fmt: skip
    """Score a reward model on a public suite, or the replies of a policy to prompts.

    Parameters
    ----------
    model
        Digest, its first 6 or more digits, a pin's name, URI, champion:<line>, or a local folder.
    suite
        Folder with the files of RewardBench 2, RewardBench or RM-Bench, for a reward model.
    prompts
        File of prompts (CSV, JSON, JSON lines, Parquet; .txt has one a line), for a policy.
    out
        JSON file for the results, of a policy with all replies.
    """
    from tasks.models import POLICY, REWARD_MODEL, find_model, require_kind

    if (suite is None) == (prompts is None):
        raise ConfigError(
            "give either --suite <folder>, for a reward model, or --prompts <file>, for a policy"
        )
    check_file("--out", out)
    runtime, opened = open_for_models(store, config)
    found = find_model(model, opened)
    if suite is not None:
        options.refuse("with --suite", "max_length")
        require_kind(found, REWARD_MODEL, "--suite")
        result = _judge_suite(found, suite, options.max_length or SUITE_LENGTH, runtime, opened)
    else:
        assert prompts is not None
        require_kind(found, POLICY, "--prompts")
        scoring = _scorer_for(found, options.judge, opened)
        result = _judge_replies(found, prompts, scoring, options, runtime, opened)
    if out is not None:
        write_json(out, result)
        say(f"written: {out}")


def _judge_suite(
    model: NamedModel, folder: Path, max_length: int, runtime: RuntimeConfig, store: Store
) -> dict[str, Any]:
    """Score a reward model on a suite, and print the scores."""
    from rlhf.evaluation.suites import read_suite

    suite = read_suite(folder)  # before the model is loaded
    from rlhf.evaluation.suite_scores import evaluate_suite
    from rlhf.modeling.device import prepare_device
    from tasks.models import load_scorer

    scorer = load_scorer(model, prepare_device(runtime), max_length, store)
    with progress_of(f"{suite.layout}: replies") as progress:
        result = {"model": model.facts, **evaluate_suite(suite, scorer, progress)}
    console.print(_suite_table(model, result))
    rows = result["rows"]
    left_out = [f"{count:,} × {reason}" for reason, count in rows["left_out"].items()]
    say(f"{rows['used']:,} of {rows['read']:,} rows used" + _joined("; left out: ", left_out))
    for note in result["notes"]:
        say(f"note: {note}")
    if model.judge is not None and not model.judge.usable:
        say(f"warning: judge {model.label} is not usable ({model.judge.reason})", "yellow")
    return result


def _suite_table(model: NamedModel, result: Mapping[str, Any]) -> Table:
    levels = [name for name in ("hard", "normal", "easy") if name in result["overall"]]
    table = Table(title=f"{result['suite']}: {model.label}", title_justify="left")
    table.add_column("part", no_wrap=True)
    for name in ("score", "95 % interval", *levels, "chance", "rows"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, values in result["groups"].items():
        chance = figure(values["chance"], ".2f") if "chance" in values else ""
        table.add_row(*_suite_cells(name, values, levels), chance, f"{values['n']:,}")
    table.add_section()
    for name, values in result.get("sections", {}).items():
        table.add_row(*_suite_cells(name, values, levels), "", "")
    if result["overall"]:
        table.add_row(*_suite_cells("overall", result["overall"], levels), "", "", style="bold")
    return table


def _suite_cells(name: str, values: Mapping[str, Any], levels: Sequence[str]) -> list[str]:
    scores = (figure(values[level], ".3f") for level in levels)
    return [one_line(name), *interval(values, "score"), *scores]


def _scorer_for(policy: NamedModel, by: str | None, store: Store) -> tuple[NamedModel, str]:
    """Return the model that scores a policy's replies, and why it is that one.

    Raises:
        ConfigError: None is named, and the policy's lineage has none.
    """
    from tasks.models import scorer_of

    if by is not None:
        return named_judge(by, store), "named by --judge"
    found = scorer_of(policy, store)
    if found is None:
        raise ConfigError(
            f"{policy.text}: its lineage has neither a judge nor a reward model; name one: "
            "--judge <artifact or folder>"
        )
    return found


def _judge_replies(
    policy: NamedModel, file: Path, scoring: tuple[NamedModel, str], options: ModelOptions,
    runtime: RuntimeConfig, store: Store,
) -> dict[str, Any]:  # fmt: skip
    """Score a policy's replies to the prompts of a file, and print the means."""
    from rlhf.data.prompt_file import read_prompt_file

    read = read_prompt_file(file)
    from rlhf.evaluation.compare import judge_policy
    from rlhf.modeling.device import prepare_device
    from tasks.models import load_scorer

    scorer_model, why = scoring
    device = prepare_device(runtime)
    scorer = load_scorer(scorer_model, device, options.max_length, store)
    answering, plan = load_policies([policy], device, options, store)
    with progress_of("sample, score") as progress:
        scores = judge_policy(answering[0], read.prompts[: options.limit], scorer, progress)
    table = Table("", "mean", "95 % interval", title=f"replies of {policy.label}",
                  title_justify="left")  # fmt: skip
    for name in ("score", "tokens", "eos_rate", "repetition", "refusal", "entropy"):
        if name in scores:
            table.add_row(name, *interval(scores, name, 1 if name == "tokens" else 3))
    print_listing(table, table)
    _show_extremes(scores["replies"])
    left_out = {**read.left_out, **scores["prompts_left_out"]}
    counts = [f"{count:,} × {reason}" for reason, count in left_out.items()]
    say(
        f"{counted(scores['n'], 'reply', 'replies')} to {counted(scores['prompts'], 'prompt')}"
        + _joined("; left out: ", counts)
    )
    for note in read.notes:
        say(f"note: {note}")
    say(f"scored by {scorer_model.label}, {why}")
    judge_facts = {**scorer_model.facts, "why": why}
    return {
        **scores, "policy": policy.facts, "judge": judge_facts, "prompts_left_out": left_out,
        "notes": [*read.notes], "sampling": plan,
    }  # fmt: skip


def _show_extremes(replies: Sequence[Mapping[str, Any]]) -> None:
    ordered = sorted(replies, key=lambda reply: reply["score"])
    shown = ordered if len(ordered) <= 2 * SHOWN else [*ordered[:SHOWN], *ordered[-SHOWN:]]
    table = Table("score", "prompt", "reply", title="lowest and highest", title_justify="left")
    for reply in shown:
        cells = (figure(reply["score"], ".2f"), excerpt(reply["prompt"]), excerpt(reply["reply"]))
        table.add_row(*cells)
    print_listing(table, table)


def _joined(before: str, parts: Sequence[str]) -> str:
    return before + ", ".join(parts) if parts else ""
