"""Loading and publishing of pretrained models: damaged ones are refused, odd ones are exact."""

from __future__ import annotations

import json
import re
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
    Llama4Config,
    Llama4ForConditionalGeneration,
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


def elsewhere(folder: Path, place: str) -> None:
    """Let an index name shards in another folder, while those beside it exist too."""
    shard(folder)
    weight_map = json.loads((folder / INDEX).read_bytes())["weight_map"]
    edit_json(folder, INDEX, weight_map={k: f"{place}{name}" for k, name in weight_map.items()})


def dangling(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("blobs/1")


UP = "model.layers.1.mlp.up_proj.weight"

#: Damage by name: what is done to a whole model, and what the error says.
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "compiled": (prefix("_orig_mod."), r"unknown to it: _orig_mod\.\S+.*save its `_orig_mod`"),
    "ddp": (prefix("module."), r"unknown to it: module\.\S+.*save its `module`"),
    "peft": (prefix("base_model.model."), r"unknown to it: base_model\.\S+.*merge_and_unload\(\)"),
    "prefix": (
        prefix("llm."), r"unknown to it: llm\.\S+.*missing: .*names are not those of Llama"
    ),
    "layer": (
        without("layers.1."), r"missing: model\.layers\.1\.\S+, .* 7 more\); .*if the model has 1$"
    ),
    "weight": (without("1.mlp.up"), rf"missing: {UP}\); copy or .* files again$"),
    "head": (without("lm_head"), r"missing: lm_head\.weight\).*set tie_word_embeddings to true"),
    "extra layers": (
        config(num_hidden_layers=1),
        r"unknown to it: model\.layers\.1\..*correct num_hidden_layers = 1 .*if the model has 2$",
    ),
    "extra weight": (
        lambda f: edit(f, lambda w: w.update({"model.extra.weight": torch.ones(2)})),
        r"unknown to it: model\.extra\.weight\); remove them",
    ),
    "shapes": (
        config(intermediate_size=8),
        r"of another shape: \S+ \(16, 32\) instead of \(16, 8\), .*restore the config\.json",
    ),
    "vocabulary": (config(vocab_size=280), r"lm_head\.weight \(\d+, 16\) instead of \(280, 16\)"),
    "defaults": (only_config, r"of another shape: .*instead of .*restore the config\.json"),
    "tied": (
        tied_but_different, r"ties lm_head\.weight to model\.embed_tokens\.weight, .*two that"
    ),
    "architectures": (config(architectures=3), r"architectures = '3' in its config\.json is no"),
    "strings": (config(intermediate_size="16"), r"can't be loaded by .*intermediate_size.*str"),
    "a size": (config(hidden_size="16"), r"hidden_size = .16. in its config\.json is no number"),
    "heads": (config(num_attention_heads=0), r"can't be loaded by transformers"),
    "no type": (config(model_type=None), r"config\.json has no model_type"),
    "own code": (config(model_type="acme"), r"can't be loaded by .*acme"),
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
    "adapter": (file("adapter_config.json", b"{}"), r"an adapter \(adapter_config.json\).*merge"),
    "truncated": (truncate, r"model\.safetensors is broken \(.*\); copy or download it again$"),
    "empty": (file(SINGLE, b""), r"model\.safetensors is broken \("),
    "no tensors": (lambda f: edit(f, lambda w: w.clear()), r"hold no tensor"),
    "pointer": (
        file(SINGLE, b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        r"run `git lfs pull`",
    ),
    "shard": (lacks_a_shard, r"of the 2 files .* 1 are not there \(first: model-00002-of-00002"),
    "shard elsewhere": (
        lambda f: elsewhere(f, "../other/"),
        r"names '\.\./other/model-00001-of-00002\.safetensors', and only files beside it",
    ),
    "shard below": (lambda f: elsewhere(f, "sub/"), r"put all shards into the model's own folder"),
    "dangling": (dangling, r"model\.safetensors is a link to blobs/1, which is not there; .*cp"),
    "gguf": (
        lambda f: (f / SINGLE).rename(f / "model.gguf"),
        r"another format \(model\.gguf\), and only safetensors are read; give the model in",
    ),
    "no dtype": (config(dtype="auto"), r"dtype = 'auto' in its config\.json is no dtype of"),
    "dtype of a part": (
        config(text_config={"torch_dtype": "torch.int8"}), r"torch_dtype = 'torch\.int8' in its"
    ),
    "attention": (
        config(_attn_implementation="flash_attention_2"),
        r"can't be loaded .*; remove attn_implementation or _attn_implementation from its",
    ),
    "index": (lacks_the_index, rf"holds shards, but no {INDEX}"),
    "broken index": (lambda f: (shard(f), (f / INDEX).write_text("[]")), r"lists no files"),
    "twice": (twice, r"\S+ is in both model-00001-of-00002\.safetensors and model-00002"),
    "two models": (two_models, r"holds model\.safetensors as well as model-00001-of-00002"),
    "other name": (renamed, r"its weights are called pytorch_model\.safetensors, and only"),
    "generation": (file("generation_config.json", b"{"), r"generation_config\.json is no JSON"),
    "end as text": (
        file("generation_config.json", b'{"eos_token_id": "2"}'),
        r"eos_token_id = '2' in its generation_config\.json is no token id; give a number",
    ),
    "end of no type": (
        file("generation_config.json", b'{"eos_token_id": [2, true]}'),
        r"eos_token_id = \[2, True\] in its generation_config\.json is no token id",
    ),
    "generation mode": (
        file("generation_config.json", b'{"num_beams": 4, "num_beam_groups": 2}'),
        r"num_beam_groups = '2' in its generation_config\.json is a way to decode .*remove the",
    ),
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
        assert re.search(message, text.split(": ", 1)[1]), text


#: How methods write themselves into a configuration, as their models on the hub have it.
QUANTISED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq"),
    "bnb": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "bnb of old": ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, "bitsandbytes"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    "compressed": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"
    ),
    "mxfp4": ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "mxfp4"),
    "modelopt": ({"quant_algo": "NVFP4", "producer": {"name": "modelopt"}}, "NVFP4"),
    "torchao": ({"quant_method": "torchao", "quant_type": {}}, "torchao"),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_base_is_refused_by_its_method(name, base):
    """In one line, whether the method's package is installed or not."""
    fields, method = QUANTISED[name]
    edit_json(base, quantization_config=fields)
    for text in refusals(base):
        assert f"its weights are quantised already ({method}), and neither" in text
        assert "; give the model in bfloat16 that it was made from" in text
        assert "\n" not in text
    for load in (lambda: load_reward_model(base, load_renderer(base)), lambda: load_policy(base)):
        with pytest.raises(ConfigError, match="quantised already"):
            load()


@pytest.mark.parametrize("ending", ["qweight", "weight_scale", "weight.absmax"])
def test_quantised_weights_are_known_without_the_configuration(ending, base):
    def pack(weights: dict[str, Any]) -> None:
        name = UP.removesuffix("weight") + ending
        weights[name] = torch.ones(2, dtype=torch.int32 if ending == "qweight" else torch.float32)
        if ending == "qweight":
            del weights[UP]

    edit(base, pack)
    for text in refusals(base):
        assert "they are quantised, though its config.json has no quantization_config" in text


def test_a_folder_of_an_adapter_alone_is_named(base):
    for path in [*base.glob("*.safetensors"), base / "config.json"]:
        path.unlink()
    (base / "adapter_config.json").write_text("{}")
    (base / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"base\.path = .*: it holds an adapter"):
        ExternalModel("base.path", str(base)).check()
    assert all("it holds an adapter" in text for text in refusals(base))


def test_damage_that_needs_no_torch_is_refused_in_preflight(base):
    model = ExternalModel("base.path", str(base))
    model.check()
    for name in ("quantised", "architectures", "shard"):
        DAMAGED[name][0](base)
        with pytest.raises(ConfigError, match=DAMAGED[name][1]):
            model.check()
        edit_json(base, quantization_config=None, architectures=None)


