"""Fault 32: a W&B server that is broken or away, here on 127.0.0.1, does not change a training, and
nothing is lost.

One process, `scenario`, makes all trainings, because every start of Python with torch costs
seconds.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.logged_trainings import (
    LoggedTrainings,
    losses,
    of_type,
    reports_of,
    result,
    warnings,
)
from tests.support.wandb_server import WandbServer, wandb_server

pytestmark = [pytest.mark.smoke, pytest.mark.ranks, pytest.mark.faults, pytest.mark.timeout(600)]


def scenario(folder: Path) -> None:
    from lightning.pytorch import Callback

    from scmoe.training.run import train as run
    from scmoe.training.run import wandb_logger
    from scmoe.training.run.output import sync_command

    trainings = LoggedTrainings(folder)
    with wandb_server() as server:
        trainings.train(server, "online", "logger.mode=auto")

    with wandb_server() as server:
        trainings.train(server, "offline", "logger.mode=offline")
        assert not server.requests
        sync = sync_command((folder / "offline" / "latest").resolve())
        assert sync is not None
        code, said = trainings.command(server, *sync.split())
        trainings.report("synced", server, said=said, code=code)

    class Trouble(Callback):
        """Lets the server answer with errors after step 1 and not at all after step 2, and closes
        it after step 3."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            server.answer = {1: "error", 2: "nothing"}.get(trainer.global_step, server.answer)
            if trainer.global_step == 3:
                server.close()

    plain, wandb_logger.FINISH_TIMEOUT_S = run.build_callbacks, 2.0
    run.build_callbacks = lambda *arguments: [*plain(*arguments), Trouble()]
    server = WandbServer()
    said = trainings.train(server, "trouble", "logger.mode=auto")
    run.build_callbacks = plain

    with wandb_server() as server:
        upload = said.rpartition("to upload all of it: ")[2].splitlines()[0]
        trainings.command(server, *upload.split())
        trainings.report("uploaded", server)

    wandb_logger.INIT_TIMEOUT_S = 2.0
    with wandb_server() as server:
        server.answer = "nothing"
        trainings.train(server, "nothing from the start", "logger.mode=auto")


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, dict[str, Any]]:
    return reports_of(__name__, tmp_path_factory.mktemp("trouble"))


def test_an_offline_run_is_synced_completely(reports):
    assert not reports["offline"]["runs"]
    report = reports["synced"]
    assert report["code"] == 0, report["said"]
    assert "wandb sync " in reports["offline"]["said"], "the run says how"
    (arrived,), (online,) = report["runs"], reports["online"]["runs"]
    for key in ("project", "group", "tags", "exit_code"):
        assert arrived[key] == online[key]
    assert losses(arrived) == losses(online)
    for kind in ("model", "dataset"):
        (artifact,), (of_online,) = of_type(report, kind), of_type(reports["online"], kind)
        assert artifact["committed"] and artifact["files"].keys() == of_online["files"].keys()


@pytest.mark.parametrize("name", ["offline", "trouble", "nothing from the start"])
def test_trouble_changes_no_result(name, reports):
    assert result(reports[name]) == result(reports["online"])


def test_errors_then_no_answer_then_no_server_cause_one_warning(reports):
    (warning,) = warnings(reports["trouble"])
    assert warning.startswith("warning: Weights & Biases receives nothing more of this run: ")
    assert list(Path(warning.split()[-1]).glob("run-*.wandb")), "this can be sent later"


def test_the_command_of_the_warning_uploads_every_row_once(reports):
    (arrived,), (online,) = reports["uploaded"]["runs"], reports["online"]["runs"]
    assert losses(arrived) == losses(online)


def test_a_server_that_answers_nothing_causes_one_warning(reports):
    (warning,) = warnings(reports["nothing from the start"])
    assert "goes offline" in warning


if __name__ == "__main__":
    scenario(Path(sys.argv[1]))
