"""The command `rlhf judge`: scores of a reward model on a suite, or of a policy's replies."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from flows.artifacts import ConfigOption, StoreOption
from rlhf.config import RuntimeConfig, apply_machine_settings, load_config
from rlhf.errors import ConfigError, RLHFError
from rlhf.files import write_json
from rlhf.stage import Progress

if TYPE_CHECKING:
    from rlhf.modeling.reward import Scorer
    from rlhf.store import Store
    from tasks.models import NamedModel

console = Console()
#: Most tokens of prompt and reply in a suite, as in the suites' own evaluations.
SUITE_LENGTH = 2048
#: Most tokens of a reply where the policy's training does not tell.
NEW_TOKENS = 128
#: Replies that are shown, the best and the worst of them.
SHOWN = 2
SHOWN_CHARS = 300

Positive = Annotated[int | None, Parameter(validator=validators.Number(gte=1))]
NewTokens = Annotated[
    int | None,
    Parameter(
        validator=validators.Number(gte=1),
        help=f"Most tokens of a reply; default: those of the policy's training, or {NEW_TOKENS}.",
    ),
]
Samples = Annotated[
    int, Parameter(validator=validators.Number(gte=1), help="Replies to each prompt.")
]
Temperature = Annotated[
    float, Parameter(validator=validators.Number(gte=0), help="Of sampling; 0 is greedy.")
]


def judge(
    model: str, *, suite: Path | None = None, prompts: Path | None = None,
    by: Annotated[str | None, Parameter(name="--judge")] = None, out: Path | None = None,
    samples: Samples = 1, temperature: Temperature = 1.0, max_new_tokens: NewTokens = None,
    max_length: Positive = None, limit: Positive = None, seed: int = 0,
    store: StoreOption = None, config: ConfigOption = None,
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
    by
        Judge or reward model that scores a policy's replies; default: the judge of the policy's
        lineage, or else its reward model.
    out
        JSON file for the results, of a policy with all replies.
    max_length
        Most tokens that the scoring model is given; default: those of its training for a policy's
        replies, and 2048 for a suite, if it reads as many.
    limit
        Answer at most this many of the prompts.
    seed
        Seed of the replies.
    """
    from tasks.models import POLICY, REWARD_MODEL, find_model, require_kind

    if (suite is None) == (prompts is None):
        raise ConfigError(
            "give either --suite <folder>, for a reward model, or --prompts <file>, for a policy"
        )
    check_out(out)
    runtime, opened = open_for_models(store, config)
    found = find_model(model, opened)
    if suite is not None:
        if by is not None:
            raise ConfigError("--judge is for a policy's replies; leave it out with --suite")
        require_kind(found, REWARD_MODEL, "--suite")
        result = _judge_suite(found, suite, max_length or SUITE_LENGTH, runtime, opened)
    else:
        assert prompts is not None
        require_kind(found, POLICY, "--prompts")
        scorer, why = _scorer_for(found, by, opened)
        options = {
            "samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens,
            "seed": seed,
        }  # fmt: skip
        result = _judge_replies(
            found, prompts, limit, (scorer, why), max_length, options, runtime, opened
        )
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
        chance = f"{values['chance']:.2f}" if "chance" in values else ""
        table.add_row(*_suite_cells(name, values, levels), chance, f"{values['n']:,}")
    table.add_section()
    for name, values in result.get("sections", {}).items():
        table.add_row(*_suite_cells(name, values, levels), "", "")
    if result["overall"]:
        table.add_row(*_suite_cells("overall", result["overall"], levels), "", "", style="bold")
    return table


def _suite_cells(name: str, values: Mapping[str, Any], levels: Sequence[str]) -> list[Text]:
    cells = [name, *interval(values, "score"), *(f"{values[level]:.3f}" for level in levels)]
    return [Text(cell) for cell in cells]


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


def named_judge(text: str, store: Store) -> NamedModel:
    """Return the judge or reward model that the option --judge names.

    Raises:
        ConfigError: It is a policy, or a judge that may be no better than a coin.
    """
    from tasks.models import REWARD_MODEL, find_model, require_kind

    found = require_kind(find_model(text, store), REWARD_MODEL, "--judge")
    if found.judge is not None and not found.judge.usable:
        raise ConfigError(
            f"--judge {text}: this judge is not usable ({found.judge.reason}); name another"
        )
    return found


