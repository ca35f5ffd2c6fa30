"""Rollouts in batches, read every few steps: the same draws for all sizes."""

from __future__ import annotations

import pytest
import torch

from rlhf.modeling.generate import _DrawnReplies, generate
from rlhf.modeling.sampling import Sampling
from tests.library.ppo_runs import Stopped, assert_same_run
from tests.library.test_generate import MANY_PROMPTS as PROMPTS
from tests.library.test_generate import TOKENS, likely_end
from tests.library.test_packed import make

pytestmark = pytest.mark.device


END, PAD = TOKENS.eos_token_id, TOKENS.pad_token_id


FIELDS = ("ids", "attention", "mask", "finished")


def assert_same_replies(first, second):
    for field in FIELDS:
        assert torch.equal(getattr(first, field), getattr(second, field)), field


@pytest.mark.parametrize("sizes", [{"batch_size": 1}, {"batch_size": 3}, {"batch_size": 99},
                                   {"read_every": 3}, {"read_every": 8}, {"read_every": 99},
                                   {"batch_size": 4, "read_every": 5}])  # fmt: skip
@pytest.mark.parametrize("sampler", ["multinomial", "inverse_cdf"])
@pytest.mark.parametrize("name", ["gqa", "window"])
def test_sizes_do_not_change_the_draw(name, sampler, sizes):
    model = likely_end(make(name), 3.0)
    sampling = Sampling(14, sampler=sampler)
    whole = generate(model, PROMPTS, TOKENS, sampling, 5)
    assert len(set(whole.mask.sum(1).tolist())) > 2
    assert whole.finished.any()
    assert_same_replies(generate(model, PROMPTS, TOKENS, sampling, 5, **sizes), whole)


@pytest.mark.parametrize("sizes", [{"read_every": 4}, {"batch_size": 3, "read_every": 99}])
def test_stop_is_asked_of_the_same_rows_in_the_same_order(sizes):
    model = likely_end(make("llama"), 2.0)

    def generated(**sizes):
        asked = []

        def stop(rows):
            asked.extend(tuple(row) for row in rows)
            return [len(row) >= 2 and row[-1] % 3 == 0 for row in rows]

        return generate(model, PROMPTS, TOKENS, Sampling(9), 3, stop, **sizes), sorted(asked)

    (whole, of_whole), (other, of_other) = generated(), generated(**sizes)
    assert_same_replies(other, whole)
    assert of_other == of_whole  # never a row that has ended
    assert (whole.finished & (whole.reply_ids != END).all(1)).any()


def test_what_is_drawn_after_the_end_is_left_out():
    drawn = _DrawnReplies(3, 5, PAD, [END], None)
    drawn.begin(torch.arange(3))
    # rows end at steps 2, never, 1; a row goes on drawing until it is read
    assert drawn.read(torch.tensor([[7, 8, END], [END, 8, 9], [9, 8, END]])) == [True, False, True]
    drawn.keep(torch.tensor([1]))
    assert drawn.read(torch.tensor([[6], [5]])) == [False]
    assert drawn.tokens.tolist() == [[7, END, PAD, PAD, PAD], [8, 8, 8, 6, 5], [END, *[PAD] * 4]]
    assert drawn.lengths.tolist() == [2, 5, 1]
    assert drawn.finished.tolist() == [True, False, True]


def test_decoding_ends_when_all_rows_have(monkeypatch):
    """At the first reading after the last row's end, not at the longest reply that may be."""
    model = make("llama")
    generate(model, PROMPTS, TOKENS, Sampling(1), 0)  # tests the model
    steps = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **k: steps.append(1) or forward(**k))

    def sampler(logits, rows, step):
        return torch.full((len(rows),), END if step == 1 else 9, device=logits.device)

    monkeypatch.setattr("rlhf.modeling.generate.Sampler", lambda *_: sampler)
    generate(model, PROMPTS, TOKENS, Sampling(30), 0, read_every=1)
    assert len(steps) == 2
    steps.clear()
    generate(model, PROMPTS, TOKENS, Sampling(30), 0, read_every=8)
    assert len(steps) == 8


@pytest.mark.cpu_only("bytes are compared, and a GPU's sums depend on the size of a batch")
@pytest.mark.parametrize("options", [{}, {"sampler": "multinomial"}])
def test_a_run_is_the_same_whatever_the_rollout_batch_size(train, options):
    options = {**options, "total_episodes": 32}
    whole = train("whole", **options)
    assert_same_run(train("fives", rollout_batch_size=5, **options), whole)


@pytest.mark.cpu_only("bytes are compared, and a GPU's sums depend on the size of a batch")
def test_a_run_goes_on_with_another_rollout_batch_size(train, tmp_path):
    """As after a rollout that did not fit in memory."""
    options = {"total_episodes": 48}
    with pytest.raises(Stopped):
        train("stopped", stop_at=3, checkpoints=tmp_path / "c", **options)
    resumed = train("resumed", checkpoints=tmp_path / "c", rollout_batch_size=5, **options)
    assert_same_run(resumed, train("straight", **options))
