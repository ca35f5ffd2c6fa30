"""Values of a configuration by the data, the base and the machine, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.config import PipelineConfig
from rlhf.config.pretrained import (
    KL_COEF,
    MINI_BATCH_SIZE,
    POLICY_RATES,
    PPO_EPOCHS,
    REWARD_RATES,
    SFT_RATES,
)
from rlhf.data.partition import JUDGE_MIN_PROMPTS
from rlhf.gate_sizes import Sizes
from rlhf.proposal.choice import Choice
from rlhf.proposal.facts import Base, DataFacts, Machine, TokenCounts
from rlhf.proposal.gates import gate_choices, judge_sizes
from rlhf.proposal.lengths import Lengths

#: Optimiser steps that a training needs to learn anything: batches are made smaller for it.
STEPS = 30
#: Sizes of a batch; the larger is that of rlhf/config/pretrained.py.
LEAST_BATCH, MOST_BATCH = 4, 32
#: Pairs below which adapters of a reward model need a higher rate: at 1e-4 one on 680 pairs had
#: learnt nothing after 30 steps (benchmarks/RESULTS.md, benchmarks.pretrained).
FEW_PAIRS = 1_000
#: Optimiser steps of PPO below which the usual rate of adapters changes too little.
FEW_STEPS = 300
#: Fewest updates of PPO, and most replies.
LEAST_UPDATES, MOST_EPISODES = 12, 20_000
#: Seconds that PPO may take by the estimate, and above which SFT and reward model make one pass:
#: a first run should be over within half a day.
MOST_SECONDS = 2 * 3600
#: Gate prompts: beyond these intervals get little narrower, and every one is answered ten times.
GATE_PROMPTS, CPU_GATE_PROMPTS = 300, 150
#: Weights up to which they are published in float32, so that no small change is rounded away.
FLOAT32_PARAMETERS = 2e9
#: A small Llama for two cores and for a GPU.
_SMALL = {"hidden_size": 96, "layers": 2, "heads": 4, "intermediate_size": 256}
_LARGER = {"hidden_size": 256, "layers": 4, "heads": 8, "intermediate_size": 688}


@dataclass(frozen=True)
class Situation:
    """Data, base and machine that the rules choose values for."""

    data: DataFacts
    tokens: TokenCounts
    lengths: Lengths
    machine: Machine
    base: Base | None
    method: Mapping[str, Mapping[str, Any]]
    """Values by section that make it LoRA; empty for all weights, and from scratch."""
    method_reason: str = ""
    speeds: Mapping[str, float] = field(default_factory=dict[str, float])
    """Tokens a second by the estimate, by section; empty without one."""

    @property
    def is_lora(self) -> bool:
        """Whether adapters are trained."""
        return bool(self.method)


def all_choices(
    case: Situation, defaults: PipelineConfig, source: Sequence[Choice], uri: str | None
) -> list[Choice]:
    """Return the values of all sections, in the order of a file.

    Args:
        case: What is known.
        defaults: The configuration that values are compared with.
        source: Name, store, and the source of the data.
        uri: Value of `base.path`.
    """
    prompts = gate_prompts(case.data, case.machine)
    samples = defaults.evaluation.samples_per_prompt
    data = case.data
    pair_prompts = data.held_out_prompts
    sizes = Sizes(data.held_out_pairs, pair_prompts, prompts, samples)
    return [
        *source,
        *data_choices(data, defaults),
        *base_choices(case, uri),
        *sft_choices(case),
        *reward_choices(case),
        *ppo_choices(case),
        *evaluation_choices(case, prompts),
        *gate_choices(data, defaults, sizes, judge_sizes(data, prompts, samples)),
        *runtime_choices(case.machine),
    ]


def vocabulary(pairs: int) -> int:
    """Return the size of the vocabulary of a model from scratch."""
    return 4096 if pairs >= FEW_PAIRS else 1024


def data_choices(data: DataFacts, defaults: PipelineConfig) -> Iterator[Choice]:
    """Yield the values of section `data` beside the source."""
    share, count = data.eval_fraction, data.held_out_prompts
    if not data.has_own_held_out:
        yield Choice(
            "data.eval_fraction", share,
            f"holds out {count:,} of {data.prompts + count:,} prompts ({data.held_out_pairs:,} "
            "pairs), on which the gates judge",
            "held out",
        )  # fmt: skip
    for name, longest in (("prompt", data.longest_prompt), ("reply", data.longest_reply)):
        field = f"max_{name}_chars"
        if longest > getattr(defaults.data, field):
            yield Choice(
                f"data.{field}", _rounded(longest),
                f"the longest {name} has {longest:,} characters; the limit in tokens decides",
            )  # fmt: skip


def base_choices(case: Situation, uri: str | None) -> Iterator[Choice]:
    """Yield the values of section `base`."""
    base = case.base
    if base is None:
        size = _LARGER if case.machine.is_gpu else _SMALL
        yield Choice(
            "base.architecture",
            {**size, "vocab_size": vocabulary(case.data.pairs), "context": case.lengths.row},
            "no --base: a small model from scratch shows the whole flow; it learns the form of "
            "replies, no knowledge",
            "base", f"from scratch, {size['layers']} layers",
        )  # fmt: skip
        return
    template = "with a chat template" if base.has_template else "without a chat template"
    yield Choice(
        "base.path", uri, f"{base.size} weights, {template}, reads {base.context:,} tokens",
        "base", base.name,
    )  # fmt: skip
    if base.bytes_stored < 4 and base.parameters <= FLOAT32_PARAMETERS:
        yield Choice(
            "base.save_dtype", "float32",
            "rounded to the 16 bits of the base's files, most of a short training would be lost",
        )  # fmt: skip


def sft_choices(case: Situation) -> Iterator[Choice]:
    """Yield the values of section `sft`, which learns the preferred replies."""
    rows = case.data.prompts
    steps = ((200, 3), (2_000, 2)) if case.base else ((2_000, 10), (10_000, 5), (40_000, 3))
    epochs, why = _passes(case, "sft", rows, steps)
    yield from _lora(case, "sft")
    yield Choice("sft.epochs", float(epochs), f"{rows:,} preferred replies or some more: {why}")
    yield from _batches(case, "sft", rows * epochs)
    if case.base is None:
        rate, reason = 3e-3, "for a small model from scratch; it would ruin a pretrained one"
    elif case.is_lora:
        rate, reason = SFT_RATES[1], "usual for adapters: ten times that of all weights"
    else:
        rate, reason = SFT_RATES[0], "usual for all weights of a pretrained model"
    yield Choice("sft.learning_rate", rate, reason, "SFT", _trained(epochs, rate))
    yield Choice(
        "sft.max_length", case.lengths.row, case.lengths.row_reason, "longest row",
        f"{case.lengths.row} tokens",
    )  # fmt: skip


def reward_choices(case: Situation) -> Iterator[Choice]:
    """Yield the values of section `reward_model`."""
    pairs = case.data.pairs
    steps = ((200, 3), (FEW_PAIRS, 2)) if case.base else ((5_000, 3),)
    epochs, why = _passes(case, "reward_model", pairs, steps)
    yield from _lora(case, "reward_model")
    yield Choice("reward_model.epochs", float(epochs), f"{pairs:,} pairs: {why}")
    yield from _batches(case, "reward_model", pairs * epochs)
    if case.base is None:
        rate, reason = 5e-4, "for a small model from scratch"
    elif case.is_lora and pairs < FEW_PAIRS:
        rate, reason = 2e-4, f"adapters on fewer than {FEW_PAIRS:,} pairs learn nothing at 1e-4"
    else:
        rate, reason = (
            REWARD_RATES[case.is_lora],
            "as in InstructGPT and Llama 2" + (", times ten for adapters" if case.is_lora else ""),
        )
    yield Choice("reward_model.learning_rate", rate, reason, "reward model", _trained(epochs, rate))
    yield Choice("reward_model.max_length", case.lengths.row, "as in SFT: one limit for prompts")
    if case.base is None:
        yield Choice(
            "reward_model.pooling", "sum", "a small model learns more from all tokens of a reply"
        )


def ppo_choices(case: Situation) -> Iterator[Choice]:
    """Yield the values of section `ppo`."""
    chunk, mini, epochs = _chunks(case)
    episodes, why = _episodes(case, chunk)
    steps = episodes // chunk * (chunk // mini) * epochs
    yield from _lora(case, "ppo")
    yield Choice(
        "ppo.total_episodes", episodes, why, "PPO", f"{episodes:,} replies",
    )  # fmt: skip
    yield Choice(
        "ppo.chunk_size", chunk, f"replies sampled before an update: {episodes // chunk} updates"
    )
    yield Choice(
        "ppo.mini_batch_size", mini, f"{chunk // mini} optimiser steps a pass, {steps} in all"
    )
    yield Choice(
        "ppo.micro_batch_size", _micro(case, mini), "rows of a forward pass: memory, not results"
    )
    yield Choice("ppo.num_ppo_epochs", epochs, "passes over the replies of an update")
    rate, reason = _policy_rate(case, steps)
    yield Choice("ppo.learning_rate", rate, reason)
    if case.base is not None:
        yield Choice("ppo.kl_coef", KL_COEF, "price of a nat away from the SFT policy; usual")
    else:
        yield Choice("ppo.top_k", 0, "samples from all tokens: what is sampled is what is scored")
    yield Choice(
        "ppo.max_new_tokens", case.lengths.new, case.lengths.new_reason, "reply length",
        f"{case.lengths.new} tokens",
    )  # fmt: skip
    if case.machine.has_bf16 and case.base is not None:
        yield Choice("ppo.precision", "bf16", f"{case.machine.name} computes faster in bfloat16")


def evaluation_choices(case: Situation, gate_prompts: int) -> Iterator[Choice]:
    """Yield the values of section `evaluation`."""
    held_out = case.data.held_out_prompts
    what = "all" if held_out <= gate_prompts else "enough"
    yield Choice(
        "evaluation.prompts", gate_prompts,
        f"{what} of the {held_out:,} held-out prompts; each is answered by both policies",
    )  # fmt: skip
    size = 16 if case.base and not case.machine.is_gpu else 32
    yield Choice("evaluation.batch_size", size, "rows of a forward pass")


def runtime_choices(machine: Machine) -> Iterator[Choice]:
    """Yield the values of section `runtime`."""
    yield Choice(
        "runtime.threads", machine.cores,
        "the cores found here; a machine's own RLHF_THREADS wins",
        "machine", machine.name,
    )  # fmt: skip


def gate_prompts(data: DataFacts, machine: Machine) -> int:
    """Return the number of prompts that both policies answer."""
    return max(2, min(data.held_out_prompts, GATE_PROMPTS if machine.is_gpu else CPU_GATE_PROMPTS))


def judge_note(data: DataFacts) -> str:
    """Return a sentence on the judge."""
    if data.judge_pairs:
        return f"a judge of its own gets {data.judge_pairs:,} pairs that no other model sees"
    return (
        f"fewer than {JUDGE_MIN_PROMPTS:,} prompts: no judge, so that a policy that games its "
        "reward model is found by your own eyes alone"
    )


def seconds_of(case: Situation, values: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of the training stages by the estimate, by section.

    Args:
        case: What is known.
        values: The configuration's, by dotted name.
    """
    passes = {
        "sft": case.data.prompts * values["sft.epochs"],
        "reward_model": case.data.pairs * values["reward_model.epochs"],
    }
    seconds = {name: _seconds(case, name, rows) for name, rows in passes.items()}
    seconds["ppo"] = values["ppo.total_episodes"] * _sampled(case) / case.speeds["ppo"]
    return seconds


