"""`scmoe simulate others`: measurements of other people's clusters (docs/results/others.yaml), each
predicted as `scmoe advise` predicts a job, with the way of running that was measured. Beyond that,
stages may be virtual (interleaved pipelines), and products in 8 bits are faster.

A cell is a ratio of two measured times. Beside each prediction stands the null: the mean of the
other cells of its kind. An interval is as wide as the *other* cells of the kind say; that of all
cells of overlap is CELL_ERROR of scmoe/predict/advise.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from scmoe.config.load import parse_yaml, read_text
from scmoe.predict.advised_rows import Choice, Simulator
from scmoe.predict.asked_config import read_asked
from scmoe.predict.batches import InFlight
from scmoe.predict.cluster import Profile, overridden, read_profile
from scmoe.predict.compared_models import Model, models_for
from scmoe.predict.judged_job import Job, Request, job_in_batches
from scmoe.report import Report, say

LEVEL = 0.9
FP8_TIMES = 1.7  # products in 8 bits over those in 16: twice the peak, of which less is attained
ONCE_A_NODE = ("deepep", "hybridep")
REPEATED_KINDS = ("overlap", "ep", "micro_batch")  # of which there are several cells
WITHOUT_FACTS = ("titan-16b",)  # batch and length are not printed


@dataclass(frozen=True)
class OtherCell:
    """A measured ratio and its prediction. alone: nothing else differs between the two runs. null:
    without the cell."""

    name: str
    kind: str
    blind: bool
    measured: float
    predicted: float
    alone: bool
    null: float = math.nan
    interval: tuple[float, float] = (math.nan, math.nan)

    @property
    def error(self) -> float:
        return math.log(self.predicted / self.measured)

    @property
    def holds(self) -> bool:
        low, high = self.interval
        return low <= self.measured <= high

    @property
    def has_sign(self) -> bool:
        """Whether both are above 1, or both below."""
        return (self.predicted > 1) == (self.measured > 1)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "blind": self.blind,
            "alone": self.alone,
            "measured": self.measured,
            "predicted": self.predicted,
            "error": self.predicted / self.measured - 1,
            "null": self.null,
            "null_error": self.null / self.measured - 1,
            "interval": list(self.interval),
            "holds": self.holds,
            "sign": self.has_sign,
        }


# ---------------------------------------------------------------------- predicting a run


def stage_layers(run: Mapping[str, Any]) -> int:
    """Return the layers of a stage. The last one may have fewer."""
    layers = {"qwen3_30b_a3b": 48, "deepseek_v3": 61}[run["model"]]
    for word in run.get("overrides", ()):
        if word.startswith("model.layers="):
            layers = int(word.partition("=")[2])
    return math.ceil(layers / int(run.get("stages") or 1))


def request_of(run: Mapping[str, Any]) -> Request:
    """Return a run as `scmoe advise` takes it. Of a run without a batch, one sequence."""
    words = [str(word) for word in run.get("overrides", ())]
    if run["model"] == "deepseek_v3":  # all blocks of a stage are equal
        words = [word for word in words if not word.startswith("moe.leading_dense=")]
        words.append("moe.leading_dense=[]")
    tensor_parallel = int(run["tensor_parallel"])
    groups = int(run["gpus"]) // int(run.get("stages") or 1) // tensor_parallel
    prefill = run["mode"] == "prefill"
    seq_len = int(run["seq_len"])
    samples = int(run["tokens_of_rank"]) // seq_len if prefill else int(run["micro_batch"])
    if not prefill:
        batches = int(run["global_batch"]) // (groups * samples)
        words.append(f"trainer.accumulate={batches}")
    full = run.get("recompute") == "full"
    if full:
        words.append("trainer.recompute=true")
    return Request(
        read_asked(run["model"], [*words, f"data.seq_len={seq_len}"]),
        ranks=int(run["gpus"]),
        ep_size=int(run["ep"]),
        samples=samples,
        stage_layers=stage_layers(run),
        tensor_parallel=tensor_parallel,
        copies="node" if str(run["dispatcher"]).startswith(ONCE_A_NODE) else "expert",
        wire="fp8" if str(run.get("wire")).startswith("fp8") or run["precision"] == "fp8" else None,
        transfers_again=full,
        prefill=prefill,
    )


def profile_of(run: Mapping[str, Any]) -> Profile:
    """Return the run's cluster, with tuned kernels and as many ranks as it had."""
    words = [str(word) for word in run.get("cluster_overrides", ())]
    profile = overridden(read_profile(run["cluster"]), ["cluster.kernels=fused", *words])
    if run["precision"] == "fp8":
        faster = profile.values["peak_tflops"].value * FP8_TIMES
        profile = profile.with_values({"peak_tflops": faster})
    return replace(profile, ranks=int(run["gpus"]), memory_gb=None)


def step_of(run: Mapping[str, Any]) -> float:
    """Return the seconds of a run."""
    profile = profile_of(run)
    request = request_of(run)
    job = job_in_batches(request, profile)
    one = replace(request, samples=1)
    first = job_in_batches(one, profile)
    model = model_of(first, profile)
    job = first._replace(
        training=replace(first.training, accumulate=job.accumulate),
        sizes=first.sizes._replace(
            rows=float(job.samples), virtual_stages=int(run.get("virtual_stages") or 1)
        ),
    )
    overlap = run["overlap"]
    choice = Choice(request.ep_size or 1, model.schedule, sequential=True)
    if overlap == "two_batches":
        choice = Choice(choice.ep_size, model.schedule, InFlight.WHOLE)
    elif overlap == "halves":
        choice = Choice(choice.ep_size, model.schedule, InFlight.HALVES)
    elif overlap == "chunks":
        choice = Choice(choice.ep_size, replace(model.schedule, chunks=int(run["chunks"])))
    return Simulator(profile.machine(), job).step(model, choice).total


