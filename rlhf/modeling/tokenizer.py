"""Tokenizers of pretrained models: loaded and completed; their tokens' rows and ends in a model."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils.hub import cached_file

from rlhf.data.chat_template import complete_template, render, turn_format
from rlhf.data.rendering import PAD, known_ends, listed_ids
from rlhf.errors import ConfigError
from rlhf.files import expand_home, is_dir, is_file, read_json
from rlhf.limits import MAX_TOKENIZER_BYTES
from rlhf.modeling.source import DESCRIPTION_FILES

log = logging.getLogger(__name__)

#: Tokens that families keep for padding, the best first.
_PAD_NAMES = (
    *("<|finetune_right_pad_id|>", "<|finetune_right_pad|>", "<|pad|>", "<pad>", "[PAD]", "<PAD>"),
    *("<|padding|>", "<|pad_token|>", "<|fim_pad|>", "<fim_pad>"),
)
_TOKEN_FIELDS = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
#: Tokens without any use, such as `<|reserved_special_token_0|>`, `<unused7>`, `[control_8]`.
_UNUSED = re.compile(
    r"[<\[>]{1,2}[|｜]?[\w▁]*(?:reserved|unused|dummy|place▁?holder|extra|special|control)[\w▁]*"
    r"[|｜]?[>\]<]{1,2}",
    re.IGNORECASE,
)
#: Share of a tokenizer's own tokens that may lack a row.
_MISSING_SHARE = 0.02
#: Rows that even a tiny vocabulary may have for padding.
_PADDED_ROWS = 1000
#: Words that are names of an end-of-reply token.
_END_NAMES = frozenset({"eos", "eot", "eom", "end", "stop", "sep", "endoftext", "endofturn"})
#: Tokens that stand for other inputs than text; a model may treat them differently.
_OTHER_INPUT = re.compile(r"image|img|video|vision|audio|speech|box|quad|point", re.IGNORECASE)


def load_tokenizer(folder: Path | str, revision: str | None = None) -> Any:
    """Load a tokenizer and complete it for training; see `load_tokenizer_and_ends`."""
    return load_tokenizer_and_ends(folder, revision)[0]


def load_tokenizer_and_ends(
    folder: Path | str, revision: str | None = None
) -> tuple[Any, list[int]]:
    """Load a tokenizer with one chat template, an end-of-reply token and a pad token.

    Its eos becomes the token that the template writes at the end of a reply, unless the template
    writes another text then. A pad token that is missing or ends replies becomes one that the
    vocabulary has: see `choose_pad`.

    Args:
        folder: Local folder or hub id.
        revision: Of a hub model; None is the newest.

    Returns:
        The tokenizer, and the ids that end a reply; that of its eos is the first.

    Raises:
        ConfigError: The tokenizer can't be loaded, it is another model's, it has no token that
            could end a reply, or a word for one, or its chat template can't be used.
    """
    extra = {"revision": revision} if revision else {}
    place = str(expand_home(folder)) if str(folder).startswith("~") else str(folder)
    _refuse_large(Path(place))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place, trust_remote_code=False, **extra, **_role_tokens(place, extra)
        )
    except Exception as error:  # broken files and missing packages raise many classes
        raise tokenizer_error(folder, error) from error
    _fix_segmentation(tokenizer, str(folder))
    config, generation = _configurations(place, extra)
    rows = _text(config, "vocab_size")
    _refuse_other_vocabulary(tokenizer, rows, str(folder))
    configured = generation if generation is not None else _text(config, "eos_token_id")
    ends = known_ends(tokenizer, configured)
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    elif ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    if tokenizer.chat_template is None:
        try:
            tokenizer.chat_template = _processor_template(place, extra)
        except (ValueError, AttributeError) as error:
            raise tokenizer_error(folder, error) from error
    complete_template(tokenizer, str(folder))
    end = _set_end(tokenizer, str(folder))
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model {str(folder)!r}: its tokenizer has no eos_token, so no reply could end; "
            "set one in the model's tokenizer_config.json"
        )
    _refuse_word(tokenizer, str(folder))
    written = [] if end is None else [tokenizer.convert_tokens_to_ids(end)]
    ends = list(dict.fromkeys([tokenizer.eos_token_id, *written, *ends]))
    choose_pad(tokenizer, ends, rows)
    _warn(tokenizer, str(folder))
    return tokenizer, ends


def tokenizer_error(folder: Path | str, error: Exception) -> ConfigError:
    """Return the ConfigError for a tokenizer that transformers can't load."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "custom code" in reason:
        return ConfigError(
            f"model {str(folder)!r}: its tokenizer needs code of its own (auto_map), which is "
            "never run; give the model with a tokenizer.json and without auto_map in its "
            "tokenizer_config.json"
        )
    if _is_local(folder):
        # A folder that holds a model: only its tokenizer is wrong.
        cure = "restore the tokenizer's files that were saved with the model"
        if not is_file(expand_home(folder) / "tokenizer.json"):
            cure = (
                "it has no tokenizer.json: copy it from where the model came from, or load its "
                "tokenizer once where sentencepiece and tiktoken are installed, and save it here "
                "with save_pretrained"
            )
        return ConfigError(
            f"model {str(folder)!r}: its tokenizer can't be loaded ({reason[:160].rstrip(' :')}); "
            f"{cure}"
        )
    return ConfigError(
        f"model {str(folder)!r} (base.path or a reward model's) can't be "
        f"loaded ({reason}); give a hub id, artifact:<digest>, s3://bucket/"
        "prefix or a local folder with config.json, a tokenizer and safetensors"
    )


