"""Text of strangers never acts: on a terminal, in a log, or in the Markdown of Prefect's UI."""

from __future__ import annotations

import ast
import html
import io
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from rlhf.markdown import (
    Markdown,
    bold,
    bullets,
    code,
    command,
    escape,
    heading,
    paragraphs,
    quotation,
    rule,
    table,
    words,
)
from rlhf.plain_text import one_line, printable, shortened
from tasks.console import PlainConsole, say, styled, text_column

ROOT = Path(__file__).parents[1]
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
#: Pieces that act somewhere: rich's markup and emoji codes, escape sequences, overrides, Markdown.
ACTING = [
    "[/x]", "[red]", "[link=http://x]", "[", "\\[", ":smile:", "\x1b[31m", "\x9b2J", "\r",
    "\x1b]8;;http://x\x07", "\x08", "\x00", "\u202e", "\u2066", "\u200b", "\u2028", "\x85",
    "\ud800", "\ufeff", "\n", "\n\n", "\n# h\n", "\n---\n", "\n> q", "> ", "```", "`", "**b**",
    "_i_", "~~s~~", "| a ", "\n|---|\n", "<script>alert(1)</script>", "<!--", "&lt;",
    "[x](javascript:alert(1))", "![](https://evil.example/p.png)", "https://evil.example",
    "www.evil.example", "a@b.example", "    code", "\t", "1. ", "- ", "+ ", "* ", "===", "\\",
    "[1]: http://x\n", "word", " ", "日本語",
]  # fmt: skip
hostile = st.lists(st.sampled_from(ACTING) | st.text(max_size=5), max_size=8).map("".join)


def acts(text: str) -> list[str]:
    """The characters of a shown text that could act, beside ends of lines and tabs."""
    hidden = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    return [c for c in text if unicodedata.category(c) in hidden and c not in "\n\t"]


def shown(*renderables) -> str:
    """What a console without colours writes, which strangers' text must not change."""
    file = io.StringIO()
    console = PlainConsole(file=file, width=60, force_terminal=False)
    for renderable in renderables:
        console.print(renderable)
    return file.getvalue()


