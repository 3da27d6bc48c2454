"""Draws the pictures of the docs, and writes the pages of docs/results and README's answers, all
from stored reports and results.

A measuring command with `--out docs/figures` writes its report, NAME.json, and NAME.png. `table
--to docs/results` writes NAME/results.json. conditions.json has the results that have a page, and
says what a report does not: title, command, date, machine, a short reading, and which of its
numbers the overview shows (`results`, texts that `str.format` fills in). A ratio stands there with
its quartiles: `{rows[top2][train_text]}`. This file draws a picture
for each of them, and the pictures of assumed operator times, which need no measurement.

docs/results/archive.md is written by hand: a row for each page that was taken out. Other reports in
docs/figures are read by `scmoe simulate testbed`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from docs.build import one_sequence, readme, trend, two_batches
from docs.build.concepts import CONCEPTS
from experiments.bench import speed_chart
from experiments.bench.inference import gains
from experiments.bench.offload import figure_13
from experiments.bench.overlap import uneven
from experiments.bench.row import rows_of, with_quartiles
from experiments.bench.training import slow_network
from experiments.figures import gradients
from experiments.figures.measured import (
    EXPLAINED,
    PAGES,
    PCIE_OVER,
    Scenario,
    draw_shares,
    draw_speeds,
    module_share,
    read_reports,
)
from experiments.tables.table_chart import draw_equal_time, draw_table
from experiments.tables.table_page import body, heading
from scmoe.config.leaves import ConfigError
from scmoe.report import Report

RESULTS = Path("docs/results")
CONDITIONS = RESULTS / "conditions.json"
OVERVIEW = RESULTS / "README.md"
README = Path("README.md")
GENERATED = re.compile(
    r"(?<=<!-- make figures writes this part -->\n).*(?=<!-- end of this part -->)", re.DOTALL
)
HEADLINE = "overlap-real-iteration-2-ranks-share-0.52-layers-8"  # the report that README shows
FIGURE_8 = PAGES / "figure-8"  # what `make figure8` has measured
# by the first words of a report's name: modules that have `draw` and `tables` of it
BENCHES: dict[str, Any] = {
    "overlap-": speed_chart,
    "uneven-inference-": gains,
    "uneven-": uneven,
    "inference-": gains,
    "train-": slow_network,
    "figure-13": figure_13,
    "gradients": gradients,
}
RECORDS = ("routing",)  # pictures that no code draws any more: their benches are removed
SCREENSHOTS = ("report",)  # of pages in a browser, which no code draws
QUARTILES = (  # names in reports, and of what they are
    ("train_quartiles", "train_speedup"),
    ("forward_quartiles", "forward_speedup"),
    ("over_balanced_quartiles", "over_balanced_train"),
    ("quartiles", "speedup"),
    ("quartiles", "median"),
)
DRAW = {start: bench.draw for start, bench in BENCHES.items()}


def pictures() -> dict[str, Callable[[Path], None]]:
    """Return for the name of each picture of the docs what draws it into a file. Raises
    ConfigError."""
    drawings: dict[str, Callable[[Path], None]] = {
        draw.__name__: draw for draw in (*EXPLAINED.values(), *CONCEPTS)
    }
    for name in readme.read(CONDITIONS):
        if (report := PAGES / f"{name}.json").exists():
            drawings[name] = partial(draw_of(name), readme.read(report))
        elif (table := RESULTS / name / "results.json").exists():
            results = readme.read(table)
            drawings[name] = partial(draw_table, results)
            if len(results["equal_time"]) > 1:
                drawings[f"{name}-equal-time"] = partial(draw_equal_time, results)
    if any(FIGURE_8.glob("*.json")):
        scenarios = read_reports([FIGURE_8])
        drawings |= {
            "figure-1": partial(draw_shares, scenarios),
            "figure-8": partial(draw_speeds, scenarios),
        }
    halves = two_batches.read_reports(PAGES, HEADLINE)
    drawings[two_batches.BATCHES_PAGE] = partial(two_batches.draw, halves)
    longest = one_sequence.read_reports(PAGES)[-1]
    drawings[one_sequence.SEQUENCE_PAGE] = partial(speed_chart.draw, longest)
    drawings[trend.TREND_PAGE] = partial(trend.draw, trend.read_trends(RESULTS))
    return drawings


def draw_of(name: str) -> Callable[[Any, Path], None]:
    """Return what draws a report of this name. Raises ConfigError."""
    kind = next((start for start in DRAW if name.startswith(start)), None)
    if kind is None:
        raise ConfigError(f"{name} is no report that is drawn, allowed: {' | '.join(DRAW)}...")
    return DRAW[kind]


def write_pages(out: Path | None) -> list[Path]:
    """Draw all pictures of the docs into `out`; None: where the docs show them, and write all pages
    of results. Returns the files."""
    files = []
    for name, draw in pictures().items():
        files.append((out or PAGES) / f"{name}.png")
        draw(files[-1])
    for path, text in pages().items() if out is None else ():
        path.write_text(text, encoding="utf-8")
        files.append(path)
    return files


@dataclass(frozen=True)
class Experiment:
    """One experiment. said: title, command, date, machine, group, reading, results. data: what its
    numbers are from."""

    name: str
    page: Path
    said: Mapping[str, Any]
    data: dict[str, Any]


def pages() -> dict[Path, str]:
    """Return the text of each page by its file: one for each experiment, the overview, and
    README."""
    every = experiments()
    texts = {each.page: text_of(each) for each in every}
    answers = readme.short_answers(PAGES, RESULTS, HEADLINE)
    texts[OVERVIEW] = with_part(OVERVIEW, answers + overview(every))
    texts[README] = with_part(README, readme.answers(PAGES, RESULTS, HEADLINE))
    return texts


def with_part(path: Path, part: str) -> str:
    """Return the text of a page with this part between its marks. Raises ConfigError."""
    text, found = GENERATED.subn(lambda _: part, path.read_text(encoding="utf-8"))
    if found != 1:
        raise ConfigError(
            f"{path} has {found} parts that make figures writes. Give it one, between the marks"
            f" that {OVERVIEW} has."
        )
    return text


def experiments() -> list[Experiment]:
    return [
        Experiment(name, *page_and_data(name, said))
        for name, said in readme.read(CONDITIONS).items()
    ]


def page_and_data(name: str, said: dict[str, Any]) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Return the file of an experiment's page, what is said of it, and its data with the paper's
    values."""
    results, page = RESULTS / name / "results.json", RESULTS / f"{name}.md"
    if results.exists():
        return results.with_name("table.md"), *of_a_table(said, readme.read(results))
    if name == FIGURE_8.name:
        scenarios = [scenario_row(*each) for each in read_reports([FIGURE_8]).items()]
        return page, said, {"scenarios": scenarios}
    if name == two_batches.BATCHES_PAGE:
        return page, said, {"reports": two_batches.read_reports(PAGES, HEADLINE)}
    if name == one_sequence.SEQUENCE_PAGE:
        reports = one_sequence.read_reports(PAGES)
        return page, said, {"reports": reports, "longest": reports[-1]}
    if name == trend.TREND_PAGE:
        return page, said, {"trends": trend.read_trends(RESULTS)}
    data = readme.read(PAGES / f"{name}.json")
    if name == "figure-13":
        data["paper"] = figure_13.PAPER_MODELS
    elif "wanted_share" in data and (printed := speed_chart.printed_speedups(data)):
        data["paper"] = printed.rows
    return page, said, data


