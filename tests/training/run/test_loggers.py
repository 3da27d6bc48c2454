"""Runs send the right data to a W&B server, here on 127.0.0.1. test_wandb_logger_faults.py has
servers that are broken or away.

One process, `scenario`, makes all trainings, because every start of Python with torch costs
seconds.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from scmoe.training.run.directory import git
from tests.support.logged_trainings import (
    LoggedTrainings,
    client,
    column,
    of_type,
    reports_of,
    result,
    warnings,
)
from tests.support.wandb_server import wandb_server

pytestmark = [pytest.mark.smoke, pytest.mark.ranks, pytest.mark.timeout(600)]


def scenario(folder: Path) -> None:
    from scmoe.config.load import load_config
    from scmoe.training.callbacks.load_chart import draw_load
    from scmoe.training.run import wandb_logger
    from scmoe.training.run.loggers import build_loggers, close_loggers, log_inputs, log_results

    trainings = LoggedTrainings(folder)
    with wandb_server() as server:
        trainings.train(server, "online", "logger.mode=auto")
        run_dir = (folder / "online" / "latest").resolve()
        (best,) = run_dir.glob("checkpoints/best-step=*.ckpt")  # the resumed run replaces it
        sizes = {
            str(file.relative_to(best)): file.stat().st_size
            for file in best.rglob("*")
            if file.is_file()
        }
        (folder / "best.json").write_text(json.dumps([best.name, sizes]))
        (folder / "resumed").symlink_to("online")
        trainings.train(
            server, "resumed", "logger.mode=auto", "trainer.max_steps=6", run_dir=run_dir
        )

    with wandb_server() as server, client(server):
        described = {
            "WANDB_NOTES": "of the environment",
            "WANDB_TAGS": "c,d",
            "WANDB_JOB_TYPE": "probe",
        }
        described |= {
            "WANDB_PROJECT": "elsewhere",
            "WANDB_RUN_GROUP": "many",
            "WANDB_NAME": "named",
        }
        os.environ |= described
        there = folder / "described"
        draw_load([[1, 2], [2, 1]], there / "load.png", {})
        for i, words in enumerate(
            ([], ["logger.notes=given", "logger.project=here", "logger.entity=team"])
        ):
            run_dir = there / str(i)
            run_dir.mkdir()
            loggers = build_loggers(
                load_config(None, ["logger.mode=online", *words]), run_dir, None
            )
            log_inputs(
                loggers,
                load_config(None, ["data.tokenizer=/data/tokenizer.json"]),
                {"data": "a", "tokenizer": "b"},
            )
            size = {"params_total": 9, "params_active": 5, "tokens_per_s": 3.5, "val_loss": 1.0}
            log_results(loggers, 7, ["a text", "another"], there / "load.png", size)
            close_loggers(loggers)
        trainings.report("described", server)
        for name in described:
            del os.environ[name]

    with wandb_server() as server:
        trainings.train(server, "disabled", "logger.mode=disabled")
        assert not server.requests

    wandb_logger.INIT_TIMEOUT_S = 2.0
    with wandb_server() as server:
        server.answer = "error"
        trainings.train(server, "broken", "logger.mode=auto")


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, dict[str, Any]]:
    return reports_of(__name__, tmp_path_factory.mktemp("wire"))


def test_a_run_arrives_complete(reports):
    report = reports["online"]
    (arrived,) = report["runs"]
    assert (arrived["project"], arrived["group"], arrived["tags"]) == (
        "wire",
        "together",
        ["a", "b"],
    )
    assert (arrived["config"]["optim"]["lr"], arrived["config"]["moe"]["architecture"]) == (
        1e-3,
        "scmoe",
    )
    assert column(arrived, "trainer/global_step") == [0, 1, 1, 2, 3, 3], (
        "there are four steps and two validations"
    )
    assert len(column(arrived, "train/loss")) == 4
    assert column(arrived, "val/loss")[-1] == pytest.approx(report["summary"]["val_loss"])
    assert arrived["sent"]["commit"] == git("rev-parse", "HEAD")
    for name in ("val/loss", "train/loss", "train/lr"):
        assert arrived["summary"][name] == column(arrived, name)[-1], "a number, by which W&B sorts"
    assert arrived["summary"]["val/loss_min"] == pytest.approx(min(column(arrived, "val/loss")))
    assert arrived["exit_code"] == 0
    assert not warnings(report)


def test_fields_describe_a_run_and_variables_where_they_are_null(reports):
    of_environment, given = reports["described"]["runs"]
    assert (of_environment["project"], given["project"]) == ("elsewhere", "here")
    assert of_environment["group"] == given["group"] == "many"
    assert of_environment["tags"] == given["tags"] == ["c", "d"]
    assert (
        of_environment["sent"]["notes"] == "of the environment"
        and given["sent"]["notes"] == "given"
    )
    assert (of_environment["sent"]["jobType"], of_environment["sent"]["displayName"]) == (
        "probe",
        "named",
    )
    assert given["sent"]["entity"] == "team"


def test_a_run_s_size_and_mean_speed_arrive_in_its_summary(reports):
    run, _ = reports["described"]["runs"]
    assert {key: run["summary"][key] for key in ("params_total", "params_active")} == {
        "params_total": 9,
        "params_active": 5,
    }
    assert run["summary"]["tokens_per_s"] == 3.5 and "val_loss" not in run["summary"]


def test_every_row_has_the_tokens_so_far(reports):
    """A step of the debug configuration has 4 sequences of 16 tokens."""
    (arrived,) = reports["online"]["runs"]
    steps = column(arrived, "trainer/global_step")
    assert column(arrived, "train/tokens") == [64 * (step + 1) for step in steps]
    (resumed,) = reports["resumed"]["runs"]
    assert column(resumed, "train/tokens")[-1] == 64 * 6


def test_samples_arrive_as_a_table_and_the_load_as_a_picture(reports):
    run, _ = reports["described"]["runs"]
    assert (
        run["summary"]["samples"]["_type"] == "table-file"
        and run["summary"]["samples"]["nrows"] == 2
    )
    assert run["summary"]["moe/expert_load"]["_type"] == "image-file"
    assert len(of_type(reports["described"], "run_table")) == 2


def test_the_data_and_the_tokenizer_arrive_as_names_and_hashes(reports):
    for artifact in of_type(reports["described"], "dataset", "tokenizer"):
        assert artifact["committed"] and list(artifact["files"]) == [f"{artifact['type']}.json"], (
            "none of the text"
        )
    data, tokenizer = of_type(reports["described"], "dataset", "tokenizer")[:2]
    assert (data["name"], data["metadata"]) == (
        "dataset-sotu",
        {"name": "sotu", "subset": None, "content": "a"},
    )
    assert (tokenizer["name"], tokenizer["metadata"]["content"]) == (
        "tokenizer-tokenizer.json",
        "b",
    )
    assert all(artifact["used"] and not artifact["run"] for artifact in (data, tokenizer)), (
        "inputs, not outputs"
    )
    (of_run,) = of_type(reports["online"], "dataset")
    assert of_run["metadata"]["name"] == "synthetic" and of_run["metadata"]["content"]


def test_the_best_checkpoint_arrives_as_a_model(reports):
    (artifact,), bits = (
        of_type(reports["online"], "model"),
        column(reports["online"]["runs"][0], "val/bits_per_byte"),
    )
    assert artifact["committed"] and "best" in artifact["aliases"]
    assert reports["best"] == [f"best-step={artifact['metadata']['step']}.ckpt", artifact["files"]]
    assert artifact["metadata"]["val/bits_per_byte"] == pytest.approx(min(bits))


def test_a_resumed_run_is_the_same_run(reports):
    (arrived,) = reports["resumed"]["runs"]
    assert arrived["name"] == reports["online"]["runs"][0]["name"]
    assert column(arrived, "trainer/global_step") == [0, 1, 1, 2, 3, 3, 4, 5, 5]
    assert arrived["config"]["trainer"]["max_steps"] == 6
    assert column(arrived, "val/loss")[-1] == pytest.approx(
        reports["resumed"]["summary"]["val_loss"]
    )
    assert arrived["summary"]["train/loss_min"] == pytest.approx(
        min(column(arrived, "train/loss"))
    ), "of both parts"
    assert not warnings(reports["resumed"])


def test_disabled_logging_sends_and_writes_nothing(reports):
    assert not reports["disabled"]["runs"] + reports["disabled"]["artifacts"]
    assert not list(Path(reports["disabled"]["summary"]["run_dir"]).glob("wandb*"))


@pytest.mark.parametrize("name", ["online", "broken"])
def test_logging_changes_no_result(name, reports):
    assert result(reports[name]) == result(reports["disabled"])


def test_a_broken_server_causes_one_warning(reports):
    """Fault 32; test_wandb_logger_faults.py has more of it."""
    (warning,) = warnings(reports["broken"])
    assert "goes offline" in warning


if __name__ == "__main__":
    scenario(Path(sys.argv[1]))
