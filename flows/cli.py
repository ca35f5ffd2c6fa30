"""The `rlhf` command: its entry point and the commands run, stage and config."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from inspect import signature
from itertools import pairwise
from pathlib import Path
from traceback import format_exception
from typing import Annotated, Any

import httpx
from cyclopts import App, CycloptsError, Parameter, UnknownOptionError, validators

import rlhf
from flows import (
    artifacts,
    champions,
    chat,
    compare,
    compare_runs,
    configurations,
    costs,
    data,
    export,
    forget,
    history,
    init,
    judge,
    migrate,
    overview,
    preflight,
    runs,
    samples,
    serve,
    server,
    watch,
)
from flows.configurations import warn
from flows.preflight import Overrides
from flows.signals import exit_on_signals
from rlhf.config import load_config
from rlhf.config.fields import canonical, field_types
from rlhf.config.section import unspeakable
from rlhf.errors import (
    BAD_INPUT,
    ConfigError,
    GateRejected,
    NotBetter,
    UnexpectedError,
    explain,
    is_bad_input,
)
from rlhf.plain_text import shortened
from tasks.console import PlainConsole, console, say
from tasks.prefect_server import meet_server, not_started, server_error, set_defaults

#: Exit codes: 2 for errors in configuration or data, 3 for a gate's rejection, 1 for all others.
REJECTED, BROKEN = 3, 1
#: Variable that shows the traceback of an error, also in stages' processes; --debug sets it.
TRACEBACK = "RLHF_TRACEBACK"

app = App(
    name="rlhf",
    help="From human preferences to a promoted policy. "
    "With --debug, every command shows the traceback of an error.",
    version=rlhf.__version__,
    help_format="plaintext",
)
app.command(configurations.app)
app.command(artifacts.app)
app.command(data.app)
app.command(server.app)
for command in (
    init.init, preflight.preflight, runs.runs, runs.status, watch.watch, forget.forget,
    champions.approve, champions.promote, champions.rollback, champions.champion,
    compare.compare, judge.judge, chat.chat, serve.serve, export.export, overview.show,
    samples.samples, history.history, compare_runs.compare_runs, costs.costs, migrate.migrate,
):  # fmt: skip
    app.command(command)


def main() -> None:
    """Run the command, with one line and an exit code for every known error."""
    _open_streams()
    arguments = _without_debug(sys.argv[1:])
    try:
        _check_arguments(arguments)
        sys.exit(app(arguments, print_error=False, exit_on_error=False) or 0)
    except CycloptsError as error:
        error.verbose = False  # else it names the Python function
        cure = _preset_first(arguments, error) or "see rlhf --help"
        sys.exit(fail(ConfigError(f"{error}".removesuffix(".") + f"; {cure}")))
    except httpx.HTTPError as error:
        sys.exit(fail(UnexpectedError(server_error(error))))
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        sys.exit(fail(not_started(error) or error))
    except Exception as error:
        sys.exit(fail(error))


@app.command
def run(
    config: Path, *overrides: Overrides, verbose: bool = False, plain: bool = False
) -> int:  # fmt: skip
    """Run the whole pipeline, or whatever of it has not been done yet.

    Every value can be overridden: --ppo.kl_coef=0.05, or --rl-kl-coef 0.05 for PPO's (docs/ppo.md).

    Parameters
    ----------
    config
        YAML preset, for example configs/quickstart.yaml.
    verbose
        Show Prefect's own log, with tracebacks.
    plain
        Print a line per event, as in pipes and logs, instead of the live display.
    """
    from tasks.preflight import preflight_command

    loaded = load_config(config, overrides)
    warn(loaded)
    preflight_command(loaded.config)
    prepare_prefect(verbose)
    from flows.pipeline import pipeline
    from flows.terminal import show_run
    from rlhf.report import GREEN
    from tasks.board import board

    say(f"{loaded.config.name}: store {loaded.config.store}, seed {loaded.config.seed}")
    board.show_on(console, plain=plain or verbose)
    state = pipeline(overrides=loaded, return_state=True)
    result: Any = state.result(raise_on_failure=False)
    if isinstance(result, BaseException):
        return fail(result)
    show_run(console, result)
    if result.outcome in GREEN:
        return 0
    return fail(result.error or RuntimeError(result.reason))


@app.command
def stage(
    name: str,
    config: Path,
    *overrides: Overrides,
    input: tuple[str, ...] = (),
    verbose: bool = False,
    plain: bool = False,
) -> int:
    """Run one stage alone.

    Parameters
    ----------
    name
        prepare-data, train-sft, train-reward-model, evaluate-reward-model, gate-reward-model,
        train-judge, train-policy, evaluate-policy, gate-policy or promote.
    config
        YAML preset.
    input
        role=artifact, repeatable; a role that is not given is what this configuration recorded.
    verbose
        Show Prefect's own log, with tracebacks.
    plain
        Print a line per event, as in pipes and logs, instead of the live display.
    """
    from tasks.preflight import preflight_command
    from tasks.runner import find_inputs
    from tasks.stage import store_of
    from tasks.stages import EVALUATE_REWARD_MODEL, PREPARE_DATA, stage_named

    loaded = load_config(config, overrides)
    chosen = stage_named(name)
    warn(loaded)
    preflight_command(loaded.config)
    store = store_of(loaded.config)
    given = {role: store.resolve(ref) for role, ref in (_parse_input(text) for text in input)}
    inputs = find_inputs(chosen, loaded.config, given)
    prepare_prefect(verbose)
    from flows.stages import STAGE_FLOWS
    from flows.terminal import show_data, show_reward_model
    from tasks.board import board

    board.show_on(console, plain=plain or verbose)
    digests = {role: ref.digest for role, ref in inputs.items()}
    state = STAGE_FLOWS[name](overrides=loaded, inputs=digests, return_state=True)
    result: Any = state.result(raise_on_failure=False)
    if isinstance(result, NotBetter):
        say(result)
        return 0
    if isinstance(result, BaseException):
        return fail(result)
    label = "cached" if result.cached else "completed"
    say(f"{name}: {label} in {result.seconds:.1f} s  {result.headline}")
    say(f"artifact {result.ref.digest}")
    if result.ref.kind == PREPARE_DATA.kind:
        show_data(console, store.fetch(result.ref))
    if chosen is EVALUATE_REWARD_MODEL:
        show_reward_model(console, store.fetch(result.ref))
    return 0


@app.command
def node(
    *, wait: Annotated[float, Parameter(validator=validators.Number(gt=0, lte=604_800))] = 900.0
) -> None:  # fmt: skip
    """Take another machine's part in a stage with `nodes`; docs/deploying.md says how.

    Reads torchrun's variables PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT.

    Parameters
    ----------
    wait
        Seconds in which the stage's first machine must answer; it may start later.
    """
    from tasks.join import join_stage, own_place

    leader, number = own_place()
    say(f"node {number + 1}: meets the stage's first machine at {leader[0]}:{leader[1]}")
    join_stage(leader, number, wait)
    say(f"node {number + 1}: the stage's training has ended")


def fail(error: BaseException) -> int:
    """Print an error in one line and return its exit code; `--debug` shows all of it."""
    if os.environ.get(TRACEBACK):
        PlainConsole(stderr=True).print("".join(format_exception(error)), soft_wrap=True)
    say(f"error: {shortened(explain(error))}", "red", on=PlainConsole(stderr=True))
    if isinstance(error, GateRejected):
        return REJECTED
    return BAD_INPUT if is_bad_input(error) else BROKEN


def prepare_prefect(verbose: bool) -> None:
    """Configure signals, Prefect and logging; variables that the user has set stay.

    Raises:
        ConfigError: A server is configured and does not answer.
    """
    exit_on_signals()
    set_defaults(verbose)
    if not verbose:
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        import warnings

        warnings.simplefilter("ignore")
        # The library's own warnings are for the user.
        from tasks.board import notice_handler

        logging.getLogger("rlhf").addHandler(notice_handler())
        logging.getLogger("rlhf").setLevel(logging.INFO)
    meet_server("PREFECT_API_URL")


def _without_debug(arguments: Sequence[str]) -> list[str]:
    """Return arguments without --debug, which every command takes at any place before `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    rest = [argument for argument in arguments[:end] if argument != "--debug"]
    if len(rest) < end:
        os.environ[TRACEBACK] = "1"
    return [*rest, *arguments[end:]]


def _preset_first(arguments: Sequence[str], error: CycloptsError) -> str | None:
    """Return the cure for overrides without the file that they change, or None."""
    if not isinstance(error, UnknownOptionError):
        return None
    words, apps, _ = app.parse_commands(arguments)
    takes = signature(apps[-1].default_command or main).parameters
    name = error.token.keyword or error.token.value
    is_field = field_types(canonical(name.lstrip("-").partition("=")[0].replace("-", "_")))
    if "overrides" not in takes or is_field is None:
        return None
    needed = "configs/quickstart.yaml" if "config" in takes else "pairs.jsonl"
    needed = init.FOLDER if "folder" in takes else needed
    before = [*words, *(["<stage>"] if "name" in takes else []), needed]
    return f"overrides stand behind the file: rlhf {' '.join(before)} {name}"


def _open_streams() -> None:
    """Open streams that are closed, and let a terminal without UTF-8 show what it can.

    Else the next file that is opened would become standard output, and get what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuse arguments that neither a file's name nor a record can hold, and empty ones.

    An empty one is a variable of the shell that is not set. It would mean the default: another
    store or model line than the one that was meant. Values of the configuration may be empty.

    Raises:
        ConfigError: One holds bytes that are not UTF-8, or a null character, or is empty.
    """
    for before, argument in pairwise(("", *arguments)):
        held = unspeakable(argument)
        if held is not None:
            raise ConfigError(f"{argument!r} holds {held}; name it otherwise")
        option, equals, value = argument.partition("=")
        if not argument.strip():
            option, is_empty = before if before.startswith("--") else "an argument", True
        else:
            is_empty = option.startswith("--") and bool(equals) and not value.strip()
        may_be_empty = "." in option or option.startswith("--rl") or option == "--why"
        if is_empty and not may_be_empty:
            raise ConfigError(
                f"{option} is empty; give a value (is a variable of the shell not set?)"
            )


def _parse_input(text: str) -> tuple[str, str]:
    role, equals, ref = text.partition("=")
    if not (role and equals and ref):
        raise ConfigError(f"--input {text!r}: write role=artifact, for example sft=3f2a91c04d")
    return role, ref


if __name__ == "__main__":
    main()
