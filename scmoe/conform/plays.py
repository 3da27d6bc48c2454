"""What every rank does for a question: a play takes a way to make the layer, and returns a Record
of tensors by name.

    output, input gradient         this rank's tokens, whose places in the batch are ROWS_OF_BATCH
    router gradient                every rank has the whole
    dense gradient/NAME            likewise
    expert gradient/ID/NAME        ranks have those of their experts
    expected NAME                  what NAME must be, where the layer itself is its measure

The part of a name before the first slash is its kind. A gradient is that of the sum of all ranks'
losses; the loss that a library averages is made larger first. So a factor that is missing shows as
a ratio.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe.conform.adapter import (
    RATE,
    Adapter,
    Group,
    LowRank,
    Make,
    NotAsked,
    Read,
    gradient,
    value,
)
from scmoe.conform.plain import DIM, EXPERTS, TOP_K, WIDTH
from scmoe.conform.problem import SEED, TOKENS, Problem, draw_problem, draw_weights, pieces_of

Record = dict[str, Tensor]
ROWS_OF_BATCH = "rows of the batch"
LIMIT = 0.1  # of the norm that gradients are clipped to: all are larger
TRAINED_STEPS = 3
PADDING = 3  # padding tokens for each token
RANK = 2  # of a low-rank adapter


class Seat:
    """What a play has: the layer's maker, this rank's place and the type of all numbers."""

    def __init__(
        self,
        make: Make,
        group: Group,
        dtype: torch.dtype,
        order: Tensor | None = None,
        pieces: int = 1,
    ) -> None:
        self.make = make
        self.group = group
        self.dtype = dtype
        # of all tokens, and in how many pieces one process runs them: to measure its rounding
        self.order = order
        self.pieces = pieces

    def layer(self, load: str = "usual", seed: int = SEED) -> Adapter:
        torch.manual_seed(0)
        return self.make(self.group, draw_weights(self.dtype, load, seed), self.dtype)

    def problem(self, layer: Adapter, spread: str = "even", load: str = "usual") -> Problem:
        """Return this rank's part of the batch. NotAsked: the batch has one part, and the question
        is about several."""
        parts = self.parts(layer)
        if spread != "even" and parts == 1 and self.group.size > 1:
            raise NotAsked("all ranks share the same tokens")
        weights = draw_weights(self.dtype, load)
        return draw_problem(weights, self.part(layer), parts, spread, self.order)

    def part(self, layer: Adapter) -> int:
        """Return which part of the tokens this rank has."""
        return self.group.rank // (self.group.size // self.parts(layer))

    def parts(self, layer: Adapter) -> int:
        """Return how many ranks, or groups of ranks, have tokens of their own."""
        return self.group.size // (self.group.ep_size if layer.shares_tokens else 1)

    def factor(self, layer: Adapter) -> float:
        """Return what a loss is multiplied by, so that gradients are those of the sum."""
        return self.parts(layer) if layer.average else 1.0

    def gather(self, own: Any) -> list[Any]:
        values: list[Any] = [None] * self.group.size
        dist.all_gather_object(values, own)
        return values


def hook(layer: Adapter, name: str) -> Callable[..., Any]:
    """Return a hook. Raises NotAsked if the layer has none of this name."""
    chosen = vars(layer)[name]
    if chosen is None:
        raise NotAsked(f"the adapter has no {name}")
    return chosen


# ------------------------------------------------------------------ parts of plays


def run(
    seat: Seat, layer: Adapter, problem: Problem, forward: Callable[[Tensor], Tensor] | None = None
) -> Record:
    """Run forward and backward, and return the output and the gradient of the input."""
    if forward is not None or seat.pieces == 1:
        return run_piece(seat, layer, problem, forward or layer.forward)
    *others, last = pieces_of(problem, seat.pieces)
    with layer.no_sync():
        records = [run_piece(seat, layer, piece, layer.forward) for piece in others]
    records.append(run_piece(seat, layer, last, layer.forward))
    return {name: torch.cat([record[name] for record in records]) for name in records[0]}


def run_piece(
    seat: Seat, layer: Adapter, problem: Problem, forward: Callable[[Tensor], Tensor]
) -> Record:
    x_TD = problem.x_TD.detach().requires_grad_()
    y_TD = forward(x_TD)
    loss = (y_TD * problem.upstream_TD).sum()
    layer.backward(loss * seat.factor(layer))
    x_grad_TD = gradient(x_TD) / (seat.factor(layer) * layer.loss_scale)
    record = {"output": y_TD.detach().clone(), "input gradient": x_grad_TD}
    return record | {ROWS_OF_BATCH: problem.rows_T}


def weights_of(layer: Adapter, read: Read, what: str) -> Record:
    """Return the layer's weights or gradients; `what` ends the kind's name: "expert WHAT"."""
    record = {}
    for name, tensor in layer.dense(read).items():
        kind = f"router {what}" if name == "router" else f"dense {what}"
        record[f"{kind}/{name}"] = tensor
    for i, tensors in layer.plain_experts(read).items():
        for name, tensor in tensors.items():
            record[f"expert {what}/{i}/{name}"] = tensor
    return record


def gradients_of(layer: Adapter) -> Record:
    return weights_of(layer, gradient, "gradient")


# ------------------------------------------------------------------ plays


def whole(seat: Seat, spread: str = "even", load: str = "usual") -> Record:
    """Run forward and backward once."""
    layer = seat.layer(load)
    problem = seat.problem(layer, spread, load)
    return run(seat, layer, problem) | gradients_of(layer)


def non_contiguous(seat: Seat) -> Record:
    """Give tokens whose rows are columns in memory."""
    layer = seat.layer()
    problem = seat.problem(layer)

    def forward(x_TD: Tensor) -> Tensor:
        return layer.forward(x_TD.T.contiguous().T)

    return run(seat, layer, problem, forward) | gradients_of(layer)


def recomputed(seat: Seat) -> Record:
    layer = seat.layer()
    problem = seat.problem(layer)
    hook(layer, "recompute")()
    return run(seat, layer, problem) | gradients_of(layer)


def accumulated(seat: Seat) -> Record:
    """Accumulate the gradients of two batches, of which only the second is reduced."""
    layer = seat.layer()
    problem = seat.problem(layer)
    first, second = pieces_of(problem, 2)
    with layer.no_sync():
        run(seat, layer, first)
    run(seat, layer, second)
    return gradients_of(layer)


def frozen(seat: Seat) -> Record:
    layer = seat.layer()
    problem = seat.problem(layer)
    hook(layer, "freeze")()
    return run(seat, layer, problem) | gradients_of(layer)


def twice(seat: Seat) -> Record:
    first, second = whole(seat), whole(seat)
    record = {f"again/{name}": tensor for name, tensor in second.items()}
    return record | {f"expected again/{name}": tensor for name, tensor in first.items()}


def clipped(seat: Seat) -> Record:
    """Clip by the global norm. It is compared with that of the layer's own gradients, each expert
    once."""
    layer = seat.layer()
    problem = seat.problem(layer)
    run(seat, layer, problem)
    before = gradients_of(layer)
    squares: dict[str, float] = {}
    local_squares = {name: t.double().square().sum().item() for name, t in before.items()}
    for squares_of_rank in seat.gather(local_squares):
        squares |= squares_of_rank
    norm = math.sqrt(sum(squares.values()))
    returned = float(hook(layer, "clip")(LIMIT))

    record = {"norm": torch.tensor(returned), "expected norm": torch.tensor(norm)}
    for name, tensor in gradients_of(layer).items():
        record[f"clipped/{name}"] = tensor
        record[f"expected clipped/{name}"] = before[name] * (LIMIT / returned)
    return record


def stepped(seat: Seat) -> Record:
    """Take one step. It is compared with a step along the layer's own gradients."""
    layer = seat.layer()
    problem = seat.problem(layer)
    run(seat, layer, problem)
    before, gradients = weights_of(layer, value, "weight"), gradients_of(layer)
    hook(layer, "step")()
    record = {}
    for name, tensor in weights_of(layer, value, "weight").items():
        if name == "dense weight/bias":  # it moves by a rule of its own
            continue
        record[f"stepped/{name}"] = tensor
        slope = gradients[name.replace(" weight/", " gradient/")]
        record[f"expected stepped/{name}"] = before[name] - RATE * slope
    return record


