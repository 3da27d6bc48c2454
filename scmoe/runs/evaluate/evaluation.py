"""Evaluates a checkpoint of a run from top to bottom: test split, perplexity, tasks. Every rank
calls `evaluate`.

Rank 0 reads data, text and tasks before other ranks start. Ranks share the experts and not the
batches (runs/evaluate/scoring.py), so the results do not depend on their number. They are kept at
W&B and in evaluation.json, which has an entry for each checkpoint.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Column, Table
from torch import Tensor, nn

from scmoe.config.extras import require
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.config.registry import IMAGES, named
from scmoe.datamodules.positioned import PositionedDataModule
from scmoe.datamodules.sequences import SequenceDataModule
from scmoe.datamodules.text import TextDataModule
from scmoe.files.writing import redacted, try_to_write_json, warn_once
from scmoe.moe.stream import dropless
from scmoe.parallel.checkpoint.durable import UNREAD, read_manifest
from scmoe.runs.evaluate.scoring import (
    BATCH_TOKENS,
    Forward,
    Scorer,
    Text,
    open_text,
    run_on_rank_zero,
    score_test_split,
    score_text,
)
from scmoe.runs.evaluate.tasks import OWN_TASKS, Registered, Task, read_task
from scmoe.runs.on_ranks import config_without_training, ending_together, start_ranks
from scmoe.training.assembly.data import build_datamodule, kept_data, prepare_data
from scmoe.training.run.directory import read_state, relative
from scmoe.training.run.loggers import close_loggers, wandb_logger, wandb_mode
from scmoe.training.run.machine import is_rank_zero
from scmoe.training.run.resume import Which, config_of, find_checkpoint

FILE = "evaluation.json"
Found = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What to evaluate: the arguments of `scmoe evaluate`. tasks: None: those made from the text,
    if there is one.

    folder: of tasks. text: None: the test split. stride: None: half the context. limit: None: all
    questions.
    """

    which: Which = "last"
    tasks: tuple[str, ...] | None = None
    folder: Path | None = None
    text: Path | None = None
    stride: int | None = None
    limit: int | None = None
    overrides: Sequence[str] = ()


class Material(NamedTuple):
    """What rank 0 has read. text: None for images. stride: of the sliding window."""

    data: PositionedDataModule
    text: Text | None
    tasks: list[Task | Registered]
    stride: int


