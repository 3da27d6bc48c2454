"""Measure the reports that pages of the docs and `scmoe simulate testbed` read: `make reports`.

A report that docs/figures holds is skipped: remove it to measure it again. Minutes are those of an
idle machine with 2 cores, estimated from the iterations that the report counts.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

REPORTS_FOLDER = Path("docs/figures")
ITERATION_ROWS = "--rows top2 shared_expert scmoe_pos2 scmoe_pos3"
RIVALS_OF_POS2 = "--rows top2 top2_two shared_expert shared_expert_two scmoe_pos2 scmoe_pos2_two"
RIVALS = f"{RIVALS_OF_POS2} scmoe_pos3"
RIVALS_OF_ONE_SEQUENCE = (
    "--rows top2 top2_pipelined shared_expert shared_expert_pipelined scmoe_pos2 scmoe_pos3"
)
UNEVEN_ROWS = "--rows top2 shared_expert scmoe_pos2_pipelined scmoe_pos3"
PAIR_BENCH = "overlap --share 0.52"
REAL_ITERATION = f"{PAIR_BENCH} --compute real --level iteration {ITERATION_ROWS}"
EMULATED_ITERATION = f"{PAIR_BENCH} --level iteration {ITERATION_ROWS}"
HOT = "--load hot_rank:1.7"
RECORDED = f"--load recorded:{REPORTS_FOLDER}/routing-table3-top2.safetensors"


class Report(NamedTuple):
    """A report of a bench. name: its file without .json. words: what follows `scmoe bench`."""

    name: str
    words: str
    minutes: int

    @property
    def path(self) -> Path:
        return REPORTS_FOLDER / f"{self.name}.json"

    @property
    def command(self) -> list[str]:
        bench = [sys.executable, "-m", "experiments.bench"]
        return [*bench, *self.words.split(), "--out", str(self.path.parent)]


REPORTS = (
    Report("overlap-real-block-2-ranks-share-0.52", f"{PAIR_BENCH} --compute real", 10),
    Report(
        "overlap-real-block-2-ranks-share-0.15",
        "overlap --share 0.15 --compute real --rounds 15",
        11,
    ),
    Report("overlap-real-iteration-2-ranks-share-0.52", f"{REAL_ITERATION} --rounds 15", 12),
    Report(
        "overlap-real-iteration-2-ranks-share-0.52-layers-8",
        f"{PAIR_BENCH} --compute real --level iteration --layers 8 {RIVALS}",
        40,
    ),
    Report(
        "overlap-real-iteration-2-ranks-share-0.52-ratio-1",
        f"{REAL_ITERATION} --rows-per-gradient 1",
        4,
    ),
    Report(
        "overlap-real-iteration-2-ranks-share-0.52-ratio-0.3",
        f"{REAL_ITERATION} --rows-per-gradient 0.3 --seq-len 64",
        5,
    ),
    Report(
        "overlap-emulated-iteration-2-ranks-share-0.52",
        f"{EMULATED_ITERATION} --attention-ms 60",
        11,
    ),
    Report(
        "overlap-emulated-iteration-4-ranks-share-0.52",
        f"{PAIR_BENCH} --level iteration --attention-ms 90 --ranks 4 --tries 4 --rounds 5 {RIVALS}",
        15,
    ),
    Report("overlap-emulated-block-2-ranks-share-0.52", PAIR_BENCH, 9),
    Report(
        "overlap-emulated-block-2-ranks-share-0.35", "overlap --share 0.35 --attention-ms 60", 11
    ),
    Report(
        "overlap-emulated-block-4-ranks-share-0.35",
        "overlap --share 0.35 --ranks 4 --attention-ms 60 --rounds 5",
        8,
    ),
    *(
        Report(
            f"two-batches/overlap-real-iteration-2-ranks-share-{share}",
            f"overlap --share {share} --compute real --level iteration {words} {RIVALS}",
            minutes,
        )
        for share, words, minutes in (
            ("0.15", "--rounds 5 --tries 4", 8),
            ("0.35", "--rounds 5 --tries 4", 11),
            ("0.7", "--rounds 15 --tries 4", 26),
        )
    ),
    *(
        Report(
            f"two-batches/overlap-real-iteration-2-ranks-share-0.52-tokens-{tokens}",
            f"{PAIR_BENCH} --compute real --level iteration --seq-len 128 --tokens {tokens}"
            f" --tries 4 --rounds {rounds} {RIVALS_OF_POS2}",
            minutes,
        )
        for tokens, rounds, minutes in ((256, 31, 12), (512, 31, 9), (1024, 7, 5), (4096, 5, 11))
    ),
    *(
        Report(
            f"one-sequence/overlap-real-iteration-2-ranks-share-0.52-tokens-{tokens}-layers-8",
            f"{PAIR_BENCH} --compute real --level iteration --layers 8 --tokens {tokens}"
            f" --seq-len {tokens} --tries 8 --rounds {rounds} {RIVALS_OF_ONE_SEQUENCE}",
            minutes,
        )
        for tokens, rounds, minutes in ((1024, 9, 14), (3072, 7, 43))
    ),
    Report(
        "train-two-batches-share-0.52",
        "train --rounds 4 --rows top2 top2_two shared_expert_two scmoe_pos2",
        21,
    ),
    Report("inference-2-ranks-share-0.52", "inference --share 0.52", 4),
    Report(
        "inference-2-ranks-share-0.52-prompt-3072",
        "inference --share 0.52 --prompt 3072 --tokens 2 --rounds 7",
        10,
    ),
    # Uneven routing: all loads of a report are measured in the same rounds, beside balanced ones.
    Report(
        "uneven-emulated-block-2-ranks-share-0.52-hot_rank", f"{PAIR_BENCH} {HOT} --rounds 5", 16
    ),
    Report(
        "uneven-emulated-block-2-ranks-share-0.52-layers-4-hot_rank",
        f"{PAIR_BENCH} --layers 4 --load hot_rank:1.3 {HOT} --rounds 5 --tries 4"
        " --rows top2 top2_two shared_expert_two scmoe_pos2 scmoe_pos2_two",
        13,
    ),
    Report(
        "uneven-emulated-block-2-ranks-share-0.52-hot_rank-recorded",
        f"{PAIR_BENCH} {HOT} {RECORDED} {UNEVEN_ROWS}",
        13,
    ),
    Report(
        "uneven-emulated-block-4-ranks-share-0.49-hot_rank",
        f"overlap --share 0.49 --attention-ms 90 --ranks 4 {HOT} --rounds 7 {UNEVEN_ROWS}",
        15,
    ),
    Report(
        "uneven-emulated-iteration-2-ranks-share-0.52-hot_rank",
        f"{EMULATED_ITERATION} --attention-ms 60 {HOT} --rounds 7",
        19,
    ),
    Report(
        "uneven-real-block-2-ranks-share-0.52-hot_rank-recorded",
        f"{PAIR_BENCH} --compute real --load hot_rank:1.3 {HOT} --load hot_rank:2 {RECORDED}"
        f" {UNEVEN_ROWS}",
        25,
    ),
    Report("uneven-real-iteration-2-ranks-share-0.52-hot_rank", f"{REAL_ITERATION} {HOT}", 22),
)


def main(words: Sequence[str]) -> int:
    """Measure the reports that are missing, in turn. Return the exit code of the first failure."""
    parser = argparse.ArgumentParser(prog="make reports", description="measure missing reports")
    parser.add_argument("--list", action="store_true", help="print all reports, measure nothing")
    if parser.parse_args(words).list:
        for report in REPORTS:
            state = "kept" if report.path.exists() else "missing"
            print(f"{report.minutes:4} min  {state:7}  {report.name}")
        return 0

    missing = [report for report in REPORTS if not report.path.exists()]
    minutes = sum(report.minutes for report in missing)
    print(f"reports: {len(missing)} of {len(REPORTS)} are missing, about {minutes} min to measure")
    for report in missing:
        print(f"reports: {report.name}, about {report.minutes} min", flush=True)
        code = subprocess.call(report.command)
        if code != 0:
            return code
        if not report.path.exists():
            print(f"reports: the bench has written no {report.path}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
