"""Parts of `make gpu-check` that train: steps of GPT2-MoE-Small, pairs of blocks, the quickstart's
model.

Transfers between blocks are copies of real rows over the bus on a stream of their own, in parallel
with real computation in bf16. The rate of the copies is searched until communication is the wanted
share of a sequential top-2 pair.
"""

import gzip
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from experiments.bench import emulated, speed_chart
from experiments.bench.overlap.rounds import measure
from experiments.bench.overlap.speedups import summary
from experiments.bench.overlap.timeline import watch
from experiments.bench.setting import Setting
from experiments.engine import gantt, profiles
from experiments.engine.isolated import Pieces, Place
from experiments.engine.ranks import run_alone
from experiments.engine.step import Step
from scmoe.config.fields import Config
from scmoe.config.installation import CHECKOUT
from scmoe.config.load import SHIPPED, load_config
from scmoe.loads import BALANCED
from scmoe.models.model_cost import forward_flops, peak_tflops, training_flops
from scmoe.moe.balance import integer_sums, load_balance_loss
from scmoe.parallel.dense.memory import RankJob, rank_memory
from scmoe.parallel.mesh import Mesh
from scmoe.parallel.update.wrap import Wrapped
from scmoe.planning.clock import in_turn, median, seconds
from scmoe.runs.seen import SeenRun
from scmoe.schedule.play import Span
from scmoe.training.assembly.model import build_model, build_model_on_meta
from scmoe.training.run.train import train as run_training

GPT2_CONFIG = "experiment/gpt2_moe_small.yaml"  # Table 8
ON_ONE = (
    "data.path=null",
    "strategy.ep_size=1",
    "trainer.devices=1",
    "trainer.precision=bf16-mixed",
)
TINY_MODEL = (
    *("model.layers=2", "model.dim=48", "model.heads=6", "data.vocab_size=512", "data.seq_len=32"),
    *("data.global_batch_size=4", "optim.warmup_steps=4", "trainer.max_steps=30"),
)
QUIET = (
    *("trainer.log_every=1", "trainer.limit_val_batches=0", "trainer.progress=false"),
    *("logger.mode=disabled", "analysis.expert_load=false"),
)
WARM_UP_STEPS = 3
PROFILED_SAMPLES = 8  # of a profiled step
PHASES = ("forward", "backward", "update")
BATCH_SIZES = (64, 32, 16, 8, 4, 2, 1)  # samples of a step of GPT2-MoE-Small: the most that fit
MEMORY_SHARE = 0.75  # of the free memory, for the estimate
LEAST_FALL = 0.5  # nats per token, from the first tenth of the steps to the last
TRANSFER_SHARE = 0.52  # of communication, in the pictures
PAIR_SIZES: dict[str, Any] = dict(
    dim=1024, ffn_dim=4096, heads=16, tokens=16384, seq_len=1024, dtype="bfloat16", rounds=9
)
TINY_ROWS = ("top2", "shared_expert", "scmoe_pos2", "scmoe_pos2_pipelined")
TINY_PAIR_SIZES = PAIR_SIZES | dict(
    dim=32, ffn_dim=64, heads=2, tokens=64, seq_len=32, rounds=2, rows=TINY_ROWS
)
KEPT_TRACE = "pos2-overlapped-1-chunks.json"  # of the traces, by timeline.py


def shipped_config(place: Place, name: str, *overrides: str) -> Config:
    """Return a shipped configuration for one device."""
    return load_config(SHIPPED / name, [*ON_ONE, *overrides, *(TINY_MODEL if place.tiny else ())])