def after_steps(seat: Seat) -> Record:
    """Take a few steps. Replicas, and the balance loss, must then have the bits of rank 0."""
    layer = seat.layer()
    problem = seat.problem(layer)
    step, balance = hook(layer, "step"), []
    for _ in range(TRAINED_STEPS):
        run(seat, layer, problem)
        if layer.balance is not None:
            balance.append(torch.as_tensor(layer.balance()).detach().clone())
        step()

    replicas = layer.dense(value)
    record = {"bias": replicas["bias"]} if "bias" in replicas else {}
    if balance:
        record["balance"] = balance[0]  # that of the weights that were given
        replicas["balance loss"] = balance[-1]
    of_rank_0 = seat.gather(replicas)[0]
    for name, tensor in replicas.items():
        record[f"replica/{name}"] = tensor
        record[f"expected replica/{name}"] = of_rank_0[name]
    return record


def non_finite(seat: Seat) -> Record:
    """Give the last rank, or all that share its tokens, an infinite number. All ranks must see a
    norm that is not finite, or raise an error."""
    layer = seat.layer()
    problem = seat.problem(layer)
    if seat.part(layer) == seat.parts(layer) - 1:
        problem.x_TD[0, 1] = math.inf
    clip = hook(layer, "clip")
    try:
        run(seat, layer, problem)
        norm = float(clip(LIMIT))
    except (ArithmeticError, ValueError, RuntimeError):
        norm = math.nan
    finite = torch.tensor(float(math.isfinite(norm)))
    return {"norm is finite": finite, "expected norm is finite": torch.tensor(0.0)}