def read_material(config: Config, weights: Path, request: Request) -> Material:
    """Open data, text and tasks. ConfigError: one is missing, or has no meaning for this run or its
    weights."""
    data, seq_len = build_datamodule(config), config.data.seq_len
    prepare_data(data, weights)
    if kept_data(data, weights) not in (None, data.identity()["data"]):
        warn_once(
            "the data are not those of the training, so the split test may hold what was trained on"
        )
    if not isinstance(data, TextDataModule):
        given = {
            "--text": request.text,
            "--tasks": request.tasks,
            "--data": request.folder,
            "--limit": request.limit,
        }
        if not isinstance(data, SequenceDataModule):
            given["--stride"] = request.stride
        if unused := [name for name, value in given.items() if value not in (None, ())]:
            raise ConfigError(
                f"{unused[0]} needs a run on text; this one has data.name={config.data.name}."
            )
    stride = max(1, seq_len // 2) if request.stride is None else request.stride
    if not 1 <= stride <= seq_len:
        raise ConfigError(f"--stride is {stride}, allowed: 1 to {seq_len}, the run's data.seq_len")
    if request.limit is not None and request.limit < 1:
        raise ConfigError(f"--limit is {request.limit}, allowed: 1 or more")
    text = open_text(data, request.text) if isinstance(data, SequenceDataModule) else None
    tasks = read_tasks(text, request) if text and isinstance(data, TextDataModule) else []
    if request.limit is not None and not tasks:
        raise ConfigError(
            "--limit counts questions of --tasks, but there is no task. Name one, or leave --limit"
            " out."
        )
    return Material(data, text, tasks, stride)


def read_tasks(text: Text, request: Request) -> list[Task | Registered]:
    """Return the tasks that are asked for. ConfigError: one or its data is not there, or lm-eval is
    not installed."""
    names = tuple(OWN_TASKS) if request.tasks is None else request.tasks
    if request.folder is not None and OWN_TASKS.keys() >= set(names):
        raise ConfigError(
            f"--data is {str(request.folder)!r}, but --tasks names no file of it. Name one in"
            " --tasks."
        )
    if names:
        require("--tasks (other than none)", "lm_eval")
    files = (
        {}
        if request.folder is None
        else {file.stem: file for file in request.folder.glob("*.jsonl")}
    )
    registered: dict[str, Registered] = {}
    if others := [name for name in names if name not in OWN_TASKS and name not in files]:
        from scmoe.runs.evaluate.lm_eval_adapter import (
            load_registered,
        )  # here, as it needs the extra `eval`

        registered = load_registered(others, request.folder)
    tasks: list[Task | Registered] = []
    for name in names:
        if name in OWN_TASKS:
            tasks.append(OWN_TASKS[name](text.documents, text.name))
        else:
            tasks.append(read_task(files[name]) if name in files else registered[name])
    return tasks


def evaluate(run_dir: Path, request: Request) -> dict[str, Any] | None:
    """Return the results, which are also in evaluation.json and at W&B; None on ranks other than 0.

    Raises ConfigError for what cannot be evaluated, before another rank starts.
    """
    checkpoint = find_checkpoint(
        run_dir, request.which, UNREAD
    )  # verified where it is loaded, by each rank a share
    config = config_without_training(
        partial(config_of, run_dir, checkpoint), checkpoint, request.overrides
    )
    read_results(run_dir)  # its refusal, before other ranks start
    of_run = config_of(
        run_dir, checkpoint, [*named(request.overrides, "logger"), *named(request.overrides)]
    )
    material = (
        read_material(with_batch_of_a_rank(config, of_run), checkpoint, request)
        if is_rank_zero()
        else None
    )
    module, trainer = start_ranks(config, checkpoint)
    device, plugin, model = trainer.strategy.root_device, trainer.precision_plugin, module.model

    def work(forward: Forward) -> Found:
        assert material is not None
        scorer = Scorer(forward, config.data.seq_len, device)
        found = measure(scorer, model, material, request.limit)
        found["test"]["capacity_factor"] = config.moe.capacity_factor
        return found

    def of_its_dtype(inputs: Tensor, mask: Tensor | None, *rest: Any) -> Any:
        return model(plugin.convert_input(inputs), mask, *rest)

    with ending_together(trainer), torch.inference_mode(), plugin.val_step_context():
        found = run_on_rank_zero(
            work, of_its_dtype, padding_of(config, device), module.parallel_context
        )
    if found is None:
        return None
    manifest = read_manifest(checkpoint)
    found["step"], files = manifest["step"], json.dumps(manifest["files"], sort_keys=True)
    keep_results(run_dir, checkpoint.name, found, weights=sha256(files.encode()).hexdigest()[:16])
    log_to_wandb(run_dir, of_run, found)
    return {
        "run_dir": str(relative(run_dir)),
        "which": request.which,
        "checkpoint": checkpoint.name,
        "test_loss": found["test"]["loss"],
        "perplexity": found["text"] and found["text"]["perplexity"],
        **found,
    }


def with_batch_of_a_rank(config: Config, of_run: Config) -> Config:
    """Return the configuration with the batch of one rank of the training, as a capacity applies to
    a rank's batch.

    Where a batch changes no result, it has about BATCH_TOKENS tokens, so that its logits need less
    memory.
    """
    data, trainer, moe = config.data, config.trainer, config.moe
    batch = data.global_batch_size // (
        trainer.accumulate * of_run.trainer.devices * of_run.trainer.num_nodes
    )
    if (moe.capacity_factor is None or moe.architecture == "dense") and data.name not in IMAGES:
        batch = min(batch, BATCH_TOKENS // data.seq_len)
    return replace(
        config,
        data=replace(data, global_batch_size=max(1, batch)),
        trainer=replace(trainer, accumulate=1),
    )


def padding_of(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return inputs and mask of a batch of one token, or one picture, that is no real sample."""
    mask = torch.zeros(1, dtype=torch.bool, device=device)
    if config.data.name in IMAGES:
        return (
            torch.zeros(1, 3, config.data.image_size, config.data.image_size, device=device),
            mask,
        )
    return torch.zeros(1, 1, dtype=torch.int64, device=device), mask[None]


def measure(scorer: Scorer, model: nn.Module, material: Material, limit: int | None) -> Found:
    """Return the results: {"test", "text", "tasks"}."""
    data, text = material.data, material.text
    found: Found = {"test": score_test_split(scorer, data), "text": None, "tasks": {}}
    if text is None:
        return found
    assert isinstance(data, SequenceDataModule)
    with dropless(model):  # under a capacity a score would depend on the other texts of its batch
        found["text"] = score_text(scorer, text, material.stride, data.splits.token_bytes_V)
        if material.tasks:
            from scmoe.runs.evaluate.lm_eval_adapter import (
                ModelOfRun,
                ask,
            )  # here, as it needs the extra `eval`

            assert isinstance(data, TextDataModule)
            for (
                task
            ) in material.tasks:  # each alone, so that no score depends on which others are asked
                found["tasks"] |= ask(ModelOfRun(scorer, data.tokenizer), task, limit)
    return found


def read_results(run_dir: Path) -> dict[str, Any]:
    """Return what earlier evaluations have found, by checkpoint. ConfigError: the file is no JSON
    object."""
    path = run_dir / FILE
    try:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}. Move it away, and evaluate again."
        ) from error
    if not isinstance(kept, dict):
        raise ConfigError(
            f"{path} is not what an evaluation writes. Move it away, and evaluate again."
        )
    return kept


def keep_results(run_dir: Path, checkpoint: str, found: Mapping[str, Any], weights: str) -> None:
    """Merge the results for a checkpoint into evaluation.json: texts and tasks by name, everything
    else as a whole.

    weights: a digest of the checkpoint. A run that was resumed from an earlier step has another one
    of the same name, whose results replace those of the first."""
    kept, text = read_results(run_dir), found["text"]
    earlier = kept.get(checkpoint, {})
    if earlier.get("weights", weights) != weights:
        earlier = {}
    texts = {**earlier.get("texts", {}), **({text["text"]: text} if text else {})}
    tasks = {**earlier.get("tasks", {}), **found["tasks"]}
    one = {
        "step": found["step"],
        "weights": weights,
        "test": found["test"],
        "texts": texts,
        "tasks": tasks,
    }
    kept[checkpoint] = one
    try_to_write_json(run_dir / FILE, kept)


def log_to_wandb(run_dir: Path, config: Config, found: Mapping[str, Any]) -> None:
    """Log the numbers in the run's own W&B run, if it has one. An error of W&B is one warning.
    config: the run's."""
    if not (run_dir / "wandb_run.json").exists() or wandb_mode(config) == "disabled":
        return
    if read_state(run_dir) == "running":  # a second client would replace its rows
        warn_once(
            "Weights & Biases does not receive the evaluation while the run trains; it is in"
            f" {run_dir / FILE}"
        )
        return
    try:
        logger = wandb_logger(run_dir, redacted(config))
        logger.log_metrics(metrics_of(found), found["step"])
        close_loggers([logger])
    except (
        Exception
    ) as error:  # the client raises errors of any kind, and the results are in the file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warn_once(
            f"Weights & Biases does not receive the evaluation: {reason}; it is in {run_dir / FILE}"
        )


def metrics_of(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an evaluation under flat names."""
    metrics = {
        f"eval/test_{key}": found["test"][key]
        for key in ("loss", "accuracy")
        if key in found["test"]
    }
    if found["text"]:
        metrics["eval/perplexity"] = found["text"]["perplexity"]
    return metrics | {f"eval/{name}": task["accuracy"] for name, task in found["tasks"].items()}


def shown(found: Mapping[str, Any]) -> list[str | Table]:
    """Return lines and a table that show the results of one evaluation, with their conditions."""
    test, text = found["test"], found["text"]
    rest = (
        f"accuracy {test['accuracy']:.2%}"
        if "images" in test
        else f"{test['bits_per_byte']:.4f} bits per byte"
    )
    number = f"{test['images']:,} images" if "images" in test else f"{test['tokens']:,} tokens"
    capacity = (
        "dropless"
        if test["capacity_factor"] is None
        else f"capacity factor {test['capacity_factor']:g}"
    )
    parts: list[str | Table] = [
        f"split {test['split']}: loss {test['loss']:.4f}, {rest} ({number}, {capacity})"
    ]
    if text:
        how = f"window {text['window']}, stride {text['stride']}, dropless"
        parts.append(
            f"{text['text']}: perplexity {text['perplexity']:.2f} ({text['tokens']:,} tokens,"
            f" {how})"
        )
    if found["tasks"]:
        parts.append(tasks_table(found["tasks"]))
    return parts


def tasks_table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    numbers = ("accuracy", "95 % interval", "chance", "one answer", "questions")
    columns = [Column(name, justify="right", no_wrap=True) for name in numbers]
    table = Table("task", *columns, Column(no_wrap=True), box=box.SIMPLE_HEAD, pad_edge=False)
    for name, task in tasks.items():
        interval = "" if task["interval"] is None else "{:.3f} to {:.3f}".format(*task["interval"])
        guesses = (
            "" if task[key] is None else f"{task[key]:.3f}" for key in ("chance", "one_answer")
        )
        questions = "" if task["questions"] is None else f"{task['questions']:,} of {task['of']:,}"
        table.add_row(
            name, f"{task['accuracy']:.3f}", interval, *guesses, questions, task["verdict"]
        )
    return table
