"""The table of each expert's load has what the routers chose, also in a resumed run and after a kill."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from scmoe.training import files as writing
from scmoe.training.callbacks.expert_load import ExpertLoad, draw_load


def trainer(step: int) -> Any:
    return SimpleNamespace(accumulate_grad_batches=1, log_every_n_steps=2, global_step=step)


MODULE = SimpleNamespace(log_dict=lambda row: None, modules=lambda: [])


def sums(step: int) -> torch.Tensor:
    """Returns two layers of three experts: copies of each, tokens, dropped copies."""
    return torch.tensor([[step, 2, 3, 5 + step, 0], [0, 4 + step, 1, 5 + step, 1]])


def train(callback: ExpertLoad, first: int, last: int) -> None:
    callback.on_train_start(trainer(first), MODULE)
    for step in range(first, last):
        callback.on_train_batch_end(trainer(step + 1), MODULE, {"load_sums_LE2": sums(step)}, None, step)


def rows(folder: Path) -> list[list[str]]:
    with (folder / "expert_load.csv").open(newline="") as file:
        return list(csv.reader(file))


HEADER = ["step", "layer", "expert_0", "expert_1", "expert_2", "dropped"]


def expected(step: int) -> list[list[str]]:
    both = (sums(step - 1) + sums(step)).tolist()
    return [[str(x) for x in (step, layer, *row[:3], row[4])] for layer, row in enumerate(both)]


def test_rows_are_the_sums_since_the_last_log(tmp_path):
    train(ExpertLoad(tmp_path), 0, 5)
    assert rows(tmp_path) == [HEADER, *expected(1), *expected(3)]


def test_a_resumed_run_keeps_whole_rows_before_its_step(tmp_path):
    train(ExpertLoad(tmp_path), 0, 6)
    with (tmp_path / "expert_load.csv").open("a") as file:
        file.write("1,0,2")  # a killed run leaves half a row
    train(ExpertLoad(tmp_path), 2, 4)
    assert rows(tmp_path) == [HEADER, *expected(1), *expected(3)]


def test_a_text_that_cannot_be_appended_leaves_the_file_as_it_was(tmp_path, monkeypatch, capsys):
    path = tmp_path / "table.csv"
    writing.try_to_append(path, "one\n")

    class Full:
        def __init__(self, path: Path, *_: Any, **__: Any) -> None:
            self.file = open(path, "a")  # noqa: SIM115

        def __enter__(self) -> Any:
            return self

        def write(self, text: str) -> None:
            self.file.write(text[:2])
            self.file.close()
            raise OSError(28, "No space left on device")

        def __exit__(self, *_: Any) -> None:
            pass

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *_, **__: Full(self))  # a class would not get the path
        writing.try_to_append(path, "two\n")
    assert path.read_text() == "one\n"
    assert "gets no more rows: No space left" in capsys.readouterr().err


def test_the_picture_is_drawn_for_few_and_many_experts(tmp_path):
    for num_experts in (2, 64):
        path = tmp_path / f"{num_experts}.png"
        draw_load([list(range(num_experts)), [0] * num_experts], path)
        assert path.stat().st_size > 1000
