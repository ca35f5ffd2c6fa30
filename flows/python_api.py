"""The flows behind `rlhf.Pipeline`: each runs in this process and returns what it made.

Also in a notebook, whose thread has a running event loop: flows and tasks are synchronous, and
Prefect then keeps to its synchronous client. Signals are left to the caller, whose process it is.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flows.preflight import first_rows
from rlhf.config import LoadedConfig
from rlhf.errors import explained
from rlhf.report.model import RunOutcome
from tasks.board import board, notice_handler
from tasks.console import PlainConsole, console, say
from tasks.prefect_server import check_settings, meet_server, set_defaults
from tasks.python_api import Flows, Pipeline

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

    from tasks.report import PipelineRun

__all__ = ["Pipeline"]


def check_pipeline(loaded: LoadedConfig) -> list[str]:
    """Make the checks of `rlhf preflight`, and return what could not be rehearsed.

    Raises:
        RLHFError: A run would stop.
    """
    set_defaults(verbose=False)
    check_settings()
    from tasks.preflight import preflight_command
    from tasks.rehearsal import base_without_weights, rehearse_once
    from tasks.runner import producer

    config = loaded.config
    preflight_command(config)
    with base_without_weights(config) as base:
        if base is None:
            return []
        origin = producer("preflight", {}, config.seed)
        return [*rehearse_once(config, base, first_rows(config), origin)]


def run_pipeline(loaded: LoadedConfig, quiet: bool) -> PipelineRun:
    """Run the pipeline and return its state.

    Raises:
        RLHFError: It failed; a note names the report.
    """
    with _shown(loaded, quiet):
        from flows.pipeline import pipeline

        result = _result(pipeline(overrides=loaded, return_state=True))
    if isinstance(result, BaseException):
        raise explained(result)
    if result.outcome == RunOutcome.FAILED:
        error = explained(result.error or RuntimeError(result.reason))
        error.add_note(f"report: {result.report}")
        raise error
    if not quiet:
        say(f"{result.outcome}: {result.reason}")
    return result


def run_stage(
    loaded: LoadedConfig, name: str, inputs: Mapping[str, str], quiet: bool
) -> tuple[str, Any]:
    """Run a stage; return the name of its state, and its outcome or error.

    Raises:
        RLHFError: There is no such stage, or an input is missing.
    """
    from tasks.runner import find_inputs
    from tasks.stage import store_of
    from tasks.stages import stage_named

    stage = stage_named(name)
    store = store_of(loaded.config)
    with _shown(loaded, quiet):
        # Before Prefect is started: what is missing is known without it.
        found = find_inputs(
            stage, loaded.config, {role: store.resolve(text) for role, text in inputs.items()}
        )
        from flows.stages import STAGE_FLOWS

        digests = {role: ref.digest for role, ref in found.items()}
        state = STAGE_FLOWS[name](overrides=loaded, inputs=digests, return_state=True)
        return str(state.name), _result(state)


@contextmanager
def _shown(loaded: LoadedConfig, quiet: bool) -> Iterator[None]:
    """Check a configuration, start Prefect, and show what runs while the block runs.

    What is changed of the caller's process is restored at the end, apart from the environment's
    defaults.

    Raises:
        RLHFError: The configuration can't run.
    """
    set_defaults(verbose=False)
    from tasks.preflight import preflight_command

    logger, handler = logging.getLogger("rlhf"), notice_handler()
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if not quiet:
                for line in loaded.advice():
                    say(f"warning: {line}", on=PlainConsole(stderr=True))
                handler.setStream(sys.stdout)  # a notebook shows standard error as if it failed
                logger.addHandler(handler)
                logger.setLevel(logging.INFO)
            preflight_command(loaded.config)
            _meet_server(quiet)
            # Jupyter's kernels set FORCE_COLOR, by which rich takes a notebook for a terminal.
            board.show_on(None if quiet else console, plain=not sys.stdout.isatty())
            yield
        finally:
            board.show_on(None)
            logger.removeHandler(handler)
            logger.setLevel(level)


def _meet_server(quiet: bool) -> None:
    """Check the configured Prefect server, or say that one is started."""
    if quiet or _has_own_server():
        check_settings()
    else:
        meet_server("PREFECT_API_URL")


def _has_own_server() -> bool:
    """Return whether this process has started a Prefect server already."""
    module = sys.modules.get("prefect.server.api.server")
    return module is not None and module.SubprocessASGIServer().server_process is not None


def _result(state: State[Any]) -> Any:
    """Return the result or error of a flow.

    In a thread with a running event loop `State.result` would return a coroutine.
    """
    return state.result(raise_on_failure=False, _sync=True)  # pyright: ignore[reportCallIssue]


Pipeline.flows = Flows(check_pipeline, run_pipeline, run_stage)