@given(hostile)
@example("\r\x1b[2J[/x]\u202e\ud800")
def test_the_terminal_shows_every_text_and_nothing_of_it_acts(text):
    grid = Table(text, title=text, caption=text)
    grid.add_row(text)
    grid.add_section()
    tree = Tree(text)
    tree.add(text)
    written = shown(text, grid, tree, styled((text, "bold"), text), Text(text))
    assert acts(written) == []
    wide = io.StringIO()
    console = PlainConsole(file=wide, width=10**4)
    say(text, "red", on=console)
    assert wide.getvalue().count("\n") == 1
    assert wide.getvalue().split() == one_line(text).split()
    # To a terminal with colours, only rich's own sequences are written.
    coloured = io.StringIO()
    say(text, "red", on=PlainConsole(file=coloured, force_terminal=True, width=10**4))
    assert acts(re.sub(r"\x1b\[[\d;]*m", "", coloured.getvalue())) == []
    bars = io.StringIO()
    console = PlainConsole(file=bars, force_terminal=True, width=60)
    with Progress(text_column("{task.description}"), console=console, auto_refresh=False) as bar:
        bar.add_task(text)
    assert acts(re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", bars.getvalue())) == []


@given(hostile)
def test_lines_stay_lines_and_written_out_text_stays(text):
    assert printable(printable(text)) == printable(text)
    assert acts(printable(text)) == []
    assert one_line(text).split("\n") == [one_line(text)]
    printable(text).encode()
    assert shortened(text) == one_line(text)
    long = shortened(f"{'x' * 10**4} {text} {'y' * 10**4} cure")
    assert len(long) < 1000 + len(text) * 10
    assert long.endswith("y cure")


def tokens_of(page: str):
    return [t for token in MARKDOWN.parse(page) for t in (token, *(token.children or ()))]


def text_of(page: str) -> list[str]:
    """The words that a reader of a page sees."""
    return html.unescape(re.sub(r"<[^>]*>", " ", MARKDOWN.render(page))).split()


def structure(page: str) -> list[str]:
    """The kinds of elements of a page, without the text."""
    text = {"inline", "text", "text_special", "softbreak"}
    return [token.type for token in tokens_of(page) if token.type not in text]


@given(hostile)
@example("x #")
@example("`")
def test_markdown_keeps_its_structure_whatever_the_text(text):
    def page(text: str) -> Markdown:
        return paragraphs(
            heading(f"h {text}"), words("x", bold(f"x{text}"), text), bullets([f"x {text}", text]),
            table(["x", text], [[text, "x"]]), quotation(text), rule(), words(code(f"x{text}")),
            command(f"x {text}"),
        )  # fmt: skip

    harmless = re.sub(r"\S", "x", printable(text))
    assert structure(page(text)) == structure(page(harmless))
    assert not {"html_block", "html_inline", "link_open", "image"} & {*structure(page(text))}
    assert acts(page(text)) == []


@given(hostile)
def test_a_reader_of_markdown_sees_the_text(text):
    seen = one_line(text).split()
    assert text_of(escape(text)) == seen
    # GitHub and Prefect make links of bare addresses.
    assert not re.search("://|www\\.|@", escape(text))
    assert text_of(bullets([f"- {text}"])) == ["-", *seen]
    assert text_of(table(["a"], [[text]])) == ["a", *seen]
    assert text_of(quotation(text)) == seen
    assert text_of(heading(f"x {text}")) == ["x", *seen]
    assert text_of(code(f"x {text}")) == ["x", *seen]
    assert text_of(command(f"x {text}")) == ["x", *seen]


def test_markdown_is_escaped_once():
    assert escape(escape("a_b *c*")) == escape("a_b *c*") == "a_b \\*c\\*"
    assert words("*", bold("*")) == "\\* **\\***"


#: Names of rich whose strings are markup or act; the console's module alone uses them.
MARKUP = {
    "rich.console": {"Console"}, "rich.text": {"Text"}, "rich.progress": {"TextColumn", "track"},
    "rich": {"print", "inspect"}, "rich.markup": {"render"}, "rich.prompt": {"Prompt", "Confirm"},
    "rich.markdown": {"Markdown"}, "rich.status": {"Status"}, "rich.logging": {"RichHandler"},
    "prefect.artifacts": {
        "create_markdown_artifact", "create_table_artifact", "create_link_artifact",
        "create_image_artifact", "Artifact", "MarkdownArtifact", "TableArtifact",
    },
}  # fmt: skip
#: Who may: the console, Prefect's pages, Markdown's own module; processes that print for a parent.
EXEMPT = {
    "tasks/console.py": (
        MARKUP["rich.console"] | MARKUP["rich.text"] | MARKUP["rich.progress"] | {"Prompt"}
    ),
    "tasks/prefect_pages.py": MARKUP["prefect.artifacts"],
    "rlhf/markdown.py": {"Markdown"}, "rlhf/smoke.py": {"print"},
    "rlhf/launch/worker.py": {"traceback.print_exc"},
}  # fmt: skip


def strays(source: str) -> set[str]:
    """What a module uses beside the one place for terminals, or for Prefect's pages."""
    found: set[str] = set()
    typing_only: set[int] = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            typing_only |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in typing_only:
            found |= {a.name for a in node.names} & set(MARKUP.get(node.module or "", ()))
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "rich"}
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("print", "sys.stdout.write", "sys.stderr.write", "traceback.print_exc"):
                found.add(called)
            if called == "Markdown":
                found.add(called)
    return found


def test_terminals_and_pages_are_written_in_one_place():
    files = [p for package in ("rlhf", "tasks", "flows") for p in (ROOT / package).rglob("*.py")]
    found = {p.relative_to(ROOT).as_posix(): strays(p.read_text()) for p in files}
    assert {name: what for name, what in found.items() if what - EXEMPT.get(name, set())} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from rich.console import Console", "from rich.text import Text", "import rich.console",
        "def f():\n    print(1)", "from prefect.artifacts import create_table_artifact",
        "Markdown('x')", "from rich.progress import BarColumn, TextColumn",
    ],
)  # fmt: skip
def test_a_stray_is_found(line):
    assert strays(line)
    assert not strays("from rich.table import Table\nfrom rich.progress import BarColumn\nsay(1)")
