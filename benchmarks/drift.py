"""False warnings and found shifts of drift: `python -m benchmarks.drift --pairs FILE`.

Draws disjoint halves of a file of preference pairs by prompts, and warns by the default limits. The
second half is changed in six ways, one of which is not at all. Growth compares a half with itself
and a tenth more. Without a file the generated world is used. No language is guessed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlhf.config import WorldConfig
from rlhf.config.drift import DriftWarnings
from rlhf.data.audit import audit_pairs
from rlhf.data.drift import MEASURES, compare
from rlhf.data.rows import Pair
from rlhf.data.sketch import Sketch, make_sketch
from rlhf.world import generate

Change = Callable[[list[Pair], random.Random], list[Pair]]
CODE = "for (let i = 0; i < rows.length; i++) { total += rows[i].price * rows[i].count; }\n"


def main() -> None:
    """Measure each size and change, and print."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--pairs", help="JSON lines with prompt, chosen, rejected; may be gzipped")
    parser.add_argument("--prompts", type=int, nargs="+", default=[50, 100, 200, 400])
    parser.add_argument("--draws", type=int, default=100)
    args = parser.parse_args()
    pairs = read(Path(args.pairs)) if args.pairs else world()
    table = Table("prompts", "change", "warns", *MEASURES)
    for prompts in args.prompts:
        for name, change in {"growth by a tenth": None, **CHANGES}.items():
            found = measure(pairs, prompts, args.draws, change)
            shares = (f"{found[key] / args.draws:.0%}" for key in ("any", *MEASURES))
            table.add_row(str(prompts), name, *shares)
    Console(width=120).print(table)


def read(path: Path) -> list[Pair]:
    """Read pairs with string prompts."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        rows = map(json.loads, file)
        return [Pair(row["prompt"], row["chosen"], row["rejected"]) for row in rows]


def world() -> list[Pair]:
    """Return the pairs of the generated world."""
    rows = generate(WorldConfig(pairs=6000), 0).pairs
    return [Pair(row.prompt, row.chosen, row.rejected) for row in rows]


def measure(pairs: Sequence[Pair], prompts: int, draws: int, change: Change | None) -> Counter[str]:
    """Count the draws that warn, by measure and as `any`.

    Args:
        pairs: Pairs to draw from.
        prompts: Prompts of each side.
        draws: Number of draws.
        change: Change of the second side; None compares the first one with its growth.
    """
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(str(pair.prompt), []).append(pair)
    keys, found = sorted(by_prompt), Counter[str]()
    if len(keys) < 2 * prompts:
        raise SystemExit(f"--prompts {prompts}: two halves need {2 * prompts}, have {len(keys)}")
    for draw in range(draws):
        rng = random.Random(draw)
        drawn = rng.sample(keys, 2 * prompts)
        old = [pair for key in drawn[:prompts] for pair in by_prompt[key]]
        more = drawn[prompts:] if change else drawn[prompts : prompts + prompts // 10]
        new = [pair for key in more for pair in by_prompt[key]]
        new = change(new, rng) if change else [*old, *new]
        shifts = compare(sketch(old), sketch(new)).reached(DriftWarnings())
        found.update({shift.measure for shift in shifts})
        found["any"] += bool(shifts)
    return found


def sketch(pairs: list[Pair]) -> Sketch:
    """Return the sketch of pairs, with the formats of their data card."""
    card = json.loads(json.dumps(asdict(audit_pairs(pairs, with_languages=False))))
    return make_sketch(pairs, [pair.prompt for pair in pairs], [], card)


def _other_letters(text: str) -> str:
    """Replace every word by another one, as another language does; signs and lengths stay."""
    return "".join(chr((ord(c) - 97 + 7) % 26 + 97) if "a" <= c <= "z" else c for c in text.lower())


def _to_another_language(pairs: list[Pair], _: random.Random) -> list[Pair]:
    other = _other_letters
    return [Pair(other(str(p.prompt)), other(p.chosen), other(p.rejected)) for p in pairs]


def _to_code(pairs: list[Pair], _: random.Random) -> list[Pair]:
    def code(text: str) -> str:
        return (CODE * (len(text) // len(CODE) + 1))[: len(text)]

    return [replace(p, chosen=code(p.chosen), rejected=code(p.rejected)) for p in pairs]


def _to_double_length(pairs: list[Pair], rng: random.Random) -> list[Pair]:
    others = rng.sample(pairs, len(pairs))
    return [
        replace(p, chosen=f"{p.chosen} {o.chosen}", rejected=f"{p.rejected} {o.rejected}")
        for p, o in zip(pairs, others, strict=True)
    ]


def _flip_a_fifth(pairs: list[Pair], rng: random.Random) -> list[Pair]:
    return [
        replace(p, chosen=p.rejected, rejected=p.chosen) if rng.random() < 0.2 else p for p in pairs
    ]


def _add_a_slice(pairs: list[Pair], rng: random.Random) -> list[Pair]:
    """Turn a fifth of the prompts into code without a column that names them."""
    keys = sorted({str(pair.prompt) for pair in pairs})
    coded = {*rng.sample(keys, len(keys) // 5)}
    rest = [pair for pair in pairs if pair.prompt not in coded]
    return rest + _to_code([pair for pair in pairs if pair.prompt in coded], rng)


CHANGES: dict[str, Change] = {
    "none": lambda pairs, _: pairs,
    "another language": _to_another_language,
    "code instead of chat": _to_code,
    "doubled reply length": _to_double_length,
    "20 % of the labels flipped": _flip_a_fifth,
    "a fifth of the prompts is new (code)": _add_a_slice,
}

if __name__ == "__main__":
    main()
