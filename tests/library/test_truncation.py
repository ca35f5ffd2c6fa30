"""Replayed truncation: kept sets, and PPO's quantities against enumeration of all replies.

The expected values come from plain forward passes of one prefix at a time, Python sets and sums
over all replies of at most three tokens.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf.modeling.generate import Replies, concatenate, generate
from rlhf.modeling.kept_sets import KeptSets, exclude
from rlhf.modeling.logprobs import (
    log_probs_and_entropy,
    log_probs_entropy_values,
    reply_logits,
    token_log_probs,
)
from rlhf.modeling.sampling import Sampling
from rlhf.ppo.losses import exact_kl, kl_estimate, policy_loss
from rlhf.ppo.optimisation import optimise
from tests.examples import examples
from tests.library import toys
from tests.library.ppo_runs import LORA, assert_same_run
from tests.library.test_packed import SMALL, replies_of
from tests.library.test_ppo_options import nudge, rollouts_of, trainer_with
from tests.library.toys import DEVICE, within

pytestmark = pytest.mark.device

END, LENGTH, PROMPT = 2, 3, [3, 4, 1]
TOKENS = SimpleNamespace(eos_token_id=END, pad_token_id=0)
#: Vocabulary, sampling options, and a model whose head is plain or soft-capped (by autograd).
CASES = {
    "top-k": (5, {"top_k": 3}, LlamaForCausalLM),
    "top-p": (5, {"top_p": 0.7, "temperature": 0.8}, LlamaForCausalLM),
    "ids": (400, {"top_k": 3, "temperature": 1.3}, LlamaForCausalLM),
    "both": (5, {"top_k": 4, "top_p": 0.8, "temperature": 8.0}, Gemma2ForCausalLM),
}


class Enumeration:
    """All replies that a truncated policy can give to one prompt, with the sets of each step."""

    def __init__(self, vocabulary, options, kind):
        config = {**SMALL, "vocab_size": vocabulary, "num_key_value_heads": 2}
        if kind is Gemma2ForCausalLM:
            config |= {"head_dim": 8, "attn_implementation": "eager"}
        make = Gemma2Config if kind is Gemma2ForCausalLM else LlamaConfig
        self.models = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            self.models.append(kind(make(**config)).double().eval().to(DEVICE))
        self.policy, self.reference = self.models
        for ours, theirs in zip(
            self.policy.parameters(), self.reference.parameters(), strict=True
        ):  # another policy, but not one from another planet
            theirs.data.lerp_(ours.data, 0.8)
        self.options, self.temperature = options, options.get("temperature", 1.0)
        self.rows, self.sets = [], []
        with torch.no_grad():
            self.grow([], [])
        cells = [i * LENGTH + t for i, row in enumerate(self.rows) for t in range(len(row))]
        masks = torch.zeros(len(cells), vocabulary, dtype=torch.bool)
        for mask, kept in zip(masks, (s for sets in self.sets for s in sets), strict=True):
            mask[kept] = True
        kept = KeptSets.of_masks(masks)
        kept = KeptSets.assemble([kept], [torch.tensor(cells)], (len(self.rows), LENGTH))
        self.full = replies_of([PROMPT] * len(self.rows), self.rows)
        self.replies = replace(self.full, kept=kept.to(DEVICE))
        self.mask = self.replies.mask

    def logits(self, model, reply):
        """Logits of each step of a reply, by one plain call."""
        ids = torch.tensor([PROMPT + list(reply)], device=DEVICE)
        return model(input_ids=ids).logits[0, len(PROMPT) - 1 :] / self.temperature

    def kept(self, logits):
        """The k likeliest tokens; of these the fewest that have `top_p` of the probability."""
        order = sorted(range(len(logits)), key=lambda i: -float(logits[i]))
        order = order[: self.options.get("top_k", len(order))]
        p, total, chosen = logits[order].softmax(0).tolist(), 0.0, []
        for token, share in zip(order, p, strict=True):
            if total >= self.options.get("top_p", 1.0):
                break
            chosen.append(token)
            total += share
        return sorted(chosen)

    def grow(self, reply, sets):
        if reply and (reply[-1] == END or len(reply) == LENGTH):
            self.rows.append(reply)
            self.sets.append(sets)
            return
        kept = self.kept(self.logits(self.policy, reply)[-1])
        for token in kept:
            self.grow([*reply, token], [*sets, kept])

    def log_probs(self, model):
        """Log-probability of each whole reply, renormalised over the sets step by step."""
        totals = []
        for row, sets in zip(self.rows, self.sets, strict=True):
            steps = self.logits(model, row)
            totals.append(
                sum(
                    steps[t][kept].log_softmax(0)[kept.index(token)]
                    for t, (token, kept) in enumerate(zip(row, sets, strict=True))
                )
            )
        return torch.stack(totals)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Enumeration(*CASES[request.param])


def test_the_probabilities_of_all_replies_add_up_to_one(case):
    """Over the whole vocabulary they do not: what is scored is not what is drawn."""
    with torch.no_grad():
        ours, _ = log_probs_and_entropy(case.policy, case.replies, case.temperature)
        whole, _ = log_probs_and_entropy(case.policy, case.full, case.temperature)
        theirs, _ = log_probs_and_entropy(case.reference, case.replies, case.temperature)
        expected, of_reference = case.log_probs(case.policy), case.log_probs(case.reference)
    torch.testing.assert_close(ours.sum(1), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(theirs.sum(1), of_reference, atol=1e-10, rtol=0)
    assert ours.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-10)
    assert whole.sum(1).exp().sum().item() < 0.95


def test_every_estimator_is_the_kl_of_the_sampled_distribution(case):
    """KL = Σ p ln (p / q) over all replies, from k1, k3 and the exact KL of each step."""
    with torch.no_grad():
        p, q = case.log_probs(case.policy), case.log_probs(case.reference)
        kl = (p.exp() * (p - q)).sum().item()
        ours, theirs = (
            log_probs_and_entropy(m, case.replies, case.temperature, False)[0] for m in case.models
        )
        for estimator in ("k1", "k3"):
            estimate = kl_estimate(ours, theirs, estimator) * case.mask
            assert (p.exp() * estimate.sum(1)).sum().item() == pytest.approx(kl, abs=1e-10)
        excluded = case.replies.kept.excluded(0, int(case.mask.sum()))
        logits = [
            exclude(reply_logits(m, case.replies, case.temperature), excluded) for m in case.models
        ]
        exact = torch.zeros_like(ours).masked_scatter(case.mask, exact_kl(*logits))
        assert (p.exp() * exact.sum(1)).sum().item() == pytest.approx(kl, abs=1e-10)
        whole = [
            log_probs_and_entropy(m, case.full, case.temperature, False)[0].sum(1)
            for m in case.models
        ]
        biased = (p.exp() * (whole[0] - whole[1])).sum().item()
        assert abs(biased - kl) > 0.05 * kl


def test_the_entropy_is_that_of_the_sampled_distribution(case):
    """H = −Σ p ln p over all replies, by the chain rule."""
    with torch.no_grad():
        p = case.log_probs(case.policy)
        _, entropies = log_probs_and_entropy(case.policy, case.replies, case.temperature)
    expected = -(p.exp() * p).sum().item()
    assert (p.exp() * entropies.sum(1)).sum().item() == pytest.approx(expected, abs=1e-10)


def test_the_first_steps_gradient_is_that_of_the_objective(case):
    """∇ Σ p (R − β ln p/q) over all replies, the sets being constant.

    PPO's first step has it as the expected gradient of its surrogate with advantages
    R − β ln p/q; the gradient of the KL's logarithm itself is 0 on average.
    """
    beta, rewards = 0.3, torch.arange(len(case.rows), device=DEVICE).double().sin()
    p = case.log_probs(case.policy)
    q = case.log_probs(case.reference).detach()
    objective = (p.exp() * (rewards - beta * (p - q))).sum()
    weights = [w for n, w in case.policy.named_parameters() if "embed" not in n]
    expected = torch.autograd.grad(objective, weights)
    with torch.no_grad():
        old, theirs = (
            log_probs_and_entropy(m, case.replies, case.temperature, False)[0] for m in case.models
        )
        kl = kl_estimate(old, theirs, "k1") * case.mask
        advantages = old.sum(1).exp() * (rewards - beta * kl.sum(1))
    new, _ = log_probs_and_entropy(case.policy, case.replies, case.temperature, False)
    assert torch.equal(new * case.mask, old)
    loss, _ = policy_loss(new, old, advantages[:, None].expand_as(new), case.mask, 0.2, 1.0)
    assert_same_direction(torch.autograd.grad(-loss, weights), expected)


def test_the_gradient_of_the_entropy_bonus(case):
    p = case.log_probs(case.policy).detach().exp()
    _, entropies = log_probs_and_entropy(case.policy, case.replies, case.temperature)
    weights = [w for n, w in case.policy.named_parameters() if "embed" not in n]
    ours = torch.autograd.grad((p[:, None] * entropies * case.mask).sum(), weights)
    total = 0
    for weight, row, sets in zip(p, case.rows, case.sets, strict=True):
        steps = case.logits(case.policy, row)
        for t, kept in enumerate(sets):
            total = total + weight * torch.special.entr(steps[t][kept].softmax(0)).sum()
    assert_same_direction(ours, torch.autograd.grad(total, weights))


def assert_same_direction(ours, expected):
    """Norms in the models are computed in float32, whatever the weights' precision."""
    ours, expected = (torch.cat([g.flatten() for g in part]) for part in (ours, expected))
    assert (ours - expected).norm() < 1e-5 * expected.norm()
    assert expected.norm() > 1e-3


