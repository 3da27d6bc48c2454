"""README's answers to "Does it pay?", and the five lines on top of docs/results, with every figure
read from a report.

`make figures` writes them again after a measurement. Whether their words still hold, such as "not
shown", is for a test to say: tests/docs/test_docs_figures.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docs.build import one_sequence, two_batches
from docs.build.trend import PAIRS, points_of
from experiments.bench.row import Kind, rows_of, with_quartiles
from experiments.tables.equivalence import interval_of_answer
from experiments.tables.seed_statistics import compare

FEW_ROWS_REPORT = "overlap-real-iteration-2-ranks-share-0.52-ratio-0.3"
TABLE_3 = "table3-small"
REGISTERED = "quality-small"
SHORTER = "table7_best-small"  # half of its steps, and a decay to a tenth
SHORTER_PAIR = "ScMoE Pos-2, Small minus shared-expert, Small"
TOP2 = "top-2"
POS2 = "ScMoE Pos-2, CG-1"
REGISTERED_RIVALS = {
    "top2": TOP2,
    "equal_size": "top-2, 9 experts",
    "shared": "shared-expert, CG-1",
}
NUMBER_WORDS = {2: "two", 4: "four", 8: "eight"}

ANSWERS = """
One iteration of {layers} blocks on {ranks} CPU ranks with slow links, where communication is \
{comm_share:.0%} of top-2's forward pass ([conditions](docs/results/{headline}.md)):

| over sequential top-2 | training | inference |
| --- | ---: | ---: |
| top-2 with [two batches in flight](docs/concepts.md#two-batches-in-flight): the same model | \
{speed[top2_two]} |
| shared expert with two batches in flight | {speed[shared_expert_two]} |
| **ScMoE (Pos-2)** | {speed[scmoe_pos2]} |
| **ScMoE (Pos-3)** | {speed[scmoe_pos3]} |
| limit: all communication of top-2 hidden | {limit_train:.2f} | {limit_forward:.2f} |

1. **Over sequential top-2: yes, near the limit.** Pos-3 reaches {pos3.train_speedup:.2f} of \
{limit_train:.2f} in training and {pos3.forward_speedup:.2f} of {limit_forward:.2f} in inference.
2. **Over top-2's best schedule: a little here,** {same[0]:.2f} to {same[1]:.2f}. Two batches in \
flight give most of the gain without another model. With 512 tokens a rank or fewer Pos-2 trains \
slower than top-2's best ([by share and by tokens](docs/results/two-batches.md)).
3. **Over a shared expert with two batches in flight: not shown,** {other[0]:.2f} to \
{other[1]:.2f} with quartiles from {quartiles[0]:.2f} to {quartiles[1]:.2f}. At a share of \
{large_share:.2f} Pos-2 with one batch infers slower: {at_large_share[forward]:.2f}.
4. **With one long sequence a rank: yes.** With {one[tokens]:,} tokens Pos-3 \
gains {one[train]} in training and {one[forward]} in inference (another day: 1.12 and 1.19) over \
the best row without a shortcut, a shared expert in chunks \
([numbers](docs/results/{one_page}.md)). A causal sequence can also be cut in its tokens; that is \
not measured.
5. **Where gradients outweigh rows: no.** With {rows_over_gradients:.1f} bytes of rows for a byte \
of gradients, Pos-2 trains at {few_tokens:.2f} of top-2's speed \
([numbers](docs/results/{few_tokens_page}.md)).
6. **In quality, in the registered training: the shortcut itself changes less than \
0.01 nats, and top-2 is better.** Each \
row at its best learning rate, equal tokens: Pos-2's loss minus a shared expert's, the same model \
without the shortcut, is {registered[shared]}; minus top-2's {registered[top2]}; minus that of \
top-2 with as many parameters {registered[equal_size]} ([registered before its first \
run](docs/results/{registered_page}/table.md); each interval has the level of the test that \
decided, 91 % for the first and 99.9 % for the others). The rate decays to 0. With a decay to a \
tenth and rates of a shorter search, [Table 3's twin](docs/results/{table}/table.md) shows no \
difference. With that decay and half the steps, Pos-2's loss minus a shared expert's is \
{shorter} ([Table 7 again](docs/results/table7-small/table.md)). In the \
registered training at width {widest.width} in place of 64, with rates that were not searched, \
it is {widest.text} ([trend](docs/results/trend.md)).

