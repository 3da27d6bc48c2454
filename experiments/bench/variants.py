"""A variant: what `bench overlap` measures in one turn. Each block of a row runs at a schedule of its own window."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from scmoe.experiments.bench.loads import BALANCED
from scmoe.planning.pricing import LayerChoice
from scmoe.schedule.cost import OperatorTimes, slots
from scmoe.schedule.schedule import Schedule


@dataclass(frozen=True)
class Variant:
    """Blocks with a schedule. way: overlapped, sequential (each transfer is waited for at once), free, or alone (free,
    and gradients stay on their ranks). load: of their experts (loads.py).

    schedule: of the last block; the others have the same place, or as `placed` says. own: that of each, if it is not.
    """

    block: str
    schedule: Schedule
    way: str = "overlapped"
    load: str = BALANCED
    own: tuple[Schedule, ...] = ()

    def of_blocks(self, schedules: Iterable[Schedule]) -> list[Schedule]:
        """Return the schedule of each block, given any schedules that they have."""
        return list(self.own) or [placed(each, self.schedule) for each in schedules]


def chosen_by(choices: Sequence[LayerChoice], block: str, load: str) -> Variant:
    """Return the variant of a planner's choices for the blocks of a row."""
    schedules = [choice.schedule for choice in choices]
    variant = Variant(block, schedules[-1], load=load)
    return variant if variant.of_blocks(schedules) == schedules else replace(variant, own=tuple(schedules))


def windows_of(variant: Variant, choices: Sequence[LayerChoice]) -> list[tuple[Schedule, OperatorTimes]]:
    """Return the schedule of each block of a row, and the times of its operators as the planner has measured them."""
    schedules = variant.of_blocks(choice.schedule for choice in choices)
    return [(each, choice.times[each.chunks]) for each, choice in zip(schedules, choices, strict=True)]


def placed(own: Schedule, like: Schedule) -> Schedule:
    """Return a block's own schedule at the place of another block's, in as many chunks. Where its window is shorter, it
    is the last place before, as the planner chooses it (planning/pricing.py)."""
    places = slots(replace(own, chunks=like.chunks))
    at = like.slot, like.inside_attention
    return [each for each in places if (each.slot, each.inside_attention) <= at or each is places[0]][-1]


def of_each_kind(variants: Iterable[Variant]) -> list[list[Variant]]:
    """The variants whose experts run between operators, and those inside attention, if there are any."""
    kinds: dict[bool, list[Variant]] = {}
    for variant in variants:
        kinds.setdefault(variant.schedule.inside_attention, []).append(variant)
    return [kinds[inside] for inside in sorted(kinds)]
