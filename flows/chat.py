"""The command `rlhf chat`: a conversation with a policy, or with two side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.live import Live
from rich.table import Table

from flows.artifacts import ConfigOption, StoreOption
from flows.models import open_for_models
from rlhf.config import load_config
from rlhf.errors import ConfigError, RLHFError, explain
from rlhf.plain_text import counted, printable, shortened
from rlhf.preferences import PreferenceFile
from rlhf.report.text import figure
from tasks.chat_models import DEFAULT_CHAT, ChatModels, ChatOptions, ChatPolicy, load_chat
from tasks.console import PlainConsole, console, say, styled
from tasks.models import load_scorer

if TYPE_CHECKING:
    from rlhf.chat import Candidate, Conversation

#: Most characters of a line that is read: beyond any context, and a stream may have no line ends.
LONGEST_LINE = 2_000_000
#: Narrowest terminal on which two replies stand side by side.
SIDE_BY_SIDE = 60
COMMANDS = {
    "/retry": "reply again to the last message, with other random numbers",
    "/prefer N": "append to the preference file that reply N is better than the others",
    "/system TEXT": "set the system turn, and begin a new conversation",
    "/reset": "begin a new conversation",
    "/help": "show these commands; a message that begins with a slash is written with two",
    "/quit": "leave; so does Ctrl-D",
}


def chat(
    policy: str | None = None, *, plain: Annotated[bool, Parameter(negative="")] = False,
    options: ChatOptions = DEFAULT_CHAT, store: StoreOption = None, config: ConfigOption = None,
) -> int:  # fmt: skip
    """Talk to a policy, or to two side by side; /help in the chat shows its commands.

    Each line is a message; input from a pipe is read to its end.

    Parameters
    ----------
    policy
        champion (the default), sft, a digest, its first 6 or more digits, a run's or a pin's name,
        URI, champion:<line>, or a local folder.
    plain
        Print replies alone on standard output, all else on standard error; so does a pipe.
    """
    preferences = PreferenceFile(options.preferences)
    is_plain = plain or not console.is_terminal
    aside = PlainConsole(stderr=True) if is_plain else console
    say("loading …", "dim", on=aside)
    models = open_chat(policy, options, store, config)
    from rlhf.chat import Conversation

    conversation = Conversation(options.seed, options.system or "")
    _greet(models, preferences, aside)
    counts = {"pairs": 0, "errors": 0}
    for line in _lines(aside):
        try:
            if not _take(line, models, conversation, preferences, is_plain, aside, counts):
                break
        except RLHFError as error:
            counts["errors"] += 1
            say(f"error: {shortened(explain(error))}", "red", on=aside)
        except KeyboardInterrupt:
            say("\ncancelled: nothing of the reply is kept; /retry, or another message", on=aside)
    if counts["pairs"]:
        look = f"rlhf data inspect {preferences.path}"
        say(f"{counted(counts['pairs'], 'preference')} written; {look}", on=aside)
    return 2 if counts["errors"] and not sys.stdin.isatty() else 0


def open_chat(
    policy: str | None, options: ChatOptions, store: StoreOption, config: ConfigOption
) -> ChatModels:
    """Find and load the models of a chat, by the options of a command."""
    runtime, opened = open_for_models(store, config)
    promotion = load_config(config, ()).config.promotion

    def device() -> object:
        from transformers.utils import logging

        from rlhf.modeling.device import prepare_device

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return prepare_device(runtime)

    return load_chat(
        policy, options, promotion, device, opened,
        lambda model, place: load_scorer(model, place, None, opened),
    )  # fmt: skip


def _greet(models: ChatModels, preferences: PreferenceFile, aside: PlainConsole) -> None:
    for number, policy in enumerate(models.policies, 1):
        before = f"{number} " if len(models.policies) > 1 else ""
        say(f"{before}{policy.label}: {_settings(policy)}", "bold", on=aside)
    for name, model, _ in models.scorers:
        say(f"{name}: {model.label}", "dim", on=aside)
    for note in models.notes:
        say(f"note: {note}", "yellow", on=aside)
    say(f"preferences: {preferences.path}; /help shows the commands", "dim", on=aside)


def _settings(policy: ChatPolicy) -> str:
    settings = policy.settings
    parts = [
        f"temperature {settings.temperature:g}" if settings.temperature else "greedy",
        f"top_k {settings.top_k}" if settings.temperature and settings.top_k else "",
        f"top_p {settings.top_p:g}" if settings.temperature and settings.top_p < 1 else "",
        f"at most {settings.max_new_tokens:,} tokens a reply",
        f"context {policy.speaker.context:,}",
    ]
    return ", ".join(filter(None, parts))


def _lines(aside: PlainConsole) -> Iterator[str]:
    """Yield the lines that a person or a pipe writes."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() a history and editing)
        while True:
            try:
                yield input("\nyou> ")
            except EOFError:
                return
            except KeyboardInterrupt:
                say("\n/quit or Ctrl-D leaves", "dim", on=aside)
    else:
        # Bytes that are not UTF-8 are refused with their message, not with the whole input.
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # pyright: ignore
        while line := sys.stdin.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise ConfigError(f"a line has more than {LONGEST_LINE:,} characters; split it")
            if line.strip():
                yield line.removesuffix("\n").removesuffix("\r")


