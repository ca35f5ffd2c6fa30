"""When a run rehearses: before its first training stage on a machine, once per configuration.

A rehearsal that passed is remembered in the work folder, by everything that could change its
outcome: the settings of the stages, the files of the models but for their weights, the code and the
versions of libraries.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import PipelineConfig, apply_machine_settings
from rlhf.errors import ConfigError
from rlhf.files import expand_home, files_sha256, is_dir, read_json, write_json
from rlhf.modeling.headers import look_untrained
from rlhf.modeling.source import DESCRIPTION_FILES, ExternalModel, ExternalTokenizer
from rlhf.store import Producer
from rlhf.store.manifest import canonical_json, sha256_bytes
from tasks.external_inputs import external_base_model, external_judge, external_reward_model
from tasks.stage import StageRun, store_of

if TYPE_CHECKING:
    from rlhf.rehearsal_rows import Sample

log = logging.getLogger("rlhf.tasks")
#: Sections of the configuration that a rehearsal depends on.
_SECTIONS = ("base", "sft", "reward_model", "judge", "ppo", "evaluation", "data")
#: Settings of the data that change no stage's computation.
_DATA = ("max_prompt", "max_reply", "system")


def rehearse_stage(run: StageRun) -> None:
    """Rehearse a run before its first training stage on this machine.

    A model trained from scratch is the project's own, and is not rehearsed.

    Raises:
        RehearsalFailed: A stage fails with this model, or computes wrong numbers.
    """
    if external_base_model(run.config) is None:
        _check_weights(run.config)
        return
    from rlhf.rehearsal_rows import Sample

    # The stages after SFT start from its policy, which has the base's class and tokenizer. They
    # may run where the base itself can't be read.
    folder = run.folders.get("sft")
    key = _key(run.config, run.producer, _local_bases(run.config))
    if folder is not None and _record(run.config, key).is_file():
        return
    folder = folder or run.folders["base"]
    rehearse_once(run.config, folder, Sample.of(run.folders["data"]), run.producer)


def rehearse_once(
    config: PipelineConfig, base: Path, sample: Sample, producer: Producer
) -> Sequence[str]:
    """Rehearse a configuration, unless that has been done on this machine.

    Args:
        config: The run's configuration.
        base: Folder of the base model, with or without its weights.
        sample: Rows to train on.
        producer: Versions of the code and of libraries.

    Returns:
        Remarks: what could not be rehearsed.

    Raises:
        ConfigError: Replies leave no room for a prompt in the model's context.
        RehearsalFailed: A stage fails with this model, or computes wrong numbers.
    """
    from rlhf.rehearsal import rehearse

    _check_weights(config)
    _check_context(config, base)
    work_dir = expand_home(apply_machine_settings(config).runtime.work_dir)
    with tempfile.TemporaryDirectory(dir=work_dir, prefix="rehearsal-") as scratch:
        bases = {
            name: (external, _small_files(external, config, Path(scratch, name)))
            for name, external in _externals(config).items()
        }
        folders = [base, *(folder for _, folder in bases.values())]
        record = _record(config, _key(config, producer, folders))
        if record.is_file():
            remarks = read_json(record)["remarks"]
        else:
            log.info("rehearsing every stage on a miniature of %s", config.base.path)
            stages = Path(scratch, "stages")
            stages.mkdir()
            remarks = rehearse(config, base, sample, stages, **bases)
    for remark in remarks:
        log.warning("%s", remark)
    # For stages after SFT, also where the folder of a reward model is not there any more.
    later = [_key(config, producer, folders) for folders in (_local_bases(config), [])]
    for path in (record, *(_record(config, key) for key in later)):
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"remarks": remarks})
    return remarks


@contextmanager
def base_without_weights(config: PipelineConfig) -> Iterator[Path | None]:
    """Fetch the base model's configuration and tokenizer; None if it is trained from scratch.

    Raises:
        ConfigError: The model is missing or incomplete.
        StoreError: The server can't be reached.
    """
    external = external_base_model(config)
    if external is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield _small_files(external, config, Path(scratch, "base"))


def _check_context(config: PipelineConfig, base: Path) -> None:
    """Refuse replies that leave no room for a prompt in the base's context.

    Raises:
        ConfigError: They do.
    """
    from rlhf.modeling.base import folder_context

    try:
        context = folder_context(base)
    except ConfigError:
        return  # the rehearsal tells what is wrong with the base
    if config.token_limits().within(context).prompt < 1:
        raise ConfigError(
            f"ppo.max_new_tokens = {config.ppo.max_new_tokens} leaves no room for a prompt in the "
            f"context of base.path = {config.base.path!r}, which is {context:,} tokens; lower it, "
            "or name a base with a longer context"
        )


def _check_weights(config: PipelineConfig) -> None:
    """Check that the weights of models in local folders fit, and warn of an untrained base.

    Others are checked when they are fetched and loaded.

    Raises:
        ConfigError: The files are damaged, or don't fit.
    """
    from rlhf.modeling.classifier import check_classifier
    from rlhf.modeling.pretrained import check_weights

    base, reward_model = external_base_model(config), external_reward_model(config)
    judge = external_judge(config)
    for external, check in (
        (base, check_weights), (reward_model, check_classifier), (judge, check_classifier),
    ):  # fmt: skip
        if external is not None and _local_folder(external):
            check(external.path, field=external.field)
    for folder in _local_folder(base):
        if look_untrained(folder):
            log.warning(
                "base.path = %r: its weights look untrained (every norm and bias holds one number "
                "alone, as in a new model); if so, a run learns the form of replies at best: give "
                "a pretrained model, or take this one for trying things out",
                config.base.path,
            )


def _externals(config: PipelineConfig) -> dict[str, ExternalModel]:
    """Return the external models beside the base, by the arguments of `rehearse`."""
    externals = {"reward_base": external_reward_model(config), "judge_base": external_judge(config)}
    return {name: external for name, external in externals.items() if external is not None}


def _local_bases(config: PipelineConfig) -> list[Path]:
    """Return the folders of the external reward model and the judge's base, if they are local."""
    return [path for external in _externals(config).values() for path in _local_folder(external)]


