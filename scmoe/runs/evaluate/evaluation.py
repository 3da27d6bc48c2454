"""Evaluates a checkpoint of a run from top to bottom: test split, perplexity, tasks. Every rank calls `evaluate`.

Ranks share the experts and not the batches (runs/evaluate/rank_zero.py), so the results do not depend on their number.
"""

import json
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scmoe.config.fields import Config
from scmoe.config.registry import IMAGES, named
from scmoe.datamodules.sequences import SequenceDataModule
from scmoe.datamodules.text import TextDataModule
from scmoe.moe.stream import dropless
from scmoe.parallel.checkpoint.durable import read_manifest
from scmoe.runs.evaluate.held_out_loss import score_test_split
from scmoe.runs.evaluate.held_out_text import score_text
from scmoe.runs.evaluate.kept_results import keep_results, log_to_wandb, read_results
from scmoe.runs.evaluate.material import Material, Request, read_material
from scmoe.runs.evaluate.rank_zero import Forward, run_on_rank_zero
from scmoe.runs.evaluate.scoring import Scorer
from scmoe.runs.on_ranks import config_without_training, ending_together, start_ranks
from scmoe.training.run.directory import relative
from scmoe.training.run.machine import is_rank_zero
from scmoe.training.run.resume import REFUSED_SINCE, config_of, find_checkpoint

Found = dict[str, Any]


def evaluate(run_dir: Path, request: Request) -> dict[str, Any] | None:
    """Return the results, which are also in evaluation.json and at W&B; None on ranks other than 0.

    Raises ConfigError for what cannot be evaluated, before another rank starts.
    """
    checkpoint = find_checkpoint(run_dir, request.which)
    config = config_without_training(partial(config_of, run_dir, checkpoint), checkpoint, request.overrides)
    read_results(run_dir)
    material = read_material(config, checkpoint, request) if is_rank_zero() else None
    module, trainer = start_ranks(config, checkpoint)
    device, plugin, model = trainer.strategy.root_device, trainer.precision_plugin, module.model

    def work(forward: Forward) -> Found:
        assert material is not None
        return measure(forward, model, material, config, device)

    def of_its_dtype(inputs: Tensor, mask: Tensor | None, *rest: Any) -> Any:
        return model(plugin.convert_input(inputs), mask, *rest)

    with ending_together(trainer), torch.inference_mode(), plugin.val_step_context():
        found = run_on_rank_zero(work, of_its_dtype, padding_of(config, device), module.parallel_context)
    if found is None:
        return None
    manifest = read_manifest(checkpoint)
    found["step"], files = manifest["step"], json.dumps(manifest["files"], sort_keys=True)
    keep_results(run_dir, checkpoint.name, found, weights=sha256(files.encode()).hexdigest()[:16])
    loggers = [word for word in request.overrides if word.removeprefix("--").startswith("logger.")]
    loggers += [*named(request.overrides), *REFUSED_SINCE]
    log_to_wandb(run_dir, config_of(run_dir, checkpoint, loggers), found)
    return {
        "run_dir": str(relative(run_dir)),
        "which": request.which,
        "checkpoint": checkpoint.name,
        "test_loss": found["test"]["loss"],
        "perplexity": found["text"] and found["text"]["perplexity"],
        **found,
    }


def padding_of(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return inputs and mask of a batch of one token, or one picture, that is no real sample."""
    mask = torch.zeros(1, dtype=torch.bool, device=device)
    if config.data.name in IMAGES:
        return torch.zeros(1, 3, config.data.image_size, config.data.image_size, device=device), mask
    return torch.zeros(1, 1, dtype=torch.int64, device=device), mask[None]


def measure(forward: Forward, model: nn.Module, material: Material, config: Config, device: torch.device) -> Found:
    """Return the results: {"test", "text", "tasks"}."""
    data, text = material.data, material.text
    test = {**score_test_split(forward, data, device), "capacity_factor": config.moe.capacity_factor}
    found: Found = {"test": test, "text": None, "tasks": {}}
    if text is None:
        return found
    assert isinstance(data, SequenceDataModule)
    scorer = Scorer(forward, config.data.seq_len, device)
    with dropless(model):  # under a capacity a score would depend on the other texts of its batch
        found["text"] = score_text(scorer, text, material.stride, data.splits.token_bytes_V)
        if material.tasks:
            from scmoe.runs.evaluate.lm_eval_adapter import ModelOfRun, ask_all  # here, as it needs the extra `eval`

            assert isinstance(data, TextDataModule)
            found["tasks"] = ask_all(ModelOfRun(scorer, data.tokenizer), material.tasks, material.limit)
    return found
