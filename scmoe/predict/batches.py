"""Which batches of a step are in flight at once in a prediction.

    ONE       one batch after the other
    HALVES    the halves of each batch, in turns (models/halves.py)
    WHOLE     a whole batch's forward, in turns with the backward of the batch before it: a step
              needs two batches or more, and a rank memory for both

Nothing here imports torch, so the command line reads it.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any


class InFlight(Enum):
    """Values: how many are in flight, and whether these are whole batches."""

    ONE = (1, False)
    HALVES = (2, False)
    WHOLE = (2, True)

    @property
    def number(self) -> int:
        """How many are in flight."""
        return self.value[0]

    @property
    def pieces(self) -> int:
        """The pieces that a batch is cut into."""
        return 2 if self is InFlight.HALVES else 1

    @property
    def held(self) -> int:
        """The batches of which a rank holds activations."""
        return 2 if self is InFlight.WHOLE else 1

    @property
    def facts(self) -> dict[str, Any]:
        """The keys of a row of JSON that say it."""
        number, whole = self.value
        return {"batches_in_flight": number, "whole_batches": whole}

    @property
    def in_words(self) -> str:
        """The end of a label; nothing for one batch."""
        if self is InFlight.ONE:
            return ""
        return ", 2 halves" if self is InFlight.HALVES else ", 2 batches"

    @property
    def in_a_sentence(self) -> str:
        """How a standard model that hides its transfers runs."""
        if self is InFlight.ONE:
            return "in chunks"
        if self is InFlight.HALVES:
            return "with the halves of a batch in flight (schedule.batches_in_flight=2)"
        return "with two whole batches in flight, which Megatron-Core has and scmoe has not"

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> "InFlight":
        """Return what a row of JSON says."""
        return cls((facts["batches_in_flight"], facts["whole_batches"]))
