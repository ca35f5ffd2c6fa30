"""Miniatures: random models of a real model's class and configuration, but few and narrow layers.

A miniature has the real vocabulary, layer types, positions and options, so that whatever depends on
them can be tried in seconds before the real weights are read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch

from rlhf.modeling.structure import call, sections_of

#: Most parameters of a miniature; a vocabulary of 260,000 tokens has 17 million at a width of 64.
MAX_PARAMETERS = 60_000_000
#: Most layers, if more are needed for one of each type.
MAX_LAYERS = 12
#: Heads of attention at most, and their width.
HEADS, HEAD_WIDTH = 4, 16
WIDTH = HEADS * HEAD_WIDTH

#: Sizes by field, for whatever families call the parts of a block. Not larger than the real ones.
_SIZES = {
    "intermediate_size": 96, "n_inner": 96, "ffn_dim": 96, "ffn_hidden_size": 96, "d_ff": 96,
    "block_ff_dim": 96, "mlp_hidden_size": 96,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "intermediate_size_mlp": 96, "expert_ffn_hidden_size": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "top_k": 2,
    "moe_top_k": 2, "experts_per_token": 2, "n_shared_experts": 1, "num_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "num_dense_experts": 1, "decoder_sparse_step": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 16,
    "index_block_size": 16, "index_topk_blocks": 2,
    "mamba_d_state": 16, "state_size": 16, "ssm_state_size": 16, "mamba_dt_rank": 4,
    "time_step_rank": 4, "mamba_chunk_size": 16, "chunk_size": 16,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "adapter_rank": 8,
    "hidden_size_per_layer_input": 4, "laurel_rank": 8,
}  # fmt: skip

#: Lists and numbers from which the types of layers follow.
_TYPES = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "attention_types")
_PERIODS = (
    "full_attention_interval", "sliding_window_pattern", "attn_layer_period", "expert_layer_period",
    "interleave_moe_layer_step", "no_rope_layer_interval", "global_attn_every_n_layers",
    "attn_layer_offset", "moe_layer_frequency", "cross_attention_interval",
)  # fmt: skip


def miniature(config: Any, model_class: Any, seed: int = 0) -> Any:
    """Make a miniature of a model in float32, with random weights.

    Args:
        config: The real model's configuration; it is not changed.
        model_class: Auto class that makes the model, such as `AutoModelForCausalLM`.
        seed: Seed of the weights.

    Raises:
        ValueError: No way of shrinking gives a model that computes, or none small enough.
    """
    errors: list[str] = []
    for shrink in (_narrow, _scaled, _shallow):
        try:
            small = shrink(config)
            with torch.device("meta"):
                size = model_class.from_config(copy.deepcopy(small)).num_parameters()
            if size > MAX_PARAMETERS:
                errors.append(f"{size:,} parameters")
                continue
            torch.manual_seed(seed)
            model = model_class.from_config(small, dtype=torch.float32).eval()
            _enlarge(model)
            _check(model)
        # Sizes that do not fit together raise whatever the family's code happens to raise.
        except Exception as error:
            errors.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}")
            continue
        return model
    raise ValueError(f"no miniature of {config.model_type!r} ({'; '.join(errors)})")


def _shallow(config: Any) -> Any:
    """Return a copy with fewer layers, as many as have one of each type."""
    small = copy.deepcopy(config)
    for section in sections_of(small):
        if getattr(section, "is_heterogeneous", False):
            # Widths of single layers, by their index; the others' are kept.
            section.per_layer_config = {}
        layers = getattr(section, "num_hidden_layers", None)
        if isinstance(layers, int):
            _cut_layers(section, layers, min(layers, _layers_needed(section, layers)))
    return small


def _narrow(config: Any) -> Any:
    """Return a shallow copy with few narrow heads and small feed-forward layers."""
    return _changed(config, _set_widths)


def _scaled(config: Any) -> Any:
    """Return a shallow copy with all widths divided by one number, so that they fit together."""
    return _changed(config, _divide_widths)


def _changed(config: Any, change: Callable[[Any], None]) -> Any:
    small = _shallow(config)
    for section in sections_of(small):
        change(section)
    return small


def _layers_needed(section: Any, layers: int) -> int:
    """Return the shortest prefix of layers that has one of each type, at least 2."""
    needed = 2
    for name in _TYPES:
        types = getattr(section, name, None)
        if isinstance(types, list | tuple) and len(types) >= layers:
            kinds = [str(t) for t in types[:layers]]
            needed = max(needed, 1 + max(kinds.index(kind) for kind in set(kinds)))
            if kinds.count("hybrid") > 1:  # Zamba's share their weights, of which it takes two
                needed = max(needed, 1 + kinds.index("hybrid", kinds.index("hybrid") + 1))
    for name in _PERIODS:
        period = getattr(section, name, None)
        if isinstance(period, int) and not isinstance(period, bool):
            needed = max(needed, min(period + 1, layers))
    if getattr(section, "num_kv_shared_layers", None):
        needed *= 2  # the first half has keys and values of its own
    return min(needed, MAX_LAYERS, layers)


def _cut_layers(section: Any, layers: int, count: int) -> None:
    """Reduce the layers to `count`; a list of the layers' kinds keeps one of each."""
    for name, value in [*vars(section).items()]:
        if isinstance(value, list) and len(value) == layers and layers > 1:
            setattr(section, name, _with_each_kind(value, count))
        elif isinstance(value, list) and name.endswith(("_indices", "_idxs", "_layer_ids")):
            # Indices of layers of a kind: those that remain, or else the last layer.
            setattr(section, name, [i for i in value if i < count] or [count - 1])
    for name in ("num_hidden_layers", "num_kv_shared_layers", "max_window_layers"):
        value = getattr(section, name, None)
        if isinstance(value, int):
            shares = name == "num_kv_shared_layers"
            limit = count if name == "num_hidden_layers" else count // 2 if shares else count - 1
            setattr(section, name, min(value, limit))


