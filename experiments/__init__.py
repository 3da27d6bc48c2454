"""The `scmoe` command, and what its verbs share. Each verb is a script of this folder: parse, call the library, print.

Scripts import torch, Lightning and the like after parsing, so `--help` and a wrong request are answered at once.
"""

import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path

from scmoe.config.extras import explained
from scmoe.config.leaves import ConfigError

VERBS = {
    "train": "train a model, or resume a run",
    "generate": "continue texts with a run's model",
    "evaluate": "score a run's model: test split, perplexity, tasks",
    "export": "write a run's weights as one file",
    "sweep": "search over parameters, at W&B or on this machine",
    "table": "run a table of the paper, and compare",
    "reproduce": "run all tables of the paper in turn",
    "runs": "list runs",
    "compare": "compare curves and configs of runs",
    "list": "list configs, models, data sets, architectures",
    "params": "count the parameters of presets and architectures",
    "check-data": "read all data of a config, and name files that cannot be read",
    "estimate": "estimate what a training costs, without starting it",
    "bench": "measure the layer, exchanges, overlap, growth, the guard, generation, one pair's timeline",
    "gpu-check": "check everything on one GPU, in nine minutes",
    "figure": "draw a figure of the paper, from a run or from reports",
    "fig13": "measure and draw Fig. 13, offloaded experts",
    "faults": "break checkpoints on purpose and count what survives",
}


def main() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb not in VERBS:
        print("usage: scmoe VERB ...\n\n" + "\n".join(f"  {name:10} {what}" for name, what in VERBS.items()))
        sys.exit(0 if verb in ("-h", "--help") else 2)
    sys.exit(import_module(module_of(verb)).main(sys.argv[2:]))


def called(verb: str) -> str:
    """Return the command by which a verb was called."""
    is_scmoe = Path(sys.argv[0]).name == "scmoe"
    return f"scmoe {verb}" if is_scmoe else f"python -m {module_of(verb).removeprefix('scmoe.')}"


def module_of(verb: str) -> str:
    return f"scmoe.experiments.{verb.replace('-', '_')}"


def parser(verb: str, description: str | None) -> ArgumentParser:
    """Return a parser that names the verb as it was called, and shows the description (a docstring) as it is."""
    return ArgumentParser(prog=called(verb), description=description, formatter_class=RawDescriptionHelpFormatter)


def at_least_two(text: str) -> int:
    """Parse a number of rounds; quartiles require two."""
    if not text.isdecimal() or int(text) < 2:
        raise ArgumentTypeError(f"is {text}, allowed: 2 or more, of which quartiles are taken")
    return int(text)


def command(main: Callable[[list[str]], int | None]) -> Callable[[Sequence[str]], int]:
    """Make None exit code 0, and a wrong request or a missing package one line on standard error and exit code 2."""

    @wraps(main)
    def answer(arguments: Sequence[str]) -> int:
        try:
            return main([*arguments]) or 0
        except ModuleNotFoundError as error:
            lacks = explained(error)
            if lacks is None:
                raise
            print(f"error: {lacks}", file=sys.stderr)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
        return 2

    return answer
