"""What a table writes into its folder: results.json, table.md and charts, our values beside the
paper's."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments.bench.speed_chart import blocks_of
from experiments.tables.results import results
from experiments.tables.table_file import Table
from experiments.tables.table_runs import Run
from scmoe.files.writing import write_whole
from scmoe.probes.charts import BLUE, GREEN, ORANGE, PAPER, SKY, SMALL, chart, heading
from scmoe.report import markdown_table
from scmoe.sweeps.jobs import clock

Results = Mapping[str, Any]  # of a table, or a part of them
OURS, SEED = BLUE, SKY
COLORS = (PAPER, ORANGE, OURS, GREEN)
SHORT_NAME = 17  # letters that fit beside a chart on one line
BEYOND = 1.6  # the axis reaches this many times as far as any seed


def write_report(table: Table, scale: str, runs: Sequence[Run], command: str) -> list[Path]:
    """Write the files of a table that has at least one finished run, as far as its runs have come.

    command: the one that makes the table."""
    folder = runs[0].job.study
    found = results(table, scale, runs, command)
    write_whole(folder / "results.json", found)
    (folder / "table.md").write_text(markdown(found), encoding="utf-8")
    draw_differences(found, folder / "chart.png")
    names = ["table.md", "results.json", "chart.png"]
    if len(found["equal_time"]) > 1:  # a speed has been measured
        draw_equal_time(found, folder / "equal_time.png")
        names.append("equal_time.png")
    return [folder / name for name in names]


def markdown(found: Results) -> str:
    """Return a part for each group of rows; a row that belongs to two is shown in both."""
    finished, failed = found["runs"]["finished"], found["runs"]["failed"]
    metric, unit, form = found["metric"], found["unit"], form_of(found["unit"])
    with_unit = f"{metric} {unit}" if unit.startswith("per ") else f"{metric} in {unit}"
    lines = [
        f"# {found['title']}",
        "",
        (
            f"Scale `{found['scale']}`: {found['model']}; {found['data']}, {found['seen']},"
            f" {finished} runs finished, {failed} failed. The metric is {with_unit};"
            f" {found['metrics'][metric]['better']} is better."
        ),
        (
            "Differences are taken seed by seed. p is that of a paired t-test over seeds,"
            f" two-sided, corrected for {found['comparisons']} comparisons by Holm's method; the"
            " intervals are Bonferroni's and hold together at 95 %."
        ),
    ]
    if found["scale"] == "smoke":
        lines[2:2] = [
            (
                "**The numbers of this scale mean nothing.** It shows that every row trains and"
                " writes its files."
            ),
            "",
        ]
    columns = [
        "row",
        "parameters (active)",
        "paper",
        "paper: minus baseline",
        "ours: mean ± std (n)",
    ]
    columns += ["median, range", "ours: minus baseline", "interval", "p (n)"]
    for group in dict.fromkeys(group for row in found["rows"] for group in row["groups"]):
        cells = [_cells(row, metric, form) for row in found["rows"] if group in row["groups"]]
        used = [
            i
            for i, name in enumerate(columns)
            if "paper" not in name or any(row[i] for row in cells)
        ]
        headings, *cells = ([row[i] for i in used] for row in (columns, *cells))
        lines += [
            "",
            f"## {group[0].upper()}{group[1:]}",
            "",
            *markdown_table(headings, cells, numbers=True),
        ]
    lines += [*_other_metrics(found), *_speeds(found), *_equal_time(found), "", *_decisions(found)]
    return "\n".join([*lines, *_origin(found)]) + "\n"


def _cells(row: Results, metric: str, form: str) -> list[str]:
    paper, ours, minus, signed = (
        row["paper"],
        row["ours"],
        row["minus_baseline"],
        form.replace(":", ":+"),
    )
    size = (
        f"{row['params_total'] / 1e6:.2f}M ({row['params_active'] / 1e6:.2f}M)"
        if row["params_total"]
        else ""
    )
    robust = (
        f"{form.format(ours['median'])}, {_numbers(' to ', form, *ours['range'])}"
        if ours["n"]
        else ""
    )
    cells = [row["name"], size, _numbers("", form, paper.get(metric))]
    if minus is None:
        return [*cells, "", _spread(ours, form), robust, "", "", ""]
    interval = _numbers(" to ", signed, minus["low"], minus["high"])
    cells += [_numbers("", signed, paper["difference"]), _spread(ours, form), robust]
    return [*cells, _numbers("", signed, minus["mean"]), interval, _p(minus)]


def _spread(ours: Results, form: str) -> str:
    return f"{_numbers(' ± ', form, ours['mean'], ours['std'])} ({ours['n']})".strip()


def _p(minus: Results) -> str:
    p = minus["p"]
    return f"{'' if p is None else f'{p:.3f} ' if p >= 0.001 else '< 0.001 '}({minus['n']})"


def _numbers(between: str, form: str, *values: float | None) -> str:
    """Return the values that are not None, with `between` between them."""
    return between.join(form.format(value) for value in values if value is not None)


def _other_metrics(found: Results) -> list[str]:
    """Return a table of the metrics that do not decide: in each cell the paper's value, if it
    prints any, and ours."""
    names = list(found["metrics"])[1:]
    if not names:
        return []
    printed = {name for row in found["rows"] for name in row["paper"]}

    def cell(row: Results, name: str) -> str:
        ours, paper = row["others"][name]["ours"], _numbers("", "{:g}", row["paper"].get(name))
        if spread := ours.get("quartiles"):
            own = f"{ours['mean']:.2f} [{_numbers(', ', '{:.2f}', *spread)}]"
        else:
            own = (
                "-"
                if ours["mean"] is None
                else _spread(ours, form_of(found["metrics"][name]["unit"]))
            )
        return f"paper {paper or '-'}; ours {own}" if name in printed else own

    columns = ["row", *(f"{name}, {found['metrics'][name]['unit']}" for name in names)]
    cells = [[row["name"], *(cell(row, name) for name in names)] for row in found["rows"]]
    lines = ["", "## Other metrics", "", *markdown_table(columns, cells, numbers=True)]
    ours = [other["ours"] for row in found["rows"] for other in row["others"].values()]
    for why in dict.fromkeys(own["why"] for own in ours if "why" in own):
        lines += ["", f"A speed without a number: {why}."]
    return lines


def _speeds(found: Results) -> list[str]:
    """Return a sentence for each share of communication: how its speeds were measured."""
    lines = []
    for share, speed in found["speeds"].items():
        blocks = blocks_of(speed)
        lines += [
            "",
            (
                f"Speed-ups at a share of {share} ({speed['comm_share']:.2f} as measured):"
                f" {blocks[0].lower()}{blocks[1:]} over sequential top-2, {speed['compute']}"
                f" compute, {speed['ranks']} ranks, {speed['links']} links, medians of"
                f" {speed['rounds']} rounds, [quartiles]; with all communication hidden"
                f" {speed['limit_train']:.2f} in training and {speed['limit_forward']:.2f} in"
                " inference."
            ),
        ]
    return lines


def _equal_time(found: Results) -> list[str]:
    """Return the table of losses at equal tokens and at equal time."""
    shares = found["equal_time"]
    if not shares:
        return []

    def cell(own: Results) -> str:
        loss, minus = own["loss"], own["minus_baseline"]
        text = "-" if loss["mean"] is None else f"{loss['mean']:.4f} [{own['step']:,}]"
        if minus and minus["mean"] is not None:
            text += f" {minus['mean']:+.4f}, p {_p(minus)}"
        return text

    columns = [
        "equal tokens" if share == "equal_tokens" else f"equal time, share {share}"
        for share in shares
    ]
    names = list(shares["equal_tokens"]["rows"])
    cells = [[name, *(cell(column["rows"][name]) for column in shares.values())] for name in names]
    lines = [
        "",
        "## Quality at equal time",
        "",
        (
            "Validation loss of each row at the time at which the fastest row ends. Times are by"
            " the measured speed-ups of the measured blocks in training, without the sum of the"
            " gradients and the optimizer; p takes them as exact. A slower row is read off its own"
            " curve at the step that it has reached by then, before its learning rate has come down"
            " to its end. In brackets: that step; then the difference to the baseline at the same"
            " time and its corrected p."
        ),
    ]
    if len(shares) == 1:
        lines.append("No speed has been measured at this scale, or the measurement failed.")
    lines += ["", *markdown_table(["row", *columns], cells, numbers=True)]
    if left_out := without_speed(found):
        lines += [
            "",
            f"Left out, as the testbed has no such row to measure: {'; '.join(left_out)}.",
        ]
    return lines


def _decisions(found: Results) -> list[str]:
    """Return a sentence for each compared metric: which differences are decided and which are not."""
    lines = []
    for metric in found["metrics"]:
        decided, open_ = [], []
        for row in found["rows"]:
            minus = (row if metric == found["metric"] else row["others"][metric])["minus_baseline"]
            if minus is not None and minus["decided"]:
                decided.append(
                    f"{row['name']} is {'above' if minus['mean'] > 0 else 'below'}"
                    f" {row['baseline']}"
                )
            elif minus is not None and minus["mean"] is not None:
                open_.append(row["name"])
        if decided or open_:
            sentence = f"{metric}: decided (corrected p < 0.05): {'; '.join(decided) or 'nothing'}."
            lines.append(f"{sentence} Not decided: {'; '.join(open_) or 'nothing'}.")
    return lines


def _origin(found: Results) -> list[str]:
    days = ", ".join(f"{date[:4]}-{date[4:6]}-{date[6:]}" for date in found["dates"])
    machines, torch = ", ".join(found["machines"]), ", ".join(found["torch"])
    commits = ", ".join(commit[:9] for commit in found["git_commits"])
    command = (
        f"`{found['command']}` ({found['config']}), {days}, {clock(found['seconds_of_all_runs'])}"
        " of runs"
    )
    lines = ["", f"{command}, {machines}, torch {torch}, commit {commits}."]
    if taken_from := found.get("taken_from"):  # results of versions in which tables shared runs
        origins = ", ".join(f"{count} from {name}" for name, count in taken_from.items())
        lines += ["", f"Runs of equal configuration that were not made again: {origins}."]
    missing = [
        f"{row['name']}: {len(row['failed'])} failed, {len(row['unfinished'])} to run"
        for row in found["rows"]
        if row["failed"] or row["unfinished"]
    ]
    if missing:
        lines += ["", f"Incomplete: {'; '.join(missing)}."]
    return lines


def draw_differences(found: Results, path: Path) -> None:
    """Draw the differences to the baselines: the paper's, where it prints them, and ours."""
    rows = [row for row in found["rows"] if row["minus_baseline"] is not None]
    papers = _from_the_top([row["paper"]["difference"] for row in rows])
    printed = any(paper is not None for paper in papers.values())
    signed = form_of(found["unit"]).replace(":", ":+")
    with chart(path, 2.4 + 0.5 * len(rows)) as figure:
        panels = figure.subplots(1, 1 + printed, sharey=True, squeeze=False)[0]
        if printed:
            _draw_paper(panels[0], papers, signed)
        panels[-1].set_title(f"Ours, {found['scale']}")
        _draw_ours(panels[-1], _from_the_top([row["minus_baseline"] for row in rows]), signed)
        several = len({row["baseline"] for row in rows}) > 1
        baseline = "each row's baseline" if several else in_paper(rows[0]["baseline"])
        below = f"{found['metric'].replace('_', ' ')} minus\n{baseline},\n{found['unit']}"
        _explain(figure, panels, [row["name"] for row in rows], below, 3)
        side = "left" if found["metrics"][found["metric"]]["better"] == "lower" else "right"
        note = f"{side} is better" + ("; the two scales differ" if printed else "")
        heading(figure, f"{found['title']}\n{note}")