@pytest.mark.parametrize("values", [[float("nan")], [float("inf"), float("-inf")]])
def test_a_single_value_that_is_not_finite_is_named(values, base):
    def damage(weights: dict[str, Any]) -> None:
        weights[UP][3, : len(values)] = torch.tensor(values)

    edit(base, damage)
    with pytest.raises(ConfigError, match=rf"{len(values)} of the 512 values of its weight {UP}"):
        load_base(BaseModelConfig(path=str(base)), [], 0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            LlamaForSequenceClassification,
            "causal language model, and this one is LlamaForSequenceC",
        ),
        (BertForMaskedLM, "causal language model, and this one is BertForMaskedLM; give"),
    ],
)
def test_a_model_of_another_task_is_no_base(kind, message, bases, tmp_path):
    folder = Path(shutil.copytree(bases(kind), tmp_path / "base"))
    assert all(message in text for text in refusals(folder))
    if kind is LlamaForSequenceClassification:
        # The weights alone give it away, too.
        edit_json(folder, architectures=["LlamaForCausalLM"])
        for text in refusals(folder):
            assert re.search(
                r"unknown to it: score\.weight; missing: lm_head.* this classifier", text
            )


def test_an_encoder_decoder_is_no_base(base):
    (base / "config.json").write_text(json.dumps(T5Config().to_dict()))
    for text in refusals(base):
        assert "transformers has no causal language model for model_type 't5'" in text


def test_a_name_too_long_for_a_file_is_refused_in_one_line(tmp_path):
    for path in ("x" * 300, str(tmp_path / ("x" * 300))):
        with pytest.raises(ConfigError, match=r"base\.path = '\S+': .*; (give|check) "):
            ExternalModel("base.path", path).check()
    deep = tmp_path.joinpath(*["d" * 50] * 6)
    with pytest.raises(ConfigError, match="no model there"):
        ExternalModel("base.path", str(deep)).check()


