"""docs/ppo.md matches the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.generate_ppo import page
from rlhf.config import PPOConfig
from tests.config.test_seed_table import FIELDS, TABLE

DOCUMENT = Path("docs/ppo.md").read_text(encoding="utf-8")
ROWS = {
    line.split("`")[1]: [cell.strip() for cell in line.split(" | ")]
    for line in DOCUMENT.partition("\n## ")[0].splitlines()
    if line.startswith("| `")
}


def test_the_page_is_up_to_date():
    assert page() == DOCUMENT, "run: python -m docs.generate_ppo > docs/ppo.md"


def test_every_field_is_named_with_its_default():
    defaults = PPOConfig()
    assert set(ROWS) == set(PPOConfig.model_fields)
    for name, cells in ROWS.items():
        value = getattr(defaults, name)
        shown = "none" if value is None else str(value)
        assert cells[2] in (f"`{shown}`", f"`{shown.lower()}`", "its own")


@pytest.mark.parametrize("name", FIELDS)
def test_the_seeds_rows_say_alias_and_advised_range(name):
    advised = TABLE[name].advised
    assert ROWS[name][1] == f"`rl_{name}`"
    assert ROWS[name][4] == (f"{advised[0]:g}–{advised[1]:g}" if advised else "")
    assert len(ROWS[name][5]) > 10


def test_bounds_are_written_as_mathematicians_do():
    shown = {name: ROWS[name][3] for name in ROWS}
    assert (shown["gamma"], shown["gae_lambda"], shown["clip_range"]) == (
        "(0, 1]",
        "[0, 1]",
        "(0, 1)",
    )
    assert (shown["kl_coef"], shown["value_clip_range"], shown["chunk_size"]) == (
        "[0, 10⁶]",
        "(0, 10⁶] or none",
        "[1, 10⁶]",
    )
    assert shown["optimize_device_cache"] == "`true`, `false`"


def test_the_readme_links_the_page():
    assert "(docs/ppo.md)" in Path("README.md").read_text(encoding="utf-8")
