"""The decode loop and its samplers: the tokens of `transformers`, and the right distribution."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare
from transformers import GenerationConfig

from rlhf.modeling.forward import packs
from rlhf.ppo.decode import PackedDecoder, PaddedDecoder, decoder_of, pad_left
from rlhf.ppo.rollout import generate, log_probs_and_entropy
from rlhf.ppo.sampler import Sampler, Sampling, exponential, filter_logits, inverse_cdf
from tests.library.test_packing import ALL, PACKED, PROMPTS, make
from tests.library.toys import DEVICE, within

pytestmark = pytest.mark.device
END, PAD = 2, 0
TOKENS = SimpleNamespace(eos_token_id=END, pad_token_id=PAD)
PROMPTS = PROMPTS * 2


def likely_end(model, bonus):
    """The same model, more ready to end: replies of different length."""
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0], device=DEVICE))
    head.bias.data[END] = bonus
    return model


def theirs(model, sampling, seed):
    """What `transformers` generates after `torch.manual_seed`."""
    ids, attention = (t.to(DEVICE) for t in pad_left(PROMPTS, PAD))
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
    ours = generate(model, PROMPTS, TOKENS, sampling, 5)
    assert isinstance(decoder_of(model, PROMPTS, 14), PackedDecoder) == (name in PACKED)
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
    short = generate(model, PROMPTS, TOKENS, sampling, 5)
    endless = SimpleNamespace(eos_token_id=-1, pad_token_id=PAD)
    full = generate(model, PROMPTS, endless, sampling, 5)
    assert full.mask.all()
    assert not full.finished.any()
    assert not short.mask.all()
    assert torch.equal(full.reply_ids[short.mask], short.reply_ids[short.mask])


@pytest.mark.parametrize("kind", [PackedDecoder, PaddedDecoder])
@pytest.mark.parametrize("name", ["gqa", "gpt2"])
def test_stepping_gives_the_logits_of_one_whole_pass(kind, name):
    model = make(name).double()
    generator = torch.Generator().manual_seed(0)
    extra = torch.randint(3, 61, (4, len(PROMPTS)), generator=generator).to(DEVICE)
    rows = [list(p) for p in PROMPTS]
    assert packs(model, 14)  # switches our attention on
    decoder = kind(model, PROMPTS, 5)
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

    plain = generate(model, PROMPTS, TOKENS, Sampling(6), 3)
    replies = generate(model, PROMPTS, TOKENS, Sampling(6), 3, stop)
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
    replies = generate(model, PROMPTS, TOKENS, Sampling(9), 1)
    decoder = PackedDecoder(model, PROMPTS, 9)
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
    calm = generate(model, PROMPTS, TOKENS, Sampling(6), 1)
    model.train()
    model.transformer.h[0].eval()
    assert torch.equal(generate(model, PROMPTS, TOKENS, Sampling(6), 1).ids, calm.ids)
    assert model.training
    assert not model.transformer.h[0].training
