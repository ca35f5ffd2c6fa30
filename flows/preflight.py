"""The `rlhf preflight` command: everything that can be known of a run before it trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from flows.costs import show_forecast
from rlhf.config import PipelineConfig, load_config
from rlhf.data.rows import Demonstration, PromptRow
from tasks.console import say
from tasks.listing import print_listing
from tasks.prefect_server import check_settings, greet_server, lease_advice, prefect_server

if TYPE_CHECKING:
    from rlhf.rehearsal_rows import Sample

#: Rows of each file that are read for a rehearsal.
ROWS = 200

Overrides = Annotated[
    str,
    Parameter(
        allow_leading_hyphen=True,
        help="Dotted overrides of the preset, such as --ppo.kl_coef=0.05.",
    ),
]


def preflight(
    config: Annotated[Path | None, Parameter(name="config")] = None, *overrides: Overrides
) -> None:
    """Check a configuration, and rehearse every stage on a miniature of the base model.

    A run does the same by itself. The exit code is 2 if a run would stop. Without a configuration,
    the settings of Prefect's server alone are checked.

    Parameters
    ----------
    config
        YAML preset, for example configs/preferences.yaml.
    """
    if config is None:
        _check_server()
        return
    check_settings()
    from prefect.settings import PREFECT_API_URL

    from rlhf.modeling.tokenizer import load_tokenizer
    from tasks.preflight import preflight_command
    from tasks.rehearsal import base_without_weights, rehearse_once
    from tasks.runner import producer

    loaded = load_config(config, overrides).config
    say("checking folders, store, data source, models and functions …", "dim")
    preflight_command(loaded)
    if PREFECT_API_URL.value():
        _check_server()
    say("folders, store, data source, models and functions: found")
    show_forecast(loaded)
    with base_without_weights(loaded) as base:
        if base is None:
            say("base.path is not set: a model from scratch is not rehearsed")
            return
        say("rehearsing every stage on a miniature of the base …", "dim")
        sample = first_rows(loaded)
        remarks = rehearse_once(loaded, base, sample, producer("preflight", {}, loaded.seed))
        load_tokenizer(base)  # for its warnings; the rehearsal is silent
        if not remarks:
            say(
                f"{loaded.base.path}: SFT, reward model, PPO and evaluation rehearsed in small; "
                "padded, packed and decoded rows agree with plain transformers"
            )
        _print_estimate(loaded, base)


def _check_server() -> None:
    """Print what of the server's settings endangers runs, and the cure.

    Raises:
        ConfigError: No server is configured, or it does not answer, or what answers is none.
    """
    greet_server("rlhf preflight")
    with prefect_server("rlhf preflight") as client:
        advice = lease_advice(client)
        say(f"warning: {advice}" if advice else f"{client.api_url}: leases outlive its restart")


def _print_estimate(config: PipelineConfig, base: Path) -> None:
    """Print memory and speed of the training stages, and what to change if they don't fit."""
    from rlhf.estimate import available_bytes, cures, estimate

    try:
        stages = estimate(config, base)
    except ValueError as error:
        say(f"memory: no estimate for this family ({error})")
        return
    available = available_bytes(config.runtime.device)
    table = Table("section", title="estimate of the real model", title_justify="left")
    for name in ("weights", "optimizer", "activations", "cache", "peak", "tokens/s"):
        table.add_column(name, justify="right")
    for stage in stages:
        sizes = (stage.weights, stage.optimizer, stage.activations, stage.cache, stage.peak)
        style = "red" if stage.peak > available else ""
        cells = [*(f"{size / 1e9:.2f} GB" for size in sizes), f"{stage.tokens_per_second:,.0f}"]
        table.add_row(stage.section, *cells, style=style)
    print_listing(table, table)
    say(f"{available / 1e9:.1f} GB are free on this device")
    for stage in stages:
        if stage.peak > available:
            say(f"{stage.section} does not fit: {cures(config, stage)}")


def first_rows(config: PipelineConfig) -> Sample:
    """Read the first rows of the data; rows of the project's own if none can be read.

    Raises:
        ConfigError: The source does not exist, or its format is not known.
        DataError: It can't be parsed, or has no rows.
    """
    from rlhf.rehearsal_rows import Sample

    if config.data.source == "world":
        return Sample([], [], [])
    from rlhf.data.prepare import read_pairs
    from rlhf.data.prompt_fields import PromptFields
    from rlhf.data.quarantine import Quarantine

    quarantine = Quarantine(personal_data=config.data.personal_data)
    fields = PromptFields(config.data)
    reading = read_pairs(config.data, config.store_options, quarantine, fields, limit=ROWS)
    pairs = [*reading.pairs.written()]
    return Sample(
        [Demonstration(pair.prompt, pair.chosen) for pair in pairs],
        pairs,
        [PromptRow(pair.prompt) for pair in pairs],
    )
