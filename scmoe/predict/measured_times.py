"""What a user has measured of the job, as factors on computing, transfers and the host's time: an
advised_rows.Slowdown.

measured_step_ms   milliseconds of a step of a known row. One number cannot say what was slow, so
                   both answers are kept: all of the difference is computing, or all of it is
                   transfers
plan.json          of a run (planning/plan_file.py): the operators of each block, measured alone
a bench's report   of `scmoe bench overlap` at the job's sizes, on links of a given rate: the
                   operators of sequential top-2
a trace            of torch's profiler, with the kernels of cards: those of all-to-all, and those
                   that compute; both in a step. A transfer's kernel also waits for other ranks
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scmoe.config.leaves import ConfigError, show
from scmoe.config.load import read_text
from scmoe.planning.plan_file import plan_from_json
from scmoe.predict.advised_rows import Choice, Simulator, Slowdown
from scmoe.predict.compared_models import Model, rows_are_padded
from scmoe.predict.judged_job import Job
from scmoe.schedule.cost import OperatorTimes
from scmoe.schedule.play import TRANSFERS

FACTORS = 0.05, 50.0  # between which a factor is looked for
ALL_TO_ALL = ("sendrecv", "alltoall", "all_to_all")
STEP = "ProfilerStep#"
REPORT = "calibration"  # the key of a bench's report that has what is read


def known_choice(models: Sequence[Model], job: Job, ranks_per_node: int) -> tuple[Model, Choice]:
    """Return the model of the job's own config, and how it ran when it was measured: in one chunk,
    with one batch in flight; sequential, if it is the standard one. EP: the one that is given, else
    as the config trains: strategy.ep_size, or the largest in a node. ConfigError: the job's ranks
    cannot have the config's."""
    architecture = job.config.moe.architecture
    name = f"scmoe_{job.config.moe.position}" if architecture == "scmoe" else architecture
    model = next((each for each in models[1:] if each.name == name), models[0])
    if len(job.ep_sizes) == 1:
        ep_size = job.ep_sizes[0]
    elif job.trained_ep_size is None:
        node = min(ranks_per_node, job.sizes.ranks)
        ep_size = max(size for size in job.ep_sizes if node % size == 0)
    elif job.trained_ep_size in job.ep_sizes:
        ep_size = job.trained_ep_size
    else:
        raise ConfigError(
            f"strategy.ep_size of the config is {job.trained_ep_size}, allowed on these ranks:"
            f" {' | '.join(map(str, job.ep_sizes))}. Give ep=N of the run that was measured."
        )
    return model, Choice(ep_size, model.schedule, sequential=model is models[0])


def slowdowns_of_step(
    simulator: Simulator, model: Model, choice: Choice, seconds: float
) -> list[Slowdown]:
    """Return the slowdowns with which a row's step takes these seconds: of computing alone, of
    transfers alone. ConfigError: neither can explain it."""

    def total(scale: Slowdown) -> float:
        scaled = Simulator(simulator.machine, simulator.job, scale)
        return scaled.step(model, choice).total

    computing = solve(lambda factor: total(Slowdown(computing=factor, host=factor)), seconds)
    transfers = solve(lambda factor: total(Slowdown(transfers=factor)), seconds)
    scales = []
    if computing is not None:
        scales.append(Slowdown(computing=computing, host=computing))
    if transfers is not None:
        scales.append(Slowdown(transfers=transfers))
    if not scales:
        raise ConfigError(
            f"command line: measured_step_ms is {1e3 * seconds:g}, but the step is predicted as"
            f" {1e3 * total(Slowdown()):.4g} ms, and no factor from {FACTORS[0]} to {FACTORS[1]} on"
            " computing or transfers explains that. Check samples, ep and the cluster."
        )
    return scales


def solve(f: Callable[[float], float], wanted: float) -> float | None:
    """Return the factor in FACTORS at which a growing function has this value; None: it has not."""
    low, high = FACTORS
    if not f(low) <= wanted <= f(high):
        return None
    for _ in range(30):
        factor = (low * high) ** 0.5
        if f(factor) < wanted:
            low = factor
        else:
            high = factor
    return (low * high) ** 0.5


def slowdown_of_file(
    path: Path, simulator: Simulator, models: Sequence[Model], ranks_per_node: int
) -> Slowdown:
    """Return the slowdown that a file says. models: the standard one first. ConfigError: it is
    neither a plan, nor a bench's report, nor a trace of cards."""
    content = parse(path)
    if REPORT in content:
        return slowdown_of_report(content, path, as_scmoe_runs(simulator), models[0])
    model, choice = known_choice(models, simulator.job, ranks_per_node)
    if "layers" in content:
        return slowdown_of_plan(content, path, as_scmoe_runs(simulator), model, choice)
    if "traceEvents" in content:
        return slowdown_of_trace(content["traceEvents"], path, simulator, model, choice)
    raise ConfigError(
        f"measured is {path}, allowed: a plan.json of a run, a report of `scmoe bench overlap`,"
        " or a profiler's trace"
    )


