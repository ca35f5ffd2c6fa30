"""Tiny encoders with random weights and tokenizers of their kind, ready or to train from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

TEXT = ["good bad tea or cup jar pot mug? why. User: Assistant: System: be kind [SEP] </s>"] * 4
SIZES: dict[str, Any] = {
    "vocab_size": 340, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "num_labels": 1,
}  # fmt: skip
BERTS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ROBERTAS = {
    "bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>",
    "cls": "<s>", "sep": "</s>",
}  # fmt: skip


def wordpiece() -> PreTrainedTokenizerFast:
    """Return a tokenizer of BERT's kind, with token types."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=[*BERTS.values()])
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return _fast(tokenizer, BERTS, model_input_names=names)


def unigram() -> PreTrainedTokenizerFast:
    """Return a tokenizer of DeBERTa-v3's kind."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = [*BERTS.values()]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="[UNK]")
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return _fast(tokenizer, BERTS, model_input_names=names)


def byte_level() -> PreTrainedTokenizerFast:
    """Return a tokenizer of RoBERTa's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[*dict.fromkeys(ROBERTAS.values())],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return _fast(tokenizer, ROBERTAS)


def _fast(tokenizer: Tokenizer, roles: dict[str, str], **options: Any) -> PreTrainedTokenizerFast:
    tokens = {f"{role}_token": token for role, token in roles.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens, **options)


#: Configuration and tokenizer by family.
ENCODERS: dict[str, tuple[Any, Any]] = {
    "bert": (lambda: BertConfig(**SIZES, max_position_embeddings=96), wordpiece),
    "roberta": (
        lambda: RobertaConfig(**SIZES, max_position_embeddings=98, type_vocab_size=1),
        byte_level,
    ),
    "deberta-v2": (
        lambda: DebertaV2Config(
            **SIZES, max_position_embeddings=96, relative_attention=True, position_buckets=8,
            norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"],
            type_vocab_size=0, position_biased_input=False, pooler_hidden_size=16,
        ),
        unigram,
    ),
    "modernbert": (
        lambda: ModernBertConfig(
            **SIZES, max_position_embeddings=96, pad_token_id=0, cls_token_id=2, sep_token_id=3,
            bos_token_id=2, eos_token_id=3, global_attn_every_n_layers=2, local_attention=8,
        ),
        wordpiece,
    ),
}  # fmt: skip


def save_encoder(family: str, folder: Path, *, ready: bool) -> tuple[Any, Any]:
    """Write a classifier with one label or a masked language model; return it and its tokenizer."""
    folder.mkdir(exist_ok=True)
    make_config, make_tokenizer = ENCODERS[family]
    torch.manual_seed(1)
    auto: Any = AutoModelForSequenceClassification if ready else AutoModelForMaskedLM
    model, tokenizer = auto.from_config(make_config()), make_tokenizer()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # the usual 0.02 would make attention all but uniform
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer
