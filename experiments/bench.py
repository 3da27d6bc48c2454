"""Measure on this machine. The last line on standard output is JSON."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from scmoe.config.leaves import ConfigError
from scmoe.experiments import at_least_two, command, parser

# Sizes of `bench overlap` and of `bench layer`. Those of overlap have the defaults of testbed.pairs.Setting.
WIDTHS: dict[str, float] = {"dim": 512, "ffn_dim": 2048, "tokens": 1024}
SIZES = {**WIDTHS, "heads": 8, "seq_len": 256, "num_experts": 8, "attention_ms": 45.0, "attention_to_mlp": 3.0}
LAYER = {**WIDTHS, "tokens": 2048, "experts": 8, "top_k": 2, "rounds": 15, "threads": 1}
EXCHANGE = {"nodes": 2, "ranks": 4, "between_mbit": 500.0}
GENERATION = {"batch": 4, "prompt": 32, "tokens": 256, "rounds": 3, "threads": 1}
OUT: dict[str, Any] = {"out": Path("runs/bench")}
LINKS: dict[str, Any] = {"share": 0.52, "ranks": 2}
INFERENCE = {**LINKS, "prompt": 512, "batch": 8, "rounds": 9, **OUT}
TIMELINE = {**LINKS, "out": Path("runs/timeline")}
HERE = {"layer": "layer.bench_layer", "guard": "guard_cost.guard_cost", "generation": "generation.bench_generation"}


def options_of(arguments: list[str]) -> dict[str, Any]:
    options = parser("bench", __doc__)
    verbs = options.add_subparsers(dest="what", required=True)

    def add(name: str, help: str, defaults: dict[str, Any]) -> Any:
        option = verbs.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.").add_argument
        for key, default in defaults.items():
            option(f"--{key.replace('_', '-')}", type=type(default), default=default, help="(default: %(default)s)")
        return option

    option = add("exchange", "flat and hierarchical All-to-All on nodes, by size of the messages", EXCHANGE)
    option("--kilobytes", nargs="+", type=int, default=[1, 4, 16, 64, 256, 1024], help="of a rank for each other rank")
    option("--rounds", type=at_least_two, default=15)
    add("generation", "generation with a cache and without", GENERATION)
    add("inference", "prefill and decode between ranks, sequential, overlapped and as planned", INFERENCE)
    option = add("layer", "time of the MoE layer over that of its dense products", LAYER)
    option("--capacity", type=float, help="capacity factor (default: dropless)")
    option = add("overlap", "how much of the All-to-All every architecture and schedule hides", OUT)
    option("--share", type=float, help="communication share of sequential top-2, forward (default: 0.52)")
    option("--link-mbit", type=float, help="rate of the links; by default it is searched for the share")
    option("--ranks", type=int, help="(default: 2; on cuda 1)")
    option("--nodes", type=int, default=1, help="on which the ranks are; the rate is that of the nodes' network cards")
    option("--exchange", choices=["flat", "hierarchical", "auto"], default="flat", help="between nodes")
    option("--compute", choices=["real", "emulated"], help="(default: emulated; on cuda real)")
    option("--level", choices=["block", "iteration"], default="block")
    option("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: one GPU, rows over its bus")
    option("--rounds", type=at_least_two, default=9)
    for name, default in SIZES.items():
        option(f"--{name.replace('_', '-')}", type=type(default), metavar="N", help=f"(default: {default:g})")
    option("--rows", nargs="+", help="rows to measure (default: all)")
    option = add("growth", "how the time of a pair of blocks, and what overlap saves of it, grow", OUT)
    option("--of", nargs="+", choices=["tokens", "ranks", "experts"], default=["tokens", "ranks", "experts"])
    option("--points", nargs="+", type=int, help="its values, with one --of")
    option("--rounds", type=at_least_two, default=5)
    option = add("guard", "cost of the guard against NaN and Inf, as a share of a step", {})
    option("overrides", metavar="key=value", nargs="*", help="of a small model's config")
    option = add("timeline", "one pair's operators, measured and planned (Fig. 7), and Chrome traces", TIMELINE)
    option("--compute", choices=["real", "emulated"], default="emulated")
    option("--position", choices=["pos1", "pos2", "pos3"], default="pos2")
    option("--run", type=Path, help="draw the plan of this run with schedule=auto instead; nothing is measured")
    given = vars(options.parse_args(arguments))
    if len(given.get("of", ())) > 1 and given["points"]:
        options.error("--points goes with one --of")
    return given


def measure(what: str, given: dict[str, Any], again: list[str]) -> dict[str, Any]:
    """again: the arguments of a Python interpreter that repeat this program, for a network namespace of its own."""
    if what in HERE:
        module, function = HERE[what].split(".")
        return getattr(import_module(f"scmoe.testbed.{module}"), function)(**given) | given
    from scmoe.testbed import exchange, generation, growth, inference_report, links, overlap_report, timeline

    if what == "overlap":
        return overlap_report.bench_overlap({name: value for name, value in given.items() if value is not None}, again)
    if what == "timeline" and (run_dir := given.pop("run")) is not None:
        return timeline.draw_plan(run_dir)
    if what == "exchange" and (refused := exchange.why_no_nodes(given["nodes"], given["ranks"])):
        raise ConfigError(refused)
    links.require(again, given.get("nodes", 1))
    if what == "exchange":
        return exchange.bench_exchange(**given)
    if what == "inference":
        report = inference_report.bench_inference(**given)
        return report | {"cached_over_uncached": generation.bench_generation(**GENERATION)["cached_over_uncached"]}
    return growth.bench_growth(**given) if what == "growth" else timeline.bench_timeline(**given)


@command
def main(arguments: list[str]) -> None:
    given = options_of(arguments)
    print(json.dumps(measure(given.pop("what"), given, ["-m", "scmoe.experiments.bench", *arguments])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
