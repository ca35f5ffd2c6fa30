"""Generation configs: refused if broken, repaired where a flag has no effect.

transformers loads a contradictory one with a warning, and refuses to write it once a trainer has
changed anything in it: after the training, whose weights would be lost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from rlhf.limits import MAX_MODEL_BYTES, load_json, read_some

log = logging.getLogger(__name__)

FILE = "generation_config.json"

#: Flags without effect unless `do_sample` is true, and unless `num_beams` is above 1.
_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip
_BEAMS = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty")
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
_CACHES = ("cache_implementation", "cache_config")
#: Ways to decode whose code transformers 5 has no longer, and takes from the hub.
_FOREIGN = (
    "num_beam_groups", "dola_layers", "force_words_ids", "constraints", "custom_generate",
)  # fmt: skip
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_generation_config(folder: Path, error: Callable[[str], Exception]) -> None:
    """Refuse a model's `generation_config.json` that could not be published again.

    Args:
        folder: The model's files.
        error: Makes the exception to raise from a reason.
    """
    path = folder / FILE
    if not path.is_file():
        return
    content: Any = None
    with suppress(ValueError):
        content = load_json(read_some(path, MAX_MODEL_BYTES))
    if not isinstance(content, dict):
        # transformers would go on without it, and without the end tokens that it names.
        raise error(f"its {FILE} is no JSON object; restore it, or remove it if there was none")
    for name in _TOKENS:
        ids = content.get(name)
        # GenerationConfig takes anything, and a reply would end elsewhere or never.
        if any(type(i) is not int for i in (ids if isinstance(ids, list) else [ids or 0])):
            raise error(
                f"{name} = {ids!r} in its {FILE} is no token id; give a number, or a list of them"
            )
    for name in _FOREIGN:
        if content.get(name) and content[name] != 1:
            raise error(
                f"{name} = {str(content[name])[:60]!r} in its {FILE} is a way to decode for which "
                "transformers fetches code; remove the field"
            )
    reason = ""
    try:
        config = GenerationConfig.from_pretrained(str(folder))
        reason = repair(config)
    except Exception as problem:  # values of wrong types raise any class
        reason = _one_line(problem)
    if reason:
        raise error(f"its {FILE} is invalid ({reason}); correct that value, or remove the file")


def repair(config: GenerationConfig) -> str:
    """Unset flags that have no effect and would keep a config from being saved.

    `generate` draws the same replies as before.

    Returns:
        What is still invalid, on one line; empty if nothing is.
    """
    if not _problem(config):
        return ""
    if config.do_sample is not True:
        _unset(config, _SAMPLING)
    if config.num_beams in (None, 1):
        _unset(config, _BEAMS)
    if config.return_dict_in_generate is not True:
        _unset(config, _OUTPUTS)
    if config.use_cache is False:
        _unset(config, _CACHES)
    if isinstance(config.pad_token_id, int) and config.pad_token_id < 0:
        config.pad_token_id = None
    return _problem(config)


def make_savable(model: Any) -> None:
    """Repair a model's generation config before it is saved, whatever is in it.

    The last resort is one that holds the special tokens alone: weights that were trained must not
    be lost for a flag.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not model.can_generate():
        return
    problem = repair(config)
    if problem:
        log.warning("the %s is published with its special tokens only: %s", FILE, problem)
        tokens = {name: getattr(config, name, None) for name in _TOKENS}
        model.generation_config = GenerationConfig(**tokens)


def _unset(config: GenerationConfig, names: Sequence[str]) -> None:
    for name in names:
        if getattr(config, name, None) is not None:
            setattr(config, name, None)


def _problem(config: GenerationConfig) -> str:
    """Return why a config can't be saved; empty if it can."""
    try:
        config.validate(strict=True)
    except Exception as problem:  # values of wrong types raise any class
        return _one_line(problem)
    return ""


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:160]
