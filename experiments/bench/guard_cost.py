"""The cost of the guard against NaN and Inf (fault 27), as a share of a training step.

One process, one thread: forward, backward, clipping and AdamW of a configured model on random tokens, with the guard's
hooks and its check, and without, in turn. It holds for this processor: on a GPU the guard's small reductions cost
kernel launches, which this does not measure.
"""

import statistics
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from scmoe.config.load import load
from scmoe.parallel.mesh import ParallelContext
from scmoe.parallel.update.clipping import clip_grad_norm
from scmoe.parallel.update.guard import Guard
from scmoe.training.assembly.model import build_model

ROUNDS, WARM_UP = 15, 2
SIZE = ("data.name=synthetic", "data.seq_len=128", "data.vocab_size=4096", "model.layers=4", "model.dim=256")


def guard_cost(overrides: Sequence[str]) -> dict[str, float]:
    """Return medians in ms, and the guard's share of a step. overrides: key=value, over SIZE."""
    torch.set_num_threads(1)
    config = load(None, [*SIZE, *overrides])
    context, data = ParallelContext(), config.data
    model = build_model(config, context)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(data.vocab_size, (4, data.seq_len + 1), generator=torch.Generator().manual_seed(0))

    def step(guarded: bool) -> float:
        start = time.perf_counter()
        guard = Guard(model) if guarded else None  # includes making its hooks: an upper bound
        loss = F.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())
        if guard is not None:
            guard.note_loss(loss)
        loss.backward()
        zero = 0.0 if guard is None else guard.loss_as_zero()
        norm = clip_grad_norm(model.parameters(), set(), 1.0, context, zero)
        if guard is not None:
            guard.check(norm, context)
            guard.remove()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    pairs = [(step(True), step(False)) for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
    with_guard, without = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    share = statistics.median(guarded / bare - 1 for guarded, bare in pairs)
    return {"rounds": ROUNDS, "with_ms": with_guard, "without_ms": without, "share_of_a_step": share}
