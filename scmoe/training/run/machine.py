"""Checks of a configuration against this machine, before data is prepared and processes start.

What is the same on every machine is checked in config/rules.py. `keep_freed_memory` sets how this
process uses memory, `set_deterministic` with which algorithms it computes.
"""

import ctypes
import inspect
import os
import tempfile
from dataclasses import replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from torch import nn

from scmoe.config.fields import Config
from scmoe.config.installation import install_command, require
from scmoe.config.leaves import ConfigError, show
from scmoe.config.refuse import Refusals, Remedy, refuse
from scmoe.config.registry import IMAGES
from scmoe.lightning.seam.launch import rank_without_trainer
from scmoe.models.model_cost import forward_flops, training_flops
from scmoe.parallel.container_memory import GIB, machine_memory, memory_in_use, memory_limit
from scmoe.parallel.dense.memory import RankJob, rank_memory
from scmoe.training.assembly.model import updated_by_muon
from scmoe.training.assembly.rank_job import cpu_threads

LAUNCHERS: dict[str, type[ClusterEnvironment]] = {
    "torchrun": TorchElasticEnvironment,
    "SLURM": SLURMEnvironment,
}
# Without a launcher, the machines of a job find each other by these variables.
OF_NODE = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
# FLOP/s of a CPU thread and of a GPU; most of them do more.
THREAD_FLOPS = 1e10
GPU_FLOPS = 1e13
FEW_THREADS = 64  # which any machine can start, however few cores it has
MEMINFO = Path("/proc/meminfo")
ROUNDED_UP = 1.005  # a limit printed with three digits must not be below the exact number
PROCESS_GIB = 0.3  # of a process with torch and Lightning, on a CPU
M_TRIM_THRESHOLD = -1  # of mallopt(3)
M_MMAP_THRESHOLD = -3
NEVER = 2**31 - 1  # bytes; a C int


def is_rank_zero() -> bool:
    """Return whether this process is, or will be, global rank 0, as its launcher's environment
    variables say.

    Where Lightning starts the ranks of several machines, their first processes differ by NODE_RANK
    alone.
    """
    node = 0 if "RANK" in os.environ else int(os.environ.get("NODE_RANK", 0))
    return rank_without_trainer() == 0 and node == 0


def check_machine(config: Config, model: nn.Module, job: RankJob) -> None:
    """Raise ConfigError if this machine cannot run the training within the limits of memory and
    time.

    model: the whole network, on the meta device. job: of the config. Rank 0 alone checks folders
    and free memory: they can change while the other ranks start.
    """
    check_resident(config)
    analysis = config.analysis
    if analysis.gating_every or analysis.similarity_every or analysis.gradients_every:
        require("analysis", "matplotlib")
    check_devices(config)
    if is_rank_zero():
        refuse(config, _folders)
        check_size(config, model, job)


def check_devices(config: Config) -> None:
    """Raise ConfigError if devices or ranks are missing here."""
    refuse(config, _packages, _devices, _launcher)


def check_resident(config: Config) -> None:
    """Raise ConfigError if experts would not be on the device, as nothing fetches them here."""
    if config.offload.way != "resident":
        only = "resident; only `generate` offloads experts"
        raise ConfigError(f"offload.way is {show(config.offload.way)}, allowed here: {only}")


