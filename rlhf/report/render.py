"""Rendering of a report as one self-contained HTML page.

The page has no script and loads nothing: no network, no font. The same report gives the same bytes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf.report import charts, text
from rlhf.report.model import OUTCOMES, STATES, RunReport
from rlhf.report.view import (
    accuracy_chart,
    comparison,
    config_parts,
    curve_table,
    data_rows,
    lanes,
    left_out,
    parents,
    tiles,
    win_chart,
)


def render(report: RunReport) -> str:
    """Render a report as HTML with all of its text escaped."""
    modes, compared = comparison(report.policy)
    columns, updates, step = curve_table(report.curves)
    changed, defaults = config_parts(report.config_rows)
    return (
        _environment()
        .get_template("page.html")
        .render(
            report=report,
            outcome=OUTCOMES[report.outcome],
            tiles=tiles(report),
            lanes=lanes(report.stages),
            data_rows=data_rows(report.data),
            left_out=left_out(report.data),
            accuracy=accuracy_chart(report.reward_model),
            curves=charts.curves_of(report.curves),
            curve_columns=columns,
            curve_rows=updates,
            curve_step=step,
            modes=modes,
            compared=compared,
            wins=win_chart(report.policy),
            changed=changed,
            defaults=defaults,
            parents=parents(report),
        )
    )


@cache
def _environment() -> Environment:
    """Load the templates; unknown names in them are errors."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=text.clean,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        number=text.number,
        exact=text.exact,
        percent=text.percent,
        duration=text.duration,
        moment=text.moment,
        bound=text.bound,
        words=text.words,
        short=text.short,
    )
    environment.globals.update(states=STATES, chart=charts)
    return environment