def of_a_table(said: dict[str, Any], data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a table of the paper says of itself, unless `said` does, and its data, rows also
    by their names."""
    day = data["dates"][-1]
    stated = {"title": data["title"], "command": data["command"], "machine": data["machines"][0]}
    stated["date"] = f"{day[:4]}-{day[4:6]}-{day[6:]}"
    return stated | said, {**data, "by_name": {row["name"]: row for row in data["rows"]}}


def text_of(each: Experiment) -> str:
    """Return an experiment's page. A table of the paper has its title and its conditions in its own
    text."""
    said, up = each.said, "../" * len(each.page.relative_to(RESULTS).parts)
    shown = [
        f"![{words}]({up}figures/{name}.png)" for name, words in said.get("pictures", {}).items()
    ]
    if "table" in each.data:
        parts = [*heading(each.data), said["reading"], *shown, body(each.data)]
    else:
        origin = (
            f"`{said['command']}`, {said['date']}, {said['machine']}{said.get('note', '')}."
            f" [Method]({up[3:]}method.md)."
        )
        tables = [table.markdown() for table in tables_of(each.name, each.data)]
        parts = [f"# {said['title']}", origin, said["reading"], *tables, *shown]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def overview(experiments: Sequence[Experiment]) -> str:
    """Return a table for each group of experiments, with a row for each result, whose name links to
    its page, and links to the others' pages. Columns without any value are left out."""
    columns = {name: f"{{{name}}}" for name in ("ours", "limit", "paper")}
    parts = []
    for group in dict.fromkeys(each.said["group"] for each in experiments):
        rows, others = {}, []
        for each in (each for each in experiments if each.said["group"] == group):
            link = each.page.relative_to(RESULTS)
            data = with_texts(each.data)
            for what, numbers in each.said["results"].items():
                filled = {column: text.format_map(data) for column, text in numbers.items()}
                rows[f"[{what}]({link})"] = filled
            if not each.said["results"]:
                others.append(f"[{each.said['title']}]({link})")
        given = {name for row in rows.values() for name in row}
        used = {name: text for name, text in columns.items() if name in given}
        parts += [f"## {group}", Report("", rows, used, "what").markdown()]
        parts += [f"Also: {', '.join(others)}."] if others else []
    return "\n" + "\n\n".join(part.strip() for part in parts) + "\n\n"


def with_texts(part: Any) -> Any:
    """Return a part of a report with a text beside all quartiles: `train_text` is "1.53 [1.46,
    1.56]"."""
    if isinstance(part, list):
        return [with_texts(each) for each in part]
    if not isinstance(part, dict):
        return part
    result = {key: with_texts(value) for key, value in part.items()}
    for quartiles, value in QUARTILES:
        if quartiles in part and value in part:
            text = with_quartiles(part[value], part[quartiles])
            result[quartiles.replace("quartiles", "text")] = text
    return result


def scenario_row(scenario: Scenario, report: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one hardware scenario, the paper's beside ours."""
    fastest = report["fastest_scmoe"]
    low, median, high = fastest["over"]["forward"]["shared_expert"]
    return {
        "name": scenario.name,
        "share": report["comm_share"],
        "paper_share": scenario.pair_share,
        "module": module_share(report, "forward"),
        "paper_module": scenario.module_share,
        "hidden": rows_of(report)[fastest["row"]].overlap_forward,
        "paper_hidden": scenario.hidden,
        "over": fastest["over"],
        "over_shared": with_quartiles(median, (low, high)),
        "paper_over": {row: scenario.over.get(row, "-") for row in PCIE_OVER},
    }


def tables_of(name: str, data: dict[str, Any]) -> list[Report]:
    """Return the tables of an experiment's page."""
    make = next((make for start, make in TABLE_MAKERS.items() if name.startswith(start)), None)
    return make(data) if make else []


def scenario_tables(data: dict[str, Any]) -> list[Report]:
    over = "{{paper_over[{0}]}}; {{over[forward][{0}][1]:.2f}}, {{over[train][{0}][1]:.2f}}".format
    columns = {
        "share of the pair": "{paper_share:.0%}; {share:.0%}",
        "of the MoE module": "{paper_module:.0%}; {module:.0%}",
        "hidden": "{paper_hidden:.0%}; {hidden:.0%}",
        **{f"over {row}": over(row) for row in PCIE_OVER},
    }
    title = (
        "In each cell the paper's value, then ours; speeds of the faster Pos-2 in inference,"
        " training."
    )
    return [Report(title, {row["name"]: row for row in data["scenarios"]}, columns, "scenario")]


TABLE_MAKERS = {  # by the first words of an experiment's name
    **{start: bench.tables for start, bench in BENCHES.items()},
    "figure-8": scenario_tables,
    two_batches.BATCHES_PAGE: lambda data: two_batches.tables(data["reports"]),
    one_sequence.SEQUENCE_PAGE: lambda data: one_sequence.tables(data["reports"]),
    trend.TREND_PAGE: lambda data: trend.tables(data["trends"]),
}
