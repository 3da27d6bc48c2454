"""Runs send the right data to a W&B server, here on 127.0.0.1, and a broken server does not change a training.

One process, `scenario`, makes all trainings except the agent's, because every start of Python with torch costs seconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from scmoe.config.fields import ConfigError
from scmoe.studies.sweep.sweep_file import read
from scmoe.studies.sweep.wandb_sweep import run_online
from tests.support.commands import ROOT
from tests.support.wandb_server import KEY, WandbServer, wandb_server

pytestmark = [pytest.mark.smoke, pytest.mark.dist, pytest.mark.timeout(600)]

DEBUG = ("configs/debug.yaml", "logger.project=wire", "logger.group=together", "logger.tags=[a,b]")


@contextlib.contextmanager
def client(server: WandbServer) -> Iterator[None]:
    """Makes this process a client of the server. W&B reads its environment variables once."""
    import wandb

    wandb.teardown()
    os.environ |= server.variables
    yield
    wandb.teardown()


def environment() -> dict[str, str]:
    """Returns the variables of this process without those of W&B and of tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "PYTEST_"))}


def scenario(folder: Path) -> None:
    """Writes into the folder, for each training, what the server received and what the training printed."""
    from lightning.pytorch import Callback

    from scmoe.config.load import load
    from scmoe.training.callbacks.expert_load import draw_load
    from scmoe.training.run import train as run
    from scmoe.training.run import wandb_logger
    from scmoe.training.run.loggers import build_loggers, close_loggers, log_results

    def training(server: WandbServer, name: str, *overrides: str, run_dir: Path | None = None) -> dict[str, Any]:
        said = io.StringIO()
        with client(server), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            summary = run.train(load(DEBUG[0], [*DEBUG[1:], f"runs_dir={folder / name}", *overrides]), (), run_dir)
        assert summary is not None
        runs, artifacts = [asdict(run) for run in server.runs.values()], [asdict(a) for a in server.artifacts]
        for artifact in artifacts:
            artifact["files"] = {file: len(content) for file, content in artifact["files"].items()}
        report = {"summary": summary, "said": said.getvalue(), "runs": runs, "artifacts": artifacts}
        (folder / f"{name}.json").write_text(json.dumps(report))
        return summary

    with wandb_server() as server:
        training(server, "online", "logger.mode=auto")
        run_dir = (folder / "online" / "latest").resolve()
        (folder / "resumed").symlink_to("online")
        training(server, "resumed", "logger.mode=auto", "trainer.max_steps=6", run_dir=run_dir)

    with wandb_server() as server:
        training(server, "offline", "logger.mode=offline")
        assert not server.requests
        command = wandb_logger.sync_command((folder / "offline" / "latest").resolve())
        assert command is not None
        sync = [sys.executable, "-m", *command.split()]
        there = {"cwd": folder, "env": {**os.environ, **server.variables}}  # it logs into cwd
        done = subprocess.run(sync, capture_output=True, text=True, **there)
        runs = [asdict(run) for run in server.runs.values()]
        artifacts = [{**asdict(a), "files": sorted(a.files)} for a in server.artifacts]
        report = {"said": done.stderr, "code": done.returncode, "runs": runs, "artifacts": artifacts}
        (folder / "synced.json").write_text(json.dumps(report))

    with wandb_server() as server, client(server):
        described = {"WANDB_NOTES": "of the environment", "WANDB_TAGS": "c,d", "WANDB_JOB_TYPE": "probe"}
        described |= {"WANDB_PROJECT": "elsewhere", "WANDB_RUN_GROUP": "many", "WANDB_NAME": "named"}
        os.environ |= described
        there = folder / "described"
        draw_load([[1, 2], [2, 1]], there / "load.png")
        for i, words in enumerate(([], ["logger.notes=given", "logger.project=here", "logger.entity=team"])):
            run_dir = there / str(i)
            run_dir.mkdir()
            loggers = build_loggers(load(None, ["logger.mode=online", *words]), run_dir, None)
            log_results(loggers, 7, ["a text", "another"], there / "load.png")
            close_loggers(loggers)
        runs = [asdict(run) for run in server.runs.values()]
        artifacts = [{**asdict(a), "files": sorted(a.files)} for a in server.artifacts]
        (folder / "described.json").write_text(json.dumps({"runs": runs, "artifacts": artifacts}))
        for name in described:
            del os.environ[name]

    with wandb_server() as server:
        training(server, "disabled", "logger.mode=disabled")
        assert not server.requests

    class Trouble(Callback):
        """Lets the server answer with errors after step 1 and not at all after step 2, and closes it after step 3."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            server.answer = {1: "error", 2: "nothing"}.get(trainer.global_step, server.answer)
            if trainer.global_step == 3:
                server.close()

    plain, wandb_logger.FINISH_TIMEOUT_S = run.build_callbacks, 2.0
    run.build_callbacks = lambda *arguments: [*plain(*arguments), Trouble()]
    server = WandbServer()
    training(server, "trouble", "logger.mode=auto")
    run.build_callbacks = plain

    wandb_logger.INIT_TIMEOUT_S = 2.0
    for answer in ("error", "nothing"):
        with wandb_server() as server:
            server.answer = answer
            training(server, f"{answer} from the start", "logger.mode=auto")


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("wire")
    code = f"from pathlib import Path; from tests.smoke.test_wandb import scenario; scenario(Path({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def warnings(report: dict[str, Any]) -> list[str]:
    return [line for line in report["said"].splitlines() if "warn" in line.lower() or "error" in line.lower()]


def column(run: dict[str, Any], metric: str) -> list[Any]:
    return [row[metric] for row in run["history"] if metric in row]


def best_of(report: dict[str, Any]) -> float:
    return min(column(report["runs"][0], "val/bits_per_byte"))


def test_a_run_arrives_complete(reports):
    report = reports["online"]
    (arrived,) = report["runs"]
    assert (arrived["project"], arrived["group"], arrived["tags"]) == ("wire", "together", ["a", "b"])
    assert (arrived["config"]["optim"]["lr"], arrived["config"]["moe"]["architecture"]) == (1e-3, "scmoe")
    assert column(arrived, "trainer/global_step") == [0, 1, 1, 2, 3, 3], "there are four steps and two validations"
    assert len(column(arrived, "train/loss")) == 4
    assert column(arrived, "val/loss")[-1] == pytest.approx(report["summary"]["val_loss"])
    assert arrived["summary"]["val/loss"] == {"min": pytest.approx(min(column(arrived, "val/loss")))}
    assert arrived["summary"]["train/lr"] == column(arrived, "train/lr")[-1], "the last one"
    assert arrived["exit_code"] == 0
    assert not warnings(report)


def test_fields_describe_a_run_and_variables_where_they_are_null(reports):
    of_environment, given = reports["described"]["runs"]
    assert (of_environment["project"], given["project"]) == ("elsewhere", "here")
    assert of_environment["group"] == given["group"] == "many"
    assert of_environment["tags"] == given["tags"] == ["c", "d"]
    assert of_environment["sent"]["notes"] == "of the environment" and given["sent"]["notes"] == "given"
    assert (of_environment["sent"]["jobType"], of_environment["sent"]["displayName"]) == ("probe", "named")
    assert given["sent"]["entity"] == "team"


def test_samples_arrive_as_a_table_and_the_load_as_a_picture(reports):
    run, _ = reports["described"]["runs"]
    assert run["summary"]["samples"]["_type"] == "table-file" and run["summary"]["samples"]["nrows"] == 2
    assert run["summary"]["moe/expert_load"]["_type"] == "image-file"
    assert {artifact["type"] for artifact in reports["described"]["artifacts"]} == {"run_table"}


def test_the_best_checkpoint_arrives_as_a_model(reports):
    (artifact,) = reports["online"]["artifacts"]
    assert (artifact["type"], artifact["committed"]) == ("model", True)
    assert "best" in artifact["aliases"]
    checkpoint = Path(
        reports["online"]["summary"]["run_dir"], "checkpoints", f"best-step={artifact['metadata']['step']}.ckpt"
    )
    sizes = {str(file.relative_to(checkpoint)): file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()}
    assert artifact["files"] == sizes
    assert artifact["metadata"]["val/bits_per_byte"] == pytest.approx(best_of(reports["online"]))


def test_a_resumed_run_is_the_same_run(reports):
    (arrived,) = reports["resumed"]["runs"]
    assert arrived["name"] == reports["online"]["runs"][0]["name"]
    assert column(arrived, "trainer/global_step") == [0, 1, 1, 2, 3, 3, 4, 5, 5]
    assert arrived["config"]["trainer"]["max_steps"] == 6
    assert column(arrived, "val/loss")[-1] == pytest.approx(reports["resumed"]["summary"]["val_loss"])
    assert not warnings(reports["resumed"])


def test_an_offline_run_is_synced_completely(reports):
    assert not reports["offline"]["runs"]
    report = reports["synced"]
    assert report["code"] == 0, report["said"]
    (arrived,), (online,) = report["runs"], reports["online"]["runs"]
    for key in ("project", "group", "tags", "exit_code"):
        assert arrived[key] == online[key]
    assert column(arrived, "train/loss") == column(online, "train/loss")
    assert column(arrived, "val/loss") == column(online, "val/loss")
    (artifact,) = report["artifacts"]
    assert (artifact["type"], artifact["committed"]) == ("model", True)
    assert artifact["files"] == sorted(reports["online"]["artifacts"][0]["files"])


def result(report: dict[str, Any]) -> dict[str, Any]:
    measured = ("run_dir", "tokens_per_s", "model_tflops", "peak_host_gib")
    return {key: value for key, value in report["summary"].items() if key not in measured}


@pytest.mark.parametrize("name", ["online", "offline", "trouble", "error from the start", "nothing from the start"])
def test_logging_changes_no_result(name, reports):
    assert result(reports[name]) == result(reports["disabled"])


def test_disabled_logging_sends_and_writes_nothing(reports):
    assert not reports["disabled"]["runs"] + reports["disabled"]["artifacts"]
    assert not list(Path(reports["disabled"]["summary"]["run_dir"]).glob("wandb*"))


def test_errors_then_no_answer_then_no_server_cause_one_warning(reports):
    (warning,) = warnings(reports["trouble"])
    assert warning.startswith("warning: Weights & Biases receives nothing more of this run: ")
    kept = Path(warning.rpartition("wandb sync ")[2])
    assert list(kept.glob("run-*.wandb")), "this can be sent later"


@pytest.mark.parametrize("answer", ["error", "nothing"])
def test_a_server_that_is_broken_from_the_start_causes_one_warning(answer, reports):
    (warning,) = warnings(reports[f"{answer} from the start"])
    assert "goes offline" in warning


def test_a_sweep_through_an_agent(tmp_path):
    """The first of two trials fails and does not end the sweep. The runs have the ids of the agent."""
    ours = yaml.safe_load((ROOT / "configs/sweep/smoke.yaml").read_text())
    ours["parameters"]["optim.lr"]["values"] = [1e-3]
    ours["parameters"]["init_from"]["values"].reverse()
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(ours))
    with wandb_server() as server:
        words = (str(tmp_path / "two.yaml"), f"runs_dir={tmp_path}")
        command, env = [sys.executable, "-m", "experiments.sweep", *words], environment() | server.variables
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"sweep": "me/scmoe/sweep001", "exit_code": 0}
    made, joined = (line.split() for line in done.stdout.splitlines() if line.startswith(("    wandb ", "    PATH=")))
    assert joined == ["PATH=$PWD/.venv/bin:$PATH", "wandb", "agent", "me/scmoe/sweep001"]
    assert made[:-1] == ["wandb", "sweep", "--entity", "me", "--project", "scmoe"]
    assert yaml.safe_load(Path(made[-1]).read_text()) == server.sweep
    sent = server.sweep
    assert sent.pop("command")[-2:] == [*words[1:], "${args_no_hyphens}"]
    assert sent == {key: value for key, value in ours.items() if key != "command"}, "only the command differs"
    runs = list(server.runs.values())
    assert [run.name for run in runs] == ["trial0", "trial1"], "the agent gives the ids"
    assert [run.config["init_from"] for run in runs] == ["scmoe:no-such-file.safetensors", None]
    assert [run.exit_code for run in runs] == [1, 0]
    assert all(run.sweep == "sweep001" for run in runs)
    assert len(runs[1].column("train/loss")) == 4 and runs[1].column("val/loss")
    assert [artifact.run for artifact in server.artifacts] == ["trial1"]
    ids = {json.loads(path.read_text())["id"] for path in tmp_path.glob("debug/*/wandb_run.json")}
    assert ids == {"trial0", "trial1"}, "a resumed trial must be the same run"


def left_behind(folder: Path) -> list[str]:
    """Returns the processes whose environment has this folder; W&B's own are among them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # the process has ended or is another user's
            found += [path.parent.name] * (str(folder).encode() in path.read_bytes())
    return found


