"""This module writes task files for lm-eval."""

from pathlib import Path
from typing import Any

import yaml

CHOOSE = {"output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_choice": "choices"}


def writing(until: str, max_gen_toks: int, metric: str) -> dict[str, Any]:
    """Return a task whose answers the model writes: until a text comes, or up to a number of
    tokens."""
    return {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [until], "max_gen_toks": max_gen_toks},
        "metric_list": [{"metric": metric}],
    }


def write_task(folder: Path, name: str, task: dict[str, Any], rows: str = "rows") -> None:
    """Write a task file. rows: a file of the folder with one JSON object on each line, its
    question is `query`."""
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(folder / rows)}},
    }
    question = {"validation_split": "validation", "doc_to_text": "{{query}}"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **question, **task}))
