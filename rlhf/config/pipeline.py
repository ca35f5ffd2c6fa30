"""The whole configuration, and its sections of how and where a pipeline runs.

The sections are store, runtime, tracking, retraining, retries, promotion and placement.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from rlhf.config.costs import BudgetConfig, CostsConfig
from rlhf.config.data import DataConfig
from rlhf.config.gates import GatesConfig
from rlhf.config.lengths import TokenLimits
from rlhf.config.metric_names import Need, check_rules
from rlhf.config.numbers import Count, Days, Factor, Gigabytes, Seconds, Tries, Workers, doubled
from rlhf.config.ppo import PPOConfig, allow_aliases, by_field_names
from rlhf.config.pretrained import with_pretrained_defaults
from rlhf.config.section import OrText, Section
from rlhf.config.store_uri import check_endpoint, parse_store_uri
from rlhf.config.training import (
    BaseModelConfig,
    EvaluationConfig,
    JudgeConfig,
    RewardModelConfig,
    SFTConfig,
)

StageName = Literal[
    "prepare-data",
    "train-sft",
    "train-reward-model",
    "evaluate-reward-model",
    "gate-reward-model",
    "train-judge",
    "train-policy",
    "evaluate-policy",
    "gate-policy",
    "promote",
]
STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)

#: Value of `placement` for a stage that runs in the pipeline's own process.
INLINE = "inline"
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class StoreConfig(Section):
    """S3 options that the standard AWS chain does not carry; credentials never stand here."""

    endpoint_url: str | None = Field(default=None, min_length=1)
    """Endpoint of an S3-compatible server; none uses the AWS chain's."""
    region: str | None = Field(default=None, min_length=1)
    """Region; none uses the AWS chain's."""
    profile: str | None = Field(default=None, min_length=1)
    """Named profile of the AWS configuration files."""
    ca_bundle: str | None = Field(default=None, min_length=1)
    """Certificate file to trust, for a server with a certificate of its own."""
    sse: Literal["AES256", "aws:kms"] | None = None
    """Encryption at rest by the server; none leaves it to the bucket's own setting."""
    sse_kms_key_id: str | None = Field(default=None, min_length=1)
    """Key of `sse = aws:kms`; none takes the account's default."""

    @model_validator(mode="after")
    def _key_needs_kms(self) -> Self:
        if self.sse_kms_key_id and self.sse != "aws:kms":
            raise ValueError("sse_kms_key_id is given; it needs sse = 'aws:kms'")
        return self

    @field_validator("endpoint_url")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value:
            check_endpoint(value)
        return value


class RuntimeConfig(Section):
    """Folders, device and threads of a stage; no part of its fingerprint.

    They change its speed and never its result.

    A machine's own RLHF_WORK_DIR, RLHF_REPORT_DIR, RLHF_CACHE_GB, RLHF_DEVICE and RLHF_THREADS win.
    """

    work_dir: str = Field(default=".rlhf/work", min_length=1)
    """Local folder for checkpoints and the artifact cache; safe to delete."""
    cache_gb: Gigabytes = Field(default=50.0, gt=0)
    """Most that fetched artifacts may take there, in 10^9 bytes; those used last stay, and those in
    use always do."""
    report_dir: str = Field(default=".rlhf/reports", min_length=1)
    """Local folder for the HTML reports."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train on; auto takes an accelerator if there is one."""
    threads: Workers = Field(default=2, ge=1)
    """CPU threads for torch."""
    upload_checkpoints: bool = True
    """Send checkpoints to the store as well, so that another machine can go on."""