def trials_with_rows(folder: Path) -> set[str]:
    """Returns the W&B ids of the runs in this folder that have logged something."""
    records = [path for path in folder.glob("debug/*/wandb_run.json") if path.with_name("metrics.csv").exists()]
    return {json.loads(path.read_text())["id"] for path in records}


def test_a_trial_that_w_and_b_stops_and_one_that_is_interrupted_are_saved(tmp_path):
    """The server stops the first trial, as its Hyperband does; Ctrl-C interrupts the second."""
    long = ("trainer.max_steps=100000", "trainer.val_every=100000", "trainer.checkpoint_every=100000")
    words = ("configs/sweep/smoke.yaml", f"runs_dir={tmp_path}", *long)

    def until_it_trains(trial: str) -> None:
        """Waits for rows in metrics.csv: the client sends its rows only every 15 s."""
        while trial not in trials_with_rows(tmp_path):
            assert process.poll() is None
            time.sleep(0.1)

    with wandb_server() as server, (tmp_path / "said").open("w") as said:
        command, env = [sys.executable, "-m", "experiments.sweep", *words], environment() | server.variables
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=said, start_new_session=True)
        until_it_trains("trial0")
        server.stopped.add("trial0")
        until_it_trains("trial1")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        code = process.wait(120)
    assert code == 130
    assert not left_behind(tmp_path)
    assert {name: run.exit_code for name, run in server.runs.items()} == {"trial0": 1, "trial1": 1}
    assert len(list(tmp_path.glob("debug/*/checkpoints/step=*.ckpt"))) == 2
    assert "go on        PATH=$PWD/.venv/bin:$PATH wandb agent me/scmoe/sweep001" in (tmp_path / "said").read_text()


def test_a_server_that_does_not_answer_a_sweep_is_an_error(monkeypatch):
    import wandb

    wandb.teardown()
    monkeypatch.setattr(wandb.Api, "_HTTP_TIMEOUT", 1)
    with wandb_server() as server:
        server.close()
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(ROOT)
        with pytest.raises(ConfigError, match=r"^Weights & Biases takes no sweep, allowed here: --local: "):
            run_online(read("configs/sweep/smoke.yaml"), print)
        with pytest.raises(ConfigError, match=r"^logger\.mode is 'disabled', W&B would see no trial, allowed "):
            run_online(read("configs/sweep/smoke.yaml", ["logger.mode=disabled"]), print)
    wandb.teardown()
