from pathlib import Path

from scmoe.command_line import KeyValue
from scmoe.report import print_result


def main(run: Path, /, *overrides: KeyValue) -> None:
    """Resume a run from its newest checkpoint, or from that of a step. Standard output is the run's
    summary as JSON, but nothing at a terminal. Everything else goes to standard error.

    Exit codes: 2, the request was wrong and nothing was started; 143, 130 or 129, stopped by
    SIGTERM, Ctrl-C or SIGHUP with a checkpoint.

    Args:
        run: a run's directory, such as runs/latest
        overrides: step=N for the checkpoint of that step, and key=value for what a resumed run may
            change
    """
    from scmoe.training.run.directory import refuse_without_checkpoint

    run_dir = run.resolve()
    refuse_without_checkpoint(run_dir)
    from scmoe.training.run.resume import resumption, split_step

    step, settings = split_step(overrides)
    config, resumed = resumption(run_dir, settings, step)
    from scmoe.training.run.train import train

    summary = train(config, settings, resumed)
    if summary is not None:
        print_result(summary)
