"""The terminal: all that the commands print goes through here, and every string is text.

rich reads `[/x]` in a string as markup and `:x:` as an emoji, and passes escape sequences on.
Names, paths and replies hold anything: here they are shown as they are, and what would act on a
terminal is written out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import TextColumn
from rich.prompt import Prompt
from rich.segment import Segment
from rich.text import Text

from rlhf.plain_text import printable


class PlainConsole(Console):
    """A console without markup: strings are text, and control characters are written out."""

    _width: int | None

    def __init__(self, **options: Any) -> None:
        # In a notebook rich would make HTML of each line, on a display of its own.
        plain = {"markup": False, "emoji": False, "highlight": False, "force_jupyter": False}
        super().__init__(**{**plain, **options})
        if not self._width:  # COLUMNS=0, at which rich prints nothing
            self._width = None

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string as text, whatever it holds."""
        return super().render_str(printable(text), **{**options, "markup": False, "emoji": False})

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render anything; text that did not come from `render_str` is written out too."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


#: Of all commands.
console = PlainConsole()


def say(line: object, style: str = "", on: PlainConsole = console) -> None:
    """Print one line, whatever it holds; it is not wrapped, and spaces in it stay."""
    parts = (part.strip() for part in printable(line).split("\n"))
    on.print(" ".join(filter(None, parts)), style=style or None, soft_wrap=True)


def styled(*parts: str | Text | tuple[str, str]) -> Text:
    """Return parts as one text: strings, texts, or strings with a style."""
    pairs = [part if isinstance(part, tuple) else (part, "") for part in parts]
    return Text.assemble(
        *(text if isinstance(text, Text) else (printable(text), style) for text, style in pairs)
    )


def ask(question: str, default: str | None = None) -> str:
    """Return the answer that is typed to a question; an empty line means the default.

    Raises:
        EOFError: The input has ended.
    """
    return Prompt.ask(styled(question), console=console, default=default) or ""


def text_column(form: str) -> TextColumn:
    """Return a column of a progress bar; `form` formats a task, as rich describes."""
    return TextColumn(form, markup=False)
