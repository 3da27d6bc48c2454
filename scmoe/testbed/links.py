"""Ranks of one machine on a network of their own: each in a network namespace, its link shaped to a rate.

    rank 0 [eth0] --- link0 [bridge 10.77.0.254] link1 --- [eth0] rank 1        each eth0: tc tbf, a rate, no delay

The program itself moves into a fresh network namespace first (`enter`, as root or through a user namespace), and each
rank makes one for itself. Namespaces without a name end with the last process in them, and links with their
namespace: nothing is left behind, whatever kills the program. Needs util-linux's `unshare` and iproute2's `ip` and
`tc`; `why_not` says what is missing where links cannot be shaped.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

SUBNET = "10.77.0"
BRIDGE, BRIDGE_ADDRESS = "bridge", f"{SUBNET}.254"
ENTERED = "SCMOE_TESTBED_NETWORK"  # set inside the program's own namespace
CLONE_NEWNET = 0x40000000


def inside() -> bool:
    """Whether this program has a network of its own."""
    return ENTERED in os.environ


def why_not() -> str | None:
    """What keeps links from being shaped here; None: nothing. Asked by trying."""
    for tool in ("unshare", "ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    trial = ["ip link add veth0 type veth peer name veth1", "ip link add bridge0 type bridge"]
    trial.append(f"tc qdisc add dev veth0 root {_tbf(1)}")
    done = subprocess.run([*_unshare(), "sh", "-c", " && ".join(trial)], capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def enter(command: Sequence[str]) -> None:
    """Goes on as `command`, in a network namespace of its own with a bridge; returns only where it is inside already.

    command: the arguments of a Python interpreter that repeat this program.
    """
    if inside():
        return
    os.environ[ENTERED] = "1"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # c10d warns that the addresses here have no names
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler tells when it starts and stops
    sys.stdout.flush()
    sys.stderr.flush()
    up = [
        "ip link set lo up",
        f"ip link add {BRIDGE} type bridge",
        f"ip addr add {BRIDGE_ADDRESS}/24 dev {BRIDGE}",
        f"ip link set {BRIDGE} up",
        'exec "$@"',
    ]
    os.execvp("unshare", [*_unshare(), "sh", "-c", " && ".join(up), "sh", sys.executable, *command])


def _unshare() -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--net"]


# ---------------------------------------------------------------------- the caller's end


def attach(pid: int, rank: int) -> None:
    """Ties the namespace of process `pid`, which has called `leave`, to the bridge."""
    # the kernel takes its time to remove the link of an earlier rank that has ended
    subprocess.run(["ip", "link", "del", f"link{rank}"], capture_output=True)
    _run(f"ip link add link{rank} type veth peer name eth0 netns {pid}")
    _run(f"ip link set link{rank} master {BRIDGE} up")


# ---------------------------------------------------------------------- the rank's end


def leave() -> None:
    """Gives this process, which must have one thread, a network namespace of its own, without any link yet."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"no network namespace: {os.strerror(ctypes.get_errno())}")


def bring_up(rank: int) -> None:
    """The rank's link gets its address, and is not shaped yet."""
    _run("ip link set lo up")
    _run(f"ip addr add {SUBNET}.{rank + 1}/24 dev eth0")
    _run("ip link set eth0 up")
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"


def set_rate(mbit: float | None) -> None:
    """Shapes what this rank sends, in Mbit/s; None: as fast as the machine goes."""
    if mbit is None:
        subprocess.run(["tc", "qdisc", "del", "dev", "eth0", "root"], capture_output=True)  # none there: as wanted
    else:
        _run(f"tc qdisc replace dev eth0 root {_tbf(mbit)}")


def _tbf(mbit: float) -> str:
    """A token bucket: burst may pass at once, and no packet waits so long that it is dropped.

    A burst below 64 kB, the largest segment, would have the processor cut segments into packets, as a network card does
    for it: five times the processor time of a transfer (docs/benchmarks.md).
    """
    return f"tbf rate {mbit * 1e3:.0f}kbit burst 128kb latency 2000ms"


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{command}: {done.stderr.strip()}")
