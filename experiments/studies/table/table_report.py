"""What a table writes into its folder: results.json, table.md and charts, our values beside the paper's."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scmoe.experiments.studies.progress import clock
from scmoe.experiments.studies.table.chart import draw_differences, draw_equal_time, form_of, without_speed
from scmoe.experiments.studies.table.results import results
from scmoe.experiments.studies.table.rows import Table
from scmoe.experiments.studies.table.statistics import FAR_DEVIATIONS, FAR_SHARE, POWER, rank_correlation
from scmoe.experiments.studies.table.table_runs import Run


def write_report(table: Table, scale: str, runs: Sequence[Run], command: str) -> list[Path]:
    """Write the files of a table that has at least one finished run, as far as its runs have come.

    command: the one that makes the table."""
    folder = runs[0].job.study
    found = results(table, scale, runs, command)
    (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "table.md").write_text(markdown(found))
    draw_differences(found, folder / "chart.png")
    names = ["table.md", "results.json", "chart.png"]
    if len(found["equal_time"]) > 1:  # a speed has been measured
        draw_equal_time(found, folder / "equal_time.png")
        names.append("equal_time.png")
    return [folder / name for name in names]


def markdown(found: Mapping[str, Any]) -> str:
    """Return a part for each group of rows; a row that belongs to two is shown in both."""
    finished, failed = found["runs"]["finished"], found["runs"]["failed"]
    head = "row | parameters (active) | paper | paper: minus baseline | ours: mean ± std (n) | median, range, far"
    head += " | ours: minus baseline | interval | p (n)"
    m, form = found["comparisons"], form_of(found["unit"])
    lines = [
        f"# {found['title']}",
        "",
        f"Scale `{found['scale']}`: {found['model']}; {found['data']}, {found['seen']}, {finished} runs finished, "
        f"{failed} failed. The metric is {_with_unit(found)}; {_better(found)}.",
        f"Differences are taken seed by seed. p is that of a paired t-test over seeds, two-sided, corrected for {m} "
        f"comparisons by Holm's method; the intervals are Bonferroni's and hold together at 95 %. far: values further "
        f"than {FAR_DEVIATIONS} median absolute deviations and {100 * FAR_SHARE:g} % from their row's median.",
    ]
    for group in dict.fromkeys(group for row in found["rows"] for group in row["groups"]):
        lines += ["", f"## {group[0].upper()}{group[1:]}", "", f"| {head} |", "| --- |" + " ---: |" * 8]
        lines += [_line(row, found["metric"], form) for row in found["rows"] if group in row["groups"]]
    lines += [*_other_metrics(found), *_speeds(found), *_equal_time(found), "", *_decisions(found)]
    if power := found["power"]:
        needed = [
            f"a difference of {d} needs {n or 'more than 10,000'} seeds" for d, n in power["seeds_needed"].items()
        ]
        pooled, largest = form.format(power["pooled_std"]), form.format(power["largest_std"])
        lines += [
            "",
            f"Power: differences of this spread (standard deviation {pooled} over all rows, at most {largest}) need "
            f"this many seeds to be found with probability {POWER:g}: {', '.join(needed)}. These are the paper's "
            "smallest and largest difference.",
        ]
    lines += [*_order(found), *_origin(found)]
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any], metric: str, form: str) -> str:
    paper, ours, minus = row["paper"], row["ours"], row["minus_baseline"]
    size = f"{row['params_total'] / 1e6:.2f}M ({row['params_active'] / 1e6:.2f}M)" if row["params_total"] else ""
    signed = form.replace(":", ":+")
    difference = "" if minus is None else _numbers("", signed, paper["difference"])
    cells = [row["name"], size, _numbers("", form, paper.get(metric)), difference]
    cells += [_spread(ours, form), _robust(ours, form)]
    if minus is None:
        return f"| {' | '.join([*cells, '', '', ''])} |"
    interval = _numbers(" to ", signed, minus["low"], minus["high"])
    return f"| {' | '.join([*cells, _numbers('', signed, minus['mean']), interval, _p(minus)])} |"


def _spread(ours: Mapping[str, Any], form: str) -> str:
    return f"{_numbers(' ± ', form, ours['mean'], ours['std'])} ({ours['n']})".strip()


def _robust(ours: Mapping[str, Any], form: str) -> str:
    if not ours["n"]:
        return ""
    return f"{form.format(ours['median'])}, {_numbers(' to ', form, *ours['range'])}, {ours['far']}"


def _p(minus: Mapping[str, Any]) -> str:
    p = minus["p"]
    return f"{'' if p is None else f'{p:.3f} ' if p >= 0.001 else '< 0.001 '}({minus['n']})"


def _numbers(between: str, form: str, *values: float | None) -> str:
    """Return the values that are not None, with `between` between them."""
    return between.join(form.format(value) for value in values if value is not None)


def _with_unit(found: Mapping[str, Any]) -> str:
    metric, unit = found["metric"], found["unit"]
    return f"{metric} {unit}" if unit.startswith("per ") else f"{metric} in {unit}"


def _better(found: Mapping[str, Any]) -> str:
    return f"{found['metrics'][found['metric']]['better']} is better"


def _other_metrics(found: Mapping[str, Any]) -> list[str]:
    """Return a table of the metrics that do not decide, the paper's value and ours in each cell."""
    names = list(found["metrics"])[1:]
    if not names:
        return []
    units = [f"{name}, {found['metrics'][name]['unit']}" for name in names]
    lines = ["", "## Other metrics", "", f"| row | {' | '.join(units)} |", "| --- |" + " ---: |" * len(names)]
    for row in found["rows"]:
        cells = []
        for name in names:
            paper, ours = row["paper"].get(name), row["others"][name]["ours"]
            spread = ours.get("quartiles") or ()
            own = f"{ours['mean']:.2f} [{_numbers(', ', '{:.2f}', *spread)}]" if spread else ""
            if not spread and ours["mean"] is not None:
                own = _spread(ours, form_of(found["metrics"][name]["unit"]))
            cells.append(f"paper {_numbers('', '{:g}', paper) or '-'}; ours {own or '-'}")
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    whys = {
        own["ours"]["why"]: name for row in found["rows"] for name, own in row["others"].items() if "why" in own["ours"]
    }
    return [*lines, *(line for why in whys for line in ("", f"A speed without a number: {why}."))]


