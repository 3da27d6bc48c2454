"""A tiny run in real processes, and saves whose content shows their step (faults 1-10 of
docs/troubleshooting.md)."""

import logging
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from scmoe.config.fields import Config
from scmoe.config.load import load_config
from scmoe.parallel.checkpoint.loading import load_in_place
from scmoe.parallel.checkpoint.saving import Saving
from scmoe.parallel.checkpoint.state import model_state, optimizer_state
from scmoe.parallel.dense.sharded import local, reshard
from scmoe.report import console
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_module
from scmoe.training.assembly.trainer import build_callbacks, seed_everything
from tests.support.trainer_of import trainer_of

EXPERTS = 8
NEVER = "1000000"
TINY = (
    *("model.layers=2", "model.dim=8", "model.heads=2", "model.ffn_dim=8", "model.dropout=0.1"),
    *(
        f"moe.num_experts={EXPERTS}",
        "moe.top_k=2",
        "moe.noisy=true",
        "moe.router=deepseek",
        "moe.bias_rate=0.1",
    ),
    *("data.name=synthetic", "data.vocab_size=16", "data.seq_len=8", "data.global_batch_size=16"),
    *("optim.lr=0.01", "optim.warmup_steps=2", "logger.mode=disabled"),
    *(
        "trainer.accelerator=cpu",
        "trainer.threads=1",
        "trainer.progress=false",
        f"trainer.val_every={NEVER}",
    ),
    *("strategy.timeout_s=60",),
)
WAYS = {
    "replicated": (),
    "sharded": ("strategy.dense=sharded", "strategy.ep_size=1"),
}  # sharded: experts as well
LAST = "last.ckpt"
# steps: of the first checkpoint, of the one saved over it, of training meanwhile
OLD, NEW, NEXT = (1, 2, 3)


def spread(items: Sequence[Any], count: int | None) -> list[Any]:
    """Return `count` of the items, from the first to the last; None: all."""
    count = len(items) if count is None else min(count, len(items))
    return [items[i * (len(items) - 1) // max(1, count - 1)] for i in range(count)]


def progress(items: Sequence[Any], what: str) -> Iterable[Any]:
    return track(items, what, console=console(), transient=True)


def tiny(world_size: int, *overrides: str) -> Config:
    return load_config(None, [*TINY, f"trainer.devices={world_size}", *overrides])


def fit(
    config: Config, run_dir: Path, resume_from: Path | None = None, save_top_k: int = -1
) -> Any:
    """Train on this rank; return the Trainer. save_top_k: -1 keeps all checkpoints, 0 none."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    seed_everything(config.seed)
    trainer: Any = trainer_of(config, build_callbacks(config, run_dir), [])
    for callback in trainer.checkpoint_callbacks:
        callback.save_top_k = save_top_k
    trainer.fit(
        build_module(config), build_datamodule(config), ckpt_path=resume_from, weights_only=True
    )
    return trainer


def one_step(world_size: int, run_dir: Path, *overrides: str) -> Any:
    """Return the Trainer of a run of one step, with weights and AdamW's state to save or to load
    into."""
    return fit(tiny(world_size, "trainer.max_steps=1", *overrides), run_dir, save_top_k=0)


def tensors(trainer: Any) -> dict[str, Tensor]:
    """Return this rank's weights, and AdamW's state of each as `name/key`; of what is split over
    ranks, its part."""
    return {name: local(t) for name, t in named_tensors(trainer).items()}


def named_tensors(trainer: Any) -> dict[str, Tensor]:
    """Return the same, as DTensors where they are split."""
    module = trainer.lightning_module
    reshard(module)
    named = {name: p.detach() for name, p in module.named_parameters()}
    for name, p in module.named_parameters():
        named.update(
            {f"{name}/{key}": value for key, value in trainer.optimizers[0].state[p].items()}
        )
    return named


def state(trainer: Any, step: int) -> dict[str, Any]:
    """Return the part of Lightning's checkpoint dictionary that a save requires."""
    module, mesh = trainer.lightning_module, trainer.strategy.mesh
    return {
        "global_step": step,
        "state_dict": model_state(module, mesh),
        "optimizer_states": [optimizer_state(module, trainer.optimizers[0], mesh)],
    }


def mark(trainer: Any, step: int) -> None:
    """Set every number of every tensor to the step."""
    for t in tensors(trainer).values():
        t.fill_(step)


def save_marked(trainer: Any, path: Path, step: int, background: bool = False) -> None:
    """Save tensors that are equal to the step. background: training reaches NEXT while the
    checkpoint is written."""
    mark(trainer, step)
    saving = Saving(
        path, state(trainer, step), trainer.lightning_module, trainer.strategy.mesh, background
    )
    if background:
        mark(trainer, NEXT)
    saving.finish()


def load_into(trainer: Any, path: Path) -> None:
    load_in_place(path, trainer.lightning_module, trainer.optimizers, trainer.strategy.mesh)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Return whether both are bit-identical."""
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())
