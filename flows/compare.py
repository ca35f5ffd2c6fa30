"""The command `rlhf compare`: two policies, or two reward models, on the same held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
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
from rlhf.errors import ConfigError, DataError
from rlhf.files import exists, expand_home, is_dir, write_json
from rlhf.plain_text import one_line
from rlhf.report.reward_model import reward_model_lines
from rlhf.report.text import MISSING, figure, figure_range
from tasks.console import say
from tasks.listing import print_listing
from tasks.model_options import DEFAULT_OPTIONS, ModelOptions

if TYPE_CHECKING:
    from rlhf.data.rows import PromptRow
    from rlhf.store import Store
    from tasks.models import NamedModel

#: Rows that are shown.
SHOWN = 3
COLOURS = {"better": "green", "worse": "red", "undecided": "yellow"}


def compare(
    a: str, b: str, *, prompts: Path | None = None, data: str | None = None,
    out: Path | None = None, report: Path | None = None,
    options: ModelOptions = DEFAULT_OPTIONS, store: StoreOption = None, config: ConfigOption = None,
) -> None:  # fmt: skip
    """Compare two policies, or two reward models: is b better than a?

    Parameters
    ----------
    a
        Digest, its first 6 or more digits, a pin's name, URI, champion:<line>, or a local folder.
    b
        Likewise.
    prompts
        File of prompts that both policies answer; default: the gate prompts of a's evaluation, or
        of b's, or else the held-out ones of b's dataset.
    data
        Dataset (artifact or folder) whose held-out prompts or pairs are used.
    out
        New folder for evaluation.json and samples.json.
    report
        HTML file of the report; default: a new one in the folder of the runs' reports.
    """
    from tasks.models import POLICY, find_model, require_kind

    if prompts is not None and data is not None:
        raise ConfigError("--prompts and --data both name prompts; give one of them")
    _check_folder(out)
    check_file("--report", report)
    runtime, opened = open_for_models(store, config)
    before, after = find_model(a, opened), find_model(b, opened)
    if before.folder.resolve() == after.folder.resolve():
        raise ConfigError(f"{a} and {b} are the same model; give two")
    if before.kind != after.kind:
        require_kind(after, before.kind, f"a comparison with {before.label}")
    if after.kind == POLICY:
        evaluation, replies = _compare_policies(
            before, after, prompts, data, options, runtime, opened
        )
    else:
        if prompts is not None:
            raise ConfigError("--prompts is for policies; reward models need --data")
        options.refuse("in a comparison of reward models", "max_length", "limit")
        evaluation, replies = _compare_reward_models(before, after, data, options, runtime, opened)
    for note in evaluation["notes"]:
        say(f"note: {note}")
    say(evaluation["sentence"], COLOURS[evaluation["verdict"]])
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "evaluation.json", evaluation)
        write_json(out / "samples.json", replies)
        say(f"written: {out}")
    say(f"report: {_write_report(evaluation, replies, report, runtime)}")


def _compare_policies(
    a: NamedModel, b: NamedModel, prompts: Path | None, data: str | None, options: ModelOptions,
    runtime: RuntimeConfig, store: Store,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    from rlhf.evaluation.compare import Scorers, compare_policies
    from rlhf.modeling.device import prepare_device
    from tasks.models import known_prompts, load_scorer

    scoring, notes = _scoring_models(a, b, options.judge, store)
    seen = known_prompts((a, b), store)
    rows, source, more = _prompts(a, b, prompts, data, seen, store)
    rows, unseen = _never_trained_on(rows, (a, b), seen)
    device = prepare_device(runtime)
    scorers = Scorers(
        **{n: load_scorer(m, device, options.max_length, store) for n, m in scoring.items()}
    )
    policies, plan = load_policies([a, b], device, options, store)
    with progress_of("sample, score") as progress:
        found, replies = compare_policies(
            policies[0], policies[1], rows[: options.limit], scorers, progress
        )
    notes += more + unseen + _counts("prompts left out", found["prompts_left_out"])
    decided = scoring[found["decided_by"]]
    word = "judge" if decided.judge is not None else "reward model"
    found["sentence"] += f", by {word} {decided.label}"
    evaluation = {
        **found, "a": a.facts, "b": b.facts, "sampling": plan, "notes": notes,
        "prompts_from": source,
        "scorers": {name: model.facts for name, model in scoring.items()},
    }  # fmt: skip
    _show_policies(a, b, evaluation)
    say(f"prompts: {found['n']:,}, {source}")
    lost = [row for row in replies if _change(row, found["decided_by"]) < 0]
    columns = {"prompt": "prompt", "before": "a replies", "after": "b replies"}
    sides = (f"{found['decided_by']}_{side}" for side in ("before", "after"))
    _show_rows("b lost most on", columns, lost, *sides)
    return evaluation, replies


def _scoring_models(
    a: NamedModel, b: NamedModel, by: str | None, store: Store
) -> tuple[dict[str, NamedModel], list[str]]:
    """Return the models that score replies, `reward` and `judge`, and remarks on them.

    Raises:
        ConfigError: There is none.
    """
    from tasks.models import judge_of, reward_model_of, reward_model_ref

    notes: list[str] = []
    reason = ""
    if by is not None:
        judge = named_judge(by, store)
    else:
        judge, reason = judge_of(b, store)
    reward = reward_model_of(b, store)
    for name, model in {"a": a, "b": b}.items():
        ref = reward_model_ref(model, store)
        if judge and judge.ref and ref and ref.digest == judge.ref.digest:
            notes.append(
                f"{name} was trained on {judge.label}, which judges it here, and may exploit it"
            )
    if reward is not None and judge is not None and reward.folder == judge.folder:
        reward = None
    if judge is None:
        if reward is None:
            raise ConfigError(
                f"{b.text}: its lineage has neither a judge nor a reward model; name one: "
                "--judge <artifact or folder>"
            )
        notes.append(
            f"b was trained on reward model {reward.label}, which decides, and may exploit it "
            f"({reason}); name another by --judge"
        )
    scoring = {"reward": reward, "judge": judge}
    return {name: model for name, model in scoring.items() if model is not None}, notes


def _compare_reward_models(
    a: NamedModel, b: NamedModel, data: str | None, options: ModelOptions, runtime: RuntimeConfig,
    store: Store,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    from rlhf.data.rows import PAIRS_EVAL, Pair, read_rows
    from rlhf.evaluation.compare import compare_reward_models
    from rlhf.modeling.device import prepare_device
    from tasks.models import known_prompts, load_scorer

    folder, name = _dataset(b, data, store, "--data <dataset>")
    pairs = read_rows(folder / PAIRS_EVAL, Pair)
    pairs, notes = _never_trained_on(pairs, (a, b), known_prompts((a, b), store))
    device = prepare_device(runtime)
    scorers = [load_scorer(model, device, options.max_length, store) for model in (a, b)]
    with progress_of("score") as progress:
        found, rows = compare_reward_models(
            scorers[0], scorers[1], pairs[: options.limit], progress
        )
    notes += _counts("pairs left out", found["pairs_left_out"])
    evaluation = {
        **found, "a": a.facts, "b": b.facts, "notes": notes, "pairs_from": f"held-out pairs {name}"
    }  # fmt: skip
    _show_reward_models(a, b, evaluation)
    columns = {name: name for name in ("prompt", "chosen", "rejected")}
    _show_rows("they disagree most on", columns, rows, "margin_before", "margin_after")
    return evaluation, rows


def _write_report(
    evaluation: Mapping[str, Any], replies: list[dict[str, Any]], file: Path | None,
    runtime: RuntimeConfig,
) -> Path:  # fmt: skip
    """Write the page, by default beside the runs' pages under a name of its content."""
    from rlhf.report.comparison import render_comparison
    from rlhf.report.index import write_index
    from rlhf.store.manifest import canonical_json, sha256_bytes

    if file is None:
        folder = expand_home(runtime.report_dir)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"compare-{sha256_bytes(canonical_json(evaluation))[:10]}.html"
        file.write_text(render_comparison(evaluation, replies), encoding="utf-8")
        write_index(folder)
    else:
        file.write_text(render_comparison(evaluation, replies), encoding="utf-8")
    return file.resolve()


