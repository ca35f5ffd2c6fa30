"""Prompts of a file that a command names, for an evaluation outside of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.config import DataConfig, StoreConfig
from rlhf.data.privacy import PersonalData
from rlhf.data.prompt_fields import PromptFields
from rlhf.data.prompt_source import read_prompts
from rlhf.data.quarantine import Quarantine
from rlhf.data.rows import PROMPTS_EVAL, PromptRow, read_rows
from rlhf.errors import ConfigError, DataError
from rlhf.files import exists, is_dir, is_file, read_text

#: Ending of files with a prompt per line; others are read as `data.prompts_source` is.
TEXT = ".txt"


@dataclass(frozen=True)
class PromptFile:
    """Prompts, each once, and what became of the file's rows."""

    prompts: list[PromptRow]
    rows: int
    left_out: Mapping[str, int] = field(default_factory=dict[str, int])
    """Rows without a usable prompt, by reason."""
    notes: tuple[str, ...] = ()


def read_prompt_file(path: Path) -> PromptFile:
    """Read prompts from CSV, JSON, JSON lines or Parquet, a dataset's folder, or lines of text.

    Raises:
        ConfigError: There is no such file, or no column holds prompts.
        DataError: It can't be parsed, holds none, or too many rows are unusable.
    """
    option = f"--prompts {str(path)!r}"
    if not exists(path):
        raise ConfigError(f"{option}: no such file; give one of prompts")
    if is_dir(path) and is_file(path / PROMPTS_EVAL):
        rows = read_rows(path / PROMPTS_EVAL, PromptRow)
        found = PromptFile(rows, len(rows), notes=(f"prompts are those of {PROMPTS_EVAL}",))
    elif path.suffix.lower() == TEXT:
        found = _lines(path, option)
    else:
        found = _table(path, option)
    if not found.prompts:
        raise DataError(f"{option}: holds no prompt; give a file with some")
    return found


def _lines(path: Path, option: str) -> PromptFile:
    try:
        text = read_text(path, "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise DataError(f"{option}: can't be read ({reason}); write it as UTF-8") from None
    lines = [line.strip() for line in text.split("\n")]
    filled = [line for line in lines if line]
    prompts = [*dict.fromkeys(filled)]
    repeats = len(filled) - len(prompts)
    notes = [f"{repeats:,} lines repeat another"] if repeats else []
    return PromptFile([PromptRow(p) for p in prompts], len(filled), {}, tuple(notes))


def _table(path: Path, option: str) -> PromptFile:
    # `source` is not read, but the default one excludes prompts of their own.
    config = DataConfig(source=str(path.absolute()), prompts_source=str(path.absolute()))
    quarantine, notes = Quarantine(), list[str]()
    try:
        own = read_prompts(
            config, StoreConfig(), quarantine, PromptFields(config), (), 0, notes.append,
            PersonalData(config),
        )  # fmt: skip
    except (ConfigError, DataError) as error:
        text = str(error).replace(f"data.prompts_source = {str(path.absolute())!r}", option)
        raise type(error)(text.replace("data.prompts_source", "--prompts")) from None
    shown = tuple(note.removeprefix("data.prompts_source: ") for note in notes)
    return PromptFile([*own.items], own.rows, dict(quarantine.ordered()), shown)