class TrackingConfig(Section):
    """Experiment trackers that get the metrics; no part of a fingerprint.

    Addresses and credentials stand in each tracker's own environment variables."""

    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Any of `tensorboard`, `wandb`, `mlflow` and `trackio`; an empty list sends nothing."""
    project: str = Field(default="rlhf", min_length=1)
    """Project of wandb and trackio, and experiment of MLflow."""
    log_dir: str = Field(default=".rlhf/logs", min_length=1)
    """Local folder for TensorBoard's files (one folder per run, and in it one per stage) and
    wandb's; a machine's own RLHF_LOG_DIR wins."""

    @field_validator("trackers")
    @classmethod
    def _without_duplicates(cls, value: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
        return tuple(dict.fromkeys(value))


class RetrainingConfig(Section):
    """Rules of the retraining flow; a plain run of the pipeline does not ask them."""

    warm_start: Literal["none", "sft", "policy"] = "policy"
    """What of the champion takes the place of the base model: its SFT policy, itself, or nothing.
    With `sft.enabled: false` PPO starts from it directly."""
    min_new_pairs: Count = Field(default=1, ge=1)
    """Fewest training pairs that the last retraining did not have."""
    max_age_days: Days | None = Field(default=None, gt=0)
    """Age of the champion from which it is trained again whatever is new; none waits for data."""


class RetryConfig(Section):
    """Retries of a stage, for errors that trying again can cure."""

    attempts: Tries = Field(default=3, ge=0)
    """Retries after the first try."""
    delay_seconds: Seconds = Field(default=5.0, ge=0)
    """First delay; doubles with every further retry, up to a day."""
    jitter: Factor = Field(default=0.5, ge=0, le=10)
    """Random share added to each delay."""
    scheduled_seconds: Seconds | None = Field(default=None, gt=0)
    """Longest wait of a placed stage for a worker; none waits without end."""
    pending_seconds: Seconds = Field(default=900.0, gt=0)
    """Longest time from a worker's acceptance of a placed stage to its process: then another run
    takes its place, with twice the time."""
    cancelling_seconds: Seconds = Field(default=1800.0, gt=0)
    """Longest time that a cancelled run of a placed stage may take to save and end."""

    def delay(self, attempt: int) -> float:
        """Return the seconds after try `attempt`, counted from 0, without jitter."""
        return doubled(self.delay_seconds, attempt)


class PromotionConfig(Section):
    """Promotion of a policy that passed every gate."""

    name: str = Field(default="default", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """Model line whose champion this pipeline updates."""
    approval: Literal["automatic", "manual"] = "automatic"
    """Whether the gates decide alone, or a person approves as well; `promotion: manual` sets it."""
    smoke_seconds: Seconds = Field(default=600.0, gt=0)
    """Most that the smoke test may take: loading the policy and answering a few prompts."""


def place_names(stage: str, deployment: str) -> list[str]:
    """Return a deployment's short names: `gpu` and `train-sft-gpu` of `train-sft/train-sft-gpu`."""
    name = deployment.rpartition("/")[2]
    return list(dict.fromkeys([name.removeprefix(f"{stage}-"), name]))


def _full_names(placement: dict[StageName, str]) -> dict[StageName, str]:
    return {stage: _deployment(stage, value) for stage, value in placement.items()}


def _placement_schema() -> dict[str, Any]:
    """Return a JSON schema with a field for each stage, which forms and errors name."""
    return {
        "type": "object",
        "title": "Placement",
        "additionalProperties": False,
        "properties": {
            stage: {"type": "string", "title": stage, "pattern": f"^({stage}/)?[^/]+$"}
            for stage in STAGE_NAMES
        },
    }


Placement = Annotated[
    dict[StageName, str], AfterValidator(_full_names), WithJsonSchema(_placement_schema())
]


