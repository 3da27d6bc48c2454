"""From measured seconds to a choice: the time of every operator, and the best schedule of each MoE
layer by schedule/cost.py. planner.py decides which steps are measured.

With uneven routing ranks compute and send for different times, and wait for each other. So all
times are those of the slowest rank: an operator begins when the last rank of its EP group begins
it, and ends when the last one ends it. Waiting for a late peer counts for no operator. Experts wait
for no peer, so theirs is the longest time of a rank: with chunks, the busiest rank computes while
its peers still receive the last chunk. The ranks' clocks are compared at an all-reduce
(`start_clocks`), not by the time of day: clocks of two machines differ, and CUDA events have no
common clock.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe.moe.operators import Direction
from scmoe.moe.recorder import Mark, Recorder
from scmoe.planning.choice import LayerChoice, ModelChoice
from scmoe.schedule.cost import OperatorTimes, slots
from scmoe.schedule.play import BEFORE, PER_CHUNK, Span
from scmoe.schedule.schedule import ATTENTION_PARTS, Schedule

STREAM = ("route", "encode", "dispatch", "experts", "combine", "decode")
OPERATORS = (*STREAM, "attention", *ATTENTION_PARTS, "mlp", "shared_expert", "current")
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
# of a price: a smaller gain from different slots in each layer is within the noise
WORTH_OWN_SLOTS = 0.98


class Sample(NamedTuple):
    """The seconds of a step in each direction (d), of the slowest rank.

    Of one layer, or with a dimension of layers (L), steps or both before.
    """

    operators_dO: Tensor  # between the tap and the end of the block, in the order of OPERATORS
    before_d: Tensor  # before the tap
    sequential_d: Tensor  # from the tap to the end, without overlap of computing and receiving
    elapsed_d: Tensor  # from the tap to the end, as measured

    @classmethod
    def stacked(cls, samples: Iterable["Sample"]) -> "Sample":
        """Return several samples as one, with a dimension before the others."""
        return cls(*map(torch.stack, zip(*samples, strict=True)))

    def median(self) -> "Sample":
        """Return the medians over the first dimension."""
        return Sample(*(seconds.median(0).values for seconds in self))

    def at_layer(self, layer: int) -> "Sample":
        return Sample(*(seconds[layer] for seconds in self))


def start_clocks(recorders: Sequence[Recorder], group: Any) -> None:
    """Let the recorders of all ranks count from one moment.

    The moment is the end of an all-reduce, which all ranks leave within the latency of a message.
    Every rank must call it. On CUDA it is noted on the stream, and the host does not wait.
    """
    dist.all_reduce(torch.zeros(1, device=device_of(group)), group=group)
    zero = recorders[0].now()
    for recorder in recorders:
        recorder.zero = zero


def seconds_of_slowest_rank(clock: Recorder, group: Any) -> float:
    """Return the seconds from `start_clocks` until now, of the slowest rank.

    It waits for the device. Every rank must call it.
    """
    clock.marks += [
        Mark("step", "forward", True, clock.zero),
        Mark("step", "forward", False, clock.now()),
    ]
    (step,) = clock.spans("forward")
    return gather(torch.tensor([step.end], dtype=torch.float64), group).max().item()


def measured(
    recorders: Sequence[Recorder],
    schedules: Sequence[Schedule],
    group: Any,
    ep_size: int | None = None,
    directions: Sequence[Direction] = DIRECTIONS,
) -> Sample:
    """Return the seconds of all layers in a step, equal on all ranks.

    An operator's are summed over chunks, and the whole attention has its own where it ran in two
    parts. They are the mean over EP groups. Every rank must call it, and `start_clocks` before the
    operators run.

    ep_size: consecutive ranks of `group` that exchange rows; None: all. directions: forward alone
    is inference.
    """
    local_layers = [
        noted(recorder, schedule, directions)
        for recorder, schedule in zip(recorders, schedules, strict=True)
    ]
    times_R = gather(torch.cat(local_layers, 1), group)
    times_GR = times_R.unflatten(0, (-1, ep_size or len(times_R)))
    layers = times_GR.split([times_dN2.shape[1] for times_dN2 in local_layers], 3)
    return Sample.stacked(
        layer_seconds(times, schedule) for times, schedule in zip(layers, schedules, strict=True)
    )


def noted(recorder: Recorder, schedule: Schedule, directions: Sequence[Direction]) -> Tensor:
    """Return when each operator begins and ends on this rank, [directions, N + 1, 2].

    The operators are those between the tap and the end of the block, in the order of
    `operator_names`; then comes all that is before the tap. What was not noted takes no time, at
    the tap.
    """
    rows = []
    for direction in directions:
        tap, spans = from_tap(recorder.spans(direction), direction)
        times = {
            op: [(span.start, span.end) for span in spans if span.operator == op]
            for op in OPERATORS
        }
        row = [times[op].pop(0) if times[op] else (tap, tap) for op in operator_names(schedule)]
        rows.append([*row, before_tap(recorder.spans(direction), tap, direction)])
    return torch.tensor(rows, dtype=torch.float64)


def operator_names(schedule: Schedule) -> list[str]:
    """Return the schedule's operators in the order of OPERATORS."""
    return sorted(schedule.operators(), key=OPERATORS.index)


