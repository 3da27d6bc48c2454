"""Generates short texts at the end of a training."""

import torch
from lightning.pytorch import Trainer

from scmoe.datamodules.positioned import PositionedDataModule
from scmoe.datamodules.text import TextDataModule
from scmoe.models.decoder import Decoder
from scmoe.training.modules import MoEModule

SAMPLES = 3
SAMPLE_TOKENS = 40


def sample_text(trainer: Trainer, module: MoEModule, data: PositionedDataModule) -> list[str]:
    """Return a few short texts that the model generates; none for images. Every rank must call it:
    all have experts."""
    if not isinstance(data, TextDataModule) or not isinstance(module.model, Decoder):
        return []
    if module.model.max_seq_len < 2:
        return []
    from scmoe.inference.generate import generate
    from scmoe.inference.sampling import Stopping

    model = module.to(trainer.strategy.root_device).eval().model
    end = data.tokenizer.end_of_text
    stopping = Stopping(min(SAMPLE_TOKENS, model.max_seq_len - 1), decode=data.tokenizer.decode)
    # torch would compile again for each length of the text
    eager = torch.compiler.set_stance("force_eager")
    with trainer.precision_plugin.val_step_context(), eager:
        return [stopping.text(ids) for ids, _ in generate(model, [[end]] * SAMPLES, stopping)]
