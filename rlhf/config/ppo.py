"""PPO's parameters, under the names that the papers and TRL use.

The seed's parameters also go by `rl_` names, such as `rl_gamma`, in section `ppo` and at the top
of a configuration. `compat` sets parameters as TRL, OpenRLHF, verl or OpenAI's code does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rlhf.config.numbers import BatchSize, Count, Factor, Passes, Rate, Temperature, Tokens
from rlhf.config.rewards import RewardSection
from rlhf.config.section import Section, advised_range, check_model_uri
from rlhf.config.text import one_line, shown_value
from rlhf.config.training import (
    FrozenDtype,
    LoraConfig,
    ProcessSection,
    check_adapters_only,
    check_divides,
)
from rlhf.config.watchdog import WatchdogConfig
from rlhf.errors import ConfigError

#: Fields of section `ppo` that have an `rl_` name: the seed's parameters.
SEED_NAMES = (
    *("reward_model_path", "gamma", "gae_lambda", "kl_coef", "value_loss_coef", "clip_range"),
    *("value_clip_range", "num_ppo_epochs", "chunk_size", "mini_batch_size"),
    *("optimize_device_cache", "max_new_tokens", "top_k", "top_p", "temperature", "reward_fn"),
    *("multi_objective", "reward_weights", "env_type", "env_config"),
)
#: The field of each `rl_` name.
ALIASES = {f"rl_{name}": name for name in SEED_NAMES}

#: Values that `compat` sets for each peer, from the sources named beside them. Differences that no
#: option covers remain: lm-human-preferences whitens each optimiser step's part by itself, the
#: others a whole chunk as here; verl's adaptive controller goes by the KL per token,
#: lm-human-preferences' by the KL per reply as here.
COMPAT: Mapping[str, Mapping[str, Any]] = {
    # TRL 1.12.0, trl/experimental/ppo/ppo_trainer.py: the score goes to `actual_end`, one past the
    # end token; masked_var multiplies by n / (n − 1), for advantages and rewards alike; KL is
    # not clamped. Its missing_eos_penalty is subtracted, and off until one is given.
    "trl": {
        "score_position": "past_end",
        "whiten_variance": "unbiased",
        "missing_eos": "subtract",
        "missing_eos_penalty": None,
        "kl_clamp": None,
        "reward_clip": None,
    },
    # OpenRLHF 0.11.2: compute_approx_kl in openrlhf/models/utils.py clamps k1, k2 and k3 alike to
    # ±10, compute_reward the score (--reward.clip_range), which goes to the last token;
    # experience_maker.py divides the squares by n. A truncated reply is left alone unless
    # --reward.stop_properly_penalty_coef is given (negative: it replaces the score). Log-probs are
    # over the whole vocabulary, whatever top_p the rollouts have.
    "openrlhf": {
        "score_position": "last",
        "whiten_variance": "biased",
        "missing_eos": "none",
        "kl_clamp": 10.0,
        "reward_clip": 10.0,
        "truncation": "none",
    },
    # verl 0.9.1: masked_var in verl/utils/torch_functional.py is unbiased; kl_penalty_forward in
    # verl/trainer/ppo/core_algos.py clamps k3 alone, to ±10 (`_by_field_names_with_compat`); the
    # reward managers put the score on the last token. Its dual clip (clip_ratio_c: 3) is always on.
    # Log-probs are over the whole vocabulary, whatever top_k and top_p the rollouts have.
    "verl": {
        "score_position": "last",
        "whiten_variance": "unbiased",
        "missing_eos": "none",
        "kl_clamp": None,
        "reward_clip": None,
        "truncation": "none",
        "dual_clip": 3.0,
    },
    # openai/lm-human-preferences: the score on the last token (train_policy.py), of replies that
    # all have one length; tf.nn.moments is biased (utils/core.py); −1 replaces the score of a reply
    # without the token that ends it (penalty_reward_value in lm_tasks.py). Rewards are whitened
    # too, by default.
    "oai": {
        "score_position": "last",
        "whiten_variance": "biased",
        "missing_eos": "replace",
        "missing_eos_penalty": 1.0,
        "kl_clamp": None,
        "reward_clip": None,
        "whiten_rewards": True,
    },
}


class SamplingSection(Section):
    """Sampling of replies."""

    max_new_tokens: Tokens = Field(default=128, ge=1)
    """No reply is longer."""
    temperature: Temperature = Field(default=1.0, gt=0)
    """Sampling temperature; divides the logits of policy and reference alike."""
    top_k: Tokens = Field(default=50, ge=0)
    """Sample from the k likeliest tokens; 0 from all. `truncation` says what is scored."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this much probability."""
    truncation: Literal["replay", "none"] = "replay"
    """With `top_k` or `top_p`: `replay` stores the tokens that were left at each step, and computes
    log-probabilities, ratio, KL and entropy of policy and reference over these, so of the
    distribution that is sampled. `none` computes them over the whole vocabulary, as most peers do:
    ratio and KL are then of another distribution than the replies (docs/models.md)."""
    sampler: Literal["inverse_cdf", "multinomial"] = "inverse_cdf"
    """Two ways to draw from the same distribution: one uniform number per token, which is faster,
    or torch.multinomial's stream of random numbers, as TRL draws."""


