"""List the configurations, models, architectures and data sets to choose from."""

import sys
from pathlib import Path

from experiments import command, parser


@command
def main(arguments: list[str]) -> int:
    parser("list", __doc__).parse_args(arguments)
    from rich.console import Console
    from rich.table import Table

    from scmoe.config.help import catalogue

    console = Console()
    for title, rows in catalogue(Path("configs")).items():
        described = any(description for _, description in rows)
        table = Table(show_header=False, box=None, padding=(0, 2))
        table.add_column(style="cyan", no_wrap=True)
        for choice, description in rows:
            table.add_row(choice, description) if described else table.add_row(choice)
        console.print(f"[bold]{title}[/bold]", table, "", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