def as_scmoe_runs(simulator: Simulator) -> Simulator:
    """Return a simulator of the same job as scmoe itself runs and measures it: each copy of a token
    travels, in the type of combine's rows and once, and no weight is shared by several ranks."""
    job = simulator.job
    sizes = job.sizes._replace(
        sent=job.sizes.received, once_a_node=False, tensor_parallel=1, transfers_again=False
    )
    return Simulator(simulator.machine, job._replace(sizes=sizes), simulator.scale)


def slowdown_of_trace(
    events: Sequence[Mapping[str, Any]],
    path: Path,
    simulator: Simulator,
    model: Model,
    choice: Choice,
) -> Slowdown:
    """Return the measured seconds of a step's kernels over the predicted ones. The host's time is
    in no kernel."""
    job = simulator.job
    of_others = {
        "tensor_parallel": (job.sizes.tensor_parallel, "gathers and sums"),
        "stage_layers": (job.sizes.stages, "batches between stages"),
    }
    for word, (number, sent) in of_others.items():
        if number > 1:
            raise ConfigError(
                f"command line: measured is a trace, but {word} is given, whose {sent} a trace does"
                " not separate from other transfers. Give measured_step_ms=MS."
            )
    computing, transfers = seconds_of_trace(events, path)
    blocks, _ = simulator.blocks(model, choice.ep_size)
    step = simulator.step(model, choice)
    directions = [[block.times.forward for block in blocks]]
    waits = len(blocks) + job.sizes.hand_overs
    host = job.accumulate * waits * simulator.machine.fixed / 3
    if not job.prefill:
        directions.append([block.times.backward for block in blocks])
        host *= 3
    predicted = job.accumulate * sum(
        times[operator] for each in directions for times in each for operator in TRANSFERS
    )
    if not computing or (predicted and not transfers):
        missing = "all-to-all" if computing else "kernel that computes"
        raise ConfigError(
            f"measured is {path}, which has no {missing}, though EP is {choice.ep_size}. Record a"
            " step with NCCL's all-to-all, or give ep=N of that run."
        )
    of_transfers = transfers / predicted if predicted else 1.0
    return Slowdown(computing / (step.computing + step.update - host), of_transfers)


def parse(path: Path) -> Mapping[str, Any]:
    try:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else read_text(path)
        content = json.loads(text)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(f"measured is {path}, which cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def slowdown_of_plan(
    plan: Mapping[str, Any], path: Path, simulator: Simulator, model: Model, choice: Choice
) -> Slowdown:
    """Return the measured seconds of a plan's operators over the predicted ones."""
    try:
        measured = plan_from_json(plan).layers
    except ValueError as error:
        raise ConfigError(f"measured is {path}, but {error}") from error
    conditions = plan.get("conditions", {})
    trainer = simulator.job.config.trainer
    for key, value in (("precision", trainer.precision), ("recompute", trainer.recompute)):
        if conditions.get(key, value) != value:
            raise ConfigError(
                f"measured is {path}, measured with trainer.{key}={show(conditions[key])}, allowed:"
                f" {show(value)}, as this job has"
            )
    was = conditions.get("ep_size", choice.ep_size)
    if was != choice.ep_size:
        raise ConfigError(
            f"measured is {path}, which was measured with EP {was}, not {choice.ep_size}. Give"
            f" ep={was}."
        )
    blocks, _ = simulator.blocks(model, choice.ep_size)
    if len(blocks) != len(measured) or any(
        layer.schedule.architecture != block.schedule.architecture
        for layer, block in zip(measured, blocks, strict=False)
    ):
        raise ConfigError(
            f"measured is {path}, whose {len(measured)} blocks are not those of this config. Give"
            " the plan of a run of the same model."
        )
    each_layer = zip(measured, blocks, strict=True)
    return slowdown((layer.times[min(layer.times)], block.times) for layer, block in each_layer)


