"""A table's page: what results.json holds, as Markdown."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from experiments.bench.speed_chart import blocks_of
from experiments.tables.equivalence import interval_of_answer
from experiments.tables.seed_statistics import seeds_needed
from scmoe.report import markdown_table
from scmoe.sweeps.jobs import clock

Results = Mapping[str, Any]  # of a table, or a part of them
TABLE_COLUMNS = (
    "row",
    "parameters (active)",
    "paper",
    "paper: minus baseline",
    "ours: mean ± std (n)",
    "ours: minus baseline",
    "interval",
    "p (n)",
)
FIRST_OF_DIFFERENCES = TABLE_COLUMNS.index("ours: minus baseline")


def markdown(results: Results) -> str:
    """Return the whole page."""
    return "\n\n".join([*heading(results), body(results)])


def heading(results: Results) -> list[str]:
    """Return the title, and what a reader must know before any number."""
    parts = [f"# {results['title']}"]
    if results["scale"] == "smoke":
        parts.append(
            "**The numbers of this scale mean nothing.** It shows that every row trains and writes"
            " its files."
        )
    return [*parts, *_too_few_seeds(results)]


def _too_few_seeds(results: Results) -> list[str]:
    """Return how many seeds the paper's differences need, if there are fewer."""
    compared = [
        row
        for row in results["rows"]
        if row["minus_baseline"] and row["minus_baseline"]["std"] and row["paper"]["difference"]
    ]
    if not compared:
        return []
    variance = fmean(row["minus_baseline"]["std"] ** 2 for row in compared)
    std = variance**0.5
    sizes = sorted(abs(row["paper"]["difference"]) for row in compared)
    comparisons = results["comparisons"]
    most = seeds_needed(std, sizes[0], comparisons)
    least = seeds_needed(std, sizes[-1], comparisons)
    seeds = min(row["minus_baseline"]["n"] for row in compared)
    if seeds >= most:
        return []
    form = value_format(results["unit"])
    unit = f" {results['unit']}".removesuffix(" per token")
    printed = _numbers(" to ", form, sizes[0], sizes[-1])
    sentence = (
        f"**Too few seeds to see the paper's differences**, {printed}{unit}: 80 % power"
        f" takes {least:,} to {most:,} seeds a row; there are {seeds} (a difference's standard"
        f" deviation: {form.format(std)}{unit})."
    )
    return [sentence]


def body(results: Results) -> str:
    """Return the rest: a part for each group of rows; a row that belongs to two is in both."""
    finished = results["runs"]["finished"]
    failed = results["runs"]["failed"]
    metric = results["metric"]
    unit = results["unit"]
    form = value_format(unit)
    with_unit = f"{metric} {unit}" if unit.startswith("per ") else f"{metric} in {unit}"
    lines = [
        (
            f"Scale `{results['scale']}`: {results['model']}; {results['data']}, {results['seen']},"
            f" {finished} runs finished, {failed} failed. The metric is {with_unit};"
            f" {results['metrics'][metric]['better']} is better."
        )
    ]
    if "decision" not in results:
        lines.append(
            f"Differences are paired by seed; p (t-test) is corrected for {results['comparisons']}"
            " comparisons by Holm, 95 % intervals by Bonferroni."
        )
    for group in dict.fromkeys(group for row in results["rows"] for group in row["groups"]):
        rows = [row for row in results["rows"] if group in row["groups"]]
        lines += ["", f"## {group[0].upper()}{group[1:]}", "", *_group(rows, metric, form)]
    if "decision" in results:
        lines += decision_part(results["decision"], form)
    lines += [*_other_metrics(results), *_speeds(results), *_equal_time(results)]
    return "\n".join([*lines, "", *_decisions(results), *_origin(results)]) + "\n"


