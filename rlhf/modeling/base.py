"""Base models and tokenizers: initialised from scratch, or loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rlhf.config import ArchitectureConfig, BaseModelConfig
from rlhf.data.rendering import END, PAD, SPECIAL_TOKENS, TEMPLATE
from rlhf.errors import ConfigError
from rlhf.files import expand_home
from rlhf.modeling.structure import context_of
from rlhf.modeling.tokenizer import fit_embeddings, load_tokenizer_and_ends, set_ends

#: Context length of a model that sets no limit, such as one with relative positions.
UNBOUNDED = 2**31 - 1


def load_base(config: BaseModelConfig, texts: Iterable[str], seed: int) -> tuple[Any, Any]:
    """Return the base model and its tokenizer, with chat template and pad token.

    Raises:
        ConfigError: `base.path` can't be loaded, or its tokenizer has no end-of-text token.
    """
    if config.path is None:
        return from_scratch(config.architecture, texts, seed)
    model = load_policy(config.path, config.revision)
    tokenizer, ends = load_tokenizer_and_ends(config.path, config.revision)
    fit_embeddings(model, tokenizer)
    set_ends(model, ends)
    return model, tokenizer


def from_scratch(
    config: ArchitectureConfig, texts: Iterable[str], seed: int
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Initialise a small Llama model and train its tokenizer on `texts`."""
    tokenizer = train_tokenizer(texts, config.vocab_size)
    ids = tokenizer.get_vocab()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            pad_token_id=ids[PAD],
            eos_token_id=ids[END],
            bos_token_id=None,
        )
    )
    return model, tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in which each chat marker is one token."""
    # Otherwise the tokenizers library warns when the process forks later (Prefect's worker).
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in (PAD, END)],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def load_policy(folder: Path | str, revision: str | None = None) -> Any:
    """Load a causal language model in float32; see `load_pretrained`."""
    return load_pretrained(AutoModelForCausalLM.from_pretrained, folder, revision)


def load_pretrained(loader: Any, folder: Path | str, revision: str | None) -> Any:
    """Load in float32, from safetensors only, without running code from a hub.

    Args:
        loader: The `from_pretrained` of a transformers class.
        folder: Local folder or hub id.
        revision: Of a hub model; None is the newest.

    Raises:
        ConfigError: The model can't be loaded.
    """
    extra = {"revision": revision} if revision else {}
    try:
        return loader(
            str(expand_home(folder)) if str(folder).startswith("~") else str(folder),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            **extra,
        )
    except (OSError, ValueError) as error:
        raise loading_error(folder, error) from error


def loading_error(folder: Path | str, error: Exception) -> ConfigError:
    """Return the ConfigError for a model that transformers can't load."""
    return ConfigError(
        f"model {str(folder)!r} (base.path or a reward model's) can't be "
        f"loaded ({str(error).splitlines()[0]}); give a hub id, artifact:<digest>, s3://bucket/"
        "prefix or a local folder with config.json, a tokenizer and safetensors"
    )


def context_length(model: Any) -> int:
    """Return a model's context length in tokens, `UNBOUNDED` if it sets no limit."""
    return int(min(context_of(model.config), UNBOUNDED))


def folder_context(folder: Path | str) -> int:
    """Return the context length of a model's folder, without loading its weights.

    Raises:
        ConfigError: Its configuration can't be read.
    """
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise loading_error(folder, error) from error
    return int(min(context_of(config), UNBOUNDED))
