"""The examples of docs/data.md are read as it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from rlhf.config import DataConfig, StoreConfig
from rlhf.config.data import DataFormat
from rlhf.data.prepare import prepare_data, read_pairs
from rlhf.data.prompt_fields import PromptFields
from rlhf.data.quarantine import Quarantine
from rlhf.data.rows import (
    DEMONSTRATIONS,
    PROMPTS_TRAIN,
    SUMMARY,
    Demonstration,
    PromptRow,
    read_rows,
)  # fmt: skip

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
EXAMPLES = re.findall(r"```jsonl ([\w-]+)\n(.*?)```", TEXT, re.DOTALL)
GOOD = ("Boil water", "Turn the bulb", "Rooibos")


@pytest.mark.parametrize(("name", "rows"), EXAMPLES)
def test_an_example_is_read_as_its_format(tmp_path, name, rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text(rows)
    assert len([json.loads(line) for line in rows.splitlines()]) == 3
    config, quarantine = DataConfig(source=str(path)), Quarantine()
    reading = read_pairs(config, StoreConfig(), quarantine, PromptFields(config))
    assert reading.formats == [name]
    pairs = [item.pair for item in reading.pairs]
    assert pairs
    assert all(pair.chosen.startswith(GOOD) for pair in pairs)
    assert not any(pair.rejected.startswith(GOOD) for pair in pairs)
    assert quarantine.bad == 0


TYPES = {"sft": Demonstration, "prompts": PromptRow}
OWN = re.findall(r"```jsonl (sft|prompts)/([\w-]+)\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize(("setting", "name", "rows"), OWN)
def test_an_example_of_own_rows_is_read_as_its_format(tmp_path, setting, name, rows):
    pairs = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (tmp_path / "own.jsonl").write_text(rows)
    sources = {f"{setting}_source": str(tmp_path / "own.jsonl")}
    prepare_data(DataConfig(source=str(tmp_path / "pairs.jsonl"), **sources), tmp_path)
    summary = json.loads((tmp_path / SUMMARY).read_text())
    assert [c["format"] for c in summary["sources"]] == ["pairs", name]
    written = {"sft": DEMONSTRATIONS, "prompts": PROMPTS_TRAIN}[setting]
    lines = read_rows(tmp_path / written, TYPES[setting])
    assert len(lines) == 3
    assert setting == "prompts" or all(line.response.startswith(GOOD) for line in lines)


def test_every_format_has_an_example():
    assert {name for name, _ in EXAMPLES} == set(get_args(DataFormat)) - {"auto"}
