"""This command records what a terminal shows of a command, as an SVG: `python -m tests.terminal
OUT.svg make train`.

The command runs in a pseudo-terminal, so it prints as it does for a person: with colours and
progress bars. The picture shows the lines as they stand at the end, from the first one that begins
with FROM (--from; without it, from the first). A font is named, none is loaded, so the picture
needs no network.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import sys
from fcntl import ioctl
from html import unescape
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from struct import pack
from termios import TIOCSWINSZ

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

COLUMNS, ROWS = 80, 50
FIRST = itemgetter(0)
CODES = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\r|\n|\x1b.|[^\x1b\r\n]")
DARK = (16, 24, 32), (222, 226, 230)  # background, letters
COLORS = [
    (60, 70, 80),
    (255, 123, 114),
    (86, 211, 100),
    (240, 180, 80),
    (110, 170, 255),
    (215, 150, 235),
    (86, 200, 220),
]
THEME = TerminalTheme(*DARK, [*COLORS, (222, 226, 230)], [*COLORS, (255, 255, 255)])
FONT = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
SVG = f"""<svg class="rich-terminal" viewBox="0 0 {{width}} {{height}}" \
xmlns="http://www.w3.org/2000/svg">
<style>
.{{unique_id}}-matrix {{{{ font-family: {FONT}; font-size: {{char_height}}px; \
line-height: {{line_height}}px; }}}}
{{styles}}
</style>
<defs><clipPath id="{{unique_id}}-clip-terminal">
<rect x="0" y="0" width="{{terminal_width}}" height="{{terminal_height}}" />\
</clipPath>{{lines}}</defs>
{{chrome}}
<g transform="translate({{terminal_x}}, {{terminal_y}})" \
clip-path="url(#{{unique_id}}-clip-terminal)">
{{backgrounds}}<g class="{{unique_id}}-matrix">{{matrix}}</g></g></svg>
"""


def record(command: list[str]) -> str:
    """Run the command in a terminal of COLUMNS and return all that it printed. Raises SystemExit if
    it fails."""
    printed = bytearray()

    def keep(descriptor: int) -> bytes:
        data = os.read(descriptor, 65536)
        printed.extend(data)
        return data

    for name in ("MAKEFLAGS", "MAKELEVEL"):  # a make inside make names its folder
        os.environ.pop(name, None)
    os.environ.update(COLUMNS=str(COLUMNS), LINES=str(ROWS), TERM="xterm-256color")
    sys.stdout.flush()
    pid, descriptor = pty.fork()
    if pid == 0:
        os.execvp(command[0], command)
    ioctl(descriptor, TIOCSWINSZ, pack("HHHH", ROWS, COLUMNS, 0, 0))
    try:
        while keep(descriptor):
            pass
    except OSError:  # on Linux the last process has closed the terminal
        pass
    if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SystemExit(
            f"{' '.join(command)} failed with {code}:\n{printed.decode(errors='replace')[-2000:]}"
        )
    return printed.decode(errors="replace")


def lines_of(printed: str) -> list[Text]:
    """Return the lines that a terminal shows at the end: what was written over is gone."""
    screen: list[list[tuple[str, str]]] = [
        []
    ]  # of each column the codes of its colours, and its letter
    row = column = 0
    style = ""
    for found in CODES.finditer(printed):
        letter, (numbers, code) = found[0], found.groups()
        if code == "m":
            style = "" if numbers in ("", "0") else style + letter
        elif code in ("A", "B"):
            row = max(0, row + (-1 if code == "A" else 1) * int(numbers or 1))
        elif code == "K":
            del screen[row][0 if numbers == "2" else column :]
        elif letter == "\n":
            row += 1
        elif letter == "\r":
            column = 0
        elif not letter.startswith("\x1b"):
            line = screen[row]
            line += [("", " ")] * (column + 1 - len(line))
            line[column] = style, letter
            column += 1
        screen += [[] for _ in range(row + 1 - len(screen))]
    return [
        Text.from_ansi(
            "".join(
                f"{style}{''.join(c for _, c in cells)}\x1b[0m"
                for style, cells in groupby(line, FIRST)
            )
        )
        for line in screen
    ]


def draw(lines: list[Text], out: Path) -> None:
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    for line in lines:
        line.rstrip()
        for part in line.divide(
            range(COLUMNS, len(line), COLUMNS)
        ):  # a terminal breaks lines anywhere
            console.print(part, no_wrap=True, highlight=False)
    svg = console.export_svg(title="scmoe", theme=THEME, code_format=SVG, unique_id="scmoe")
    out.write_text(re.sub(r"<text [^>]*>\s*</text>\n?", "", svg), encoding="utf-8")  # ends of lines


def shown_in(svg: str) -> list[str]:
    """Return the lines of text that a picture of `draw` shows."""
    lines: dict[str, str] = {}
    for y, text in re.findall(r'<text [^>]*\by="([\d.]+)"[^>]*>([^<]*)</text>', svg):
        lines[y] = lines.get(y, "") + unescape(text).replace("\xa0", " ")
    return list(lines.values())


def summary_rows(lines: list[str]) -> list[str]:
    """Return the names of the rows of a run's summary, among the lines of a terminal. A name ends
    at two spaces."""
    first = next(i for i, line in enumerate(lines) if "─ run finished ─" in line)
    rows = [line.removeprefix("│ ") for line in lines[first:] if line.startswith("│ ")]
    return [row.partition("  ")[0] for row in rows if not row.startswith(" ")]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--from", dest="start", default="", help="words at the beginning of the first line shown"
    )
    options.add_argument("out", type=Path, help="the SVG")
    options.add_argument("command", nargs=argparse.REMAINDER, help="what is run")
    given = options.parse_args()
    lines = lines_of(record(given.command))
    while lines and not lines[-1].plain.strip():
        lines.pop()
    first = next(i for i, line in enumerate(lines) if line.plain.startswith(given.start))
    skipped = [Text(f"[the first {first} lines are left out]", style="italic")] if first else []
    draw([Text("$ " + " ".join(given.command), style="bold"), *skipped, *lines[first:]], given.out)
    print(f"{given.out}: {len(lines) - first} of {len(lines)} lines")


if __name__ == "__main__":
    main()
