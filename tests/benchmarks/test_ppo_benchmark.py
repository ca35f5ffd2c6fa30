"""`benchmarks.ppo` without TRL: workload, this project's side, and its report."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.machine import needed_gflops
from benchmarks.ppo import workload
from benchmarks.ppo.ours import OurSide
from benchmarks.ppo.process import PHASES, check, differences
from benchmarks.ppo.report import summary
from benchmarks.ppo.workload import Size, Workload, end_share, write_models
from rlhf.data.rendering import load_renderer
from rlhf.modeling.base import from_scratch
from tests.library import toys

TINY = Size(16, 2, 2, 32, 64, batch=4, new_tokens=6, epochs=2)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(workload.SIZES, "tiny", TINY)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("lengths", ["full", "varying"])
def test_our_side_updates_and_is_reported(tiny, tmp_path, lengths, lora):
    work = Workload("tiny", lengths, lora=lora, updates=2)
    write_models(work, tmp_path)
    sides = [OurSide(work, tmp_path, compare=True) for _ in range(2)]
    prompts = work.prompts()[: TINY.batch]
    first, second = (side.update(0, prompts) for side in sides)
    assert set(first.wall) == set(PHASES)
    assert 0 not in [token for row in first.replies for token in row]  # padding is never drawn
    if lengths == "full":
        assert [len(row) for row in first.replies] == [TINY.new_tokens] * TINY.batch
    if not lora:
        found = differences(first, second)
        assert set(found.values()) == {0.0}
        check(0, found, 0.0)
        shifted = dataclasses.replace(second, replies=[[2], *second.replies[1:]])
        with pytest.raises(AssertionError, match="update 0: the two sides differ in tokens by 1"):
            check(0, differences(first, shifted), 1.0)
    report = summary(TINY, [{"ours": first, "trl": first}], 1.0)
    assert report["ratio"] == dict.fromkeys((*PHASES, "total"), 1.0)


def test_a_real_model_takes_the_place_of_a_random_one(tmp_path):
    texts = ["good tea, better cup, finest teapot and another good spoon"] * 4
    architecture = toys.ARCHITECTURE
    model, tokenizer = from_scratch(architecture, texts, seed=3)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    work = Workload(
        model=str(tmp_path / "model"), batch=4, new_tokens=6, updates=2, prompt_tokens=(3, 5)
    )
    # 16 wide, 2 heads that share no keys, an MLP of 32.
    assert work.size.body == 4 * 16**2 + 3 * 16 * 32
    write_models(work, tmp_path)
    prompts = work.prompts()[:4]
    renderer = load_renderer(tmp_path / "policy")
    assert [renderer.encode_prompt(work.text_of(ids), 64) for ids in prompts] == prompts
    update = OurSide(work, tmp_path, compare=True).update(0, prompts)
    assert [len(row) for row in update.replies] == [6] * 4
    ended = {0, tokenizer.eos_token_id} & {token for row in update.replies for token in row}
    assert not ended


def test_shared_keys_and_values_are_fewer_weights():
    # 2 · 16² for queries and output, half of that for keys and values of one head of two.
    assert dataclasses.replace(TINY, layers=1, key_value_heads=1).body == 3 * 16**2 + 3 * 16 * 32


def test_replies_are_a_third_of_the_cap_on_average():
    for cap in (6, 48):
        p = end_share(cap)
        lengths = torch.arange(1, cap + 1).double()
        shares = p * (1 - p) ** (lengths - 1)
        shares[-1] = (1 - p) ** (cap - 1)  # cut
        assert float((shares * lengths).sum()) == pytest.approx(cap / 3)


def test_the_least_work_of_a_phase():
    # One prompt of 1 and a reply of 1 token: 2 tokens and 1 + 2 pairs of positions.
    body = 2 * (4 * 16**2 + 3 * 16 * 32)
    attention = 4 * 2 * 16 * 3
    one_pass, head = 2 * body * 2 + attention, 2 * 16 * 64
    found = needed_gflops(TINY, [1], [1])
    assert found["rollout"] == pytest.approx((one_pass + head) / 1e9)
    assert found["scoring"] == pytest.approx((3 * one_pass + head) / 1e9)
    assert found["optimisation"] == pytest.approx(2 * 3 * (2 * one_pass + head) / 1e9)
