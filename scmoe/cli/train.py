from cyclopts import App

from scmoe.command_line import KeyValue
from scmoe.config.help import help_text
from scmoe.report import print_result

main = App(name="train", help_epilogue=help_text())


@main.default
def start(config: str, /, *overrides: KeyValue) -> None:
    """Train a model. Standard output is the run's summary as JSON, but nothing at a terminal.
    Everything else goes to standard error.

    Exit codes: 2, the request was wrong and nothing was started; 143, 130 or 129, stopped by
    SIGTERM, Ctrl-C or SIGHUP with a checkpoint.

    Args:
        config: a YAML file, or the name of a shipped one, such as quickstart
        overrides: key=value, of the keys below; --key=value works too
    """
    from scmoe.config.load import load_config

    settings = load_config(config, overrides)
    from scmoe.training.run.train import train

    summary = train(settings, overrides)
    if summary is not None:
        print_result(summary)
