"""Keeps the results of evaluations: in evaluation.json of the run directory, at W&B, and as a table.

evaluation.json has an entry for each checkpoint, which later evaluations fill up or replace part by part.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.training.files import warn_once, write_json
from scmoe.training.run.directory import read_state
from scmoe.training.run.loggers import close_loggers, wandb_logger, wandb_mode

FILE = "evaluation.json"


def read_results(run_dir: Path) -> dict[str, Any]:
    """Return what earlier evaluations have found, by checkpoint. ConfigError: the file is no JSON object."""
    path = run_dir / FILE
    try:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Move it away, and evaluate again.") from error
    if not isinstance(kept, dict):
        raise ConfigError(f"{path} is not what an evaluation writes. Move it away, and evaluate again.")
    return kept


def keep_results(run_dir: Path, checkpoint: str, found: Mapping[str, Any], weights: str) -> None:
    """Merge the results for a checkpoint into evaluation.json: texts and tasks by name, everything else as a whole.

    weights: a digest of the checkpoint. A run that was resumed from an earlier step has another one of the same name,
    whose results replace those of the first."""
    kept, text = read_results(run_dir), found["text"]
    earlier = kept.get(checkpoint, {})
    if earlier.get("weights", weights) != weights:
        earlier = {}
    texts = {**earlier.get("texts", {}), **({text["text"]: text} if text else {})}
    tasks = {**earlier.get("tasks", {}), **found["tasks"]}
    one = {"step": found["step"], "weights": weights, "test": found["test"], "texts": texts, "tasks": tasks}
    kept[checkpoint] = one
    write_json(run_dir / FILE, kept)


def log_to_wandb(run_dir: Path, config: Config, found: Mapping[str, Any]) -> None:
    """Log the numbers in the run's own W&B run, if it has one. An error of W&B is one warning. config: the run's."""
    if not (run_dir / "wandb_run.json").exists() or wandb_mode(config) == "disabled":
        return
    if read_state(run_dir) == "running":  # a second client would replace its rows
        warn_once(f"Weights & Biases does not receive the evaluation while the run trains; it is in {run_dir / FILE}")
        return
    try:
        logger = wandb_logger(run_dir, config)
        logger.log_metrics(metrics_of(found), found["step"])
        close_loggers([logger])
    except Exception as error:  # the client raises errors of any kind, and the results are in the file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warn_once(f"Weights & Biases does not receive the evaluation: {reason}; it is in {run_dir / FILE}")


def metrics_of(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an evaluation under flat names."""
    metrics = {f"eval/test_{key}": found["test"][key] for key in ("loss", "accuracy") if key in found["test"]}
    if found["text"]:
        metrics["eval/perplexity"] = found["text"]["perplexity"]
    return metrics | {f"eval/{name}": task["accuracy"] for name, task in found["tasks"].items()}


def shown(found: Mapping[str, Any]) -> list[str | Table]:
    """Return lines and a table that show the results of one evaluation, with their conditions."""
    test, text = found["test"], found["text"]
    rest = f"accuracy {test['accuracy']:.2%}" if "images" in test else f"{test['bits_per_byte']:.4f} bits per byte"
    number = f"{test['images']:,} images" if "images" in test else f"{test['tokens']:,} tokens"
    capacity = "dropless" if test["capacity_factor"] is None else f"capacity factor {test['capacity_factor']:g}"
    parts: list[str | Table] = [f"split {test['split']}: loss {test['loss']:.4f}, {rest} ({number}, {capacity})"]
    if text:
        how = f"window {text['window']}, stride {text['stride']}, dropless"
        parts.append(f"{text['text']}: perplexity {text['perplexity']:.2f} ({text['tokens']:,} tokens, {how})")
    return [*parts, *([tasks_table(found["tasks"])] if found["tasks"] else [])]


def tasks_table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("task", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("accuracy", "95 % interval", "chance", "one answer", "questions"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, task in tasks.items():
        interval = "" if task["interval"] is None else "{:.3f} to {:.3f}".format(*task["interval"])
        guesses = ("" if task[key] is None else f"{task[key]:.3f}" for key in ("chance", "one_answer"))
        questions = "" if task["questions"] is None else f"{task['questions']:,} of {task['of']:,}"
        table.add_row(name, f"{task['accuracy']:.3f}", interval, *guesses, questions, task["verdict"])
    return table