COUNTED: list[tuple[Any, Model]] = []


def model_of(job: Job, profile: Profile) -> Model:
    """Return the model of a job's own architecture, counted once for equal configs."""
    config = job.config
    key = (config.model, config.moe, config.data.seq_len, config.trainer.recompute)
    for known, model in COUNTED:
        if known == key:
            return model
    compared = models_for(job, profile, "balanced")
    architecture = config.moe.architecture
    (model,) = [each for each in compared if each.schedule.architecture == architecture]
    COUNTED.append((key, model))
    return model


# ---------------------------------------------------------------------- cells


def read_cells(path: Path) -> tuple[dict[str, Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
    """Return the runs of a file, each with what its setup says, and the cells."""
    tree: Any = parse_yaml(read_text(path), str(path))
    runs: dict[str, Mapping[str, Any]] = {
        name: {**tree["setups"].get(run.get("setup"), {}), **run}
        for name, run in tree["runs"].items()
    }
    return runs, tree["cells"]


def predicted_cells(path: Path) -> Iterator[OtherCell]:
    """Yield each cell with its prediction. Those without a batch are left out."""
    runs, cells = read_cells(path)
    steps: dict[str, float] = {}
    for cell in cells:
        names = cell["slow"], cell["fast"]
        without_facts = any(runs[name].get("setup") in WITHOUT_FACTS for name in names)
        if without_facts or cell["kind"] not in REPEATED_KINDS:
            continue
        for name in names:
            if name not in steps:
                steps[name] = step_of(runs[name])
                seconds = runs[name].get("seconds")
                say(f"{name}: {steps[name]:.4g} s, measured {seconds}")
        slow, fast = (steps[name] for name in names)
        yield OtherCell(
            cell["name"],
            cell["kind"],
            cell["blind"] == "true",
            float(cell["ratio"]),
            slow / fast,
            cell["also"] == "null",
        )


def judged(cells: Sequence[OtherCell]) -> list[OtherCell]:
    """Return the cells with null and interval, each from the other cells of its kind."""
    done = []
    for cell in cells:
        others = [each for each in cells if each.kind == cell.kind and each is not cell]
        null = math.exp(mean(math.log(each.measured) for each in others)) if others else math.nan
        width = error_of(others)
        interval = cell.predicted * math.exp(-width), cell.predicted * math.exp(width)
        done.append(replace(cell, null=null, interval=interval))
    return done


def error_of(cells: Sequence[OtherCell]) -> float:
    """Return the error of a ratio's logarithm within which one more cell is with 90 %: the rank of
    split conformal prediction (Lei et al., 2018), at most the last."""
    errors = sorted(abs(cell.error) for cell in cells)
    rank = min(len(errors), math.ceil(LEVEL * (len(errors) + 1)))
    return errors[rank - 1] if errors else math.nan


def simulate_others(path: Path) -> dict[str, Any]:
    """Print the cells by kind on standard error, and return them with their errors."""
    cells = judged([*predicted_cells(path)])
    columns = {
        "measured": "{measured:.3f}",
        "predicted": "{predicted:.3f}",
        "error": "{error:+.1%}",
        "null": "{null_error:+.1%}",
        "90 %": "[{interval[0]:.2f}, {interval[1]:.2f}]",
        "holds": "{holds}",
        "blind": "{blind}",
    }
    summary = {}
    for kind in dict.fromkeys(cell.kind for cell in cells):
        of_kind = [cell for cell in cells if cell.kind == kind]
        rows = {cell.name: cell.to_json() for cell in of_kind}
        Report(f"{kind}: predicted and measured", rows, columns, "cell").show()
        summary[kind] = summary_of(of_kind)
        groups = {name: each for name, each in summary[kind].items() if isinstance(each, dict)}
        Report(
            f"{kind}: {summary[kind]['signs']:.0%} of the signs are right,"
            f" {summary[kind]['holds']:.0%} of the intervals hold; mean errors:",
            groups,
            {"cells": "{cells}", "ours": "{mean_error:.1%}", "null's": "{mean_null_error:.1%}"},
            "cells of",
        ).show()
    cell_error = error_of([cell for cell in cells if cell.kind == "overlap"])
    say(f"90 % of the overlap cells' errors are below {cell_error:.0%}")
    return {
        "cells": {cell.name: cell.to_json() for cell in cells},
        "kinds": summary,
        "cell_error": cell_error,
    }


def summary_of(cells: Sequence[OtherCell]) -> dict[str, Any]:
    """Return the mean errors of all cells, of the blind ones, and of those in which nothing else
    differs; each beside that of the null."""
    groups = {
        "all": cells,
        "blind": [cell for cell in cells if cell.blind],
        "alone": [cell for cell in cells if cell.alone],
    }
    summary: dict[str, Any] = {
        name: {
            "cells": len(group),
            "mean_error": mean(abs(cell.error) for cell in group),
            "mean_null_error": mean(abs(math.log(cell.null / cell.measured)) for cell in group),
        }
        for name, group in groups.items()
        if group
    }
    holds = mean(cell.holds for cell in cells)
    signs = mean(cell.has_sign for cell in cells)
    return {**summary, "holds": holds, "signs": signs}
