"""Generator of docs/commands.md and docs/configuration.md: `python -m docs.generate_reference`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from cyclopts import App
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs.fields import bounds_of, default_of, fields_of, meaning_of
from flows.cli import app
from rlhf.config import PipelineConfig
from rlhf.config.section import sections, union_members

FOLDER = Path(__file__).parent

COMMANDS = """# All commands

`rlhf --help` and `rlhf <command> --help` say the same in a terminal. `--option=value` is as good as
`--option value`. Exit codes: 0 done (promoted, champion kept, waiting for approval), 1 a fault or a
service that can't be reached, 2 a value or data to mend, 3 a gate's rejection, 130 and 143 stopped
by a signal.

This page is written by `python -m docs.generate_reference`.
"""
CONFIGURATION = """# All values of a configuration

`rlhf config show <preset>` prints the values of a preset and where each came from. On the command
line every value is `--<name>=<value>`. `its own` is a section, whose values follow, or a list of
sections. [`ppo`](ppo.md) has a page of its own. With a pretrained base some defaults differ:
[models.md](models.md#defaults-for-a-pretrained-base).

This page is written by `python -m docs.generate_reference`.
"""
ROW_HEAD = "\n| name | default | bounds | meaning |\n|---|---|---|---|\n"


def pages() -> dict[Path, str]:
    """Return the text of each generated page by its file."""
    return {
        FOLDER / "commands.md": COMMANDS + "".join(_commands(app)),
        FOLDER / "configuration.md": CONFIGURATION + "".join(_configuration()),
    }


def _commands(root: App) -> Iterator[str]:
    """Yield the headings and texts of all commands, in the order of their names."""
    text = root.generate_docs(output_format="markdown", include_hidden=False)
    # The generator's own contents and lists of subcommands repeat the headings.
    for part in sorted(re.split(r"(?m)^(?=##+ rlhf )", text)[1:], key=_name):
        body = re.sub(r"(?m)^\*\*Commands\*\*:\n(\n|\* .*\n)+", "", part)
        # The usage line names the running program too, where a command has no name of its own.
        usage = re.search(r"```console\n(.+)\n```", body)
        words = usage[1].split() if usage else []
        takes = [word for word in words if word.startswith(("[", "--")) or word.isupper()]
        body = body.replace(usage[1], " ".join([_name(part), *takes])) if usage else body
        yield "\n" + re.sub(r"^##+ ", "## ", body).strip() + "\n"


def _name(part: str) -> str:
    return part.partition("\n")[0].lstrip("# ")


def _configuration() -> Iterator[str]:
    """Yield the table of the values outside of sections, then one for each section."""
    top, of_sections = [], []
    for name, field in PipelineConfig.model_fields.items():
        (section,) = sections(union_members(field.annotation)) or (None,)
        if section is None:
            top.append((name, field))
        elif name != "ppo":
            of_sections.append((name, section))
    yield "\n## Outside of sections\n" + ROW_HEAD + _rows(top)
    for name, section in of_sections:
        yield f"\n## {name}\n" + _lead(section) + ROW_HEAD
        yield _rows([*fields_of(section, f"{name}.")])


def _lead(section: type[BaseModel]) -> str:
    text = " ".join((section.__doc__ or "").partition("\n\n")[0].split())
    return f"\n{text}\n" if text else ""


def _rows(fields: list[tuple[str, FieldInfo]]) -> str:
    return "".join(
        f"| `{name}` | {default_of(field)} | {bounds_of(field)} | {meaning_of(field)} |\n"
        for name, field in fields
    )


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