def _group(rows: Sequence[Results], metric: str, form: str) -> list[str]:
    """Return the table of some rows. Columns of the paper and of differences without any value are
    left out."""
    cells = [_cells(row, metric, form) for row in rows]
    compared = any(row["minus_baseline"] is not None for row in rows)
    columns = TABLE_COLUMNS if compared else TABLE_COLUMNS[:FIRST_OF_DIFFERENCES]
    used = [
        i
        for i, heading in enumerate(columns)
        if "paper" not in heading or any(row[i] for row in cells)
    ]
    headings = [TABLE_COLUMNS[i] for i in used]
    return markdown_table(headings, [[row[i] for i in used] for row in cells], numbers=True)


def _cells(row: Results, metric: str, form: str) -> list[str]:
    """Return a row's cells, one for each of TABLE_COLUMNS. form: of the metric's values."""
    paper = row["paper"]
    ours = row["ours"]
    minus = row["minus_baseline"]
    signed = form.replace(":", ":+")
    size = ""
    if row["params_total"]:
        size = f"{row['params_total'] / 1e6:.2f}M ({row['params_active'] / 1e6:.2f}M)"
    cells = [row["name"], size, _numbers("", form, paper.get(metric))]
    if minus is None:
        return [*cells, "", _spread(ours, form), "", "", ""]
    interval = _numbers(" to ", signed, minus["low"], minus["high"])
    cells += [_numbers("", signed, paper["difference"]), _spread(ours, form)]
    return [*cells, _numbers("", signed, minus["mean"]), interval, _p(minus)]


def _spread(ours: Results, form: str) -> str:
    """Return mean, deviation and number of values."""
    return f"{_numbers(' ± ', form, ours['mean'], ours['std'])} ({ours['n']})".strip()


def _p(minus: Results) -> str:
    """Return p and the number of pairs."""
    p, pairs = minus["p"], f"({minus['n']})"
    if p is None:
        return pairs
    return f"{p:.3f} {pairs}" if p >= 0.001 else f"< 0.001 {pairs}"


def _numbers(between: str, form: str, *values: float | None) -> str:
    """Return the values that are not None, with `between` between them."""
    return between.join(form.format(value) for value in values if value is not None)


def decision_part(decision: Results, form: str) -> list[str]:
    """Return the table of a registered experiment's answers. form: of the metric's values."""
    signed = form.replace(":", ":+")
    looks = ", ".join(map(str, decision["looks"]))
    reached = ", ".join(map(str, decision["reached"])) or "none"
    cells = []
    for pair, tested in decision["rows"].items():
        numbers = [""] * 4
        if tested["n"]:
            numbers = [
                signed.format(tested["difference"]),
                _numbers(" to ", signed, *interval_of_answer(tested)),
                f"{_four_digits(tested['tost_p'])} ({tested['tost_level']:.4f})",
                f"{_four_digits(tested['p'])} ({tested['level']:.4f})",
            ]
        cells.append([pair, tested["answer"], *numbers, str(tested["n"])])
    columns = (
        "pair",
        "answer",
        "difference",
        "interval",
        "p of equal (its level)",
        "p of different (its level)",
        "seeds a row",
    )
    return [
        "",
        "## Answers",
        "",
        (
            f"Two rows are equal if they differ by less than {decision['margin']:g}: two one-sided"
            " tests. They are different if a two-sided test says so. Both are Welch's, unpaired, at"
            f" looks of {looks} seeds a row (reached: {reached}), each with its own level, 0.05 in"
            " all. The interval is that of the test that has answered: it lies within the margin if"
            " rows are equal, and excludes 0 if they are different. There is no correction for the"
            " number of pairs."
        ),
        "",
        *markdown_table(columns, cells, numbers=True),
    ]


def _four_digits(p: float) -> str:
    return f"{p:.4f}" if p >= 0.0001 else "< 0.0001"


