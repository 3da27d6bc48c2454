"""Exchanges without a network: free, and over a GPU's bus to the host and back.

Each is an Exchange for parallel/dispatcher.py, so all code around it is the code that runs between ranks.
"""

import torch
from torch import Tensor

from scmoe.parallel.all_to_all import Exchange, Work


class _Done:
    def wait(self) -> None:
        pass


def free(rows: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, Work]:
    """Free communication: every rank keeps its rows, as if they came from its peers. Equal numbers only."""
    assert not sent and not received
    return rows, _Done()


class _Copied:
    """Waits like NCCL: the current stream waits, the host does not."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.event)


def over_the_bus(device: torch.device) -> Exchange:
    """Copies rows to pinned host memory and back on a separate stream, as an All-to-All between GPUs on PCIe without
    peer access does; one GPU is enough. The copies run in parallel with the computation of the current stream."""
    stream = torch.cuda.Stream(device, priority=-1)

    def exchange(rows: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, Work]:
        assert not sent and not received
        target = torch.empty_like(rows)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            on_host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            on_host.copy_(rows, non_blocking=True)
            target.copy_(on_host, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        rows.record_stream(stream)  # the caching allocator must not hand either buffer out before the copies are done
        target.record_stream(stream)
        return target, _Copied(event)

    return exchange
