"""Picture of a run's report, for the README and the documents.

`python -m tests.report.picture page.html docs/report.png` shows the parts of the page that tell
most, as they are: the first screen, the pipeline, accuracy, reliability, margins, win rates. With
a third argument, such as `gates`, it is the section of that id alone.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.report.browser import Browser, chromium_path

WIDTH, COLOURS = 1100, 96
#: Hides all that is not for the picture.
PARTS = """(() => {
  const style = document.createElement('style');
  style.textContent = `.stage-table, .versus, .shifts, .notes, nav, footer, #data, #gates,
    #training, #samples, #configuration, #lineage, #versions { display: none !important }`;
  document.head.append(style);
  const drop = (id, words, first = 0) =>
    [...document.querySelectorAll(`#${id} :is(${words})`)].slice(first).forEach(e => e.remove());
  drop('reward-model', '.figures, h3, .findings, .probes, details');
  drop('reward-model', '.intervals', 1);
  drop('policy', '.figures');
  drop('policy', 'h3', 1);
})()"""
#: Hides the other sections, and the head.
SECTION = """document.querySelectorAll('main > section, header.page-head, footer')
  .forEach(e => { if (e.id !== '%s') e.remove(); })"""


def main(page: Path, picture: Path, section: str = "") -> None:
    """Write the picture, in few colours."""
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(chromium_path(), Path(profile))
        try:
            shown = browser.open(page, width=WIDTH, height=200)
            shown.evaluate(SECTION % section if section else PARTS)
            shown.screenshot(picture)
        finally:
            browser.close()
    image = Image.open(picture).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
