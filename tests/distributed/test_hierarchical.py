"""On two nodes of two ranks, rows and gradients of the hierarchical exchange are those of the flat
one, bit by bit.

One start of four ranks checks all cases, and trainings by the Strategy. torchrun's variables say
who is on which node.
"""

from __future__ import annotations

import contextlib
import io
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments.engine.ranks import run_ranks
from scmoe.api import MoE
from scmoe.lightning.debug import CompareCollectives
from scmoe.moe.dispatcher import Narrowed, Traffic
from scmoe.moe.experts import Experts
from scmoe.moe.layout import Buffers, Capacity, Dropless
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.parallel.mesh import ParallelContext, build_context, check_experts
from scmoe.parallel.wire import all_to_all as flat_module
from scmoe.parallel.wire.all_to_all import Transfer, all_to_all
from scmoe.parallel.wire.hierarchical import FastestExchange
from tests.support.trainings import tiny, train
from tests.support.transfers import Late, Shuffled, delayed

pytestmark = pytest.mark.dist

NODES, PLACES, DIM, EXPERTS = 2, 2, 8, 8
RANKS = NODES * PLACES
STREAMS = {  # how rows are arranged, chunks, rows' type on the network
    "dropless": (Dropless(), 1, None),
    "dropless, three chunks": (Dropless(), 3, None),
    "dropless in bfloat16": (Dropless(), 2, torch.bfloat16),
    "a capacity, filled": (Capacity(1.0, filled=True), 2, None),
    "a capacity, all slots": (Capacity(1.5), 2, None),
    "buffers": (Buffers(3.0), 2, None),
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numbers_of_rows() -> dict[str, Tensor]:
    """Returns numbers of rows by [sender, receiver]."""
    uneven = torch.randint(0, 5, (RANKS, RANKS), generator=torch.Generator().manual_seed(0))
    one_sends_none, one_gets_none = uneven.clone(), uneven.clone()
    one_sends_none[1], one_gets_none[:, 2] = 0, 0
    crossing = torch.zeros_like(uneven)
    crossing[0, 3] = 4
    return {
        "uneven": uneven,
        "one rank sends none": one_sends_none,
        "one rank gets none": one_gets_none,
        "from one node to the other place of the other": crossing,
        "none at all": torch.zeros_like(uneven),
    }


def moved(context: ParallelContext, by_rank: Tensor | None, rank: int, way: str) -> list[Tensor]:
    """Returns the rows that arrive and the gradient that comes back, of two transfers that are in
    flight at once."""
    exchange = context.exchange if way == "hierarchical" else all_to_all(context.ep_group)
    traffic = None
    if by_rank is not None:
        traffic = Traffic(by_rank[rank].tolist(), by_rank[:, rank].tolist(), by_rank)
    num_rows = 3 * RANKS if traffic is None else sum(traffic.sent)
    rows = [random(num_rows, DIM, seed=10 * i + rank).requires_grad_() for i in range(2)]
    transfers = [Transfer(exchange, traffic).start(own) for own in rows]
    arrived = [transfer.wait() for transfer in transfers]
    loss = sum(
        (own * random(*own.shape, seed=20 * i + rank)).sum() for i, own in enumerate(arrived)
    )
    loss.backward()
    return [*arrived, *(own.grad for own in rows)]


def trained(context: ParallelContext, stream: tuple, rank: int) -> list[Tensor]:
    """Returns output and all gradients of an MoE module."""
    rows, chunks, wire = stream
    torch.manual_seed(7)
    router, experts = (
        Router(DIM, EXPERTS, 2),
        Experts(DIM, 16, EXPERTS, context.local_experts(EXPERTS)),
    )
    dispatcher = context.dispatcher(EXPERTS, buffered=isinstance(rows, Buffers))
    dispatcher = dispatcher if wire is None else Narrowed(dispatcher, wire)
    moe: nn.Module = MoEStream(router, experts, dispatcher, rows)
    x = random(3, 6, DIM, seed=rank).requires_grad_()
    y, _ = moe(x, chunks=chunks)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in moe.parameters())]


def same(ours: list[Tensor], flat: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, flat, strict=True))


def check_all(rank: int, world_size: int) -> list[str]:
    """Returns the lines with the choice of auto."""
    dist.init_process_group("gloo")
    given = 4, torch.device("cpu"), timedelta(seconds=60)
    lines: list[str] = []
    contexts = {
        way: build_context(*given, way, PLACES, lines.append)
        for way in ("flat", "hierarchical", "auto")
    }
    two = contexts["hierarchical"]
    assert contexts["flat"].exchange is None and isinstance(
        contexts["auto"].exchange, FastestExchange
    )

    for group, way in ((two, "hierarchical"), (contexts["auto"], "auto")):
        assert MoE(DIM, EXPERTS, group=group).dispatcher.exchange == contexts[way].carried()
    flat_moe = MoE(DIM, EXPERTS, group=two.ep_group)
    with pytest.raises(ValueError, match="rows would not travel in two hops"):
        check_experts(flat_moe, two)
    check_experts(flat_moe, contexts["auto"])
    with pytest.raises(ValueError, match="holds experts 0 to"):
        check_experts(MoE(DIM, EXPERTS), two)

    cases = {"equal": None} | numbers_of_rows()
    flat_rows = {name: moved(two, case, rank, "flat") for name, case in cases.items()}
    for name, case in cases.items():
        assert same(moved(two, case, rank, "hierarchical"), flat_rows[name]), name
    for late in (Late, Shuffled):  # hop 1 comes as late as it may, and overtakes others
        with patch.object(flat_module, "point_to_point", delayed(late)):
            for name, case in cases.items():
                assert same(moved(two, case, rank, "hierarchical"), flat_rows[name]), (
                    f"{name}, {late.__name__}"
                )

    flat = {name: trained(contexts["flat"], stream, rank) for name, stream in STREAMS.items()}
    for way in ("hierarchical", "auto"):
        for name, stream in STREAMS.items():
            assert same(trained(contexts[way], stream, rank), flat[name]), f"{way}: {name}"

    compare = CompareCollectives(timedelta(seconds=60))
    compare.install()
    assert same(trained(two, STREAMS["dropless"], rank), flat["dropless"])
    compare.remove()
    assert compare.count > 0

    layout = (
        "top_k=2 trainer.max_steps=2 trainer.devices=2 trainer.num_nodes=2 strategy.ep_size=4"
        " strategy.exchange="
    )
    with contextlib.redirect_stderr(io.StringIO()) as said:
        flat_run, two_hops, measured = (
            train(tiny(layout + way)) for way in ("flat", "hierarchical", "auto")
        )
    assert said.getvalue().count("strategy.exchange: ") == (rank == 0), (
        "whatever Lightning's loggers show"
    )
    for name, weight in flat_run["after"].items():
        assert torch.equal(two_hops["after"][name], weight) and torch.equal(
            measured["after"][name], weight
        ), name
    return lines


def test_two_hops_change_no_bit():
    of_ranks = run_ranks(check_all, RANKS, nodes=NODES)
    (line,) = of_ranks[0]
    assert of_ranks == [[line]] * RANKS, "all ranks agree on the choice, which is made once"
    assert line.startswith(
        ("strategy.exchange: flat (flat", "strategy.exchange: hierarchical (flat")
    )
    assert "hierarchical" in line and line.endswith("of rank 0's first rows)")
