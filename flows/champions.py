"""The commands `rlhf promote`, `rlhf rollback`, `rlhf champion` and `rlhf approve`.

They show and change the champion of a model line, and record people's approvals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from flows.artifacts import ConfigOption, StoreOption
from flows.run_lookup import open_recorded
from flows.runs import records_folder
from rlhf.champions import acting_person, checked_line, record_approval
from rlhf.config import PipelineConfig, load_config
from rlhf.errors import ArtifactMissing, ConfigError
from rlhf.external import shorten
from rlhf.store import ArtifactRef, Store
from tasks.console import say
from tasks.listing import Column, JsonOption, WideOption, show_listing
from tasks.prefect_server import check_settings, prefect_server
from tasks.run_record import read_records, write_record

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from rlhf.champions import Promotion
    from tasks.run_record import RunRecord

NameOption = Annotated[
    str | None,
    Parameter(help="Model line; default: the preset's, or the store's only one, or default."),
]

#: Columns of `rlhf champion`.
CHAMPIONS = (
    Column("line", "model"),
    Column("entry", "number", wide=True, right=True),
    Column("policy", "policy", show=lambda digest: digest[:12]),
    Column("", "state"),
    Column("verdict", "verdict", wide=True, show=lambda digest: digest[:12]),
    Column("when", "when", show=lambda moment: moment[:16].replace("T", " ")),
    Column("by", "by"),
    Column("run", "run", wide=True),
    Column("why", "why"),
)
#: Characters of a run's id by which it may be approved, as of a digest.
LEAST_ID = 6

ByOption = Annotated[
    str | None, Parameter(help="Who does it; default: RLHF_USER, or the system's user name.")
]


def promote(
    policy: str, *, name: NameOption = None, why: str = "", by: ByOption = None,
    unapproved: bool = False, data: str | None = None, store: StoreOption = None,
    config: ConfigOption = None,
) -> None:  # fmt: skip
    """Make a policy the champion of a model line, if its gate said yes and it can answer.

    Parameters
    ----------
    policy
        Digest, its first 6 or more digits, a pin's name, or URI.
    why
        The reason, for the history.
    unapproved
        Promote it although its gate said no, or was never asked; needs --why.
    data
        Dataset whose held-out prompts it has to answer; default: the one it was trained on.
    """
    from rlhf import champions
    from rlhf.challenge import describe_verdict
    from rlhf.smoke import smoke_test
    from tasks.ledger import cost_of_making

    loaded, opened = _open_model_line(name, store, config, _lines_with_runs)
    line, ref = loaded.promotion.name, opened.resolve(policy)
    if ref.kind != "policy":
        raise ConfigError(f"{policy}: {ref.short} is of kind {ref.kind}; give a policy")
    if unapproved and not why.strip():
        raise ConfigError("--unapproved needs --why: the reason stands in the history")
    before = champions.champion(opened, line)
    if before and before.policy == ref.digest:
        say(f"{ref.short} is the champion of {line} already")
        return
    verdict_ref, verdict = champions.verdict_of(opened, ref.digest) or (None, None)
    approved = verdict is not None and verdict.approved
    if not approved and not unapproved:
        said = describe_verdict(verdict, None) if verdict else "no gate has judged it"
        reason = f"{said} ({verdict.reason})" if verdict else said
        raise ConfigError(
            f"{ref.short}: {reason}; to make it the champion of {line} all the same: --unapproved "
            "--why '<the reason>'"
        )
    dataset = _dataset(opened, ref, data)
    replies = smoke_test(
        opened.fetch(ref), opened.fetch(dataset), seconds=loaded.promotion.smoke_seconds,
        runtime=loaded.runtime,
    )  # fmt: skip
    entry = champions.promote(
        opened, line, ref.digest, verdict=verdict_ref.digest if verdict_ref else None,
        expected=before, why=why, by=by, unapproved=not approved,
        cost=cost_of_making(opened, verdict_ref.digest if verdict_ref else ref.digest),
    )  # fmt: skip
    said = describe_verdict(verdict, entry.previous) if verdict else "no gate has judged it"
    _print_champion(entry, f"; it answered {len(replies)} held-out prompts; {said}")


def rollback(
    *, why: str, name: NameOption = None, to: str | None = None, by: ByOption = None,
    store: StoreOption = None, config: ConfigOption = None,
) -> None:  # fmt: skip
    """Make an earlier champion the champion again; no run promotes the present one on its own then.

    Parameters
    ----------
    why
        The reason, for the history.
    to
        Digest, its first 6 or more digits, a pin's name, or URI; default: the champion before the
        present one.
    """
    from rlhf import champions

    loaded, opened = _open_model_line(name, store, config, champions.model_lines)
    target = opened.resolve(to).digest if to else None
    _print_champion(champions.rollback(opened, loaded.promotion.name, to=target, why=why, by=by))


def champion(
    *, name: NameOption = None, history: bool = False, wide: WideOption = False,
    json: JsonOption = False, store: StoreOption = None, config: ConfigOption = None,
) -> None:  # fmt: skip
    """Show the champion of a model line, or of each; who made it so, when and why.

    Parameters
    ----------
    history
        Show all champions that there were, the present one last.
    """
    check_settings()  # what follows imports Prefect
    from rlhf import champions

    loaded, opened = _open_model_line(name, store, config)
    existing = champions.model_lines(opened)
    lines = [loaded.promotion.name] if name or config else existing
    entries = {line: champions.history(opened, line) for line in lines}
    if not any(entries.values()):
        wanted = f" for model line {lines[0]!r}" if lines else ""
        others = f"; there is one of {', '.join(existing)}" if existing else ""
        raise ArtifactMissing(f"{opened.uri}: no champion{wanted}{others}")
    first = 0 if history else -1
    rows = [
        {
            **entry.model_dump(mode="json"),
            "number": entry.number,
            "state": "unapproved" if entry.unapproved else entry.action,
        }
        for each in entries.values()
        for entry in each[first:]
    ]
    show_listing(rows, CHAMPIONS, wide=wide, json=json)


def approve(
    run: str, *, refuse: bool = False, why: str = "", by: ByOption = None, name: NameOption = None,
    store: StoreOption = None, config: ConfigOption = None, work_dir: Path | None = None,
) -> None:  # fmt: skip
    """Approve of a policy, so that its run goes on and promotes it; or refuse it.

    Parameters
    ----------
    run
        A run that waits: its name, its id or the beginning of that. Or, for one that another
        machine ran without a deployment, the policy's digest, with --store or --config.
    refuse
        Say no: the run ends as Refused, and what was champion stays.
    why
        The reason, for the promotion's record.
    work_dir
        Work folder with the records of this machine's runs; as configured by default.
    """
    decided = "refused" if refuse else "approved"
    folder = records_folder(work_dir)
    here = _awaiting_here(run, folder) if store is None and config is None else None
    if here is not None and here.awaiting is not None:
        if name not in (None, here.awaiting.line):
            raise ConfigError(
                f"--name {name}: {run} waits with a policy of model line {here.awaiting.line}; "
                "leave --name out, or give the policy's digest with --store"
            )
        run, name = here.awaiting.policy, here.awaiting.line
    elif store is None and config is None:
        suspended = _suspended(run, work_dir)
        answer = "refuse" if refuse else "approve"
        # Checked as the record will be: once the run goes on, there is no way back.
        line = checked_line("--why", why)
        _resume(suspended, {"decision": answer, "by": acting_person(by), "why": line})
        say(f"{suspended.name}: {decided}; it goes on")
        return
    if here is not None:
        opened, line = open_recorded(here), name or ""
    else:
        loaded, opened = _open_model_line(name, store, config)
        line = loaded.promotion.name
    policy = opened.resolve(run)
    if policy.kind != "policy":
        raise ConfigError(f"{run}: {policy.short} is of kind {policy.kind}; give a policy")
    approval = record_approval(opened, line, policy.digest, approved=not refuse, by=by, why=why)
    if here is not None:
        reason = f"{decided} by {approval.by}; the same command goes on"
        decision = {"state": decided.capitalize(), "reason": reason, "awaiting": None}
        write_record(here.model_copy(update=decision), folder)
    say(f"{policy.short} of {line}: {decided} by {approval.by}; run the same again")


def _lines_with_runs(store: Store) -> list[str]:
    """Return the model lines that have a champion, or runs."""
    from rlhf.champions import model_lines
    from tasks.run_costs import lines

    return [*model_lines(store), *lines(store)]


def _open_model_line(
    name: str | None, store: str | None, config: Path | None,
    known: Callable[[Store], Iterable[str]] = lambda _: (),
) -> tuple[PipelineConfig, Store]:  # fmt: skip
    """Return the configuration of a model line (its `promotion.name`), and its store.

    Without a name and a preset it is the only `known` line, if there is one alone.
    """
    from rlhf.champions import line_of
    from tasks.stage import store_of

    options = {"store": store, "promotion.name": name}
    loaded = load_config(config, [f"--{key}={value}" for key, value in options.items() if value])
    opened = store_of(loaded.config)
    if name is None and config is None:
        promotion = loaded.config.promotion
        meant = {"name": line_of(promotion, sorted({*known(opened)}))}
        changed = {"promotion": promotion.model_copy(update=meant)}
        return loaded.config.model_copy(update=changed), opened
    return loaded.config, opened


def _dataset(store: Store, policy: ArtifactRef, data: str | None) -> ArtifactRef:
    """Return the dataset of the --data option, or else the policy's own."""
    parent = store.manifest(policy).parents.get("data")
    if data is None and parent is None:
        raise ConfigError(
            f"{policy.short} was trained on no dataset of this store; name one whose held-out "
            "prompts it shall answer: --data <digest>"
        )
    ref = store.resolve(data or str(parent))
    if ref.kind != "dataset":
        raise ConfigError(f"--data {data}: {ref.short} is of kind {ref.kind}; give a dataset")
    return ref


