"""Decoders: the ways to continue rows of different length, token by token.

Each way is compared once per model with plain calls on single rows without a cache, with rows that
end at different steps (`decoder_of`). Models differ in what fails: state-space layers read padding,
some caches can't drop a row, some models have no cache that transformers can make.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from rlhf.errors import ConfigError
from rlhf.modeling.agreement import Agreement, agreement, length_past_window, rows_of, testing
from rlhf.modeling.device import upload
from rlhf.modeling.packed import (
    arguments_of,
    captured_logits,
    layout_of,
    packs,
    position_ids,
    row_groups,
)
from rlhf.modeling.packed_decoder import PackedDecoder
from rlhf.modeling.structure import (
    cache_parameter,
    call,
    context_of,
    core_of,
    facts_of,
    model_name,
    named_arguments,
    share_facts,
    stable_length,
)

log = logging.getLogger(__name__)


@runtime_checkable
class Decoder(Protocol):
    """Continues rows token by token; rows that ended are dropped."""

    def start(self) -> Float[Tensor, "rows vocabulary"]:
        """Read the prompts; return the logits after each."""
        ...

    def step(self, tokens: Int[Tensor, " live"]) -> Float[Tensor, "live vocabulary"]:
        """Append one token to each live row; return the logits after it."""
        ...

    def drop(self, ended: list[bool]) -> list[int]:
        """Drop ended rows; return the old index of each remaining row, in the new order."""
        ...


def decoder_of(policy: Any, prompts: list[list[int]], max_new_tokens: int) -> Decoder:
    """Make the fastest decoder that is exact for this model.

    Raises:
        ConfigError: None is.
    """
    longest = max(len(p) for p in prompts) + max_new_tokens
    way, facts = _way_of(policy, longest), facts_of(policy)
    if way == "without cache" and not facts.get("warned"):
        facts["warned"] = True
        log.warning(
            "%s can't be sampled with a cache: each token computes its whole row again, which is "
            "slow; keep ppo.max_new_tokens small", model_name(policy),
        )  # fmt: skip
    return _WAYS[way](policy, prompts, max_new_tokens)


def check_exactness(policy: Any) -> None:
    """Try the ways to compute log-probabilities and to decode, for short and for long rows.

    Raises:
        ConfigError: None of either is exact for this model.
    """
    for longest in (1, context_of(core_of(policy).config)):
        layout_of(policy, longest)
        _way_of(policy, longest)


def frozen_copy(model: Any, dtype: torch.dtype) -> Any:
    """Copy a model for sampling, frozen, with its parameters in `dtype`.

    Parameters of that dtype, and packed ones, are shared, not copied. Buffers keep their precision:
    rotary frequencies need all their digits. What was tested of the model holds for the copy too.
    """
    _way_of(model, 1)  # sets the attention in the configuration that is copied
    parameters = {
        id(p): torch.nn.Parameter(
            p.data.to(dtype) if p.is_floating_point() else p.data, requires_grad=False
        )
        for p in model.parameters()
    }
    # The sample of its weights at loading, which only publishing reads, is left behind.
    memo: dict[int, Any] = {**parameters, id(getattr(core_of(model), "loaded_sample", None)): None}
    twin = copy.deepcopy(model, memo)
    share_facts(model, twin)
    return twin


class PaddedDecoder:
    """Decoder with transformers' own cache and masks, prompts padded on the left.

    With `keeps_rows` ended rows stay in the cache, and their logits are left out.
    """

    def __init__(
        self,
        policy: Any,
        prompts: list[list[int]],
        max_new_tokens: int,
        *,
        keeps_rows: bool = False,
    ) -> None:
        self.policy, self.keeps_rows = policy, keeps_rows
        device = next(policy.parameters()).device
        ids, attention = pad_left(prompts, 0)
        self.ids, self.attention = upload(ids, device), upload(attention, device)
        # Without padding no mask is passed: transformers would read it at every step, to see
        # whether it masks anything.
        self.has_padding = not bool(attention.all())
        self.cache: Any = DynamicCache(config=core_of(policy).config)
        self.cache_argument = {cache_parameter(policy): self.cache}
        self.live: Tensor | None = None

    def start(self) -> Float[Tensor, "rows vocabulary"]:
        """Prefill the cache with the prompts; return the logits after each."""
        return self._forward(self.ids, position_ids(self.attention))

    def step(self, tokens: Int[Tensor, " live"]) -> Float[Tensor, "live vocabulary"]:
        """Append one token to each live row; return the logits after it."""
        if self.live is not None:
            tokens = tokens.new_zeros(len(self.attention)).index_copy(0, self.live, tokens)
        self.attention = F.pad(self.attention, (0, 1), value=1)
        logits = self._forward(tokens[:, None], self.attention.sum(1, keepdim=True) - 1)
        return logits if self.live is None else logits[self.live]

    def drop(self, ended: list[bool]) -> list[int]:
        """Drop ended rows; return the old index of each remaining row, in the new order."""
        order = [i for i, end in enumerate(ended) if not end]
        index = upload(torch.tensor(order, dtype=torch.long), self.attention.device)
        if self.keeps_rows:
            self.live = index if self.live is None else self.live[index]
        else:
            # Unlike `batch_select_indices` this selects the states of recurrent layers too.
            self.cache.reorder_cache(index)
            self.attention = self.attention[index]
        return order

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        arguments = named_arguments(
            self.policy,
            input_ids=ids,
            attention_mask=self.attention if self.has_padding else None,
            position_ids=positions,
            **self.cache_argument,
            use_cache=True,
            logits_to_keep=1,
        )
        return self.policy(**arguments).logits[:, -1]


class GroupedDecoder:
    """A `PaddedDecoder` for each length of a prompt, so that nothing is padded."""

    def __init__(
        self,
        policy: Any,
        prompts: list[list[int]],
        max_new_tokens: int,
        *,
        keeps_rows: bool = False,
    ) -> None:
        self.device = next(policy.parameters()).device
        lengths = torch.tensor([len(p) for p in prompts])
        self.rows = [(lengths == n).nonzero().squeeze(1) for n in lengths.unique().tolist()]
        self.decoders = [
            PaddedDecoder(
                policy, [prompts[i] for i in rows.tolist()], max_new_tokens, keeps_rows=keeps_rows
            )
            for rows in self.rows
        ]

    def start(self) -> Float[Tensor, "rows vocabulary"]:
        """Prefill the caches with the prompts; return the logits after each."""
        return self._joined([decoder.start() for decoder in self.decoders])

    def step(self, tokens: Int[Tensor, " live"]) -> Float[Tensor, "live vocabulary"]:
        """Append one token to each live row; return the logits after it."""
        parts = [tokens[upload(rows, self.device)] for rows in self.rows]
        return self._joined([d.step(t) for d, t in zip(self.decoders, parts, strict=True)])

    def drop(self, ended: list[bool]) -> list[int]:
        """Drop ended rows; return the old index of each remaining row, in the new order."""
        order: list[int] = []
        remaining: list[tuple[PaddedDecoder, Tensor]] = []
        for decoder, rows in zip(self.decoders, self.rows, strict=True):
            over = [ended[i] for i in rows.tolist()]
            if all(over):
                continue
            old = rows[decoder.drop(over)].tolist() if any(over) else rows.tolist()
            remaining.append((decoder, torch.arange(len(order), len(order) + len(old))))
            order.extend(old)
        self.decoders, self.rows = [d for d, _ in remaining], [r for _, r in remaining]
        return order

    def _joined(self, logits: list[Tensor]) -> Tensor:
        order = torch.cat(self.rows).argsort()
        return torch.cat(logits)[upload(order, self.device)]


class UncachedDecoder:
    """Decoder without a cache: computes the whole rows again for every token."""

    def __init__(self, policy: Any, prompts: list[list[int]], max_new_tokens: int) -> None:
        self.policy = policy
        self.device = next(policy.parameters()).device
        lengths = torch.tensor([len(p) for p in prompts])
        width = int(lengths.max())
        ids = torch.tensor([[*p, *[0] * (width - len(p))] for p in prompts])
        self.ids, self.lengths = upload(ids, self.device), lengths

    def start(self) -> Float[Tensor, "rows vocabulary"]:
        """Return the logits after each prompt."""
        attention = (torch.arange(self.ids.shape[1]) < self.lengths[:, None]).long()
        groups = row_groups(self.policy, attention)
        parts = []
        for rows in groups:
            longest = int(self.lengths[rows].max())
            own = attention[rows, :longest]
            ids = self.ids[upload(rows, self.device), :longest]
            arguments, index = arguments_of(ids, own, packs(self.policy, longest))
            last = index.gather(1, self.lengths[rows, None] - 1).squeeze(1)
            parts.append(captured_logits(self.policy, arguments, last)[1])
        order = torch.cat(groups).argsort()
        return torch.cat(parts)[upload(order, self.device)]

    def step(self, tokens: Int[Tensor, " live"]) -> Float[Tensor, "live vocabulary"]:
        """Append one token to each live row; return the logits after it."""
        columns = upload(self.lengths[:, None], self.device)
        self.ids = F.pad(self.ids, (0, 1)).scatter(1, columns, tokens[:, None])
        self.lengths = self.lengths + 1
        self.ids = self.ids[:, : int(self.lengths.max())]
        return self.start()

    def drop(self, ended: list[bool]) -> list[int]:
        """Drop ended rows; return the old index of each remaining row, in the new order."""
        order = [i for i, end in enumerate(ended) if not end]
        index = torch.tensor(order, dtype=torch.long)
        self.ids, self.lengths = self.ids[upload(index, self.device)], self.lengths[index]
        return order


def pad_left(
    rows: list[list[int]], pad: int
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Stack prompts, padded on the left; return ids and attention mask."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


#: Ways to decode, the fastest first.
_WAYS: dict[str, Callable[[Any, list[list[int]], int], Decoder]] = {
    "packed": PackedDecoder,
    "padded": PaddedDecoder,
    "padded, rows kept": partial(PaddedDecoder, keeps_rows=True),
    "by length": GroupedDecoder,
    "by length, rows kept": partial(GroupedDecoder, keeps_rows=True),
    "without cache": UncachedDecoder,
}


def _way_of(policy: Any, longest: float) -> str:
    """Return the fastest way to decode that is exact for sequences of up to `longest` tokens.

    Raises:
        ConfigError: None is.
    """
    facts = facts_of(policy)
    result = Agreement(False)
    for name, way in _WAYS.items():
        if name == "packed" and not packs(policy, longest):
            continue
        if name != "without cache" and longest > stable_length(policy):
            continue  # the cache holds keys of other frequencies
        key = f"decodes {name}"
        if key not in facts:
            facts[key] = _try(policy, way)
        result = facts[key]
        if result.holds:
            return name
    raise ConfigError(
        f"base.path: {model_name(policy)} can't be sampled exactly: a logit is "
        f"{result.expected:.4g} for a row alone and {result.actual:.4g} in a batch; give another "
        "base"
    )


def _try(policy: Any, way: Callable[[Any, list[list[int]], int], Decoder]) -> Agreement:
    """Compare a way to decode with calls on single rows, while some rows end."""
    steps, ends = 4, {0: [1], 2: [0]}
    longest = int(min(length_past_window(policy, 9), max(1, stable_length(policy) - steps)))
    lengths = [min(n, longest) for n in (5, 2, longest, 3)]
    rows = rows_of(policy, [n + steps for n in lengths])
    actual, expected = [], []
    with testing(policy):
        alone = [_logits_of(policy, row) for row in rows]
        try:
            decoder = way(policy, [r[:n] for r, n in zip(rows, lengths, strict=True)], steps)
            logits, live = decoder.start(), list(range(len(rows)))
            for step in range(steps):
                actual.append(logits)
                expected.append(torch.stack([alone[i][lengths[i] - 1 + step] for i in live]))
                if step in ends:
                    order = decoder.drop([i in ends[step] for i in live])
                    live = [live[i] for i in order]
                tokens = [rows[i][lengths[i] + step] for i in live]
                logits = decoder.step(torch.tensor(tokens, device=logits.device))
        except Exception:  # a model's code may fail in any way with a cache or padding
            return Agreement(False, float("nan"), float("nan"))
        return agreement(policy, actual, expected)


def _logits_of(policy: Any, row: list[int]) -> Tensor:
    """Compute a row's logits, (tokens, vocabulary), by the model's own call."""
    ids = torch.tensor([row], device=next(policy.parameters()).device)
    return call(policy, input_ids=ids).logits[0]
