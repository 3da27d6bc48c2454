"""The page: one HTML file that loads nothing, runs no script, and shows texts as texts.

Jinja2 escapes every text; markup is the templates' alone. The page forbids scripts and requests by
its own policy (Content-Security-Policy), so it can be opened from a mail.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from scmoe.config.leaves import ConfigError
from scmoe.files import replacing
from scmoe.report import Report
from scmoe.runs.html_report.run_sections import sections_of_runs
from scmoe.runs.html_report.section import Section
from scmoe.runs.html_report.sources import find_sources

LONGEST = 60  # letters of a title that names what was asked for
SENTENCE = 40  # letters of a cell that needs a line of its own on a phone
CARD_COLUMNS = 8  # columns that fit on a card


def write_page(names: Sequence[str], path: Path, last: int, version: str) -> int:
    """Write a report of what the names lead to (sources.find_sources). Returns its size in bytes.

    last: how many of the newest runs of a folder are shown. version: of scmoe. Raises
    ConfigError.
    """
    sources, clean = find_sources(names, last)
    sections = [Section("Results", "results"), *sources.reports] if sources.reports else []
    for i, section in enumerate(sources.reports, 1):
        section.anchor = f"report-{i}"
    sections += sections_of_runs(sources.runs, clean)
    counts = {"run": len(sources.runs), "report": len(sources.reports)}
    content = " and ".join(f"{n} {word}{'s' * (n > 1)}" for word, n in counts.items() if n)
    title = ", ".join(clean(Path(name).resolve().name) for name in names) or "runs"
    text = html(title if len(title) <= LONGEST else content, content, sections, version)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--to is {str(path)!r}, which cannot be written: {error.strerror}. Give another file."
        ) from error
    return path.stat().st_size


def html(title: str, content: str, sections: Sequence[Section], version: str) -> str:
    """Return the page. title: what was asked for. content: what was read, in words."""
    templates = Environment(
        loader=PackageLoader("scmoe.runs.html_report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"wordy": wordy, "as_cards": as_cards}
    page = templates.get_template("page.html")
    date = datetime.now().strftime("%Y-%m-%d %H:%M")
    counts = "" if title == content else content
    return page.render(title=title, content=counts, sections=sections, date=date, version=version)


def wordy(table: Report) -> list[int]:
    """Return the columns of a table that have words, not numbers, which stand at the right."""
    columns = [*zip(*table.cells(), strict=True)]
    return [i for i, column in enumerate(columns) if any(map(is_words, column))]


def is_words(cell: str) -> bool:
    return sum(map(str.isalpha, cell)) > sum(map(str.isdigit, cell))


def as_cards(table: Report) -> bool:
    """Return whether a phone shows each row of a table as a card: few columns, some of words, or a
    sentence in a cell. Others scroll sideways."""
    has_sentence = any(len(cell) > SENTENCE for row in table.cells() for cell in row[1:])
    return has_sentence or (len(table.columns) <= CARD_COLUMNS and wordy(table) not in ([], [0]))
