"""The debug mode names collectives that ranks start in different orders."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from experiments.engine.ranks import run_ranks
from scmoe.lightning.debug import CompareCollectives, OrderError
from scmoe.training.assembly.model import build_module
from tests.support.failing import MODEL, failure
from tests.support.trainings import fit, tiny

pytestmark = [pytest.mark.dist, pytest.mark.faults]


def swap_two_sums(rank: int, world_size: int, compared: bool) -> list[float]:
    dist.init_process_group("gloo")

    compare = CompareCollectives(timedelta(seconds=10))
    if compared:
        compare.install()
    loads, norms = torch.tensor([1.0]), torch.tensor([100.0])
    if rank == 0:
        dist.all_reduce(loads)
        dist.all_reduce(norms)
    else:
        dist.all_reduce(norms)
        dist.all_reduce(loads)
    compare.remove()
    return [loads.item(), norms.item()]


@pytest.mark.representative
def test_collectives_in_another_order_are_named():
    assert run_ranks(swap_two_sums, 2, False) == [[101.0, 101.0]] * 2, (
        "sums are wrong and there is no error"
    )
    message = failure(swap_two_sums, 2, True)
    assert (
        "OrderError: collective 0 is not the same on all ranks; rank 0: all_reduce of torch.float32"
        " (1,)" in message
    )
    assert re.search(
        r"rank 0: \S+ .* at test_collectives\.py:\d+; rank 1: \S+ .* at test_collectives\.py:\d+",
        message,
    )


def arguments_of(rank: int, world_size: int) -> dict[str, tuple[Any, ...]]:
    """Returns the arguments of each collective; objects have a different type on each rank."""
    x, both = torch.ones(2, 3), [torch.ones(2, 3) for _ in range(world_size)]
    thing: Any = (x, "a text")[rank]
    root = rank == 0
    return {
        "gather": (x, both if root else None),
        "scatter": (x, both if root else None),
        "all_gather": (both, x),
        "reduce_scatter": (x, both),
        "all_gather_into_tensor": (torch.ones(2 * world_size, 3), x),
        "reduce_scatter_tensor": (x, torch.ones(2 * world_size, 3)),
        "all_to_all": ([torch.ones(rank + 1, 3) for _ in both], both),
        "broadcast_object_list": ([thing],),
        "all_gather_object": ([None] * world_size, thing),
        "gather_object": (thing, [None] * world_size if root else None),
        "scatter_object_list": ([None], ["a", 1] if root else None),
    }


COLLECTIVES = list(arguments_of(0, 2))
NOT_ON_GLOO = ("reduce_scatter", "all_to_all")


def swap_each(rank: int, world_size: int) -> dict[str, str]:
    """Runs each collective on all ranks, then on rank 0 while the others run a barrier. Returns the
    errors of those."""
    dist.init_process_group("gloo")
    compare, said = CompareCollectives(timedelta(seconds=10)), {}
    compare.install()
    for name in COLLECTIVES:
        if name not in NOT_ON_GLOO:
            getattr(dist, name)(*arguments_of(rank, world_size)[name])
        try:
            (
                getattr(dist, name)(*arguments_of(rank, world_size)[name])
                if rank == 0
                else dist.barrier()
            )
        except OrderError as error:
            said[name] = str(error)
    compare.remove()
    return said


def test_every_kind_of_collective_is_watched():
    """Lightning's own collectives send objects. Different objects or numbers of rows are no error."""
    for said in run_ranks(swap_each, 2):
        assert list(said) == COLLECTIVES
        for name, message in said.items():
            here = (
                rf"rank 0: {name} .*at test_collectives\.py:\d+; rank 1: barrier in group default"
            )
            assert re.search(here, message)


def add_a_sum(rank: int, world_size: int) -> None:
    """Rank 1 starts one collective more than rank 0 in its second step."""
    config = tiny(
        f"{MODEL} trainer.accumulate=1 strategy.debug_collectives=true strategy.timeout_s=20",
        world_size,
    )
    module = build_module(config)

    def one_more() -> None:
        if module.global_step == 1:
            dist.all_reduce(torch.zeros(3))

    if rank == 1:
        module.on_after_backward = one_more
    fit(config, module=module)


def test_the_debug_mode_of_a_run_names_the_first_difference():
    message = failure(add_a_sum, 2)
    here = (
        r"rank 1: all_reduce of torch\.float32 \(3,\) in group default at test_collectives\.py:\d+"
    )
    assert re.search(
        rf"collective \d+ is not the same on all ranks; rank 0: \S+ .*; {here}", message
    ), message


def trained_weights(rank: int, world_size: int, debug: bool) -> dict[str, Tensor]:
    config = tiny(f"{MODEL} strategy.debug_collectives={str(debug).lower()}", world_size)
    before, module = dist.all_reduce, build_module(config)
    fit(config, module=module)
    assert dist.all_reduce is before, "the comparison is removed at the end"
    return {name: p.detach() for name, p in module.named_parameters()}


def test_comparing_changes_no_number():
    for plain, compared in zip(
        run_ranks(trained_weights, 2, False), run_ranks(trained_weights, 2, True), strict=True
    ):
        assert all(torch.equal(plain[name], compared[name]) for name in plain)
