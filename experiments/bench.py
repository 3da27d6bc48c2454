"""Measure: `python -m experiments.bench layer`, `overlap` or `growth`. The last line on standard output is JSON."""

from __future__ import annotations

import sys

from experiments import bench_growth, bench_layer, bench_overlap

WHAT = {"layer": bench_layer.main, "overlap": bench_overlap.main, "growth": bench_growth.main}


def main(arguments: list[str]) -> int:
    what = arguments[0] if arguments else "--help"
    if what not in WHAT:
        print(f"usage: bench {{{','.join(WHAT)}}} ...   (bench WHAT --help: its options)")
        return 0 if what in ("-h", "--help") else 2
    return WHAT[what](arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