"""


SHORT_ANSWERS = """
1. **Over the best rival: little, or nothing.** Training of {layers} blocks at a share of \
{comm_share:.2f}: Pos-2 {same_pos2}, Pos-3 {same_pos3} over the best schedule of top-2; \
{other_pos2}, {other_pos3} over the best row without a shortcut, a shared expert with two batches \
in flight ([numbers]({headline}.md)).
2. **By share and by tokens.** Training of Pos-2 with one batch over the best row without a \
shortcut: {by_share}; {by_tokens} ([all numbers](two-batches.md)). With one sequence of \
{one[tokens]:,} tokens a rank Pos-3 gains {one[train]} in training and \
{one[forward]} in inference ([numbers]({one_page}.md)).
3. **Quality, in the registered training: the shortcut itself changes less than \
0.01 nats, and top-2 is better.** Each \
row at its best learning rate, equal tokens: Pos-2's loss minus a shared expert's is \
{registered[shared]}; minus top-2's {registered[top2]}; minus that of top-2 with as many \
parameters {registered[equal_size]} ([registered before its first \
run]({registered_page}/table.md)). With rates \
that were searched at half length, [Table 3's twin]({table}/table.md) saw no difference at equal \
tokens ({equal}; {seeds} seeds). With half the steps and a decay to a tenth, Pos-2's loss minus a \
shared expert's is {shorter} ([Table 7 again](table7-small/table.md)). In the \
registered training at width {widest.width} in place of 64, with rates that were not searched, \
it is {widest.text} ([trend](trend.md)).
4. **Where it loses.** With {rows_over_gradients:.1f} bytes of rows for a byte of gradients, Pos-2 \
trains at {few_tokens} of top-2's speed ([numbers]({few_tokens_page}.md)). It also loses with few \
tokens a rank (line 2) and, in inference at a large share, to a shared expert with two batches \
([numbers](two-batches.md)).
5. **Not measured:** any GPU, NCCL, two machines, the paper's sizes ([list](#not-run-yet)).

