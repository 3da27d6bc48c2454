"""The `scmoe` command. Each verb is a module whose `main` is a typed function (or an App of
several).

A user's verbs are the modules of scmoe/cli/. The verbs of the laboratory are modules of
`experiments/`, which exists in a checkout only. A signature and a docstring are a command line,
which cyclopts reads (docs/decisions/0032-command-line.md). Verbs import torch, Lightning and the
like inside the function, so `--help` and a wrong request are answered at once.
"""

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cyclopts import App, CycloptsError, Parameter, validators

from scmoe import __version__
from scmoe.config.installation import CHECKOUT, explained, scmoe
from scmoe.config.leaves import ConfigError, show_typed
from scmoe.report import console

VERBS = {
    "train": "train a model",
    "resume": "resume a run",
    "generate": "continue texts with a run's model",
    "evaluate": "score a run's model: test split, perplexity, tasks",
    "export": "write a run's weights as one file, or as a Hugging Face folder",
    "sweep": "search over parameters, at W&B or on this machine",
    "table": "run a table of the paper, or all of them, and compare",
    "runs": "list runs",
    "compare": "compare curves and configs of runs",
    "report": "write one HTML page of runs, tables, benches and advice",
    "list": "list configs, models, data sets, architectures",
    "params": "count the parameters of presets and architectures",
    "check-data": "read all data of a config, and name files that cannot be read",
    "estimate": "estimate what a training costs, or count one step of it, without starting it",
    "conform": "ask an expert-parallel layer of your own whether it is right",
    "advise": "say whether a shortcut would pay on a cluster, by simulation",
    "bench": "measure overlap, inference, a training on a slow network, the layer, a GPU",
    "figure": "draw a figure of the paper, from a run or from reports",
    "simulate": "compare the simulator with reports of the benches",
}
LABORATORY = ("table", "bench", "figure", "simulate")  # of experiments/
VERBS_WITH_COMMANDS = ("bench", "simulate")  # verbs of the laboratory with commands of their own
CODE_OF_CTRL_C = 128 + signal.SIGINT  # as in lightning/stop.py, which this must not import
SECOND_CTRL_C_S = 1.0  # a second Ctrl-C within this time is the same one
HELP_COLUMNS = 120  # where standard output is no terminal
HYPHENS = Parameter(allow_leading_hyphen=True)
KeyValue = Annotated[str, HYPHENS]  # --key=value is an override too
Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]
Item = TypeVar("Item")
# --stop a --stop b, not --stop a b
OneEach = Annotated[Sequence[Item], Parameter(consume_multiple=False, allow_repeating=None)]


def main() -> None:
    sys.exit(call(*sys.argv[1:]))


def call(*words: str) -> int:
    """Run `scmoe WORDS` in this process and return its exit code, as `answer`; after Ctrl-C 130,
    whatever a library makes of the interruption: an import that is cut off may raise ImportError,
    and Lightning exits with 1."""
    with noting_ctrl_c() as interruption:
        try:
            code = answer(*words)
        except BaseException:
            if interruption.first_s is None:
                raise
        return code if interruption.first_s is None else CODE_OF_CTRL_C


class CtrlC(KeyboardInterrupt):
    """After a KeyboardInterrupt that has passed through `exec`, which many imports use, Python
    kills itself with SIGINT. After this subclass it does not."""


class Interruption:
    """A handler of SIGINT: CtrlC is raised once; a second Ctrl-C, SECOND_CTRL_C_S later or more,
    ends the process at once."""

    def __init__(self) -> None:
        self.first_s: float | None = None  # when it came

    def __call__(self, *_: Any) -> None:
        if self.first_s is None:
            self.first_s = time.monotonic()
            raise CtrlC
        if time.monotonic() - self.first_s > SECOND_CTRL_C_S:
            os._exit(CODE_OF_CTRL_C)


@contextmanager
def noting_ctrl_c() -> Iterator[Interruption]:
    """Handle Ctrl-C inside by what this yields, unless it is ignored, as in a background job. After
    a Ctrl-C it is ignored: a second one, while the process ends, would raise, or kill it."""
    interruption, before = Interruption(), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (
        signal.SIG_IGN,
        None,
    ):
        yield interruption
        return
    signal.signal(signal.SIGINT, interruption)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before if interruption.first_s is None else signal.SIG_IGN)