class PipelineConfig(Section):
    """Configuration of a whole run."""

    model_config = ConfigDict(json_schema_extra=allow_aliases)

    name: str = Field(default="rlhf", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """Name shown in run names and reports."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seeds data, initial weights, shuffling and sampling."""
    store: str = Field(default=".rlhf/store", min_length=1)
    """`file:///folder`, a plain folder, or `s3://bucket/prefix`."""
    store_options: StoreConfig = StoreConfig()
    """S3 endpoint, region, profile."""
    data: DataConfig = DataConfig()
    """Preference data."""
    base: BaseModelConfig = BaseModelConfig()
    """Base model."""
    sft: SFTConfig = SFTConfig()
    """Supervised fine-tuning."""
    reward_model: RewardModelConfig = RewardModelConfig()
    """Reward model."""
    judge: JudgeConfig = JudgeConfig()
    """Judge of the policy beside the reward model."""
    ppo: PPOConfig = PPOConfig()
    """Policy optimisation."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out evaluation."""
    gates: GatesConfig = GatesConfig()
    """Gates."""
    promotion: Annotated[PromotionConfig, OrText("manual", "automatic")] = PromotionConfig()
    """Promotion."""
    placement: Placement = Field(default_factory=dict[StageName, str])
    """Deployment that runs a stage, such as `train-policy: gpu` for the deployment
    `train-policy/train-policy-gpu`, or a full name; a stage that is not named runs inline, in the
    pipeline's own process."""
    retraining: RetrainingConfig = RetrainingConfig()
    """When the retraining flow runs the pipeline, and from what."""
    retries: RetryConfig = RetryConfig()
    """Retries of each stage."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Folders, device, threads."""
    tracking: TrackingConfig = TrackingConfig()
    """Experiment trackers."""
    costs: CostsConfig = CostsConfig()
    """Prices of machines."""
    budget: BudgetConfig = BudgetConfig()
    """Most time or money of a run."""

    def deployment_of(self, stage: str) -> str:
        """Return the deployment that runs a stage, or `inline`."""
        return next((place for name, place in self.placement.items() if name == stage), INLINE)

    def token_limits(self, section: Literal["sft", "reward_model"] = "reward_model") -> TokenLimits:
        """Return the most tokens of prompts and replies, with the `max_length` of a section.

        Prompts have the same limit in all stages: they leave room for `ppo.max_new_tokens` in the
        shorter `max_length`.
        """
        max_prompt = self._shortest_length()[1] - self.ppo.max_new_tokens
        return TokenLimits(
            max_length=getattr(self, section).max_length,
            max_prompt=min(max_prompt, self.data.max_prompt or max_prompt),
            max_reply=self.data.max_reply,
            max_new_tokens=self.ppo.max_new_tokens,
            system=self.data.system,
            max_bad_fraction=self.data.max_bad_fraction,
        )

    def _shortest_length(self) -> tuple[str, int]:
        """Return the setting that allows the fewest tokens of prompt and reply, and its value."""
        lengths = {"reward_model.max_length": self.reward_model.max_length}
        if self.sft.enabled:
            lengths["sft.max_length"] = self.sft.max_length
        if self.base.path is None:
            lengths["base.architecture.context"] = self.base.architecture.context
        return min(lengths.items(), key=lambda item: item[1])

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        """Resolve `rl_` names, and add the defaults that depend on the base."""
        if not isinstance(data, dict):
            return data
        return with_pretrained_defaults(by_field_names(cast("dict[str, Any]", data)))

    @field_validator("store")
    @classmethod
    def _known_store(cls, value: str) -> str:
        parse_store_uri(value)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.evaluation.judge == "world" and self.data.source != "world":
            raise ValueError(
                f"evaluation.judge = 'world' can't judge data.source = {self.data.source!r}; "
                "set evaluation.judge to none"
            )
        if self.ppo.reward_model_path and self.reward_model.base:
            raise ValueError(
                "ppo.reward_model_path and reward_model.base are both given, but a ready reward "
                "model is not trained; keep one"
            )
        if self.ppo.reward_model_path and self.ppo.reward_normalization == "reference":
            raise ValueError(
                "ppo.reward_normalization = 'reference' needs scores that a reward model's "
                f"training measures, and ppo.reward_model_path = {self.ppo.reward_model_path!r} is "
                "not trained here; set ppo.reward_normalization to running or none"
            )
        if self.ppo.reward_model_path and self.reward_model.members > 1:
            raise ValueError(
                f"reward_model.members = {self.reward_model.members} are heads that a training "
                f"fits, and ppo.reward_model_path = {self.ppo.reward_model_path!r} is not trained "
                "here; set reward_model.members to 1"
            )
        if self.reward_model.margin_coef and self.data.source == "world":
            raise ValueError(
                f"reward_model.margin_coef = {self.reward_model.margin_coef:g} needs margins, and "
                "the pairs of data.source = 'world' have none; set it to 0"
            )
        self._check_lengths()
        self._check_gates()
        self._check_frozen_dtypes()
        if self.ppo.shared_base:
            self._check_reward_model_is_an_adapter()
        placed = [stage for stage, place in self.placement.items() if place != INLINE]
        if placed and not self.store.startswith(("s3://", "file:///", "/")):
            raise ValueError(
                f"placement of {placed[0]} needs a store that its machine reaches, and store = "
                f"{self.store!r} is a folder relative to this one; write s3://bucket/prefix or an "
                "absolute path"
            )
        setting = self.ppo.needs_reference_answers
        if setting and not self.data.has_references:
            raise ValueError(
                f"ppo: {setting} needs reference answers, and data.reference_column = none; name "
                "the column that holds them"
            )
        if self.base.path is None and not self.sft.enabled:
            raise ValueError(
                "sft.enabled = false needs base.path: an untrained model can't be a policy"
            )
        return self

    def _check_lengths(self) -> None:
        """Refuse replies that the policy samples and the reward model could not read."""
        data, new_tokens = self.data, self.ppo.max_new_tokens
        name, length = self._shortest_length()
        if new_tokens >= length:
            raise ValueError(
                f"ppo.max_new_tokens = {new_tokens} leaves no room for a prompt in {name} = "
                f"{length}; lower it, or raise {name}"
            )
        if data.max_prompt and data.max_prompt + new_tokens > length:
            raise ValueError(
                f"data.max_prompt = {data.max_prompt} and ppo.max_new_tokens = {new_tokens} exceed "
                f"{name} = {length} together; lower one of them, or raise {name}"
            )
        if data.max_reply and data.max_reply < new_tokens:
            raise ValueError(
                f"data.max_reply = {data.max_reply} is less than ppo.max_new_tokens = "
                f"{new_tokens}: the reward model would not read the end of the policy's replies; "
                "raise it, or lower ppo.max_new_tokens"
            )

    def _check_gates(self) -> None:
        """Refuse rules on metrics that no evaluation writes with this configuration."""
        absent: dict[Need, str] = {"champion": "the model line may have no champion"}
        if not self.judge.enabled:
            absent["judge"] = "judge.enabled = false trains no judge"
        if self.evaluation.judge == "none":
            absent["gold"] = "evaluation.judge = none measures no gold score"
        if self.reward_model.members == 1:
            absent["members"] = "reward_model.members = 1 trains a single head"
        check_rules("reward_model", self.gates.reward_model or (), absent)
        check_rules("policy", self.gates.policy or (), absent)

    def _check_frozen_dtypes(self) -> None:
        """Refuse rounding of a model from scratch, and a shared base that only one stage rounds."""
        bases = {"sft": self.base.path, "ppo": self.base.path}
        bases["reward_model"] = self.reward_model.base or self.base.path
        for name, base in bases.items():
            dtype = getattr(self, name).frozen_dtype
            # SFT would merge into the base's files, which a model from scratch does not have.
            if base is None and (dtype == "nf4" or (dtype == "bfloat16" and name == "sft")):
                raise ValueError(
                    f"{name}.frozen_dtype = {dtype!r} is for a pretrained base, and base.path = "
                    "none trains a small model from scratch; set it to auto, or give base.path"
                )
        starts_from_scratch = (self.judge.base or self.base.path) is None
        if self.judge.enabled and starts_from_scratch and self.reward_model.frozen_dtype == "nf4":
            raise ValueError(
                "reward_model.frozen_dtype = 'nf4' is for a pretrained base, and the judge starts "
                "from a policy trained from scratch; give judge.base, or set judge.enabled to false"
            )
        reward, policy = (s.frozen_dtype for s in (self.reward_model, self.ppo))
        if self.ppo.shared_base and (reward == "nf4") != (policy == "nf4"):
            raise ValueError(
                f"ppo.shared_base = true puts the reward model's adapter on PPO's base, and "
                f"reward_model.frozen_dtype = {reward!r} trained it on another one than "
                f"ppo.frozen_dtype = {policy!r}; set both to nf4, or neither"
            )

    def _check_reward_model_is_an_adapter(self) -> None:
        reason = None
        if self.ppo.reward_model_path:
            reason = f"ppo.reward_model_path = {self.ppo.reward_model_path!r} is a whole model"
        elif self.reward_model.base:
            reason = f"reward_model.base = {self.reward_model.base!r} is another base"
        elif self.reward_model.lora is None:
            reason = "reward_model.lora = none trains a whole model"
        if reason:
            raise ValueError(
                f"ppo.shared_base = true needs a reward model that is an adapter on the SFT "
                f"policy, and {reason}; set reward_model.lora alone, or ppo.shared_base to false"
            )


def _deployment(stage: StageName, value: str) -> str:
    """Return a deployment's full name, such as `train-policy/train-policy-gpu` for `gpu`.

    Raises:
        ValueError: It is a deployment of another flow.
    """
    if value == INLINE:
        return value
    flow, slash, name = value.rpartition("/")
    if not name or (slash and flow != stage):
        raise ValueError(
            f"{value!r} is no deployment of {stage}; write the name of a pool, such as gpu, "
            f"{stage}/<deployment>, or inline"
        )
    return value if slash else f"{stage}/{stage}-{name.removeprefix(f'{stage}-')}"
