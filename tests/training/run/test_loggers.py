"""Runs send the right data to a W&B server, here on 127.0.0.1, and a broken server does not change
a training.

One process, `scenario`, makes all trainings, because every start of Python with torch costs
seconds.
"""

import contextlib
import faulthandler
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from scmoe.training.run.directory import git
from tests.support.commands import ROOT, environment
from tests.support.forked import python
from tests.support.wandb_server import KEY, WandbServer, wandb_server

pytestmark = [pytest.mark.smoke, pytest.mark.ranks, pytest.mark.timeout(600)]

LONGEST_S = 400  # of all trainings; after it, the stacks of all threads say what waits
DEBUG = ("configs/debug.yaml", "logger.project=wire", "logger.group=together", "logger.tags=[a,b]")


@contextlib.contextmanager
def client(server: WandbServer) -> Iterator[None]:
    """Make this process a client of the server. W&B reads its environment variables once."""
    import wandb

    wandb.teardown()
    os.environ |= server.variables
    yield
    wandb.teardown()


def scenario(folder: Path) -> None:
    """Write into the folder, for each training, what the server received and what the training
    printed."""
    faulthandler.dump_traceback_later(LONGEST_S, exit=True)
    from lightning.pytorch import Callback

    from scmoe.config.load import load_config
    from scmoe.training.callbacks.load_chart import draw_load
    from scmoe.training.run import train as run
    from scmoe.training.run import wandb_logger
    from scmoe.training.run.loggers import build_loggers, close_loggers, log_inputs, log_results
    from scmoe.training.run.output import sync_command
    from scmoe.training.run.resume import resumption

    def report(name: str, server: WandbServer, **more: Any) -> None:
        artifacts = [asdict(artifact) for artifact in server.artifacts]
        for artifact in artifacts:
            artifact["files"] = {file: len(content) for file, content in artifact["files"].items()}
        found = {
            "runs": [asdict(run) for run in server.runs.values()],
            "artifacts": artifacts,
            **more,
        }
        (folder / f"{name}.json").write_text(json.dumps(found))

    def training(
        server: WandbServer, name: str, *overrides: str, run_dir: Path | None = None
    ) -> str:
        """Return what the training printed."""
        said = io.StringIO()
        with (
            client(server),
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            if run_dir is None:
                config, resumed = (
                    load_config(DEBUG[0], [*DEBUG[1:], f"runs_dir={folder / name}", *overrides]),
                    None,
                )
            else:
                config, resumed = resumption(run_dir, overrides)
            summary = run.train(config, (), resumed)
        report(name, server, summary=summary, said=said.getvalue())
        return said.getvalue()

    def command(server: WandbServer, *words: str) -> tuple[int, str]:
        """Return the exit code and the output. That is a file, as W&B's own processes may keep a
        pipe open after their parent has ended."""
        log, env = folder / "command.log", {**os.environ, **server.variables}
        with log.open("wb") as file:
            done = subprocess.run(
                [sys.executable, "-m", *words], cwd=folder, env=env, stdout=file, stderr=file
            )
        return done.returncode, log.read_text()

    with wandb_server() as server:
        training(server, "online", "logger.mode=auto")
        run_dir = (folder / "online" / "latest").resolve()
        (best,) = run_dir.glob("checkpoints/best-step=*.ckpt")  # the resumed run replaces it
        sizes = {
            str(file.relative_to(best)): file.stat().st_size
            for file in best.rglob("*")
            if file.is_file()
        }
        (folder / "best.json").write_text(json.dumps([best.name, sizes]))
        (folder / "resumed").symlink_to("online")
        training(server, "resumed", "logger.mode=auto", "trainer.max_steps=6", run_dir=run_dir)

    with wandb_server() as server:
        training(server, "offline", "logger.mode=offline")
        assert not server.requests
        sync = sync_command((folder / "offline" / "latest").resolve())
        assert sync is not None
        code, said = command(server, *sync.split())
        report("synced", server, said=said, code=code)

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
        report("described", server)
        for name in described:
            del os.environ[name]

    with wandb_server() as server:
        training(server, "disabled", "logger.mode=disabled")
        assert not server.requests

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
    said = training(server, "trouble", "logger.mode=auto")
    run.build_callbacks = plain

    with wandb_server() as server:
        command(server, *said.rpartition("to upload all of it: ")[2].splitlines()[0].split())
        report("uploaded", server)

    wandb_logger.INIT_TIMEOUT_S = 2.0
    for answer in ("error", "nothing"):
        with wandb_server() as server:
            server.answer = answer
            training(server, f"{answer} from the start", "logger.mode=auto")


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("wire")
    ended, *said = python(
        *("-m", __name__, str(folder)), cwd=ROOT, env=environment(), timeout_s=LONGEST_S + 60
    )
    (folder / "scenario.log").write_text("".join(said))
    assert ended == 0, said
    assert not [
        path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()
    ]
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def warnings(report: dict[str, Any]) -> list[str]:
    """Return the lines that say that something went wrong; the printed config and summary have
    other words with `error`."""
    lines = report["said"].splitlines()
    return [line for line in lines if "warn" in line.lower() or line.lower().startswith("error")]


def column(run: dict[str, Any], metric: str) -> list[Any]:
    return [row[metric] for row in run["history"] if metric in row]


def losses(run: dict[str, Any]) -> list[list[Any]]:
    return [column(run, name) for name in ("train/loss", "val/loss")]


def of_type(report: dict[str, Any], *types: str) -> list[dict[str, Any]]:
    return [artifact for artifact in report["artifacts"] if artifact["type"] in types]


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


def result(report: dict[str, Any]) -> dict[str, Any]:
    measured = ("run_dir", "tokens_per_s", "model_tflops", "peak_host_gib")
    return {key: value for key, value in report["summary"].items() if key not in measured}


@pytest.mark.parametrize(
    "name", ["online", "offline", "trouble", "error from the start", "nothing from the start"]
)
def test_logging_changes_no_result(name, reports):
    assert result(reports[name]) == result(reports["disabled"])


def test_disabled_logging_sends_and_writes_nothing(reports):
    assert not reports["disabled"]["runs"] + reports["disabled"]["artifacts"]
    assert not list(Path(reports["disabled"]["summary"]["run_dir"]).glob("wandb*"))


def test_errors_then_no_answer_then_no_server_cause_one_warning(reports):
    (warning,) = warnings(reports["trouble"])
    assert warning.startswith("warning: Weights & Biases receives nothing more of this run: ")
    assert list(Path(warning.split()[-1]).glob("run-*.wandb")), "this can be sent later"


def test_the_command_of_the_warning_uploads_every_row_once(reports):
    (arrived,), (online,) = reports["uploaded"]["runs"], reports["online"]["runs"]
    assert losses(arrived) == losses(online)


@pytest.mark.parametrize("answer", ["error", "nothing"])
def test_a_server_that_is_broken_from_the_start_causes_one_warning(answer, reports):
    (warning,) = warnings(reports[f"{answer} from the start"])
    assert "goes offline" in warning


if __name__ == "__main__":
    scenario(Path(sys.argv[1]))
