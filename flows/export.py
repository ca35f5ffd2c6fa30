"""The command `rlhf export`: a policy as a folder that others load, verified."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, validators

from flows.artifacts import ConfigOption, StoreOption
from rlhf.config import apply_machine_settings, load_config
from rlhf.config.pipeline import StoreConfig
from rlhf.errors import ConfigError
from tasks.console import PlainConsole, say

if TYPE_CHECKING:
    from rlhf.export import Checked

Number = Annotated[int, Parameter(validator=validators.Number(gte=1, lte=10_000))]


def export(
    policy: str, folder: str, *, format: Literal["safetensors", "gguf"] = "safetensors",
    prompts: Number = 16, new_tokens: Number | None = None, license: str | None = None,
    push: str | None = None, public: bool = False, converter: Path | None = None,
    store: StoreOption = None, config: ConfigOption = None,
) -> None:  # fmt: skip
    """Write a policy for others: weights, tokenizer, settings, model card; verified.

    A process without this project loads it and must give the policy's own greedy replies.

    Parameters
    ----------
    policy
        champion, champion:<line>, digest, its first 6 or more digits, a run's or a pin's name, or
        URI.
    folder
        A new folder, or s3://bucket/prefix with nothing below it.
    format
        gguf adds a file for llama.cpp, verified by llama-cpp-python.
    prompts
        Held-out prompts whose replies are compared.
    new_tokens
        Most tokens of these replies; default: those of the training, at most 64.
    license
        Licence for the card, such as apache-2.0; default: none is stated.
    push
        Upload it to this repository of the Hugging Face Hub too, owner/name: a new, private one.
    public
        Make that repository public.
    converter
        llama.cpp's convert_hf_to_gguf.py, for --format gguf; default: $RLHF_GGUF_CONVERTER.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from rlhf.model_card import checked_licence
    from tasks.export import check_destination, export_policy, find_stored, push_to_hub
    from tasks.stage import store_of

    if public and push is None:
        raise ConfigError("--public is for --push; leave it out, or add --push owner/name")
    if converter is not None and format != "gguf":
        raise ConfigError("--converter is for --format gguf; leave it out, or add that")
    licence = None if license is None else checked_licence(license)
    check_destination(folder, push)
    extra = _gguf(converter) if format == "gguf" else None
    loaded = apply_machine_settings(
        load_config(config, [f"--store={store}"] if store else []).config
    )
    opened = store_of(loaded)
    found = find_stored(policy, opened, loaded.promotion)
    with _filled(folder, loaded.store_options) as out:
        facts, checked = export_policy(
            found, opened, out, loaded.runtime, prompts=prompts, new_tokens=new_tokens,
            licence=licence, extra=extra, report=lambda line: say(f"{line} …", "dim"),
        )  # fmt: skip
        url = push_to_hub(out, push, private=not public) if push else ""
    _report(folder, url, facts, checked)


@contextmanager
def _filled(folder: str, options: StoreConfig) -> Iterator[Path]:
    """Provide a folder to fill, which appears whole at its destination, or not at all."""
    from rlhf.files import new_folder
    from tasks.export import S3, uploaded

    if folder.startswith(S3):
        with (
            tempfile.TemporaryDirectory(prefix="export-") as scratch,
            uploaded(folder, options, Path(scratch)) as out,
        ):
            yield out
        return
    try:
        with new_folder(Path(folder).absolute()) as out:
            yield out
    except OSError as error:
        if error.errno is None:  # of the store
            raise
        raise ConfigError(f"can't write to {folder!r} ({error}); choose another") from error


def _gguf(converter: Path | None) -> Any:
    """Return what adds the GGUF file, if all that it needs is there.

    Raises:
        ConfigError: Something is missing.
    """
    from rlhf.gguf import add_gguf, find_tools

    tools = find_tools(converter)
    return lambda out, prompts, replies: add_gguf(out, prompts, replies, tools)


def _report(folder: str, url: str, facts: Any, checked: Checked) -> None:
    versions = checked.versions
    say(f"verified: {checked.replies} in a fresh process (transformers {versions['transformers']})")
    if checked.adapter is not None:
        say(f"verified: its adapter, merged: {checked.adapter} of {checked.prompts}")
    if facts.verdict is None or not facts.verdict.approved:
        say(f"warning: {facts.standing}", "bold red", on=PlainConsole(stderr=True))
    if facts.licence is None and not facts.from_scratch:
        of = facts.base or "its base"
        say(f"licence: that of {of}, not known here; --license <id> writes it on the card")
    if url:
        say(f"pushed: {url}")
    say(f"written: {folder}")