def _with_each_kind(values: list[Any], count: int) -> list[Any]:
    """Return the first `count` values, with the last ones replaced by kinds that are missing."""
    first = list(values[:count])
    missing = [v for i, v in enumerate(values) if v not in first and v not in values[:i]]
    for index, value in zip(range(count - 1, 0, -1), missing, strict=False):
        first[index] = value
    return first


def _set_widths(section: Any) -> None:
    heads = getattr(section, "num_attention_heads", None)
    if not isinstance(heads, int) or not isinstance(getattr(section, "hidden_size", None), int):
        return _limit(section)
    groups = getattr(section, "num_key_value_heads", None) or heads
    ratio = heads // groups if isinstance(groups, int) and heads % groups == 0 else 1
    small_groups = 1 if groups == 1 else 2
    small_heads = min(heads, HEADS if groups in (1, heads) else small_groups * min(ratio, 2))
    head_width = getattr(section, "head_dim", None)
    tied = head_width is None or head_width * heads == section.hidden_size
    width = small_heads * HEAD_WIDTH
    while width < WIDTH and not tied:
        width *= 2
    section.hidden_size = width
    section.num_attention_heads = small_heads
    for name, value in (
        ("num_key_value_heads", small_groups if groups != heads else small_heads),
        ("head_dim", HEAD_WIDTH), ("global_head_dim", HEAD_WIDTH), ("kv_channels", HEAD_WIDTH),
        ("word_embed_proj_dim", width), ("embedding_size", width), ("lru_width", width),
        ("block_dim", width), ("conv_dim", width), ("query_pre_attn_scalar", HEAD_WIDTH),
        ("rotary_dim", HEAD_WIDTH), ("num_global_key_value_heads", 1),
        ("attention_hidden_size", 2 * width), ("attention_head_dim", 2 * width // small_heads),
        ("mamba_n_heads", 4), ("mamba_num_heads", 4),
        ("mamba_n_groups", 1), ("mamba_ngroups", 1), ("n_groups", 1), ("n_mamba_heads", 2),
        ("swa_head_dim", HEAD_WIDTH), ("swa_num_attention_heads", small_heads),
        ("swa_num_key_value_heads", small_groups),
    ):  # fmt: skip
        if isinstance(getattr(section, name, None), int):
            _set(section, name, value)
    expand = getattr(section, "mamba_expand", None) or getattr(section, "expand", None)
    inner = int(width * expand) if isinstance(expand, int | float) else width
    for name in ("mamba_d_head", "mamba_head_dim"):
        if getattr(section, name, None) is not None:
            setattr(section, name, inner // 4)
    if isinstance(getattr(section, "mamba_d_ssm", None), int):
        section.mamba_d_ssm = inner
    return _limit(section)


def _set(section: Any, name: str, value: int) -> None:
    """Set a size, unless the configuration computes it from others."""
    with suppress(AttributeError):
        setattr(section, name, value)


def _limit(section: Any) -> None:
    """Lower sizes to those of `_SIZES`, and lists that split a head's width."""
    for name, size in _SIZES.items():
        value = getattr(section, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > size:
            _set(section, name, size)
    _fit_rope(section, HEAD_WIDTH)


def _fit_rope(section: Any, head_width: int) -> None:
    """Fit per-frequency lists of RoPE to the width of a head."""
    for holder in (getattr(section, n, None) for n in ("rope_parameters", "rope_scaling")):
        for options in _nested(holder):
            share = options.get("partial_rotary_factor") or getattr(
                section, "partial_rotary_factor", 1.0
            )
            pairs = int(head_width * share) // 2
            for name in ("short_factor", "long_factor"):
                if isinstance(options.get(name), list):
                    # Evenly chosen, so that high and low frequencies both remain.
                    values = options[name]
                    options[name] = [values[i * len(values) // pairs] for i in range(pairs)]
            if isinstance(options.get("mrope_section"), list):
                parts = len(options["mrope_section"])
                options["mrope_section"] = [pairs - (parts - 1) * (pairs // parts)] + [
                    pairs // parts
                ] * (parts - 1)


def _nested(options: Any) -> Iterator[dict[str, Any]]:
    if isinstance(options, dict):
        yield options
        for value in options.values():
            yield from _nested(value)


def _divide_widths(section: Any) -> None:
    width = getattr(section, "hidden_size", None)
    if not isinstance(width, int):
        return
    factor = 2 ** max(0, int(math.log2(max(1, width / 128))))
    for name, value in [*vars(section).items()]:
        is_width = (
            any(
                part in name
                for part in (
                    "hidden",
                    "_dim",
                    "dim_",
                    "intermediate",
                    "rank",
                    "d_model",
                    "width",
                    "_size",
                    "d_head",
                    "d_ssm",
                    "state",
                )
            )
            and "vocab" not in name
            and "window" not in name
            and "layers" not in name
        )
        if is_width and type(value) is int and value % factor == 0 and value > factor:
            setattr(section, name, value // factor)
    head_width = getattr(section, "head_dim", None)
    if isinstance(head_width, int):
        _fit_rope(section, head_width)


@torch.no_grad()
def _enlarge(model: Any) -> None:
    """Scale up matrices that would make every state and every attention nearly the same.

    The usual standard deviation of 0.02 suits wide layers. In a narrow one attention would be all
    but uniform, and no error of positions or masks would show in the results.
    """
    for parameter in model.parameters():
        if parameter.ndim >= 2 and parameter.numel():
            wanted, size = parameter.shape[-1] ** -0.5, float(parameter.float().std())
            if 0 < size < wanted:
                parameter.mul_(wanted / size)


@torch.no_grad()
def _check(model: Any) -> None:
    """Compute a few tokens, without a cache: whether it has one that works is found later.

    Raises:
        ValueError: The result is not finite.
    """
    ids = torch.arange(12)[None] % model.get_input_embeddings().num_embeddings
    # Logits, scores or hidden states.
    result = call(model, input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True)[0]
    if not torch.isfinite(result).all():
        raise ValueError("its results are not finite")