def raising(seat: Seat) -> Record:
    """Let the last rank raise. The others must end by themselves."""
    if seat.group.size == 1:
        raise NotAsked("there is no other rank")
    layer = seat.layer()
    problem = seat.problem(layer)
    if seat.group.rank == seat.group.size - 1:
        raise ValueError("this rank raises, as it was asked to")
    return run(seat, layer, problem)


# ------------------------------------------------------------------ padding


def masked(seat: Seat, layer: Adapter, problem: Problem) -> Record:
    """Run forward and backward with padding before the tokens, whose outputs are in the loss."""
    num_padding = PADDING * len(problem.x_TD)
    padding_TD = problem.x_TD[:1].expand(num_padding, -1)
    mask_T = torch.arange(num_padding + len(problem.x_TD)) >= num_padding
    longer = problem._replace(
        x_TD=torch.cat([padding_TD, problem.x_TD]),
        upstream_TD=torch.cat([torch.ones_like(padding_TD), problem.upstream_TD]),
    )
    forward = hook(layer, "masked")
    record = run(seat, layer, longer, lambda x_TD: forward(x_TD, mask_T))
    input_gradient_TD = record["input gradient"]
    record["output"] = record["output"][num_padding:]
    record["input gradient"] = input_gradient_TD[num_padding:]
    record["padding gradient"] = input_gradient_TD[:num_padding]
    record["expected padding gradient"] = torch.zeros_like(padding_TD)
    return record


def padded(seat: Seat) -> Record:
    layer = seat.layer()
    problem = seat.problem(layer)
    return masked(seat, layer, problem) | gradients_of(layer)


def padded_under_capacity(seat: Seat) -> Record:
    """Give each expert room for all tokens of a rank, but not for its padding too."""
    layer = seat.layer()
    problem = seat.problem(layer)
    hook(layer, "capacity")(len(problem.x_TD))
    return masked(seat, layer, problem) | gradients_of(layer)


def padded_rows(seat: Seat) -> Record:
    layer = seat.layer()
    problem = seat.problem(layer)
    rows = hook(layer, "rows")
    masked(seat, layer, problem)
    total = sum(seat.gather(int(rows())))
    return {"rows": torch.tensor(float(total)), "expected rows": torch.tensor(TOKENS * TOP_K * 1.0)}


# ------------------------------------------------------------------ other weights


def saved(seat: Seat, folder: str) -> Record:
    layer = seat.layer()
    hook(layer, "save")(folder)
    return {}


def loaded(seat: Seat, folder: str) -> Record:
    """Load a checkpoint into a layer with other weights, and compare these with the weights that
    were saved."""
    layer = seat.layer(seed=SEED + 3)
    hook(layer, "load")(folder)

    weights = draw_weights(seat.dtype)
    record = {}
    dense = {"router": weights.router, "projection": weights.projection}
    for name, tensor in layer.dense(value).items():
        if name in dense:
            record[f"loaded/{name}"] = tensor
            record[f"expected loaded/{name}"] = dense[name]
    for i, tensors in layer.plain_experts(value).items():
        for name, tensor in tensors.items():
            if name in weights.experts[i]:
                record[f"loaded/{i}/{name}"] = tensor
                record[f"expected loaded/{i}/{name}"] = weights.experts[i][name]
    return record


def with_lora(seat: Seat) -> Record:
    """Train low-rank adapters of each expert's `up`."""
    layer = seat.layer()
    problem = seat.problem(layer)
    generator = torch.Generator().manual_seed(SEED + 4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(seat.dtype) / 4

    factors = {i: LowRank(draw(RANK, DIM), draw(WIDTH, RANK)) for i in range(EXPERTS)}
    hook(layer, "lora")(factors)
    return run(seat, layer, problem) | gradients_of(layer)


PLAYS: dict[str, Callable[..., Record]] = {
    "whole": whole,
    "unequal": partial(whole, spread="unequal"),
    "without rows": partial(whole, spread="none in the last"),
    "one expert": partial(whole, load="one expert"),
    "idle expert": partial(whole, load="an expert without tokens"),
    "non-contiguous": non_contiguous,
    "recomputed": recomputed,
    "accumulated": accumulated,
    "frozen": frozen,
    "twice": twice,
    "clipped": clipped,
    "stepped": stepped,
    "after steps": after_steps,
    "non-finite": non_finite,
    "raising": raising,
    "padded": padded,
    "padded under capacity": padded_under_capacity,
    "padded rows": padded_rows,
    "saved": saved,
    "loaded": loaded,
    "with LoRA": with_lora,
}
