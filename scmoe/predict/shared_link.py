"""The link of a rank in backward, which carries rows and sums of gradients.

    rows    | combine' ...... |            | dispatch' |
    sums    | 1 | 1 | 1 |     | 2 |   | 3  |           | 3

Where no rows travel, sums are carried in the order in which they are ready. A transfer of rows does
not wait for sums that are on their way: it shares the link with them, so it takes longer by what
they carry meanwhile. Beside n sums at once it has a part of 1 / (n + 1) of the link, and takes
n + 1 times as long, unless the sums end before. A sum that becomes ready while rows travel waits
for their end; so does one that becomes ready while a transfer waits for the one before it, as the
timelines place a transfer when it is launched.

A link may have a token bucket: while it is idle it saves up to a burst, in seconds of transfers at
its rate, and it sends that much of the next transfer at once. The links of the testbed have one
(experiments/engine/links.py); others have a burst of 0. One bucket stands for those of all ranks
and for both directions. It is full when a pass begins.

    link     idle    | transfer of 8, begins with 3 saved: takes 5 | queued transfer of 8: takes 8
    saved    3           0                                           0

Sums travel at the link's rate, and after one of them nothing is saved, however short it is.

NCCL runs the sums of a group one after another. gloo runs two: with four sums of 1 MiB on the link,
a transfer of 1 MiB took 3.0 and 3.2 times as long as alone (118 and 274 Mbit/s, 2-core CPU, shared,
2026-11-30).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from scmoe.schedule.play import PER_CHUNK, Span


class Sum(NamedTuple):
    """A sum of gradients over ranks. It can begin when a part of an operator's backward is over."""

    seconds: float  # on the link
    operator: str  # of the block; each time that it runs has such a sum
    part: float = 1.0  # BEFORE has several sub-layers: the share of its backward up to this one


class BlockSums(NamedTuple):
    """The sums of a block's gradients. chunks: in which its experts and transfers run."""

    sums: Sequence[Sum]
    chunks: int


class Waiting(NamedTuple):
    """A sum that the link has not carried, or not all of it."""

    ready: float
    seconds: float


class TokenBucket:
    """What a link saves while it is idle, from time 0 on.

    burst: seconds that the link needs for what it saves at most. saved: of that, at time 0; None:
    all. sent_at_once: seconds of all transfers so far that were not needed, as they were saved.
    """

    def __init__(self, burst: float, saved: float | None = None) -> None:
        self.burst = burst
        self.saved = burst if saved is None else saved
        self.idle_from = 0.0
        self.sent_at_once = 0.0

    def meets(self, begin: float, duration: float) -> float:
        """Carry a transfer. duration: at the link's rate. Return by how much it takes longer:
        negative, as a part was saved, or 0."""
        saved = self.saved_at(begin)
        at_once = min(saved, duration)
        self.saved = saved - at_once
        self.idle_from = begin + duration - at_once
        self.sent_at_once += at_once
        return -at_once

    def saved_at(self, time: float) -> float:
        """Return the seconds that are saved at a time, before which the link is idle."""
        return min(self.burst, self.saved + max(0.0, time - self.idle_from))

    def spend(self, until: float) -> None:
        """Note that other bytes travel until a time, so that nothing is saved then."""
        self.saved = 0.0
        self.idle_from = until


class SharedLink:
    """The link while a pass is played, which begins at time 0.

    blocks: whose gradients are summed; none in forward. number: of batches, or pieces of one, that
    go through the blocks in turns. at_once: sums that share the link with a transfer of rows.
    waiting: sums of what has run before; `ready` may be negative. bucket: None: the link saves
    nothing.
    """

    def __init__(
        self,
        blocks: Sequence[BlockSums],
        number: int = 1,
        at_once: int = 1,
        waiting: Iterable[Waiting] = (),
        bucket: TokenBucket | None = None,
    ) -> None:
        self.blocks = blocks
        self.summed_after = [{each.operator for each in block.sums} for block in blocks]
        self.number = number
        self.at_once = at_once
        self.waiting = sorted(waiting)
        self.bucket = bucket or TokenBucket(0.0)
        self.now = min((each.ready for each in self.waiting), default=0.0)
        self.summed = sum(each.seconds for each in self.waiting)  # seconds of all sums so far
        self.later = 0.0  # how much longer transfers took as they met sums
        self.runs: Counter[tuple[int, int, str]] = Counter()  # of an operator in a half
        self.pieces: Counter[tuple[int, str, int]] = Counter()  # of a run that have ended

    def computed(self, span: Span) -> None:
        """Note that a piece of an operator has ended. A sum is ready with its last piece: the last
        chunk of the last half."""
        if not self.blocks:
            return
        layer = span.layer
        block = self.blocks[layer]
        if span.operator not in self.summed_after[layer]:
            return
        sums = [each for each in block.sums if each.operator == span.operator]
        run = 0
        pieces = self.number
        if span.operator in PER_CHUNK:
            pieces *= block.chunks
        else:
            run = self.runs[layer, span.half, span.operator]
            self.runs[layer, span.half, span.operator] += 1
        self.pieces[layer, span.operator, run] += 1
        if self.pieces[layer, span.operator, run] < pieces:
            return
        for each in sums:
            ready = span.start + each.part * (span.end - span.start)
            self.waiting.append(Waiting(ready, each.seconds))
            self.summed += each.seconds
        self.waiting.sort()

    def meets(self, begin: float, duration: float) -> float:
        """Carry a transfer of rows. Return by how much it takes longer than its duration; negative:
        shorter."""
        self.carry_sums(begin)
        alone = duration + self.bucket.meets(begin, duration)
        begun = [each for each in self.waiting if each.ready <= begin]
        later = min(sum(each.seconds for each in begun), self.at_once * alone)
        self._carry(later)
        self.now = begin + alone + later
        if later > 0:
            self.bucket.spend(self.now)
        self.later += later
        return alone + later - duration

    def carry_sums(self, until: float) -> float:
        """Carry sums up to a time at which no rows travel before it. Return when the last one that
        was carried has ended."""
        end = self.now
        while self.waiting and max(self.now, self.waiting[0].ready) < until:
            self.now = max(self.now, self.waiting[0].ready)
            carried = min(self.waiting[0].seconds, until - self.now)
            self._carry(carried)
            self.now += carried
            self.bucket.spend(self.now)
            end = self.now
        self.now = max(self.now, until)
        return end

    def _carry(self, seconds: float) -> None:
        """Take seconds from the sums, in order."""
        while self.waiting and self.waiting[0].seconds <= seconds:
            seconds -= self.waiting.pop(0).seconds
        if seconds > 0 and self.waiting:
            first = self.waiting[0]
            self.waiting[0] = first._replace(seconds=first.seconds - seconds)