def _packages(config: Config) -> Refusals:
    """Check what only other packages know: the arguments of Lightning's Trainer, and whether
    TensorBoard is here."""
    known = inspect.signature(Trainer).parameters
    for name in sorted(config.trainer.extra.keys() - known):
        near = get_close_matches(name, known, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        yield "trainer.extra", Remedy(f"Lightning's Trainer has no argument {name}.{hint}")
    if config.logger.tensorboard and not any(map(find_spec, ("tensorboard", "tensorboardX"))):
        command = install_command("tensorboard")
        yield "logger.tensorboard", f"false, as TensorBoard is not installed: {command}"


def _devices(config: Config) -> Refusals:
    trainer = config.trainer
    gpus = torch.cuda.device_count()
    if trainer.accelerator == "gpu" and not gpus:
        yield "trainer.accelerator", "auto | cpu, as there is no GPU here"
    most = max(os.cpu_count() or 1, FEW_THREADS)
    if (trainer.threads or 1) > most:
        yield "trainer.threads", f"null or at most {most} on this machine"
    if has_gpus(config) and trainer.devices > gpus:
        here = f"at most {gpus}, the GPUs of this machine"
        yield "trainer.devices", f"{here}, or any with trainer.accelerator=cpu"


def has_gpus(config: Config) -> bool:
    """Return whether the ranks run on GPUs of this machine."""
    return config.trainer.accelerator != "cpu" and torch.cuda.is_available()


def _launcher(config: Config) -> Refusals:
    """Check that the launcher starts as many ranks as are configured: the others would wait for a
    missing one."""
    trainer = config.trainer
    for name, launcher in LAUNCHERS.items():
        if launcher.detect():
            try:
                launcher().validate_settings(trainer.devices, trainer.num_nodes)
            except ValueError as error:
                other = f"{name} has started another number of ranks: {error}"
                yield "trainer.devices", Remedy(other)
            return

    missing = [name for name in OF_NODE if name not in os.environ]
    if trainer.num_nodes > 1 and missing:
        variables = " and ".join(missing)
        how = f"Start it with torchrun or srun, or set {variables} on every machine."
        yield "trainer.num_nodes", Remedy(how)


def _folders(config: Config) -> Refusals:
    folders = {"runs_dir": str(Path(config.runs_dir) / config.name)}
    if config.data.name not in (*IMAGES, "synthetic"):
        folders["data.cache_dir"] = config.data.cache_dir
    for key, folder in folders.items():
        if (why := why_not_writable(Path(folder))) is not None:
            yield key, Remedy(f"This folder cannot be written: {why}")


def why_not_writable(folder: Path) -> str | None:
    """Return why no file could be written below a folder, which need not exist yet; None if one
    could."""
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        # Permission bits say nothing about root or a full disk.
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:  # its own text names the temporary file
        return f"{error.strerror}: {folder}"
    except ValueError as error:  # a zero byte
        return str(error)


def check_size(config: Config, model: nn.Module, job: RankJob) -> None:
    """Raise ConfigError if a rank needs more memory, or a step more time, than the limits allow."""
    trainer = config.trainer
    gpu = has_gpus(config)
    limit = trainer.max_memory_gib or available_gib(config)
    job = replace(job, on_gpu=gpu)
    if job.dense == "auto":
        job = replace(job, dense="sharded")  # the mode that needs least

    memory = rank_memory(model, job, updated_by_muon(config, model))
    needed = memory["total"] / GIB + (0 if gpu else PROCESS_GIB)
    if needed > limit:
        room = f"{limit:.3g} GiB are free"
        if trainer.max_memory_gib is not None:
            room = f"trainer.max_memory_gib is {limit:.3g}"
        raise ConfigError(
            f"Not enough memory: a rank needs about {needed:.3g} GiB, {room}. Use more ranks,"
            " trainer.recompute=true or a smaller batch;"
            f" trainer.max_memory_gib={ROUNDED_UP * needed:.3g} starts it anyway."
        )

    flops = training_flops(forward_flops(model, job.seq_len), job.recompute)
    flops *= job.samples * job.accumulate
    seconds = flops / (GPU_FLOPS if gpu else THREAD_FLOPS * cpu_threads(config))
    if seconds > trainer.max_step_s:
        raise ConfigError(
            f"Not enough time: a step takes about {seconds:.3g} s, trainer.max_step_s is"
            f" {trainer.max_step_s:g}. Use more ranks, a smaller model or batch;"
            f" trainer.max_step_s={ROUNDED_UP * seconds:.3g} starts it anyway."
        )


def available_gib(config: Config) -> float:
    """Return the GiB that a rank may use: the smallest GPU's total, or a share of what this machine
    or container has free."""
    devices = config.trainer.devices
    if has_gpus(config):
        return min(torch.cuda.get_device_properties(i).total_memory for i in range(devices)) / GIB
    return min(_free_bytes(), memory_limit() - memory_in_use()) / GIB / devices


def _free_bytes() -> float:
    """Return the free memory of this machine; where there is no /proc, as on macOS, all of it."""
    if not MEMINFO.exists():
        return machine_memory()
    lines = dict(line.split(":") for line in MEMINFO.read_text(encoding="utf-8").splitlines())
    return float(lines["MemAvailable"].split()[0]) * 1024


def set_deterministic(is_wanted: bool) -> None:
    """Let torch use deterministic algorithms only, as Lightning's Trainer does; cuBLAS needs a
    variable for them."""
    if is_wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(is_wanted)


def keep_freed_memory() -> bool:
    """Let malloc keep all freed memory, so that the next step can use it again. Return False where
    it cannot.

    glibc returns large blocks to the kernel when they are freed. Every step then gets its
    activations and gradients as new pages, which the kernel fills with zeros at their first use: 4
    to 20 % of a step's time on two CPU ranks (measured with `make bench`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    return mallopt is not None and all(
        mallopt(key, NEVER) == 1 for key in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD)
    )
