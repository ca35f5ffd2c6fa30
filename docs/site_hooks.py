"""Hooks of the documentation's site: pages from outside docs/, and links that leave it.

The README is its first page and benchmarks/RESULTS.md one of the reference, so that each text
stands once, where GitHub shows it. Links to other files of the repository become plain text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
#: Pages of the site by their file in the repository.
OUTSIDE = {"README.md": "index.md", "benchmarks/RESULTS.md": "results.md"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
#: The start of a block whose second word is for the tests that read it.
_BLOCK = re.compile(r"(?m)^(\s*```\w+) [^\n{]+$")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/."""
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text("utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Make links of a page point into the site, or plain text of those that leave it."""
    source = next((s for s, p in OUTSIDE.items() if p == page.file.src_uri), None)
    folder = (ROOT / (source or f"docs/{page.file.src_uri}")).parent

    def rewritten(match: re.Match[str]) -> str:
        picture, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        file = (folder / target).resolve()
        name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else target
        inside = OUTSIDE.get(name) or (
            name.removeprefix("docs/") if name.startswith("docs/") else ""
        )
        return f"{picture}[{text}]({inside}{anchor})" if inside else text

    return _LINK.sub(rewritten, _BLOCK.sub(r"\1", markdown))
