"""Models of the toy task, made on first use or read from RLHF_TOY_MODELS.

Most are trained by TRL, which a bare GPU machine lacks: `write_toy_models` makes them elsewhere.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from rlhf.config import BaseModelConfig, LoraConfig
from rlhf.modeling.base import from_scratch
from tests.library import toys

#: Folder of ready-made models; None makes them on first use.
READY = os.environ.get("RLHF_TOY_MODELS")
#: Architectures other than the project's own.
FAMILIES: dict[str, Callable[[int], Any]] = {
    # Relative positions: no limit on the input's length.
    "bloom": lambda n: BloomForCausalLM(
        BloomConfig(vocab_size=n, hidden_size=16, n_layer=1, n_head=2)
    ),
    "gpt2": lambda n: GPT2LMHeadModel(
        GPT2Config(vocab_size=n, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    ),
}


def toy_model(root: Path, name: str) -> Path:
    """Return a model's folder, made in `root` on first use; read-only.

    Args:
        root: Common folder of all calls: models are made from one another.
        name: `data` (the dataset) or a key of `MAKERS`.
    """
    if READY:
        folder = Path(READY) / name
        assert folder.is_dir(), f"RLHF_TOY_MODELS = {READY!r} has no {name}; write it anew"
        return folder
    return _made(root, name)


def write_toy_models(folder: Path) -> None:
    """Make all models in a folder for RLHF_TOY_MODELS; needs TRL."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MAKERS:
        _made(folder, name)


def _made(root: Path, name: str) -> Path:
    folder, partial = root / name, root / f".{name}"
    if not folder.exists():
        shutil.rmtree(partial, ignore_errors=True)  # left by a call that failed
        partial.mkdir()
        MAKERS[name](root, partial)
        partial.rename(folder)
    return folder


def _fresh(_: Path, folder: Path) -> None:
    model, tokenizer = from_scratch(toys.ARCHITECTURE, ["good bad tea cup"] * 4, seed=3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sft(root: Path, folder: Path) -> None:
    from rlhf.sft import train_sft

    train_sft(toys.SFT, toys.BASE, _made(root, "data"), folder, runtime=toys.RUNTIME)


def _reward(root: Path, folder: Path, base: str = "sft", **options: Any) -> None:
    from rlhf.reward import train_reward_model

    config: Any = toys.changed(toys.REWARD, **options)
    data, start = _made(root, "data"), _made(root, base)
    train_reward_model(config, data, start, folder, runtime=toys.RUNTIME)


def _adapter_reward(root: Path, folder: Path) -> None:
    _reward(root, folder, lora=LoraConfig(r=2, alpha=8.0), epochs=4)


def _fresh_reward(root: Path, folder: Path) -> None:
    _reward(root, folder, base="fresh")


def _family(family: str) -> dict[str, Callable[[Path, Path], None]]:
    """Return makers of this architecture's untrained base and trained models."""

    def base(root: Path, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(_made(root, "fresh"))
        torch.manual_seed(0)
        FAMILIES[family](len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def sft(root: Path, folder: Path) -> None:
        from rlhf.sft import train_sft

        config = BaseModelConfig(path=str(_made(root, f"{family}-base")))
        train_sft(toys.SFT, config, _made(root, "data"), folder, runtime=toys.RUNTIME)

    def reward(root: Path, folder: Path) -> None:
        _reward(root, folder, base=f"{family}-sft")

    return {f"{family}-base": base, f"{family}-sft": sft, f"{family}-reward": reward}


#: Functions that fill a model's folder, given the root folder of the others.
MAKERS: dict[str, Callable[[Path, Path], object]] = {
    "data": lambda _, folder: toys.write_data(folder),
    "fresh": _fresh,
    "sft": _sft,
    "reward": _reward,
    "adapter-reward": _adapter_reward,
    "fresh-reward": _fresh_reward,
    **_family("bloom"),
    **_family("gpt2"),
}
