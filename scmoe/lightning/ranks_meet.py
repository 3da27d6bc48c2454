"""How long ranks wait for each other, and what must be set before they meet."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta

from torch.distributed import DistNetworkError, DistStoreError

from scmoe.parallel.mesh import order_launches_of_nccl, stop_using_loopback, use_loopback_for_gloo

LONGEST_S = 1e6  # what a timeout may be
# for ranks to meet: they import, read data and build their modules at different speeds
START_TIMEOUT_S = 600.0


def time_limits(timeout_s: float) -> tuple[timedelta, timedelta]:
    """Return how long a collective may take, and how long until all ranks have met. Raise
    ValueError for a time that is no limit."""
    if not 0 < timeout_s <= LONGEST_S:
        raise ValueError(
            f"timeout_s is {timeout_s}, allowed: above 0, at most {LONGEST_S:g} seconds"
        )
    timeout = timedelta(seconds=timeout_s)
    return timeout, max(timeout, timedelta(seconds=START_TIMEOUT_S))


def prepare_backends(num_nodes: int, at_teardown: ExitStack) -> None:
    """Set the environment variables that NCCL and gloo read. at_teardown: takes what undoes it."""
    order_launches_of_nccl()
    if num_nodes == 1 and use_loopback_for_gloo():
        at_teardown.callback(stop_using_loopback)


@contextmanager
def meeting(limit: timedelta) -> Iterator[None]:
    """Raise TimeoutError if the ranks do not find each other inside."""
    try:
        yield
    except (DistNetworkError, DistStoreError) as error:
        raise TimeoutError(
            f"the ranks did not find each other within {limit.total_seconds():g}"
            " s; start all of them, and check that each can reach MASTER_ADDR; a larger"
            " strategy.timeout_s lets them wait longer"
        ) from error
