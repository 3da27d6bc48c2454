"""The cache: slots for experts on the device, and the two ways in which an expert is fetched.

    host      a thread reads from the store's file into a slot in memory
    CUDA      a separate stream copies from pinned host memory into a slot on the device; it has not
              run yet, see docs/inference.md

All MoE layers share the slots: an expert of a layer is needed once for each token, so the slots
serve one layer after the other. The smallest cache holds the experts that one token needs in one
layer (and, for speculative, as many guessed ones). If every slot is used, the least recently used
expert is evicted. Slots are made once; nothing else on the device grows with the number of
experts.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scmoe.inference.offload.store import Key, Store, StoreError

# Returns once an expert is in its slot. On a device, the current stream waits.
Wait = Callable[[], Any]


class FileReader:
    """Read experts from the store's file in one thread, one after the other.

    rate_mb_s: a bound for experiments, in 10^6 bytes a second; None: none.
    """

    def __init__(self, store: Store, rate_mb_s: float | None = None) -> None:
        self.store = store
        self.rate_mb_s = rate_mb_s
        self.thread = ThreadPoolExecutor(1, "experts")
        self.stop = Event()

    def start(self, key: Key, slot: Tensor) -> Wait:
        return self.thread.submit(self._read, key, slot).result

    def close(self) -> None:
        """End the reads in flight, and wait until there are none."""
        self.stop.set()
        self.thread.shutdown(cancel_futures=True)

    def _read(self, key: Key, slot: Tensor) -> None:
        begin = time.perf_counter()

        def pace(done: int) -> None:
            if self.rate_mb_s is not None:
                due = begin + done / (1e6 * self.rate_mb_s) - time.perf_counter()
                if due > 0:
                    self.stop.wait(due)
            if self.stop.is_set():
                raise StoreError("the cache was closed")

        self.store.read_into(key, slot, pace)


class PinnedCopies:
    """Hold all experts in pinned host memory, and copy them on a separate stream, one after the
    other."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pinned = {
            key: torch.empty(store.num_bytes(key), dtype=torch.uint8, pin_memory=True, device="cpu")
            for key in store.places
        }
        for key, target in self.pinned.items():
            store.read_into(key, target)

    def start(self, key: Key, slot: Tensor) -> Wait:
        # The slot's previous expert may still be in use.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        expert = self.pinned[key]
        with torch.cuda.stream(self.stream):
            slot[: expert.numel()].copy_(expert, non_blocking=True)
        copied = self.stream.record_event()
        return lambda: torch.cuda.current_stream(self.device).wait_event(copied)

    def close(self) -> None:
        self.stream.synchronize()
        self.pinned.clear()


Source = FileReader | PinnedCopies


class Held(NamedTuple):
    """A slot that holds an expert, or whose expert is being fetched."""

    slot: Tensor  # bytes
    wait: Wait


class Cache:
    """Slots for experts.

    Use it as a context manager, or close it: that ends its thread and closes the store. ahead:
    number of experts that one call of `prefetch` fetches or keeps, at most `slots`; 1: none is
    fetched before its turn.
    """

    def __init__(
        self, store: Store, source: Source, slots: int, ahead: int, device: torch.device
    ) -> None:
        largest = max(store.num_bytes(key) for key in store.places)
        self.store = store
        self.source = source
        self.slots = slots
        self.ahead = ahead
        self.unused = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(slots)]
        self.held = OrderedDict[Key, Held]()  # those used last at the end
        self.closed = False
        self.needed = 0
        self.hits = 0

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the thread to end. The model whose experts were here cannot be called
        afterwards."""
        if not self.closed:
            self.closed = True
            self.source.close()
            self.store.close()
            self.held.clear()
            self.unused.clear()

    @property
    def hit_rate(self) -> float:
        """The share of needed experts that were here, or on their way, when the gate named them."""
        return self.hits / max(1, self.needed)

    def in_turn(self, layer: str, counts: Sequence[int]) -> list[Key]:
        """Return the experts of a layer that have rows, in the order in which to compute them.

        Those that are here come first, since their slots are then free for the others.
        """
        needed = [(layer, e) for e, rows in enumerate(counts) if rows]
        return sorted(needed, key=lambda key: key not in self.held)

    def count(self, keys: Sequence[Key]) -> None:
        """Record for `hit_rate` that the gate has named these experts."""
        self.needed += len(keys)
        self.hits += sum(key in self.held for key in keys)

    def prefetch(self, keys: Sequence[Key]) -> None:
        """Start to fetch those of the first `ahead` keys that are not in the cache.

        None of these keys is evicted.
        """
        if self.closed:
            raise RuntimeError(
                "The cache of this model's experts was closed. Offload the model again."
            )
        wanted = keys[: self.ahead]
        for key in wanted:
            if key in self.held:
                self.held.move_to_end(key)
                continue
            if not self.unused:
                oldest = next(other for other in self.held if other not in wanted)
                self.unused.append(self.held.pop(oldest).slot)
            slot = self.unused.pop()
            self.held[key] = Held(slot, self.source.start(key, slot))

    def weights(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        """Prefetch these experts, wait for the first, and return its w_in_DF and w_out_FD.

        They are valid until the next call. Raises StoreError, with the cache closed, if the expert
        could not be fetched.
        """
        self.prefetch(keys)
        key = keys[0]
        slot, wait = self.held[key]
        try:
            wait()
        except (OSError, StoreError) as error:
            self.close()
            layer, e = key
            raise StoreError(f"expert {e} of {layer} could not be fetched: {error}") from error
        return self.store.weights(key, slot)
