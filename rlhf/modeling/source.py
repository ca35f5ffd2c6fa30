"""External models: checks of a model before it is loaded, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.external import TIMEOUT, External
from rlhf.files import expand_home
from rlhf.limits import MAX_MODEL_BYTES, load_json
from rlhf.modeling.headers import DamagedWeights, read_headers
from rlhf.store.manifest import PICKLES

#: Endings of a model's files. No other file is fetched or part of its identity.
MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")

CONFIG = "config.json"
WEIGHTS = ".safetensors"
#: Endings of a model's files but its weights.
DESCRIPTION_FILES = tuple(end for end in MODEL_FILES if end != WEIGHTS)
#: Fields of a configuration that limit a model's positions.
CONTEXT_FIELDS = ("max_position_embeddings", "max_seq_len", "n_positions")

#: Formats of weights for other programs.
_OTHER_WEIGHTS = (".gguf", ".ggml", ".onnx", ".h5", ".msgpack")

#: Dtypes of weights that can be trained.
_DTYPES = ("float32", "bfloat16", "float16", "float64", "half", "float", "double")

#: Fields that are numbers above 0, in a configuration and in what it says of rotary positions.
_POSITIVE = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "hidden_size", "n_embd")
_ROTARY = ("rope_theta", "factor", "rope_local_base_freq")
#: Fields that make a model answer by a tuple, from which no stage reads.
_TUPLES = {"return_dict": False, "use_return_dict": False}

ADAPTER = "adapter_config.json"

_ORIGINAL = "give the model in bfloat16 that it was made from"
#: Cures by method, where transformers can undo it.
_DEQUANTIZE = {
    "bitsandbytes": f"{_ORIGINAL}, or save what `model.dequantize()` returns",
    "mxfp4": f"{_ORIGINAL}, or load it with Mxfp4Config(dequantize=True) and save that",
    "fp8": f"{_ORIGINAL}, or load it with FineGrainedFP8Config(dequantize=True) and save that",
}


@dataclass(frozen=True)
class ExternalModel(External):
    """A model that a stage starts from or, if `ready`, publishes without training.

    The URI is a folder, `s3://bucket/prefix` or a hub id (`owner/name` or `owner/name@revision`).
    An `artifact:<digest>` is resolved by the caller; only its `config.json` is checked here.
    """

    ready: bool = False

    type = "model"
    has_weights = True
    hub_files = tuple(f"*{end}" for end in MODEL_FILES)

    @property
    def is_artifact(self) -> bool:
        """True if the model is an artifact in the pipeline's store."""
        return self.uri.startswith("artifact:")

    def check(self) -> None:
        """Refuse a model that can't be used, before it is fetched.

        Raises:
            ConfigError: There is no model, its weights are no safetensors, its files in a folder
                are damaged, or see `check_config`.
            StoreError: The S3 server can't be reached.
        """
        self.check_config(self.read(CONFIG, MAX_MODEL_BYTES))
        if not self.has_weights or self.uri.startswith("s3://") or not self.is_path():
            return
        try:
            read_headers(self.path)
        except DamagedWeights as error:
            raise self.error(str(error)) from None

    def check_config(self, data: bytes) -> None:
        """Refuse a broken `config.json`, a quantised model, and a ready one that is none.

        Raises:
            ConfigError: It is broken or quantised, or if `ready` no sequence-classification model
                with one label.
        """
        try:
            config: Any = load_json(data)
        except ValueError:
            config = None
        self._check_revision()
        if not isinstance(config, dict):
            raise self.error(f"its {CONFIG} is no JSON object; give the folder of a whole model")
        self._check_types(config)
        self._check_quantization(config)
        self._check_dtypes(config)
        self._check_values(config)
        if self.ready:
            self._check_classifier(config)

    def _check_revision(self) -> None:
        """Refuse a revision of what has none, or a second one."""
        if self.revision and (self.is_artifact or not self.is_on_hub):
            raise self.error(f"revision = {self.revision!r} is for a hub id; leave it out")
        if self.revision and "@" in self.uri:
            raise self.error(
                f"names a revision, and so does revision = {self.revision!r}; give one of them"
            )

    def _check_types(self, config: Mapping[str, Any]) -> None:
        """Refuse fields that transformers would read without an error, or with an obscure one."""
        names = config.get("architectures")
        if names is not None and not (
            isinstance(names, list) and all(isinstance(name, str) for name in names)
        ):
            raise self.error(
                f"architectures = {str(names)[:60]!r} in its {CONFIG} is no list of names; restore "
                "the file that was saved with the weights"
            )
        if not isinstance(config.get("model_type"), str):
            raise self.error(
                f"its {CONFIG} has no model_type, by which transformers finds its class; restore "
                "the file that was saved with the weights"
            )

    def _check_quantization(self, config: Mapping[str, Any]) -> None:
        """Refuse weights that are quantised already: they can't be trained, nor merged into."""
        for part in _parts(config):
            quantization = part.get("quantization_config") or part.get("compression_config")
            if quantization:
                fields = quantization if isinstance(quantization, Mapping) else {}
                method = str(fields.get("quant_method") or _unnamed_method(fields))
                raise self.error(
                    f"its weights are quantised already ({method}), and neither full training nor "
                    f"merged adapters work on them; {_DEQUANTIZE.get(method, _ORIGINAL)}"
                )

    def _check_dtypes(self, config: Mapping[str, Any]) -> None:
        """Refuse a dtype in which transformers can make no model that is trained."""
        for part in _parts(config):
            for name in ("dtype", "torch_dtype"):
                value = part.get(name)
                if isinstance(value, str) and value.removeprefix("torch.") not in _DTYPES:
                    raise self.error(
                        f"{name} = {value[:60]!r} in its {CONFIG} is no dtype of weights; set it "
                        f"to theirs, one of {', '.join(_DTYPES)}"
                    )

    def _check_values(self, config: Mapping[str, Any]) -> None:
        """Refuse sizes and rotary positions that are no numbers above 0, and answers as tuples."""
        text = config.get("text_config")
        for part in [config, text] if isinstance(text, Mapping) else [config]:
            for field, value in _numbers(part):
                if not _may_be_positive(value):
                    raise self.error(
                        f"{field} = {str(value)[:60]!r} in its {CONFIG} is no number above 0; "
                        "restore the file that was saved with the weights"
                    )
            for field, value in _TUPLES.items():
                if part.get(field) is value:
                    raise self.error(
                        f"{field} = {value} in its {CONFIG} is not supported, for the model would "
                        "answer by a tuple; remove the field"
                    )

    def _check_classifier(self, config: Mapping[str, Any]) -> None:
        names = [str(name) for name in config.get("architectures") or ()]
        named = config.get("id2label") or {}
        if not isinstance(named, Mapping):
            raise self.error(
                f"id2label = {str(named)[:60]!r} in its {CONFIG} is no object of names by number; "
                'write {"0": "LABEL_0"} for one label'
            )
        # transformers does not write its default of two labels.
        labels = len(named) or config.get("num_labels", 2)
        if type(labels) is not int:
            raise self.error(
                f"num_labels = {str(labels)[:60]!r} in its {CONFIG} is no number; write 1 for a "
                "reward model"
            )
        is_classifier = any("ForSequenceClassification" in name for name in names)
        if is_classifier and labels == 1:
            return
        architecture = ", ".join(names) or "of no named architecture"
        architecture += f" with {labels} labels" if is_classifier else ""
        raise self.error(
            f"must be a sequence-classification model with one label, and this one is "
            f"{architecture}; give a reward model, or none to train one"
        )

    def is_path(self) -> bool:
        """Return whether it is a folder or written like a path; a hub id has one slash."""
        written_as_path = self.uri.startswith((".", "/", "~")) or self.uri.count("/") > 1
        # A hub id has at most 96 characters; a longer name can't even be looked up as a file.
        return written_as_path or len(self.uri) > 200 or Path(self.uri).is_dir()

    @property
    def path(self) -> Path:
        """The folder."""
        return expand_home(self.uri)

    def select(self, names: Sequence[str]) -> list[str]:
        """Return the model's files, sorted.

        Raises:
            ConfigError: It has no config or safetensors, or an adapter beside them.
        """
        if ADAPTER in names:
            raise self.error(
                f"it holds an adapter ({ADAPTER}), which is not applied; merge it into its base "
                "(peft: merge_and_unload, then save_pretrained) and give that folder, or remove "
                "the adapter's files if the weights hold it already"
            )
        if CONFIG not in names:
            raise self.error(
                f"no model there (no {CONFIG}); give a folder or prefix that holds {CONFIG}, a "
                "tokenizer and safetensors, a hub id or artifact:<digest>"
            )
        if not any(name.endswith(".safetensors") for name in names):
            pickles = sorted(name for name in names if Path(name).suffix in PICKLES)
            others = sorted(name for name in names if Path(name).suffix in _OTHER_WEIGHTS)
            problem = f"its weights are a pickle ({pickles[0]})" if pickles else "it has no weights"
            cure = "save it again with save_pretrained"
            if others and not pickles:
                problem = f"its weights are in another format ({others[0]})"
                cure = "give the model in safetensors that it was made from"
            raise self.error(f"{problem}, and only safetensors are read; {cure}")
        return sorted(n for n in names if n.endswith(MODEL_FILES) and not n.startswith("."))

    @property
    def repository(self) -> str:
        """Name of the repository on the hub, without the revision."""
        return self.uri.partition("@")[0]

    def hub_commit(self) -> str:
        """Return the commit of the revision, from the hub or its cache on this machine."""
        from huggingface_hub import hf_hub_download

        revision = self.uri.partition("@")[2] or self.revision
        try:
            path = hf_hub_download(self.repository, CONFIG, revision=revision, etag_timeout=TIMEOUT)
        # A broken network raises many classes, which all mean the same to a user.
        except Exception as error:
            raise self.error(
                f"no such folder here, and the hub gives no {CONFIG} of that name "
                f"({type(error).__name__}); give an existing folder, s3://bucket/prefix, "
                "artifact:<digest> or a hub id"
            ) from None
        return Path(path).parent.name  # the cache names a folder by the commit


