"""Evaluate a checkpoint of a run: test split, perplexity, tasks. Every rank calls `evaluate`.

Rank 0 reads data, text and tasks before other ranks start. Ranks share the experts and not the
batches (runs/evaluate/scoring.py), so the results do not depend on the number of ranks. They are
kept at W&B and in evaluation.json, which has an entry for each checkpoint.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich import box
from rich.table import Column, Table
from torch import Tensor, nn

from scmoe.config.derived import samples_of_rank
from scmoe.config.fields import Config
from scmoe.config.installation import require
from scmoe.config.leaves import ConfigError
from scmoe.config.registry import IMAGES, named
from scmoe.datamodules.positioned import PositionedDataModule
from scmoe.datamodules.sequences import SequenceDataModule
from scmoe.datamodules.text import TextDataModule
from scmoe.files import read_json, redacted, relative, try_to_write_json, warn_once
from scmoe.models.halves import sizes_of_halves
from scmoe.moe.stream import dropless
from scmoe.parallel.checkpoint.durable import UNREAD, read_manifest
from scmoe.planning.plan_file import in_flight_at
from scmoe.report import console
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
from scmoe.runs.on_ranks import config_without_training, ending_together, start_ranks
from scmoe.training.assembly.data import build_datamodule, kept_data, prepare_data
from scmoe.training.run.directory import read_state
from scmoe.training.run.loggers import close_loggers
from scmoe.training.run.machine import is_rank_zero
from scmoe.training.run.resume import Which, checkpoint_config, find_checkpoint
from scmoe.training.run.wandb_logger import wandb_logger, wandb_mode

if TYPE_CHECKING:
    from scmoe.runs.evaluate.lm_eval_adapter import Asked

FILE = "evaluation.json"
Results = dict[str, Any]


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate: the arguments of `scmoe evaluate`.

    folder: of tasks. text: None: the test split. stride: None: half the context. limit: None: all
    questions.
    """

    which: Which = "last"
    tasks: tuple[str, ...] = ()
    folder: Path | None = None
    text: Path | None = None
    stride: int | None = None
    limit: int | None = None
    overrides: Sequence[str] = ()


class Material(NamedTuple):
    """What rank 0 has read.

    text: None for images. stride: of the sliding window.
    """

    data: PositionedDataModule
    text: Text | None
    tasks: list["Asked"]
    stride: int


