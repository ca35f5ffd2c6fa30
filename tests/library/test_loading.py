"""Loading and publishing of pretrained models: damaged ones are refused, odd ones are exact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
)

from rlhf.config import BaseModelConfig, LoraConfig
from rlhf.data.rendering import load_renderer
from rlhf.errors import ConfigError
from rlhf.modeling.base import load_base, load_policy
from rlhf.modeling.pretrained import check_weights
from rlhf.modeling.reward import Scorer, load_reward_model, reward_meta
from rlhf.modeling.source import ExternalModel
from rlhf.modeling.weights import save_model, weights_digest
from rlhf.ppo.train import train_policy
from rlhf.reward import train_reward_model
from rlhf.sft import train_sft
from tests.library import toys

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(fresh, tmp_path_factory) -> Callable[..., Path]:
    """Function that makes a base in bfloat16 with the toy task's tokenizer, once per class."""
    root = tmp_path_factory.mktemp("bases")

    def make(kind: Any = LlamaForCausalLM, **fields: Any) -> Path:
        folder = root / f"{kind.__name__}-{'-'.join(fields)}"
        if not folder.exists():
            tokenizer = AutoTokenizer.from_pretrained(fresh)
            torch.manual_seed(1)
            sizes = {**SIZES, "vocab_size": len(tokenizer), "pad_token_id": 0, **fields}
            config = (BertConfig if kind is BertForMaskedLM else LlamaConfig)(**sizes)
            kind(config).to(torch.bfloat16).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def base(bases, tmp_path) -> Path:
    """A copy of a Llama of two layers, its head apart from the embedding, in bfloat16."""
    return Path(shutil.copytree(bases(), tmp_path / "base"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a model's weights."""
    weights = load_file(folder / SINGLE)
    result = change(weights)
    save_file(result if isinstance(result, dict) else weights, folder / SINGLE, {"format": "pt"})


def edit_json(folder: Path, name: str = "config.json", **values: Any) -> None:
    path = folder / name
    content = json.loads(path.read_bytes()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def prefix(text: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda w: {text + k: v for k, v in w.items()})


def without(part: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda w: {k: v for k, v in w.items() if part not in k})


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder, **values)


def file(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def only_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": null}')


def pack(folder: Path) -> None:
    edit(folder, lambda w: w.update({UP: w[UP].to(torch.float8_e4m3fn)}))


def truncate(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-100])


def shard(folder: Path) -> None:
    """Replace the single file by two shards and their index."""
    weights = load_file(folder / SINGLE)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = {names[0]: list(weights)[:5], names[1]: list(weights)[5:]}
    for name, keys in halves.items():
        save_file({k: weights[k] for k in keys}, folder / name, {"format": "pt"})
    index = {k: name for name, keys in halves.items() for k in keys}
    (folder / SINGLE).unlink()
    edit_json(folder, INDEX, metadata={}, weight_map=index)


def lacks_a_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def lacks_the_index(folder: Path) -> None:
    shard(folder)
    (folder / INDEX).unlink()


def twice(folder: Path) -> None:
    shard(folder)
    shutil.copy(
        folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors"
    )


def two_models(folder: Path) -> None:
    single = (folder / SINGLE).read_bytes()
    shard(folder)
    (folder / SINGLE).write_bytes(single)


def renamed(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.safetensors")


def tied_but_different(folder: Path) -> None:
    edit_json(folder, tie_word_embeddings=True)


UP = "model.layers.1.mlp.up_proj.weight"
LACKS_A_LAYER = r"missing: model\.layers\.1\.\S+, model\.layers\.1\.\S+ and 7 more\); .*num_hidden_layers = 2 .*has 1$"

#: Damage by name: what is done to a whole model, and what the error says.
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "compiled": (prefix("_orig_mod."), r"unknown to it: _orig_mod\.\S+.*save its `_orig_mod`"),
    "ddp": (prefix("module."), r"unknown to it: module\.\S+.*save its `module`"),
    "peft": (prefix("base_model.model."), r"unknown to it: base_model\.\S+.*merge_and_unload\(\)"),
    "prefix": (prefix("llm."), r"LlamaForCausalLM .*unknown to it: llm\.\S+.*missing: .*save it with its save_pretrained"),
    "layer": (without("layers.1."), LACKS_A_LAYER),
    "weight": (without("1.mlp.up"), rf"missing: {UP}\); copy or download all of the model's files again$"),
    "head": (without("lm_head"), r"missing: lm_head\.weight\).*set tie_word_embeddings to true"),
    "extra layers": (
        config(num_hidden_layers=1), r"unknown to it: model\.layers\.1\..*correct num_hidden_layers = 1 .*has 2$"
    ),
    "extra weight": (
        lambda f: edit(f, lambda w: w.update({"model.extra.weight": torch.ones(2)})),
        r"unknown to it: model\.extra\.weight\); remove them",
    ),
    "shapes": (
        config(intermediate_size=8),
        r"of another shape: \S+ \(16, 32\) instead of \(16, 8\), .*restore the config\.json",
    ),
    "vocabulary": (config(vocab_size=280), r"embed_tokens\.weight \(\d+, 16\) instead of \(280, 16"),
    "defaults": (only_config, r"of another shape: .*instead of .*restore the config\.json"),
    "tied": (
        tied_but_different, r"ties lm_head\.weight to model\.embed_tokens\.weight, and .*two that differ"
    ),
    "architectures": (config(architectures=3), r"architectures = '3' in its config\.json is no list"),
    "strings": (config(hidden_size="16"), r"can't be loaded \(.*hidden_size.*str"),
    "heads": (config(num_attention_heads=0), r"can't be loaded \("),
    "no type": (config(model_type=None), r"config\.json has no model_type"),
    "own code": (config(model_type="acme"), r"can't be loaded \(.*acme"),
    "quantised": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"quantised already \(bitsandbytes\).*model\.dequantize\(\)",
    ),
    "gptq": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantised already \(gptq\).*; give the model in bfloat16 that it was made from$",
    ),
    "nested": (
        config(text_config={"quantization_config": {"quant_method": "mxfp4"}}),
        r"quantised already \(mxfp4\).*Mxfp4Config\(dequantize=True\)",
    ),
    "fp8": (pack, rf"weight {UP} is stored as F8_E4M3, so the model is quantised"),
    "adapter": (file("adapter_config.json", b"{}"), r"an adapter \(adapter_config\.json\).*merge it"),
    "truncated": (truncate, r"model\.safetensors is broken \(.*\); copy or download it again$"),
    "empty": (file(SINGLE, b""), r"model\.safetensors is broken \("),
    "no tensors": (lambda f: edit(f, lambda w: w.clear()), r"hold no tensor"),
    "pointer": (
        file(SINGLE, b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), r"run `git lfs pull`"
    ),
    "shard": (lacks_a_shard, r"of the 2 files .* 1 are not there \(first: model-00002-of-00002"),
    "index": (lacks_the_index, rf"holds shards, but no {INDEX}"),
    "broken index": (lambda f: (shard(f), (f / INDEX).write_text("[]")), r"lists no files"),
    "twice": (twice, r"\S+ is in both model-00001-of-00002\.safetensors and model-00002"),
    "two models": (two_models, r"holds model\.safetensors as well as model-00001-of-00002"),
    "other name": (renamed, r"its weights are called pytorch_model\.safetensors, and only"),
    "generation": (file("generation_config.json", b"{"), r"generation_config\.json is no JSON object"),
    "generation value": (
        file("generation_config.json", b'{"max_new_tokens": -1}'),
        r"generation_config\.json is invalid \(.*max_new_tokens",
    ),
}  # fmt: skip


def refusals(folder: Path) -> list[str]:
    """Return the errors of the check before a run, and of loading."""
    texts = []
    for load in (
        lambda: check_weights(folder, field="base.path"),
        lambda: load_base(BaseModelConfig(path=str(folder)), [], 0),
    ):
        with pytest.raises(ConfigError) as caught:
            load()
        texts.append(str(caught.value))
    return texts


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_base_is_refused_in_one_line(name, base):
    damage, message = DAMAGED[name]
    damage(base)
    for text in refusals(base):
        assert text.startswith(f"base.path = {str(base)!r}: ")
        assert "\n" not in text
        assert len(text) < 600
        (_, reason) = text.split(": ", 1)
        assert __import__("re").search(message, reason), text
