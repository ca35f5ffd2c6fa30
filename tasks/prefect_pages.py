"""Pages, tables and forms of Prefect's UI, which reads all of their text as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from rlhf.markdown import Markdown, escape


def show_page(key: str, page: Markdown, description: Markdown | None = None) -> None:
    """Create a page of a run in Prefect's UI."""
    create_markdown_artifact(key=key, markdown=page, description=description)


def show_table(key: str, rows: Sequence[Mapping[str, Any]], description: Markdown) -> None:
    """Create a table of a run in Prefect's UI; its cells are escaped, numbers stay."""
    table = [{name: _cell(value) for name, value in row.items()} for row in rows]
    create_table_artifact(key=key, table=table, description=description)


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float) else escape(value)
