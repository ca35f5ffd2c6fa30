"""Kept sets: the tokens that top-k and top-p leave at each sampling step, stored compactly.

A truncated sampler draws from the softmax over the tokens it keeps. Log-probabilities of that
distribution need the same sets again after the weights have changed, so they are stored with the
replies: as token ids, or as a bit per token of the vocabulary where that takes less memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.modeling.device import upload

EXCLUDED = -1e30
"""Logit of an excluded token: its probability is exactly 0. With −∞ the entropy would contain
0 · ∞, and with the lowest finite number its gradient: that times a weight above 1 is −∞."""


@dataclass(frozen=True)
class KeptSets:
    """Set of tokens that could be drawn, for each token of a batch of replies.

    A set takes min(n, ⌈vocabulary / 32⌉) words of 32 bits: its n ids, or one bit per token of the
    vocabulary (bit b of byte i is token 8 i + b). With top_k = 50 that is 200 bytes a token.
    """

    words: Int[Tensor, " words"]
    """All sets one after the other, row by row; int32."""
    counts: Int[Tensor, "batch reply"]
    """Words of each set, 0 where there is no token; on the CPU, since shapes depend on it."""
    vocabulary: int

    @classmethod
    def of_masks(cls, masks: Bool[Tensor, "rows vocabulary"]) -> KeptSets:
        """Compress masks; `counts` is (rows, 1).

        On an accelerator this makes the host wait.
        """
        vocabulary = masks.shape[1]
        width = words_of(vocabulary)
        sizes = masks.sum(1).cpu()
        counts = sizes.clamp(max=width)
        dense = sizes >= width
        starts = counts.cumsum(0) - counts
        words = torch.empty(int(counts.sum()), dtype=torch.int32, device=masks.device)
        for rows, contents in (
            (~dense, lambda part: part.nonzero()[:, 1].int()),
            (dense, lambda part: _pack(part).flatten()),
        ):
            if bool(rows.any()):
                part = masks if bool(rows.all()) else masks[upload(rows, masks.device)]
                cells = _segments(starts[rows], counts[rows])
                words[upload(cells, masks.device)] = contents(part)
        return cls(words, counts[:, None], vocabulary)

    @classmethod
    def assemble(
        cls,
        parts: Sequence[KeptSets],
        cells: Sequence[Tensor],
        shape: tuple[int, int],
    ) -> KeptSets:
        """Join the sets of single steps into a batch of replies.

        Args:
            parts: As of `of_masks`, on the CPU.
            cells: Index of each row of a part in the flattened (batch, reply).
            shape: (batch, reply).
        """
        counts, order = torch.cat([p.counts.flatten() for p in parts]), torch.cat(list(cells))
        starts = counts.cumsum(0) - counts
        places = order.argsort()
        words = torch.cat([p.words for p in parts])[_segments(starts[places], counts[places])]
        table = torch.zeros(shape[0] * shape[1], dtype=torch.long).index_copy(0, order, counts)
        return cls(words, table.view(shape), parts[0].vocabulary)

    @classmethod
    def concatenate(cls, parts: Sequence[KeptSets]) -> KeptSets:
        """Join batches one below the other; shorter replies are padded."""
        width = max(p.counts.shape[1] for p in parts)
        counts = [F.pad(p.counts, (0, width - p.counts.shape[1])) for p in parts]
        return cls(torch.cat([p.words for p in parts]), torch.cat(counts), parts[0].vocabulary)

    def to(self, device: torch.device) -> KeptSets:
        """Copy to a device, except `counts`."""
        return KeptSets(upload(self.words, device), self.counts, self.vocabulary)

    def take(self, index: Int[Tensor, " rows"], width: int) -> KeptSets:
        """Select rows, cut to `width` tokens; `index` is on the CPU."""
        starts = (self.counts.flatten().cumsum(0) - self.counts.flatten()).view_as(self.counts)
        counts = self.counts[index, :width]
        cells = _segments(starts[index, :width].flatten(), counts.flatten())
        return KeptSets(self.words[upload(cells, self.words.device)], counts, self.vocabulary)

    def excluded(self, start: int, stop: int) -> Bool[Tensor, "tokens vocabulary"]:
        """Masks of the tokens outside of the sets, for reply tokens `start` to `stop`.

        Reply tokens are counted row by row, without padding. Tokens past the last have no set, and
        nothing is excluded for them. The host does not wait for an accelerator.
        """
        rows, cells, dense, masks = self._decode(start, stop)
        excluded = masks.new_zeros(stop - start, self.vocabulary)
        excluded[:rows] = True
        excluded.view(-1).index_fill_(0, cells, False)
        return excluded.index_copy_(0, dense, ~masks)

    def exclude_(self, logits: Float[Tensor, "tokens vocabulary"], start: int) -> None:
        """Set logits outside of the sets to −∞ in place, for reply tokens from `start`.

        Logits are contiguous and need no gradient. The few that stay are written back, instead of a
        mask of all. On a CPU the exponential of −∞ takes a quarter of the time of that of
        `EXCLUDED` (measured: MKL treats an underflow by itself).
        """
        rows, cells, dense, masks = self._decode(start, start + len(logits))
        flat = logits.view(-1)
        kept = flat[cells]
        partly = logits[dense].masked_fill_(~masks, -torch.inf)
        logits[:rows] = -torch.inf
        flat.index_copy_(0, cells, kept)
        logits.index_copy_(0, dense, partly)

    def _decode(self, start: int, stop: int) -> tuple[int, Tensor, Tensor, Tensor]:
        """Return the sets of reply tokens `start` to `stop`.

        Returns:
            Number of tokens that have a set; cells of the tokens in sets stored as ids, in the
            flattened (tokens, vocabulary); rows of the sets stored as bits, and their masks.
        """
        counts, ends = (t[start:stop] for t in self._tokens)
        device, width = self.words.device, words_of(self.vocabulary)
        first = int(ends[0] - counts[0]) if len(counts) > 0 else 0
        words = self.words[first : first + int(counts.sum())]
        starts = ends - counts - first
        sparse, dense = ((counts != width).nonzero()[:, 0], (counts == width).nonzero()[:, 0])
        ids = words[upload(_segments(starts[sparse], counts[sparse]), device)]
        rows = upload(sparse.repeat_interleave(counts[sparse]), device)
        bits = words[upload(_segments(starts[dense], counts[dense]), device)].view(-1, width)
        masks = _unpack(bits, self.vocabulary)
        return len(counts), rows * self.vocabulary + ids, upload(dense, device), masks

    @cached_property
    def _tokens(self) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
        """Words of each reply token's set, and where they end in `words`."""
        counts = self.counts[self.counts > 0]
        return counts, counts.cumsum(0)


