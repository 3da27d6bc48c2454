"""Runs parts one after another, each in a process of its own that is killed when its clock runs
out.

A part is a function that returns named pieces; each measures one thing and returns values that JSON
has. A piece that raises costs its own result only. A part that raises, crashes, hangs or lacks a
package is reported, and the next one starts. A part writes a file after every piece, so what it has
measured before it ended stays.
"""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scmoe.files import read_json, replacing
from scmoe.report import say

Pieces = Mapping[str, Callable[[], Any]]
TAIL_LINES = 30  # of an output or a traceback
KILL_GRACE_S = 10.0  # for a killed process to end; one that waits in the driver may not


@dataclass(frozen=True)
class Place:
    """Where the parts run. device: cuda | cpu, on which torch has one thread. tiny: small sizes,
    for a trial. out: the folder of pictures and traces."""

    device: str
    tiny: bool
    out: Path


@dataclass(frozen=True)
class CheckPart:
    """what: a heading of the report. pieces: `module:function`, imported in the part's process.
    clock_s: after this time the part is stopped; pieces that are done stay. packages: names to
    import, without which the part does not start. arguments: of the function, after the place."""

    what: str
    pieces: str
    clock_s: float
    packages: tuple[str, ...]
    arguments: tuple[Any, ...] = ()


def run_parts(parts: Mapping[str, CheckPart], place: Place) -> dict[str, dict[str, Any]]:
    """Return for each part its state, seconds and pieces; `why`, where the state is not ok.

    state: ok | failed (a piece raised, or the process ended) | stopped (its clock ran out) |
    missing (a package).
    """
    results = {}
    # the server must not start CUDA, or no process forked from it could; torch then asks the
    # driver's monitor instead
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, part) in enumerate(parts.items(), 1):
            start = time.monotonic()
            say(f"part {number} of {len(parts)}: {part.what}, {part.clock_s:g} s at most")
            result = run_part(part, place, Path(folder, name))
            result |= {
                "clock_s": part.clock_s,
                "what": part.what,
                "seconds": round(time.monotonic() - start, 1),
            }
            reason = f": {result['why'].splitlines()[-1]}" if "why" in result else ""
            say(f"  {result['state']} after {result['seconds']:g} s{reason}")
            results[name] = result
    return results


def run_part(part: CheckPart, place: Place, work: Path) -> dict[str, Any]:
    """Run one part in a process. work: where its results and its output are kept, under two
    suffixes."""
    if lacking := [name for name in part.packages if find_spec(name) is None]:
        return {"state": "missing", "why": f"not installed: {', '.join(lacking)}", "pieces": {}}
    # no with_suffix: the name of a part may have a dot, such as overlap-0.52
    results, output = Path(f"{work}.json"), Path(f"{work}.txt")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.engine.preload"])
    process: Any = context.Process(target=_become_part, args=(part, place, results, output))
    if isinstance(started := attempt(process.start), dict):
        return {"state": "failed", "why": started["error"], "pieces": {}}
    try:
        process.join(part.clock_s)
        code = process.exitcode
    finally:  # also after Ctrl-C, which does not reach the part's own session
        end(process, KILL_GRACE_S)
    pieces = read_json(results)
    if code != 0:
        ended = "stopped by its clock" if code is None else f"the process ended with {code}"
        why = f"{ended} after {len(pieces)} pieces; the end of its output:\n{tail(output)}"
        return {"state": "stopped" if code is None else "failed", "why": why, "pieces": pieces}
    if errors := list(errors_in(pieces)):
        return {"state": "failed", "why": errors[0], "pieces": pieces}
    return {"state": "ok", "pieces": pieces}


def end(process: Any, wait_s: float | None = None) -> None:
    """Kill a process and all processes that it has started. wait_s: for its end; None: until it
    has ended."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended, or does not lead a group yet
        process.kill()
    process.join(wait_s)


def follow_caller(end: Callable[[], Any]) -> None:
    """Call `end` in a thread of this process when the process that has started it ends."""
    caller = multiprocessing.parent_process()
    assert caller is not None

    def follow() -> None:
        caller.join()
        end()

    threading.Thread(target=follow, daemon=True).start()


def attempt(measure: Callable[[], Any]) -> Any:
    """Return what `measure` returns, or {"error": the end of its traceback}."""
    try:
        return measure()
    except Exception:  # of any kind: it is reported with the part, and the other parts go on
        return {"error": "\n".join(traceback.format_exc().splitlines()[-TAIL_LINES:])}


def errors_in(value: Any) -> Iterator[str]:
    """Yield the errors of `attempt` at any depth."""
    if isinstance(value, dict):
        if "error" in value:
            yield value["error"]
        for inner in value.values():
            yield from errors_in(inner)


def tail(path: Path) -> str:
    lines = path.read_text(errors="replace", encoding="utf-8").splitlines() if path.exists() else []
    return "\n".join(lines[-TAIL_LINES:]) or "(nothing)"


def _become_part(part: CheckPart, place: Place, results: Path, output: Path) -> None:
    os.setsid()
    follow_caller(partial(os.killpg, 0, signal.SIGKILL))
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    multiprocessing.set_start_method(None, force=True)  # data workers start in the usual way
    if place.device == "cpu":
        import torch

        torch.set_num_threads(1)
    module, _, function = part.pieces.partition(":")
    pieces: Pieces = getattr(import_module(module), function)(place, *part.arguments)
    done: dict[str, Any] = {}
    for name, measure in pieces.items():
        print(name, flush=True)
        done[name] = attempt(measure)
        with replacing(results) as file:
            file.write_text(json.dumps(done), encoding="utf-8")