def _print_champion(entry: Promotion, more: str = "") -> None:
    instead = f" in place of {entry.previous[:12]}" if entry.previous else ""
    say(f"{entry.policy[:12]} is the champion of {entry.model}{instead}{more}")


def _awaiting_here(run: str, folder: Path) -> RunRecord | None:
    """Return the run of this machine with this name that waits for an approval, if there is one."""
    # By its whole name: a few characters could be the beginning of another run's.
    return next((r for r in read_records(folder) if r.awaiting and r.name == run), None)


def _suspended(run: str, work_dir: Path | None = None) -> FlowRun:
    """Return the one suspended run with this name or beginning of its id.

    Raises:
        ConfigError: No server is configured, or several runs match.
        ArtifactMissing: No suspended run matches.
    """
    check_settings()
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateName,
    )

    folder = records_folder(work_dir)
    here = ", ".join(record.name for record in read_records(folder) if record.awaiting) or "none"
    instead = f"; runs of {folder} that wait: {here}; or give the policy's digest with --store"
    with prefect_server(run, instead=instead) as client:
        state = FlowRunFilterState(name=FlowRunFilterStateName(any_=["Suspended"]))
        suspended = client.read_flow_runs(flow_run_filter=FlowRunFilter(state=state))
    # A few characters could be the beginning of another run than the one that is meant.
    by_id = [e for e in suspended if len(run) >= LEAST_ID and str(e.id).startswith(run.lower())]
    matches = [each for each in suspended if each.name == run] or by_id
    if not matches:
        others = ", ".join(f"{e.name} ({str(e.id)[:8]})" for e in suspended[:5]) or "none"
        raise ArtifactMissing(
            f"{run!r}: no run of this name or id (at least {LEAST_ID} characters of it) waits for "
            f"an approval; those that do: {others}"
        )
    if len(matches) > 1:
        ids = ", ".join(str(each.id) for each in matches)
        raise ConfigError(f"{run!r}: {len(matches)} runs are meant; give the id of one: {ids}")
    return matches[0]


def _resume(run: FlowRun, answer: dict[str, object]) -> None:
    with prefect_server(run.name) as client:
        response = client.resume_flow_run(run.id, run_input=answer)
    if response.status.value != "ACCEPT":
        reason = getattr(response.details, "reason", None) or response.status.value
        raise ConfigError(
            f"{run.name}: can't be resumed ({shorten(reason)}); if that stays, let it ask anew: "
            f"`prefect flow-run cancel {run.id}`, then `prefect flow-run retry {run.id}`"
        )
