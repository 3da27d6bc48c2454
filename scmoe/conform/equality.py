"""Compares what ranks have played with the measure, and names the first number that differs.

The tolerance is relative to the largest number of a tensor:

    float64   1e-10    n ranks do the same sums in another order, with rounding errors of 1e-16
    float32   1e-5     likewise, 1e-7
    bfloat16  four times the spread that the layer has in one process when its tokens are permuted
              and come in as many batches as there are ranks; measured for each kind of tensor, and
              at least one rounding

A tensor that must be zero is measured against 1. Clipped gradients may differ by 1e-5: torch,
and libraries that clip like torch, add 1e-6 to the norm.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from scmoe.conform.plays import ROWS_OF_BATCH, Record

FIXED = {"float64": 1e-10, "float32": 1e-5}
CLIPPED = 1e-5
BFLOAT16 = "bfloat16"
ONE_ROUNDING = 2.0**-8  # of bfloat16
SPREADS = 4  # n ranks round n partial sums, one process none
OF_TOKENS = ("output", "input gradient")
EXPECTED = "expected "

Tolerance = Mapping[str, float]


class Difference(NamedTuple):
    """The first number that differs. name, rank: of the tensor in the ranks' records. element: its
    index there. ratio: value / expected; None where that has no meaning. why: what is wrong
    instead."""

    name: str
    rank: int
    element: tuple[int, ...] = ()
    value: float = 0.0
    expected: float = 0.0
    ratio: float | None = None
    why: str = ""


def kind_of(name: str) -> str:
    return name.partition("/")[0]


def fixed(dtype: str, kinds: Iterable[str]) -> Tolerance:
    limit = FIXED[dtype]
    return {kind: max(limit, CLIPPED) if kind == "clipped" else limit for kind in kinds}


def spread(first: Record, others: Sequence[Record]) -> dict[str, float]:
    """Return four times the largest relative difference of each kind between plays of one process,
    whose tokens come in different orders."""
    largest: dict[str, float] = {}
    for record in others:
        for name, tensor in record.items():
            if name.startswith(EXPECTED) or name == ROWS_OF_BATCH:
                continue
            same = expectation(name, record, first)
            error = (tensor.double() - same.double()).abs().max().item() / scale(same)
            kind = kind_of(name)
            largest[kind] = max(largest.get(kind, 0.0), error)
    return {kind: SPREADS * error for kind, error in largest.items()}


def scale(expected: Tensor) -> float:
    largest = expected.double().abs().max().item() if expected.numel() else 0.0
    return largest or 1.0


def first_difference(
    records: Sequence[Record], measure: Record, kinds: Iterable[str], tolerance: Tolerance
) -> Difference | None:
    """Return where ranks first differ from the measure in tensors of these kinds.

    A tensor with an expectation of its own is compared with that, and the others with `measure`.
    """
    chosen = {*kinds}
    names = dict.fromkeys([*(name for record in records for name in record), *measure])
    for name in names:
        is_known = name in measure or any(EXPECTED + name in record for record in records)
        if kind_of(name) not in chosen or not is_known:
            continue
        holders = [rank for rank, record in enumerate(records) if name in record]
        if not holders:
            return Difference(name, 0, why="no rank has it")
        for rank in holders:
            expected = expectation(name, records[rank], measure)
            difference = differ(records[rank][name], expected, tolerance[kind_of(name)])
            if difference is not None:
                return difference._replace(name=name, rank=rank)
    return None


def expectation(name: str, record: Record, measure: Record) -> Tensor:
    """Return what a tensor of one rank must be."""
    if EXPECTED + name in record:
        return record[EXPECTED + name]
    return measure[name][record[ROWS_OF_BATCH]] if kind_of(name) in OF_TOKENS else measure[name]


def differ(actual: Tensor, expected: Tensor, limit: float) -> Difference | None:
    """Return the first element that is further from the expected one than limit times the largest
    of them."""
    if actual.shape != expected.shape:
        return Difference("", 0, why=f"its shape is {[*actual.shape]}, not {[*expected.shape]}")
    wide, right = actual.double(), expected.double()
    same = (wide - right).abs() <= limit * scale(expected)
    same |= wide.isnan() & right.isnan()
    if bool(same.all()):
        return None
    index = tuple((~same).nonzero()[0].tolist())
    number, wanted = wide[index].item(), right[index].item()
    ratio = number / wanted if wanted and math.isfinite(number / wanted) else None
    return Difference("", 0, index, number, wanted, ratio)