def slowdown_of_report(
    report: Mapping[str, Any], path: Path, simulator: Simulator, standard: Model
) -> Slowdown:
    """Return the measured seconds of the operators of a report's sequential top-2 over the
    predicted ones of a block of the standard model."""
    job = simulator.job
    bench = report.get("setting")
    if bench is None:
        raise ConfigError(f"measured is {path}, which has no setting. Measure again: scmoe bench")
    if bench["link_mbit"] is None:
        raise ConfigError(
            f"measured is {path}, whose links have a rate that was searched for a share. Measure"
            " with --link-mbit, the rate of your network."
        )
    layout = bench["layout"] or ("dropless" if bench["loads"] else "capacity:1")
    if job.config.trainer.recompute:  # its backward would be measured without a third forward
        raise ConfigError(
            f"measured is {path}, a bench, which recomputes nothing, but the job has"
            " trainer.recompute=true. Give the plan of a run of this job: plan.json in its folder."
        )
    usual = {**bench, "row": "top2", "blocks": "gpt", "layout": layout}
    of_job = sizes_as_benched(job, standard)
    differing = [name for name, value in of_job.items() if usual[name] != value]
    if differing:
        benched = ", ".join(f"{name}={usual[name]}" for name in differing)
        asked = ", ".join(f"{name}={of_job[name]}" for name in differing)
        raise ConfigError(
            f"measured is {path}, a bench of {benched}, but the job has {asked}. Measure the job's"
            " own sizes."
        )
    if bench["ranks"] == 1 or bench["ranks"] not in job.ep_sizes:
        several = [str(size) for size in job.ep_sizes if size > 1]
        raise ConfigError(
            f"measured is {path}, a bench of ranks={bench['ranks']}, allowed:"
            f" {' | '.join(several)}, the EP that are tried"
        )
    blocks, _ = simulator.blocks(standard, bench["ranks"])
    times = times_in_report(report[REPORT]["operators_ms"])
    return slowdown([(times, blocks[0].times)])


def sizes_as_benched(job: Job, standard: Model) -> dict[str, Any]:
    """Return what a bench's setting must say to have measured the job's operators. It has blocks of
    gpt as they are by default."""
    model, moe = job.config.model, job.config.moe
    plain = (model.family, model.activation or "gelu", model.attention) == ("gpt", "gelu", "full")
    plain = plain and model.head_dim is None and not moe.zero_experts
    padded = moe.capacity_factor is not None and rows_are_padded(job.config)
    return {
        "row": standard.name,
        "blocks": "gpt" if plain and model.kv_heads is None else "others than gpt's own",
        "compute": "real",
        "dtype": "float32" if job.config.trainer.precision == "32-true" else "bfloat16",
        "layout": f"capacity:{moe.capacity_factor:g}" if padded else "dropless",
        "every": moe.every,
        "dim": model.dim,
        "heads": model.heads,
        "ffn_dim": moe.ffn_dim or model.ffn_dim or 4 * model.dim,
        "num_experts": moe.num_experts,
        "tokens": job.samples * job.config.data.seq_len,
        "seq_len": job.config.data.seq_len,
    }


def times_in_report(operators_ms: Mapping[str, Mapping[str, float]]) -> OperatorTimes:
    """Return the seconds of operators whose milliseconds a report has, of forward and of both
    directions."""
    forward = operators_ms["forward"]
    backward = {name: operators_ms["train"][name] - ms for name, ms in forward.items()}
    return OperatorTimes(
        {name: 1e-3 * ms for name, ms in forward.items()},
        {name: 1e-3 * ms for name, ms in backward.items()},
    )


def slowdown(both: Iterable[tuple[OperatorTimes, OperatorTimes]]) -> Slowdown:
    """Return the measured seconds of operators over the predicted ones. both: measured and
    predicted, of each block; operators that only one of them has are left out."""
    measured = {False: 0.0, True: 0.0}  # by whether it is a transfer
    predicted = {False: 0.0, True: 0.0}
    for known, expected in both:
        directions = ((known.forward, expected.forward), (known.backward, expected.backward))
        for of_known, of_expected in directions:
            for operator in of_known.keys() & of_expected.keys():
                measured[operator in TRANSFERS] += of_known[operator]
                predicted[operator in TRANSFERS] += of_expected[operator]
    transfers = measured[True] / predicted[True] if predicted[True] else 1.0
    computing = measured[False] / predicted[False]
    return Slowdown(computing, transfers, host=computing)


def seconds_of_trace(events: Sequence[Mapping[str, Any]], path: Path) -> tuple[float, float]:
    """Return the seconds of a step in which a card computes, and in which an all-to-all runs."""
    steps = {event["name"] for event in events if event.get("name", "").startswith(STEP)}
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if not (steps and kernels):
        raise ConfigError(
            f"measured is {path}, which has {len(steps)} steps and {len(kernels)} kernels of a"
            " card. Record whole steps on a card with torch.profiler.profile(schedule=...)."
        )
    exchanges = [each for each in kernels if is_all_to_all(each["name"])]
    computing = [each for each in kernels if "nccl" not in each["name"].lower()]
    return covered_s(computing) / len(steps), covered_s(exchanges) / len(steps)


def is_all_to_all(name: str) -> bool:
    return any(word in name.lower() for word in ALL_TO_ALL)


def covered_s(events: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds in which at least one of some events runs; theirs are microseconds."""
    return 1e-6 * sum(end - start for start, end in merged(events))


def merged(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float, float]]:
    """Yield the times in which at least one event runs, without gaps or overlap."""
    now: tuple[float, float] | None = None
    for start, end in sorted((each["ts"], each["ts"] + each["dur"]) for each in events):
        if now is not None and start <= now[1]:
            now = now[0], max(now[1], end)
            continue
        if now is not None:
            yield now
        now = start, end
    if now is not None:
        yield now
