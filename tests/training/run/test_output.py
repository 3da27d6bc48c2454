"""What a run leaves is opened once, on rank 0, and is right however the run ends."""

import json
from contextlib import AbstractContextManager, redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from scmoe import files
from scmoe.config.as_yaml import changes_to_yaml
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config, load_text
from scmoe.config.registry import FAMILIES
from scmoe.parallel.checkpoint.durable import machine
from scmoe.training.assembly.model import build_model_on_meta
from scmoe.training.run import output as run_output
from scmoe.training.run import resume
from scmoe.training.run.directory import write_state
from scmoe.training.run.output import RunOutput, open_output, print_start, resume_command
from scmoe.training.run.resume import Resumed
from scmoe.training.run.train import train


def opened(
    *words: str, resumed: Resumed | None = None, quiet: bool = False
) -> AbstractContextManager[RunOutput]:
    """Return the output of a run of the default configuration with these overrides."""
    config = load_config(None, words)
    return open_output(config, build_model_on_meta(config), (), resumed, quiet)


@pytest.mark.parametrize(
    ("error", "state"),
    [(None, "finished"), (SystemExit(0), "cut"), (ValueError("x"), "failed")],
    ids=str,
)
def test_a_run_is_marked_and_closed_however_it_ends(error, state, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(
        run_output, "close_loggers", lambda loggers, status: closed.append((len(loggers), status))
    )
    raised = None
    try:
        with opened("logger.mode=disabled", f"runs_dir={tmp_path}") as output:
            directory = output.directory
            assert json.loads((directory / "state.json").read_text())["state"] == "running"
            if error is not None:
                raise error
    except (SystemExit, ValueError) as caught:
        raised = caught
    assert raised is error, "it is not swallowed"
    assert json.loads((directory / "state.json").read_text())["state"] == state
    assert closed == [(1, "success" if error is None else "failed")]


def test_a_run_that_cannot_open_its_loggers_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_output, "build_loggers", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError), opened(f"runs_dir={tmp_path}"):
        pass
    assert json.loads((tmp_path / "latest" / "state.json").read_text())["state"] == "failed"


def test_a_path_with_brackets_is_printed_as_it_is(tmp_path, capsys):
    config = load_config(None, [])
    print_start(config, build_model_on_meta(config), tmp_path, tmp_path / "[/x]" / "a[lr]")
    assert f"continuing from {tmp_path}/[/x]/a[lr]" in capsys.readouterr().err


def test_a_quiet_run_prints_nothing_and_another_one_what_differs_from_the_defaults(
    tmp_path, capsys
):
    words = [
        f"runs_dir={tmp_path}",
        "moe.position=pos3",
        "logger.mode=disabled",
        "trainer.max_steps=7",
    ]
    config = load_config(None, words)
    with opened(*words, quiet=True):
        assert capsys.readouterr().err == ""
    with opened(*words) as output:
        said = capsys.readouterr().err
        run_dir = output.directory
    assert "position: pos3" in said and "optim:" not in said
    text = changes_to_yaml(config)
    assert text in said and load_text(text, "shown") == config == load_text(
        (run_dir / "config.yaml").read_text(), ""
    )
    assert changes_to_yaml(load_config(None)) == ""


def test_a_run_that_another_process_has_resumed_meanwhile_is_refused(tmp_path, monkeypatch):
    """A resumption prepares its data, which may take hours, before it opens its output."""
    monkeypatch.setattr(run_output, "read_manifest", lambda checkpoint: {"step": 3})
    write_state(tmp_path, "running")
    state = tmp_path / "state.json"
    state.write_text(state.read_text().replace(machine(), "0123abcd"))
    resumed = Resumed(tmp_path, tmp_path / "step=3.ckpt", None)
    with pytest.raises(ConfigError, match="is training"), opened(resumed=resumed):
        pass
    assert [*tmp_path.iterdir()] == [state], "nothing of the run is written"


def test_a_run_that_has_gone_on_meanwhile_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_output, "find_checkpoint", lambda *_, **__: tmp_path / "step=5.ckpt")
    resumed = Resumed(tmp_path, tmp_path / "step=3.ckpt", None)
    with pytest.raises(ConfigError, match="has gone on since"), opened(resumed=resumed):
        pass
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("word", "again"),
    [
        ("trainer.val_every=100", True),
        ("trainer.val_every=150", False),
        ("trainer.limit_val_batches=0", False),
    ],
)
def test_a_row_is_logged_again_only_where_its_validation_is_done_again(word, again, monkeypatch):
    total = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    progress = {"epoch_loop.val_loop.batch_progress": {"total": total}}
    monkeypatch.setattr(resume, "read_manifest", lambda _: {"step": 200})
    monkeypatch.setattr(resume, "read_meta", lambda _: {"loops": {"fit_loop": progress}})
    assert resume.validates_again(Path("a"), load_config(None, [word])) is again


def test_other_ranks_open_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    resumed = Resumed(tmp_path / "a", tmp_path, None)
    with opened(f"runs_dir={tmp_path}", resumed=resumed) as output:
        assert (output.directory, [*output.loggers]) == (None, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "steps", "more"),
    [
        ((), 20, " trainer.max_steps=40"),
        ((), 7, ""),  # stopped early: its schedule stays
        (("trainer.limit_train_batches=7",), 7, " trainer.limit_train_batches=null"),
        (
            ("extensions=[docs.examples.my_architecture]",),
            7,
            " extensions=[docs.examples.my_architecture]",
        ),
    ],
)
def test_the_command_that_trains_further_can_be_used(words, steps, more, tmp_path):
    command = resume_command(tmp_path, steps, load_config(None, ["trainer.max_steps=20", *words]))
    assert command.replace("'", "").endswith(f"resume {tmp_path}{more}")


def test_a_training_builds_one_model_on_meta_and_redacts_its_config_once(tmp_path, monkeypatch):
    devices, redactions = [], []
    build, starred = FAMILIES["gpt"], files._starred

    def build_and_note(config, wire):
        devices.append(torch.get_default_device().type)
        return build(config, wire)

    def star_and_note(value, keys):
        redactions.append(value)
        return starred(value, keys)

    monkeypatch.setitem(FAMILIES.makers, "gpt", build_and_note)
    monkeypatch.setattr(files, "_starred", star_and_note)
    words = ["trainer.fast_dev_run=true", "strategy.dense=auto", "trainer.progress=false"]
    with redirect_stderr(StringIO()):
        train(load_config("debug", [*words, f"runs_dir={tmp_path}"]))
    assert sorted(devices) == ["cpu", "meta"]
    assert sum(isinstance(value, Config) for value in redactions) == 1