def _from_the_top(values: Sequence[Any]) -> dict[int, Any]:
    """Return the values by their heights in a chart, of which the last one is 1."""
    return dict(zip(range(len(values), 0, -1), values, strict=True))


def _draw_paper(axis: Axes, papers: Mapping[int, float | None], signed: str) -> None:
    axis.set_title("Paper")
    for place, paper in papers.items():
        if paper is not None:
            axis.hlines(place, 0, paper, color=PAPER, linewidth=1.5)
            axis.plot(paper, place, "D", color=PAPER, markersize=7)
            _label(axis, signed.format(paper), paper, place)
    axis.margins(x=0.2)


def _draw_ours(axis: Axes, differences: Mapping[int, Results], signed: str) -> None:
    """Draw a dot for each seed, their mean and its interval; an arrow where that goes on beyond the
    axis."""
    for place, minus in differences.items():
        if minus["mean"] is not None:
            seeds = list(minus["by_seed"].values())
            _draw_mean(axis, minus, place, OURS, "mean", "interval of the mean")
            axis.plot(seeds, [place] * len(seeds), "o", color=SEED, markersize=4, label="one seed")
            _label(axis, signed.format(minus["mean"]), minus["mean"], place)
    edge = BEYOND * max(
        (abs(x) for minus in differences.values() for x in minus["by_seed"].values()), default=0.0
    )
    if edge:
        axis.set_xlim(-edge, edge)
    for place, minus in differences.items():
        for end, x, marker in ((minus["low"], -edge, "<"), (minus["high"], edge, ">")):
            if end is not None and abs(end) > edge:
                axis.plot(x, place, marker, color=OURS, markersize=7, clip_on=False)


