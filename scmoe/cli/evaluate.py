from pathlib import Path
from typing import Literal

from scmoe.config.leaves import ConfigError
from scmoe.report import console, print_result


def main(
    run: Path,
    /,
    *overrides: str,
    which: Literal["last", "best"] = "last",
    tasks: str = "none",
    data: Path | None = None,
    text: Path | None = None,
    stride: int | None = None,
    limit: int | None = None,
) -> None:
    """Evaluate a checkpoint of a run: loss of the test split, perplexity of a text, tasks.

    The results go to RUN/evaluation.json and to the run's own W&B run. Standard output is the
    results as JSON. They do not depend on the number of ranks (trainer.devices=2).

    Args:
        run: a run's directory, such as runs/latest
        overrides: key=value, what a resumed run may change, too
        which: checkpoint
        tasks: comma-separated: files of --data, tasks of lm-eval such as hellaswag; none (default)
        data: folder of NAME.jsonl for tasks, such as piqa.jsonl, or of lm-eval's YAML files
        text: UTF-8 file for perplexity (default: the test split)
        stride: tokens that a window scores (default: half the context)
        limit: questions of a task, the first ones (default: all)
    """
    from scmoe.training.run.directory import refuse_without_checkpoint

    run_dir = run.resolve()
    refuse_without_checkpoint(run_dir, which)
    if text is not None and not text.exists():
        raise ConfigError(f"--text is {str(text)!r}, which does not exist. Give a file.")
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data is {str(data)!r}, which is no folder. Give a folder of tasks.")
    from scmoe.runs.evaluate.evaluation import EvaluationRequest, evaluate, shown

    names = () if tasks == "none" else tuple(tasks.split(","))
    results = evaluate(
        run_dir, EvaluationRequest(which, names, data, text, stride, limit, overrides)
    )
    if results is not None:
        title = f"the {which} checkpoint, {results['checkpoint']}"
        console().print(title, *shown(results), sep="\n")
        print_result(results)