def test_drawn_replies_carry_their_sets_and_have_these_probabilities(case):
    n = 1500
    sampling = Sampling(LENGTH, record_kept=True, **case.options)
    drawn = generate(case.policy, [PROMPT] * n, TOKENS, sampling, 0, batch_size=n // 2)
    by_row = dict(zip(map(tuple, case.rows), case.sets, strict=True))
    rows = [tuple(row) for row in drawn.rows()]
    assert set(rows) <= set(by_row)
    excluded = drawn.kept.excluded(0, int(drawn.mask.sum()))
    sets = [kept for row in rows for kept in by_row[row]]
    assert [(~mask).nonzero().flatten().tolist() for mask in excluded] == sets
    with torch.no_grad():
        p, q = case.log_probs(case.policy), case.log_probs(case.reference)
        ours, theirs = (
            log_probs_and_entropy(m, drawn, case.temperature, False)[0].sum(1) for m in case.models
        )
    counts = torch.tensor([rows.count(tuple(row)) for row in case.rows])
    often = (p.exp() * n).cpu() > 5
    rest = [float(counts[~often].sum())], [float((p.exp().cpu()[~often] * n).sum())]
    seen, expected = (
        [*part, *more]
        for part, more in zip(
            (counts[often].tolist(), (p.exp().cpu() * n)[often].tolist()), rest, strict=True
        )
    )
    if expected[-1] < 1:
        seen, expected = seen[:-1], [e * sum(seen[:-1]) / sum(expected[:-1]) for e in expected[:-1]]
    assert chisquare(seen, expected).pvalue > 1e-3
    kl, estimates = (p.exp() * (p - q)).sum(), ours - theirs
    assert abs(estimates.mean() - kl) < 4 * estimates.std() / n**0.5


# --- kept sets ----------------------------------------------------------------------------------


@st.composite
def batches(draw):
    """Masks of (reply, batch, vocabulary), and the lengths of the replies."""
    vocabulary = draw(st.sampled_from([2, 31, 32, 33, 64, 70, 300]))
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shape = max(lengths), len(lengths)
    density = torch.rand(*shape, 1, generator=generator) ** 3
    masks = torch.rand(*shape, vocabulary, generator=generator) < density
    masks[..., draw(st.integers(0, vocabulary - 1))] = True
    if draw(st.booleans()):
        masks[0] = True
    return masks, torch.tensor(lengths)


def assembled(masks, lengths):
    """As `generate` makes the sets: step by step, of the rows that are still going."""
    parts, cells = [], []
    for step, mask in enumerate(masks):
        live = (lengths > step).nonzero().squeeze(1)
        parts.append(KeptSets.of_masks(mask.to(DEVICE)).to(torch.device("cpu")).take(live, 1))
        cells.append(live * len(masks) + step)
    return KeptSets.assemble(parts, cells, (len(lengths), len(masks))).to(DEVICE)


@given(batches(), st.integers(0, 30), st.integers(0, 30), st.randoms(use_true_random=False))
@settings(max_examples=examples(60), deadline=None)
def test_sets_come_back_as_they_were(batch, start, length, random):
    masks, lengths = batch
    kept = assembled(masks, lengths)
    valid = torch.arange(len(masks)) < lengths[:, None]
    flat = ~masks.transpose(0, 1)[valid]
    n = len(flat)
    start = min(start, n)
    part = kept.excluded(start, start + length).cpu()
    assert torch.equal(part[: n - start], flat[start : start + length])
    assert not part[n - start :].any()  # past the last token nothing is excluded
    # Never more than one bit per token of the vocabulary, nor more than the ids.
    most = torch.minimum((~flat).sum(1), torch.tensor(-(-masks.shape[2] // 32)))
    assert len(kept.words) == int(most.sum())
    assert kept.words.dtype == torch.int32
    logits = torch.randn(len(part), masks.shape[2]).to(DEVICE)
    expected = logits.masked_fill(part.to(DEVICE), -torch.inf)
    kept.exclude_(logits, start)
    assert torch.equal(logits, expected)
    index = torch.tensor(random.sample(range(len(lengths)), random.randint(1, len(lengths))))
    width = int(lengths[index].max())
    taken = kept.take(index, width)
    some = ~masks.transpose(0, 1)[index, :width][valid[index, :width]]
    assert torch.equal(taken.excluded(0, len(some)).cpu(), some)
    both = KeptSets.concatenate([taken, kept])
    assert torch.equal(both.excluded(0, len(some) + n).cpu(), torch.cat([some, flat]))


def kept_of(replies, vocabulary, density, seed=0):
    """Random sets that hold each reply's tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = replies.mask.shape
    masks = torch.rand(rows * width, vocabulary, generator=generator) < density
    masks[range(rows * width), replies.reply_ids.flatten().cpu()] = True
    valid = replies.valid.flatten().nonzero().squeeze(1)
    kept = KeptSets.of_masks(masks[valid])
    return KeptSets.assemble([kept], [valid], (rows, width)).to(DEVICE), masks[valid].to(DEVICE)


@pytest.mark.parametrize("density", [0.02, 0.3])
@pytest.mark.parametrize("options", [{}, {"slice_size": 1000}, {"slice_size": 1000, "keep": 0}])
@pytest.mark.parametrize("kind", ["linear", "other"])
def test_slices_and_recomputation_replay_the_sets(options, density, kind):
    """The fused function against log-softmax over the selected columns, with gradients."""

    class Other(torch.nn.Linear):
        """A head that is no plain layer: by autograd."""

    torch.manual_seed(0)
    make = torch.nn.Linear if kind == "linear" else Other
    head = make(5, 300, dtype=torch.float64).to(DEVICE)
    hidden = torch.randn(11, 5, dtype=torch.float64).to(DEVICE).requires_grad_()
    replies = replies_of([[1]] * 2, [list(range(6)), list(range(20, 25))])
    kept, masks = kept_of(replies, 300, density)
    targets = replies.reply_ids[replies.mask]
    ours = token_log_probs(head, hidden, targets, 0.7, True, kept, **options)
    columns = [mask.nonzero().squeeze(1) for mask in masks]
    log_p = [(head(h) / 0.7)[c].log_softmax(0) for h, c in zip(hidden, columns, strict=True)]
    plain = (
        torch.stack([p[c == t].sum() for p, c, t in zip(log_p, columns, targets, strict=True)]),
        torch.stack([-(p.exp() * p).sum() for p in log_p]),
    )
    weight = torch.arange(1.0, 12, dtype=torch.float64, device=DEVICE)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    inputs = (hidden, head.weight, head.bias)
    gradients = (
        torch.autograd.grad(((a + 0.5 * b) * weight).sum(), inputs) for a, b in (ours, plain)
    )
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=0)


def test_sets_of_all_tokens_change_no_bit():
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(64, 500).to(DEVICE), torch.randn(300, 64).to(DEVICE)
    hidden.requires_grad_()
    targets = torch.randint(500, (300,)).to(DEVICE)
    kept = KeptSets.of_masks(torch.ones(300, 500, dtype=torch.bool)).to(DEVICE)
    results = []
    for sets in (None, kept):
        log_probs, entropies = token_log_probs(
            head, hidden, targets, 0.9, True, sets, slice_size=70 * 500, keep=0
        )
        gradients = torch.autograd.grad((log_probs + entropies).sum(), (hidden, head.weight))
        results.append([log_probs, entropies, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_reference_without_mass_on_the_set_is_finite():
    """Conditional on two tokens of probability e^-200 each, one of them has 1/2."""
    head = torch.nn.Linear(1, 4, bias=False)
    head.weight.data = torch.tensor([[200.0], [0.0], [0.0], [200.0]], device=DEVICE)
    hidden = torch.ones(1, 1, device=DEVICE, requires_grad=True)
    kept = KeptSets.of_masks(torch.tensor([[False, True, True, False]])).to(DEVICE)
    target = torch.tensor([2], device=DEVICE)
    log_probs, entropy = token_log_probs(head, hidden, target, 1.0, True, kept)
    assert log_probs.item() == pytest.approx(-0.693147)
    assert entropy.item() == pytest.approx(0.693147)
    (gradient,) = torch.autograd.grad(log_probs + entropy, hidden)
    assert torch.isfinite(gradient).all()


# --- training -----------------------------------------------------------------------------------


OPTIONS = {"top_k": 40, "top_p": 0.8, "temperature": 1.2}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"critic": "head"},
        {"lora": LORA, "critic": "adapter", "gradient_checkpointing": True},
        {"entropy_coef": 0.1, "optimize_device_cache": False},
    ],
    ids=lambda o: "-".join(o) or "default",
)
def test_the_first_step_starts_from_a_ratio_of_one(sft, approved, more):
    """One step on the whole chunk: had it no sets, its ratios would be the sets' probabilities."""
    trainer = trainer_with(
        sft, approved, **OPTIONS, **more, num_ppo_epochs=1, mini_batch_size=16, kl_audit=True
    )
    nudge(trainer.models.policy)
    buffer, metrics, _ = trainer.prepare_buffer(rollouts_of(trainer))
    assert buffer.replies.kept is not None
    assert metrics["kept_mass"] < 0.9
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    part = buffer.take(order).to(DEVICE)
    if trainer.models.joint:
        log_probs = trainer.models.log_probs_and_values(part.replies, True)[0]
    else:
        log_probs = trainer.models.log_probs(part.replies)[0]
    gap = ((log_probs - part.log_probs) * part.replies.mask).abs().max()
    assert gap <= within(1e-6, 1e-5)
    step = optimise(buffer, trainer.models, 0)
    assert step["approx_kl"] == pytest.approx(0, abs=1e-9)
    assert step["clip_fraction"] == 0


def test_the_ratio_is_one_to_the_bit(sft, approved):
    trainer = trainer_with(sft, approved, **OPTIONS)
    nudge(trainer.models.policy)
    replies = rollouts_of(trainer).replies.to(DEVICE)
    with torch.no_grad():
        old, _ = trainer.models.log_probs(replies)
    new, _ = trainer.models.log_probs(replies)
    torch.testing.assert_close(new, old, atol=within(0.0, 1e-5), rtol=0)
    head = torch.nn.Linear(16, 1).to(DEVICE)
    joint, _, _ = log_probs_entropy_values(trainer.models.policy, head, replies, 1.2)
    torch.testing.assert_close(joint, old, atol=within(0.0, 1e-5), rtol=0)
    assert not torch.allclose(old, trainer.models.log_probs(replace(replies, kept=None))[0])


def test_a_filter_that_keeps_all_tokens_changes_no_bit(train, two_updates, policy):
    size = toys.ARCHITECTURE.vocab_size
    assert_same_run(train(total_episodes=32, top_k=size), two_updates)
    sampling = Sampling(2, top_k=size, record_kept=True)
    assert generate(policy, [PROMPT], TOKENS, sampling, 0).kept is None


def test_without_replay_the_whole_vocabulary_is_scored(sft, approved):
    trainer = trainer_with(sft, approved, **OPTIONS, truncation="none")
    rollouts = rollouts_of(trainer)
    assert rollouts.replies.kept is None
    replayed = rollouts_of(trainer_with(sft, approved, **OPTIONS)).replies
    assert torch.equal(replayed.ids, rollouts.replies.ids)  # the draws are the same
    assert replayed.kept is not None


def test_the_audit_is_within_the_sets(sft, approved):
    trainer = trainer_with(sft, approved, **OPTIONS, kl_audit=True)
    nudge(trainer.models.policy)
    rollouts = rollouts_of(trainer)
    metrics = trainer.prepare_buffer(rollouts)[1]
    replies = rollouts.replies.to(DEVICE)
    n, models = int(replies.mask.sum()), trainer.models
    kept = ~replies.kept.excluded(0, n)
    with torch.no_grad():
        logits = [reply_logits(m, replies, 1.2) for m in (models.policy, models.reference)]
    kl, masses = 0.0, [0.0, 0.0]
    for i in range(n):
        p, q = (t[i][kept[i]].log_softmax(0) for t in logits)
        kl += float((p.exp() * (p - q)).sum())
        masses = [
            m + float(t[i].softmax(0)[kept[i]].sum()) for m, t in zip(masses, logits, strict=True)
        ]
    assert metrics["kl_exact"] == pytest.approx(kl / 16, rel=1e-3)
    assert metrics["kept_mass"] == pytest.approx(masses[0] / n, rel=1e-4)
    assert metrics["kept_mass_reference"] == pytest.approx(masses[1] / n, rel=1e-4)
    assert abs(masses[1] - masses[0]) > 0.05 * n


def test_parts_of_a_chunk_carry_their_sets(sft, approved):
    """As the shares of several processes, and as batches of a rollout."""
    trainer = trainer_with(sft, approved, **OPTIONS)
    sampling, tokenizer = trainer.sampling, trainer.renderer.tokenizer
    prompts = [[5, 6, 7], [8], [9, 10], [11], [12, 13]]
    whole = generate(trainer.models.policy, prompts, tokenizer, sampling, 3)
    parts = [
        generate(trainer.models.policy, prompts, tokenizer, sampling, 3, own=own, **sizes)
        for own, sizes in (
            (slice(2), {"read_every": 3}),
            (slice(2, 5), {"batch_size": 2}),
        )
    ]
    both: Replies = concatenate(parts, tokenizer.pad_token_id)
    assert torch.equal(both.ids, whole.ids)
    assert torch.equal(both.kept.counts, whole.kept.counts)
    assert torch.equal(both.kept.words, whole.kept.words)