def _draw_mean(
    axis: Axes, minus: Results, place: float, color: str, mean: str, interval: str = ""
) -> None:
    """Draw a difference and its interval, with these labels."""
    if minus["low"] is not None:
        axis.hlines(place, minus["low"], minus["high"], color=color, linewidth=2, label=interval)
    axis.plot(minus["mean"], place, "D", color=color, markersize=7, label=mean)


def draw_equal_time(found: Results, path: Path) -> None:
    """Draw each row's difference to its baseline in validation loss: at equal tokens, and at equal
    time by share."""
    columns = found["equal_time"]
    of_rows = columns["equal_tokens"]["rows"]
    names = [name for name, own in of_rows.items() if own["minus_baseline"] is not None]
    with chart(path, 2.0 + 0.7 * len(names)) as figure:
        axis = figure.subplots()
        for i, (share, column) in enumerate(columns.items()):
            label = (
                "equal tokens"
                if share == "equal_tokens"
                else f"equal time, share of communication {share}"
            )
            shift = 0.22 * ((len(columns) - 1) / 2 - i)
            for place, name in _from_the_top(names).items():
                minus = column["rows"][name]["minus_baseline"]
                if minus["mean"] is not None:
                    _draw_mean(axis, minus, place + shift, COLORS[i], label)
        below = (
            "validation loss minus the\nbaseline's at the same time:\nmean and interval; left is"
            " better"
        )
        _explain(figure, [axis], names, below, 1)
        left_out = [f"without a measured speed: {in_paper(name)}" for name in without_speed(found)]
        heading(
            figure,
            "\n".join([f"Quality at equal time, {found['scale']}", found["title"], *left_out]),
        )


