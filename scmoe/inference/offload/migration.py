"""Expert offloading: migration of routed experts to the device beside the backbone (section A.3,
Fig. 13).

    blocking       the experts that the gate names are fetched and waited for at once
    determinate    they are fetched while the backbone runs, and waited for when the experts run, at
                   the last slot. In ScMoE the gate names them at the tap, early enough to hide the
                   fetch
    speculative    the next MoE layer's gate is applied to this layer's representation, and its
                   choice is fetched ahead, as Pre-gated MoE does. A wrong guess costs time: the
                   gate's real choice is fetched late

Migration is a dispatcher: no row is sent, and `wait` waits for weights. On a CPU, results are
bit-identical to those of resident experts, because each expert computes the same products, however
its weights were fetched.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.inference.offload.cache import Cache, FileReader, PinnedCopies, Source
from scmoe.inference.offload.store import Key, Store, expert_layers
from scmoe.moe.dispatcher import (
    Announced,
    Blocking,
    ChunkCounts,
    LocalDispatcher,
    Pending,
    Ready,
    Receipt,
)
from scmoe.moe.experts import Experts, choose_mlps
from scmoe.moe.layout import Capacity
from scmoe.moe.router import Router

WAYS = ("blocking", "determinate", "speculative")


class OffloadedExperts(nn.Module):
    """Experts without parameters, for inference only.

    They are computed one after another with weights from the cache, so that computing one hides
    fetching the next.
    """

    def __init__(self, experts: Experts, cache: Cache, layer: str) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        self.expert_ids = experts.expert_ids
        self.act = experts.act
        self.cache = cache
        self.layer = layer

    def forward(self, rows_RD: Tensor, counts_e: Tensor) -> Tensor:
        """Return [R, D], the experts' results in the order of the rows.

        rows_RD: grouped by expert. counts_e: rows of each, on the host.
        """
        if torch.is_grad_enabled() and rows_RD.requires_grad:
            raise RuntimeError(
                "Offloaded experts have no gradients. Call the model inside torch.inference_mode()."
            )
        counts = counts_e.tolist()
        xs = rows_RD.split(counts)
        y_RD = torch.empty_like(rows_RD)
        ys = y_RD.split(counts)
        left = self.cache.in_turn(self.layer, counts)
        mlps = choose_mlps(rows_RD, None)
        with torch.autocast(rows_RD.device.type, enabled=False):
            while left:
                w_in_1DF, w_out_1FD = (w[None].to(rows_RD.dtype) for w in self.cache.weights(left))
                _, e = left.pop(0)
                ys[e].copy_(mlps(xs[e], w_in_1DF, w_out_1FD, None, self.act))
        return y_RD


@dataclass(frozen=True)
class Fetching:
    """The dispatcher of one rank whose experts of this layer are in the cache.

    Dispatch starts to fetch the experts that have rows. Blocking(Fetching) is the blocking
    baseline, with a cache that fetches none ahead. guessed: name and router of the MoE layer whose
    experts are fetched too, by a guess; None: no guess.
    """

    cache: Cache
    layer: str
    guessed: tuple[str, Router] | None = None

    def announce(self, counts_PE: Tensor) -> Announced:
        return LocalDispatcher().announce(counts_PE)

    def dispatch(self, rows_RD: Tensor, counts: ChunkCounts | None) -> tuple[Pending, Receipt]:
        assert counts is not None, (
            "the numbers of rows are known where only filled slots are computed"
        )
        counts_e = counts.counts_from_e[0].cpu()  # copied once: the experts read them on the host
        needed = self.cache.in_turn(self.layer, counts_e.tolist())
        self.cache.count(needed)
        guessed = [] if self.guessed is None else guess(*self.guessed, rows_RD)
        self.cache.prefetch(needed + guessed)
        return Fetched(self.cache, needed, rows_RD), Receipt(counts_e)

    def combine(self, rows_RD: Tensor, receipt: Receipt) -> Pending:
        return Ready(rows_RD)


@dataclass(frozen=True)
class Fetched:
    """Wait for the first expert. OffloadedExperts waits for each of the others in turn."""

    cache: Cache
    needed: list[Key]
    rows_RD: Tensor

    def wait(self) -> Tensor:
        if self.needed:
            self.cache.weights(self.needed)
        return self.rows_RD


def guess(layer: str, router: Router, rows_RD: Tensor) -> list[Key]:
    """Return the experts that a layer's gate would choose for the rows of an earlier layer."""
    chosen = router(rows_RD).topk_ids_TK.unique().tolist()
    return [(layer, e) for e in chosen if e < router.num_experts]


