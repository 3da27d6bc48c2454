"""This module runs Python programs in processes that have torch and Lightning imported already.

A start of Python with them takes five seconds of processor time; a fork of the server of
`run_ranks` takes 0.1 s. The program runs as `__main__`, in its own session, with its own
environment, folder and exit code.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.engine.isolated import end
from experiments.engine.ranks import PRELOADED


def python(
    *arguments: str, cwd: Path, env: Mapping[str, str], timeout_s: float
) -> tuple[int, str, str]:
    """Run `python -m MODULE ...` or `python FILE ...`. Return its exit code, as subprocess does,
    and its outputs.

    Raise TimeoutError after `timeout_s`; the program has been killed by then.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process: Any = context.Process(target=_become, args=(arguments, cwd, dict(env), out, err))
        process.start()
        process.join(timeout_s)
        late = process.exitcode is None
        if late:
            end(process)
        ended = process.exitcode, out.read_text(), err.read_text()
        process.close()
    if late:
        raise TimeoutError(f"{arguments} took more than {timeout_s:g} s:\n{ended[1]}\n{ended[2]}")
    return ended


def _become(
    arguments: tuple[str, ...], cwd: Path, env: dict[str, str], out: Path, err: Path
) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    multiprocessing.set_start_method(None, force=True)  # data workers start in the usual way
    is_module = arguments[0] == "-m"
    sys.argv[:] = arguments[is_module:]
    name = sys.argv[0]
    sys.orig_argv = [sys.executable, *arguments]
    sys.path.insert(0, "" if is_module else str(Path(name).parent))
    try:
        if is_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing does not run the exit functions
        sys.stdout.flush()
        sys.stderr.flush()
