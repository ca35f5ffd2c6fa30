"""Sections of the base model, SFT, the reward model and evaluation.

`ProcessSection`, about a stage's child processes, is a base of the section of PPO, too.
"""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf.config.numbers import (
    BatchSize,
    Count,
    Epochs,
    Factor,
    Few,
    Minutes,
    Rate,
    Temperature,
    Tokens,
    Width,
    Workers,
)
from rlhf.config.section import Section, check_model_uri
from rlhf.config.text import shown_value
from rlhf.limits import MAX_PATTERN, pattern_error

#: Most weights of a model from scratch: 20 GB in float32, and four times that in training.
MOST_WEIGHTS = 5 * 10**9
#: Dtypes of weights that are not trained.
FrozenDtype = Literal["auto", "float32", "bfloat16", "nf4"]


class ArchitectureConfig(Section):
    """A small Llama-type model to train from scratch, with a BPE tokenizer of its own."""

    hidden_size: Width = Field(default=96, ge=8)
    """Width of the residual stream."""
    layers: Few = Field(default=3, ge=1)
    """Number of transformer blocks."""
    heads: Few = Field(default=4, ge=1)
    """Attention heads; must divide `hidden_size`."""
    intermediate_size: Width = Field(default=256, ge=8)
    """Width of the feed-forward layer."""
    vocab_size: Width = Field(default=1024, ge=300)
    """Size of the tokenizer trained on the pipeline's own text (256 bytes plus merges)."""
    context: Tokens = Field(default=256, ge=16)
    """Longest sequence in tokens."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(
                f"heads = {self.heads} must divide hidden_size = {self.hidden_size} into an even "
                "head width; choose for example heads = hidden_size / 32"
            )
        return self

    @model_validator(mode="after")
    def _is_small(self) -> Self:
        block = self.hidden_size * (4 * self.hidden_size + 3 * self.intermediate_size)
        weights = self.vocab_size * self.hidden_size + self.layers * block
        if weights > MOST_WEIGHTS:
            raise ValueError(
                f"hidden_size = {self.hidden_size}, intermediate_size = {self.intermediate_size} "
                f"and layers = {self.layers} make {weights:.2g} weights, and a model from scratch "
                f"has at most {MOST_WEIGHTS:.2g}; lower one of them, or name a model in base.path"
            )
        return self


class BaseModelConfig(Section):
    """The model that everything starts from."""

    path: str | None = Field(default=None, min_length=1)
    """A local folder, `artifact:<digest>`, `s3://bucket/prefix` or a hub id; none trains from
    scratch."""
    revision: str | None = None
    """Hub revision to pin; only with a hub id."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype in which the policies are published, and a reward model that starts from one; `auto` is
    that of the base's files, or float32 from scratch. Training computes in float32 and rounds once,
    at the end: bfloat16 drops changes of a weight by less than 1/512 of it, as a very low learning
    rate makes them, and float32 keeps them in files of twice the size."""
    architecture: ArchitectureConfig = ArchitectureConfig()
    """Used when `path` is none."""

    _check_path = field_validator("path")(check_model_uri)

    @model_validator(mode="after")
    def _revision_needs_path(self) -> Self:
        if self.revision and not self.path:
            raise ValueError("revision is set but path is not; name the hub id in path")
        return self


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021); merged into the weights before publishing."""

    r: Width = Field(default=16, ge=1)
    """Rank of the adapters."""
    alpha: Factor = Field(default=32.0, gt=0)
    """Scale: the update is multiplied by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter input; for SFT and the reward model only."""
    use_rslora: bool = False
    """Multiply the update by alpha / √r instead, which suits large ranks (Kalajdzievski 2023)."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Linear layers that get adapters: `all-linear` (the output head, embeddings and the fused
    experts of mixture models never do), the end of their names (`q_proj`), a list of such, or a
    regular expression that matches whole names."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _list_in_text(cls, value: Any) -> Any:
        """Read a list that was written as text, as on the command line."""
        if not isinstance(value, str):
            return value
        text = value.strip()
        in_brackets = text.startswith("[") and text.endswith("]")
        if in_brackets or re.fullmatch(r"[\w.\-]+(\s*,\s*[\w.\-]+)+", text):
            # In brackets as JSON or YAML write a list; no name of a module holds these characters.
            return [part.strip(" \t'\"") for part in text.strip("[]").split(",")]
        return text

    @field_validator("target_modules")
    @classmethod
    def _usable(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or (not isinstance(value, str) and not all(map(str.strip, value))):
            raise ValueError(
                f"{shown_value(value)} has an empty name; write all-linear, or q_proj and such"
            )
        if not isinstance(value, str) and len(value) > MAX_PATTERN:
            raise ValueError(f"has {len(value):,} names, and at most {MAX_PATTERN:,} are read")
        error = pattern_error(value) if isinstance(value, str) else None
        if error:
            raise ValueError(f"{shown_value(value)} is no regular expression ({error}); mend it")
        return value


class ProcessSection(Section):
    """Child processes of a training stage; they share the work of every step."""

    processes: Workers | None = Field(default=None, ge=1)
    """Child processes that train together, launched as torchrun does, each on its own GPU or its
    share of `runtime.threads`; none trains in the stage's own process. Batch sizes stay those of
    all together, and must be multiples of it."""
    nodes: Workers = Field(default=1, ge=1)
    """Machines that train together, each with `processes` of them; sizes stay those of all. With
    more than 1 the stage needs a deployment, whose workers take up the others' part, or torchrun's
    environment variables (docs/deploying.md)."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: `ddp` holds all weights in each, `fsdp` a share of weights, gradients
    and optimiser in each, which needs less memory and more communication."""

    @property
    def ranks(self) -> int:
        """Processes that train together, on all machines; 1 if there are no child processes."""
        return (self.processes or 1) * self.nodes

    @model_validator(mode="after")
    def _nodes_need_processes(self) -> Self:
        if self.nodes > 1 and self.processes is None:
            raise ValueError(
                f"nodes = {self.nodes} is the number of machines with child processes each; set "
                "processes too"
            )
        return self


#: Fields left out of fingerprints and of checkpoints' identities: they decide where and in what
#: portions work is done, and the result is the same up to rounding. One difference: where the rows
#: are no multiple of `batch_size`, several processes fill up an epoch's last batch by its first.
UNFINGERPRINTED_FIELDS = frozenset(
    {*ProcessSection.model_fields, "rollout_batch_size", "checkpoint_minutes"}
)


class TrainingSection(ProcessSection):
    """Options of SFT and reward model training; passed to TRL's trainers unchanged."""

    epochs: Epochs = Field(default=1.0, gt=0)
    """Passes over the training rows."""
    batch_size: BatchSize = Field(default=64, ge=1)
    """Rows per optimiser step."""
    micro_batch_size: BatchSize | None = Field(default=None, ge=1)
    """Rows per forward pass; must divide `batch_size`. None means the whole batch at once, or a
    process's share of it."""
    learning_rate: Rate = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after warm-up."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps spent on linear warm-up."""
    adam_beta2: float = Field(default=0.95, gt=0, lt=1)
    """Second-moment decay of AdamW (first: 0.9)."""
    weight_decay: Factor = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: Factor = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    max_length: Tokens = Field(default=256, ge=8)
    """Longest prompt + reply in tokens; longer rows lose the end of the reply."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights."""
    frozen_dtype: FrozenDtype = "auto"
    """Dtype in which the base below adapters is held, whose linear layers compute in float32 all
    the same: `auto` is that of the base's files on a GPU, which changes no number, and float32 on a
    CPU; `nf4` are 4 bits by bitsandbytes (QLoRA), on a GPU."""
    checkpoint_minutes: Minutes | None = Field(default=5.0, ge=0)
    """Minutes between two checkpoints, from which training resumes exactly; more where saving takes
    above a twentieth of them. 0 saves after every step, none never. Three times the trained weights
    are saved, and two checkpoints kept."""

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> Self:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size = {self.micro_batch_size} must divide "
                f"batch_size = {self.batch_size}"
            )
        check_adapters_only(self.frozen_dtype, self.lora)
        if self.frozen_dtype == "bfloat16" and self.lora is None:
            raise ValueError(
                "frozen_dtype = 'bfloat16' needs lora: without adapters all weights are trained, "
                "in float32; set lora, or frozen_dtype to auto"
            )
        if self.sharding == "fsdp" and self.frozen_dtype in ("bfloat16", "nf4"):
            raise ValueError(
                f"frozen_dtype = {self.frozen_dtype!r} has weights that sharding = 'fsdp' can't "
                "deal out; set frozen_dtype to auto, or sharding to ddp"
            )
        if self.sharding == "fsdp" and self.processes is None:
            raise ValueError("sharding = 'fsdp' deals weights out to processes; set processes too")
        check_divides(self, "batch_size")
        share = self.batch_size // self.ranks
        if self.micro_batch_size and share % min(self.micro_batch_size, share):
            raise ValueError(
                f"micro_batch_size = {self.micro_batch_size} must divide {share}, the share of "
                f"batch_size = {self.batch_size} that each of {_ranks_in_words(self)} has"
            )
        return self


