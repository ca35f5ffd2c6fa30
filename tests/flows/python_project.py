"""A user's folder in which the documents' Python runs: its store is that of the tiny first run.

The text on the pages and in the notebook stays the real one: `quickstart` is the tiny configuration
here.
"""

from __future__ import annotations

import re
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import yaml

from rlhf.champions import promote
from rlhf.config import load_config
from tasks.stage import store_of
from tests.flows.conftest import tiny_tree

DOCS = Path(__file__).parents[2] / "docs"
#: A Python block, and what it prints if that follows.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", re.DOTALL)


def make_project(folder: Path, store: Path, policy: str) -> Path:
    """Make the folder; return that of its preset `quickstart`."""
    tree = tiny_tree(folder)
    del tree["store"], tree["tracking"]
    tree |= {"name": "quickstart", "runtime": {"threads": 1}}
    presets = folder / "presets"
    presets.mkdir()
    (presets / "quickstart.yaml").write_text(yaml.safe_dump(tree))
    shutil.copytree(store, folder / ".rlhf" / "store")
    # The real preset's model line, beside the tiny one's.
    opened = store_of(load_config(None, [f"--store={folder / '.rlhf' / 'store'}"]).config)
    promote(opened, "quickstart", policy, verdict=None, expected=None, why="for the documents")
    return presets


def run_page(name: str) -> dict:
    """Run the Python of a page of docs/ in order; compare what it prints; return its names."""
    text = (DOCS / name).read_text(encoding="utf-8")
    names: dict = {"__name__": "__main__"}
    blocks = [*BLOCK.finditer(text)]
    assert len(blocks) == text.count("```python"), "a block is not closed"
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        shown = StringIO()
        # Padded, so that a traceback names the page's own line.
        code = compile("\n" * line + block[1], f"docs/{name}", "exec")
        with redirect_stdout(shown):
            exec(code, names)
        if block[2] is not None:
            printed = [part.rstrip() for part in shown.getvalue().splitlines()]
            assert printed == block[2].splitlines(), f"docs/{name}, line {line}"
    return names