def read_material(config: Config, weights: Path, request: EvaluationRequest) -> Material:
    """Open data, text and tasks.

    Raises ConfigError if one is missing, or has no meaning for this run or its weights.
    """
    data = build_datamodule(config)
    seq_len = config.data.seq_len
    prepare_data(data, weights)
    if kept_data(data, weights) not in (None, data.identity()["data"]):
        warn_once(
            "The data are not those of the training, so the split test may contain training data."
        )

    if not isinstance(data, TextDataModule):
        options = {
            "--text": request.text,
            "--tasks": request.tasks,
            "--data": request.folder,
            "--limit": request.limit,
        }
        if not isinstance(data, SequenceDataModule):
            options["--stride"] = request.stride
        if unused := [name for name, value in options.items() if value not in (None, ())]:
            raise ConfigError(
                f"{unused[0]} needs a run on text; this one has data.name={config.data.name}."
            )
    stride = max(1, seq_len // 2) if request.stride is None else request.stride
    if not 1 <= stride <= seq_len:
        raise ConfigError(f"--stride is {stride}, allowed: 1 to {seq_len}, the run's data.seq_len")
    if request.limit is not None and request.limit < 1:
        raise ConfigError(f"--limit is {request.limit}, allowed: 1 or more")

    text = open_text(data, request.text) if isinstance(data, SequenceDataModule) else None
    tasks: list[Asked] = []
    if isinstance(data, TextDataModule):
        with console().status("reading tasks"):  # on a terminal; lm-eval takes seconds
            tasks = read_tasks(request)
    if request.limit is not None and not tasks:
        raise ConfigError(
            "--limit counts questions of --tasks, but there is no task. Name one, or leave --limit"
            " out."
        )
    return Material(data, text, tasks, stride)


def read_tasks(request: EvaluationRequest) -> list["Asked"]:
    """Return the tasks of the request.

    Raises ConfigError if one or its data is missing, or lm-eval is not installed.
    """
    if request.folder is not None and not request.tasks:
        raise ConfigError(
            f"--data is {str(request.folder)!r}, but --tasks names no file of it. Name one in"
            " --tasks."
        )
    if not request.tasks:
        return []
    require("--tasks", "lm_eval")
    # imported here, as it needs the extra `eval`
    from scmoe.runs.evaluate.lm_eval_adapter import load_registered, read_file

    files: dict[str, Path] = {}
    if request.folder is not None:
        files = {file.stem: file for file in request.folder.glob("*.jsonl")}
    registered: dict[str, Asked] = {}
    if others := [name for name in request.tasks if name not in files]:
        registered = load_registered(others, request.folder)
    return [read_file(files[name]) if name in files else registered[name] for name in request.tasks]


def evaluate(run_dir: Path, request: EvaluationRequest) -> dict[str, Any] | None:
    """Return the results, which are also in evaluation.json and at W&B; None on ranks other than 0.

    Raises ConfigError for what cannot be evaluated, before another rank starts.
    """
    # The checkpoint is verified where it is loaded, by each rank a share.
    checkpoint = find_checkpoint(run_dir, request.which, UNREAD)
    read_config = partial(checkpoint_config, checkpoint, trains=False)
    config = config_without_training(read_config, checkpoint, request.overrides)
    read_results(run_dir)  # so that a damaged file is refused before other ranks start
    overrides_of_run = [*named(request.overrides, "logger"), *named(request.overrides)]
    of_run = checkpoint_config(checkpoint, overrides_of_run)
    manifest = read_manifest(checkpoint)  # a run that still trains may remove it
    material = None
    if is_rank_zero():
        halves = ran_two_batches(run_dir, of_run, manifest["step"])
        material = read_material(with_batch_of_a_rank(config, of_run, halves), checkpoint, request)

    module, trainer = start_ranks(config, checkpoint)
    model = module.model
    device = trainer.strategy.root_device
    plugin = trainer.precision_plugin

    def work(forward: Forward) -> Results:
        assert material is not None
        scorer = Scorer(forward, config.data.seq_len, device)
        results = measure(scorer, model, material, request.limit)
        results["test"]["capacity_factor"] = config.moe.capacity_factor
        return results

    def in_its_dtype(inputs: Tensor, mask: Tensor | None, *rest: Any) -> Any:
        return model(plugin.convert_input(inputs), mask, *rest)

    padding = padding_of(config, device)
    with ending_together(trainer), torch.inference_mode(), plugin.val_step_context():
        results = run_on_rank_zero(work, in_its_dtype, padding, module.wire.mesh)
    if results is None:
        return None

    results["step"] = manifest["step"]
    files = json.dumps(manifest["files"], sort_keys=True)
    digest = sha256(files.encode()).hexdigest()[:16]
    keep_results(run_dir, checkpoint.name, results, weights=digest)
    log_to_wandb(run_dir, of_run, results)
    return {
        "run_dir": str(relative(run_dir)),
        "which": request.which,
        "checkpoint": checkpoint.name,
        "test_loss": results["test"]["loss"],
        "perplexity": results["text"] and results["text"]["perplexity"],
        **results,
    }


def ran_two_batches(run_dir: Path, of_run: Config, step: int) -> bool:
    """Return whether a run had two batches in flight at a step, as its configuration says or as
    schedule=auto had chosen."""
    if not of_run.schedule.auto:
        return of_run.schedule.batches_in_flight == 2
    return in_flight_at(read_json(run_dir / "plan.json"), step) == 2


def with_batch_of_a_rank(config: Config, of_run: Config, halves: bool) -> Config:
    """Return the configuration with the batch of one rank of the training, as a capacity applies to
    a rank's batch. halves: two batches were in flight there, so it applies to the first half, where
    one is in flight now.

    Where a batch changes no result, it has about BATCH_TOKENS tokens, so that its logits need less
    memory.
    """
    data = config.data
    trainer = config.trainer
    batch = samples_of_rank(of_run)
    if halves and config.schedule.batches_in_flight != 2:
        batch, _ = sizes_of_halves(batch)
    no_capacity = config.moe.capacity_factor is None or config.moe.architecture == "dense"
    if no_capacity and data.name not in IMAGES:
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
        size = config.data.image_size
        return torch.zeros(1, 3, size, size, device=device), mask
    return torch.zeros(1, 1, dtype=torch.int64, device=device), mask[None]


def measure(scorer: Scorer, model: nn.Module, material: Material, limit: int | None) -> Results:
    """Return the results: {"test", "text", "tasks"}."""
    data, text = material.data, material.text
    results: Results = {"test": score_test_split(scorer, data), "text": None, "tasks": {}}
    if text is None:
        return results

    assert isinstance(data, SequenceDataModule)
    with dropless(model):  # under a capacity a score would depend on the other texts of its batch
        results["text"] = score_text(scorer, text, material.stride, data.splits.token_bytes_V)
        if material.tasks:
            # imported here, as it needs the extra `eval`
            from scmoe.runs.evaluate.lm_eval_adapter import ModelOfRun, ask

            assert isinstance(data, TextDataModule)
            # Each task is asked alone, so that no score depends on which others are asked.
            for task in material.tasks:
                results["tasks"] |= ask(ModelOfRun(scorer, data.tokenizer), task, limit)
    return results


def read_results(run_dir: Path) -> dict[str, Any]:
    """Return the results of earlier evaluations by checkpoint.

    Raises ConfigError if the file is no JSON object.
    """
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


def keep_results(run_dir: Path, checkpoint: str, results: Results, weights: str) -> None:
    """Merge the results for a checkpoint into evaluation.json: texts and tasks by name, everything
    else as a whole.

    weights: a digest of the checkpoint. A run that was resumed from an earlier step has another
    checkpoint of the same name, whose results replace those of the first.
    """
    kept = read_results(run_dir)
    earlier = kept.get(checkpoint, {})
    if earlier.get("weights", weights) != weights:
        earlier = {}
    texts = dict(earlier.get("texts", {}))
    if text := results["text"]:
        texts[text["text"]] = text
    kept[checkpoint] = {
        "step": results["step"],
        "weights": weights,
        "test": results["test"],
        "texts": texts,
        "tasks": {**earlier.get("tasks", {}), **results["tasks"]},
    }
    try_to_write_json(run_dir / FILE, kept)


def log_to_wandb(run_dir: Path, config: Config, results: Results) -> None:
    """Log the numbers in the W&B run of this run, if it has one. An error of W&B is one warning.

    config: the run's.
    """
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
        logger.log_metrics(metrics_of(results), results["step"])
        close_loggers([logger])
    except Exception as error:
        # The client raises errors of any kind, and the results are in the file.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warn_once(
            f"Weights & Biases does not receive the evaluation: {reason}; it is in {run_dir / FILE}"
        )