def _take(
    line: str, models: ChatModels, conversation: Conversation, preferences: PreferenceFile,
    is_plain: bool, aside: PlainConsole, counts: dict[str, int],
) -> bool:  # fmt: skip
    """Do what a line asks for; return whether to go on."""
    word, _, rest = line.strip().partition(" ")
    if not line.strip():
        pass
    elif line.startswith("//") or not line.startswith("/"):
        conversation.say(line.removeprefix("/") if line.startswith("//") else line)
        _reply(models, conversation, is_plain, aside)
    elif word == "/quit":
        return False
    elif word == "/help":
        for name, what in COMMANDS.items():
            say(f"{name:14}{what}", on=aside)
    elif word == "/reset":
        conversation.reset()
        say("a new conversation", "dim", on=aside)
    elif word == "/system":
        if rest.strip():
            conversation.reset()
            conversation.system = rest.strip()
        begun = "; a new conversation" if rest.strip() else ""
        say(f"system: {conversation.system or 'none'}{begun}", "dim", on=aside)
    elif word == "/retry":
        if all(policy.settings.temperature == 0 for policy in models.policies):
            say("note: temperature 0 gives the same reply again", "yellow", on=aside)
        _reply(models, conversation, is_plain, aside)
    elif word == "/prefer":
        rows = conversation.prefer(_number(rest))
        preferences.append(rows)
        conversation.accept(_number(rest))
        counts["pairs"] += len(rows)
        pairs = counted(len(rows), "pair")
        say(f"{pairs} appended to {preferences.path}", "green", on=aside)
    else:
        raise ConfigError(f"{word}: there is no such command; /help shows those that there are")
    return True


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"/prefer {text}: write the number of a reply, as in /prefer 1") from None


def _reply(
    models: ChatModels, conversation: Conversation, is_plain: bool, aside: PlainConsole
) -> None:
    """Let all policies reply; one that can't is said, and the others reply."""
    from rlhf.chat import reply_seed

    seed = conversation.begin_attempt()
    side_by_side = not is_plain and len(models.policies) > 1 and console.width >= SIDE_BY_SIDE
    made: list[Candidate] = []
    errors: list[RLHFError] = []
    first = len(conversation.candidates) + 1
    shown = ["" for _ in models.policies]
    with _columns(models, shown, first) if side_by_side else _no_columns() as live:
        for index, policy in enumerate(models.policies):

            def on_text(part: str, index: int = index) -> None:
                shown[index] += part
                if live is None:
                    console.print(styled(part), end="", soft_wrap=True)

            number = first + index
            if live is None and (len(models.policies) > 1 or number > 1):
                head = f"{number}: " if is_plain else f"{number} {policy.label}\n"
                console.print(styled((head, "" if is_plain else "bold")), end="")
            try:
                candidate = models.answer(policy, conversation, reply_seed(seed, index), on_text)
            except RLHFError as error:
                errors.append(error)
                shown[index] += f"error: {shortened(explain(error))}"
            else:
                made.append(candidate)
                if live is None:
                    console.print()
                    say(_facts(candidate), "dim", on=aside)
    if side_by_side:
        console.print(_table(models, shown, first, made if not errors else []))
    conversation.candidates += made
    for error in errors:
        if made:
            say(f"error: {shortened(explain(error))}", "red", on=aside)
    if errors and not made:
        raise errors[0]
    if len(conversation.candidates) > 1:
        numbers = "|".join(str(n + 1) for n in range(len(conversation.candidates)))
        say(f"/prefer {numbers}", "dim", on=aside)


def _facts(candidate: Candidate) -> str:
    """Return the line under a reply: scores, tokens, and what should be known of it."""
    parts = [
        f"{s.name} {figure(s.value, '+.3f')}" + (f" ({s.note})" if s.note else "")
        for s in candidate.scores
    ]
    parts += [counted(candidate.reply.tokens, "token"), *candidate.reply.notes]
    return " · ".join(parts)


@contextmanager
def _columns(models: ChatModels, shown: list[str], first: int) -> Iterator[Live | None]:
    """Show replies side by side while they grow; of long ones the end."""

    def tail() -> Table:
        lines = max(3, console.height - 6)
        width = max(10, console.width // len(shown) - 4)
        return _table(models, [_end_of(text, lines, width) for text in shown], first, [])

    with Live(get_renderable=tail, console=console, transient=True, refresh_per_second=8) as live:
        yield live


@contextmanager
def _no_columns() -> Iterator[Live | None]:
    yield None


def _end_of(text: str, lines: int, width: int) -> str:
    rows = [
        row[at : at + width] for row in printable(text).split("\n")
        for at in range(0, max(1, len(row)), width)
    ]  # fmt: skip
    return "\n".join(rows[-lines:])


def _table(
    models: ChatModels, shown: Sequence[str], first: int, made: Sequence[Candidate]
) -> Table:
    table = Table(expand=True, show_lines=bool(made))
    for number, policy in enumerate(models.policies, first):
        table.add_column(styled((f"{number} {policy.label}", "bold")), ratio=1, overflow="fold")
    table.add_row(*map(styled, shown))
    if made:
        table.add_row(*(styled((_facts(each), "dim")) for each in made))
    return table
