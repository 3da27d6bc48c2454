"""A link with a token bucket: while it is idle it saves up to a burst, in seconds of transfers at
its rate, and it sends that much of the next transfer at once.

    link     idle    | transfer of 8, begins with 3 saved: takes 5 | queued transfer of 8: takes 8
    saved    3           0                                           0

The links of the testbed have one (experiments/engine/links.py); a link without one has a burst of
0. One bucket stands for those of all ranks and for both directions. It is full when a pass begins.
"""

from scmoe.schedule.cost import Span


class TokenBucket:
    """A link from time 0 on, which carries rows alone.

    burst: seconds that the link needs for what it saves at most. saved: of that, at time 0; None:
    all. sent_at_once: seconds of all transfers so far that were not needed, as they were saved.
    """

    def __init__(self, burst: float, saved: float | None = None) -> None:
        self.burst = burst
        self.saved = burst if saved is None else saved
        self.idle_from = 0.0
        self.sent_at_once = 0.0

    def computed(self, span: Span, layer: int = 0, half: int = 0) -> None:
        """Do nothing: computing does not use the link."""

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
