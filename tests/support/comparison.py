"""This module compares the records of N ranks (`tests.support.trainings`) with those of one process
or of others."""

from typing import Any

import torch
from torch import Tensor

from scmoe.schedule.schedule import Schedule
from tests.support.trainings import steps_at_every_slot

TOLERANCE = 1e-12  # in float64; tests/parallel/test_ep_equality.py gives the reason
# weights from the seed, weights made for the test, weights after training
MOMENTS = ("drawn", "before", "after")


def assemble(records: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of N ranks in the form of one process: by name, one per step.

    Assert that replicas, shards of the same experts and norms are bit-identical on all ranks that
    hold them.
    """
    first, ep_size = records[0], records[0]["ep"][1]
    for record in records:
        ep_rank, twin = record["ep"][0], records[record["ep"][0]]
        assert ep_rank == twin["ep"][0], "ranks of an EP group have consecutive numbers"
        for moment in MOMENTS:
            for name, value in record[moment].items():
                other = twin if name in first["experts"] else first
                assert torch.equal(value, other[moment][name]), (
                    f"replicas of {name} differ, {moment}"
                )
        assert record["logged"]["train/grad_norm"] == first["logged"]["train/grad_norm"]

    def whole(tensors: list[dict[str, Tensor | None]]) -> dict[str, Tensor]:
        missing = [name for rank in tensors for name, t in rank.items() if t is None]
        assert not missing, f"no gradient: {missing}"
        shards = tensors[:ep_size]
        return {
            name: torch.cat([t[name] for t in shards]) if name in first["experts"] else value
            for name, value in tensors[0].items()
        }

    steps = range(len(first["gradients"]))
    values = {
        name: mean
        for name in first["logged"]
        for mean in [_mean([r["logged"][name] for r in records])]
    }
    for step in steps:
        for name, g in whole([r["gradients"][step] for r in records]).items():
            values.setdefault(f"gradient of {name}", []).append(g)
    for moment in MOMENTS:
        values |= {
            f"{name} {moment}": [value]
            for name, value in whole([r[moment] for r in records]).items()
        }
    return values


def _mean(per_rank: list[list[Tensor]]) -> list[Tensor]:
    return [
        torch.stack([v.double() for v in values]).mean(0) for values in zip(*per_rank, strict=True)
    ]


def difference(
    actual: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]
) -> tuple[float, str]:
    """Return the largest difference and its name; a difference from a NaN is infinite."""
    assert actual.keys() == expected.keys()
    worst = (0.0, "nothing")
    for name in expected:
        for step, (a, b) in enumerate(zip(actual[name], expected[name], strict=True)):
            error = (a.double() - b.double()).abs().max().item()
            worst = max(worst, (error if error == error else float("inf"), f"{name}, step {step}"))
    return worst


def smallest(values: dict[str, list[Tensor]]) -> tuple[float, str]:
    """Return the largest entry of the smallest gradient, and its name. If it were near the
    tolerance, a comparison would prove nothing about this gradient."""
    return min(
        (g.abs().max().item(), name)
        for name, steps in values.items()
        if "gradient" in name
        for g in steps
    )


def assert_same(
    records: list[dict[str, Any]], expected: dict[str, list[Tensor]], tolerance: float = TOLERANCE
) -> None:
    error, where = difference(assemble(records), expected)
    assert error <= tolerance, f"{where} differs by {error:.1e}, allowed {tolerance:.0e}"


def assert_same_bits(records: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Assert that losses, gradients and parameters of all ranks, and the outputs of each rank, are
    bit-identical."""
    assert_same(records, assemble(others), tolerance=0.0)
    for record, other in zip(records, others, strict=True):
        assert len(record["outputs"]) == len(other["outputs"]) >= 3
        assert all(
            torch.equal(a, b) for a, b in zip(record["outputs"], other["outputs"], strict=True)
        )


def assert_no_slot_changes_a_bit(
    records: list[dict[str, Any]], schedule: Schedule, expected: dict[str, list[Tensor]] | None
) -> None:
    """Assert of trainings at every slot that steps with equally many chunks are bit-identical in
    losses, norms, all gradients, and outputs of each rank. expected: what one process computes,
    within TOLERANCE."""
    values = {
        name: steps for name, steps in assemble(records).items() if len(steps) > 1
    }  # no weights
    first = 0
    for step, (place, at_once) in enumerate(steps_at_every_slot(schedule)):
        first = step if at_once else first
        for name, steps in values.items():
            assert step == 0 or torch.equal(steps[step], steps[first]), f"{name}, {place}"
            error = 0.0 if expected is None else (steps[step] - expected[name][0]).abs().max()
            assert error <= TOLERANCE, f"{name}, {place}"
        for outputs in (record["outputs"] for record in records):
            assert step == 0 or torch.equal(outputs[step], outputs[first]), place
