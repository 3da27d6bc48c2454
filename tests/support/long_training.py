"""This module makes the training of many steps that the tests of numerics compare, and records it on one rank."""

from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from scmoe.config.fields import Config
from scmoe.moe.router import Router
from scmoe.parallel.mesh import expert_parameters
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.trainer import build_trainer
from scmoe.training.callbacks.measurements import DataPosition
from scmoe.training.modules import LanguageModel
from tests.support.trainings import RecordingModel

STEPS, BF16_STEPS, CLIP = 100, 30, 0.5
MODEL = "position=pos2 top_k=2 data.seq_len=8 data.global_batch_size=16 trainer.val_every=1000"
TRAINING = f"{MODEL} trainer.accumulate=2 trainer.gradient_clip={CLIP} trainer.max_steps={STEPS}"
FP64, FP32, BF16 = (f"trainer.precision={name}" for name in ("64-true", "32-true", "bf16-mixed"))
OPTIMIZERS = {"sgd": "optim.lr=0.1", "adamw": "optim.lr=1e-3"}


class AdamWModel(RecordingModel):
    """RecordingModel with LanguageModel's own optimizer and schedule."""

    def configure_optimizers(self) -> Any:
        self.before = self.weights()
        return LanguageModel.configure_optimizers(self)


def turned(batch: dict[str, Tensor], places: int) -> dict[str, Tensor]:
    """Returns the same sequences in another order, so that the same sums are done in another order."""
    return {name: t.roll(places, 0) for name, t in batch.items()}


def fit(config: Config, optimizer: str, places: int = 0) -> dict[str, Any]:
    """Trains on this rank, with sequences rotated by `places`. Returns its record in the form that `assemble` takes."""
    module = (AdamWModel if optimizer == "adamw" else RecordingModel)(config)
    routed = count_routings(module)
    if places:
        step = module.training_step
        module.training_step = lambda batch, batch_idx: step(turned(batch, places), batch_idx)  # type: ignore[method-assign]
    trainer = build_trainer(config, [DataPosition(), ModelCheckpoint(save_top_k=0)], [])
    trainer.fit(module, build_datamodule(config))
    return {
        **{moment: getattr(module, moment) for moment in ("logged", "gradients", "drawn", "before")},
        "outputs": module.outputs[-3:],  # of the last batches only, to save memory
        "after": module.weights(),
        "experts": {name for name, _ in expert_parameters(module.model)},
        "ep": (module.parallel_context.ep_rank, module.parallel_context.ep_size),
        "routed": routed,
    }


def count_routings(module: LanguageModel) -> list[str]:
    """Returns a list to which each router adds its name when it routes."""
    routed: list[str] = []
    configure = module.configure_model

    def configure_and_count() -> None:
        configure()
        if not routed:
            for name, child in module.named_modules():
                if isinstance(child, Router):
                    child.register_forward_hook(lambda *_, name=name: routed.append(name))

    module.configure_model = configure_and_count  # type: ignore[method-assign]
    return routed