def _passes(
    case: Situation, section: str, rows: int, steps: Sequence[tuple[int, int]]
) -> tuple[int, str]:
    """Return the passes over so many rows, and why.

    Args:
        case: What is known.
        section: SFT or reward model.
        rows: Number of rows.
        steps: Numbers of rows, ascending, with the passes that fewer rows get.
    """
    epochs = _epochs(rows, steps)
    if epochs == 1:
        return 1, "more passes overfit"
    if case.speeds and (_seconds(case, section, rows * epochs) > MOST_SECONDS):
        return 1, f"one pass, for {epochs} take above {MOST_SECONDS // 3600} hours by the estimate"
    return epochs, "so few need more than one pass"


def _seconds(case: Situation, section: str, rows: float) -> float:
    """Return the seconds that SFT or the reward model takes for so many rows."""
    replies = 2 if section == "reward_model" else 1
    mean = float((case.tokens.prompt + case.tokens.longer).clip(max=case.lengths.row).mean())
    return rows * replies * mean / case.speeds[section]


def _episodes(case: Situation, chunk: int) -> tuple[int, str]:
    """Return the number of PPO's replies, and why."""
    prompts = case.data.prompts
    passes = _epochs(prompts, ((100, 8), (500, 4), (5_000, 2)))
    wanted = min(max(prompts * passes, LEAST_UPDATES * chunk), MOST_EPISODES)
    episodes = -(-wanted // chunk) * chunk
    reason = f"about {episodes / prompts:.1f} replies to each of {prompts:,} prompts"
    if speed := case.speeds.get("ppo"):
        affordable = int(MOST_SECONDS * speed / _sampled(case)) // chunk * chunk
        least = LEAST_UPDATES * chunk
        if max(affordable, least) < episodes:
            episodes = max(affordable, least)
            reason = (
                f"of {prompts:,} prompts, as many as some {MOST_SECONDS // 3600} hours hold by the "
                "estimate; more learn more"
            )
            if episodes == least:
                reason = f"fewest that learn anything: {LEAST_UPDATES} updates; more learn more"
    return episodes, reason


def _chunks(case: Situation) -> tuple[int, int, int]:
    """Return chunk size, mini-batch size, and passes over a chunk."""
    if case.base is None:
        return 64, 32, 2
    if case.machine.is_gpu:
        chunk = 128 if case.data.prompts >= 500 else 64
        return chunk, chunk // 4 if case.data.prompts < 5_000 else MINI_BATCH_SIZE, PPO_EPOCHS
    return 32, 8, 1


def _policy_rate(case: Situation, steps: int) -> tuple[float, str]:
    if case.base is None:
        return 1e-4, "for a small model from scratch"
    usual = POLICY_RATES[case.is_lora]
    if steps < FEW_STEPS:
        few = 2e-4 if case.is_lora and steps < FEW_STEPS / 3 else usual * 3
        return few, f"{steps} steps have to do what longer runs do at {usual:g}"
    return usual, "usual for adapters" if case.is_lora else "usual for all weights"


def _sampled(case: Situation) -> float:
    """Return the mean tokens of a prompt and a sampled reply."""
    new = case.tokens.chosen.clip(max=case.lengths.new)
    return float((case.tokens.prompt + new).mean())


def _lora(case: Situation, section: str) -> Iterator[Choice]:
    """Yield the values that make a section train adapters."""
    values = case.method.get(section, {})
    is_first = section == "sft"
    title, shown = ("method", "LoRA, rank 16") if is_first else ("", "")
    if not values:
        if is_first and case.base is not None:
            yield Choice("sft.lora", None, case.method_reason, "method", "all weights")
        return
    yield Choice(
        f"{section}.lora", values["lora"],
        case.method_reason if is_first else "as in SFT", title, shown,
    )  # fmt: skip
    if "frozen_dtype" in values:
        yield Choice(
            f"{section}.frozen_dtype",
            values["frozen_dtype"],
            "QLoRA: in 16 bits the base does not fit",
        )
    if values.get("shared_base"):
        yield Choice(
            "ppo.shared_base", True,
            "policy, reference, critic and reward model are adapters on one base in memory",
        )  # fmt: skip


def _batches(case: Situation, section: str, rows: int) -> Iterator[Choice]:
    """Yield the sizes of a training's batches; `rows` are those of all epochs."""
    batch = LEAST_BATCH
    while batch < MOST_BATCH and rows // (batch * 2) >= STEPS:
        batch *= 2
    steps = max(1, rows // batch)
    yield Choice(f"{section}.batch_size", batch, f"{steps:,} optimiser steps in all")
    yield Choice(
        f"{section}.micro_batch_size",
        _micro(case, batch),
        "rows of a forward pass: memory, not results",
    )


def _micro(case: Situation, batch: int) -> int:
    """Return the rows of a forward pass before memory is looked at."""
    if case.base is None:
        return min(16, batch)
    return batch if case.machine.is_gpu else min(4, batch)  # a CPU gains nothing, and pads more


def _epochs(rows: int, steps: Sequence[tuple[int, int]]) -> int:
    """Return the passes of the first step whose number of rows is not reached; else 1."""
    return next((passes for most, passes in steps if rows < most), 1)


def _trained(epochs: int, rate: float) -> str:
    return f"{epochs} {'pass' if epochs == 1 else 'passes'} at {rate:g}"


def _rounded(number: int) -> int:
    """Return a number rounded up to two digits."""
    step = 10 ** max(0, len(str(number)) - 2)
    return -(-number // step) * step
