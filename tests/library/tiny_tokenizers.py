"""Tiny tokenizers and chat templates with the properties of pretrained families'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "User: tea or cup? why\n\nAssistant: a good cup of tea",
    "good bad jar pot mug user model system assistant Probe Answer x y",
    "be kind\n0 1 2 3 4 5 6 7 8 9 . ! ,",
]


def byte_level(special: list[str], size: int = 320) -> Tokenizer:
    """Byte-level BPE, like GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    return tokenizer


def metaspace(special: list[str], prepend: str = "always") -> Tokenizer:
    """BPE on characters with spaces as marks and bytes for the unknown, like Llama 2 and Gemma."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    scheme: Any = prepend
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    trainer = BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    tokenizer.add_tokens([f"<0x{i:02X}>" for i in range(256)][:0])
    return tokenizer


def unigram(special: list[str]) -> Tokenizer:
    """Unigram model, like T5 and XLNet: its pieces include the special tokens."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    return tokenizer


def with_bos(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """Let a tokenizer put a token before every text."""
    ids = [(token, tokenizer.token_to_id(token))]
    tokenizer.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=ids)
    return tokenizer


def in_lower_case(tokenizer: Tokenizer) -> Tokenizer:
    """Let a tokenizer read every text in lower case."""
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def fast(tokenizer: Tokenizer, template: str | None = None, **roles: Any) -> Any:
    """Return transformers' tokenizer, with a chat template."""
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    made.chat_template = template
    return made


def add(tokenizer: Any, token: str, special: bool = False, **options: Any) -> None:
    """Add a token that has no role."""
    tokenizer.add_tokens([AddedToken(token, special=special, **{"normalized": False, **options})])


def write_model(
    folder: Path, tokenizer: Any, rows: int | None = None, ends: Any = None, **config: Any
) -> Path:
    """Write a tiny Llama with its tokenizer; `ends` is `eos_token_id` of the generation config."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows or len(tokenizer), hidden_size=16, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=32, max_position_embeddings=128,
            bos_token_id=None, **{"eos_token_id": tokenizer.eos_token_id, **config},
        )
    )  # fmt: skip
    if ends is not None and model.generation_config is not None:
        model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


#: A turn ends with a token that is not the tokenizer's eos, as in Gemma's; contents are trimmed.
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}{{ '<turn>' + m['role'] + '\n' + m['content'] | trim "
    "+ '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
).replace("m['role']", "('model' if m['role'] == 'assistant' else m['role'])")
#: Headers of tokens without a role, as in Llama 3's, and today's date.
HEADERS = (
    "{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set day = '1 May 2020' %}{%- endif %}"
    "{{- bos_token + '[h]system[/h]' + day + '<eot>' }}"
    "{%- for m in messages %}{{- '[h]' + m['role'] + '[/h]' + m['content'] | trim + '<eot>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '[h]assistant[/h]' }}{%- endif %}"
)
#: Lines with a role before each content, as in ChatML.
LINES = (
    "{% for m in messages %}{{ '<start>' + m['role'] + '\n' + m['content'] + '<end>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)
#: No start of a reply, and a blank before it, as in Llama 2's.
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[I] ' + m['content'] + "
    "' [/I]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only two roles') }}{% endif %}{% endfor %}"
)
#: A start of a reply that is written only with its content, as in Vicuna's.
NAMED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'MODEL: ' + m['content'] + "
    "eos_token }}{% else %}{{ m['role'] | upper + ': ' + m['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
)
#: Thoughts are opened where a reply starts, and left out of a past one, as in DeepSeek-R1's.
THINKING = (
    "{% for m in messages %}{{ '<start>' + m['role'] + '\n' + m['content'].split('</think>')[-1] "
    "+ '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start>assistant\n<think>\n' }}"
    "{% endif %}"
)
