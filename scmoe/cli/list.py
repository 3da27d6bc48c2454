from scmoe.command_line import KeyValue


def main(*extensions: KeyValue) -> None:
    """List the configurations, models, architectures, data sets and optimizers to choose from.

    Args:
        extensions: extensions=[...], modules whose names are listed too
    """
    from rich.table import Column, Table
    from rich.text import Text

    from scmoe.config.help import catalogue
    from scmoe.config.load import load_config
    from scmoe.report import console

    load_config(None, extensions)
    screen = console(stderr=False)
    for title, rows in catalogue().items():
        table = Table(
            Column(style="cyan", no_wrap=True), show_header=False, box=None, padding=(0, 2)
        )
        for row in rows:
            table.add_row(*map(Text, filter(None, row)))  # as Text, brackets are no markup
        screen.print(f"[bold]{title}[/bold]", table, "", sep="\n")
