"""The report in a real browser: no error, no overflow, every section visible."""

import pytest

from rlhf.report import render
from rlhf.report.comparison import render_comparison
from rlhf.report.history import render_history
from rlhf.report.index import list_pages, render_index
from rlhf.report.two_runs import render_two_runs
from tests.report import demo, demo_compare, demo_runs

pytestmark = pytest.mark.browser
NAMES = ("full", "rejected", "failed", "trust")
COMPARISONS = ("policies", "models")
#: Pages on several runs.
SEVERAL = ("history", "runs", "index")

HIDDEN_SECTIONS = """
[...document.querySelectorAll('section, header.page-head, .node, .curve svg, .estimate.main')]
  .filter(e => { const b = e.getBoundingClientRect();
                 return !e.checkVisibility({opacityProperty: true}) || b.width < 20 || b.height < 8;
  }).map(e => e.id || e.className)
"""
#: Visible texts that are squeezed into a column of letters.
SQUEEZED = """
[...document.querySelectorAll('caption, h3, h4, th, td, dd, p, li, summary')].filter(e => {
  if (e.closest('.hidden, .stack thead, .config thead') || !e.checkVisibility()) return false;
  const box = e.getBoundingClientRect();
  return box.width < 40 && box.height > 100;
}).map(e => e.tagName + '.' + e.className + ': ' + e.textContent.slice(0, 40))
"""
#: Pictures and tables that a screen reader can't name.
UNNAMED = """
[...document.querySelectorAll('svg:not([aria-hidden]), table')]
  .filter(e => !(e.getAttribute('aria-label') || e.querySelector('caption')))
  .map(e => e.outerHTML.slice(0, 80))
"""
#: Labels of a chart that stand out of its figure, over the border of the section.
BEYOND_FIGURE = """
[...document.querySelectorAll('.tick, .ref-label')].filter(e => {
  const box = e.getBoundingClientRect(), figure = e.closest('figure').getBoundingClientRect();
  return box.left < figure.left - 1 || box.right > figure.right + 1;
}).map(e => e.className + ': ' + e.textContent)
"""
CUT_OFF = """
[...document.querySelectorAll('body *')].filter(e => {
  if (e.closest('.scroll, .hidden, svg, .stack thead, .mark')) return false;
  const box = e.getBoundingClientRect();
  return box.width > 0 && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(e => e.tagName + '.' + e.className)
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    files = {}
    for name in NAMES:
        files[name] = folder / f"{name}.html"
        files[name].write_text(render(getattr(demo, f"{name}_report")()), encoding="utf-8")
    for name, page in (
        ("policies", render_comparison(demo_compare.policies(), demo_compare.replies())),
        ("models", render_comparison(demo_compare.reward_models(), demo_compare.pairs())),
        ("history", render_history(demo_runs.entries(), "s3://bucket/store")),
        ("runs", render_two_runs(demo_runs.two_runs())),
        ("index", render_index(list_pages(folder))),
    ):
        files[name] = folder / f"{name}.html"
        files[name].write_text(page, encoding="utf-8")
    return files


@pytest.mark.parametrize("name", [*NAMES, *COMPARISONS, *SEVERAL])
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_page_in_browser(browser, pages, tmp_path, name, width):
    page = browser.open(pages[name], width=width)
    # Everything folded away counts too: open it before measuring.
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.problems == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("innerWidth") == width
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate(SQUEEZED) == []
    assert page.evaluate(BEYOND_FIGURE) == []
    assert page.evaluate(UNNAMED) == []
    nodes = 10 if name in NAMES else 0
    assert page.evaluate("document.querySelectorAll('.node').length") == nodes
    assert page.evaluate(HIDDEN_SECTIONS) == []
    shot = page.screenshot(tmp_path / f"{name}-{width}.png")
    assert shot.stat().st_size > 20_000


def test_dark_mode_darkens_and_hostile_text_stays_text(browser, pages):
    light = browser.open(pages["full"]).evaluate("getComputedStyle(document.body).backgroundColor")
    page = browser.open(pages["full"], dark=True)
    assert light == "rgb(246, 247, 248)"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 24)"
    assert page.evaluate("document.scripts.length + document.images.length") == 0
    shown = page.evaluate("[...document.querySelectorAll('.text')].map(e => e.textContent)")
    assert demo.HOSTILE in shown


def test_the_harness_notices_problems(browser, tmp_path):
    file = tmp_path / "bad.html"
    file.write_text(
        "<!doctype html><script>console.error('one'); throw new Error('two')</script>"
        "<link rel=stylesheet href='http://127.0.0.1:9/x.css'>",
        encoding="utf-8",
    )
    found = " ".join(browser.open(file).problems)
    assert "one" in found
    assert "two" in found
    assert "request: http://127.0.0.1:9/x.css" in found


def test_replies_are_sorted_without_a_script(browser, pages):
    page = browser.open(pages["full"])
    page.evaluate("document.querySelector('.all-replies').open = true")
    first = """[...document.querySelectorAll('.sortable > .sample')]
        .sort((a, b) => a.getBoundingClientRect().top - b.getBoundingClientRect().top)
        .map(e => e.querySelector('.prompt').textContent)[0]"""
    worst, longest = (
        page.evaluate(f"document.querySelector('.by-{order}').click(); {first}")
        for order in ("lost", "longest")
    )
    replies = demo.full_report().replies
    assert worst == replies[0].prompt
    assert longest == max(replies, key=lambda reply: len(reply.after)).prompt
    assert worst != longest


def test_print_shows_whole_replies_on_white(browser, pages):
    page = browser.open(pages["full"], width=720, dark=True, media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    cut = "[...document.querySelectorAll('.text')].filter(e => e.scrollHeight > e.clientHeight + 1)"
    assert page.evaluate(f"{cut}.length") == 0