def layer_seconds(times_GRdN2: Tensor, schedule: Schedule) -> Sample:
    """Return the seconds of one layer, as `measured` does.

    times_GRdN2: what `noted` returned, of each EP group and rank.
    """
    before_Gd2 = times_GRdN2[..., -1, :].amax(1)
    before_d = (before_Gd2[..., 1] - before_Gd2[..., 0]).mean(0)
    times_GRdN2 = times_GRdN2[..., :-1, :]
    begin_GdN, end_GdN = times_GRdN2.amax(1).unbind(-1)
    took_dN = (end_GdN - begin_GdN).mean(0)
    experts = [name == "experts" for name in operator_names(schedule)]
    longest_dN = (times_GRdN2[..., 1] - times_GRdN2[..., 0]).amax(1).mean(0)[:, experts]
    hidden_d = (longest_dN - took_dN[:, experts]).sum(1)
    took_dN[:, experts] = longest_dN
    seconds = []
    for operator in OPERATORS:
        runs_dn = took_dN[:, [name == operator for name in operator_names(schedule)]]
        seconds_d = runs_dn.sum(1)
        if operator not in PER_CHUNK:
            seconds_d = seconds_d / max(1, runs_dn.shape[1])
        seconds.append(seconds_d)
    if schedule.inside_attention:
        core_d, out_d = (seconds[OPERATORS.index(part)] for part in ATTENTION_PARTS)
        seconds[OPERATORS.index("attention")] = core_d + out_d
    elapsed_d = (end_GdN.amax(-1) - begin_GdN.amin(-1)).mean(0)
    return Sample(torch.stack(seconds, 1), before_d, elapsed_d + hidden_d, elapsed_d)


def from_tap(spans: Sequence[Span], direction: Direction) -> tuple[float, list[Span]]:
    """Return the time at the tap, and the spans from the tap to the end of the block.

    Backward is the mirror. If everything before the block is frozen, backward ends before the gate;
    its last span then counts as the tap.
    """
    if direction == "forward":
        tap = next(span.start for span in spans if span.operator == "route")
        return tap, [span for span in spans if span.start >= tap]
    of_gate = [span for span in spans if span.operator == "route"]
    tap = max((span.end for span in of_gate or spans), default=0.0)
    return tap, [span for span in spans if span.end <= tap][::-1]


def before_tap(spans: list[Span], tap: float, direction: Direction) -> tuple[float, float]:
    """Return when what the block computes before its tap begins and ends; in backward it comes
    after the tap."""
    if direction == "forward":
        return min((span.start for span in spans), default=tap), tap
    return tap, max((span.end for span in spans), default=tap)


