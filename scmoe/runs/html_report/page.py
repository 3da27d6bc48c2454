"""The page: one HTML file that loads nothing, runs no script, and shows texts as texts.

Jinja2 escapes every text. Markup is the templates' and that of the drawings alone. The page forbids
scripts and requests by its own policy (Content-Security-Policy), so it can be opened from a mail.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from scmoe.files import replacing
from scmoe.runs.html_report.page_parts import Part, parts_of_runs, parts_of_traces
from scmoe.runs.html_report.result_parts import parts_of_files
from scmoe.runs.html_report.sources import find_sources

LONGEST = 60  # letters of a title that names what was asked for


def write_page(names: Sequence[str], path: Path, last: int, version: str) -> int:
    """Write a report of what the names lead to (sources.find_sources). Returns its size in bytes.

    last: how many of the newest runs of a folder are shown. version: of scmoe. Raises
    ConfigError.
    """
    sources, clean = find_sources(names, last)
    parts = [*parts_of_files(sources), *parts_of_traces(sources), *parts_of_runs(sources, clean)]
    counts = {"run": len(sources.runs), "file": len(sources.files)}
    content = " and ".join(f"{n} {word}{'s' * (n > 1)}" for word, n in counts.items() if n)
    title = ", ".join(clean(Path(name).resolve().name) for name in names) or "runs"
    text = html(title if len(title) <= LONGEST else content, content, parts, version)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path.stat().st_size


def html(title: str, content: str, parts: Sequence[Part], version: str) -> str:
    """Return the page. title: what was asked for. content: what was read, in words."""
    templates = Environment(
        loader=PackageLoader("scmoe.runs.html_report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("page.html")
    date = datetime.now().strftime("%Y-%m-%d %H:%M")
    counts = "" if title == content else content
    return page.render(title=title, content=counts, parts=parts, date=date, version=version)
