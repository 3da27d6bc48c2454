"""`scmoe simulate` compares the simulator with what is known: the paper's cells, and reports of the
benches.

A command imports what it needs inside itself, so that its help and a wrong request are answered at
once.
"""

import json
import sys

from cyclopts import App

from scmoe.command_line import call

main = App(name="simulate", help="Compare the simulator with what was measured.")


@main.command
def paper() -> None:
    """Predict the cells of the paper's Tables 1, 2, 4 and Fig. 8 from some of them, with intervals
    and beside two predictors that know nothing. Standard output is JSON."""
    from scmoe.config.extras import require

    require("simulate paper", "scipy")
    from experiments.simulate.paper import simulate_paper

    print(json.dumps(simulate_paper()))


if __name__ == "__main__":
    sys.exit(call("simulate", *sys.argv[1:]))
