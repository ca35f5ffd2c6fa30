"""Line charts as SVG, for pictures of the documents that a script computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 700, 380
LEFT, RIGHT, BOTTOM = 66, 22, 54
#: Heights of the title, and of each line of the legend and of the note.
TITLE, LINE = 50, 19
COLOURS = ("#1b5ea6", "#8f4a00", "#0b6b50", "#75408f")
MUTED, TEXT, GRID = "#58626d", "#1a1e23", "#dfe3e7"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', Arial, sans-serif"

Point = tuple[float, float]
#: Returns where a point of the chart lies on the picture.
Place = Callable[[float, float], Point]


@dataclass(frozen=True)
class Axis:
    """A scale with its ticks."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    is_log: bool = False

    def share(self, value: float) -> float:
        """Return where a value lies between both ends, from 0 to 1."""
        low, high, x = ((math.log(v) if self.is_log else v) for v in (self.low, self.high, value))
        return min(max((x - low) / (high - low), 0.0), 1.0)


@dataclass(frozen=True)
class Line:
    """A curve; dashed ones differ without colour."""

    label: str
    points: Sequence[Point]
    colour: str
    dash: str = ""


@dataclass(frozen=True)
class Mark:
    """A reference: a vertical line at x, a horizontal one at y, or a point or text with both."""

    label: str
    x: float | None = None
    y: float | None = None
    place: str = "end"
    """Whether the label of a vertical line or point ends or starts there."""
    is_low: bool = False
    """Whether the label of a vertical line stands at its foot."""
    is_text: bool = False
    """Whether there is no point, but its label alone."""


@dataclass(frozen=True)
class Chart:
    """A chart with axes, curves, references, shaded ranges of x, and a note on its figures."""

    title: str
    note: str
    x: Axis
    y: Axis
    lines: Sequence[Line] = ()
    marks: Sequence[Mark] = ()
    bands: Sequence[tuple[float, float, str]] = ()
    areas: Sequence[tuple[Sequence[Point], str]] = field(default=())
    """Polygons with their colours."""


def render(chart: Chart) -> str:
    """Render a chart; the same chart gives the same bytes."""
    legend = [line for line in chart.lines if line.label]
    top = TITLE + LINE * len(legend)
    bottom = top + HEIGHT - TITLE - BOTTOM
    notes = _wrapped(chart.note, 96)
    height = bottom + BOTTOM + LINE * len(notes) + 8

    def at(x: float, y: float) -> Point:
        return (
            round(LEFT + chart.x.share(x) * (WIDTH - LEFT - RIGHT), 1),
            round(bottom - chart.y.share(y) * (bottom - top), 1),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" aria-label="{escape(chart.title)}" '
        f'font-family="{FONT}" font-size="13" fill="{TEXT}">',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#fff"/>',
        f'<text x="{LEFT}" y="28" font-size="16" font-weight="600">{escape(chart.title)}</text>',
        *_legend(legend),
        *_bands(chart, at, top, bottom),
        *(f'<polygon points="{_points(at(*point) for point in area)}" fill="{colour}"/>'
          for area, colour in chart.areas),
        *_axes(chart, at, top, bottom),
        *(
            f'<polyline points="{_points(at(*point) for point in line.points)}" fill="none" '
            f'stroke="{line.colour}" stroke-width="2"{_dash(line.dash)}/>'
            for line in chart.lines
        ),
        *_marks(chart, at, top, bottom),
        *(f'<text x="{LEFT}" y="{bottom + BOTTOM + LINE * i + 6}" font-size="12" fill="{MUTED}">'
          f"{escape(text)}</text>" for i, text in enumerate(notes)),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _legend(lines: Sequence[Line]) -> list[str]:
    parts: list[str] = []
    for i, line in enumerate(lines):
        y = TITLE + LINE * i
        parts.append(
            f'<path d="M{LEFT} {y - 4}h26" stroke="{line.colour}" stroke-width="2"'
            f'{_dash(line.dash)}/><text x="{LEFT + 34}" y="{y}">{escape(line.label)}</text>'
        )
    return parts


def _bands(chart: Chart, at: Place, top: float, bottom: float) -> list[str]:
    parts: list[str] = []
    for low, high, label in chart.bands:
        left, right = at(low, chart.y.low)[0], at(high, chart.y.low)[0]
        parts.append(
            f'<rect x="{left}" y="{top}" width="{round(right - left, 1)}" '
            f'height="{bottom - top}" fill="#eef3f8"/><text x="{round((left + right) / 2, 1)}" '
            f'y="{top + 16}" text-anchor="middle" font-size="12" fill="{MUTED}">'
            f"{escape(label)}</text>"
        )
    return parts


def _axes(chart: Chart, at: Place, top: float, bottom: float) -> list[str]:
    parts: list[str] = []
    for value, label in chart.y.ticks:
        y = at(chart.x.low, value)[1]
        parts.append(
            f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="{GRID}"/><text x="{LEFT - 8}" '
            f'y="{y + 4.5}" text-anchor="end" fill="{MUTED}">{escape(label)}</text>'
        )
    for value, label in chart.x.ticks:
        x = at(value, chart.y.low)[0]
        parts.append(
            f'<path d="M{x} {bottom}v5" stroke="{MUTED}"/><text x="{x}" y="{bottom + 19}" '
            f'text-anchor="middle" fill="{MUTED}">{escape(label)}</text>'
        )
    middle = round((LEFT + WIDTH - RIGHT) / 2, 1)
    parts += [
        f'<path d="M{LEFT} {bottom}H{WIDTH - RIGHT}" stroke="{MUTED}"/>',
        f'<text x="{middle}" y="{bottom + 38}" text-anchor="middle">{escape(chart.x.label)}</text>',
        f'<text transform="rotate(-90)" x="{-round((top + bottom) / 2, 1)}" y="17" '
        f'text-anchor="middle">{escape(chart.y.label)}</text>',
    ]
    return parts


def _marks(chart: Chart, at: Place, top: float, bottom: float) -> list[str]:
    parts: list[str] = []
    for mark in chart.marks:
        x, y = at(
            chart.x.high if mark.x is None else mark.x, chart.y.high if mark.y is None else mark.y
        )
        if mark.x is None:
            parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="{TEXT}"{_dash("5 4")}/>')
            text_x, text_y, anchor = x - 6, y - 6, "end"
        else:
            offset, anchor = (-7, "end") if mark.place == "end" else (7, "start")
            text_x = x + offset
            if mark.y is None:
                parts.append(f'<path d="M{x} {top}V{bottom}" stroke="{TEXT}"{_dash("5 4")}/>')
                text_y = bottom - 10 if mark.is_low else top + 14
            else:
                if not mark.is_text:
                    parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{TEXT}" stroke="#fff"/>')
                text_y = y + 4.5
        parts.append(
            f'<text x="{round(text_x, 1)}" y="{round(text_y, 1)}" text-anchor="{anchor}" '
            f'font-size="12">{escape(mark.label)}</text>'
        )
    return parts


def _points(points: Iterable[Point]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _dash(dash: str) -> str:
    return f' stroke-dasharray="{dash}"' if dash else ""


def _wrapped(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + len(word) < width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
