"""Batches take turns on one rank: while the rows of one travel, another one computes.

    batch 1   compute | its rows travel ... | compute | ...
    batch 2           | compute             | its rows travel ...

Each batch runs in a greenlet, a function that can be paused at any depth. `pass_turn` pauses it
before a wait for a transfer, and `in_turns` lets the next batch continue. So blocks know nothing of
it. All batches run on one thread, where autograd numbers its nodes in the order in which they ran.
Backward therefore takes turns in the reverse order, without any greenlet.

Torch keeps its modes (autocast, no_grad, hooks of saved tensors, the CUDA stream) for each thread,
and its settings (the default dtype, the kernels of attention) for the process. So no batch may
enter or set one before a wait and leave it after the wait: the other batches would run in it.
`pass_turn` refuses it.

Two changes are not checked, because torch has no way to read them: `torch.random.fork_rng`, which
would reset the generator after the other batch has drawn from it, and the order of the kernels in
`sdpa_kernel`.
"""

from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch.autograd.graph import disable_saved_tensors_hooks

from scmoe.moe.operators import range_of_profile

CUDA_STREAM = "torch.cuda.stream"  # None until something uses a GPU
DEVICES = ("cpu", "cuda")  # for which autocast is on or off
ATTENTION_KERNELS = (  # of attention
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.math_sdp_enabled,
    torch.backends.cuda.cudnn_sdp_enabled,
)


class Turns:
    """Identifies one call of `in_turns`. batches: how many it runs."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.modes = _modes()

    def check_modes(self) -> None:
        """Raise RuntimeError if this batch has entered one of torch's modes and not left it, or
        has changed a setting."""
        for mode, value in _modes().items():
            began_without = mode == CUDA_STREAM and self.modes[mode] is None
            if value != self.modes[mode] and not began_without:
                raise RuntimeError(
                    f"With several batches in flight, {mode} is open while a block waits for its"
                    " rows, and the other batch would run in it. Leave it before the MoE module"
                    " waits (trainer.recompute=true does so for checkpoints), or use"
                    " schedule.batches_in_flight=1."
                )


class _Batch(greenlet):
    def __init__(self, function: Callable[[], Any], turns: Turns, number: int) -> None:
        super().__init__(function)
        self.turns = turns
        self.number = number
        self.gr_context = copy_context()


def in_turns(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Return the results of the functions. The first one begins, and each runs until it passes its
    turn or ends. A profile shows each turn as a range, scmoe/batch 1 for the first function.

    What a function raises is raised here; the others are then ended, so that none of them stays
    paused.
    """
    turns = Turns(len(functions))
    batches = [_Batch(function, turns, number) for number, function in enumerate(functions, 1)]
    results: dict[_Batch, Any] = {}
    try:
        while len(results) < len(batches):
            for batch in batches:
                if batch.dead:
                    continue
                with range_of_profile(f"batch {batch.number}"):
                    result = batch.switch()
                if batch.dead:
                    results[batch] = result
    finally:
        for batch in batches:
            if not batch.dead:
                batch.throw()
    return [results[batch] for batch in batches]


def pass_turn() -> None:
    """Let the other batches run, and return at the next turn of this one. Return at once if it runs
    alone.

    Raises RuntimeError if one of torch's modes, in which the others would run, is open here.
    """
    current = getcurrent()
    if isinstance(current, _Batch):
        assert current.parent is not None
        current.turns.check_modes()
        current.parent.switch()


def current_turns() -> Turns | None:
    """Return the turns that are being taken now; None: a batch runs alone."""
    current = getcurrent()
    return current.turns if isinstance(current, _Batch) else None


def number_of_batch() -> int:
    """Return the number of the batch whose turn it is, from 1 on; 0: a batch runs alone."""
    current = getcurrent()
    return current.number if isinstance(current, _Batch) else 0


def _modes() -> dict[str, Any]:
    """Return those modes and settings of torch that a block may enter, by what enters them."""
    return {
        # first, as it sets the grad mode too
        "torch.inference_mode": torch.is_inference_mode_enabled(),
        "torch.no_grad or torch.enable_grad": torch.is_grad_enabled(),
        "torch.autocast": [
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in DEVICES
        ],
        "torch.utils.checkpoint or another user of saved_tensors_hooks": _has_hooks(),
        "torch.set_default_dtype": torch.get_default_dtype(),
        "torch.nn.attention.sdpa_kernel": [is_enabled() for is_enabled in ATTENTION_KERNELS],
        CUDA_STREAM: _cuda_stream(),
    }


def _cuda_stream() -> Any:
    """Return the current stream; None: no stream was used yet, and asking would initialize CUDA."""
    return torch.cuda.current_stream() if torch.cuda.is_initialized() else None


def _has_hooks() -> bool:
    """Return whether hooks of saved tensors are set. Torch refuses to disable them then, and has no
    other documented way to see them."""
    try:
        with disable_saved_tensors_hooks("hooks are set"):
            return False
    except RuntimeError:
        return True
