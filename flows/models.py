"""Helpers of the commands on models: opening the store, loading models, figures and pages."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn
from rich.progress import Progress as Bars

from rlhf.config import RuntimeConfig, apply_machine_settings, load_config
from rlhf.errors import ConfigError
from rlhf.files import is_dir, is_file
from rlhf.plain_text import printable
from rlhf.report.text import MISSING, figure, figure_range
from rlhf.stage import Progress
from tasks.console import console, text_column
from tasks.model_options import NEW_TOKENS, ModelOptions

if TYPE_CHECKING:
    from rlhf.store import Store
    from tasks.models import NamedModel

SHOWN_CHARS = 300
#: What every page of this project holds.
_OURS = b"Written by rlhf-pipeline."


def open_for_models(store: str | None, config: Path | None) -> tuple[RuntimeConfig, Store]:
    """Open a store, and return it with the settings of this machine."""
    from tasks.stage import store_of

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    loaded = load_config(config, [f"--store={store}"] if store else []).config
    return apply_machine_settings(loaded).runtime, store_of(loaded)


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


def load_policies(
    models: Sequence[NamedModel], device: Any, options: ModelOptions, store: Store
) -> tuple[list[Any], dict[str, Any]]:
    """Load policies that reply as the last one was trained to; return them, and how they reply."""
    from dataclasses import asdict

    from rlhf.evaluation.replies import Policy, SamplingPlan
    from tasks.models import limits_of, reply_settings

    new_tokens, stops = reply_settings(models[-1], store)
    settings = {"max_new_tokens": new_tokens or NEW_TOKENS, "stop_sequences": stops}
    settings |= options.replies
    plan = SamplingPlan(**settings)
    policies = [Policy(m.folder, device, plan, limits_of(m, store)) for m in models]
    facts = asdict(plan)
    del facts["batch_size"]
    return policies, {**facts, "stop_sequences": list(stops)}


def check_file(option: str, file: Path | None) -> None:
    """Refuse a file for results that can't be written, before anything is computed.

    Raises:
        ConfigError: It is a folder, or its folder does not exist.
    """
    if file is None:
        return
    if is_dir(file):
        raise ConfigError(f"{option} {str(file)!r}: is a folder; name a file")
    if not is_dir(file.absolute().parent):
        raise ConfigError(f"{option} {str(file)!r}: its folder does not exist; make it first")


def write_page(option: str, file: Path, page: str) -> None:
    """Write a page whole or not at all; an earlier page is replaced, another file is not.

    Raises:
        ConfigError: A file of something else is there, or it can't be written.
    """
    try:
        if is_file(file) and _OURS not in file.read_bytes():
            raise ConfigError(
                f"{option} {str(file)!r}: is there already, and no page of this command; name a "
                "new file"
            )
        scratch = file.with_name(f".{os.getpid()}.page.tmp")
        scratch.write_text(page, encoding="utf-8")
        scratch.replace(file)
    except OSError as error:
        raise ConfigError(
            f"{option} {str(file)!r}: can't be written ({error.strerror or error}); name another"
        ) from None


@contextmanager
def progress_of(label: str) -> Iterator[Progress]:
    """Show a transient bar for a computation, if the console is a terminal."""
    columns = (text_column("{task.description}"), BarColumn(24), MofNCompleteColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(label, total=None)

        def update(step: int, total: int, metrics: Mapping[str, float]) -> None:
            bars.update(task, completed=step, total=total)

        yield update


def interval(values: Mapping[str, Any], name: str, digits: int = 3) -> tuple[str, str]:
    """Return a metric and its 95 % interval as text; a dash where it is missing."""
    ends = values.get(f"{name}_low"), values.get(f"{name}_high")
    form = f".{digits}f"
    return figure(values.get(name), form), figure_range(*ends, form, " to ") or MISSING


def excerpt(value: Any) -> str:
    """Return the beginning of a text, or of a chat's last turn, on few printable characters."""
    text = value if isinstance(value, str) else value[-1]["content"]
    shown = printable(text)
    return shown if len(shown) <= SHOWN_CHARS else f"{shown[:SHOWN_CHARS]}…"