class ShapingSection(Section):
    """Reward shaping: from a reply's score to the rewards of its tokens."""

    missing_eos: Literal["subtract", "replace", "none"] = "subtract"
    """What happens to the score of a reply that does not end: `missing_eos_penalty` is subtracted
    from it, or its negative replaces it, or nothing."""
    missing_eos_penalty: Factor | None = Field(default=1.0, ge=0)
    """Size of that penalty; none is the same as `missing_eos: none`."""
    score_position: Literal["last", "past_end"] = "last"
    """The token that gets the score: a reply's last one, or (as TRL does) the place after it, which
    all but the longest replies of a chunk have."""
    reward_normalization: Literal["none", "running", "reference"] = "none"
    """`running` divides scores by their standard deviation over all chunks so far; `reference`
    subtracts the mean score of replies that people preferred, and divides by its deviation, both
    measured once by the reward model's training."""
    whiten_rewards: bool = False
    """Scale the shaped rewards of all tokens in a chunk to variance 1, keeping their mean."""
    reward_clip: Factor | None = Field(default=None, gt=0)
    """Scores are clamped to ± this, after normalising; none leaves them alone."""
    whiten_variance: Literal["biased", "unbiased"] = "biased"
    """Variance by which advantages are whitened: divided by n, or (Bessel) by n − 1."""


class KLSection(Section):
    """KL penalty against the frozen reference."""

    kl_coef: Factor = Field(default=0.1, ge=0, json_schema_extra=advised_range(0.01, 0.5))
    """Weight of the per-token KL penalty, in the reward, against the frozen reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of a token's KL (Schulman 2020, "Approximating KL divergence")."""
    kl_clamp: Factor | None = Field(default=None, gt=0)
    """A token's estimate (of whichever estimator) is clamped to ± this; none leaves it alone."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` moves `kl_coef` towards `kl_target` (Ziegler et al. 2019, section 2.2)."""
    kl_target: Factor = Field(default=6.0, gt=0)
    """KL per reply, in nats, that the adaptive controller aims at."""
    kl_horizon: Count = Field(default=10_000, ge=1)
    """Replies over which the adaptive controller corrects."""
    kl_audit: bool = False
    """Also log the exact KL over the whole vocabulary (`kl_exact`), beside the estimate. With
    `truncation: replay` it is over the kept tokens, and `kept_mass` and `kept_mass_reference` are
    the mean probabilities of these: what the penalty can't see is in their difference."""


