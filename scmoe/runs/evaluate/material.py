"""What an evaluation is asked for, and the data, text and tasks that it needs: read by rank 0, before others start."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scmoe.config.extras import require
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.datamodules.positioned import PositionedDataModule
from scmoe.datamodules.sequences import SequenceDataModule
from scmoe.datamodules.text import TextDataModule
from scmoe.runs.evaluate.held_out_text import Text, open_text
from scmoe.runs.evaluate.own_tasks import OWN_TASKS
from scmoe.runs.evaluate.tasks import Registered, Task, read_task
from scmoe.training.assembly.data import build_datamodule, check_tokenizer, kept_data, prepare_data
from scmoe.training.files import warn_once
from scmoe.training.run.resume import Which


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
    prepare_data(data)
    if kept_data(data, weights) not in (None, data.identity()["data"]):
        warn_once("the data are not those of the training, so the split test may hold what was trained on")
    if isinstance(data, TextDataModule):
        check_tokenizer(data, weights)
    else:
        given = {"--text": request.text, "--tasks": request.tasks, "--data": request.folder, "--limit": request.limit}
        given |= {} if isinstance(data, SequenceDataModule) else {"--stride": request.stride}
        if unused := [name for name, value in given.items() if value not in (None, ())]:
            allowed = f"for a run on text; this one has data.name={config.data.name}"
            raise ConfigError(f"{unused[0]} is given, allowed: {allowed}")
    stride = max(1, seq_len // 2) if request.stride is None else request.stride
    if not 1 <= stride <= seq_len:
        raise ConfigError(f"--stride is {stride}, allowed: 1 to {seq_len}, the run's data.seq_len")
    if request.limit is not None and request.limit < 1:
        raise ConfigError(f"--limit is {request.limit}, allowed: 1 or more")
    text = open_text(data, request.text) if isinstance(data, SequenceDataModule) else None
    tasks = read_tasks(text, request) if text and isinstance(data, TextDataModule) else []
    if request.limit is not None and not tasks:
        raise ConfigError(f"--limit is {request.limit}, allowed: with --tasks, whose questions it counts")
    return Material(data, text, tasks, stride, request.limit)


def read_tasks(text: Text, request: Request) -> list[Task | Registered]:
    """Return the tasks that are asked for. ConfigError: one or its data is not there, or lm-eval is not installed."""
    names = tuple(OWN_TASKS) if request.tasks is None else request.tasks
    if request.folder is not None and OWN_TASKS.keys() >= set(names):
        raise ConfigError(f"--data is {str(request.folder)!r}, allowed: with --tasks that names files of it")
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
