"""Removes from texts what must not reach a page that is handed on."""

import platform
import re
from collections.abc import Sequence
from typing import Any

from scmoe.files import STARS, read_json, redacted
from scmoe.runs.seen import SeenRun

COMMIT = 9  # letters of a commit that are shown; all 40 look like a key
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # no text of HTML
ADDRESS = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b|(?<=://)[^/\s@]+@")  # IPv4, or user:password@


class Cleaner:
    """Replaces keys (`redacted`), names of machines, IPv4 addresses and control characters.

    hosts: the names of machines.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        names = sorted({re.escape(host) for host in hosts if host}, key=len, reverse=True)
        # a trace is named HOST_PID.TIME.pt.trace.json
        pattern = rf"(?<![A-Za-z0-9.-])(?:{'|'.join(names)})(?:\.[\w-]+)*(?![A-Za-z0-9-])"
        self.hosts = re.compile(pattern, re.IGNORECASE) if names else None

    def __call__(self, value: Any) -> Any:
        """Return the value with stars and without control characters, in texts at any depth."""
        if isinstance(value, str):
            text = CONTROL.sub("\ufffd", ADDRESS.sub(STARS, redacted(value)))
            return self.hosts.sub(STARS, text) if self.hosts else text
        if isinstance(value, list | tuple):
            return [self(part) for part in value]
        if isinstance(value, dict):
            return {
                self(str(key)): self(shortened(part) if "git_commit" in str(key) else part)
                for key, part in value.items()
            }
        return value


def shortened(commits: Any) -> Any:
    """Return a commit, or a list of them, with the letters that are shown."""
    if isinstance(commits, list):
        return [str(commit)[:COMMIT] for commit in commits]
    return str(commits)[:COMMIT] if commits else commits


def cleaner_for(runs: Sequence[SeenRun]) -> Cleaner:
    """Return a cleaner that knows this machine's name, and those in the runs' state.json."""
    hosts = [platform.node(), platform.node().partition(".")[0]]
    for run in runs:
        host = read_json(run.path / "state.json").get("host")
        hosts += [host, host.partition(".")[0]] if isinstance(host, str) else []
    return Cleaner(hosts)