def _other_metrics(results: Results) -> list[str]:
    """Return a table of the metrics that do not decide and that a row has: in each cell the paper's
    value, if it prints any, and ours."""
    names = [
        name
        for name in list(results["metrics"])[1:]
        if any(row["others"][name]["ours"]["mean"] is not None for row in results["rows"])
    ]
    printed = {name for row in results["rows"] for name in row["paper"]}

    def cell(row: Results, name: str) -> str:
        ours = row["others"][name]["ours"]
        if quartiles := ours.get("quartiles"):
            text = f"{ours['mean']:.2f} [{_numbers(', ', '{:.2f}', *quartiles)}]"
        elif ours["mean"] is None:
            text = "-"
        else:
            text = _spread(ours, value_format(results["metrics"][name]["unit"]))
        paper = _numbers("", "{:g}", row["paper"].get(name))
        return f"{paper or '-'}; {text}" if name in printed else text

    def column(name: str) -> str:
        both = " (paper; ours)" if name in printed else ""
        return f"{name}, {results['metrics'][name]['unit']}{both}"

    lines = []
    if names:
        columns = ["row", *map(column, names)]
        cells = [[row["name"], *(cell(row, name) for name in names)] for row in results["rows"]]
        lines = ["", "## Other metrics", "", *markdown_table(columns, cells, numbers=True)]
    ours = [other["ours"] for row in results["rows"] for other in row["others"].values()]
    for why in dict.fromkeys(speed["why"] for speed in ours if "why" in speed):
        lines += ["", f"A speed without a number: {why}."]
    return lines


def _speeds(results: Results) -> list[str]:
    """Return a sentence for each share of communication: how its speeds were measured."""
    lines = []
    for share, speed in results["speeds"].items():
        blocks = blocks_of(speed)
        rival = ""
        if "top2_in_halves" in speed:
            train, forward = speed["top2_in_halves"]
            rival = f" Top-2 with two batches in flight has {train:.2f} and {forward:.2f}."
        lines += [
            "",
            (
                f"Speed-ups at a share of {share} ({speed['comm_share']:.2f} as measured):"
                f" {blocks[0].lower()}{blocks[1:]} over sequential top-2, {speed['compute']}"
                f" compute, {speed['ranks']} ranks, {speed['links']} links, {speed['rounds']}"
                f" rounds; limit {speed['limit_train']:.2f} in training and"
                f" {speed['limit_forward']:.2f} in inference.{rival}"
            ),
        ]
    return lines


def _equal_time(results: Results) -> list[str]:
    """Return the table of losses at equal tokens and at equal time."""
    shares = results["equal_time"]
    if not shares:
        return []

    def cell(row: Results) -> str:
        loss, minus = row["loss"], row["minus_baseline"]
        text = "-" if loss["mean"] is None else f"{loss['mean']:.4f} [{row['step']:,}]"
        if minus and minus["mean"] is not None:
            text += f" {minus['mean']:+.4f}, p {_p(minus)}"
            if spread := minus.get("with_speeds"):
                text += f", {spread[0]:+.4f} to {spread[1]:+.4f}"
        return text

    columns = [
        "equal tokens" if share == "equal_tokens" else f"equal time, share {share}"
        for share in shares
    ]
    names = list(shares["equal_tokens"]["rows"])
    rows = shares["equal_tokens"]["rows"].values()
    compared = sum(row["minus_baseline"] is not None for row in rows)
    cells = [[name, *(cell(column["rows"][name]) for column in shares.values())] for name in names]
    lines = [
        "",
        "## Quality at equal time",
        "",
        (
            "Validation loss when the fastest row ends, by the training speed-ups of"
            f" {_step_of_speeds(results)}. {_way_of_speeds(shares)} A slower row is read off its"
            " own curve at the step in brackets, before its learning rate has decayed. Then follow"
            f" the difference to the baseline and p, corrected for the {compared} differences of a"
            " column, which takes speeds as exact"
            f"{_spread_of_speeds(shares)}."
        ),
    ]
    if len(shares) == 1:
        lines.append("No speed has been measured at this scale, or the measurement failed.")
    lines += ["", *markdown_table(["row", *columns], cells, numbers=True)]
    if left_out := without_speed(results):
        lines += [
            "",
            f"Left out, as the testbed has no such row to measure: {'; '.join(left_out)}.",
        ]
    return lines