def _unnamed_method(fields: Mapping[str, Any]) -> str:
    """Return the method of a quantisation that does not state it, as bitsandbytes' once did not."""
    is_bitsandbytes = fields.get("load_in_8bit") or fields.get("load_in_4bit")
    return "bitsandbytes" if is_bitsandbytes else str(fields.get("quant_algo") or "unknown method")


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a configuration, and those of its parts (text, vision …)."""
    return [config, *(part for part in config.values() if isinstance(part, Mapping))]


def _numbers(part: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of a configuration's sizes and rotary positions."""
    # An encoder–decoder's count of layers is its encoder's, which may be left out.
    sizes = () if "encoder_layers" in part else _POSITIVE
    yield from ((name, part[name]) for name in (*sizes, *_ROTARY) if name in part)
    for name in ("rope_scaling", "rope_parameters"):
        rotary = part.get(name)
        # Some families have them by kind of layer.
        kinds = [rotary, *(rotary.values() if isinstance(rotary, Mapping) else ())]
        for kind in kinds:
            if isinstance(kind, Mapping):
                yield from ((f"{name}.{field}", kind[field]) for field in _ROTARY if field in kind)


def _may_be_positive(value: Any) -> bool:
    """Return whether a value is a number above 0, or of a kind that a family may have instead."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value > 0
    return value is None or isinstance(value, list | dict)


class ExternalTokenizer(ExternalModel):
    """The tokenizer, chat template and configuration of an external model, without its weights."""

    hub_files = tuple(f"*{end}" for end in DESCRIPTION_FILES)
    has_weights = False

    def select(self, names: Sequence[str]) -> list[str]:
        """Return the model's files but the weights, sorted."""
        if CONFIG not in names:
            raise self.error(f"no model there (no {CONFIG}); give the folder of a whole model")
        return sorted(n for n in names if n.endswith(DESCRIPTION_FILES) and not n.startswith("."))
