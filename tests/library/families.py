"""Tiny random-weight models of the causal language models that transformers knows.

`FAMILIES` maps a name to a `model_type` and the fields in which it differs from `SIZES`. A variant
of a family is called `family-variant`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

#: Sizes that a configuration takes if it has a field of that name.
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
    # dropout, which SFT would apply
    "dropout": 0.0, "attention_dropout": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "resid_pdrop": 0.0, "hidden_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "shared_intermediate_size": 16, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 32,
    "decoder_sparse_step": 1,
    # latent attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "qk_head_dim": 16, "v_head_dim": 8,
    # linear attention and state spaces
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8,
    "mamba_n_groups": 1, "mamba_d_ssm": 64, "mamba_chunk_size": 8, "mamba_dt_rank": 4,
    "state_size": 8, "mamba_headdim": 8, "n_mamba_heads": 2, "lru_width": 32,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "chunk_size": 8,
    "time_step_rank": 4,
}  # fmt: skip

_LATENT = {"num_key_value_heads": 4}
_INDEXED = {**_LATENT, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}
_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8, "depth": 1, "num_heads": 2, "out_hidden_size": 32,
    "head_dim": 8, "num_key_value_heads": 2, "default_output_length": 4,
}  # fmt: skip
_LINEAR_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_SLIDING_FULL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
_THETA = {"rope_theta": 10000.0}
_LONGROPE = {
    "rope_parameters": {
        **_THETA, "rope_type": "longrope", "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 3.0, 4.0], "original_max_position_embeddings": 24, "factor": 8.0,
    },
    "original_max_position_embeddings": 24,
}  # fmt: skip
_DYNAMIC = {
    "rope_parameters": {**_THETA, "rope_type": "dynamic", "factor": 4.0},
    "max_position_embeddings": 24,
}
_YARN = {
    "rope_parameters": {
        **_THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
    }
}  # fmt: skip
_LLAMA3 = {
    "rope_parameters": {
        **_THETA, "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    }
}  # fmt: skip
_LINEAR = {"rope_parameters": {**_THETA, "rope_type": "linear", "factor": 2.0}}

#: Families and variants: `model_type` and fields of the text model. Values of "vision_config" and
#: the like belong to the outer configuration.
FAMILIES: dict[str, tuple[str, Mapping[str, Any]]] = {
    # Llama's kind
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-mha-bias": (
        "llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}
    ),
    "llama-rope-llama3": ("llama", _LLAMA3),
    "llama-rope-yarn": ("llama", _YARN),
    "llama-rope-linear": ("llama", _LINEAR),
    "llama-rope-dynamic": ("llama", _DYNAMIC),
    "llama-rope-longrope": ("llama", _LONGROPE),
    "llama-head-dim": ("llama", {"head_dim": 16}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 4}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "ministral": ("ministral", {"sliding_window": 4}),
    "ministral3": ("ministral3", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    ),
    "qwen2-rope-yarn": ("qwen2", _YARN),
    "qwen3": ("qwen3", {}),
    "qwen3-window": ("qwen3", {**_SLIDING_FULL, "use_sliding_window": True}),
    "qwen3-rope-dynamic": ("qwen3", _DYNAMIC),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "arcee": ("arcee", {}),
    "apertus": ("apertus", {}),
    "bitnet": ("bitnet", {}),
    "cwm": ("cwm", {"sliding_window": 4, "bos_token_id": 2}),
    "diffllama": ("diffllama", {}),
    "doge": ("doge", {}),
    "ernie4_5": ("ernie4_5", {}),
    "exaone": ("exaone", {}),
    "exaone4": ("exaone4", {"sliding_window": 4, "sliding_window_pattern": 2}),
    "exaone4-full": ("exaone4", {"layer_types": ["full_attention"] * 2}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "granite": (
        "granite",
        {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
         "attention_multiplier": 0.2},
    ),
    "granite_swa": ("granite_swa", {"sliding_window": 4}),
    "helium": ("helium", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "hyperclovax": ("hyperclovax", {}),
    "internlm3": ("internlm3", {}),
    "iquestcoder": ("iquestcoder", {}),
    "jais2": ("jais2", {}),
    "nanochat": ("nanochat", {}),
    "olmo": ("olmo", {}),
    "olmo-clip": ("olmo", {"clip_qkv": 0.5}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", _SLIDING_FULL),
    "seed_oss": ("seed_oss", {}),
    "vaultgemma": ("vaultgemma", {"sliding_window": 4}),
    "hrm_text": ("hrm_text", {}),
    # Gemma
    "gemma": ("gemma", {"num_key_value_heads": 1}),
    "gemma2": ("gemma2", {"sliding_window": 4}),
    "gemma2-wide": ("gemma2", {"sliding_window": 64}),
    "gemma3_text": ("gemma3_text", {"sliding_window": 4, "sliding_window_pattern": 2}),
    "gemma3": ("gemma3", {**_SLIDING_FULL, "vision_config": _VISION, "mm_tokens_per_image": 4}),
    "gemma3-wide": (
        "gemma3", {"sliding_window": 64, "vision_config": _VISION, "mm_tokens_per_image": 4}
    ),
    "gemma3n_text": (
        "gemma3n_text",
        {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 300,
         "hidden_size_per_layer_input": 8, "sliding_window": 4, "laurel_rank": 4,
         "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4,
         "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "gemma4_text": (
        "gemma4_text",
        {**_SLIDING_FULL, "global_head_dim": 16, "vocab_size_per_layer_input": 300,
         "hidden_size_per_layer_input": 8},
    ),
    "gemma4": (
        "gemma4",
        {**_SLIDING_FULL, "global_head_dim": 16, "vocab_size_per_layer_input": 300,
         "hidden_size_per_layer_input": 8, "vision_config": _VISION, "audio_config": None},
    ),
    "gemma4-moe": (
        "gemma4_text",
        {**_SLIDING_FULL, "global_head_dim": 16, "vocab_size_per_layer_input": 300,
         "hidden_size_per_layer_input": 0, "enable_moe_block": True, "top_k_experts": 2},
    ),
    # Phi, GPT and other dense families
    "phi": ("phi", {}),
    "phi-qk-layernorm": ("phi", {"qk_layernorm": True}),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 4}),
    "phi3-longrope": ("phi3", _LONGROPE),
    "gpt2": ("gpt2", {"n_positions": 128}),
    "gpt-sw3": ("gpt-sw3", {}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "gpt_bigcode-mha": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neo": (
        "gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 4}
    ),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "codegen": ("codegen", {"rotary_dim": 4, "n_ctx": 128}),
    "openai-gpt": ("openai-gpt", {}),
    "bloom": ("bloom", {}),
    "bloom-tp": ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}),
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-mqa": ("falcon", {"multi_query": True, "parallel_attn": True}),
    "falcon-alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False}),
    "mpt": ("mpt", {"max_seq_len": 128, "expansion_ratio": 2}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "opt-350m": (
        "opt",
        {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "stablelm": ("stablelm", {}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("starcoder2", {}),
    "starcoder2-window": ("starcoder2", {"sliding_window": 4}),
    "persimmon": ("persimmon", {}),
    "nemotron": ("nemotron", {}),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "cohere-qk-norm": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", {"sliding_window": 4, "sliding_window_pattern": 2}),
    "xglm": ("xglm", {"ffn_dim": 64}),
    "biogpt": ("biogpt", {}),
    "ctrl": ("ctrl", {"dff": 64}),
    "cpmant": ("cpmant", {"dim_head": 8, "dim_ff": 64}),
    "modernbert-decoder": (
        "modernbert-decoder",
        {"local_attention": 8, "layer_types": ["full_attention", "sliding_attention"],
         "bos_token_id": 2, "sep_token_id": 1, "cls_token_id": 2},
    ),
    "lara_mini": ("lara_mini", {}),
    "dory": ("dory", {}),
    "flint": ("flint", {}),
    "kolibri1": ("kolibri1", {}),
    "laguna": ("laguna", {}),
    "beam": ("beam", {}),
    "mellum": ("mellum", {}),
    # mixtures of experts
    "mixtral": ("mixtral", {}),
    "mixtral-window": ("mixtral", {"sliding_window": 4}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "olmoe": ("olmoe", {}),
    "flex_olmo": ("flex_olmo", {}),
    "phimoe": ("phimoe", {}),
    "gpt_oss": ("gpt_oss", _SLIDING_FULL),
    "gpt_oss-full": ("gpt_oss", {"layer_types": ["full_attention"] * 2}),
    "granitemoe": ("granitemoe", {"logits_scaling": 4.0}),
    "granitemoe_swa": ("granitemoe_swa", {"sliding_window": 4}),
    "granitemoeshared": ("granitemoeshared", {}),
    "jetmoe": ("jetmoe", {"kv_channels": 8}),
    "dbrx": (
        "dbrx",
        {"d_model": 32, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
         "ffn_config": {"ffn_hidden_size": 32, "hidden_size": 32, "moe_num_experts": 4,
                        "moe_top_k": 2}},
    ),
    "deepseek_v2": ("deepseek_v2", _LATENT),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "deepseek_v32": ("deepseek_v32", _INDEXED),
    "deepseek_v4": ("deepseek_v4", {"o_groups": 2, "o_lora_rank": 8}),
    "youtu": ("youtu", _LATENT),
    "minicpm3": ("minicpm3", _LATENT),
    "longcat_flash": ("longcat_flash", {**_LATENT, "zero_expert_num": 2}),
    "axk1": ("axk1", _LATENT),
    "axk2": ("axk2", _INDEXED),
    "sarvam_mla": ("sarvam_mla", _LATENT),
    "sarvam_moe": ("sarvam_moe", {}),
    "glm4_moe": ("glm4_moe", {}),
    "glm4_moe_lite": ("glm4_moe_lite", _LATENT),
    "glm_moe_dsa": ("glm_moe_dsa", _INDEXED),
    "dots1": ("dots1", {}),
    "ernie4_5_moe": ("ernie4_5_moe", {}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {}),
    "minimax_m2": ("minimax_m2", {}),
    "minimax_m3_vl_text": ("minimax_m3_vl_text", {}),
    "minimax_m3_vl_text-sparse": (
        "minimax_m3_vl_text",
        {"layer_types": ["minimax_m3_sparse", "full_attention"], "index_head_dim": 8,
         "index_n_heads": 2, "index_block_size": 4, "index_topk_blocks": 2},
    ),
    "solar_open": ("solar_open", {}),
    "exaone_moe": ("exaone_moe", {"sliding_window": 4}),
    "afmoe": ("afmoe", {"sliding_window": 4}),
    "aria_text": ("aria_text", {}),
    "cohere2_moe": ("cohere2_moe", {"sliding_window": 4}),
    "hy_v3": ("hy_v3", {}),
    "hy_v4": ("hy_v4", {}),
    "mimo_v2_flash": ("mimo_v2_flash", {}),
    "llama4_text": ("llama4_text", {"intermediate_size_mlp": 32, "attention_chunk_size": 8}),
    "llama4": (
        "llama4",
        {"intermediate_size_mlp": 32, "attention_chunk_size": 8,
         "vision_config": {**_VISION, "vision_output_dim": 16, "projector_input_dim": 16,
                           "projector_output_dim": 16}},
    ),
    "zaya": ("zaya", {"num_experts_per_tok": 1, "router_hidden_size": 16}),
    # linear attention, state spaces and their hybrids
    "qwen3_next": ("qwen3_next", _LINEAR_FULL),
    "qwen3_5_text": ("qwen3_5_text", _LINEAR_FULL),
    "qwen3_5": ("qwen3_5", {**_LINEAR_FULL, "vision_config": _VISION}),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", _LINEAR_FULL),
    "qwen4_exp_text": (
        "qwen4_exp_text",
        {**_LINEAR_FULL, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
         "indexer_budget": 8, "indexer_compress_ratio": 2, "ngram_vocab_size_base": 300,
         "split_ngram_parts": 1, "hc_lowrank": 8},
    ),
    "olmo_hybrid": ("olmo_hybrid", _LINEAR_FULL),
    "kimi_linear": (
        "kimi_linear", {**_LATENT, **_LINEAR_FULL, "linear_head_dim": 8, "linear_num_heads": 4}
    ),
    "bailing_hybrid": ("bailing_hybrid", {**_LATENT, **_LINEAR_FULL}),
    "minimax": ("minimax", {**_LINEAR_FULL, "block_size": 8}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": (
        "lfm2_moe", {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
    ),
    "lfm3": ("lfm3", {"layer_types": ["conv", "full_attention"]}),
    "granitemoehybrid": ("granitemoehybrid", _LINEAR_FULL),
    "granitemoehybrid-dense": (
        "granitemoehybrid",
        {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 0},
    ),
    "bamba": ("bamba", {"attn_layer_indices": [1]}),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "zamba": (
        "zamba",
        {"num_hidden_layers": 4, "head_dim": 16, "num_key_value_heads": 4,
         "layers_block_type": ["linear_attention", "hybrid"] * 2},
    ),
    "zamba2": (
        "zamba2",
        {"layers_block_type": ["linear_attention", "hybrid"], "num_key_value_heads": 4,
         "head_dim": 16},
    ),
    "zamba2-shared": (
        "zamba2",
        {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
         "num_key_value_heads": 4, "head_dim": 16},
    ),
    "falcon_h1": ("falcon_h1", {}),
    "nemotron_h": (
        "nemotron_h",
        {"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3},
    ),
    "recurrent_gemma": ("recurrent_gemma", {"num_hidden_layers": 3, "attention_window_size": 8}),
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {"num_heads": 8, "n_groups": 1}),
    "falcon_mamba": ("falcon_mamba", {}),
    "rwkv": ("rwkv", {"attention_hidden_size": 32}),
    "xlstm": ("xlstm", {"hidden_size": 64, "num_heads": 4, "qk_dim_factor": 1.0}),
    # not causal, or not made for text alone
    "xlnet": ("xlnet", {"d_inner": 64, "d_head": 8}),
    "bert": ("bert", {}),
    "bert-decoder": ("bert", {"is_decoder": True}),
    "roberta": ("roberta", {}),
    "xlm": ("xlm", {}),
    "roformer-decoder": ("roformer", {"is_decoder": True}),
    "electra": ("electra", {}),
    "bart": ("bart", {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}),
}  # fmt: skip


def config_of(family: str, vocabulary: int) -> Any:
    """Return the configuration of a family's tiny model."""
    model_type, fields = FAMILIES[family]
    outer: Any = AutoConfig.for_model(model_type)
    text = outer.get_text_config()
    sizes = {"vocab_size": vocabulary, **{k: v for k, v in SIZES.items() if k in _names(text)}}
    if text is outer:
        return type(outer)(**{**sizes, **fields})
    around = {k: v for k, v in fields.items() if k in _names(outer) - _names(text)}
    inner = {**sizes, **{k: v for k, v in fields.items() if k not in around}}
    return type(outer)(text_config=inner, **around)


def make_model(family: str, vocabulary: int, seed: int = 0) -> Any:
    """Make a family's tiny model with random weights that matter.

    transformers' own initial weights are so small at this width that a wrong mask or position would
    not show.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(family, vocabulary), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def _names(config: Any) -> set[str]:
    """Return the names of a configuration's fields."""
    return {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