def _judge_replies(
    policy: NamedModel, file: Path, limit: int | None, scoring: tuple[NamedModel, str],
    max_length: int | None, options: Mapping[str, Any], runtime: RuntimeConfig, store: Store,
) -> dict[str, Any]:  # fmt: skip
    """Score a policy's replies to the prompts of a file, and print the means."""
    from rlhf.data.prompt_file import read_prompt_file

    read = read_prompt_file(file)
    from rlhf.evaluation.compare import judge_policy
    from rlhf.modeling.device import prepare_device

    scorer_model, why = scoring
    device = prepare_device(runtime)
    scorer = load_scorer(scorer_model, device, max_length, store)
    answering, plan = load_policies([policy], device, options, store)
    with progress_of("sample, score") as progress:
        scores = judge_policy(answering[0], read.prompts[:limit], scorer, progress)
    table = Table("", "mean", "95 % interval", title=f"replies of {policy.label}",
                  title_justify="left")  # fmt: skip
    for name in ("score", "tokens", "eos_rate", "repetition", "refusal", "entropy"):
        if name in scores:
            table.add_row(name, *interval(scores, name, 1 if name == "tokens" else 3))
    console.print(table)
    _show_extremes(scores["replies"])
    left_out = {**read.left_out, **scores["prompts_left_out"]}
    counts = [f"{count:,} × {reason}" for reason, count in left_out.items()]
    say(
        f"{scores['n']:,} replies to {scores['prompts']:,} prompts"
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
        cells = (f"{reply['score']:.2f}", excerpt(reply["prompt"]), excerpt(reply["reply"]))
        table.add_row(*map(Text, cells))
    console.print(table)


def load_scorer(model: NamedModel, device: Any, max_length: int | None, store: Store) -> Scorer:
    """Load a reward model or judge with the token limits of its training, or with those given.

    Raises:
        ConfigError: It or its tokenizer can't be loaded.
    """
    from rlhf.modeling.pretrained import loading_error
    from rlhf.modeling.reward import Scorer
    from tasks.models import limits_of

    limits = None if max_length else limits_of(model, store)
    try:
        return Scorer(model.folder, device, limits or max_length or SUITE_LENGTH)
    except RLHFError:
        raise
    except (OSError, ValueError) as error:  # transformers' own
        raise loading_error(model.text, error) from error


def load_policies(
    models: Sequence[NamedModel], device: Any, options: Mapping[str, Any], store: Store
) -> tuple[list[Any], dict[str, Any]]:
    """Load policies that reply as the last one was trained to; return them, and how they reply."""
    from dataclasses import asdict

    from rlhf.evaluation.replies import Policy, SamplingPlan
    from tasks.models import limits_of, reply_settings

    new_tokens, stops = reply_settings(models[-1], store)
    given = {name: value for name, value in options.items() if value is not None}
    settings = {"max_new_tokens": new_tokens or NEW_TOKENS, "stop_sequences": stops, **given}
    plan = SamplingPlan(**settings)
    policies = [Policy(m.folder, device, plan, limits_of(m, store)) for m in models]
    facts = asdict(plan)
    del facts["batch_size"]
    return policies, {**facts, "stop_sequences": list(stops)}


def open_for_models(store: str | None, config: Path | None) -> tuple[RuntimeConfig, Store]:
    """Open a store, and return it with the settings of this machine."""
    from tasks.stage import store_of

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    loaded = load_config(config, [f"--store={store}"] if store else []).config
    return apply_machine_settings(loaded).runtime, store_of(loaded)


def check_out(out: Path | None) -> None:
    """Refuse a file for results that can't be written, before anything is computed.

    Raises:
        ConfigError: It is a folder, or its folder does not exist.
    """
    if out is None:
        return
    if out.is_dir():
        raise ConfigError(f"--out {str(out)!r}: is a folder; name a file")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {str(out)!r}: its folder does not exist; make it first")


@contextmanager
def progress_of(label: str) -> Iterator[Progress]:
    """Show a transient bar for a computation, if the console is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(label, total=None)

        def update(step: int, total: int, metrics: Mapping[str, float]) -> None:
            bars.update(task, completed=step, total=total)

        yield update


def interval(values: Mapping[str, Any], name: str, digits: int = 3) -> tuple[str, str]:
    """Return a metric and its 95 % interval as text; a dash where it is missing."""
    low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
    shown = f"{values[name]:.{digits}f}" if values.get(name) is not None else "–"
    known = low is not None and high is not None
    return shown, f"{low:.{digits}f} to {high:.{digits}f}" if known else "–"


def excerpt(value: Any) -> str:
    """Return the beginning of a text, or of a chat's last turn, on few printable characters."""
    text = value if isinstance(value, str) else value[-1]["content"]
    shown = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= SHOWN_CHARS else f"{shown[:SHOWN_CHARS]}…"


def say(text: str, style: str = "") -> None:
    """Print a line as it is."""
    console.print(Text(text, style), soft_wrap=True)


def _joined(before: str, parts: Sequence[str]) -> str:
    return before + ", ".join(parts) if parts else ""
