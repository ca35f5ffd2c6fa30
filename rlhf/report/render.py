"""Turn a report into one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf.report import charts, text, view
from rlhf.report.model import RunReport


def render(report: RunReport) -> str:
    """Return the page. The same report gives the same bytes; all its text is escaped."""
    modes, compared = view.comparison(report.policy)
    columns, updates, step = view.curve_table(report.curves)
    changed, defaults = view.config_parts(report.config_rows)
    return (
        _environment()
        .get_template("page.html")
        .render(
            report=report,
            outcome=view.OUTCOMES[report.outcome],
            tiles=view.tiles(report),
            lanes=view.lanes(report.stages),
            data_rows=view.data_rows(report.data),
            left_out=view.left_out(report.data),
            accuracy=view.accuracy_chart(report.reward_model),
            curves=view.curve_panels(report),
            curve_columns=columns,
            curve_rows=updates,
            curve_step=step,
            modes=modes,
            compared=compared,
            wins=view.win_chart(report.policy),
            changed=changed,
            defaults=defaults,
            parents=view.parents(report),
        )
    )


@cache
def _environment() -> Environment:
    """Return the templates' environment: autoescape on, unknown names are errors."""
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
    environment.globals.update(states=view.STATES, chart=charts)
    return environment
