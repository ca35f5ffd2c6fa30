"""Sampling and log-probabilities: the draw, the mask, and the ratio that starts at one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
from scipy.stats import chisquare
from torch import nn
from transformers import GenerationConfig

from rlhf.modeling.critic import critic_from
from rlhf.modeling.decoders import PackedDecoder, PaddedDecoder, decoder_of, pad_left
from rlhf.modeling.generate import Replies, generate
from rlhf.modeling.logprobs import log_probs_and_entropy, reply_values
from rlhf.modeling.packed import packs, position_ids
from rlhf.modeling.sampling import Sampler, Sampling, exponential, filter_logits, inverse_cdf
from tests.library.test_packed import ALL, PACKED, make
from tests.library.test_packed import PROMPTS as PACKED_PROMPTS
from tests.library.toys import DEVICE, within

pytestmark = pytest.mark.device


PROMPTS = ["tea or cup?", "jar?", "pot or mug, which is good?"]


@pytest.fixture
def rows(renderer):
    return [renderer.encode_prompt(p, 40) for p in PROMPTS]


def sample(policy, renderer, rows, seed=0, **options):
    return generate(policy, rows, renderer.tokenizer, Sampling(8, **options), seed)


def test_pad_left():
    ids, mask = pad_left([[5, 6, 7], [8]], pad=0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_positions_begin_at_the_first_real_token():
    assert position_ids(torch.tensor([[0, 0, 1, 1, 1]])).tolist() == [[0, 0, 0, 1, 2]]


def test_the_draw_depends_on_the_seed_alone(policy, renderer, rows):
    torch.manual_seed(1)
    state, following = torch.get_rng_state(), torch.rand(9, device=DEVICE)
    torch.manual_seed(1)
    first = sample(policy, renderer, rows, seed=7)
    # The global generators are untouched.
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.rand(9, device=DEVICE), following)
    torch.manual_seed(2)
    assert torch.equal(sample(policy, renderer, rows, seed=7).ids, first.ids)
    assert not torch.equal(sample(policy, renderer, rows, seed=8).reply_ids, first.reply_ids)


def test_temperature_zero_takes_the_likeliest_token(policy, renderer, rows):
    replies = sample(policy, renderer, rows, temperature=0.0)
    for prompt, reply in zip(rows, replies.rows(), strict=True):
        ids = list(prompt)
        for token in reply:
            best = policy(torch.tensor([ids], device=DEVICE)).logits[0, -1].argmax().item()
            assert token == best
            ids.append(token)


class Scripted:
    """Stands in for a sampler: the tokens drawn are known."""

    def __init__(self, replies: list[list[int]]) -> None:
        self.replies = torch.tensor(replies, device=DEVICE)

    def __call__(self, logits, rows, step):
        assert len(logits) == len(rows)
        return self.replies[rows, step]


@pytest.fixture
def scripted(monkeypatch):
    """Makes `generate` draw the given tokens."""

    def script(replies):
        monkeypatch.setattr("rlhf.modeling.generate.Sampler", lambda *_: Scripted(replies))

    return script


def test_masks_come_from_positions(policy, renderer, scripted):
    end, pad = renderer.tokenizer.eos_token_id, renderer.tokenizer.pad_token_id
    scripted([[9, end, pad, pad], [9, pad, end, pad], [9, 9, 9, 9], [end, end, 9, pad]])
    replies = generate(policy, [[8]] * 4, renderer.tokenizer, Sampling(4), 0)
    # up to and including the first end; a pad before it was sampled and counts
    assert replies.mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert replies.finished.tolist() == [True, True, False, True]
    assert replies.attention.tolist() == [[1, *m] for m in replies.mask.int().tolist()]
    assert replies.rows() == [[9, end], [9, pad, end], [9, 9, 9, 9], [end]]


def test_take_cuts_to_the_longest_of_its_rows():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    replies = Replies(
        torch.arange(15).reshape(3, 5),
        torch.cat([torch.ones(3, 2, dtype=torch.long), mask.long()], 1),
        mask,
        torch.tensor([False, True, True]),
    ).to(DEVICE)
    part = replies.take(torch.tensor([2, 1]))
    assert part.ids.tolist() == [[10, 11, 12, 13], [5, 6, 7, 8]]
    assert part.attention.shape == (2, 4)
    assert part.reply_ids.tolist() == [[12, 13], [7, 8]]
    assert part.mask.int().tolist() == [[1, 1], [1, 0]]
    assert part.finished.tolist() == [True, True]


def test_log_probs_by_hand(policy, renderer, rows):
    replies = sample(policy, renderer, rows[:1])
    log_probs, entropy = log_probs_and_entropy(policy, replies, 1.0)
    prompt, reply = rows[0], replies.rows()[0]
    log_p = policy(torch.tensor([prompt + reply], device=DEVICE)).logits[0].log_softmax(-1)
    for i, token in enumerate(reply):
        at = log_p[len(prompt) - 1 + i]
        assert log_probs[0, i].item() == pytest.approx(at[token].item(), abs=within(1e-5, 1e-4))
        uncertainty = -(at.exp() @ at).item()
        assert entropy[0, i].item() == pytest.approx(uncertainty, abs=within(1e-4, 1e-3))


def test_the_first_ratio_is_exactly_one(policy, renderer, rows):
    replies = sample(policy, renderer, rows, top_k=5, temperature=0.7)
    with torch.no_grad():
        old, _ = log_probs_and_entropy(policy, replies, 0.7)
    new, _ = log_probs_and_entropy(policy.train(), replies, 0.7)
    ratio = (new - old).exp()
    torch.testing.assert_close(ratio, torch.ones_like(old), atol=within(0.0, 1e-5), rtol=0)


def test_padding_on_the_left_changes_nothing(policy, renderer, rows):
    replies = sample(policy, renderer, rows)
    together, _ = log_probs_and_entropy(policy, replies, 1.0)
    for i, prompt in enumerate(rows):
        reply = replies.rows()[i]
        ids = torch.tensor([prompt + reply])
        full = torch.ones(1, len(reply), dtype=torch.bool)
        alone = Replies(ids, torch.ones_like(ids), full, torch.tensor([True])).to(DEVICE)
        log_probs, _ = log_probs_and_entropy(policy, alone, 1.0)
        torch.testing.assert_close(
            log_probs[0], together[i, : len(reply)], atol=within(1e-5, 1e-4), rtol=0
        )


def test_temperature_divides_the_logits(policy, renderer, rows):
    replies = sample(policy, renderer, rows)
    log_probs, _ = log_probs_and_entropy(policy, replies, 2.0)
    nn.init.constant_(policy.model.norm.weight, 0.5)  # halves the logits, as temperature 2 does
    halved, _ = log_probs_and_entropy(policy, replies, 1.0)
    torch.testing.assert_close(log_probs, halved, atol=within(1e-5, 1e-4), rtol=0)


def test_a_cold_draw_is_greedy(policy, renderer, rows):
    greedy = sample(policy, renderer, rows, temperature=0.0)
    assert torch.equal(sample(policy, renderer, rows, temperature=1e-4).ids, greedy.ids)
    assert not torch.equal(sample(policy, renderer, rows, temperature=1.0).ids, greedy.ids)


def ranks(policy, replies):
    """Of each sampled token: how many were likelier, and their probability together."""
    width, attention = replies.mask.shape[1], replies.attention.to(DEVICE)
    logits = policy(
        input_ids=replies.ids, attention_mask=attention, position_ids=position_ids(attention)
    ).logits[:, -width - 1 : -1]
    p = logits.softmax(-1)
    chosen = p.gather(-1, replies.reply_ids[..., None])
    above = p > chosen
    return above.sum(-1)[replies.mask], (p * above).sum(-1)[replies.mask]


def test_filters_restrict_the_draw_and_not_the_log_probs(policy, renderer, rows):
    many = rows * 8
    free, _ = ranks(policy, sample(policy, renderer, many))
    assert free.max() > 50  # top_k = 0 is no filter, and not transformers' default of 50
    by_k = sample(policy, renderer, many, top_k=3)
    assert ranks(policy, by_k)[0].max() <= 2
    by_p = sample(policy, renderer, many, top_p=0.3)
    assert ranks(policy, by_p)[1].max() < 0.3
    # Over the whole vocabulary the probabilities add up to one, whatever the filter was.
    log_probs, _ = log_probs_and_entropy(policy, by_k, 1.0)
    assert log_probs[by_k.mask].exp().mean() < 0.1  # among 3 tokens it would be about a third


@pytest.mark.parametrize("adapters", [False, True])
def test_a_models_own_generation_defaults_stay_out(policy, renderer, rows, adapters):
    plain = sample(policy, renderer, rows, temperature=0.0)
    policy.generation_config.repetition_penalty = 5.0
    policy.generation_config.min_new_tokens = 8
    own = policy.generation_config
    wrapped = policy
    if adapters:
        wrapped = peft.get_peft_model(
            policy, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        )
    assert torch.equal(sample(wrapped, renderer, rows, temperature=0.0).ids, plain.ids)
    assert policy.generation_config is own


def test_values_belong_to_the_states_before_and_after_each_token(policy, renderer, rows):
    critic = critic_from(policy)
    nn.init.normal_(critic.value_head.weight)
    critic.to(DEVICE)
    replies = sample(policy, renderer, rows)
    mask = replies.valid & (torch.arange(8) < torch.tensor([[8], [3], [1]]))
    attention = torch.cat([replies.attention[:, :-8], mask.long()], 1)
    replies = replace(replies, mask=mask.to(DEVICE), attention=attention)
    values = reply_values(critic, replies)
    assert values.shape == (3, 9)
    for i, (prompt, reply) in enumerate(zip(rows, replies.rows(), strict=True)):
        ids = torch.tensor([prompt + reply], device=DEVICE)
        alone = critic(ids)[0]
        n = len(reply)
        expected = alone[len(prompt) - 1 :]  # after the prompt, ..., after the last token
        assert len(expected) == n + 1
        close = within(1e-5, 1e-4)
        torch.testing.assert_close(values[i, : n + 1], expected, atol=close, rtol=0)
        assert values[i, n + 1 :].abs().sum() == 0


END, PAD = 2, 0


TOKENS = SimpleNamespace(eos_token_id=END, pad_token_id=PAD)


MANY_PROMPTS = PACKED_PROMPTS * 2


def likely_end(model, bonus):
    """The same model, more ready to end: replies of different length."""
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0], device=DEVICE))
    head.bias.data[END] = bonus
    return model


def theirs(model, sampling, seed):
    """What `transformers` generates after `torch.manual_seed`."""
    ids, attention = (t.to(DEVICE) for t in pad_left(MANY_PROMPTS, PAD))
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or 1.0,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        eos_token_id=END,
        pad_token_id=PAD,
        bos_token_id=1,
    )
    torch.manual_seed(seed)
    full = model.generate(input_ids=ids, attention_mask=attention, generation_config=config)
    return full[:, ids.shape[1] :]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.0}, {"temperature": 1.7, "top_k": 9}, {"top_p": 0.6, "top_k": 20}],
)
def test_multinomial_gives_the_tokens_of_transformers(name, options):
    model = likely_end(make(name), 3.0)
    sampling = Sampling(14, sampler="multinomial", **options)
    expected = theirs(model, sampling, seed=5)
    ours = generate(model, MANY_PROMPTS, TOKENS, sampling, 5)
    assert isinstance(decoder_of(model, MANY_PROMPTS, 14), PackedDecoder) == (name in PACKED)
    assert torch.equal(ours.reply_ids, expected)
    if not options:
        assert len(set(ours.mask.sum(1).tolist())) > 1


def test_exponential_noise_is_torchs_own_to_the_bit():
    ours, torchs = (torch.Generator(DEVICE).manual_seed(3) for _ in range(2))
    for rows in (torch.arange(6, device=DEVICE), torch.tensor([4, 0, 5], device=DEVICE)):
        whole = torch.empty(6, 20_000, device=DEVICE).exponential_(generator=torchs)
        assert torch.equal(exponential(6, 20_000, rows, ours), whole[rows])
    assert torch.equal(ours.get_state(), torchs.get_state())


@pytest.mark.parametrize("sampler", ["multinomial", "inverse_cdf"])
def test_a_rows_draw_does_not_depend_on_which_others_ended(sampler):
    """Rows that would end early run on without an end token: they still begin alike."""
    model = likely_end(make("llama"), 3.0)
    sampling = Sampling(14, sampler=sampler)
    short = generate(model, MANY_PROMPTS, TOKENS, sampling, 5)
    endless = SimpleNamespace(eos_token_id=-1, pad_token_id=PAD)
    full = generate(model, MANY_PROMPTS, endless, sampling, 5)
    assert full.mask.all()
    assert not full.finished.any()
    assert not short.mask.all()
    assert torch.equal(full.reply_ids[short.mask], short.reply_ids[short.mask])


@pytest.mark.parametrize("kind", [PackedDecoder, PaddedDecoder])
@pytest.mark.parametrize("name", ["gqa", "gpt2"])
def test_stepping_gives_the_logits_of_one_whole_pass(kind, name):
    model = make(name).double()
    generator = torch.Generator().manual_seed(0)
    extra = torch.randint(3, 61, (4, len(MANY_PROMPTS)), generator=generator).to(DEVICE)
    rows = [list(p) for p in MANY_PROMPTS]
    assert packs(model, 14)  # switches our attention on
    decoder = kind(model, MANY_PROMPTS, 5)
    live = list(range(len(rows)))
    ends = {0: [0, 3], 1: [8], 3: [1, 2, 9]}
    with torch.no_grad():
        logits = decoder.start()
        for step in range(4):
            for i, row in enumerate(live):
                expected = model(torch.tensor([rows[row]], device=DEVICE)).logits[0, -1]
                torch.testing.assert_close(logits[i], expected, atol=1e-10, rtol=0)
            if step in ends:
                order = decoder.drop([row in ends[step] for row in live])
                live = [live[i] for i in order]
                assert not set(live) & set(ends[step])
            for row in live:
                rows[row].append(int(extra[step, row]))
            logits = decoder.step(extra[step, live])


def test_a_row_ends_where_stop_says_so():
    model = make("llama")
    seen = []

    def stop(rows):
        seen.append(len(rows))
        return [len(row) == 2 and row[0] % 2 == 0 for row in rows]

    plain = generate(model, MANY_PROMPTS, TOKENS, Sampling(6), 3)
    replies = generate(model, MANY_PROMPTS, TOKENS, Sampling(6), 3, stop)
    even = [row[0] % 2 == 0 and len(row) > 1 for row in plain.rows()]
    assert any(even)
    assert not all(even)
    for row, whole, cut in zip(replies.rows(), plain.rows(), even, strict=True):
        assert row == (whole[:2] if cut else whole)
    for i, cut in enumerate(even):
        assert replies.finished[i] == (cut or bool(plain.finished[i]))
    assert seen[0] == 10
    assert seen[2] <= 10 - sum(even)


@pytest.mark.parametrize("sampler", ["multinomial", "inverse_cdf"])
def test_the_draw_has_the_models_distribution(sampler):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf, 0.5], device=DEVICE)
    n = 20_000
    draw = Sampler(Sampling(1, sampler=sampler), n, 11, DEVICE)
    tokens = draw(logits.expand(n, -1), torch.arange(n, device=DEVICE), 0)
    counts = torch.bincount(tokens.cpu(), minlength=6)
    assert counts[4] == 0
    expected = logits.cpu().double().softmax(0) * n
    kept = expected > 0
    assert chisquare(counts[kept].numpy(), expected[kept].numpy()).pvalue > 0.01


def test_the_edges_of_the_unit_interval_give_tokens_that_are_possible():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]], device=DEVICE).repeat(3, 1)
    highest = 1 - 2**-24  # the last number of torch.rand
    uniform = torch.tensor([0.0, 0.5, highest], device=DEVICE)
    assert inverse_cdf(logits, uniform).tolist() == [1, 2, 2]
    many = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    many[:, -1] = -torch.inf
    assert inverse_cdf(many, torch.full((500,), highest, device=DEVICE)).max() <= 5


def test_filters_keep_the_right_tokens():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], device=DEVICE).log()

    def kept(**options):
        return (filter_logits(logits, Sampling(1, **options)) > -torch.inf)[0].tolist()

    assert kept() == [True] * 4
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_k=9) == [True] * 4
    assert kept(top_p=0.7) == [True, True, False, False]
    assert kept(top_p=0.85) == [True, True, True, False]
    assert kept(top_p=1e-9) == [True, False, False, False]
    # of the two that top-k leaves, the first has 0.625
    assert kept(top_k=2, top_p=0.6) == [True, False, False, False]


def test_log_probs_while_drawing_equal_those_computed_again():
    model = likely_end(make("gqa"), 2.0)
    replies = generate(model, MANY_PROMPTS, TOKENS, Sampling(9), 1)
    decoder = PackedDecoder(model, MANY_PROMPTS, 9)
    with torch.no_grad():
        stepped = [decoder.start().log_softmax(-1)]
        for column in replies.reply_ids[:, :-1].T:
            stepped.append(decoder.step(column).log_softmax(-1))
        again, _ = log_probs_and_entropy(model, replies, 1.0)
    while_drawing = torch.stack(stepped, 1).gather(2, replies.reply_ids[..., None]).squeeze(2)
    gap = ((while_drawing - again) * replies.mask).abs().max()
    assert gap < within(2e-5, 1e-4)
    assert replies.mask.sum(1).unique().numel() > 2


def test_dropout_is_off_while_drawing_and_afterwards_as_it_was():
    model = make("gpt2")
    calm = generate(model, MANY_PROMPTS, TOKENS, Sampling(6), 1)
    model.train()
    model.transformer.h[0].eval()
    assert torch.equal(generate(model, MANY_PROMPTS, TOKENS, Sampling(6), 1).ids, calm.ids)
    assert model.training
    assert not model.transformer.h[0].training
