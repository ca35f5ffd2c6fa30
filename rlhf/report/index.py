"""Index of a folder of reports: `index.html`, which lists the runs by name, outcome and date.

It is made anew from the pages that are there, so that removed ones vanish from it.
"""

from __future__ import annotations

import html
import logging
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf.report.model import OUTCOMES, Look
from rlhf.report.render import environment
from rlhf.report.text import moment

log = logging.getLogger("rlhf.report")
NAME = "index.html"
#: Bytes at a page's beginning that hold what is listed of it.
_HEAD = 8192
#: Most pages that are listed, the newest.
MOST = 1000
_RUN = re.compile(r"""<meta name="rlhf-run" content='([^'<>]*)'>""")
_TITLE = re.compile(r"<title>(.*?)</title>", re.DOTALL)
_OTHER = Look("notrun", "", "dim")


class _About(BaseModel):
    model_config = ConfigDict(extra="ignore")

    run: str
    started: str = ""
    outcome: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Listed:
    """A page of the folder."""

    link: str
    name: str
    when: str
    """ISO time of the run's start, or of the file."""
    shown_when: str
    look: Look
    reason: str


def write_index(folder: Path) -> None:
    """Write the index of a folder; a folder that can't be written is logged alone."""
    try:
        page = render_index(list_pages(folder))
        scratch = folder / f".{NAME}.{os.getpid()}.tmp"
        scratch.write_text(page, encoding="utf-8")
        scratch.replace(folder / NAME)
    except OSError as error:
        log.info("no index of %s was written: %s", folder, error)


def list_pages(folder: Path) -> list[Listed]:
    """Return the pages of a folder, the newest first."""
    pages = []
    for path in folder.glob("*.html"):
        if path.name == NAME:
            continue
        try:
            with path.open("rb") as file:
                head = file.read(_HEAD).decode("utf-8", "replace")
            modified = path.stat().st_mtime
        except OSError:
            continue  # removed meanwhile, or not readable
        pages.append(_listed(path.name, head, modified))
    return sorted(pages, key=lambda page: page.when, reverse=True)[:MOST]


def render_index(pages: list[Listed]) -> str:
    """Render the index as HTML with all of its text escaped."""
    return environment().get_template("index.html").render(pages=pages, sections=[])


def _listed(name: str, head: str, modified: float) -> Listed:
    when = datetime.fromtimestamp(modified, UTC).isoformat(timespec="seconds")
    title = _TITLE.search(head)
    label = html.unescape(title[1]).strip() if title else name
    about = _about(head)
    if about is None:
        return Listed(quote(name), label or name, when, moment(when), _OTHER, "")
    looks = {str(outcome): look for outcome, look in OUTCOMES.items()}
    started = about.started or when
    return Listed(
        quote(name), about.run, started, moment(started), looks.get(about.outcome, _OTHER),
        about.reason,
    )  # fmt: skip


def _about(head: str) -> _About | None:
    """Return what a page says of its run; None of another page."""
    found = _RUN.search(head)
    try:
        return _About.model_validate_json(found[1]) if found else None
    except ValidationError:
        return None