def exclude(
    logits: Float[Tensor, "tokens vocabulary"], excluded: Bool[Tensor, "tokens vocabulary"]
) -> Float[Tensor, "tokens vocabulary"]:
    """Set excluded logits, in place, to `EXCLUDED`."""
    return logits.masked_fill_(excluded, EXCLUDED)


def words_of(vocabulary: int) -> int:
    """Words of 32 bits that hold one bit per token."""
    return -(-vocabulary // 32)


def _segments(starts: Int[Tensor, " n"], counts: Int[Tensor, " n"]) -> Int[Tensor, " total"]:
    """Indices start, start + 1, … of each segment, one segment after the other."""
    offsets = starts - (counts.cumsum(0) - counts)
    return offsets.repeat_interleave(counts) + torch.arange(int(counts.sum()))


def _pack(masks: Bool[Tensor, "rows vocabulary"]) -> Int[Tensor, "rows words"]:
    """Pack masks into bits."""
    bits = F.pad(masks.to(torch.uint8), (0, 32 * words_of(masks.shape[1]) - masks.shape[1]))
    shifts = torch.arange(8, dtype=torch.uint8, device=masks.device)
    bits = bits.view(len(masks), -1, 8) << shifts
    return bits.sum(-1, dtype=torch.uint8).view(torch.int32)


def _unpack(words: Int[Tensor, "rows words"], vocabulary: int) -> Bool[Tensor, "rows vocabulary"]:
    """Unpack masks from bits."""
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    bits = (words.view(torch.uint8)[:, :, None] >> shifts) & 1
    return bits.flatten(1)[:, :vocabulary].bool()
