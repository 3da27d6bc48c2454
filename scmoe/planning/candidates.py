"""Which schedules the planner tries, and when one of them is the fastest."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from scmoe.planning.choice import ModelChoice

CANDIDATES = 6  # that are tried: the best price of each number of chunks first, then others
NEAR = 1.1  # the others have prices up to NEAR times the lowest
FEWEST_ROUNDS = 5  # of trials, before a candidate is left out
LOSS = 0.01  # of a step: a smaller difference between candidates need not be decided
CANDIDATES_IN_HALVES = 2  # with two batches in flight, beside those with one
GAIN_OF_CHUNKS = 0.02  # of a price: below it, chunks are not tried with two batches in flight


def shortlist(priced: Mapping[int, Sequence[ModelChoice]]) -> list[ModelChoice]:
    """Return the candidates that are worth a trial.

    They are the best price of each number of chunks, and those NEAR the lowest.

    priced: by number of chunks, those of the lowest price first. Prices of numbers of chunks cannot
    be compared: they omit what more and smaller transfers cost, and what chunks gain under uneven
    rows (schedule/play.py).
    """
    best = [candidates[0] for candidates in priced.values()]
    assert len(best) <= CANDIDATES
    others = sorted_by_price(choice for choices in priced.values() for choice in choices[1:])
    highest = NEAR * min(choice.predicted for choice in best)
    near = [choice for choice in others if choice.predicted <= highest]
    return best + near[: CANDIDATES - len(best)]


def sorted_by_price(choices: Iterable[ModelChoice]) -> list[ModelChoice]:
    """Return the choices in the order of their prices."""
    return sorted(choices, key=lambda choice: choice.predicted)


def shortlist_in_flight(
    priced: Mapping[int, Sequence[ModelChoice]], numbers: Sequence[int]
) -> list[ModelChoice]:
    """Return the candidates with one batch in flight as `shortlist` does, and those with two.

    Those with two are the best slot in the fewest chunks, then the best slot of each larger number
    of chunks that has a price lower by GAIN_OF_CHUNKS, then other slots NEAR the best. Prices do
    not show whether two batches are faster than one, because half of the rows take more than half
    of the time, and prices omit the difference. So candidates with two are always tried.

    numbers: of batches in flight.
    """
    one = shortlist(priced) if 1 in numbers else []
    if 2 not in numbers:
        return one
    two = {
        chunks: sorted_by_price(choice.in_two_batches for choice in choices)
        for chunks, choices in priced.items()
    }
    best, *others = two.pop(min(two))
    highest = (1 - GAIN_OF_CHUNKS) * best.predicted
    gaining = [choices[0] for choices in two.values() if choices[0].predicted <= highest]
    near = [choice for choice in others if choice.predicted <= NEAR * best.predicted]
    room = CANDIDATES_IN_HALVES if one else CANDIDATES
    return one + [best, *sorted_by_price(gaining), *near][:room]


def still_fastest(tried: Mapping[int, Sequence[float]]) -> list[int]:
    """Return the candidate with the least time, then those that may be faster by more than LOSS;
    before the first round all, in their order.

    A candidate may be faster if its median ratio to that one, less two standard errors, is below
    1 - LOSS. Before FEWEST_ROUNDS all others are returned. tried: the seconds of each candidate in
    every round. A disturbance affects a whole round, so only times of one round are compared.
    """
    names, rounds = list(tried), min(map(len, tried.values()))
    if not rounds:
        return names
    seconds_CR = torch.tensor([*tried.values()], dtype=torch.float64)
    first = int((seconds_CR / seconds_CR.quantile(0.5, 0)).quantile(0.5, 1).argmin())
    if rounds < FEWEST_ROUNDS:
        return [names[first], *(name for name in names if name != names[first])]
    ratios_CR = seconds_CR / seconds_CR[first]
    least_C = ratios_CR.quantile(0.5, 1) - 2 * ratios_CR.std(1) / rounds**0.5
    least_ratios = zip(names, least_C.tolist(), strict=True)
    return [names[first], *(name for name, least in least_ratios if least < 1 - LOSS)]