def price(
    samples: Mapping[int, Sequence[Sample]], configured: Sequence[Schedule], fixed: bool
) -> dict[int, list[ModelChoice]]:
    """Return the candidates by number of chunks, those of the lowest price first.

    They are equal on all ranks, as the samples are. A candidate has one slot for all layers; a
    layer that lacks it takes the one before it. If the best slots of the single layers together
    have a price below WORTH_OWN_SLOTS times the best of these, they are the first candidate.

    samples: by number of chunks, ascending, what `measured` returned for each step. configured: the
    schedule of each layer. fixed: it is the only choice.
    """
    every_step = Sample.stacked(chain.from_iterable(samples.values())).median()
    # the number of chunks changes only these
    per_chunk_O = torch.tensor([operator in PER_CHUNK for operator in OPERATORS])
    seconds = {}
    for chunks, steps in samples.items():
        median = Sample.stacked(steps).median()
        operators_L2O = median.operators_dO.where(per_chunk_O, every_step.operators_dO)
        seconds[chunks] = median._replace(operators_dO=operators_L2O, before_d=every_step.before_d)
    layers = []
    for layer, schedule in enumerate(configured):
        of_layer = {chunks: sample.at_layer(layer) for chunks, sample in seconds.items()}
        layers.append(price_layer(of_layer, schedule, fixed))
    candidates = {}
    for chunks in samples:
        by_slot = [layer[chunks] for layer in layers]
        slots_of_any = sorted({slot_key(choice) for choices in by_slot for choice in choices})
        in_all_layers = [
            tuple(choice_at_slot(choices, slot) for choices in by_slot) for slot in slots_of_any
        ]
        different = {tuple(map(slot_key, choices)): choices for choices in in_all_layers}
        same_slot = sorted(
            map(ModelChoice, different.values()), key=lambda choice: choice.predicted
        )
        best = ModelChoice(
            tuple(min(choices, key=lambda choice: choice.predicted) for choices in by_slot)
        )
        gains = best.predicted < WORTH_OWN_SLOTS * same_slot[0].predicted
        candidates[chunks] = [best, *same_slot] if gains else same_slot
    return candidates


def price_layer(
    seconds: Mapping[int, Sample], configured: Schedule, fixed: bool
) -> dict[int, list[LayerChoice]]:
    """Return the choices of one layer by number of chunks, in the order of slots.

    Choices inside attention are among them where its parts were measured. seconds: of the layer, by
    number of chunks, ascending.
    """
    times = {}
    for chunks, sample in seconds.items():
        directions = zip(sample.operators_dO.tolist(), sample.before_d.tolist(), strict=True)
        times[chunks] = OperatorTimes(
            *(
                dict(zip(OPERATORS, operators, strict=True)) | {BEFORE: before}
                for operators, before in directions
            )
        )
    sequential = tuple(seconds[min(seconds)].sequential_d.tolist())
    choices = {}
    for chunks in seconds:
        in_parts = times[chunks].forward[ATTENTION_PARTS[0]] > 0
        schedules = [configured]
        if not fixed:
            every = slots(replace(configured, chunks=chunks))
            schedules = [s for s in every if in_parts or not s.inside_attention]
        choices[chunks] = [LayerChoice(schedule, times, sequential) for schedule in schedules]
    return choices


def slot_key(choice: LayerChoice) -> tuple[int, bool]:
    """Return the slot and whether it is inside the attention after it, to be sorted."""
    return choice.schedule.slot, choice.schedule.inside_attention


def choice_at_slot(choices: Sequence[LayerChoice], slot: tuple[int, bool]) -> LayerChoice:
    """Return the choice of a layer at this slot, or at the last one before it.

    slot: as `slot_key`. choices: in the order of the window.
    """
    return [choice for choice in choices if slot_key(choice) <= slot or choice is choices[0]][-1]


def gather(values: Tensor, group: Any) -> Tensor:
    """Return the values of all ranks, [ranks, ...] on the host."""
    values = values.to(device_of(group))
    all_values = values.new_empty(dist.get_world_size(group), *values.shape)
    dist.all_gather(list(all_values), values.contiguous(), group=group)
    return all_values.cpu()


def device_of(group: Any) -> torch.device:
    """Return where the group's collectives have their tensors."""
    nccl = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