def offload_experts(
    model: nn.Module,
    path: Path,
    *,
    way: str = "determinate",
    slots: int | None = None,
    rate_mb_s: float | None = None,
) -> Cache:
    """Replace the experts of a whole model by offloaded ones, which come from the store at `path`.

    Return the cache: close it when the model is not needed any more. model: in evaluation mode; its
    Experts may be on the meta device. slots: experts that the device holds, of all layers together;
    None: 2 * top_k. rate_mb_s: a bound for experiments, in 10^6 bytes a second; on a CPU only.
    Raises ValueError for what cannot be honoured, StoreError for a store that is missing, cut,
    changed or another model's.
    """
    blocks = moe_blocks_of(model)
    layers = expert_layers(model)
    top_k = max(block.moe.router.top_k for block in blocks)
    num_experts = sum(experts.num_experts for experts in layers.values())
    slots = min(2 * top_k, num_experts) if slots is None else slots
    device = blocks[0].moe.router.gate.weight.device
    check(way, slots, top_k, num_experts)
    if rate_mb_s is not None and (rate_mb_s <= 0 or device.type != "cpu"):
        raise ValueError(
            f"rate_mb_s is {rate_mb_s} and the model is on {device}. Give a rate above 0, and a"
            " model on a CPU."
        )
    if model.training:
        raise ValueError(
            "The model is in training mode, and offloaded experts are not trained. Call"
            " model.eval()."
        )
    if any(isinstance(block.moe.rows, Capacity) and not block.moe.rows.filled for block in blocks):
        raise ValueError(
            "The model computes empty slots too. Make it dropless (capacity_factor None) or use"
            " rows=filled."
        )

    store = Store(path, model)
    source: Source
    try:
        if device.type == "cpu":
            source = FileReader(store, rate_mb_s)
        else:
            source = PinnedCopies(store, device)
    except BaseException:
        store.close()
        raise
    ahead = 1 if way == "blocking" else slots
    cache = Cache(store, source, slots, ahead, device)

    names = {experts: name for name, experts in layers.items()}
    gates = [(names[block.moe.experts], block.moe.router) for block in blocks]
    for block, (layer, _), following in zip(blocks, gates, [*gates[1:], None], strict=True):
        fetching = Fetching(cache, layer, following if way == "speculative" else None)
        last = replace(
            block.schedule, expert_slot=len(block.schedule.window), chunks=1, inside_attention=False
        )
        block.run_as(last, Blocking(fetching) if way == "blocking" else fetching)
    for name, experts in layers.items():
        stream: Any = model.get_submodule(name.rpartition(".")[0])
        stream.experts = OffloadedExperts(experts, cache, name)
    return cache


def check(way: str, slots: int, top_k: int, num_experts: int) -> None:
    """Raise ValueError for an unknown way, and for a number of slots that it cannot use."""
    if way not in WAYS:
        raise ValueError(
            f"way is {way!r}, allowed: {', '.join(WAYS)}; do not offload a model that is to stay"
            " resident"
        )
    guesses = top_k if way == "speculative" else 0
    least = min(top_k + guesses, num_experts)  # with room for all, every guess has a slot
    if not least <= slots <= num_experts:
        why = f"a token needs {top_k} expert(s) of a layer"
        if guesses:
            why += f", and {guesses} guessed of the next"
        raise ValueError(f"slots is {slots}, allowed: {least} to {num_experts}, as {why}")