class SFTConfig(TrainingSection):
    """Supervised fine-tuning on demonstrations; loss on the reply only."""

    enabled: bool = True
    """False publishes the base model unchanged as the starting policy."""


class RewardModelConfig(TrainingSection):
    """A Bradley–Terry reward model: one scalar per (prompt, reply)."""

    base: str | None = Field(default=None, min_length=1)
    """Local folder, `artifact:<digest>`, `s3://bucket/prefix` or hub id to start from; none starts
    from the SFT policy."""
    pooling: Literal["last", "sum"] = "last"
    """Score of the last token (the field's standard), or a linear head summed over the reply's
    tokens, which small models trained from scratch learn far more from."""
    lm_loss_coef: Factor = Field(default=0.0, ge=0)
    """Weight of a language-model loss on the chosen reply that keeps the features general
    (Yang et al. 2024, "Regularizing hidden states", eq. 5)."""

    margin_coef: Factor = Field(default=0.0, ge=0)
    """Factor of the pairs' margins m in the loss −log σ(r_chosen − r_rejected − margin_coef · m)
    (Touvron et al. 2023, "Llama 2", eq. 2); pairs without a margin have m = 0. With 0 margins are
    not used."""
    negatives: float = Field(default=0.0, ge=0, le=4)
    """Negatives as a multiple of the pairs: preferred replies made worse (a sentence said again, or
    of a reply to another prompt, the end cut off), which the model learns to reject. 0: none."""
    members: int = Field(default=1, ge=1, le=16)
    """Linear heads on the trained model's base: the trained one, and others fitted to resamples of
    the training prompts. How far their scores differ shows where the pairs leave the reward unsure
    (docs/trust.md); with 1 there is the trained head alone."""

    _check_base = field_validator("base")(check_model_uri)

    @model_validator(mode="after")
    def _lm_loss_needs_whole_embedding(self) -> Self:
        if self.lm_loss_coef and self.sharding == "fsdp":
            raise ValueError(
                f"lm_loss_coef = {self.lm_loss_coef} reads the embedding, which sharding = 'fsdp' "
                "takes apart; set sharding to ddp, or lm_loss_coef to 0"
            )
        return self