class CriticSection(Section):
    """The value function."""

    critic: Literal["reward_model", "policy", "adapter", "head"] = "reward_model"
    """A model of its own, from the reward model's or the policy's backbone; or a LoRA adapter on
    the policy's base; or just a value head on the policy."""
    value_loss_coef: Factor = Field(default=1.0, ge=0, json_schema_extra=advised_range(0.5, 2.0))
    """Multiplies ½·max(clipped, unclipped)² in the loss. It changes little unless `critic` is
    `head`: other critics have an AdamW of their own, which is blind to the scale of a loss but for
    the clipping of gradients."""
    value_clip_range: Factor | None = Field(default=0.2, gt=0)
    """New values are clamped to the old ones ± this; none switches the clamp off."""
    critic_learning_rate: Rate | None = Field(default=None, gt=0)
    """Peak learning rate of the critic; none uses the policy's."""
    critic_warmup_updates: Count = Field(default=0, ge=0)
    """First updates in which only the critic learns; the policy's warm-up begins after them."""
    gamma: float = Field(default=0.99, gt=0, le=1, json_schema_extra=advised_range(0.9, 0.99))
    """Discount per token in generalised advantage estimation."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1, json_schema_extra=advised_range(0.9, 0.99))
    """λ of generalised advantage estimation (Schulman et al. 2015)."""


class OptimizerSection(Section):
    """Optimiser, precision and memory."""

    learning_rate: Rate = Field(default=1e-5, gt=0)
    """Peak learning rate of the policy."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rates after warm-up, by update."""
    lr_final_fraction: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak at which the decay ends."""
    lr_warmup_updates: Count = Field(default=0, ge=0)
    """Updates in which the learning rates rise linearly to their peak."""
    adam_beta2: float = Field(default=0.95, gt=0, lt=1)
    """Second-moment decay of AdamW (first: 0.9)."""
    weight_decay: Factor = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: Factor | None = Field(default=1.0, gt=0)
    """Gradients of policy and critic are clipped to this norm, each by itself; none: never."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the forward passes of all models in bfloat16; weights that are trained, and the
    optimiser, stay in float32, frozen linear layers are stored in bfloat16."""
    frozen_dtype: FrozenDtype = "auto"
    """Dtype in which weights that are not trained are held (reference, reward model, base below
    adapters), whose linear layers compute in `precision` all the same: `auto` is that of the files
    on a GPU, which changes no number, and float32 on a CPU; with `precision: bf16` it is bfloat16.
    `nf4` holds the base below adapters in 4 bits by bitsandbytes (QLoRA), on a GPU."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time, same numbers."""
    optimize_device_cache: bool = True
    """Keep rollouts off the device between phases and free its caches: less peak memory, same
    numbers."""
    lora: LoraConfig | None = None
    """Train low-rank adapters of the policy; the reference is the policy with adapters off."""
    shared_base: bool = False
    """Policy, reference, critic and reward model are adapters on one base, so that one model's
    weights are in memory; needs `lora`, and a reward model trained with `reward_model.lora`."""

    @property
    def scorer_dtype(self) -> FrozenDtype:
        """`frozen_dtype` of models that score replies.

        They are not rounded to 4 bits: their scores are those that the gate judged.
        """
        return "auto" if self.frozen_dtype == "nf4" else self.frozen_dtype


def allow_aliases(schema: dict[str, Any]) -> None:
    """Make a JSON schema accept `rl_` names.

    They are patterns, so that a form lists each field once. In section `ppo` an `rl_` name has its
    field's schema; at the top any value is accepted.
    """
    fields = schema.get("properties", {})
    schema["patternProperties"] = {f"^rl_{name}$": fields.get(name, {}) for name in SEED_NAMES}


