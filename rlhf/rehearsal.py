"""Rehearsal of a run: every training stage on a miniature of the base model, in seconds.

The miniature has the class, layer types, vocabulary, tokenizer and chat template of the real base
(`rlhf.modeling.miniature`). It is trained for one step by each stage as configured, on the user's
first rows; the results of padded, packed and decoded rows are compared with plain calls of
transformers; and what the stages write is loaded by transformers alone. So a family that a stage
can't train, or would train on wrong numbers, is refused before the real model is trained.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.config import PipelineConfig, PPOConfig, RuntimeConfig
from rlhf.config.lengths import TokenLimits
from rlhf.data.rows import PAIRS_TRAIN, PROMPTS_TRAIN, Pair, PromptRow, iterate_rows
from rlhf.errors import ConfigError, RLHFError
from rlhf.files import read_json, write_json
from rlhf.gates import Approved, judge, require
from rlhf.modeling.generation_config import FILE as GENERATION
from rlhf.modeling.source import CONFIG, MODEL_FILES, WEIGHTS, ExternalModel
from rlhf.rehearsal_rows import ROWS, Sample
from rlhf.smoke import sample_replies

#: Most tokens of a row that is trained on, and of a reply.
LENGTH, NEW_TOKENS = 192, 8
#: Longest prompt that is compared, to be longer than a model's attention window.
LONGEST = 4200
#: Fields of a configuration that training may change.
_MAY_CHANGE = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
    "tie_word_embeddings", "torch_dtype", "transformers_version", "vocab_size",
}  # fmt: skip
#: Reward settings that call a service or code of the user's; the reward model takes their place.
_PLAIN_REWARD: dict[str, Any] = {
    "reward_fn": None, "length_penalty": None, "correctness": None, "custom": None,
    "env_type": None, "env_config": None, "multi_objective": False, "reward_weights": None,
}  # fmt: skip


class RehearsalFailed(ConfigError):
    """A stage fails with this model, or computes wrong numbers."""


def rehearse(
    config: PipelineConfig,
    base: Path,
    sample: Sample,
    scratch: Path,
    *,
    reward_base: tuple[ExternalModel, Path] | None = None,
    judge_base: tuple[ExternalModel, Path] | None = None,
) -> list[str]:
    """Run every stage on a miniature of the base model.

    Args:
        config: The run's configuration.
        base: Folder of the base model; its weights are not read.
        sample: Rows to train on; those that don't fit are replaced.
        scratch: Empty folder for the miniature and the stages' results.
        reward_base: A ready reward model or one to train from, and its folder.
        judge_base: A model to train the judge from, and its folder.

    Returns:
        Remarks: what could not be rehearsed.

    Raises:
        RehearsalFailed: A stage fails with this model, or computes wrong numbers.
    """
    with _quiet():
        return _rehearse(config, base, sample, scratch, reward_base, judge_base)


def _rehearse(
    config: PipelineConfig,
    base: Path,
    sample: Sample,
    scratch: Path,
    reward_base: tuple[ExternalModel, Path] | None,
    judge_base: tuple[ExternalModel, Path] | None,
) -> list[str]:
    """Run the steps of a rehearsal; see `rehearse`."""
    name = config.base.path or "the base model"
    run = _Rehearsal(config, name, scratch)
    with run.step("loading"):
        remark = run.make_miniature(base, "base", "AutoModelForCausalLM")
    if remark:
        return [f"{name}: not rehearsed: {remark}"]
    sources: dict[str, tuple[str, ...]] = {"reward model": (), "judge": ()}
    for role, given in (("reward model", reward_base), ("judge", judge_base)):
        if given is None:
            continue
        external, folder = given
        sources[role] = (external.field, external.uri)
        with run.step(f"loading the {role}", external.field, external.uri):
            remark = run.make_reward_miniature(folder, role, external)
        if remark:
            return [f"{external.uri}: not rehearsed: {remark}"]
    run.write_data(sample)
    with run.step("SFT"):
        run.train_sft()
        run.check_adapter("sft")
    with run.step("the comparison with plain transformers"):
        run.check_policy()
    with run.step("the reward model", *sources["reward model"]):
        run.check_adapter("reward_model")
        run.train_reward_model(reward_base[0] if reward_base else None)
    if config.judge.enabled:
        with run.step("the judge", *sources["judge"]):
            run.train_judge()
    with run.step("PPO"):
        run.check_adapter("ppo")
        run.train_policy()
    with run.step("generate", cure=f"remove what it names from its {GENERATION}"):
        run.generate()
    with run.step("the evaluation"):
        run.evaluate()
    return []


class _Rehearsal:
    """One rehearsal: its settings, reduced to a step, and its folders."""

    def __init__(self, config: PipelineConfig, name: str, scratch: Path) -> None:
        self.config, self.name, self.scratch = config, name, scratch
        # Operations this small cost more to share out among threads than to do. Where child
        # processes train, this one must not take a part of an accelerator.
        launches = any(s.processes for s in (config.sft, config.reward_model, config.ppo))
        device = "cpu" if launches else config.runtime.device
        self.runtime: RuntimeConfig = config.runtime.model_copy(
            update={"threads": 1, "device": device}
        )
        self.base, self.bases = scratch / "base", dict[str, tuple[Path, str]]()
        self.sft, self.reward, self.policy = (scratch / n for n in ("sft", "reward", "policy"))
        self.data, self.evaluation, self.judge = (
            scratch / n for n in ("data", "evaluation", "judge")
        )

    @contextmanager
    def step(
        self, what: str, field: str = "base.path", value: str | None = None,
        cure: str = "choose another model, or report this family",
    ) -> Iterator[None]:  # fmt: skip
        """Turn an error into one that names the model and the stage.

        Raises:
            RehearsalFailed: The step failed.
        """
        value = value or self.name
        try:
            yield
        except Exception as error:  # a family's code can raise anything
            text = " ".join(str(error).split()) or "no message"
            for folder, meaning in (
                *self.bases.values(), (self.base, self.name), (self.sft, "the SFT policy"),
                (self.reward, "the reward model"), (self.judge, "the judge"),
                (self.policy, "the policy"),
            ):  # fmt: skip
                text = text.replace(repr(str(folder)), meaning).replace(str(folder), meaning)
            known = isinstance(error, RLHFError)
            reason = text if known else f"{type(error).__name__}: {text}"
            end = "" if known and ";" in text else f"; {cure}"
            raise RehearsalFailed(
                f"{field} = {value!r}: rehearsed in small, {what} fails: {reason[:600]}{end}"
            ) from error

    def make_miniature(self, source: Path, folder: str, auto_class: str) -> str | None:
        """Write a miniature of the model in `source`; return why there can be none."""
        import transformers
        from transformers import AutoConfig

        from rlhf.modeling.miniature import miniature
        from rlhf.modeling.weights import save_model

        target = self.scratch / folder
        target.mkdir()
        for path in source.iterdir():
            if path.is_file() and path.name.endswith(MODEL_FILES) and WEIGHTS not in path.name:
                shutil.copy(path, target)
        config = AutoConfig.from_pretrained(str(source), trust_remote_code=False)
        try:
            model = miniature(config, getattr(transformers, auto_class))
        except ValueError as error:
            if "Unrecognized configuration class" in str(error):
                raise ConfigError(
                    f"transformers has no language model for {config.model_type!r}; give a text "
                    "model"
                ) from None
            return str(error)
        save_model(model, target)
        # As the base has it, with its ends, in place of one made from the configuration.
        if (source / GENERATION).is_file():
            values = read_json(source / GENERATION)
            # Offloading needs a GPU, which a rehearsal may leave to others.
            if str(values.get("cache_implementation")).startswith("offloaded"):
                del values["cache_implementation"]
            write_json(target / GENERATION, values)
        return None

    def make_reward_miniature(self, source: Path, role: str, external: ExternalModel) -> str | None:
        """Write a miniature of a ready reward model, or of one to train it or the judge from."""
        auto_class = "AutoModelForSequenceClassification" if external.ready else "AutoModel"
        names = read_json(source / CONFIG).get("architectures") or [""]
        if not external.ready:
            for kind in ("ForCausalLM", "ForSequenceClassification"):
                if names[0].endswith(kind):
                    auto_class = f"AutoModel{kind}"
        folder = self.scratch / f"{role.replace(' ', '-')}-base"
        self.bases[role] = (folder, external.uri)
        return self.make_miniature(source, folder.name, auto_class)

    def write_data(self, sample: Sample) -> None:
        """Write a dataset of the user's rows that fit, and of short ones."""
        from rlhf.data.rendering import Renderer
        from rlhf.modeling.base import folder_context
        from rlhf.modeling.tokenizer import load_tokenizer

        with self.step("loading the tokenizer"):
            renderer = Renderer(load_tokenizer(self.base))
        context = folder_context(self.base)
        limits = self.limits().within(context)
        if not sample.write(self.data, renderer, limits, self.config.reward_model.margin_coef > 0):
            length, new = self.config.reward_model.max_length, self.config.ppo.max_new_tokens
            if context < length:
                raise ConfigError(
                    f"base.path = {self.name!r}: it reads at most {context:,} tokens, and beside "
                    f"ppo.max_new_tokens = {new:,} no prompt of two words fits; lower that, or "
                    "give another base"
                )
            raise ConfigError(
                f"reward_model.max_length = {length}: no prompt of two words fits beside "
                "ppo.max_new_tokens; raise it"
            )

    def limits(self) -> TokenLimits:
        """Return the run's token limits, lowered to those of a rehearsal."""
        limits = self.config.token_limits()
        length = min(limits.max_length, LENGTH)
        return limits.model_copy(
            update={
                "max_length": length,
                "max_prompt": min(limits.max_prompt or length, length - NEW_TOKENS),
                "max_reply": None,
                "max_new_tokens": min(limits.max_new_tokens, NEW_TOKENS),
                "max_bad_fraction": 1.0,
            }
        )

    def train_sft(self) -> None:
        """Train one step of SFT, and load the result in transformers alone."""
        from rlhf.sft import train_sft

        self.sft.mkdir()
        base = self.config.base.model_copy(update={"path": str(self.base), "revision": None})
        train_sft(
            self.config.sft.model_copy(update=_one_step()), base, self.data, self.sft,
            limits=self.limits(), seed=self.config.seed, runtime=self.runtime,
        )  # fmt: skip
        self._check_published(self.sft, self.base)

    def check_policy(self) -> None:
        """Compare the policy's and the critic's results with plain calls."""
        import torch

        from rlhf.data.rendering import load_renderer
        from rlhf.modeling.base import load_policy
        from rlhf.modeling.critic import critic_from
        from rlhf.modeling.device import prepare_device
        from rlhf.modeling.exactness import check_critic, check_policy, replies_of

        device = prepare_device(self.runtime)
        renderer = load_renderer(self.sft)
        with torch.no_grad():
            policy = load_policy(self.sft).eval().to(device)
        prompts = self._prompts(renderer, policy)
        check_policy(policy, prompts, renderer.tokenizer)
        if self.config.ppo.critic != "head":
            replies = replies_of(policy, prompts, renderer.tokenizer)
            check_critic(critic_from(load_policy(self.sft)).eval().to(device), replies)

    def check_adapter(self, section: str) -> None:
        """Compare a section's adapter with the same one merged, if it has one."""
        from rlhf.data.rendering import load_renderer
        from rlhf.modeling.base import load_policy
        from rlhf.modeling.device import prepare_device
        from rlhf.modeling.exactness import check_adapter
        from rlhf.modeling.frozen import check_frozen_dtype, store_frozen

        settings: Any = getattr(self.config, section)
        lora = settings.lora
        # An external reward model has layers of its own, and its stage checks their names.
        if lora is None or (section == "reward_model" and self.bases.get("reward model")):
            return
        device = prepare_device(self.runtime)
        check_frozen_dtype(settings.frozen_dtype, section, device, self.runtime)
        policy = load_policy(self.sft).eval()
        store_frozen(policy, settings.frozen_dtype, device, section)
        policy.to(device)
        prompts = self._prompts(load_renderer(self.sft), policy)
        check_adapter(policy, lora, section, prompts[:2])

    def _prompts(self, renderer: Any, policy: Any) -> list[list[int]]:
        """Return prompts of several lengths, one longer than each of the model's windows."""
        from rlhf.modeling.base import context_length
        from rlhf.modeling.structure import attention_windows, text_config

        rows = [row.prompt for row in iterate_rows(self.data / PROMPTS_TRAIN, PromptRow)]
        prompts = [renderer.encode_prompt(prompt, LENGTH) for prompt in rows]
        most = min(self.config.token_limits().prompt, context_length(policy) - NEW_TOKENS, LONGEST)
        # YaRN scales the positions of all sequences, those beyond its original length too.
        rope = getattr(text_config(policy), "rope_parameters", None) or {}
        original = rope.get("original_max_position_embeddings")
        windows = attention_windows(policy) | ({original} if isinstance(original, int) else set())
        longest = max((w + 16 for w in windows if w + 16 <= most), default=0)
        if longest > len(prompts[-1]):
            prompts.append((prompts[-1] * (1 + longest // len(prompts[-1])))[:longest])
        return [ids[:most] for ids in prompts]

    def train_reward_model(self, external: ExternalModel | None) -> None:
        """Train one step of a reward model, or publish a ready one; compare its scores."""
        from rlhf.modeling.device import prepare_device
        from rlhf.modeling.exactness import check_scorer
        from rlhf.modeling.reward import Scorer
        from rlhf.ready_reward_model import publish_ready_reward_model
        from rlhf.reward import train_reward_model

        self.reward.mkdir()
        base = self.bases.get("reward model", (None, ""))[0]
        if external is not None and external.ready:
            assert base is not None
            small = ExternalModel(external.field, str(base), ready=True)
            publish_ready_reward_model(small, base, self.reward, runtime=self.runtime)
        else:
            start = base and str(base)
            section = self.config.reward_model.model_copy(update=_one_step() | {"base": start})
            train_reward_model(
                section, self.data, self.sft, self.reward,
                limits=self.limits(), seed=self.config.seed, runtime=self.runtime,
            )  # fmt: skip
        scorer = Scorer(self.reward, prepare_device(self.runtime), self.limits())
        rows = [
            scorer.renderer.encode(pair.prompt, reply, scorer.limits).ids
            for pair in iterate_rows(self.data / PAIRS_TRAIN, Pair)
            for reply in (pair.chosen, pair.rejected)
        ]
        check_scorer(scorer, rows)

    def train_judge(self) -> None:
        """Train one step of a judge, and measure it; it is usable whatever it has learnt."""
        from rlhf.judge import JUDGE, judge_section, measure_judge
        from rlhf.reward import train_reward_model

        self.judge.mkdir()
        base = self.bases.get("judge", (None, ""))[0]
        section = judge_section(self.config.reward_model, base).model_copy(update=_one_step())
        train_reward_model(
            section, self.data, self.sft, self.judge, limits=self.limits(),
            seed=self.config.seed + 1, runtime=self.runtime,
        )  # fmt: skip
        measure_judge(
            self.data, self.judge, {}, "rehearsal", limits=self.limits(), runtime=self.runtime
        )
        known = read_json(self.judge / JUDGE)
        write_json(self.judge / JUDGE, {**known, "usable": True, "reason": None})

    def train_policy(self) -> None:
        """Train one update of PPO, and load the result in transformers alone."""
        from rlhf.ppo.train import train_policy

        self.policy.mkdir()
        train_policy(
            _one_update(self.config.ppo), self.data, self.sft, _approved(self.reward), self.policy,
            limits=self.limits(), seed=self.config.seed, runtime=self.runtime,
        )  # fmt: skip
        self._check_published(self.policy, self.base)

    def generate(self) -> None:
        """Sample a reply of the policy by plain transformers, as the smoke test does."""
        prompts = [row.prompt for row in iterate_rows(self.data / PROMPTS_TRAIN, PromptRow)]
        sample_replies(self.policy, prompts[:1], self.runtime)

    def evaluate(self) -> None:
        """Run both evaluations, the policy beside itself as champion."""
        from rlhf.evaluation import evaluate_policy, evaluate_reward_model

        self.evaluation.mkdir()
        replies = min(self.config.evaluation.samples_per_prompt, 2)
        section = self.config.evaluation.model_copy(
            update={"judge": "none", "samples_per_prompt": replies}
        )
        evaluate_reward_model(
            section, self.config.data, self.data, self.reward, self.evaluation,
            limits=self.limits(), runtime=self.runtime,
        )  # fmt: skip
        evaluate_policy(
            section, _one_update(self.config.ppo), self.data, self.sft, self.policy, self.reward,
            self.evaluation, judge=self.judge if self.config.judge.enabled else None,
            champion=self.policy, limits=self.limits(), seed=self.config.seed,
            runtime=self.runtime,
        )  # fmt: skip

    def _check_published(self, folder: Path, base: Path) -> None:
        """Load a stage's result by transformers alone; compare its configuration with the base's.

        Raises:
            ConfigError: Weights are missing or left over, or training changed the configuration.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        load: Any = AutoModelForCausalLM.from_pretrained
        _, info = load(folder, output_loading_info=True, trust_remote_code=False)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[problem]:
                raise ConfigError(f"what it writes has {problem} ({sorted(info[problem])[0]})")
        # As transformers reads them: some families derive a field from others when it is loaded.
        before, after = (
            AutoConfig.from_pretrained(str(path), trust_remote_code=False).to_dict()
            for path in (base, folder)
        )
        for name, was, now in _changes(before, after):
            raise ConfigError(
                f"training changes {name} in its configuration from {was!r} to {now!r}"
            )


def _changes(
    before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield fields that differ between configurations and their parts, but for `_MAY_CHANGE`."""
    for name in sorted({*before, *after} - _MAY_CHANGE):
        was, now = before.get(name), after.get(name)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _changes(was, now, f"{prefix}{name}.")
        elif was != now:
            yield f"{prefix}{name}", was, now


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress progress bars and messages about the miniatures."""
    import datasets
    from transformers.utils import logging as transformers_logging

    from rlhf.trl_adapter import quiet_trainer

    shows_bars = transformers_logging.is_progress_bar_enabled()
    shows_data_bars = not datasets.are_progress_bars_disabled()
    # A logger with a level of its own does not ask its parent: that of PPO's samples has one.
    names = [n for n in [*logging.root.manager.loggerDict] if n.partition(".")[0] == "rlhf"]
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for logger, level in levels.items():
        if level or logger.name == "rlhf":
            logger.setLevel(max(level, logging.ERROR))
    try:
        with quiet_trainer():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        if shows_bars:
            transformers_logging.enable_progress_bar()
        if shows_data_bars:
            datasets.enable_progress_bars()


def _one_step() -> dict[str, Any]:
    """Return changes of a training section that make one step of it, in this process."""
    return {
        "epochs": 1.0, "batch_size": ROWS, "micro_batch_size": ROWS // 2, "max_length": LENGTH,
        "processes": None, "sharding": "ddp",
    }  # fmt: skip


def _one_update(config: PPOConfig) -> PPOConfig:
    """Return PPO's section with a single small update, in this process."""
    rows = ROWS * config.replies_per_prompt
    changes: dict[str, Any] = {
        "total_episodes": rows, "chunk_size": rows, "mini_batch_size": rows, "micro_batch_size": 2,
        "num_ppo_epochs": 2, "critic_warmup_updates": 0, "lr_warmup_updates": 0,
        "max_new_tokens": min(config.max_new_tokens, NEW_TOKENS), "rollout_batch_size": None,
        "checkpoint_every": 1, "processes": None, "reward_model_path": None,
    }  # fmt: skip
    if config.env_type != "preference_comparison":
        changes |= _PLAIN_REWARD
    return config.model_copy(update=changes)


def _approved(reward_model: Path) -> Approved[Path]:
    """Approve a rehearsal's reward model by a gate without rules."""
    verdict = judge("rehearsal", "rehearsal", {}, [])
    return require(reward_model, "rehearsal", verdict)