def _decisions(results: Results) -> list[str]:
    """Return a sentence for each compared metric with decided differences, and one for all
    others."""
    lines = []
    undecided = []
    for metric in results["metrics"]:
        decided = []
        compared = False
        for row in results["rows"]:
            minus = (row if metric == results["metric"] else row["others"][metric])[
                "minus_baseline"
            ]
            if minus is not None and minus["decided"]:
                decided.append(
                    f"{row['name']} is {'above' if minus['mean'] > 0 else 'below'}"
                    f" {row['baseline']}"
                )
            elif minus is not None and minus["mean"] is not None:
                compared = True
        if decided:
            lines.append(f"{metric}: decided (corrected p < 0.05): {'; '.join(decided)}.")
        elif compared:
            undecided.append(metric)
    if undecided:
        lines.append(f"Nothing is decided in: {'; '.join(undecided)}.")
    return lines


def _origin(results: Results) -> list[str]:
    """Return the command, the dates and the machines of a table, and the runs that it lacks."""
    days = ", ".join(f"{date[:4]}-{date[4:6]}-{date[6:]}" for date in results["dates"])
    machines, torch = ", ".join(results["machines"]), ", ".join(results["torch"])
    commits = ", ".join(commit[:9] for commit in results["git_commits"])
    time = clock(results["seconds_of_all_runs"])
    command = f"`{results['command']}` ({results['config']}), {days}, {time} of runs"
    lines = ["", f"{command}, {machines}, torch {torch}, commit {commits}."]
    if taken_from := results.get("taken_from"):  # results of versions in which tables shared runs
        origins = ", ".join(f"{count} from {name}" for name, count in taken_from.items())
        lines += ["", f"Reused runs of equal configuration: {origins}."]
    missing = [
        f"{row['name']}: {len(row['failed'])} failed, {len(row['unfinished'])} to run"
        for row in results["rows"]
        if row["failed"] or row["unfinished"]
    ]
    if missing:
        lines += ["", f"Incomplete: {'; '.join(missing)}."]
    return lines


def _way_of_speeds(shares: Results) -> str:
    """Return in a sentence which schedules the speeds are of. The kept results of Tables 2
    and 4 have no rival of sequential top-2."""
    if any(column.get("two_batches") for column in shares.values()):
        return "Each row has the faster of one and two batches in flight, in one chunk."
    return "Rows have one batch in flight, and top-2 is sequential."


def _spread_of_speeds(shares: Results) -> str:
    """Return what an interval is, where there is one. Kept results of earlier tables have none."""
    columns = [column for share, column in shares.items() if share != "equal_tokens"]
    rows = [row for column in columns for row in column["rows"].values()]
    if any("with_speeds" in (row["minus_baseline"] or {}) for row in rows):
        return "; then the interval with both speeds at those quartiles that widen it"
    return ""


def _step_of_speeds(results: Results) -> str:
    """Return in words whose speed was measured."""
    if any(speed["level"] == "iteration" for speed in results["speeds"].values()):
        return "a training step of blocks, with the sum of the gradients and the update"
    return "blocks without the sum of the gradients"


def without_speed(results: Results) -> list[str]:
    """Return the rows of a table that its results at equal time leave out."""
    there = results["equal_time"]["equal_tokens"]["rows"]
    return [row["name"] for row in results["rows"] if row["name"] not in there]


def value_format(unit: str) -> str:
    """Return the format of a metric's values: a loss in nats with four decimals, others with two,
    as in the paper."""
    return "{:.4f}" if unit.startswith("nats") else "{:.2f}"
