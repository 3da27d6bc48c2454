"""Writes into files which experts the tokens of chosen steps go to."""

from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from scmoe.blocks.double_gate import DoubleGateBlock
from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.files import try_to_write
from scmoe.moe.recorded_routing import Recorded, type_of, write_routing
from scmoe.moe.tokens import Routing
from scmoe.training.callbacks.logged_steps import begins_measured_step


class RecordRouting(Callback):
    """Keeps the experts that the tokens of all ranks go to.

    Each recorded step has a file (moe/recorded_routing.py). Of a step that accumulates
    several batches, the first is recorded.

    every: optimizer steps between two recorded ones; the first one is step 0. folder: where rank 0
    writes; None on other ranks.
    """

    def __init__(self, every: int, folder: Path | None) -> None:
        self.every = every
        self.folder = folder and folder / "routing"
        self.probe: RoutingProbe | None = None

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """Keep what a resumed run recorded before the step that it continues from."""
        if self.folder is not None:
            with suppress(OSError):  # each write warns
                self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("step-*.safetensors"):
                step = path.stem.removeprefix("step-")
                if step.isdecimal() and int(step) >= trainer.global_step:
                    path.unlink()

    def on_train_batch_start(
        self, trainer: Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        if begins_measured_step(trainer, batch_idx, self.every):
            self.step = trainer.global_step
            self.probe = RoutingProbe(module.model)

    def on_before_backward(self, *_: Any) -> None:
        if self.probe is not None:
            self.probe.remove()  # a module that is recomputed in backward routes again

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if self.probe is None:
            return
        probe, self.probe = self.probe, None
        of_ranks = module.wire.mesh.gather_on_rank_zero(probe.result())
        if of_ranks is not None and self.folder is not None:
            ids = [torch.cat(layer)[None] for layer in zip(*of_ranks, strict=True)]
            recorded = Recorded([self.step], ids, probe.num_experts, len(of_ranks))
            path = self.folder / f"step-{self.step:08}.safetensors"
            try_to_write(path, lambda partial: write_routing(recorded, partial))

    def on_exception(self, *_: Any) -> None:
        if self.probe is not None:
            self.probe.remove()


class RoutingProbe:
    """Keeps the experts that every router of a model chooses in one forward pass, by hooks.

    Call `remove` after the pass.
    """

    def __init__(self, model: nn.Module) -> None:
        blocks = moe_blocks_of(model)
        # In DGMoE-Share, two blocks share a router.
        routers = dict.fromkeys(block.moe.router for block in blocks)
        # How often each block calls its router.
        self.calls = [2 if isinstance(block, DoubleGateBlock) else 1 for block in blocks]
        self.num_experts = blocks[0].moe.router.num_experts
        self.ids: list[Tensor] = []  # [T, K] of each call, in the order of calls
        self.handles = [router.register_forward_hook(self._keep) for router in routers]

    def _keep(self, router: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
        # Zero experts have higher ids.
        self.ids.append(routing.topk_ids_TK.clamp(max=self.num_experts))

    def result(self) -> list[Tensor]:
        """Return the ids [T, K] of each MoE layer in host memory, in a small type.

        The two choices of a router that was called twice in its layer (DGMoE) are side by side.
        """
        assert len(self.ids) == sum(self.calls)
        ids = iter(self.ids)
        layers = [torch.cat([*islice(ids, calls)], dim=1) for calls in self.calls]
        return [ids_TK.to(type_of(self.num_experts)).cpu() for ids_TK in layers]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