Speeds are medians with quartiles over the rounds of one run a bench. Losses are means with \
intervals of 95 %, joint in each table below but for the trend; line 3's first three have the \
levels of the tests that decided.
"""


def short_answers(figures: Path, results: Path, headline: str) -> str:
    """Return the five lines on top of the overview of results."""
    report = read(figures / f"{headline}.json")
    few_tokens = rows_of(read(figures / f"{FEW_ROWS_REPORT}.json"))["scmoe_pos2"]
    table = read(results / TABLE_3 / "results.json")
    equal_tokens = losses_of(table, "equal_tokens")
    said = facts(figures, results, headline)
    said |= {
        "same_pos2": gain_of(report, "scmoe_pos2", "over_best_without_another_model"),
        "same_pos3": gain_of(report, "scmoe_pos3", "over_best_without_another_model"),
        "other_pos2": gain_of(report, "scmoe_pos2", "over_best_without_shortcut"),
        "other_pos3": gain_of(report, "scmoe_pos3", "over_best_without_shortcut"),
        "equal": with_interval(compare(equal_tokens[POS2], equal_tokens[TOP2])),
        "seeds": NUMBER_WORDS[len(equal_tokens[POS2])],
        "few_tokens": with_quartiles(few_tokens.train_speedup, few_tokens.train_quartiles),
    }
    by_share, by_tokens = two_batches.groups_of(two_batches.read_reports(figures, headline))
    for name, group, unit in (
        ("by_share", by_share, "at a share of {comm_share:.2f}"),
        ("by_tokens", by_tokens, "with {tokens:,} tokens a rank"),
    ):
        ends = group.reports[0], group.reports[-1]
        said[name] = " and ".join(
            f"{gain_of(end, 'scmoe_pos2', 'over_best_without_shortcut')} {unit.format_map(end)}"
            for end in ends
        )
    return SHORT_ANSWERS.format_map(said)


def gain_of(report: Mapping[str, Any], row: str, over: str, kind: Kind = "train") -> str:
    """Return what a row gains over others, with quartiles."""
    gain = report["rows"][row][over][kind]
    return with_quartiles(gain["median"], gain["quartiles"])


def with_interval(difference: Mapping[str, Any]) -> str:
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    return f"{mean:+.3f} nats [{low:+.3f}, {high:+.3f}]"


def answers(figures: Path, results: Path, headline: str) -> str:
    """Return the table and the answers. headline: the name of the report that the table shows."""
    return ANSWERS.format_map(facts(figures, results, headline))


def facts(figures: Path, results: Path, headline: str) -> dict[str, Any]:
    """Return what the text states, by the names that it uses, and `rivals`: the rows that the
    shortcuts are compared with."""
    report = read(figures / f"{headline}.json")
    rows = rows_of(report)
    few_tokens = read(figures / f"{FEW_ROWS_REPORT}.json")
    same_model = gains(report, "over_best_without_another_model")
    other_models = gains(report, "over_best_without_shortcut")
    ends = [end for gain in other_models for end in gain["quartiles"]]
    largest = two_batches.read_reports(figures, headline)[-1]
    at_largest = largest["rows"]["scmoe_pos2"]["over_best_without_shortcut"]
    return {
        "headline": headline,
        "layers": NUMBER_WORDS[report["layers"]],
        "ranks": NUMBER_WORDS[report["ranks"]],
        "comm_share": report["comm_share"],
        "speed": {
            name: f"{row.train_speedup:.2f} | {row.forward_speedup:.2f}"
            for name, row in rows.items()
        },
        "limit_train": report["limit_train"],
        "limit_forward": report["limit_forward"],
        "pos3": rows["scmoe_pos3"],
        "same": range_of([gain["median"] for gain in same_model]),
        "other": range_of([gain["median"] for gain in other_models]),
        "quartiles": range_of(ends),
        "rivals": [{gain["best"] for gain in each} for each in (same_model, other_models)],
        "large_share": largest["comm_share"],
        "at_large_share": {kind: gain["median"] for kind, gain in at_largest.items()},
        "rows_over_gradients": few_tokens["rows_over_gradients"],
        "few_tokens": rows_of(few_tokens)["scmoe_pos2"].train_speedup,
        "few_tokens_page": FEW_ROWS_REPORT,
        "one_page": one_sequence.SEQUENCE_PAGE,
        "one": gain_with_one_sequence(figures),
        "table": TABLE_3,
        **quality(results),
    }


def gain_with_one_sequence(figures: Path) -> dict[str, Any]:
    """Return what Pos-3 gains over the best row without a shortcut in the longest sequence that was
    measured."""
    longest = one_sequence.read_reports(figures)[-1]
    pos3 = "scmoe_pos3", "over_best_without_shortcut"
    return {
        "tokens": longest["tokens"],
        "train": gain_of(longest, *pos3),
        "forward": gain_of(longest, *pos3, "forward"),
    }


def gains(report: Mapping[str, Any], over: str) -> list[dict[str, Any]]:
    """Return what each shortcut gains over other rows, in training and in inference."""
    return [
        report["rows"][row][over][kind]
        for row in two_batches.SHORTCUT_ROWS
        for kind in ("train", "forward")
    ]


def range_of(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def quality(results: Path) -> dict[str, Any]:
    """Return what the registered experiment says of Pos-2's loss minus that of each rival, and its
    tests by the rival's name: `tested`."""
    decision = read(results / REGISTERED / "results.json")["decision"]
    tested = {
        name: decision["rows"][f"{POS2} minus {row}"] for name, row in REGISTERED_RIVALS.items()
    }
    return {
        "registered_page": REGISTERED,
        "registered": {name: answer_of(each) for name, each in tested.items()},
        "tested": tested,
        "shorter": difference_of_shorter(results),
        "widest": points_of(results, *PAIRS["Pos-2 minus a shared expert"])[-1],
    }


def difference_of_shorter(results: Path) -> str:
    """Return Pos-2's loss minus that of a shared expert in the table with half the steps, with
    Welch's interval of 95 %, as docs/decisions/0049-trend-and-table-7.md registered it."""
    rows = read(results / SHORTER / "results.json")["decision"]["rows"]
    tested = rows[SHORTER_PAIR]
    low, high = tested["interval_of_difference"]
    return f"{tested['difference']:+.3f} nats [{low:+.3f}, {high:+.3f}] ({tested['n']} seeds a row)"


def answer_of(tested: Mapping[str, Any]) -> str:
    """Return a difference with the interval of the test that has decided, and the answer with the
    seeds a row of its look."""
    low, high = interval_of_answer(tested)
    difference = f"{tested['difference']:+.3f} nats [{low:+.3f}, {high:+.3f}]"
    return f"{difference}, {tested['answer']} ({tested['look']} seeds a row)"


def losses_of(table: Mapping[str, Any], column: str) -> dict[str, dict[int, float]]:
    """Return the losses of each row by seed in a column of "equal_time"."""
    rows = table["equal_time"][column]["rows"]
    return {name: row["loss"]["by_seed"] for name, row in rows.items()}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
