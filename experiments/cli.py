"""`scmoe VERB ...`: the scripts of this folder by name."""

from __future__ import annotations

import sys
from importlib import import_module

VERBS = {
    "train": "train a model, or resume a run",
    "sample": "write text with a run's model",
    "export": "write a run's weights as one file",
    "sweep": "search over parameters, at W&B or here",
    "table": "a table of the paper beside ours",
    "runs": "list runs",
    "compare": "curves and configs of runs, side by side",
    "list": "configs, models, data sets, architectures",
    "params": "count the parameters of presets and architectures",
    "plan": "what a training would take, without starting it",
    "bench": "measure",
    "timeline": "one pair's operators, measured beside planned",
    "figures": "draw the figures of the README",
}


def main() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb not in VERBS:
        print("usage: scmoe VERB ...\n\n" + "\n".join(f"  {name:9}{what}" for name, what in VERBS.items()))
        sys.exit(0 if verb in ("-h", "--help") else 2)
    sys.exit(import_module(f"experiments.{verb}").main(sys.argv[2:]))


if __name__ == "__main__":
    main()
