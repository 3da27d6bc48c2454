"""What a run asks of its machine is checked before it starts: sizes, devices and launchers, folders
and initial weights, W&B's variables. Each refusal is one line, and no run directory is made."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from torch.distributed import DistNetworkError

from scmoe.command_line import call
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config
from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.parallel import container_memory
from scmoe.training.assembly.rank_job import cpu_threads
from scmoe.training.assembly.trainer import build_trainer
from scmoe.training.run import machine
from scmoe.training.run.machine import is_rank_zero, set_deterministic
from scmoe.training.run.train import checked_model
from scmoe.training.run.wandb_logger import wandb_mode
from tests.support.commands import called
from tests.support.exports import dense, export

pytestmark = [pytest.mark.faults, pytest.mark.representative]


def refusal(folder: Path, *overrides: str) -> str:
    """Return the one line with which a run is refused."""
    runs = folder / "runs"
    done = called("train", "configs/debug.yaml", f"runs_dir={runs}", *overrides)
    assert (done.code, done.err.count("\n"), runs.exists()) == (2, 1, False)
    return done.err.strip()


def number_in(line: str, pattern: str) -> float:
    found = re.search(pattern, line)
    assert found is not None, line
    return float(found[1])


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("model.dim=36", "a multiple of 8"),
        ("model.ffn_dim=37", "null or a multiple of 8"),
        ("data.vocab_size=1", "2 or more"),
        ("moe.capacity_factor=1e300", "float | null, above 0, at most 1e6"),
        ("trainer.max_steps=1000000000000000000000", "int | null, 1 to 2^31 - 1"),
        ("moe.num_experts=1000000", "int, 1 to 2^16"),
    ],
)
def test_sizes_that_nothing_could_compute_are_refused(override, allowed, tmp_path):
    assert f"allowed: {allowed}" in refusal(tmp_path, override)


def test_without_experts_any_width_is_allowed():
    assert (
        load_config("configs/debug.yaml", ["model.dim=36", "moe.architecture=dense"]).model.dim
        == 36
    )


def test_a_run_that_needs_more_memory_than_there_is_is_refused_by_the_limit_that_lifts(tmp_path):
    large = ("moe.num_experts=60000", "model.dim=4096")
    line = refusal(tmp_path, *large)
    assert number_in(line, r"a rank needs about (\S+) GiB") > number_in(line, r"(\S+) GiB are free")
    line = refusal(tmp_path, "trainer.max_memory_gib=0.1")
    needed = number_in(line, r"trainer\.max_memory_gib=(\S+) starts it anyway")
    checked_model(load_config("configs/debug.yaml", [f"trainer.max_memory_gib={needed}"]))


def test_the_limit_of_memory_is_a_ranks_share(monkeypatch, tmp_path):
    one, two = (load_config("configs/debug.yaml", [f"trainer.devices={n}"]) for n in (1, 2))
    assert machine.available_gib(two) == pytest.approx(machine.available_gib(one) / 2, rel=0.1)
    monkeypatch.setattr(container_memory, "CONTAINER", tmp_path)
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert machine.available_gib(one) == 1.0
    (tmp_path / "memory.current").write_text("805306368\n")
    (tmp_path / "memory.stat").write_text("anon 268435456\ninactive_file 536870912\n")
    assert machine.available_gib(one) == 0.75, "a quarter is in use; pages of files are given back"
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_gib(one) > 1.0


def test_a_machine_without_proc_is_measured_by_all_its_memory_and_cores(monkeypatch, tmp_path):
    """As macOS is, whose Python has no sched_getaffinity either."""
    one, two = (
        load_config("configs/debug.yaml", [f"trainer.devices={n}", "trainer.threads=null"])
        for n in (1, 2)
    )
    free = machine.available_gib(one)
    monkeypatch.setattr(container_memory, "CONTAINER", tmp_path)
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert free <= machine.available_gib(one) == 2 * machine.available_gib(two)
    assert (cpu_threads(one), cpu_threads(two)) == (os.cpu_count(), max(1, os.cpu_count() // 2))


def test_a_step_of_hours_is_refused_by_the_limit_that_lifts(tmp_path):
    long = ("data.seq_len=1000000", "trainer.max_memory_gib=1000")
    line = refusal(tmp_path, *long)
    seconds = number_in(line, r"trainer\.max_step_s=(\S+) starts it anyway")
    checked_model(load_config("configs/debug.yaml", [*long, f"trainer.max_step_s={seconds}"]))


# ---------------------------------------------------------------------- devices and launchers


@pytest.mark.parametrize(
    ("gpus", "overrides", "message"),
    [
        (
            0,
            ["trainer.accelerator=gpu"],
            "trainer.accelerator is 'gpu', allowed: auto | cpu, as there is no GPU",
        ),
        (
            1,
            ["trainer.accelerator=auto", "trainer.devices=2"],
            "trainer.devices is 2, allowed: at most 1, the GPUs",
        ),
        (0, ["trainer.threads=1024"], "trainer.threads is 1024, allowed: null or at most "),
    ],
)
def test_devices_and_threads_that_are_not_there_are_refused(
    gpus, overrides, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(machine.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: gpus > 0)
    assert message in refusal(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("variables", "is_first"),
    [
        ({}, True),
        ({"NODE_RANK": "0"}, True),
        ({"NODE_RANK": "1"}, False),
        ({"NODE_RANK": "1", "RANK": "0"}, True),
    ],
)
def test_only_the_first_machines_first_process_is_rank_0(variables, is_first, monkeypatch):
    """Lightning's own launcher has not numbered the ranks yet, and each machine's process would
    write a run."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_rank_zero() is is_first


