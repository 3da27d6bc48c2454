"""This module trains a tiny GPT on one rank of several and records what training computed.

A training takes three SGD steps through the real Strategy and Trainer. AdamW would divide a wrong
scale of a gradient out again. `run_ranks` runs `train` and `train_cases` on every rank.
"""

import hashlib
import os
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.config.fields import Config
from scmoe.config.load import load_config
from scmoe.moe.dispatcher import Blocking
from scmoe.moe.experts import Experts
from scmoe.parallel.dense.sharded import put, reshard
from scmoe.parallel.mesh import expert_parameters
from scmoe.schedule.cost import slots
from scmoe.schedule.schedule import Schedule
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_model, build_module
from scmoe.training.callbacks.data_position import DataPosition
from scmoe.training.modules import LanguageModel, MoEModule
from scmoe.training.muon import adamw
from tests.support.architectures import overrides
from tests.support.trainer_of import trainer_of

TINY = (
    *("model.layers=2", "model.dim=16", "model.heads=2", "model.ffn_dim=24"),
    *(
        "moe.num_experts=8",
        "moe.capacity_factor=null",
        "moe.load_balance_coef=0.1",
        "moe.z_loss_coef=0.01",
    ),
    *("data.name=synthetic", "data.vocab_size=64", "data.seq_len=16", "data.global_batch_size=8"),
    *(
        "optim.lr=0.1",
        "trainer.accelerator=cpu",
        "trainer.precision=64-true",
        "trainer.max_steps=3",
    ),
    *("trainer.gradient_clip=null", "trainer.progress=false", "trainer.threads=1"),
)


@cache
def tiny(text: str, world_size: int = 1) -> Config:
    """Return the config of words such as `moe.top_k=2`; `moe.` may be left out."""
    return load_config(None, [*TINY, f"trainer.devices={world_size}", *overrides(text)])


