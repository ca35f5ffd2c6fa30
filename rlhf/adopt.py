"""Reward model stage without training: checks and publishes a ready reward model."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from rlhf.config import RuntimeConfig
from rlhf.data.rendering import Renderer
from rlhf.errors import ConfigError
from rlhf.files import write_json
from rlhf.modeling.base import device_of, fit_embeddings, load_tokenizer
from rlhf.modeling.reward import META, load_reward_model, reward_meta
from rlhf.modeling.shards import save_model
from rlhf.modeling.source import CONFIG, ExternalModel
from rlhf.stage import StageResult


def adopt_reward_model(
    model: ExternalModel, folder: Path, out_dir: Path, *, runtime: RuntimeConfig | None = None
) -> StageResult:
    """Check an external reward model; write it to `out_dir` as safetensors.

    Its `rlhf.json` (pooling, rendering) is copied. A tokenizer without chat template or padding
    token is completed like that of a base model.

    Args:
        model: The model's entry in the configuration; named in errors.
        folder: Its files on this machine.
        out_dir: Empty folder for the reward model.
        runtime: Device and threads.

    Raises:
        ConfigError: It is not a sequence-classification model with one label, lacks a `score` head
            or its weights, has no usable tokenizer, or not the one it was trained with.
    """
    device_of(runtime or RuntimeConfig())
    model.select([path.name for path in folder.iterdir()])
    model.check_config((folder / CONFIG).read_bytes())
    _check_head(model, folder)
    try:
        renderer = Renderer(load_tokenizer(folder))
        reward_model = load_reward_model(folder, renderer)
    except ConfigError as error:
        raise model.error(str(error)) from None
    meta = reward_meta(folder)
    if meta.get("template_hash") not in (None, renderer.template_hash):
        raise model.error(
            "its tokenizer or chat template changed since it was trained; restore them, or train "
            "it again"
        )
    fit_embeddings(reward_model, renderer.tokenizer)
    save_model(reward_model, out_dir)
    renderer.tokenizer.save_pretrained(out_dir)
    write_json(out_dir / META, {**meta, "pooling": reward_model.pooling})
    return StageResult({"parameters": reward_model.num_parameters()})


def _check_head(model: ExternalModel, folder: Path) -> None:
    """Check that the weights include the head.

    transformers would initialise a missing one randomly.

    Raises:
        ConfigError: The head is missing, or a file can't be read.
    """
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as weights:
                names.update(weights.keys())
        except (OSError, SafetensorError) as error:
            raise model.error(f"{path.name} is broken ({error}); copy or save it again") from None
    if "score.weight" not in names:
        raise model.error(
            "its weights hold no linear head called `score`, by which decoder models are made "
            "sequence classifiers; give a decoder-type reward model"
        )
