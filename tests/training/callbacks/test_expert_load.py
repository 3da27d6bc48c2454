"""The table of each expert's load has what the routers chose, also in a resumed run and after a
kill.

The alarm for a collapsed router ignores busy experts and short peaks, and warns once per layer.
"""

import csv
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scmoe.files import try_to_append
from scmoe.moe.balance import SINGLE_STEPS, over_steps, step_load
from scmoe.parallel.mesh import Mesh
from scmoe.parallel.wire.wire import Wire
from scmoe.training.callbacks.expert_load import ExpertLoad
from scmoe.training.callbacks.load_chart import worst_layers


def trainer(step: int, accumulate: int = 1) -> Any:
    return SimpleNamespace(
        accumulate_grad_batches=accumulate, log_every_n_steps=2, global_step=step
    )


LOGGED: list[dict[str, torch.Tensor]] = []
# a rank for each expert
MODULE = SimpleNamespace(log_dict=LOGGED.append, modules=lambda: [], wire=Wire(Mesh(ep_size=3)))


def sums(step: int) -> torch.Tensor:
    """Return two layers of three experts: copies of each, tokens, dropped copies."""
    return torch.tensor([[step, 2, 3, 5 + step, 0], [0, 4 + step, 1, 5 + step, 1]])


def train(callback: ExpertLoad, first: int, last: int) -> None:
    callback.on_train_start(trainer(first), MODULE)
    for step in range(first, last):
        callback.on_train_batch_end(
            trainer(step + 1), MODULE, {"step_sums_LE2": sums(step)}, None, step
        )


def rows(folder: Path) -> list[list[str]]:
    with (folder / "expert_load.csv").open(newline="") as file:
        return list(csv.reader(file))


HEADER = ["step", "layer", "expert_0", "expert_1", "expert_2", "dropped", *SINGLE_STEPS]


def expected(step: int) -> list[list[str]]:
    pair = sums(step - 1), sums(step)
    single = over_steps([step_load(each, 3) for each in pair]).tolist()
    both = [[step, layer, *row[:3], row[4]] for layer, row in enumerate(sum(pair).tolist())]
    return [
        [*map(str, row), *(f"{x:.4g}" for x in more)]
        for row, more in zip(both, single, strict=True)
    ]


def test_the_load_of_a_step_is_that_of_all_its_batches():
    """Two batches of a step are uneven the other way round, so the step is even; the second step is
    not."""
    LOGGED.clear()
    callback, (left, right) = ExpertLoad(), torch.tensor([[[6, 3, 0, 9, 0]], [[0, 3, 6, 9, 9]]])
    for batch, sums_LE2 in enumerate((left, left + right, left, left + left)):  # so far in the step
        callback.on_train_batch_end(
            trainer(batch // 2, 2), MODULE, {"step_sums_LE2": sums_LE2}, None, batch
        )
    (row,) = LOGGED
    assert [row[f"moe/{name}"].item() for name in SINGLE_STEPS] == [1.5, 2.0, 1.5, 2.0, 0.25, 0.5]
    assert row["moe/load_max"] == 1.5 and row["moe/drop_share"] == 0.25


def test_the_worst_layer_of_each_logged_step_is_found_in_the_table(tmp_path):
    train(ExpertLoad(tmp_path), 0, 2)
    found = [[float(x) for x in row[6:10]] for row in expected(1)]
    of_sums = [3 * 6 / 11, 3 * 9 / 11]  # copies 1, 4, 6 and 0, 9, 2
    assert worst_layers(tmp_path / "expert_load.csv") == {1: [max(of_sums), *map(max, *found)]}


def test_rows_are_the_sums_since_the_last_log_and_those_of_a_resumed_run_follow_its_own(tmp_path):
    train(ExpertLoad(tmp_path), 0, 5)
    assert rows(tmp_path) == [HEADER, *expected(1), *expected(3)]
    with (tmp_path / "expert_load.csv").open("a") as file:
        file.write("1,0,2")  # a killed run leaves half a row
    train(ExpertLoad(tmp_path), 2, 4)
    assert rows(tmp_path) == [HEADER, *expected(1), *expected(3)]


@pytest.mark.parametrize("left", ["", "step,layer,exp"])
def test_a_run_that_was_killed_before_its_first_row_has_a_header_when_it_is_resumed(left, tmp_path):
    (tmp_path / "expert_load.csv").write_text(left)
    train(ExpertLoad(tmp_path), 0, 5)
    assert rows(tmp_path) == [HEADER, *expected(1), *expected(3)]


def test_a_text_that_cannot_be_appended_leaves_the_file_as_it_was(tmp_path, capsys):
    path = tmp_path / "table.csv"
    try_to_append(path, "one\n")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, limit[1]))  # bytes: half of the next line fits
    try:
        try_to_append(path, "two\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_text() == "one\n"
    assert "gets no more rows: File too large" in capsys.readouterr().err


# -------------------------------------------------- the alarm for a collapsed router