def _prompts(
    a: NamedModel, b: NamedModel, prompts: Path | None, data: str | None, seen: Set[str],
    store: Store,
) -> tuple[list[PromptRow], str, list[str]]:  # fmt: skip
    """Return the prompts that are named, or else of a gate or of b's dataset; whose; remarks."""
    from rlhf.data.prompt_file import read_prompt_file
    from rlhf.data.rows import PROMPTS_EVAL, PromptRow, read_rows
    from tasks.models import gate_prompts_of

    if prompts is not None:
        read = read_prompt_file(prompts)
        left_out = _counts("rows left out", read.left_out)
        return read.prompts, f"of the file {prompts.name}", [*read.notes, *left_out]
    notes: list[str] = []
    if data is None:
        found, notes = gate_prompts_of((a, b), seen, store)
        if found is not None:
            side = "a" if found.policy is a else "b"
            source = f"the gate prompts of {side}'s evaluation {found.evaluation.short}"
            return found.rows, source, notes
    folder, name = _dataset(b, data, store, "--prompts <file>")
    return read_rows(folder / PROMPTS_EVAL, PromptRow), f"held-out prompts {name}", notes


def _dataset(b: NamedModel, data: str | None, store: Store, cure: str) -> tuple[Path, str]:
    """Return the folder of the dataset that is named, or else of b's; and which it is.

    Raises:
        ConfigError: There is none.
    """
    from tasks.models import DATASET, dataset_of

    if data is not None and is_dir(Path(data)):
        return Path(data), f"of the folder {data}"
    ref = dataset_of(b, store) if data is None else store.resolve(data)
    if ref is None:
        raise ConfigError(f"{b.text}: its lineage has no dataset; name what to compare on: {cure}")
    if ref.kind != DATASET:
        raise ConfigError(f"--data {data}: {ref.short} is of kind {ref.kind}; give a dataset")
    owner = "b's" if data is None else "the"
    return store.fetch(ref), f"of {owner} dataset {ref.short}"


