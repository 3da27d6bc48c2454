"""Generates short texts at the end of a training.

They continue the first lines of held-out documents. From nothing a model would write the first line
of a document, which is often a title in capitals and says little of what it has learned.
"""

import numpy as np
import torch
from lightning.pytorch import Trainer

from scmoe.datamodules.positioned import PositionedDataModule
from scmoe.datamodules.text import TextDataModule
from scmoe.models.decoder import Decoder
from scmoe.training.modules import MoEModule

SAMPLE_TEXTS = 3
SAMPLE_TOKENS = 40
LINE_TOKENS = 48  # of a first line at most, with the end of text before it
SEARCHED = 1 << 20  # tokens of the validation split in which documents are looked for


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
    stopping = Stopping(min(SAMPLE_TOKENS, model.max_seq_len - 1), decode=data.tokenizer.decode)
    prompts = first_lines(data, min(LINE_TOKENS, model.max_seq_len - stopping.max_tokens))
    # torch would compile again for each length of the text
    eager = torch.compiler.set_stance("force_eager")
    with trainer.precision_plugin.val_step_context(), eager:
        return [stopping.text(ids) for ids, _ in generate(model, prompts, stopping)]


def first_lines(data: TextDataModule, most: int) -> list[list[int]]:
    """Return the end of text and the first line of SAMPLE_TEXTS documents of the validation split,
    in at most `most` ids each. Where there are fewer documents, they come again."""
    tokenizer = data.tokenizer
    ids = np.asarray(data.splits.tokens["val"][:SEARCHED])
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    documents = [part.tolist() for part in np.split(ids, ends + 1)[:SAMPLE_TEXTS] if len(part)]
    lines = []
    for number in range(SAMPLE_TEXTS):
        line = [tokenizer.end_of_text]
        for token in documents[number % len(documents)]:
            is_whole = "\n" in tokenizer.decode(line[1:]).lstrip()
            if is_whole or len(line) == most or token == tokenizer.end_of_text:
                break
            line.append(token)
        lines.append(line)
    return lines