def logits(folder: Path) -> torch.Tensor:
    """Return the logits of the model as transformers loads it, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()(torch.arange(9)[None]).logits


def buffers(folder: Path) -> None:
    """Add what old versions of transformers stored."""
    key = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda w: w.update({key.format(i): torch.ones(4) for i in (0, 1)}))


def store_both(folder: Path) -> None:
    """Tie head and embedding, and store both."""

    def tie(weights: dict[str, Any]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    edit(folder, tie)
    edit_json(folder, tie_word_embeddings=True)


def index_of_one(folder: Path) -> None:
    index = dict.fromkeys(load_file(folder / SINGLE), SINGLE)
    edit_json(folder, INDEX, metadata={}, weight_map=index)


def beside(folder: Path) -> None:
    save_file({"layers.0.w": torch.ones(2)}, folder / "consolidated.safetensors")


#: Oddities of models that transformers loads as they are meant.
ODD: dict[str, Callable[[Path], object]] = {
    "buffers": buffers,
    "stored twice": store_both,
    "shards": shard,
    "index of one file": index_of_one,
    "another format beside": beside,
    "unquantised": config(quantization_config=None, adapter_config=None),
    "no architectures": config(architectures=None),
    "greedy with a temperature": lambda f: edit_json(
        f, "generation_config.json", temperature=0.6, top_p=0.9, do_sample=False
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_base_loads_and_is_published_again(name, base, tmp_path):
    before = logits(base)
    ODD[name](base)
    if name == "stored twice":
        before = logits(base)
    ExternalModel("base.path", str(base)).check()
    assert check_weights(base).stored_dtypes.main == torch.bfloat16
    model, tokenizer = load_base(BaseModelConfig(path=str(base)), [], 0)
    # Trainers change it; transformers then refuses to save one that contradicts itself.
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    save_model(model, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out")[..., :270], before[..., :270])


def test_code_that_is_not_run_is_not_named_by_what_is_published(base, tmp_path):
    edit_json(base, auto_map={"AutoConfig": "configuration_x.XConfig"})
    save_model(load_base(BaseModelConfig(path=str(base)), [], 0)[0], tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())


def test_a_text_model_within_one_of_several_modalities(fresh, tmp_path, caplog):
    """Llama 4's class for text alone does not know the others' weights."""
    text = {
        "vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "intermediate_size_mlp": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "num_local_experts": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 28,
        "num_attention_heads": 2, "patch_size": 14, "vision_output_dim": 16,
        "projector_input_dim": 16, "projector_output_dim": 16,
    }  # fmt: skip
    folder = tmp_path / "base"
    whole = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision))
    whole.save_pretrained(folder)
    AutoTokenizer.from_pretrained(fresh).save_pretrained(folder)
    check_weights(folder)
    model, _ = load_base(BaseModelConfig(path=str(folder)), [], 0)
    assert type(model).__name__ == "Llama4ForCausalLM"
    assert re.search(
        r"weights of other modalities are left out .*vision_model|multi_m", caplog.text
    )
    expected = whole.language_model.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight[:300], expected[name][:300]), name
    # In a model of text alone they are a mistake.
    single = Path(shutil.copytree(fresh, tmp_path / "single"))
    edit(single, lambda w: {**w, "vision_model.x.weight": torch.ones(1)})
    with pytest.raises(ConfigError, match=r"unknown to it: vision_model\.x\.weight"):
        check_weights(single)


def test_masks_of_old_gpt2_are_no_weights(fresh, tmp_path):
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    edit(
        tmp_path,
        lambda w: (
            {k.removeprefix("transformer."): v for k, v in w.items()}
            | {"h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(-1e4)}
        ),
    )
    check_weights(tmp_path)
    load_policy(tmp_path)


def test_a_layer_for_speculation_is_left_out(tmp_path):
    sizes = {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": 1, "n_routed_experts": 4,
             "moe_intermediate_size": 8, "first_k_dense_replace": 1, "q_lora_rank": 8,
             "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
             "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}  # fmt: skip
    DeepseekV3ForCausalLM(DeepseekV3Config(**sizes)).save_pretrained(tmp_path)
    edit(tmp_path, lambda w: w.update({"model.layers.1.eh_proj.weight": torch.ones(2)}))
    edit_json(tmp_path, num_nextn_predict_layers=1)
    check_weights(tmp_path)
    edit_json(tmp_path, num_nextn_predict_layers=0)
    with pytest.raises(ConfigError, match=r"unknown to it: model\.layers\.1\.eh_proj\.weight"):
        check_weights(tmp_path)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, LlamaModel])
def test_a_reward_model_gets_a_head_in_place_of_another(kind, bases, base, tmp_path):
    folder = bases(kind)
    model = load_reward_model(folder, load_renderer(folder))
    assert not model.score.weight.any()
    without("layers.1.mlp.up")(base)
    with pytest.raises(ConfigError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_reward_model(base, load_renderer(base))
    classifier = Path(shutil.copytree(bases(LlamaForSequenceClassification), tmp_path / "rm"))
    edit_json(classifier, id2label={"0": "x"}, label2id={"x": 0})
    without("score")(classifier)
    with pytest.raises(ConfigError, match=r"missing: score\.weight"):
        load_reward_model(classifier, load_renderer(classifier))


def dtypes(folder: Path) -> set[torch.dtype]:
    return {weight.dtype for weight in toys.weights(folder).values()}


def test_a_policy_is_published_in_the_dtypes_of_its_base(base, data, tmp_path):
    edit(base, lambda w: w.update({UP: w[UP].float() * (1 + 2**-12)}))  # needs float32
    before = toys.weights(base)
    runs = {
        "untrained": ({"enabled": False}, {}),
        "trained": ({"epochs": 1}, {}),
        "lora": ({"epochs": 1, "lora": LoraConfig(r=2, target_modules=".*q_proj")}, {}),
        "float32": ({"epochs": 1}, {"save_dtype": "float32"}),
    }
    for name, (options, source) in runs.items():
        section: Any = toys.changed(toys.SFT, **options)
        out = tmp_path / name
        out.mkdir()
        start = BaseModelConfig(path=str(base), **source)
        train_sft(section, start, data, out, runtime=toys.RUNTIME)
        after = toys.weights(out)
        assert {k: v.dtype for k, v in after.items()} == {
            k: torch.float32 if name == "float32" else v.dtype for k, v in before.items()
        }
        stated = json.loads((out / "config.json").read_text())["dtype"]
        assert stated == ("float32" if name == "float32" else "bfloat16")
        same = [k for k in before if torch.equal(after[k].float(), before[k].float())]
        trained = {"untrained": 0, "lora": 2}.get(name, len(before))
        assert len(before) - len(same) >= trained - 2  # norms may round to what they were
        if name in ("untrained", "lora"):
            assert len(before) - len(same) == trained
    # Rounded once, from the same training.
    full, rounded = toys.weights(tmp_path / "float32"), toys.weights(tmp_path / "trained")
    assert all(torch.equal(full[k].to(rounded[k].dtype), rounded[k]) for k in full)


def test_every_stage_reads_the_rounded_weights(bases, data, tmp_path):
    sft, reward, policy = folders = [tmp_path / name for name in ("sft", "reward", "policy")]
    for folder in folders:
        folder.mkdir()
    lora = LoraConfig(r=2, alpha=8.0)
    start = BaseModelConfig(path=str(bases()))
    train_sft(toys.SFT, start, data, sft, runtime=toys.RUNTIME)
    section: Any = toys.changed(toys.REWARD, lora=lora, pooling="last", epochs=1)
    train_reward_model(section, data, sft, reward, runtime=toys.RUNTIME)
    assert reward_meta(reward)["base_weights"] == weights_digest(sft)
    config: Any = toys.changed(
        toys.PPO, lora=lora, shared_base=True, critic="adapter", total_episodes=16
    )
    approved = toys.approve(reward)
    train_policy(config, data, sft, approved, policy, runtime=toys.RUNTIME)
    assert dtypes(sft) == dtypes(reward) == dtypes(policy) == {torch.bfloat16}
    assert any((toys.weights(sft)[k] != w).any() for k, w in toys.weights(policy).items())
    scores = Scorer(reward, toys.DEVICE, 48)(["tea or cup?"] * 2, ["good", "bad"])
    assert scores.isfinite().all()


def test_a_part_of_a_configuration_states_the_dtype_too(tmp_path):
    text = {**SIZES, "vocab_size": 64, "head_dim": 8}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision)
    Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "in")
    save_model(load_policy(tmp_path / "in"), tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["dtype"] == saved["text_config"]["dtype"] == "bfloat16"
    assert saved["vision_config"]["dtype"] == "bfloat16"


def test_weights_that_outgrow_float16_are_published_in_float32(base, tmp_path, caplog):
    edit(base, lambda w: {k: v.half() for k, v in w.items()})
    model = load_policy(base)
    save_model(model, tmp_path / "half")
    assert dtypes(tmp_path / "half") == {torch.float16}
    model = load_policy(base)
    model.lm_head.weight.data[0, 0] = 1e6
    save_model(model, tmp_path / "full")
    assert dtypes(tmp_path / "full") == {torch.float32}
    assert "weight lm_head.weight has outgrown float16" in caplog.text
    assert json.loads((tmp_path / "full" / "config.json").read_text())["dtype"] == "float32"


def test_a_training_that_rounding_takes_is_said(base, tmp_path, caplog):
    # 1/512 of a weight is half of the distance to the next number of bfloat16.
    for factor, lost in ((1 + 2**-12, True), (1.5, False)):
        caplog.clear()
        model = load_policy(base)
        model.get_parameter(UP).data.mul_(factor)
        save_model(model, tmp_path / str(factor))
        assert ("about 100 % of what training changed is less than bfloat16" in caplog.text) == lost
        assert torch.equal(toys.weights(tmp_path / str(factor))[UP], toys.weights(base)[UP]) == lost