def _speeds(found: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each share of communication: how its speeds were measured."""
    lines = []
    for share, speed in found["speeds"].items():
        lines += [
            "",
            f"Speed-ups at a share of {share} ({speed['comm_share']:.2f} as measured): one pair of blocks over "
            f"sequential top-2, {speed['compute']} compute, {speed['ranks']} ranks, {speed['links']} links, medians of "
            f"{speed['rounds']} rounds, [quartiles]; with all communication hidden {speed['limit_train']:.2f} in "
            f"training and {speed['limit_forward']:.2f} in inference.",
        ]
    return lines


def _equal_time(found: Mapping[str, Any]) -> list[str]:
    """Return the table of losses at equal tokens and at equal time."""
    columns = found["equal_time"]
    if not columns:
        return []
    heads = ["equal tokens" if share == "equal_tokens" else f"equal time, share {share}" for share in columns]
    lines = [
        "",
        "## Quality at equal time",
        "",
        "Validation loss of each row at the time at which the fastest row ends. Times are by the measured speed-ups of "
        "one pair of blocks in training, without the sum of the gradients and the optimizer; p takes them as exact. A "
        "slower row is read off its own curve at the step that it has reached by then, before its learning rate has "
        "come down to its end. In brackets: that step; then the difference to the baseline at the same time and its "
        "corrected p.",
        "",
        f"| row | {' | '.join(heads)} |",
        "| --- |" + " ---: |" * len(heads),
    ]
    if len(columns) == 1:
        lines.insert(4, "No speed has been measured at this scale, or the measurement failed.")
    for name in columns["equal_tokens"]["rows"]:
        cells = []
        for column in columns.values():
            own = column["rows"][name]
            loss, minus = own["loss"], own["minus_baseline"]
            cell = "-" if loss["mean"] is None else f"{loss['mean']:.4f} [{own['step']:,}]"
            if minus and minus["mean"] is not None:
                cell += f" {minus['mean']:+.4f}, p {_p(minus)}"
            cells.append(cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if left_out := without_speed(found):
        lines += ["", f"Left out, as the testbed has no such row to measure: {'; '.join(left_out)}."]
    return lines


def _decisions(found: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each compared metric: which differences are decided and which are not."""
    lines = []
    for metric in found["metrics"]:
        decided: list[str] = []
        open_: list[str] = []
        for row in found["rows"]:
            own = row if metric == found["metric"] else row["others"][metric]
            minus = own["minus_baseline"]
            if minus is None or minus["mean"] is None:
                continue
            side = "above" if minus["mean"] > 0 else "below"
            if minus["decided"]:
                decided.append(f"{row['name']} is {side} {row['baseline']}")
            else:
                open_.append(row["name"])
        if decided or open_:
            lines.append(
                f"{metric}: decided (corrected p < 0.05): {'; '.join(decided) or 'nothing'}. "
                f"Not decided: {'; '.join(open_) or 'nothing'}."
            )
    return lines


def _order(found: Mapping[str, Any]) -> list[str]:
    """Return whether differences are in the paper's order. Values are not compared: a table may have two models."""
    compared = [(row["paper"]["difference"], row["minus_baseline"]) for row in found["rows"] if row["minus_baseline"]]
    pairs = [(theirs, ours["mean"]) for theirs, ours in compared if theirs is not None]
    ours = {mean for _, mean in pairs}
    if len(pairs) < 3 or len(ours) < 2 or None in ours:
        return []
    statistic, p = rank_correlation(pairs)
    order = f"Order of the {len(pairs)} differences, ours against the paper's: Spearman's rank correlation"
    return ["", f"{order} {statistic:+.2f} (p {p:.2f})."]


def _origin(found: Mapping[str, Any]) -> list[str]:
    days = [f"{date[:4]}-{date[4:6]}-{date[6:]}" for date in found["dates"]]
    commits = [commit[:9] for commit in found["git_commits"]]
    lines = [
        "",
        f"`{found['command']}` ({found['config']}), {', '.join(days)}, {clock(found['seconds_of_all_runs'])} of runs, "
        f"{', '.join(found['machines'])}, torch {', '.join(found['torch'])}, commit {', '.join(commits)}.",
    ]
    if found["taken_from"]:
        origins = [f"{count} from {name}" for name, count in found["taken_from"].items()]
        lines += ["", f"Runs of equal configuration that were not made again: {', '.join(origins)}."]
    incomplete = (row for row in found["rows"] if row["failed"] or row["unfinished"])
    missing = [f"{row['name']}: {len(row['failed'])} failed, {len(row['unfinished'])} to run" for row in incomplete]
    return lines + (["", f"Incomplete: {'; '.join(missing)}."] if missing else [])