def _local_folder(external: ExternalModel | None) -> list[Path]:
    if external is not None and external.is_path() and is_dir(external.path):
        return [external.path]
    return []


def _small_files(external: ExternalModel, config: PipelineConfig, scratch: Path) -> Path:
    """Return a folder with a model's files; of a remote one all but the weights."""
    if external.is_artifact:
        store = store_of(config)
        ref = store.resolve(external.uri)
        names = [
            entry.path
            for entry in store.manifest(ref).files
            if entry.path.endswith(DESCRIPTION_FILES)
        ]
        return store.fetch(ref, names)
    small = ExternalTokenizer(external.field, external.uri, external.options, external.revision)
    return small.fetch(scratch).folder


def _record(config: PipelineConfig, key: str) -> Path:
    """Return the file that remembers a rehearsal."""
    work_dir = expand_home(apply_machine_settings(config).runtime.work_dir)
    return work_dir / "rehearsals" / f"{key}.json"


def _key(config: PipelineConfig, producer: Producer, folders: Sequence[Path] = ()) -> str:
    """Return the identity of a rehearsal; without `folders` models count by their URIs alone."""
    sections: dict[str, Any] = {
        name: getattr(config, name).model_dump(mode="json") for name in _SECTIONS
    }
    sections["data"] = {name: sections["data"][name] for name in _DATA}
    files = {
        f"{index}/{path.name}": path
        for index, folder in enumerate(folders)
        for path in sorted(folder.iterdir())
        if path.name.endswith(DESCRIPTION_FILES) and path.is_file()
    }
    identity = {
        "sections": sections,
        "files": files_sha256(files.items()) if files else None,
        "code": producer.code_version,
        "versions": producer.versions,
        "device": config.runtime.device,
    }
    return sha256_bytes(canonical_json(identity))[:32]
