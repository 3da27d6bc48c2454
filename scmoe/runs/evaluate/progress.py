"""How far an evaluation is, on standard error: a bar on a terminal, elsewhere a line for each
part."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import Progress


@contextmanager
def progress_counter(part: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that is called with each number of further items that are done. total: of
    them; part: what they are items of, in words."""
    screen = Console(stderr=True)
    if not screen.is_terminal:
        print(part, file=sys.stderr, flush=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
        yield partial(progress.advance, progress.add_task(part, total=total))
