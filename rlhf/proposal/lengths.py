"""Token limits, and the share of the data to hold out, from what was counted."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.errors import DataError
from rlhf.proposal.facts import Base, Machine, TokenCounts, quantile

#: Held-out prompts with which a reward model that is right in 65 % is told from a coin, and a
#: policy that wins 60 % from its start, each with a power of 80 % or more.
ENOUGH_HELD_OUT = 150
#: Held-out prompts beyond which intervals of 2 points get no narrower to speak of.
MOST_HELD_OUT = 2_000
#: Usual and largest share of the prompts that is held out.
SHARE, LARGEST_SHARE = 0.1, 0.25
#: Most new tokens and longest rows, which a machine trains in bearable time, by device.
CPU_LIMITS, GPU_LIMITS = (128, 512), (1024, 4096)
#: The same for a model from scratch, which learns no long replies.
SCRATCH_LIMITS, SCRATCH_CONTEXT = (64, 256), 1024
#: Fewest tokens of a reply.
LEAST_NEW = 16
#: Multiples to which lengths are rounded up.
_REPLY_STEP, _ROW_STEP = 16, 32


@dataclass(frozen=True)
class Lengths:
    """Most tokens of a reply and of a row, and why."""

    new: int
    row: int
    new_reason: str
    row_reason: str
    ends: float
    """Share of preferred replies that end within `new`."""
    cut: float
    """Share of rows of which the end of a reply is cut off."""


def held_out_share(prompts: int) -> float:
    """Return the share of the prompts to hold out for the gates."""
    if prompts * SHARE > MOST_HELD_OUT:
        return max(0.001, round(MOST_HELD_OUT / prompts, 3))
    return round(min(LARGEST_SHARE, max(SHARE, ENOUGH_HELD_OUT / max(prompts, 1))), 2)


def choose_lengths(tokens: TokenCounts, machine: Machine, base: Base | None) -> Lengths:
    """Return lengths that the data fill, the base reads and the machine bears.

    Prompts come first: all but a twentieth fit whole, whatever that costs, as far as the base
    reads so many tokens.

    Raises:
        DataError: The prompts leave no room for replies in the base's context.
    """
    most_new, most_row = GPU_LIMITS if machine.is_gpu else CPU_LIMITS
    context = base.context if base else SCRATCH_CONTEXT
    if base is None:
        most_new, most_row = SCRATCH_LIMITS
    reply, prompt = quantile(tokens.chosen, 0.95), quantile(tokens.prompt, 0.95)
    new = max(LEAST_NEW, min(_up(reply, _REPLY_STEP), most_new))
    if prompt + new > context:
        new = context - prompt
        if new < LEAST_NEW:
            new = _room(prompt, context, tokens, base)
    whole = quantile(tokens.prompt + tokens.longer, 0.95)
    wanted = max(whole, quantile(tokens.prompt, 0.99) + new)
    row = min(_up(wanted, _ROW_STEP), most_row)
    row = min(max(row, _up(prompt + new, _ROW_STEP)), context)
    ends = tokens.share_that_ends(new)
    cut = float((tokens.prompt + tokens.longer > row).mean())
    limit = f"; {most_new} is what {_limiting(machine, base)}" if new == most_new < reply else ""
    if new < min(reply, most_new):
        limit = f"; more do not fit beside the prompts in its context of {context:,}"
    return Lengths(
        new, row,
        f"{ends:.0%} of the preferred replies end within (95 % within {reply:,}){limit}",
        f"{1 - cut:.0%} of prompts with the longer reply fit whole (95 % have at most {whole:,}); "
        "of others the end is cut",
        ends, cut,
    )  # fmt: skip


def _room(prompt: int, context: int, tokens: TokenCounts, base: Base | None) -> int:
    """Return the tokens for replies where the longest twentieth of the prompts is not alone long.

    Raises:
        DataError: Half of the prompts leave no room for a reply.
    """
    half = quantile(tokens.prompt, 0.5)
    name = base.name if base else "a small model from scratch"
    if context - half < LEAST_NEW:
        raise DataError(
            f"data.source: half of the prompts have {half:,} tokens or more, and {name} reads "
            f"{context:,} with the reply; give a base with a longer context, or shorter prompts"
        )
    return max(LEAST_NEW, min(context - half, context - prompt))


def _limiting(machine: Machine, base: Base | None) -> str:
    if base is None:
        return "so small a model can learn"
    return "memory and time allow" if machine.is_gpu else "a CPU samples in bearable time"


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
