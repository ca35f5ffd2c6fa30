"""The documentation's site: it builds without a warning, and asks no other host for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def pages(site: Path) -> dict[str, str]:
    # The page of addresses that do not exist has absolute ones, for it has no place of its own.
    paths = (path for path in site.glob("*.html") if path.name != "404.html")
    return {path.name: path.read_text("utf-8") for path in paths}


def test_every_guide_is_a_page(site):
    guides = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {name.removesuffix(".html") for name in pages(site)} >= guides | {"index", "results"}


def test_no_page_loads_anything_from_another_host(site):
    there = r"""="(?:https?:)?//"""
    loaded = re.compile(
        rf"<(?:script|img|iframe|source)[^>]+src{there}"
        rf"""|<link[^>]+rel="(?:stylesheet|icon|preload|preconnect)"[^>]+href{there}"""
    )
    assert [name for name, text in pages(site).items() if loaded.search(text)] == []


def test_links_lead_to_files_of_the_site(site):
    missing = []
    for name, text in pages(site).items():
        targets = re.findall(r'(?:href|src)="(?!\w+:|#|//)([^"#?]+)', text)
        missing += [f"{name}: {target}" for target in targets if not (site / target).exists()]
    assert missing == []
