"""The page of `scmoe report` in a browser: its pictures are there, the console has no error, and at
390 pixels nothing is wider than the screen.

Needs Debian's package chromium. The page runs no script, so a copy whose policy allows one measures
itself. It stands in a frame of 390 pixels, since a window of Chromium has at least 500.
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from scmoe import __version__
from scmoe.runs.html_report.page import write_page
from tests.support import reported

pytest.importorskip("matplotlib")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.smoke,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian's package)"),
]
POLICY = "style-src 'unsafe-inline'"
MEASURE = """<script>
const boxes = name => [...document.querySelectorAll(name)].map(e => e.getBoundingClientRect());
const seen = [...document.querySelectorAll("figure img")];
parent.document.body.dataset.seen = JSON.stringify({
  screen: innerWidth, page: document.documentElement.scrollWidth, all: seen.length,
  whole: seen.filter(image => image.complete && image.naturalWidth > 0).length,
  wide: boxes("figure img").filter(box => box.width > 380 && box.right <= innerWidth).length,
  paper: getComputedStyle(document.body).backgroundColor});
</script></body>"""


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page. It has a profile of its own, so that a browser at work is no obstacle."""
    assert CHROMIUM is not None
    profile = page.parent / "profile"
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command = [CHROMIUM, *quiet, "--hide-scrollbars", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_the_page_in_a_browser(tmp_path):
    run = reported.write_run(tmp_path / "runs")
    names = [str(run)]
    for name in ("table", "speeds", "advice"):
        names.append(str(reported.write_json(tmp_path / f"{name}.json", getattr(reported, name)())))
    page = tmp_path / "report.html"
    write_page(names, page, 12, __version__)
    text = page.read_text(encoding="utf-8")
    assert POLICY in text and "</body>" in text
    measured = tmp_path / "measured.html"
    allowed = text.replace(POLICY, f"{POLICY}; script-src 'unsafe-inline'")
    copy = html.escape(allowed.replace("</body>", MEASURE))
    frame = f'<body><iframe style="width: 390px; height: 800px; border: 0" srcdoc="{copy}">'
    measured.write_text(f"<!doctype html>{frame}</iframe></body>", encoding="utf-8")
    papers = set()
    for scheme in (1, 0):  # dark, light
        seen_as = f"--blink-settings=preferredColorScheme={scheme}"
        dom = browse(measured, seen_as, "--enable-logging=stderr", "--dump-dom")
        assert "CONSOLE" not in dom.stderr, dom.stderr
        found = re.search(r'data-seen="([^"]*)"', dom.stdout)
        assert found is not None
        seen = json.loads(html.unescape(found[1]))
        assert seen["screen"] == 390 and seen["page"] <= 390, seen
        assert seen["whole"] == seen["wide"] == seen["all"] == 3, seen
        papers.add(seen["paper"])
    assert len(papers) == 2