def answer(*words: str) -> int:
    """Run `scmoe WORDS` in this process. Return its exit code: for a wrong request or a missing
    package 2, and the reason is one line on standard error; after Ctrl-C 130."""
    try:
        require_checkout(words[0] if words else "")
        act, arguments, _ = build_app(*words[:1]).parse_args(
            [*words], exit_on_error=False, print_error=False
        )
        if act.__name__ == "help_print" and words and not {"-h", "--help"} & {*words}:
            raise ConfigError(f"{words[0]} is incomplete. See {scmoe(words[0], '--help')}")
        return act(*arguments.args, **arguments.kwargs) or 0
    except CycloptsError as error:
        said = " ".join(str(error).split()).replace(
            "RUN requires an argument", "RUN is missing, such as runs/latest"
        )
        token = getattr(error, "token", None)  # of a value that cannot be read
        if token is not None and token.keyword and "=" in token.value:
            said += f" Write key=value before {token.keyword}."
        print(
            f"error: {said} See {scmoe(*(w for w in words[:1] if w in VERBS), '--help')}",
            file=sys.stderr,
        )
    except ModuleNotFoundError as error:
        lacks = explained(error)
        if lacks is None:
            raise
        print(f"error: {lacks}", file=sys.stderr)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error}", file=sys.stderr)
        if error.errno != errno.ENAMETOOLONG:  # such a name is in the request, as pathlib raises
            return 1
    except KeyboardInterrupt:
        return CODE_OF_CTRL_C
    return 2


def numbers_of(words: Sequence[str], names: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Return the numbers of the words NAME=N with these names, and the other words. Raises
    ConfigError."""
    numbers, others = dict[str, int](), list[str]()
    for word in words:
        key, _, value = word.removeprefix("--").partition("=")
        if key not in names:
            others.append(word)
        elif not value.isdecimal() or int(value) < 1:
            shown = show_typed(value)
            raise ConfigError(f"command line: {key} is {shown}. Give a number, 1 or more")
        else:
            numbers[key] = int(value)
    return numbers, others


def build_app(verb: str = "") -> App:
    """Return the command line. The script of `verb` is imported, any other one only where it is
    needed."""
    app = App(
        name="scmoe",
        help="Shortcut-connected expert parallelism: train, measure, compare.",
        help_format="plaintext",
        version=f"scmoe {__version__}",
        console=console(HELP_COLUMNS, stderr=False),
        default_parameter=Parameter(
            negative=(), consume_multiple=True, allow_repeating=True, show_default=default
        ),
        suppress_keyboard_interrupt=False,
    )
    for number, (name, what) in enumerate(VERBS.items()):
        if name == verb:
            app.command(import_module(verb_module(name)).main, name=name)
        else:
            app.command(f"{verb_module(name)}:main", name=name, help=what, sort_key=number)
    app.register_install_completion_command()
    return app


def verb_module(verb: str) -> str:
    """Return the module of a verb."""
    name = verb.replace("-", "_")
    if verb not in LABORATORY:
        return f"scmoe.cli.{name}"
    return f"experiments.{name}.__main__" if verb in VERBS_WITH_COMMANDS else f"experiments.{name}"


def require_checkout(verb: str) -> None:
    """Raise ConfigError if `verb` is one of the laboratory and its modules are not those of this
    package's checkout."""
    if verb not in LABORATORY:
        return
    folder = CHECKOUT / "experiments"
    if not folder.is_dir():
        raise ConfigError(
            f"scmoe {verb} needs a checkout of the repository, and scmoe is installed without one. "
            "Clone the repository, run `make setup` there, and call it from there"
        )
    spec = find_spec("experiments")
    if spec is None or spec.origin is None or Path(spec.origin).parent != folder:
        raise ConfigError(
            f"scmoe {verb} needs {folder}, but another module named experiments comes first on"
            f" Python's path. Call it from {CHECKOUT}"
        )


def default(value: Any) -> str | None:
    """Return a default as the help shows it; None for one that says nothing."""
    return None if value is None or value is False or value == () else str(value)
