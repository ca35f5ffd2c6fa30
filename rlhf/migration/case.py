"""The arguments that were given together, and the sizes and sources that they make together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.migration.names import OLD_PPO, Tool, Trainer, find

Fields = list[tuple[str, Any]]


@dataclass(frozen=True)
class Case:
    """All arguments that were given together."""

    tool: Tool
    trainer: Trainer
    kind: str
    """Trainer, or `OLD_PPO`."""
    order: tuple[str, ...]
    """Classes whose defaults hold."""
    values: Mapping[str, Any]
    calls_lora: bool = False
    """True if peft's `LoraConfig` is called."""

    @property
    def is_ppo(self) -> bool:
        """Whether the arguments are PPO's."""
        return self.trainer == "ppo"

    def value(self, name: str) -> Any:
        """Return a value as a number, flag or text; its default there if it is not given."""
        if name in self.values:
            return plain(self.values[name])
        entry = find(self.tool, self.order, name)
        return entry.was if entry else None

    def number(self, name: str) -> int:
        """Return a positive whole number; 1 in place of anything else."""
        value = self.value(name)
        is_whole = isinstance(value, int | float) and not isinstance(value, bool)
        usable = is_whole and math.isfinite(value) and value >= 1 and value == int(value)
        return int(value) if usable else 1

    @property
    def processes(self) -> int:
        """Processes that the launcher starts."""
        each = max(self.number("num_processes"), self.number("nproc_per_node"))
        return each if "num_processes" in self.values else each * self.number("nnodes")

    @property
    def unknown_processes(self) -> str:
        """The option that hides how many processes were started, or empty."""
        for name in ("num_processes", "nproc_per_node"):
            if name in self:
                value = self.value(name)
                is_number = isinstance(value, int) and not isinstance(value, bool)
                return "" if is_number else f"--{name} {value}"
        return "--config_file" if "config_file" in self else ""

    @property
    def has_adapters(self) -> bool:
        """Whether LoRA is trained."""
        return self.value("peft") is True or self.value("use_peft") is True or self.has_lora_class

    @property
    def has_lora_class(self) -> bool:
        """Whether the adapters are those of peft's `LoraConfig`, whose defaults are its own."""
        is_class = self.calls_lora or "r" in self
        return is_class and self.tool == "trl" and self.value("use_peft") is not True

    def __contains__(self, name: str) -> bool:
        return name in self.values


def plain(value: Any) -> Any:
    """Return text that is a number, flag or nothing as such; other values as they are."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    words = {"true": True, "false": False, "none": None, "null": None, "": None}
    if text.lower() in words:
        return words[text.lower()]
    if len(text) <= 40 and re.fullmatch(r"[+-]?\d[\d_]*", text):
        return int(text)
    if len(text) <= 40 and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        return float(text)
    return value


def batches(case: Case) -> Fields:
    """Return the batch sizes that the arguments, or their defaults, make."""
    if case.kind == OLD_PPO:
        mini = case.number("forward_batch_size" if "forward_batch_size" in case else
                           "mini_batch_size")  # fmt: skip
        step = mini * case.number("gradient_accumulation_steps") * case.processes
        chunk = case.number("batch_size") * case.processes
        return [("ppo.chunk_size", chunk), ("ppo.mini_batch_size", min(step, chunk)),
                ("ppo.micro_batch_size", mini)]  # fmt: skip
    is_trl = case.tool == "trl"
    rows = case.number("per_device_train_batch_size" if is_trl else "batch_size")
    more = case.number("gradient_accumulation_steps" if is_trl else "gradient_accumulation")
    total = rows * more * case.processes * case.number("nminibatches")
    if not case.is_ppo:
        section = case.trainer
        return [(f"{section}.batch_size", total), (f"{section}.micro_batch_size", rows)]
    fields: Fields = [("ppo.micro_batch_size", rows)]
    if "rl_chunk_size" not in case:
        parts = case.number("num_mini_batches") * case.number("nminibatches")
        fields.insert(0, ("ppo.chunk_size", total))
        if "rl_mini_batch_size" not in case:
            fields.insert(1, ("ppo.mini_batch_size", max(1, total // parts)))
    return fields


def is_data_file(name: str) -> bool:
    """Return whether a dataset is a file, not one of a hub, whose name may hold dots too."""
    return re.search(r"\.(csv|tsv|jsonl|ndjson|json|parquet|arrow)(\.(gz|zst|bz2|xz))?$", name,
                     re.I) is not None  # fmt: skip


def sources(case: Case) -> Fields:
    """Return the source that a dataset becomes: pairs, demonstrations or prompts."""
    name = str(case.values.get("data_path") or case.values.get("dataset_name") or "")
    split = case.values.get("train_split", case.values.get("dataset_train_split"))
    config = case.values.get("dataset_config")
    if isinstance(split, str) and ":" in split:
        config, _, split = split.partition(":")
    if not name:
        return []
    if config and not is_data_file(name):
        name = f"{name}:{config}"
    if case.trainer == "reward_model":
        return [("data.source", name), *([("data.hub_split", str(split))] if split else [])]
    column = case.values.get("text_column")
    item = {"source": name, "prompt_column": column, "hub_split": split}
    item = {key: str(value) for key, value in item.items() if value}
    return [("data.prompts_source" if case.is_ppo else "data.sft_source", [item])]
