"""Ready reward models, which others trained: checked, and written as the pipeline's own are."""

from __future__ import annotations

from pathlib import Path

from rlhf.config import RuntimeConfig
from rlhf.data.chat_template import tokens_after_end
from rlhf.data.text_pairs import PairRenderer
from rlhf.errors import ConfigError
from rlhf.files import write_json
from rlhf.limits import MAX_MODEL_BYTES, read_some
from rlhf.modeling.device import prepare_device
from rlhf.modeling.members import read_members
from rlhf.modeling.reward import META, load_unpublished, reward_meta
from rlhf.modeling.source import CONFIG, ExternalModel
from rlhf.modeling.tokenizer import fit_embeddings
from rlhf.modeling.weights import save_model
from rlhf.stage import StageResult


def publish_ready_reward_model(
    model: ExternalModel, folder: Path, out_dir: Path, *, runtime: RuntimeConfig | None = None
) -> StageResult:
    """Check an external reward model; write it to `out_dir` as safetensors.

    Its `rlhf.json` (pooling, rendering) is copied; one that others trained gets the tokens that its
    template writes behind a chat (`tail`, unless given there), for it has read them in training. A
    tokenizer without chat template or padding token is completed like that of a base model.

    Args:
        model: The model's entry in the configuration; named in errors.
        folder: Its files on this machine.
        out_dir: Empty folder for the reward model.
        runtime: Device and threads.

    Raises:
        ConfigError: It is not a sequence-classification model with one label, its weights are not
            those of the whole model, or it has no usable tokenizer, or not the one it was trained
            with.
    """
    prepare_device(runtime or RuntimeConfig())
    model.select([path.name for path in folder.iterdir()])
    model.check_config(read_some(folder / CONFIG, MAX_MODEL_BYTES))
    try:
        reward_model, renderer = load_unpublished(folder)
        members = read_members(folder)
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
    is_own = "template_hash" in meta or isinstance(renderer, PairRenderer)
    if not is_own and "tail" not in meta and (tail := tokens_after_end(renderer.tokenizer)):
        meta["tail"] = tail
    if members is not None:
        members.save(out_dir)
    write_json(out_dir / META, {**meta, "pooling": reward_model.pooling})
    return StageResult({"parameters": reward_model.num_parameters()})