def without_speed(found: Results) -> list[str]:
    """Return the rows of a table that its results at equal time leave out."""
    there = found["equal_time"]["equal_tokens"]["rows"]
    return [row["name"] for row in found["rows"] if row["name"] not in there]


def form_of(unit: str) -> str:
    """Return the format of a metric's values: a loss in nats with four decimals, others with two,
    as in the paper."""
    return "{:.4f}" if unit.startswith("nats") else "{:.2f}"


def _explain(
    figure: Any, panels: Sequence[Axes], names: list[str], below: str, columns: int
) -> None:
    """Name the rows at the left, what is drawn below each panel, and the marks in a legend of so
    many columns."""
    words = [in_paper(name) for name in names]
    words = [
        name if len(name) <= SHORT_NAME else name.replace(", ", ",\n").replace(") (", ")\n(")
        for name in words
    ]
    panels[0].set_yticks(range(len(names), 0, -1), words)
    panels[0].set_ylim(0.3, len(names) + 0.9)
    for axis in panels:
        axis.set_xlabel(below)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.xaxis.set_major_formatter(
            lambda x, _: f"{round(x, 9) + 0:g}".replace("-", "\N{MINUS SIGN}")
        )
        axis.grid(axis="x")
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    handles, labels = panels[-1].get_legend_handles_labels()
    if marks := dict(zip(labels, handles, strict=True)):
        figure.legend(marks.values(), marks.keys(), loc="outside lower left", ncols=columns)


def in_paper(name: str) -> str:
    """Return a row's name as the paper writes it."""
    name = re.sub(r"(?<=\w )(Pos-\d)(?! in)", r"(\1)", name, count=1)
    return re.sub(r"^top-", "Standard top-", name).replace("shared-expert", "Shared-expert")


def _label(axis: Axes, text: str, x: float, y: float) -> None:
    behind = {
        "facecolor": "white",
        "edgecolor": "none",
        "pad": 0.5,
    }  # the line at 0 may cross a figure
    place: dict[str, Any] = {
        "textcoords": "offset points",
        "ha": "center",
        "fontsize": SMALL,
        "color": "#444444",
    }
    axis.annotate(text, (x, y), (0, 7), bbox=behind, **place)