class TrainStep:
    """Forward under bf16 autocast, loss with balance, backward, clipping, AdamW; on random tokens
    [samples, S]."""

    def __init__(self, config: Config, device: torch.device, samples: int) -> None:
        self.config = config
        self.device = device
        self.samples = samples
        model = build_model(config).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        self.step = Step(Wrapped(model, 1), Mesh(), optimizer, clip=1.0)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(
            config.data.vocab_size, (samples, config.data.seq_len + 1), generator=generator
        )
        self.ids = ids.to(device)

    def loss(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            logits_BSV, stats = self.step.model(self.ids[:, :-1])
        nats = F.cross_entropy(logits_BSV.flatten(0, 1).float(), self.ids[:, 1:].flatten())
        return nats + self.config.moe.load_balance_coef * load_balance_loss(
            stats, integer_sums(stats)
        )

    def __call__(self) -> None:
        with record_function("step"):
            with record_function("forward"):
                loss = self.loss()
            with record_function("backward"):
                self.step.backward(loss)
            with record_function("update"):
                self.step.update()
                self.step.zero_grad()


def profiled(place: Place) -> Pieces:
    """Return the operators of a training step, and where the host waits for the device.

    With fixed capacity nothing of a step may wait; dropless the host reads the number of rows."""
    return {
        "fixed capacity": lambda: profile_step(place, "step.json.gz"),
        "dropless": lambda: profile_step(place, None, "moe.capacity_factor=null"),
    }


def profile_step(place: Place, trace: str | None, *overrides: str) -> dict[str, Any]:
    """Return times and waits of one step. trace: a file's name, to keep the profile.

    RuntimeError: the host waited with fixed capacity, or the profiler did not see the device."""
    config = shipped_config(place, GPT2_CONFIG, "data.name=synthetic", *overrides)
    step = TrainStep(config, torch.device(place.device), 2 if place.tiny else PROFILED_SAMPLES)
    for _ in range(WARM_UP_STEPS):
        step()
    kept_at = place.out / trace if trace else None
    all_events = profiles.read_events(profiles.recorded(step.device, step), kept_at)
    events = profiles.within(all_events, "step")
    waits = profiles.host_waits(events)
    if place.device == "cuda" and not profiles.device_work(events)["kernels"]:
        raise RuntimeError(
            "the profiler has recorded no kernel of the step, so it cannot trace this device"
        )
    if waits and config.moe.capacity_factor is not None:
        raise RuntimeError(f"with fixed capacity the host waited for the device: {waits}")
    return {
        "samples": step.samples,
        "seq_len": config.data.seq_len,
        "host_waits": sum(waits.values()),
        "waits": waits,
        "operators_forward_ms": profiles.operator_ms(events),
        "phases": {
            phase: profiles.device_work(profiles.within(all_events, phase)) for phase in PHASES
        },
    }


def gpt2(place: Place) -> Pieces:
    return {"training step": lambda: measure_step(place)}


def measure_step(place: Place) -> dict[str, Any]:
    """Return rates of a step of GPT2-MoE-Small at its own shape, medians over rounds, and its peak
    memory. MFU is training FLOPs (models/model_cost.py) over what the device could do: by its
    datasheet, and by a product of two large bf16 matrices, measured in turn with the step."""
    device = torch.device(place.device)
    config = shipped_config(place, GPT2_CONFIG, "data.name=synthetic")
    seq_len, model = config.data.seq_len, build_model_on_meta(config)
    job = RankJob(samples=2, seq_len=seq_len, precision="bf16-mixed", on_gpu=device.type == "cuda")
    if not place.tiny:
        usable = MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
        jobs = [replace(job, samples=samples) for samples in BATCH_SIZES]
        job = next((job for job in jobs if rank_memory(model, job)["total"] < usable), jobs[-1])
    step = TrainStep(config, device, job.samples)
    size = 256 if place.tiny else 8192
    square = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    runs = {
        "step": partial(seconds, step, device),
        "product": partial(seconds, lambda: square @ square, device),
    }
    times = in_turn(runs, 3 if place.tiny else 10, WARM_UP_STEPS)
    step_s = median(times["step"])
    product_flops = 2 * size**3 / median(times["product"])
    achieved = (
        job.samples * training_flops(forward_flops(model, seq_len, empty_slots=False)) / step_s
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    sheet = peak_tflops(name, "bf16-mixed")
    estimate = rank_memory(model, job)
    peak = step.step.held_bytes() + profiles.peak_bytes(device, step)
    return {
        "samples": job.samples,
        "seq_len": seq_len,
        "step_ms": 1e3 * step_s,
        "tokens_per_s": job.samples * seq_len / step_s,
        "tflops_per_s": achieved / 1e12,
        "mfu_of_datasheet": None if sheet is None else achieved / (1e12 * sheet),
        "mfu_of_measured_product": achieved / product_flops,
        "product_tflops_per_s": product_flops / 1e12,
        "peak_bytes": peak,
        "estimated_bytes": estimate["total"],
        "peak_over_estimate": peak / estimate["total"],
        "estimate": estimate,
    }


def training(place: Place) -> Pieces:
    return {"training": lambda: train(place)}


def train(place: Place) -> dict[str, Any]:
    """Train the quickstart's model in bf16 on the pages in docs/, which every checkout has.
    Return the loss in tenths of the training. RuntimeError: it has not fallen by LEAST_FALL."""
    with tempfile.TemporaryDirectory() as folder:
        words = (
            "data.name=text",
            f"data.path={CHECKOUT / 'docs'}",
            f"data.cache_dir={folder}",
            f"runs_dir={folder}",
        )
        accelerator = f"trainer.accelerator={'gpu' if place.device == 'cuda' else 'cpu'}"
        config = shipped_config(place, "quickstart.yaml", *words, accelerator, *QUIET)
        start = time.perf_counter()
        summary = run_training(config)
        taken_s = time.perf_counter() - start
        assert summary is not None
        losses = [
            row["train/loss"]
            for row in SeenRun(Path(summary["run_dir"])).metrics
            if "train/loss" in row
        ]
    tenth = max(1, len(losses) // 10)
    tenths = [mean(losses[i : i + tenth]) for i in range(0, len(losses), tenth)]
    if not tenths[-1] < tenths[0] - LEAST_FALL:
        raise RuntimeError(f"the loss has not fallen by {LEAST_FALL} nats per token: {tenths}")
    return {
        "data": "the pages in docs/",
        "precision": config.trainer.precision,
        "steps": len(losses),
        "loss_first_tenth": tenths[0],
        "loss_last_tenth": tenths[-1],
        "loss": tenths,
        "tokens": len(losses) * config.data.global_batch_size * config.data.seq_len,
        "seconds_with_data_and_start": taken_s,
    }


def setting_at(place: Place, share: float) -> Setting:
    """Return the pair that is measured: real computation, transfers over the bus."""
    sizes = TINY_PAIR_SIZES if place.tiny else PAIR_SIZES
    return Setting(
        share,
        ranks=1,
        compute="real",
        device="cuda" if place.device == "cuda" else "cpu",
        links="bus",
        **sizes,
    )


def overlap(place: Place, share: float) -> Pieces:
    """Return how much every architecture hides, as `bench overlap` measures it, on one device."""
    return {"transfers": lambda: transfers(place), "rows": lambda: overlapped_rows(place, share)}


def overlapped_rows(place: Place, share: float) -> dict[str, Any]:
    """Return the report of `bench overlap`, and draw it."""
    setting = setting_at(place, share)
    report = summary(run_alone(measure, setting)[BALANCED])
    report["chart"] = drawn(speed_chart.draw, report, place.out / f"overlap-{share:g}.png")
    sizes = {
        "dim": setting.dim,
        "ffn_dim": setting.ffn_dim,
        "tokens": setting.tokens,
        "seq_len": setting.seq_len,
    }
    return {"wanted_share": share, **sizes, "dtype": setting.dtype, **report}


def transfers(place: Place) -> dict[str, Any]:
    """Return what one transfer is on the device: copies and kernels, and how much it slows a
    computation down.

    streaming_multiprocessors: those that its kernels can occupy at most; 0 where copy engines do
    all of it.
    """
    device, setting = torch.device(place.device), setting_at(place, 0.5)
    exchange = emulated.over_the_bus(device)
    x = torch.randn(setting.tokens, setting.dim, device=device, dtype=torch.bfloat16)
    w = torch.randn(setting.dim, setting.dim, device=device, dtype=torch.bfloat16)

    def compute() -> None:
        for _ in range(64):
            x @ w

    def transfer() -> None:
        exchange(x, None)[1].wait()

    def both() -> None:
        work = exchange(x, None)[1]
        compute()
        work.wait()

    runs = {run.__name__: partial(seconds, run, device) for run in (transfer, compute, both)}
    times = in_turn(runs, 3 if place.tiny else 15, WARM_UP_STEPS)
    facts: dict[str, Any] = {
        "mb": x.nbytes / 2**20,
        **{f"{name}_ms": 1e3 * median(seconds_of) for name, seconds_of in times.items()},
    }
    facts["gb_per_s_there_and_back"] = x.nbytes / 1e6 / facts["transfer_ms"]
    facts["both_over_longer"] = facts["both_ms"] / max(facts["transfer_ms"], facts["compute_ms"])
    if device.type == "cuda":
        events = profiles.spans(profiles.read_events(profiles.recorded(device, transfer)))
        work = profiles.device_work(events)
        blocks = [prod(e["args"]["grid"]) for e in events if e["cat"] == "kernel"]
        there = torch.cuda.get_device_properties(device).multi_processor_count
        facts |= {"copies": work["copies"], "kernels": work["kernels"]}
        facts["streaming_multiprocessors"] = f"{min(max(blocks, default=0), there)} of {there}"
    return facts


def pictures(place: Place) -> Pieces:
    return {"timelines": lambda: timelines(place)}


def timelines(place: Place) -> dict[str, Any]:
    """Draw the operators of one pair on the device's streams, forward and backward, as in Fig. 7,
    and keep a trace.

    Return for each measured timeline its milliseconds and `beside`, which says
    in numbers what the pictures show.
    """
    with tempfile.TemporaryDirectory() as folder:
        rate, timelines_of, _ = run_alone(watch, setting_at(place, TRANSFER_SHARE), Path(folder))
        trace = Path(folder, KEPT_TRACE).read_bytes()
        (place.out / "pair.json.gz").write_bytes(gzip.compress(trace))
    facts: dict[str, Any] = {"bus_rate": rate}
    card = torch.cuda.get_device_name() if place.device == "cuda" else "cpu"
    for direction, spans_of in timelines_of.items():
        measured = {title: spans for title, spans in spans_of.items() if title.endswith("measured")}
        facts[direction] = {
            title: {"ms": max(s.end for s in spans), "beside": share_beside_computation(spans)}
            for title, spans in measured.items()
        }
        title = f"One pair from the tap to its end, {direction}: real compute, {card}"
        facts[f"{direction}_picture"] = drawn(
            gantt.draw, measured, place.out / f"{direction}.png", title, "ms"
        )
    return facts


def share_beside_computation(spans: Sequence[Span]) -> float:
    """Return the share of the transfers' time in which an operator computes. Operators do not
    overlap each other."""
    transfers = [s for s in spans if s.is_transfer]
    others = [s for s in spans if not s.is_transfer]
    both = sum(
        max(0.0, min(t.end, o.end) - max(t.start, o.start)) for t in transfers for o in others
    )
    return both / sum(t.end - t.start for t in transfers)


def drawn(draw: Callable[..., None], what: Any, path: Path, *words: str) -> str:
    """Draw `what` into a file and return its name, or why there is none."""
    if find_spec("matplotlib") is None:
        return "not drawn: matplotlib is missing"
    draw(what, path, *words)
    return path.name
