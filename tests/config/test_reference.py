"""The generated pages of docs/ say what the commands and the configuration have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.generate_reference import pages
from flows.cli import app
from rlhf.config import PipelineConfig, load_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_the_page_is_up_to_date(path):
    assert pages()[path] == path.read_text("utf-8"), "run: python -m docs.generate_reference"


def test_every_command_has_its_heading():
    headings = set(re.findall(r"(?m)^## (rlhf .*)$", (ROOT / "docs/commands.md").read_text()))
    names = {name for name in app if not name.startswith("-")}
    assert names
    assert {f"rlhf {name}" for name in names} <= headings


def test_every_value_of_a_preset_is_listed():
    listed = set(re.findall(r"(?m)^\| `([\w.]+)` \|", (ROOT / "docs/configuration.md").read_text()))
    values = {key for key, *_ in load_config(None, []).rows()}
    own_page = {key for key in values if key.startswith("ppo.")}
    assert {key for key in values - own_page if key not in listed} == set()
    assert set(PipelineConfig.model_fields) - {"ppo"} <= {key.partition(".")[0] for key in listed}
