"""Part overlap: how much every architecture hides, as `bench overlap` measures it, on the streams of one device.

Transfers are copies of real rows over the bus on a stream of their own, in parallel with real computation in bf16. The
rate of the copies is searched until communication is the wanted share of a sequential top-2 pair.
"""

from dataclasses import asdict
from math import prod
from statistics import median
from typing import Any

import torch

from scmoe.experiments.bench import emulated
from scmoe.experiments.bench.gpu.events import device_work, spans
from scmoe.experiments.bench.gpu.gpu_parts import Pieces, Place
from scmoe.experiments.bench.gpu.pictures import drawn, setting_at
from scmoe.experiments.bench.gpu.timing import in_turn
from scmoe.experiments.bench.overlap import measure
from scmoe.experiments.bench.overlap_report import summary
from scmoe.experiments.bench.speed_chart import draw
from scmoe.experiments.engine.profiles import events_of, recorded
from scmoe.experiments.engine.ranks import run_alone

TINY_ROWS = ("top2", "scmoe_pos2", "scmoe_pos2_pipelined")


def pieces(place: Place, share: float) -> Pieces:
    return {"transfers": lambda: transfers(place), "rows": lambda: rows(place, share)}


def rows(place: Place, share: float) -> dict[str, Any]:
    """Returns the report of `bench overlap`, and draws it."""
    setting = setting_at(place, share, **({"rows": TINY_ROWS} if place.tiny else {}))
    found = run_alone(measure, setting)
    report = summary(setting, 1, found)
    report["chart"] = drawn(draw, report, place.out / f"overlap-{share:g}.png")
    given = asdict(setting)
    sizes = {name: given[name] for name in ("dim", "ffn_dim", "tokens", "seq_len", "dtype")}
    return {"wanted_share": share, **sizes, **report}


def transfers(place: Place) -> dict[str, Any]:
    """Returns what one transfer is on the device: copies and kernels, and how much it slows a computation down.

    streaming_multiprocessors: those that its kernels can occupy at most; 0 where copy engines do all of it."""
    device, setting = place.torch_device, setting_at(place, 0.5)
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

    times = in_turn(device, {"transfer": transfer, "compute": compute, "both": both}, 3 if place.tiny else 15)
    facts: dict[str, Any] = {"mb": x.nbytes / 2**20, **{f"{name}_ms": median(own) for name, own in times.items()}}
    facts["gb_per_s_there_and_back"] = x.nbytes / 1e6 / facts["transfer_ms"]
    facts["both_over_longer"] = facts["both_ms"] / max(facts["transfer_ms"], facts["compute_ms"])
    if device.type == "cuda":
        events = spans(events_of(recorded(device, transfer)))
        work = device_work(events)
        blocks = [prod(e["args"]["grid"]) for e in events if e["cat"] == "kernel"]
        there = torch.cuda.get_device_properties(device).multi_processor_count
        facts |= {"copies": work["copies"], "kernels": work["kernels"]}
        facts["streaming_multiprocessors"] = f"{min(max(blocks, default=0), there)} of {there}"
    return facts
