"""Sampling of tokens from logits: temperature, top-k, top-p, and two samplers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf.modeling.device import upload

UNIT = 2**40
"""Fixed-point unit of cumulative sums on an accelerator."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a generation; temperature 0 is greedy.

    `inverse_cdf` uses one uniform number per row and step, drawn before the first step: a row's
    tokens depend neither on the other rows' lengths nor on the vocabulary, and it is fast.
    `multinomial` draws what `torch.multinomial` draws for the full batch, and so the same tokens
    as `transformers` after `torch.manual_seed`.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    sampler: Literal["inverse_cdf", "multinomial"] = "inverse_cdf"
    record_kept: bool = False
    """Store with the replies which tokens top-k and top-p left at each step."""

    def truncates(self, vocabulary: int) -> bool:
        """Return whether top-k or top-p can leave tokens of this vocabulary out."""
        return self.temperature > 0 and (0 < self.top_k < vocabulary or self.top_p < 1)


def derive_seed(seed: int, use: int | str) -> int:
    """Derive an even seed from (seed, number or name); `seed + 1` is then unused by others."""
    digest = hashlib.sha256(f"{seed}/{use}".encode()).digest()
    return int.from_bytes(digest[:7], "big") * 2


class Sampler:
    """Sampler of one batch, with a random generator of its own.

    With `Sampling.record_kept` a truncating sampler calls `record` at each step with the mask of
    the tokens that it drew from, (live, vocabulary).
    """

    def __init__(
        self, sampling: Sampling, batch: int, seed: int, device: torch.device,
        record: Callable[[Tensor], None] | None = None,
    ) -> None:  # fmt: skip
        self.sampling, self.batch = sampling, batch
        self.record = record if sampling.record_kept else None
        if sampling.sampler == "multinomial":
            self.generator = torch.Generator(device).manual_seed(seed)
        else:  # on the CPU, so that all devices draw the same numbers
            generator = torch.Generator().manual_seed(seed)
            uniform = torch.rand(sampling.max_new_tokens, batch, generator=generator)
            self.uniform = upload(uniform, device)

    def __call__(
        self, logits: Float[Tensor, "live vocabulary"], rows: Int[Tensor, " live"], step: int
    ) -> Int[Tensor, " live"]:
        """Draw the next token of each live row; `rows` are indices in the full batch."""
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        logits = filter_logits(logits.float(), self.sampling)
        if self.record is not None and self.sampling.truncates(logits.shape[1]):
            self.record(logits > -torch.inf)
        if self.sampling.sampler == "inverse_cdf":
            return inverse_cdf(logits, self.uniform[step, rows])
        # As torch.multinomial does it for one sample: p / q is largest at i with probability p_i
        # if all q are exponential. Finished rows use up their part of the random numbers.
        noise = exponential(self.batch, logits.shape[1], rows, self.generator)
        return (logits.softmax(-1) / noise).argmax(-1)


def filter_logits(
    logits: Float[Tensor, "rows vocabulary"], sampling: Sampling
) -> Float[Tensor, "rows vocabulary"]:
    """Divide logits by the temperature, then set those outside top-k and top-p to −∞."""
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort(-1)
        cumulated = running_sum(ascending.softmax(-1))
        outside = 1 - sampling.top_p
        low = cumulated <= (outside if cumulated.is_floating_point() else int(outside * UNIT))
        low[:, -1] = False  # the most likely token always stays
        logits = logits.masked_fill(low.scatter(1, order, low), -torch.inf)
    return logits


def inverse_cdf(
    logits: Float[Tensor, "rows vocabulary"], uniform: Float[Tensor, " rows"]
) -> Int[Tensor, " rows"]:
    """Draw the first token whose cumulative probability exceeds `uniform`.

    `uniform` is one number in [0, 1) per row.
    """
    weights = (logits - logits.max(-1, keepdim=True).values).exp_()
    cumulated = running_sum(weights)
    if not cumulated.is_floating_point():
        # ⌊uniform · total⌋ exactly, as uniform is a multiple of 2⁻²⁴: in two parts, neither of
        # which exceeds 2⁶³, and without float64, which MPS lacks.
        numerator = (uniform * 2**24).long()[:, None]
        total = cumulated[:, -1:]
        point = (total >> 24) * numerator + (((total & (2**24 - 1)) * numerator) >> 24)
        return torch.searchsorted(cumulated, point, right=True).squeeze(1)
    # Below the total even when rounded: the largest number is 1 - 2⁻²⁴, and half a unit in the
    # last place of x is at most x 2⁻²⁴. A token of weight 0 is never drawn.
    point = uniform[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, point, right=True).squeeze(1)


def running_sum(
    weights: Float[Tensor, "rows vocabulary"],
) -> Float[Tensor, "rows vocabulary"] | Int[Tensor, "rows vocabulary"]:
    """Cumulative sum of numbers in [0, 1]; on an accelerator in units of 1 / UNIT.

    A GPU adds floating-point numbers in an order that may differ from call to call (torch refuses
    its cumsum under `use_deterministic_algorithms`), so that a resumed run could draw another
    token. Sums of integers are exact in any order. 2¹⁸ tokens of weight 1 stay below 2⁵⁹.
    """
    if weights.device.type == "cpu":
        return weights.cumsum(-1)
    return (weights * UNIT).round_().long().cumsum(-1)


def exponential(
    batch: int, vocabulary: int, rows: Int[Tensor, " live"], generator: torch.Generator
) -> Float[Tensor, "live vocabulary"]:
    """Draw some rows of a (batch, vocabulary) tensor of exponential noise.

    On a CPU torch computes one number at a time: −log1p(−u), with u uniform in float64. Here the
    logarithms are taken of all numbers at once, and of these rows alone: four times as fast.
    """
    dtype = torch.float64 if generator.device.type == "cpu" else torch.float32
    noise = torch.empty(batch, vocabulary, dtype=dtype, device=generator.device)
    fill = noise.uniform_ if dtype == torch.float64 else noise.exponential_
    fill(generator=generator)
    if len(rows) < batch:
        noise = noise[rows]
    return noise.neg_().log1p_().neg_().float() if dtype == torch.float64 else noise
