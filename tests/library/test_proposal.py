"""Rules of proposed configurations: method and sizes by memory, gates by held-out rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlhf.config import PipelineConfig
from rlhf.config.text import parse
from rlhf.estimate import Measurement
from rlhf.gate_sizes import Sizes, check_gate_sizes
from rlhf.proposal.choice import Choice, as_yaml, replaced, tree_of
from rlhf.proposal.facts import Base, DataFacts, Machine, TokenCounts
from rlhf.proposal.gates import gate_choices, judge_sizes
from rlhf.proposal.lengths import choose_lengths, held_out_share
from rlhf.proposal.memory import FULL_PAIRS, PLANNED, choose_method, fit
from rlhf.proposal.rules import Situation, all_choices

CPU = Machine("cpu", "2 CPU cores", 20e9, 2)
GPU = Machine("cuda", "a GPU", 80e9, 16, has_bf16=True)
BASE = Base("b", 135_000_000, 8192, 2, True)
DATA = DataFacts(
    rows=1000, is_begun=False, formats="pairs", pairs=800, prompts=800, held_out_pairs=150,
    held_out_prompts=150, judge_pairs=0, has_own_held_out=False, eval_fraction=0.15,
    lengths_differ=True, longest_prompt=100, longest_reply=100, sample=(), left_out="",
    warnings=(), notes=(),
)  # fmt: skip


def counts(prompt: int, reply: int) -> TokenCounts:
    values = np.full(100, reply)
    return TokenCounts(np.full(100, prompt), values, values)


@pytest.mark.parametrize("prompts", [4, 60, 400, 1_000, 3_000, 50_000, 10**6])
def test_as_many_are_held_out_as_the_gates_need(prompts):
    share = held_out_share(prompts)
    assert 0 < share <= 0.25
    held_out = share * prompts
    assert held_out <= 2_100
    assert held_out >= min(149, 0.24 * prompts)


@pytest.mark.parametrize("machine", [CPU, GPU])
@pytest.mark.parametrize("base", [BASE, None, replace(BASE, context=256)])
@pytest.mark.parametrize(("prompt", "reply"), [(5, 1), (40, 90), (150, 3000)])
def test_lengths_leave_room_for_prompts_and_fit_the_context(machine, base, prompt, reply):
    found = choose_lengths(counts(prompt, reply), machine, base)
    assert prompt + found.new <= found.row <= (base.context if base else 1024)
    assert (found.ends == 1) is (reply <= found.new)
    assert found.new <= (1024 if machine.is_gpu else 128)


def test_methods_and_batches_go_by_memory(toy):
    base = toy("fresh")
    tree = {
        "data": {"source": "x.jsonl"},
        "base": {"path": str(base)},
        "ppo": {"max_new_tokens": 8},
    }
    tree |= {name: {"max_length": 32, "batch_size": 8} for name in ("sft", "reward_model")}
    config = PipelineConfig.model_validate(tree)
    measured = Measurement(base, 32, "cpu")
    method, _ = choose_method(config, base, measured, GPU, FULL_PAIRS)
    assert method == {}
    for machine, pairs in ((GPU, FULL_PAIRS - 1), (CPU, FULL_PAIRS)):
        method, reason = choose_method(config, base, measured, machine, pairs)
        assert method["ppo"]["shared_base"] is True
        assert "adapters" in reason
    roomy = fit(config, base, measured, GPU)
    assert not roomy.changes
    assert not roomy.misfits
    # Room for half of what the batches take.
    free = (roomy.peak - (largest := max(s.activations for s in roomy.stages)) / 2) / PLANNED
    tight = fit(config, base, measured, replace(GPU, memory=free))
    assert tight.peak <= PLANNED * free
    assert largest > max(stage.activations for stage in tight.stages)
    none = fit(config, base, measured, replace(GPU, memory=1e6))
    assert {line.split()[0] for line in none.misfits} == {"sft", "reward_model", "ppo"}
    assert none.changes["ppo"]["gradient_checkpointing"] is True


@pytest.mark.parametrize("held_out", [2, 6, 15, 29, 40, 100, 300, 2000])
def test_every_gate_can_be_passed_and_few_rows_leave_it_to_a_person(held_out):
    data = replace(DATA, held_out_pairs=held_out, held_out_prompts=held_out)
    sizes = Sizes(held_out, held_out, min(held_out, 150), 4)
    judgement = judge_sizes(data, sizes.prompts, sizes.samples)
    tree = tree_of([*gate_choices(data, PipelineConfig(), sizes, judgement)])
    config = PipelineConfig.model_validate(tree)
    check_gate_sizes(config, sizes, has_champion=True)
    assert (config.promotion.approval == "manual") is (held_out < 40)
    assert all((rule.on == "low") is (held_out >= 40) for rule in config.gates.reward_model[:1])


@pytest.mark.parametrize("machine", [CPU, GPU])
@pytest.mark.parametrize("base", [BASE, None])
@pytest.mark.parametrize("pairs", [3, 45, 800, 4_000, 45_000])
@pytest.mark.parametrize("speed", [0, 30.0, 1e6])
def test_choices_are_valid_whatever_the_numbers(machine, base, pairs, speed):
    data = replace(DATA, pairs=pairs, prompts=pairs)
    tokens = counts(40, 90)
    speeds = dict.fromkeys(("sft", "reward_model", "ppo"), speed) if speed and base else {}
    case = Situation(
        data, tokens, choose_lengths(tokens, machine, base), machine, base, {}, "", speeds
    )
    uri = "owner/b" if base else None
    choices = all_choices(case, PipelineConfig(), [Choice("data.source", "x.jsonl", "own")], uri)
    config = PipelineConfig.model_validate(tree_of(choices))
    assert config.ppo.updates >= 12
    assert config.ppo.total_episodes <= 20_000 + config.ppo.chunk_size
    steps = pairs * config.reward_model.epochs / config.reward_model.batch_size
    assert steps >= 30 or config.reward_model.batch_size == 4
    if speeds.get("ppo") == 30.0:
        affordable = 2 * 3600 * speed / (40 + min(90, config.ppo.max_new_tokens))
        assert config.ppo.total_episodes <= max(affordable, 12 * config.ppo.chunk_size)
        assert config.reward_model.epochs == 1 or pairs < 800


def test_values_are_written_below_their_reasons_and_read_back():
    choices = [
        Choice("data.source", "a: #b\n[c]", "two\nlines"),
        Choice("gates.policy[]", {"metric": "sampled.kl", "on": "low", "max": 2e-05}, "first"),
        Choice("gates.policy[]", {"metric": "x", "min": 1}, "second"),
        Choice("ppo.learning_rate", 2e-05, "rate"),
    ]
    text = as_yaml(choices, ["head"])
    assert "  # two lines\n  source: " in text
    tree = parse(text)
    assert tree["data"]["source"] == "a: #b\n[c]"
    assert tree["ppo"]["learning_rate"] == 2e-05
    assert tree["gates"]["policy"] == [
        {"metric": "sampled.kl", True: "low", "max": 2e-05}, {"metric": "x", "min": 1},
    ]  # fmt: skip
    (changed,) = replaced(choices[-1:], {"ppo": {"learning_rate": 1.0}}, "given")
    assert (changed.value, changed.reason) == (1.0, "given")