class Recording(MoEModule):
    """This module trains with plain SGD, with weights that make every term visible, and records
    what training computed.

    starved: the gate sends every token to the first half of the experts.
    """

    def __init__(self, config: Config, starved: bool = False, **task: Any) -> None:
        optim, trainer, moe = config.optim, config.trainer, config.moe
        super().__init__(
            lambda context: build_model(config, context),
            max_steps=trainer.max_steps,
            make_optimizer=partial(adamw, lr=optim.lr),
            gradient_clip=trainer.gradient_clip,
            load_balance_coef=moe.load_balance_coef,
            z_loss_coef=moe.z_loss_coef,
            **task,
        )
        self.lr, self.starved = optim.lr, starved
        self.outputs: list[Tensor] = []
        self.logged: dict[str, list[Tensor]] = {
            "train/loss": [],
            "train/load_balance_loss": [],
            "train/grad_norm": [],
        }
        self.gradients: list[dict[str, Tensor | None]] = []
        self.drawn: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        self.dropped: list[Tensor] = []

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            self.drawn = self.weights()
            randomise(self.model)
            if self.starved:
                starve(self.model)
            self.model.register_forward_hook(
                lambda module, args, out: self.outputs.append(out[0].detach().clone())
            )
            if hasattr(self.model, "dropout"):
                self.model.dropout.register_forward_hook(
                    lambda module, args, out: self.dropped.append(out == 0)
                )

    def configure_optimizers(self) -> Any:
        self.before = self.weights()
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, lambda step: 1.0)}

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.requires_grad}
        self.gradients.append({name: None if g is None else whole(g) for name, g in grads.items()})
        super().configure_gradient_clipping(*args, **kwargs)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if name in self.logged:
            self.logged[name].append(torch.as_tensor(value).clone())
        super().log(name, value, *args, **kwargs)

    def weights(self) -> dict[str, Tensor]:
        reshard(self.model)
        return {name: whole(p) for name, p in self.model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor that may be split over the ranks which hold the same experts, or
    all ranks."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


class RecordingModel(Recording, LanguageModel):
    pass


def steps_at_every_slot(schedule: Schedule) -> list[tuple[Schedule, bool]]:
    """Return schedules, and whether transfers are waited for at once: for each number of chunks at
    first, where every slot follows. A further step comes before them, as DDP makes its buckets
    again after the first backward.
    """
    steps = [(schedule, False)]
    for chunks in (1, 2, 3):
        places = slots(replace(schedule, chunks=chunks))
        steps += [(places[0], True), *((place, False) for place in places)]
    return steps


class AtEverySlot(RecordingModel):
    """Takes `steps_at_every_slot`, all with the same batch and the same weights: its learning rate
    is 0."""

    def __init__(self, config: Config, schedule: Schedule) -> None:
        super().__init__(config)
        self.steps, self.lr = steps_at_every_slot(schedule), 0.0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        if self.global_step == 0:
            self.batch = batch
            self.dispatchers = [
                (block, block.moe.dispatcher) for block in moe_blocks_of(self.model)
            ]
            assert self.dispatchers
        schedule, at_once = self.steps[self.global_step]
        for block, dispatcher in self.dispatchers:
            block.run_as(schedule, Blocking(dispatcher) if at_once else dispatcher)
        return super().training_step(self.batch, batch_idx)


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Set weights by the parameter's name alone, not its shard: no bias is 0, no norm weight is 1,
    experts differ."""
    experts = {
        name: model.get_submodule(name.rpartition(".")[0]) for name, _ in expert_parameters(model)
    }
    for name, p in model.named_parameters():
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")
        shape, ids = p.shape, slice(None)
        if name in experts:
            module = experts[name]
            assert isinstance(module, Experts)
            shape, ids = (
                (module.num_experts, *p.shape[1:]),
                slice(module.expert_ids.start, module.expert_ids.stop),
            )
        fresh = torch.randn(
            shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )[ids]
        put(p, 1 + 0.3 * fresh if "norm.weight" in name else fresh * (0.3 if p.dim() > 1 else 0.1))


@torch.no_grad()
def starve(model: torch.nn.Module) -> None:
    """Send every token to the first half of the experts: feature 0 of the gates' input decides."""
    for block in model.blocks:
        weight, bias, gate = map(
            whole, (block.tap_norm.weight, block.tap_norm.bias, block.moe.router.gate.weight)
        )
        half = block.moe.router.num_experts // 2
        weight[0], bias[0], gate[:, 0] = 0.0, 20.0, torch.tensor([0.2] * half + [-0.2] * half)
        put(block.tap_norm.weight, weight)
        put(block.tap_norm.bias, bias)
        put(block.moe.router.gate.weight, gate)


def users_trainer(devices: int, strategy: Any, **further: Any) -> Trainer:
    """Return a Trainer on CPUs as a user writes it. It logs, saves and shows nothing, unless
    `further` says so."""
    off = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return Trainer(accelerator="cpu", devices=devices, strategy=strategy, **(off | further))


def fit(
    config: Config, *callbacks: Callback, module: Any = None, data: Any = None, **how: Any
) -> Any:
    """Train on this rank and return the Trainer. Without callbacks no checkpoint is kept.

    module, data: those of the config by default. how: further arguments of Trainer.fit."""
    trainer = trainer_of(
        config, [DataPosition(), *(callbacks or [ModelCheckpoint(save_top_k=0)])], []
    )
    trainer.fit(module or build_module(config), data or build_datamodule(config), **how)
    return trainer


def train(config: Config, module: Recording | None = None) -> dict[str, Any]:
    """Train on this rank and return its record, with its shards of the experts."""
    module = module or RecordingModel(config)
    fit(config, module=module)
    return {
        "logged": module.logged,
        "outputs": module.outputs,
        "gradients": module.gradients,
        "dropped": module.dropped,
        "drawn": module.drawn,
        "before": module.before,
        "after": module.weights(),
        "experts": {name for name, _ in expert_parameters(module.model)},
        "ep": (module.wire.mesh.ep_rank, module.wire.mesh.ep_size),
    }


def end_groups() -> None:
    """End a training's process groups: each has threads, of which a process with many trainings
    would have too many.

    The group of all ranks stays. Its barrier comes first, so that no rank waits for one whose
    groups have ended.
    """
    dist.barrier()
    for group in [
        group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD
    ]:
        dist.destroy_process_group(group)


def be_on_nodes(rank: int, devices: int) -> None:
    """Set torchrun's variables as on machines of `devices` ranks each; trainer.num_nodes must be
    their number."""
    os.environ.update(
        LOCAL_RANK=str(rank % devices),
        GROUP_RANK=str(rank // devices),
        LOCAL_WORLD_SIZE=str(devices),
    )


def train_cases(rank: int, world_size: int, cases: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return one record per case; all cases run in one start of the ranks.

    In a case `... starved` half of the experts get no token."""
    records = {}
    for name, text in cases.items():
        config = tiny(text.replace(" starved", ""), world_size)
        records[name] = train_case(
            rank, config, RecordingModel(config, starved="starved" in text.split()), text
        )
    return records


def train_at_every_slot(
    rank: int, world_size: int, cases: dict[str, tuple[Schedule, str]]
) -> dict[str, dict[str, Any]]:
    """Return one record per case, of a training at every slot of its schedule."""
    records = {}
    for name, (schedule, text) in cases.items():
        config = tiny(f"{text} trainer.max_steps={len(steps_at_every_slot(schedule))}", world_size)
        records[name] = train_case(rank, config, AtEverySlot(config, schedule), text)
    return records


def train_case(rank: int, config: Config, module: RecordingModel, text: str) -> dict[str, Any]:
    try:
        be_on_nodes(rank, config.trainer.devices)
        record = train(config, module)
        if (
            config.strategy.dense == "replicated"
        ):  # DTensor keeps the names of groups from one training to the next
            end_groups()
    except BaseException as error:
        error.add_note(f"case {text}")
        raise
    return record
