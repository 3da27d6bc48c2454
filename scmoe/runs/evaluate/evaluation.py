"""Evaluates a checkpoint of a run from top to bottom: test split, perplexity, tasks. Every rank calls `evaluate`.

Rank 0 reads data, text and tasks before other ranks start. Ranks share the experts and not the batches
(runs/evaluate/scoring.py), so the results do not depend on their number.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scmoe.config.extras import require
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.config.registry import IMAGES, named
from scmoe.datamodules.positioned import PositionedDataModule
from scmoe.datamodules.sequences import SequenceDataModule
from scmoe.datamodules.text import TextDataModule
from scmoe.parallel.checkpoint.durable import read_manifest
from scmoe.runs.evaluate.kept_results import keep_results, log_to_wandb, read_results
from scmoe.runs.evaluate.scoring import Forward, Scorer, Text, open_text, run_on_rank_zero, score_test_split, score_text
from scmoe.runs.evaluate.tasks import OWN_TASKS, Registered, Task, read_task
from scmoe.runs.on_ranks import config_without_training, ending_together, start_ranks
from scmoe.training.assembly.data import build_datamodule, kept_data, prepare_data
from scmoe.training.files import warn_once
from scmoe.training.run.directory import relative
from scmoe.training.run.machine import is_rank_zero
from scmoe.training.run.resume import REFUSED_SINCE, Which, config_of, find_checkpoint

Found = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What to evaluate. tasks: names; None: those made from the text, if the run is on text.

    folder: of the tasks' JSON lines, or of lm-eval's YAML files. text: a file; None: the test split. stride: of the
    sliding window; None: half the context. limit: questions of a task; None: all. overrides: `key=value`, of the keys
    that a resumed run may change.
    """

    which: Which = "last"
    tasks: tuple[str, ...] | None = None
    folder: Path | None = None
    text: Path | None = None
    stride: int | None = None
    limit: int | None = None
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Material:
    """What rank 0 has read. text: None for images."""

    data: PositionedDataModule
    text: Text | None
    tasks: list[Task | Registered]
    stride: int
    limit: int | None


def read_material(config: Config, weights: Path, request: Request) -> Material:
    """Open data, text and tasks. ConfigError: one is missing, or has no meaning for this run or its weights."""
    data, seq_len = build_datamodule(config), config.data.seq_len
    prepare_data(data, weights)
    if kept_data(data, weights) not in (None, data.identity()["data"]):
        warn_once("the data are not those of the training, so the split test may hold what was trained on")
    if not isinstance(data, TextDataModule):
        given = {"--text": request.text, "--tasks": request.tasks, "--data": request.folder, "--limit": request.limit}
        if not isinstance(data, SequenceDataModule):
            given["--stride"] = request.stride
        if unused := [name for name, value in given.items() if value not in (None, ())]:
            raise ConfigError(f"{unused[0]} needs a run on text; this one has data.name={config.data.name}.")
    stride = max(1, seq_len // 2) if request.stride is None else request.stride
    if not 1 <= stride <= seq_len:
        raise ConfigError(f"--stride is {stride}, allowed: 1 to {seq_len}, the run's data.seq_len")
    if request.limit is not None and request.limit < 1:
        raise ConfigError(f"--limit is {request.limit}, allowed: 1 or more")
    text = open_text(data, request.text) if isinstance(data, SequenceDataModule) else None
    tasks = read_tasks(text, request) if text and isinstance(data, TextDataModule) else []
    if request.limit is not None and not tasks:
        raise ConfigError("--limit counts questions of --tasks, but there is no task. Name one, or leave --limit out.")
    return Material(data, text, tasks, stride, request.limit)


def read_tasks(text: Text, request: Request) -> list[Task | Registered]:
    """Return the tasks that are asked for. ConfigError: one or its data is not there, or lm-eval is not installed."""
    names = tuple(OWN_TASKS) if request.tasks is None else request.tasks
    if request.folder is not None and OWN_TASKS.keys() >= set(names):
        raise ConfigError(f"--data is {str(request.folder)!r}, but --tasks names no file of it. Name one in --tasks.")
    if names:
        require("--tasks (other than none)", "lm_eval")
    files = [] if request.folder is None else [file.stem for file in request.folder.glob("*.jsonl")]
    others = [name for name in names if name not in OWN_TASKS and name not in files]
    registered = {}
    if others:
        from scmoe.runs.evaluate.lm_eval_adapter import load_registered  # here, as it needs the extra `eval`

        registered = load_registered(others, request.folder)
    tasks: list[Task | Registered] = []
    for name in names:
        if name in OWN_TASKS:
            tasks.append(OWN_TASKS[name](text.documents, text.name))
        elif name in registered:
            tasks.append(registered[name])
        else:
            assert request.folder is not None
            tasks.append(read_task(name, request.folder))
    return tasks


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

    def of_its_dtype(inputs: Tensor, mask: Tensor | None, *rest: Any, **named: Any) -> Any:
        return model(plugin.convert_input(inputs), mask, *rest, **named)

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
    found["text"] = score_text(scorer, text, material.stride, data.splits.token_bytes_V)
    if material.tasks:
        from scmoe.runs.evaluate.lm_eval_adapter import ModelOfRun, ask_all  # here, as it needs the extra `eval`

        assert isinstance(data, TextDataModule)
        found["tasks"] = ask_all(ModelOfRun(scorer, data.tokenizer), material.tasks, material.limit)
    return found
