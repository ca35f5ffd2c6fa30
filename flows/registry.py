"""`rlhf promote | rollback | champion`: which policy is champion, and changing that by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console

from flows.artifacts import ConfigOption, StoreOption
from rlhf.config import PipelineConfig, load_config
from rlhf.errors import ArtifactMissing, ConfigError
from rlhf.store import ArtifactRef, Store

if TYPE_CHECKING:
    from rlhf.registry import Promotion

console = Console()

NameOption = Annotated[
    str | None, Parameter(help="Model line; default: the preset's promotion.name, or default.")
]
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
    from rlhf import registry
    from rlhf.smoke import smoke_test

    loaded, opened = opened_line(name, store, config)
    line, ref = loaded.promotion.name, opened.resolve(policy)
    if ref.kind != "policy":
        raise ConfigError(f"{policy}: {ref.short} is of kind {ref.kind}; give a policy")
    if unapproved and not why.strip():
        raise ConfigError("--unapproved needs --why: the reason stands in the history")
    before = registry.champion(opened, line)
    if before and before.policy == ref.digest:
        console.print(f"{ref.short} is the champion of {line} already", highlight=False)
        return
    found = registry.verdict_of(opened, ref.digest)
    approving = found is not None and found[1].approved
    if not approving and not unapproved:
        said = f"{found[1].gate} said no ({found[1].reason})" if found else "no gate has judged it"
        raise ConfigError(
            f"{ref.short}: {said}; to promote it all the same: --unapproved --why '<the reason>'"
        )
    asked = _dataset(opened, ref, data)
    replies = smoke_test(
        opened.fetch(ref), opened.fetch(asked), seconds=loaded.promotion.smoke_seconds,
        runtime=loaded.runtime,
    )  # fmt: skip
    entry = registry.promote(
        opened, line, ref.digest, verdict=found[0].digest if found else None, expected=before,
        why=why, by=by, unapproved=not approving,
    )  # fmt: skip
    _tell(entry, f"; it answered {len(replies)} held-out prompts")


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
    from rlhf import registry

    loaded, opened = opened_line(name, store, config)
    target = opened.resolve(to).digest if to else None
    _tell(registry.rollback(opened, loaded.promotion.name, to=target, why=why, by=by))


def champion(
    *, name: NameOption = None, history: bool = False, store: StoreOption = None,
    config: ConfigOption = None,
) -> None:  # fmt: skip
    """Show the champion of a model line, or of each; who made it so, when and why.

    Parameters
    ----------
    history
        Show all champions that there were, the present one last.
    """
    from flows.terminal import champions_table
    from rlhf import registry

    loaded, opened = opened_line(name, store, config)
    found = [line.removeprefix("champion/") for line in opened.history.names("champion/")]
    lines = [loaded.promotion.name] if name or config else found
    entries = {line: registry.history(opened, line) for line in lines}
    if not any(entries.values()):
        wanted = f" for model line {lines[0]!r}" if lines else ""
        there = f"; there is one of {', '.join(found)}" if found else ""
        raise ArtifactMissing(f"{opened.uri}: no champion{wanted}{there}")
    console.print(
        champions_table([e for each in entries.values() for e in each[0 if history else -1 :]])
    )


def opened_line(
    name: str | None, store: str | None, config: Path | None
) -> tuple[PipelineConfig, Store]:
    """The configuration whose `promotion.name` is the model line, and its store."""
    from tasks.runner import store_of

    given = {"store": store, "promotion.name": name}
    loaded = load_config(config, [f"--{key}={value}" for key, value in given.items() if value])
    return loaded.config, store_of(loaded.config)


def _dataset(store: Store, policy: ArtifactRef, given: str | None) -> ArtifactRef:
    """The dataset that is named, or the policy's own."""
    parent = store.manifest(policy).parents.get("data")
    if given is None and parent is None:
        raise ConfigError(
            f"{policy.short} was trained on no dataset of this store; name one whose held-out "
            "prompts it shall answer: --data <digest>"
        )
    ref = store.resolve(given or str(parent))
    if ref.kind != "dataset":
        raise ConfigError(f"--data {given}: {ref.short} is of kind {ref.kind}; give a dataset")
    return ref


def _tell(entry: Promotion, more: str = "") -> None:
    instead = f" in place of {entry.previous[:12]}" if entry.previous else ""
    text = f"{entry.policy[:12]} is the champion of {entry.model}{instead}{more}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)
