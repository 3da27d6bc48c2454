"""The ranks of one machine on a network of their own, with links of a given rate.

Each rank is in a network namespace.

    rank 0 [eth0] --- link0 [bridge 10.77.0.254] link1 --- [eth0] rank 1

Each eth0 has a token bucket (tc tbf): a rate and no delay.
With more than two ranks each link0, link1, ... has the rate too, so a rank that all others send to
receives no faster. With two ranks, what one receives is what the other sends.

The program first moves into a new network namespace (`enter`, as root or through a user namespace),
and each rank then makes one for itself. A namespace without a name ends with its last process, and
links end with their namespace, so nothing is left behind when the program is killed. Requires
util-linux's `unshare` and iproute2's `ip` and `tc`; `why_not` says what is missing.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import threading

from scmoe.config.leaves import ConfigError

SUBNET = "10.77.0"
BRIDGE, BRIDGE_ADDRESS = "bridge", f"{SUBNET}.254"
ENTERED = "SCMOE_TESTBED_NETWORK"  # set inside the program's own namespace
AT_BRIDGE = "SCMOE_TESTBED_BRIDGE"  # the file of the namespace of the bridge, set in a rank
CLONE_NEWNET = 0x40000000
BURST_KIB = 128  # of a link's token bucket


def inside() -> bool:
    """Return whether this program is in its own network namespace."""
    return ENTERED in os.environ


def why_not() -> str | None:
    """Try to shape a link. Return why that fails here, or None."""
    for tool in ("unshare", "ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    trial = ["ip link add veth0 type veth peer name veth1", "ip link add bridge0 type bridge"]
    trial.append(f"tc qdisc add dev veth0 root {_tbf(1)}")
    done = subprocess.run(
        [*_unshare(), "sh", "-c", " && ".join(trial)], capture_output=True, text=True
    )
    said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
    return None if done.returncode == 0 else said[-1]


def enter() -> None:
    """Replace this process by the same program in a new network namespace with a bridge.

    It returns if the process is inside already.
    """
    if inside():
        return
    os.environ[ENTERED] = "1"
    # c10d warns that the addresses here have no names
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler logs its start and stop
    sys.stdout.flush()
    sys.stderr.flush()
    script = " && ".join([*_bridge(), 'exec "$@"'])
    program = [sys.executable, *sys.orig_argv[1:]]
    os.execvp("unshare", [*_unshare(), "sh", "-c", script, "sh", *program])


def enter_another() -> None:
    """Move this thread, and the ranks that it will start, into one more namespace with a bridge."""
    leave()
    for command in _bridge():
        _run(command)


def _bridge() -> list[str]:
    return [
        "ip link set lo up",
        f"ip link add {BRIDGE} type bridge",
        f"ip addr add {BRIDGE_ADDRESS}/24 dev {BRIDGE}",
        f"ip link set {BRIDGE} up",
    ]


def require() -> None:
    """Call `enter`. ConfigError: links cannot be shaped here."""
    if not inside() and (missing := why_not()):
        raise ConfigError(f"links cannot be shaped here: {missing}")
    enter()


def _unshare() -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--net"]


def attach(pid: int, rank: int) -> str:
    """Connect the namespace of process `pid`, which has called `leave`, to the bridge.

    Return the file of the bridge's namespace, which is that of this thread.
    """
    # the kernel may not yet have removed the link of an earlier rank
    subprocess.run(["ip", "link", "del", f"link{rank}"], capture_output=True)
    _run(f"ip link add link{rank} type veth peer name eth0 netns {pid}")
    _run(f"ip link set link{rank} master {BRIDGE} up")
    return f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net"


def leave() -> None:
    """Move this thread into a new network namespace without links. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(
            ctypes.get_errno(), f"no network namespace: {os.strerror(ctypes.get_errno())}"
        )


def bring_up(rank: int, at_bridge: str) -> None:
    """Give the rank's link its address; the link has no rate yet.

    at_bridge: what `attach` returned.
    """
    os.environ[AT_BRIDGE] = at_bridge
    _run("ip link set lo up")
    _run(f"ip addr add {SUBNET}.{rank + 1}/24 dev eth0")
    _run("ip link set eth0 up")
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"


def set_rate(mbit: float | None) -> None:
    """Set the rate at which this rank sends and receives, in Mbit/s; None: no limit.

    A rank calls it.
    """
    _shape("eth0", mbit)
    if int(os.environ["WORLD_SIZE"]) > 2:
        _shape(f"link{os.environ['RANK']}", mbit, at_bridge=True)


def _shape(device: str, mbit: float | None, at_bridge: bool = False) -> None:
    """Set or remove the rate of a device. at_bridge: it is the other end of a rank's link."""
    tc = f"nsenter --net={os.environ[AT_BRIDGE]} tc" if at_bridge else "tc"
    if mbit is None:
        # it fails if there is no rate to remove, which does not matter
        subprocess.run(f"{tc} qdisc del dev {device} root".split(), capture_output=True)
    else:
        _run(f"{tc} qdisc replace dev {device} root {_tbf(mbit)}")


def _tbf(mbit: float) -> str:
    """Return tc's words for a token bucket.

    A burst passes at once, and the latency is long enough that no packet is dropped.

    With a burst below 64 kB, the largest segment, the processor must cut segments into packets,
    which takes five times the processor time of a transfer (docs/results/archive.md).
    """
    return f"tbf rate {mbit * 1e3:.0f}kbit burst {BURST_KIB}kb latency 2000ms"


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{command}: {done.stderr.strip()}")