def _refuse_large(folder: Path) -> None:
    """Refuse a folder with a file beside the weights that is too large to be a tokenizer's.

    Raises:
        ConfigError: There is one.
    """
    for path in sorted(folder.glob("*")) if is_dir(folder) else ():
        is_described = path.name.endswith(DESCRIPTION_FILES) and is_file(path)
        size = path.stat().st_size if is_described else 0
        if size > MAX_TOKENIZER_BYTES:
            raise ConfigError(
                f"model {str(folder)!r}: {path.name} has {size:,} bytes, and at most "
                f"{MAX_TOKENIZER_BYTES:,} are read; restore the tokenizer's files that were saved "
                "with the model"
            )


def _fix_segmentation(tokenizer: Any, model: str) -> None:
    """Switch off a tokenizer's dropout, which reads a text differently each time."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    pieces: Any = getattr(backend, "model", None)
    if getattr(pieces, "dropout", None):
        pieces.dropout = None
        log.warning(
            "model %r: its tokenizer draws pieces at random (dropout in tokenizer.json), which is "
            "switched off, in the published one too", model,
        )  # fmt: skip


def _refuse_other_vocabulary(tokenizer: Any, rows: int | None, model: str) -> None:
    """Refuse a tokenizer whose tokens can't be those of the model's embeddings.

    Added tokens and a few others may lack rows, and get new ones. Rows may lack tokens, for
    vocabularies are padded, but not most of a large one.

    Raises:
        ConfigError: It is another model's.
    """
    if not isinstance(rows, int):
        return
    vocabulary, added = tokenizer.get_vocab(), set(tokenizer.added_tokens_decoder)
    beyond = sorted((i, token) for token, i in vocabulary.items() if i >= rows)
    size = len(vocabulary)
    own = sum(i not in added for i, _ in beyond)
    if own > _MISSING_SHARE * size or rows > 2 * size + _PADDED_ROWS:
        raise ConfigError(
            f"model {model!r}: its tokenizer has {size:,} tokens, and its embeddings have {rows:,} "
            "rows (vocab_size), so it is another model's tokenizer; give the one that was saved "
            "with the weights"
        )
    if beyond:
        log.warning(
            "model %r: its embeddings have no row for %d of its tokenizer's tokens (first: %s); "
            "%d rows are added, each the mean of the others, which LoRA does not train",
            model, len(beyond), beyond[0][1], beyond[-1][0] + 1 - rows,
        )  # fmt: skip


def _refuse_word(tokenizer: Any, model: str) -> None:
    """Refuse an end-of-reply token that is a word of texts.

    Raises:
        ConfigError: It is one.
    """
    end = tokenizer.decode([tokenizer.eos_token_id]).strip()
    if end.isalpha() and end.lower() not in _END_NAMES:
        raise ConfigError(
            f"model {model!r}: its end-of-reply token (eos_token) is the word {end!r}, so that a "
            "reply would end wherever it is written; give the one that the model was trained "
            "with in tokenizer_config.json, such as </s>"
        )


def _is_local(folder: Path | str) -> bool:
    return is_file(expand_home(folder) / "config.json")


def choose_pad(tokenizer: Any, ends: Collection[int], rows: int | None) -> None:
    """Set a pad token that ends no reply, of the model's vocabulary if any of it can serve.

    In this order: the tokenizer's own; a token kept for padding; an unused one; unk; a new token in
    a row that the embeddings have beyond the tokenizer; a special token that the template does not
    write; BOS; a new token, for which `fit_embeddings` adds a row. Masks are by position, so a pad
    token may have another use.

    Args:
        tokenizer: The tokenizer, with its chat template.
        ends: Tokens that end a reply.
        rows: Rows of the model's embeddings; None if unknown.
    """
    own = tokenizer.pad_token_id
    if own is not None and own not in ends:
        return
    vocabulary = tokenizer.get_vocab()
    limit = rows or len(vocabulary)
    template = str(tokenizer.chat_template)
    automatic = tokenizer("x")["input_ids"]

    def serves(token: str | None) -> bool:
        i = vocabulary.get(token or "")
        return i is not None and i < limit and i not in ends

    by_id = sorted(vocabulary, key=lambda token: vocabulary[token])
    free = [t for t in by_id if serves(t) and t not in template and vocabulary[t] not in automatic]
    unused = [*_PAD_NAMES, *filter(_UNUSED.fullmatch, free), tokenizer.unk_token]
    roles = tokenizer.all_special_tokens
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    others = [t for t in reversed(free) if t in special.difference(roles)]
    used = [*(t for t in others if not _OTHER_INPUT.search(t)), tokenizer.bos_token]
    if vocabulary_size(tokenizer) < limit:
        used = []
    pad = next((token for token in [*unused, *used] if serves(token)), PAD)
    tokenizer.add_special_tokens({"pad_token": pad})


def vocabulary_size(tokenizer: Any) -> int:
    """Return the number of embeddings that a tokenizer's ids need."""
    return max(tokenizer.get_vocab().values()) + 1


