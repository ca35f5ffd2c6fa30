"""Data card of a dataset: findings first, then figures, as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.data.audit import (
    FORMAT_SAMPLE,
    LANGUAGE_SAMPLE,
    Audit,
    Evidence,
    Rate,
    audit_pairs,
)
from rlhf.data.findings import Finding, find
from rlhf.data.rows import CARD, CARD_TEXT, Pair
from rlhf.markdown import bold, bullets, heading, table, words

#: Most rows of a table in `card.md`; `card.json` has all.
MAX_ROWS = 30
#: Longest text of a cell, in characters.
MAX_CELL = 160


def write_card(
    out_dir: Path, pairs: Sequence[Pair], evidence: Evidence, facts: Mapping[str, Any]
) -> list[str]:
    """Write `card.md` and `card.json`; return the warnings.

    Args:
        out_dir: Folder of the dataset.
        pairs: Pairs of all splits.
        evidence: Counts over the rows.
        facts: Summary of the dataset; names and values that are no lists are shown.
    """
    audit = audit_pairs(pairs, evidence, with_languages=facts.get("source") != "world")
    findings = find(audit)
    figures = {"findings": [asdict(finding) for finding in findings], **asdict(audit)}
    card = json.dumps(figures, indent=1, allow_nan=False, ensure_ascii=False)
    # In the order of the audit, most votes first; half of a surrogate pair becomes "?".
    (out_dir / CARD).write_bytes(card.encode("utf-8", "replace") + b"\n")
    (out_dir / CARD_TEXT).write_text(render_card(audit, findings, facts), encoding="utf-8")
    return [finding.text for finding in findings if finding.level == "warning"]


def render_card(audit: Audit, findings: Sequence[Finding], facts: Mapping[str, Any]) -> str:
    """Return a card as Markdown; names and texts of the source are escaped."""
    marks = {"warning": (bold("Warning."),)}
    parts: list[str] = [
        heading(f"Data card: {facts.get('source', '')}", limit=MAX_CELL),
        bullets(words(*marks.get(finding.level, ()), finding.text) for finding in findings),
        heading("Rows", 2),
        table(("", ""), _facts(facts), MAX_CELL),
    ]
    if notes := facts.get("notes"):
        parts += ["How the rows were read:", bullets(notes)]
    for title, head, rows in _sections(audit):
        if rows:
            parts += [heading(title, 2, MAX_CELL), table(head, rows[:MAX_ROWS], MAX_CELL)]
            if len(rows) > MAX_ROWS:
                parts.append(f"{len(rows) - MAX_ROWS:,} more in `{CARD}`.")
    return "\n\n".join([part for part in parts if part] + [_METHOD]) + "\n"


_METHOD = f"""## How it is measured

Intervals are 95 % Wilson intervals. A reply is longer by characters; equal lengths count a half.
Formats are searched for in at most {FORMAT_SAMPLE:,} pairs and languages guessed on
{LANGUAGE_SAMPLE:,} prompts, both drawn by a fixed seed. Positions, annotators and slices are
counted over rows, before votes are merged. Label noise e solves p = (1 − e)² + e² for the
probability p that two votes agree (one error rate for all, Dawid and Skene 1979); it holds for
votes that are independent, not for copies of rows. `{CARD}` has all figures."""


def _facts(facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (key.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
        for key, value in facts.items()
        if value is not None and not isinstance(value, dict | list | float)
    ]


#: Title, heads of the columns, and rows of a table.
Section = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def _sections(audit: Audit) -> Iterator[Section]:
    reasons = [
        (r.reason, f"{r.rows:,}", "" if r.is_choice else "yes", r.example, r.cure)
        for r in audit.left_out
    ]
    yield "Rows left out", ("reason", "rows", "a fault", "first example", "cure"), reasons
    shortcuts = list(_shortcuts(audit))
    yield "Shortcuts", ("preferred reply", "share", "interval", "n"), shortcuts
    formats = [
        (name, f"{bias.chosen:.1%}", f"{bias.rejected:.1%}") for name, bias in audit.formats.items()
    ]
    yield "Formats", ("replies with", "of the chosen", "of the rejected"), formats
    if audit.repeats:
        noise = audit.repeats
        interval = f"{noise.noise_low:.1%}–{noise.noise_high:.1%}"
        rows = [
            ("two votes for one pair agree", *_cells(noise.pairwise)),
            ("a single vote is wrong (estimate)", f"{noise.noise:.1%}", interval, ""),
        ]
        yield "Agreement", ("", "share", "interval", "pairs"), rows
    if audit.annotators:
        people = [
            (row.name, f"{row.votes:,}", *_cells(row.agreement)) for row in audit.annotators.rows
        ]
        head = ("annotator", "votes", "agrees with others", "interval", "votes compared")
        yield "Annotators", head, people
    for column, values in audit.slices.items():
        rows = [(name, *_cells(rate)) for name, rate in values.items()]
        head = (column, "longer reply preferred", "interval", "comparisons")
        yield f"Slices by {column}", head, rows
    languages = [(code, *_cells(rate)[:2]) for code, rate in audit.languages.items()]
    yield "Languages of prompts", ("ISO 639", "share", "interval"), languages
    lengths = [
        (name, *(f"{value:,}" for value in figures.quantiles.values()))
        for name, figures in audit.lengths.items()
    ]
    yield "Lengths in characters", ("", "5 %", "median", "95 %", "longest"), lengths


def _shortcuts(audit: Audit) -> Iterable[tuple[str, ...]]:
    """Return rows for the rules that ignore content."""
    rates = {"the longer one": audit.longer, "the first in its row": audit.position}
    for name, bias in audit.formats.items():
        rates[f"the one with {name}"] = bias.wins
        rates[f"the one with {name}, where it is not longer"] = bias.wins_not_longer
    return [(name, *_cells(rate)) for name, rate in rates.items() if rate]


def _cells(rate: Rate | None) -> tuple[str, str, str]:
    if rate is None:
        return "", "", ""
    return f"{rate.share:.1%}", f"{rate.share_low:.1%}–{rate.share_high:.1%}", f"{rate.n:,}"
