"""List the configurations, models, architectures, data sets and optimizers to choose from."""

import sys

from scmoe.experiments import command, parser


@command
def main(arguments: list[str]) -> None:
    options = parser("list", __doc__)
    options.add_argument("extensions", nargs="?", metavar="extensions=[...]", help="modules whose names are listed too")
    given = options.parse_args(arguments).extensions
    from rich.console import Console
    from rich.table import Column, Table

    from scmoe.config.help import catalogue
    from scmoe.config.load import load

    load(None, [given] if given else [])
    console = Console()
    for title, rows in catalogue().items():
        table = Table(Column(style="cyan", no_wrap=True), show_header=False, box=None, padding=(0, 2))
        for row in rows:
            table.add_row(*filter(None, row))
        console.print(f"[bold]{title}[/bold]", table, "", sep="\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