TORCHRUN = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "GROUP_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "x",
}
SLURM = {
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_JOB_NAME": "x",
    "SLURM_PROCID": "0",
}


@pytest.mark.parametrize(
    ("variables", "overrides", "message"),
    [
        (
            {**TORCHRUN, "WORLD_SIZE": "2"},
            [],
            "trainer.devices is 1.*torchrun has started .*\\(2\\)",
        ),
        (
            SLURM,
            ["trainer.devices=2"],
            "trainer.devices is 2.*SLURM has started .*ntasks-per-node=4",
        ),
        (
            {},
            ["trainer.num_nodes=2"],
            "trainer.num_nodes is 2.* MASTER_ADDR and MASTER_PORT and NODE",
        ),
        (
            {"MASTER_ADDR": "a", "MASTER_PORT": "1"},
            ["trainer.num_nodes=2"],
            "num_nodes is 2.* set NODE_RANK",
        ),
    ],
    ids=["torchrun", "SLURM", "no launcher", "half of the variables"],
)
def test_ranks_that_nobody_starts_are_not_waited_for(
    variables, overrides, message, tmp_path, monkeypatch
):
    for name in machine.OF_NODE:  # a Trainer of an earlier test may have left them
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert re.search(message, refusal(tmp_path, *overrides))


def test_ranks_that_do_not_find_each_other_in_time_say_which_setting_to_raise(monkeypatch):
    """The error of torch's store names a socket alone."""

    def too_late(*_: object) -> None:
        raise DistNetworkError("The client socket has timed out after 1ms")

    strategy = ExpertParallelStrategy(timeout_s=11)
    monkeypatch.setattr(ExpertParallelStrategy.__mro__[1], "setup_environment", too_late)
    strategy._lightning_module = type("Module", (), {"trainer": type("T", (), {"callbacks": []})})()  # type: ignore
    with pytest.raises(TimeoutError, match=r"within 600 s; .*strategy\.timeout_s"):
        strategy.setup_environment()


# ---------------------------------------------------------------------- folders, initial weights


@pytest.mark.parametrize("key", ["runs_dir", "data.cache_dir"])
def test_a_folder_that_cannot_be_written_is_refused(key, tmp_path):
    (tmp_path / "file").touch()
    text = "data.name=sotu", "data.vocab_size=300"
    for folder in ("/proc/nowhere", str(tmp_path / "file" / "below")):
        line = refusal(tmp_path, *text, f"{key}={folder}")
        assert f"{key} is '{folder[:40]}" in line and "This folder cannot be written: " in line
        assert "tmp" not in line.replace(str(tmp_path), ""), "no name that nobody has given"


def test_initial_weights_that_do_not_fit_are_refused_before_data_is_prepared(tmp_path):
    """Of two ranks the other one is not started either."""
    (tmp_path / "data.txt").write_text(
        "It was a bright cold day, and the clocks were striking.\n" * 200
    )
    (tmp_path / "no.safetensors").write_text("nothing")
    (tmp_path / "hf").mkdir()
    export(dense("gpt"), tmp_path / "other.safetensors")
    text = ("data.name=text", f"data.path={tmp_path}/data.txt", f"data.cache_dir={tmp_path}/cache")
    for kind, name in (
        *(
            ("scmoe", "nowhere.safetensors"),
            ("scmoe", "no.safetensors"),
            ("scmoe", "other.safetensors"),
        ),
        *(("hf", "nowhere"), ("hf", "hf")),
    ):
        weights = f"init_from={kind}:{tmp_path / name}"
        line = refusal(tmp_path, *text, "data.vocab_size=300", "trainer.devices=2", weights)
        assert line.startswith("error: init_from is ")
        assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------------- variables of W&B


@pytest.mark.parametrize(
    "url", ["api.wandb.ai", "ftp://x", "http://[bad", "http://x:port", "http://"]
)
def test_a_malformed_server_is_refused_unless_wandb_is_off(url, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", url)
    assert f"WANDB_BASE_URL is {url!r}" in refusal(tmp_path, "logger.mode=offline")
    assert wandb_mode(load_config("configs/debug.yaml", ["logger.mode=disabled"])) == "disabled"


def test_wandb_mode_decides_where_the_config_does_not(tmp_path, monkeypatch):
    auto, online = (
        load_config("configs/debug.yaml", [f"logger.mode={mode}"]) for mode in ("auto", "online")
    )
    for mode in ("online", "offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert (wandb_mode(auto), wandb_mode(online)) == (mode, "online")
    monkeypatch.setenv("WANDB_MODE", "of")
    assert "WANDB_MODE is 'of', allowed: online | offline | disabled" in refusal(
        tmp_path, "logger.mode=auto"
    )


def test_a_folder_of_an_experiment_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "debug").touch()  # as a folder of another user
    assert call("train", "debug", f"runs_dir={tmp_path}") == 2
    assert "This folder cannot be written" in capsys.readouterr().err


def test_what_lightning_raises_for_an_argument_is_one_line():
    for word in ("max_time=60", "benchmark=x"):
        config = load_config("debug", [f"trainer.extra.{word}", "trainer.deterministic=false"])
        with pytest.raises(ConfigError, match=r"does not take trainer\.extra"):
            build_trainer(config, [], [])


def test_deterministic_algorithms_have_the_variable_that_cublas_needs(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    set_deterministic(False)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    try:
        set_deterministic(True)
        assert (
            os.environ["CUBLAS_WORKSPACE_CONFIG"] and torch.are_deterministic_algorithms_enabled()
        )
    finally:
        set_deterministic(False)