def fit_embeddings(model: Any, tokenizer: Any) -> None:
    """Add embeddings for tokens beyond the model's vocabulary, and set its pad token.

    New rows are the mean of the others, and so the same in every run; those that transformers
    draws are not.
    """
    rows, size = model.get_input_embeddings().num_embeddings, vocabulary_size(tokenizer)
    if size > rows:
        model.resize_token_embeddings(size, mean_resizing=False)
        head = model.get_output_embeddings()
        with torch.no_grad():
            for layer in filter(None, (model.get_input_embeddings(), head)):
                for tensor in (layer.weight, getattr(layer, "bias", None)):
                    if tensor is not None and len(tensor) == size:
                        tensor[rows:] = tensor[:rows].mean(0)
    for config in _holders(model, "pad_token_id"):
        config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def set_ends(model: Any, ends: Sequence[int]) -> None:
    """Write the ends of a reply to a model's configurations, where `generate` reads them.

    The first, which is trained, is the only one that the model's configuration must name.
    """
    for config in _holders(model, "eos_token_id"):
        if ends[0] not in listed_ids(getattr(config, "eos_token_id", None)):
            config.eos_token_id = ends[0]
    generation = getattr(model, "generation_config", None)
    if generation is not None and set(listed_ids(generation.eos_token_id)) != set(ends):
        generation.eos_token_id = list(ends) if len(ends) > 1 else ends[0]


def _holders(model: Any, name: str) -> list[Any]:
    """Return the configurations that name a token: that of the text model, and who else does."""
    text = model.config.get_text_config(decoder=True)
    outer = model.config
    return [text] if outer is text or getattr(outer, name, None) is None else [text, outer]


def _configurations(place: str, extra: dict[str, Any]) -> tuple[Any, int | list[int] | None]:
    """Return a model's configuration and the ends of its generation configuration, or None."""
    config: Any = None
    generation: int | list[int] | None = None
    # What is wrong with a configuration is reported when the model is loaded.
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, **extra)
    except Exception as error:
        log.debug("no configuration of %s: %s", place, error)
    try:
        generation = GenerationConfig.from_pretrained(place, **extra).eos_token_id
    except Exception as error:
        log.debug("no generation configuration of %s: %s", place, error)
    return config, generation


def _processor_template(place: str, extra: dict[str, Any]) -> Any:
    """Return what older multimodal models have for a template beside their tokenizer, if any."""
    return _read(place, "chat_template.json", extra).get("chat_template")


def _role_tokens(place: str, extra: dict[str, Any]) -> dict[str, AddedToken]:
    """Return tokens of roles that older files describe by plain objects.

    transformers 5 reads those in tokenizer_config.json only if they name their type.
    """
    values = _read(place, "tokenizer_config.json", extra)
    return {
        name: AddedToken(**{key: value[key] for key in _TOKEN_FIELDS if key in value})
        for name, value in values.items()
        if name.endswith("_token") and isinstance(value, dict) and "__type" not in value
    }


def _read(place: str, name: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON file of a folder or hub id; empty if there is none."""
    path = cached_file(
        place, name, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, **extra,
    )  # fmt: skip
    return read_json(Path(path)) if path else {}


def _text(config: Any, name: str) -> Any:
    """Return a field of a configuration, or of that of its language model."""
    if config is None:
        return None
    value = getattr(config, name, None)
    return getattr(config.get_text_config(), name, None) if value is None else value


def _set_end(tokenizer: Any, model: str) -> str | None:
    """Make the template's end of a reply the tokenizer's eos, if the template does not change.

    Returns:
        The template's end of a reply, if it writes one.
    """
    end = turn_format(tokenizer).end
    if end is None or end == tokenizer.eos_token:
        return end
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    before, eos = render(tokenizer, messages, False), tokenizer.eos_token
    tokenizer.eos_token = end
    if eos is not None and render(tokenizer, messages, False) != before:
        tokenizer.eos_token = eos  # the template writes it elsewhere
    else:
        log.info("model %r: its template ends replies by %s, which becomes its eos", model, end)
    return end


def _warn(tokenizer: Any, model: str) -> None:
    """Log what training and template do differently."""
    difference = turn_format(tokenizer).difference
    if difference:
        log.warning(
            "model %r: before a past reply its chat template writes %s; replies are trained and "
            "sampled right behind the start of a reply, as plain transformers generate them",
            model, difference,
        )  # fmt: skip
    text = "A  b\nc"
    shown = tokenizer.decode(
        tokenizer(text, add_special_tokens=False)["input_ids"], clean_up_tokenization_spaces=False
    )
    if shown.strip() != text:
        log.warning(
            "model %r: its tokenizer reads %r as %r, so replies lose what differs",
            model, text, shown,
        )  # fmt: skip