def _never_trained_on(
    rows: Sequence[Any], models: Sequence[NamedModel], seen: Set[str]
) -> tuple[list[Any], list[str]]:
    """Return the rows whose prompt no model knows from its training, and remarks.

    Raises:
        DataError: None is left.
    """
    from rlhf.data.chat import loose_key

    unseen = [row for row in rows if loose_key(row.prompt) not in seen]
    count = len(rows) - len(unseen)
    if not unseen:
        raise DataError(
            f"one of the models was trained on the prompts of all {count:,} rows, or chosen by "
            "them; give others"
            if count
            else "there are no held-out rows to compare on; give others by --prompts or --data"
        )
    said = f"{count:,} rows are left out: a model was trained on their prompts, or chosen by them"
    notes = [said] if count else []
    for model in models:
        if model.ref is None:
            notes.append(f"what {model.text} was trained on is not known")
    return unseen, notes


def _check_folder(out: Path | None) -> None:
    """Refuse a folder for results that holds something else.

    Raises:
        ConfigError: It is a file, or not empty.
    """
    if out is not None and exists(out) and (not is_dir(out) or any(out.iterdir())):
        raise ConfigError(f"--out {str(out)!r}: is there already; name a new folder")


def _show_policies(a: NamedModel, b: NamedModel, evaluation: Mapping[str, Any]) -> None:
    part = evaluation["sampled"]
    table = Table(title=f"a = {a.label}, b = {b.label}", title_justify="left")
    for name in ("", "a", "b", "b against a", "95 % interval"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, rate in (("judge", "judge_win_rate"), ("reward", "win_rate")):
        if rate in part:
            table.add_row(f"win rate by {name}", "", "", *interval(part, rate))
    for name in ("judge", "reward"):
        if f"{name}_difference" in part:
            sides = (figure(part[f"{name}_{side}"], ".3f") for side in ("before", "after"))
            table.add_row(name, *sides, *interval(part, f"{name}_difference"))
    for name in ("gap", "kl", "kl_exact"):
        if name in part:
            table.add_row(name, "", "", *interval(part, name))
    for shift in evaluation["shifts"]:
        bounds = figure_range(shift["low"], shift["high"], ".3f", " to ") or MISSING
        table.add_row(
            shift["metric"], figure(shift["before"], ".3f"), figure(shift["after"], ".3f"),
            figure(shift["difference"], "+.3f"), bounds,
            style="bold" if shift["significant"] else "",
        )  # fmt: skip
    print_listing(table, table)
    if found := evaluation.get("over_optimisation"):
        say(f"over-optimised: {found['state']} ({found['evidence']})")
    _show_groups(part["by_group"], evaluation["verdict_metric"])


def _show_reward_models(a: NamedModel, b: NamedModel, evaluation: Mapping[str, Any]) -> None:
    table = Table("", "value", "95 % interval", title=f"a = {a.label}, b = {b.label}",
                  title_justify="left")  # fmt: skip
    for label, name in (
        ("accuracy of a", "accuracy_before"), ("accuracy of b", "accuracy_after"),
        ("difference", "accuracy_difference"), ("same choice", "agreement"),
    ):  # fmt: skip
        table.add_row(label, *interval(evaluation, name))
    for label, name in (
        ("both right", "both_right"), ("only a right", "only_before_right"),
        ("only b right", "only_after_right"), ("neither", "neither_right"),
    ):  # fmt: skip
        table.add_row(label, f"{evaluation[name]:,}", "")
    print_listing(table, table)
    for side, label in (("before", "a"), ("after", "b")):
        for line in reward_model_lines(evaluation["reports"][side]):
            say(f"{label}: {line}")
    _show_groups(evaluation["by_group"], evaluation["verdict_metric"])


def _show_groups(groups: Mapping[str, Mapping[str, Any]], metric: str) -> None:
    if not groups:
        return
    table = Table("group", metric.replace("_", " "), "95 % interval", "n")
    for group, part in sorted(groups.items()):
        table.add_row(one_line(group), *interval(part, metric), f"{part['n']:,}")
    print_listing(table, table)


def _show_rows(
    title: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]], *numbers: str
) -> None:
    """Print the first rows: columns of text with their titles, and a number of each model."""
    if not rows:
        return
    what = numbers[0].partition("_")[0]
    table = Table(*columns.values(), f"{what} a", f"{what} b", title=title, title_justify="left")
    for row in rows[:SHOWN]:
        texts = [excerpt(row[name]) for name in columns]
        table.add_row(*texts, *(figure(row[name], ".2f") for name in numbers))
    print_listing(table, table)


def _change(row: Mapping[str, Any], scorer: str) -> float:
    return row[f"{scorer}_after"] - row[f"{scorer}_before"]


def _counts(what: str, reasons: Mapping[str, int]) -> list[str]:
    parts = ", ".join(f"{count:,} × {reason}" for reason, count in reasons.items())
    return [f"{what}: {parts}"] if parts else []