class JudgeConfig(Section):
    """A second reward model that no training stage sees, which judges the policy beside the first.

    It is trained on the judge split (`data.judge_fraction`) with another seed and the
    hyper-parameters of `reward_model`."""

    enabled: bool = True
    """False trains no judge, and leaves its share of the data to training."""
    base: str | None = Field(default=None, min_length=1)
    """Local folder, `artifact:<digest>`, `s3://bucket/prefix` or hub id to start from; none starts
    from the SFT policy. Another base than the reward model's makes errors that both share rarer."""
    negatives: float = Field(default=1.0, ge=0, le=4)
    """As `reward_model.negatives`, for the judge. Without them a judge follows a policy that says
    sentences again, or says what belongs elsewhere: on the quickstart's world its score rose while
    the true one fell (docs/trust.md)."""

    _check_base = field_validator("base")(check_model_uri)

    @model_validator(mode="after")
    def _base_needs_a_judge(self) -> Self:
        if self.base and not self.enabled:
            raise ValueError("base is given, but enabled = false trains no judge; keep one")
        return self


class EvaluationConfig(Section):
    """Held-out comparison of the trained policy with the SFT policy and the champion."""

    prompts: Count = Field(default=300, ge=2)
    """Held-out prompts to answer with all policies (at most as many as there are)."""
    samples_per_prompt: Few = Field(default=4, ge=1)
    """Sampled replies of each policy to every prompt; each is compared with all of the other's.
    Beyond four they narrow intervals little: prompts count more."""
    temperature: Temperature = Field(default=1.0, gt=0)
    """Temperature of the sampled replies; greedy ones are always compared too."""
    samples: Few = Field(default=6, ge=0)
    """Sample replies, before and after, to show in the terminal and the report."""
    batch_size: BatchSize = Field(default=128, ge=1)
    """Rows per forward pass while evaluating."""
    judge: Literal["none", "world"] = "none"
    """The true score that no training stage and no gate sees, if there is one: that of the world. A
    judge that is trained is set in section `judge`."""


def check_adapters_only(dtype: FrozenDtype, lora: LoraConfig | None) -> None:
    """Check that a base is held in 4 bits only below adapters.

    Raises:
        ValueError: There are none.
    """
    if dtype == "nf4" and lora is None:
        raise ValueError(
            "frozen_dtype = 'nf4' needs lora: weights in 4 bits can't be trained, only adapters on "
            "them; set lora, or frozen_dtype to auto"
        )


def check_divides(section: ProcessSection, *names: str, by: int = 1) -> None:
    """Check that sizes are multiples of the number of processes.

    Args:
        section: The section that holds the sizes.
        names: Fields of the sizes.
        by: Size of groups that must stay together, such as the replies to one prompt.

    Raises:
        ValueError: One is not, times the size of a group.
    """
    count = section.ranks
    for name in names:
        value: Any = getattr(section, name)
        if value % (count * by):
            together = f", in groups of {by} replies," if by > 1 else ""
            raise ValueError(
                f"{name} = {value} can't be shared evenly{together} by {_ranks_in_words(section)}; "
                f"make it a multiple of {count * by}, or change processes"
            )


def _ranks_in_words(section: ProcessSection) -> str:
    nodes = f" on each of nodes = {section.nodes}" if section.nodes > 1 else ""
    return f"processes = {section.processes or 1}{nodes}"