class PPOConfig(
    SamplingSection, RewardSection, ShapingSection, KLSection, CriticSection, OptimizerSection,
    ProcessSection,
):  # fmt: skip
    """Proximal policy optimisation (Schulman et al. 2017) as in Ziegler et al. 2019."""

    # Prefect checks a deployment's parameters by this schema before a run starts.
    model_config = ConfigDict(json_schema_extra=allow_aliases)

    compat: Literal["trl", "openrlhf", "verl", "oai"] | None = None
    """Do as this peer does where they differ: score position, whitening variance, clamps, missing
    EOS. Sets the defaults of those options; one that is given by itself wins."""
    reward_model_path: str | None = Field(default=None, min_length=1)
    """A ready reward model in place of a trained one: a local folder, `artifact:<digest>`,
    `s3://bucket/prefix`, or a hub id (also `owner/name@revision`) of a sequence-classification
    model with one label. It keeps its own tokenizer, and has to pass the gate like any other."""
    total_episodes: Count = Field(default=4608, ge=1)
    """Replies to sample in all; the number of updates is this over `chunk_size`, rounded up."""
    chunk_size: BatchSize = Field(default=128, ge=1)
    """Rollouts collected under a frozen policy before optimising."""
    mini_batch_size: BatchSize = Field(default=8, ge=1)
    """Sequences per optimiser step; the last one of an epoch may be smaller."""
    micro_batch_size: BatchSize = Field(default=64, ge=1)
    """Sequences per forward pass (of each process); changes memory, not results."""
    rollout_batch_size: BatchSize | None = Field(default=None, ge=1)
    """Replies decoded at a time (by each process); their KV cache is in memory together. None
    decodes the whole chunk at once. Fewer need less memory and more time, with `sampler:
    multinomial` much more. The random numbers are the same; in bf16, and on a GPU, rounding depends
    on the size of a batch and changes tokens."""
    num_ppo_epochs: Passes = Field(default=4, ge=1)
    """Passes over one chunk of rollouts."""
    clip_range: float = Field(default=0.2, gt=0, lt=1, json_schema_extra=advised_range(0.1, 0.3))
    """The probability ratio is clamped to 1 ± this."""
    dual_clip: Factor | None = Field(default=None, gt=1)
    """Bounds the loss of a token with negative advantage to this times it (Ye et al. 2020)."""
    entropy_coef: Factor = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    target_kl: Factor | None = Field(default=None, gt=0)
    """Optimising a chunk stops once a step's approximate KL to the sampling policy, per token, is
    above this; none: never. One rare token can carry it: the first update's steps are Adam's
    largest, unless `lr_warmup_updates` makes them small."""
    checkpoint_every: Count = Field(default=5, ge=1)
    """Updates between two checkpoints; training resumes exactly from the last one."""
    watchdog: WatchdogConfig | None = WatchdogConfig()
    """Looks at the policy on held-out prompts during the training, stops it for a reason, and
    chooses the update whose policy goes on; none: no looks, and the last one goes on."""

    @model_validator(mode="before")
    @classmethod
    def _by_field_names_with_compat(cls, data: Any) -> Any:
        """Resolve `rl_` names, and add the values that `compat` stands for."""
        if not isinstance(data, dict):
            return data
        values = section_by_field_names(cast("dict[str, Any]", data).items())
        peer = dict(COMPAT.get(str(values.get("compat")), {}))
        if values.get("compat") == "verl" and values.get("kl_estimator") == "k3":
            peer["kl_clamp"] = 10.0
        return {**peer, **values}

    _check_reward_model_path = field_validator("reward_model_path")(check_model_uri)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.reward_normalization == "reference" and not self.rewards_by_model_alone:
            raise ValueError(
                "reward_normalization = 'reference' is the scale of the reward model's scores, and "
                "here the reward is not such a score alone; set it to running or none"
            )
        if self.mini_batch_size > self.chunk_size:
            raise ValueError(
                f"mini_batch_size = {self.mini_batch_size} exceeds chunk_size = "
                f"{self.chunk_size}; lower it to at most chunk_size"
            )
        for name in ("chunk_size", "total_episodes"):
            if getattr(self, name) % self.replies_per_prompt:
                raise ValueError(
                    f"{name} = {getattr(self, name)} counts replies, and is no multiple of "
                    f"env_config.replies_per_prompt = {self.replies_per_prompt}; make it one"
                )
        if self.sharding == "fsdp":
            raise ValueError(
                "sharding = 'fsdp' is not for PPO, whose log-probabilities, values and sampling "
                "read weights outside of the modules that FSDP gathers them for; set it to ddp, "
                "and to save memory lora, shared_base or gradient_checkpointing"
            )
        check_divides(self, "chunk_size", "total_episodes", by=self.replies_per_prompt)
        check_divides(self, "mini_batch_size")
        if self.critic_warmup_updates >= self.updates:
            raise ValueError(
                f"critic_warmup_updates = {self.critic_warmup_updates} leaves the policy none of "
                f"{self.updates} updates; lower it, or raise total_episodes"
            )
        warmups = self.critic_warmup_updates + self.lr_warmup_updates
        if self.lr_warmup_updates and warmups > self.updates:
            raise ValueError(
                f"lr_warmup_updates = {self.lr_warmup_updates} ends after all {self.updates} "
                f"updates, for it begins after critic_warmup_updates = "
                f"{self.critic_warmup_updates}, so that the policy's rate never reaches its peak; "
                "lower one of them, or raise total_episodes"
            )
        if self.top_k == 1:
            raise ValueError(
                "top_k = 1 leaves one token at each step, so that there is nothing to learn from; "
                "set it to 0, or to 2 or more"
            )
        if self.kl_controller == "adaptive" and self.kl_coef == 0:
            raise ValueError(
                "kl_controller = 'adaptive' multiplies kl_coef, and kl_coef = 0 stays 0; "
                "raise kl_coef above 0, or use kl_controller = 'fixed'"
            )
        limit = self.watchdog and self.watchdog.max_kl
        if self.kl_controller == "adaptive" and limit and self.kl_target >= limit:
            raise ValueError(
                f"kl_target = {self.kl_target:g} is what the adaptive controller aims at, and "
                f"watchdog.max_kl = {limit:g} stops the run; raise the latter above it"
            )
        if self.kl_controller == "adaptive" and self.chunk_size >= 5 * self.kl_horizon:
            raise ValueError(
                f"kl_horizon = {self.kl_horizon} lets one chunk of {self.chunk_size} replies "
                "drive kl_coef to 0 or below; raise it above chunk_size / 5"
            )
        return self

    @model_validator(mode="after")
    def _adapters_fit(self) -> Self:
        if self.lora is not None and self.lora.dropout:
            raise ValueError(
                f"lora.dropout = {self.lora.dropout:g} is not for PPO, in which the policy that "
                "samples must be the one that is trained; set it to 0 here"
            )
        if self.critic == "adapter" and self.lora is None:
            raise ValueError(
                "critic = 'adapter' needs lora: it puts a second adapter on the policy's base; "
                "set lora, or critic to reward_model, policy or head"
            )
        check_adapters_only(self.frozen_dtype, self.lora)
        if self.shared_base and self.lora is None:
            raise ValueError(
                "shared_base = true needs lora: the policy is an adapter on the base; set lora, or "
                "shared_base to false"
            )
        if self.shared_base and self.critic == "policy":
            raise ValueError(
                "shared_base = true has no room for critic = 'policy', which is a model of its "
                "own; set critic to reward_model, adapter or head, or shared_base to false"
            )
        return self

    @property
    def updates(self) -> int:
        """Number of PPO updates: ⌈total_episodes / chunk_size⌉."""
        return -(-self.total_episodes // self.chunk_size)


def by_field_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Move each `rl_` name in a configuration tree to its field in section `ppo`.

    `rl_` names may stand at the top and in the section. Text in place of section `promotion`
    becomes the section's field `approval`. Invalid sections are left to validation.

    Raises:
        ConfigError: A field has two values.
    """
    if isinstance(tree.get("promotion"), str):
        tree = {**tree, "promotion": {"approval": tree["promotion"]}}
    at_top = {key: value for key, value in tree.items() if key in ALIASES}
    section: Any = tree.get("ppo")
    if isinstance(section, BaseModel) and at_top:
        section = section.model_dump(exclude_unset=True)
    if section is None and at_top:
        section = {}
    if not isinstance(section, dict):
        return dict(tree)
    values = [*cast("dict[str, Any]", section).items(), *at_top.items()]
    others = {key: value for key, value in tree.items() if key not in ALIASES}
    return {**others, "ppo": section_by_field_names(values, "ppo.")}


def section_by_field_names(values: Iterable[tuple[str, Any]], prefix: str = "") -> dict[str, Any]:
    """Return the values of section `ppo`, each under its field's name.

    Args:
        values: (name, value) pairs; a name may be an `rl_` name.
        prefix: Stands before a field's name in errors.

    Raises:
        ConfigError: A field has two values.
    """
    section: dict[str, Any] = {}
    for key, value in values:
        name = ALIASES.get(key, key)
        if name in section:
            raise ConfigError(
                one_line(
                    f"{prefix}{name} is given twice, as {name} and as rl_{name}: "
                    f"{shown_value(section[name])} and {shown_value(value)}; keep one"
                )
            )
        section[name] = value
    return section
