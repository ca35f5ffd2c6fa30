"""The command `rlhf samples`: the held-out replies of a run or a policy, worst first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators
from rich.console import Group
from rich.rule import Rule
from rich.table import Table

from flows.artifacts import ConfigOption, StoreOption
from flows.run_lookup import open_for_run
from rlhf.errors import ConfigError
from rlhf.plain_text import one_line, printable
from rlhf.report.replies import (
    ORDERS,
    SCORERS,
    SIDES,
    Reply,
    all_replies,
    contradicted,
    lost,
    ordered,
)
from rlhf.report.text import number, number_of, text_of
from tasks.console import console, say, styled
from tasks.listing import show_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType
    from rich.text import Text

#: Replies that are shown without --n.
SHOWN = 10
#: Most characters of a text on the terminal; JSON has all of it.
LONGEST = 2000
#: Narrowest terminal, in columns, on which replies stand side by side.
WIDE = 120
#: Headings of the replies.
LABELS = {"before": "before (SFT)", "champion": "champion", "after": "after (PPO)"}


def samples(
    run: str, *, lost: bool = False, disagree: bool = False, longest: bool = False,
    all: bool = False, sort: str | None = None,
    n: Annotated[int | None, Parameter(validator=validators.Number(gte=1, lte=100_000))] = None,
    json: bool = False, work_dir: Path | None = None, store: StoreOption = None,
    config: ConfigOption = None,
) -> None:  # fmt: skip
    """Show the held-out replies of a run or a policy beside those of SFT, the worst first.

    Parameters
    ----------
    run
        A run's name, or how it begins; or a policy, an evaluation or a report: digest, its first 6
        or more digits, a pin's name, URI; champion, champion:<line>; a folder of `rlhf compare`.
    lost
        Only replies that the policy lost against SFT, by the judge, or without one the reward
        model.
    disagree
        Only replies on which reward model and judge say the opposite; without a judge, those on
        which the reward model's members differ most.
    longest
        The longest replies first.
    all
        All replies; as stored, if not sorted.
    sort
        Order: lost, reward, judge, gold, champion, disagree, members, longest or prompts.
    n
        Most replies to show; default: 10.
    json
        Print JSON, with the whole texts.
    work_dir
        Work folder with the records of this machine's runs; as configured by default.
    """
    from tasks.evaluations import evaluation_folder, find_evaluation

    given = [name for name, on in (("--lost", lost), ("--disagree", disagree),
                                   ("--longest", longest), ("--all", all)) if on]  # fmt: skip
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are both given; give one of them")
    if sort is not None and sort not in ORDERS:
        raise ConfigError(f"--sort {sort!r} is no order; choose one of {', '.join(ORDERS)}")
    found = evaluation_folder(run)
    if found is None:
        opened, name = open_for_run(run, store, config, work_dir)
        found = find_evaluation(name, opened)
    replies = all_replies(found.samples)
    chosen = _chosen(replies, given[0] if given else "", sort)
    most = len(chosen) if n is None and (all or json) else (n or SHOWN)
    if json:
        show_json([_as_json(reply) for reply in chosen[:most]])
        return
    _summarise(found.label, replies, len(chosen), given)
    for number_, reply in enumerate(chosen[:most], 1):
        console.print(_card(number_, reply, console.width))
    if len(chosen) > most:
        say(f"{len(chosen) - most:,} more: --n {len(chosen)} or --all shows them, --json too")


def _chosen(replies: Sequence[Reply], which: str, sort: str | None) -> list[Reply]:
    """Return the replies that an option selects, in its order or another one."""
    selections: Mapping[str, Callable[[Sequence[Reply]], list[Reply]]] = {
        "--lost": lost, "--disagree": contradicted, "--all": list,
        "--longest": lambda rows: ordered(rows, "longest"), "": lambda rows: ordered(rows, "lost"),
    }  # fmt: skip
    chosen = selections[which](replies)
    return ordered(chosen, sort) if sort else chosen


def _summarise(label: str, replies: Sequence[Reply], chosen: int, given: Sequence[str]) -> None:
    """Print how many replies there are, and how many of them were lost."""
    if not replies:
        say(f"{label}: the evaluation has no replies")
        return
    by = "the judge" if replies[0].decided_by == "judge" else "the reward model"
    gains = [gain for reply in replies if (gain := reply.gain) is not None]
    worse, equal = sum(gain < 0 for gain in gains), sum(gain == 0 for gain in gains)
    prompts = sum(reply.sample == 1 for reply in replies)
    say(
        f"{label}: {prompts:,} held-out prompts, {len(replies):,} replies; by {by} "
        f"{worse:,} are worse than SFT's, {equal:,} as good"
    )
    if given and given[0] not in ("--all", "--longest"):
        say(f"{given[0]}: {chosen:,} of {len(replies):,}")


def _card(place: int, reply: Reply, width: int) -> Group:
    """Return a reply beside those of the other policies, or below them on a narrow terminal."""
    row = reply.row
    head = [f"{place}. "]
    if reply.gain is not None:
        by = "judge" if reply.decided_by == "judge" else "reward model"
        head.append(f"{_signed(reply.gain)} by the {by}")
    if reply.samples > 1:
        head.append(f"  sample {reply.sample} of {reply.samples}")
    if row.get("group"):
        head.append(f"  {one_line(row['group'])[:40]}")
    sides = [side for side in SIDES if row.get(side) is not None]
    parts: list[RenderableType] = [
        Rule("".join(head), align="left", style="dim"),
        styled((_cut(text_of(row["prompt"])), "bold")),
    ]
    if width >= WIDE:
        table = Table(
            *(LABELS[side] for side in sides), expand=True, box=None, padding=(0, 2, 0, 0)
        )
        for column in table.columns:
            column.ratio, column.overflow = 1, "fold"
        table.add_row(*(_shown(row[side]) for side in sides))
        table.add_row(*(_scores(row, side) for side in sides), style="dim")
        parts.append(table)
    else:
        for side in sides:
            parts += [
                styled((f"{LABELS[side]}  ", "underline"), (_scores(row, side), "dim")),
                _shown(row[side]),
            ]
    return Group(*parts)


def _shown(text: Any) -> Text:
    return styled(_cut(str(text))) if str(text).strip() else styled(("(empty reply)", "dim"))


def _cut(text: str) -> str:
    if len(text) <= LONGEST:
        return printable(text)
    return f"{printable(text[:LONGEST])}… ({len(text) - LONGEST:,} more characters; --json)"


def _scores(row: Mapping[str, Any], side: str) -> str:
    scores = [(name, row.get(f"{name}_{side}")) for name in SCORERS]
    if side == "after":
        scores.append(("members differ", row.get("disagreement")))
    return "  ".join(
        f"{name} {number(value)}" for name, value in scores if number_of(value) is not None
    )


def _signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)


def _as_json(reply: Reply) -> dict[str, Any]:
    row = {key: value for key, value in reply.row.items() if key != "kinds"}
    return {
        **row, "sample": reply.sample, "gain": reply.gain, "decided_by": reply.decided_by,
        "characters": reply.length,
    }  # fmt: skip
