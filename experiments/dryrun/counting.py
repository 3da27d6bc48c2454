"""Counts what operators do to a device, from the calls alone: live bytes, FLOPs, bytes of collectives.

torch has trackers of its own, MemTracker and FlopCounterMode. Both put hooks on every module, and these hold gradients
of outputs and what activation checkpointing computes again longer than autograd does (docs/decisions/0037-dry-run.md).
So this file has no hooks: a storage counts from the operator that makes it until nothing refers to it.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._guards import active_fake_mode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


class Counting(TorchDispatchMode):
    """Counts while it is entered, inside a FakeTensorMode.

    live: bytes by the phase in which their storage was made. peak: `live` when its sum was largest. flops: of products
    and attention. collectives: bytes by operator and group, `sent_bytes` of each call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "weights"
        self.live, self.peak, self.collectives = Counter[str](), Counter[str](), Counter[str]()
        self.flops = 0
        self.sizes: dict[int, tuple[str, int]] = {}  # phase and bytes of each storage
        self.fake = active_fake_mode()

    def add(self, tensors: Iterable[Any]) -> None:
        """Count tensors that were made before, in the current phase."""
        for tensor in tensors:
            storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
            key = storage._cdata
            if key not in self.sizes:
                self.sizes[key] = self.phase, 0
                self._resize(key, storage.nbytes())
                weakref.finalize(storage, self._resize, key, None)

    def _resize(self, key: int, size: int | None) -> None:
        """Note that a storage has so many bytes; None: it is gone."""
        phase, before = self.sizes.pop(key)
        self.live[phase] += (size or 0) - before
        if size is not None:
            self.sizes[key] = phase, size
            if self.live.total() > self.peak.total():
                self.peak = self.live.copy()

    @contextmanager
    def resizing(self) -> Iterator[None]:
        """Inside, storages that FSDP empties and fills again count with their new size; operators do not show it."""
        resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            resized = resize(storage, size)
            if storage._cdata in self.sizes:
                self._resize(storage._cdata, storage.nbytes())
            return resized

        with patch.object(torch.UntypedStorage, "resize_", counted):
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls again, with this rank's parts
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if active_fake_mode() is self.fake:  # else DTensor asks for a shape
            self.add(tensors_in([out]))
            self.flops += flops_of(func.overloadpacket, args, kwargs, out)
            if func.namespace == "c10d":
                name, size = sent_bytes(func, args)
                self.collectives[name] += size
        return out


def flops_of(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return FLOPs of products and attention. torch does not count attention of the CPU; its backward has twice those
    of forward, as for every product: the scores that a kernel computes again are not counted."""
    aten = torch.ops.aten
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(t.shape for t in args[:3]))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return 2 * sdpa_flop_count(*(t.shape for t in args[1:4]))
    return flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0


NAMES = {
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "broadcast_": "broadcast",
}


def sent_bytes(func: Any, args: Any) -> tuple[str, int]:
    """Return a collective's name and group, and the bytes that a rank sends in it, its own share included.

    An all-reduce is a reduce-scatter and an all-gather, so it sends its tensor twice. The others send the larger of
    what goes in and what comes out."""
    name = func.name().partition("::")[2].partition(".")[0]
    group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
    sizes = [sum(t.nbytes for t in tensors_in([arg])) for arg in args]
    who = "all" if group.group_desc == "default_pg" else group.group_desc
    return f"{NAMES[name]} {who}", (1 + (name == "allreduce_")) * max(sizes)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)