def metrics_of(results: Results) -> dict[str, float]:
    """Return the numbers of an evaluation under flat names."""
    test = results["test"]
    metrics = {f"eval/test_{key}": test[key] for key in ("loss", "accuracy") if key in test}
    if results["text"]:
        metrics["eval/perplexity"] = results["text"]["perplexity"]
    for name, task in results["tasks"].items():
        metrics[f"eval/{name}"] = task["accuracy"]
    return metrics


def shown(results: Mapping[str, Any]) -> list[str | Table]:
    """Return lines and a table that show the results of one evaluation, with their conditions."""
    test, text = results["test"], results["text"]
    if "images" in test:
        rest = f"accuracy {test['accuracy']:.2%}"
        number = f"{test['images']:,} images"
    else:
        rest = f"{test['bits_per_byte']:.4f} bits per byte"
        number = f"{test['tokens']:,} tokens"
    capacity = "dropless"
    if test["capacity_factor"] is not None:
        capacity = f"capacity factor {test['capacity_factor']:g}"
    parts: list[str | Table] = [
        f"split {test['split']}: loss {test['loss']:.4f}, {rest} ({number}, {capacity})"
    ]
    if text:
        how = f"window {text['window']}, stride {text['stride']}, dropless"
        parts.append(
            f"{text['text']}: perplexity {text['perplexity']:.2f} ({text['tokens']:,} tokens,"
            f" {how})"
        )
    if results["tasks"]:
        parts.append(tasks_table(results["tasks"]))
    return parts


def tasks_table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    numbers = ("accuracy", "95 % interval", "chance", "one answer", "questions")
    columns = [Column(name, justify="right", no_wrap=True) for name in numbers]
    table = Table("task", *columns, Column(no_wrap=True), box=box.SIMPLE_HEAD, pad_edge=False)
    for name, task in tasks.items():
        interval = "" if task["interval"] is None else "{:.3f} to {:.3f}".format(*task["interval"])
        guesses = [task["chance"], task["one_answer"]]
        guesses = ["" if guess is None else f"{guess:.3f}" for guess in guesses]
        questions = "" if task["questions"] is None else f"{task['questions']:,} of {task['of']:,}"
        table.add_row(
            name, f"{task['accuracy']:.3f}", interval, *guesses, questions, task["verdict"]
        )
    return table
