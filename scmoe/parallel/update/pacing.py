"""Sums gradients over ranks so that rows go first: in small pieces, of which none begins while rows
are in flight.

    link    rows      piece piece rows           piece piece piece ...
            combine               dispatch

Gradients and rows share the rank's link. Backward waits for rows at once, but for gradients only at
its end. So rows wait for at most two pieces that have begun, and gradients use the link while no
rows do. All-reduces of gloo run on the host, where a thread decides when each begins. On CUDA this
is impossible, because the host runs ahead of the device; there the stream of the rows has priority
(mesh.py).
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from scmoe.parallel.wire.wire import Link

REDUCTIONS = ("ddp", "paced")
PIECE_MB, IN_FLIGHT = (
    1.0,
    2,
)  # with one in flight the link is idle until every rank has begun the next
BUCKET_MB = 1.0  # small, so that the first gradients are sent early
STOP_S = 2.0  # to end the thread; it may wait for a rank that has failed


def is_paced(reductions: str | None, device: torch.device, sparse: bool = False) -> bool:
    """Return whether gradients are summed by a Pacer.

    reductions: ddp | paced; None: paced where it is possible. sparse: some gradients are sparse
    tensors, as those of nn.Embedding(sparse=True)."""
    if reductions not in (None, *REDUCTIONS):
        raise ValueError(f"reductions is {reductions!r}, allowed: {' | '.join(REDUCTIONS)} | None")
    if reductions == "paced" and device.type != "cpu":
        raise ValueError(
            "reductions is 'paced', allowed on a GPU: 'ddp': all-reduces run on the device, which"
            " the host cannot pace"
        )
    if reductions == "paced" and sparse:
        raise ValueError("reductions is 'paced', allowed with sparse gradients: 'ddp'")
    return reductions != "ddp" and device.type == "cpu" and not sparse


class _Piece(NamedTuple):
    begin: Callable[
        [], Callable[[], None]
    ]  # starts the transfer, and returns what waits for it and ends the piece
    whole: Tensor | None  # the result, with its last piece
    done: Future[Tensor]


class Pacer:
    """Sums tensors over a group, one after another in the order given; every rank must give the
    same order.

    group: carries nothing else, because its all-reduces begin on a thread. link: that of the rows.
    """

    def __init__(self, group: Any, link: Link, piece_mb: float = PIECE_MB) -> None:
        self.group = group
        self.link = link
        self.piece_bytes = int(piece_mb * 2**20)
        self.queue: SimpleQueue[_Piece | None] = SimpleQueue()
        # a daemon: a rank that fails must not wait at its end for a peer that will never send
        self.thread = threading.Thread(target=self._run, name="gradients", daemon=True)
        self.thread.start()

    def start(self, flat: Tensor) -> Future[Tensor]:
        """Sum a tensor of one dimension in place. The result is the tensor itself."""

        def begin(numbers: Tensor) -> Callable[[], None]:
            return self.group.allreduce([numbers]).wait

        pieces = flat.split(max(1, self.piece_bytes // flat.element_size()))
        return self._queue([partial(begin, numbers) for numbers in pieces], flat)

    def scatter(self, own: Tensor, all_RN: Tensor, group: Any) -> Future[Tensor]:
        """Sum all_RN over the group's R ranks; each keeps its row in `own` [N], which is the
        result.

        Each rank sends its numbers to the rank that keeps them: half of the bytes of gloo's
        reduce-scatter, which is an all-reduce. group: used instead of the Pacer's own; it must
        carry nothing else, too."""

        def begin(own: Tensor, part_RN: Tensor) -> Callable[[], None]:
            theirs_RN = torch.empty_like(mine_RN := part_RN.contiguous())
            work = group.alltoall_base(theirs_RN, mine_RN, [], [])

            def end() -> None:
                work.wait()
                torch.sum(theirs_RN, 0, out=own)

            return end

        numbers = max(1, self.piece_bytes // (len(all_RN) * own.element_size()))
        pieces = zip(own.split(numbers), all_RN.split(numbers, dim=1), strict=True)
        return self._queue([partial(begin, *piece) for piece in pieces], own)

    def _queue(
        self, begins: Sequence[Callable[[], Callable[[], None]]], whole: Tensor
    ) -> Future[Tensor]:
        done: Future[Tensor] = Future()
        *pieces, last = begins
        for begin in pieces:
            self.queue.put(_Piece(begin, None, done))
        self.queue.put(_Piece(last, whole, done))
        return done

    def mean_of_bucket(self, state: None, bucket: dist.GradBucket) -> Future[Tensor]:
        """DDP's communication hook. It scales before it sums, as DDP does without a hook."""
        return self.start(bucket.buffer().mul_(1 / dist.get_world_size(self.group)))

    def stop(self) -> None:
        """End the thread. Python would kill one that still runs at exit inside torch, which aborts
        the process."""
        self.queue.put(None)
        self.thread.join(STOP_S)

    def _run(self) -> None:
        in_flight: deque[tuple[Callable[[], None], _Piece]] = deque()
        while True:
            if len(in_flight) == IN_FLIGHT or (in_flight and self.queue.empty()):
                end, piece = in_flight.popleft()
                with _errors_to(piece.done):
                    end()
                    if piece.whole is not None and not piece.done.done():
                        piece.done.set_result(piece.whole)
            elif (next_piece := self.queue.get()) is None:
                return
            else:
                with _errors_to(next_piece.done):
                    self.link.wait()
                    in_flight.append((next_piece.begin(), next_piece))


@contextmanager
def _errors_to(done: Future[Tensor]) -> Iterator[None]:
    """Let the thread go on, and raise the error where the sum is waited for."""
    try:
        yield
    except Exception as error:
        if not done.done():
            done.set_exception(error)  # type: ignore[arg-type]
