"""Evaluate a checkpoint of a run: loss of the test split, perplexity of a text, multiple-choice tasks.

The results go to RUN/evaluation.json and to the run's own W&B run. The last line on standard output is the results as
JSON. They do not depend on the number of ranks (trainer.devices=2).
"""

import json
import sys
from pathlib import Path

from scmoe.experiments import command, parser


@command
def main(arguments: list[str]) -> None:
    options = parser("evaluate", __doc__)
    options.add_argument("run", type=Path, help="a run's directory, such as runs/latest")
    options.add_argument("overrides", nargs="*", metavar="key=value", help="what a resumed run may change, too")
    options.add_argument("--which", choices=["last", "best"], default="last", help="checkpoint (default: last)")
    tasks = "comma-separated: cloze and next_sentence, made from the text, or files of --data; none (default: both)"
    options.add_argument("--tasks", help=tasks)
    options.add_argument("--data", type=Path, help="folder of NAME.jsonl for tasks, such as piqa.jsonl")
    options.add_argument("--text", type=Path, help="UTF-8 file for perplexity and own tasks (default: the test split)")
    options.add_argument("--stride", type=int, help="tokens that a window scores (default: half the context)")
    options.add_argument("--limit", type=int, help="questions of a task, the first ones (default: all)")
    given = options.parse_intermixed_args(arguments)
    from scmoe.studies.evaluate.evaluation import Request, evaluate
    from scmoe.studies.evaluate.results import shown
    from scmoe.training.run.report import console

    names = None if given.tasks is None else () if given.tasks == "none" else tuple(given.tasks.split(","))
    asked = given.which, names, given.data, given.text, given.stride, given.limit, given.overrides
    found = evaluate(given.run.resolve(), Request(*asked))
    if found is not None:
        console().print(f"the {given.which} checkpoint, {found['checkpoint']}", *shown(found), sep="\n")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
